"""Finite-β attention on the matrix unit: it is linear attention with feature map e^{βx} in log-values.

e^{β y_td} = Σ_{s<=t} <φ(q_t), φ(k_s)> e^{-βλ(t-s)} e^{β v_sd} with φ(x) = e^{βx}. Chunks of c tokens: products inside a
chunk through c×c weights, the past through a D×E state; 2·(c·(D + E) + 2·D·E) FLOPs per token and head.

Every exponential is taken relative to a maximum of the past or of its own token, never of a later one, so the bits of
an output do not depend on the future. Exact while β·(range q + range k + range v) <= 80; beyond that a value that lies
further than 80/β below the largest ones saturates there.

Arrays: q [B, K, R, T, D], k [B, K, T, D], v [B, K, T, E]; positions and document starts [B, T].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.tiles import pad_to

FAR = -1e30  # Stands for -inf where differences of two such numbers are taken.
TINY = 1e-36
CHUNK = 64


class _Past(NamedTuple):
  """Σ_s e^{β(k_sr - key_r)} e^{β(v_sd - value_d)} over the current document, decayed to the last token."""

  total: jax.Array  # [B, K, D, E]
  key: jax.Array  # [B, K, D]
  value: jax.Array  # [B, K, E]


def _top(x, axis):
  """A reference: any constant is right, so no gradient goes through its choice."""
  return jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))


def matrix_attention(q, k, v, decay_K, beta, starts_BT, chunk: int) -> jax.Array:
  """The finite-β output [B, K, R, T, E]; `beta` may be traced. Chunks are recomputed in the backward pass."""
  B, K, R, T, D = q.shape
  E = v.shape[-1]
  c = min(chunk or CHUNK, T)
  N = -(-T // c)
  cut = lambda x, axis: jnp.moveaxis(
    pad_to(x, N * c, axis).reshape(*x.shape[:axis], N, c, *x.shape[axis + 1 :]), axis, 0
  )
  beta = jax.lax.stop_gradient(beta)
  decay = decay_K[:, None]

  def step(past, xs):
    q, k, v, starts = xs
    document = jnp.cumsum(starts, -1)[:, None, :]
    index = jnp.arange(c)
    # Inside the chunk.
    q_top, k_top, v_top = _top(q, -1), _top(k, -1), _top(v, -1)
    product = jnp.einsum("bkrtd,bksd->bkrts", jnp.exp(beta * (q - q_top)), jnp.exp(beta * (k - k_top)))
    log_score = jnp.log(jnp.maximum(product, TINY)) / beta + q_top + k_top[:, :, None, None, :, 0]
    log_score -= (decay[..., None] * (index[:, None] - index))[:, None]
    seen = (index[:, None] >= index) & (document[..., :, None] == document[..., None, :])
    log_weight = jnp.where(seen[:, :, None], log_score + v_top[:, :, None, None, :, 0], FAR)
    near_top = _top(log_weight, -1)
    weight = jnp.exp(beta * (log_weight - near_top))
    near = jnp.einsum("bkrts,bksd->bkrtd", weight, jnp.exp(beta * (v - v_top)))
    near = near_top + jnp.log(jnp.maximum(near, TINY)) / beta
    # The past.
    reach = q + past.key[:, :, None, None, :]
    far_top = _top(reach, -1)
    far = jnp.einsum("bkrtd,bkde->bkrte", jnp.exp(beta * (reach - far_top)), past.total)
    far = far_top + past.value[:, :, None, None, :] + jnp.log(jnp.maximum(far, TINY)) / beta
    far -= (decay * (index + 1))[:, None, :, None]
    far = jnp.where(document[:, :, None, :, None] == 0, far, FAR)
    y = jnp.logaddexp(beta * near, beta * far) / beta
    return _advance(past, k, v, document, decay, beta), y

  past = _Past(jnp.zeros((B, K, D, E), q.dtype), jnp.full((B, K, D), FAR, q.dtype), jnp.full((B, K, E), FAR, q.dtype))
  xs = cut(q, 3), cut(k, 2), cut(v, 2), cut(starts_BT, 1)
  y = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), past, xs)[1]
  return jnp.moveaxis(y, 0, 3).reshape(B, K, R, N * c, E)[:, :, :, :T]


def _advance(past, k, v, document, decay, beta):
  """The state at the end of the chunk: what belongs to the document of its last token."""
  c = k.shape[2]
  same = (document == document[..., -1:])[..., None]
  keep = (document[..., -1] == 0)[..., None]
  aged = jnp.where(same, k - (decay * (c - 1 - jnp.arange(c)))[..., None], FAR)
  old_key = jnp.where(keep, past.key - decay * c, FAR)
  old_value = jnp.where(keep, past.value, FAR)
  stop = jax.lax.stop_gradient
  key = stop(jnp.maximum(old_key, jnp.max(aged, 2)))
  value = stop(jnp.maximum(old_value, jnp.max(jnp.where(same, v, FAR), 2)))
  features = jnp.exp(beta * (aged - key[:, :, None]))
  values = jnp.exp(beta * jnp.where(same, v - value[:, :, None], 0.0))
  kept = jnp.exp(beta * (old_key - key))[..., None] * jnp.exp(beta * (old_value - value))[..., None, :]
  return _Past(past.total * kept + jnp.einsum("bksd,bkse->bkde", features, values), key, value)
