"""Softcapped cross-entropy over token chunks, with its gradient computed in the forward pass.

Logits exist one chunk at a time. Under differentiation each chunk's softmax is turned into its gradient at once, so the
head is multiplied three times in all (logits, dx, dW), never a fourth time to recompute logits.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK_LOGITS = 1 << 22


def capped_logits(x_NC: jax.Array, head_CV: jax.Array, softcap: float, vocab_size: int) -> jax.Array:
  """z = c·tanh(xW/c) in float32 (z = xW for c = 0); columns from `vocab_size` on are -inf."""
  z = jnp.matmul(x_NC, head_CV, preferred_element_type=jnp.float32)
  if softcap:
    z = softcap * jnp.tanh(z * (1 / softcap))
  if head_CV.shape[1] > vocab_size:
    z = jnp.where(jnp.arange(head_CV.shape[1]) < vocab_size, z, -jnp.inf)
  return z


def chunk_size(n_tokens: int, padded_vocab: int, chunk: int) -> int:
  """`chunk`, or for 0 the number of tokens with about 4 Mi logits; at most `n_tokens`."""
  return min(n_tokens, chunk or max(1, CHUNK_LOGITS // padded_vocab))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(x_NC, head_CV, targets_N, weights_N, softcap: float, vocab_size: int, chunk: int):
  """Σ_n w_n · (logsumexp(z_n) - z_n[target_n]) in nats, float32.

  Args:
    x_NC, head_CV: final activations and head, both in the compute dtype.
    targets_N, weights_N: int32 ids; float32 weights, not differentiated.
    softcap, vocab_size: see `capped_logits`.
    chunk: tokens per chunk; the peak is `chunk · V` float32 logits.

  Cost: 2·N·C·V FLOPs forward; 6·N·C·V forward and backward together.
  """
  return jnp.sum(token_nll(x_NC, head_CV, targets_N, softcap, vocab_size, chunk) * weights_N)


def token_nll(x_NC, head_CV, targets_N, softcap: float, vocab_size: int, chunk: int) -> jax.Array:
  """Per-token negative log-likelihood in nats, float32 [N]."""

  def body(_, xs):
    x, target = xs
    z = capped_logits(x, head_CV, softcap, vocab_size)
    return None, _logsumexp(z, softcap) - jnp.take_along_axis(z, target[:, None], 1)[:, 0]

  _, nll = jax.lax.scan(body, None, split_chunks((x_NC, targets_N), chunk))
  return nll.reshape(-1)[: x_NC.shape[0]]


def _logsumexp(z, softcap):
  # Softcapped logits are bounded by c, so exp cannot overflow and the running maximum is not needed.
  return jnp.log(jnp.sum(jnp.exp(z), -1)) if 0 < softcap <= 50 else jax.nn.logsumexp(z, -1)


def split_chunks(arrays, chunk):
  """Pads with zeros to whole chunks and splits: [N, ...] -> [N/chunk, chunk, ...]."""
  n = arrays[0].shape[0]
  pad = -n % chunk
  return tuple(jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _fwd_rule(x_NC, head_CV, targets_N, weights_N, softcap, vocab_size, chunk):
  def body(dhead, xs):
    x, target, weight = xs
    z = capped_logits(x, head_CV, softcap, vocab_size)
    lse = _logsumexp(z, softcap)
    onehot = jnp.arange(z.shape[1]) == target[:, None]
    nll = lse - jnp.sum(jnp.where(onehot, z, 0.0), -1)
    dz = weight[:, None] * (jnp.exp(z - lse[:, None]) - onehot)
    if softcap:
      dz *= 1 - jnp.square(jnp.where(jnp.isfinite(z), z, 0.0) * (1 / softcap))
    dz = dz.astype(x.dtype)
    dx = jnp.matmul(dz, head_CV.T, preferred_element_type=jnp.float32).astype(x.dtype)
    return dhead + jnp.matmul(x.T, dz, preferred_element_type=jnp.float32), (nll * weight, dx)

  zero = jnp.zeros(head_CV.shape, jnp.float32)
  dhead, (nll, dx) = jax.lax.scan(body, zero, split_chunks((x_NC, targets_N, weights_N), chunk))
  dx = dx.reshape(-1, x_NC.shape[1])[: x_NC.shape[0]]
  return jnp.sum(nll), (dx, dhead.astype(head_CV.dtype))


def _bwd_rule(softcap, vocab_size, chunk, saved, g):
  del softcap, vocab_size, chunk
  dx, dhead = saved
  return (g * dx).astype(dx.dtype), (g * dhead).astype(dhead.dtype), None, None


cross_entropy.defvjp(_fwd_rule, _bwd_rule)
