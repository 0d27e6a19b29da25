"""Products of curvature matrices of the loss with vectors, for optimizers and diagnostics; no matrix is ever formed.

F is the mean cross-entropy of `gpt.loss` over one batch, P the number of parameters, one gradient the unit of cost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.model.cross_entropy import capped_logits, chunk_size, split_chunks
from mgr_jax.model.rows import by_rows

CURVATURES = ("ggn", "hessian")
MODES = ("linearize", "jvp", "reverse")


def product(kind: str, params, batch, cfg: GPTConfig, annealed=None) -> Callable:
  """The linear map v -> A·v of a kind in `CURVATURES`, at `params` on `batch`; see the functions below."""
  return {"ggn": gauss_newton, "hessian": hessian}[kind](params, batch, cfg, annealed)


def hessian(params, batch, cfg: GPTConfig, annealed=None, mode: str = "linearize") -> Callable:
  """v -> ∇²F·v, auxiliary losses of the mechanisms included.

  Args:
    mode: `linearize` evaluates the gradient once and keeps what its derivative needs, 2 gradients per product; `jvp`
      keeps nothing and evaluates the gradient again, 3 per product; `reverse` differentiates <∇F, v>, which needs no
      forward rules.

  Along directions in which a mechanism is piecewise constant or linear (hard maxima, sorting, hard digits) the Hessian
  is zero almost everywhere, and nothing else is reported here. (Pearlmutter, 1994, "Fast exact multiplication by the
  Hessian".)
  """
  gradient = jax.grad(lambda p: gpt.loss(p, batch, cfg, annealed=annealed)[0])
  if mode == "linearize":
    return jax.linearize(gradient, params)[1]
  if mode == "jvp":
    return lambda v: jax.jvp(gradient, (params,), (v,))[1]
  if mode == "reverse":
    inner = lambda p, v: sum(jnp.vdot(g, u) for g, u in zip(*map(jax.tree.leaves, (gradient(p), v)), strict=True))
    return lambda v: jax.grad(inner)(params, v)
  raise ValueError(f"mode={mode!r} is not one of {MODES}")


def gauss_newton(params, batch, cfg: GPTConfig, annealed=None) -> Callable:
  """v -> Jᵀ·H·J·v, J the Jacobian of the logits, H = Σ_n w_n (diag(p_n) - p_n p_nᵀ); positive semidefinite.

  It is the Hessian of F without the second derivatives of the logits and without auxiliary losses (Schraudolph, 2002,
  "Fast curvature matrix-vector products"). J·v is the transpose of the map u -> Jᵀ·u, so that mechanisms with their own
  gradient rules need no forward rules. The forward pass is kept; logits exist one chunk of tokens at a time and are
  recomputed, one more product with the head. 4/3 gradients per product.
  """
  segment_ids = batch["segment_ids"] if cfg.doc_mask else None
  targets, weights = batch["targets"], batch.get("weights")
  weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
  weights /= jnp.maximum(jnp.sum(weights), 1.0)

  def features(params):
    """Activations before the head [B, T, C], and the head, both in the compute dtype."""
    params = gpt.cast(params, cfg)
    return gpt.hidden(params, batch["tokens"], cfg, segment_ids, annealed)[0], params["head"]

  (x, head), backward = jax.vjp(features, params)
  zeros = jax.tree.map(jnp.zeros_like, (x, head))
  # The pullback is linear: its own pullback, taken anywhere, is the pushforward.
  _, forward = jax.vjp(lambda u: backward(u)[0], zeros)

  def apply(v):
    v = jax.tree.map(lambda p, v: v.astype(p.dtype), params, v)
    dx, dhead = forward(v)[0]
    loss = lambda heads, x, ctx: _through_loss(heads, x, *ctx, cfg)
    return backward(by_rows(loss, (head, dhead), x, (dx, weights), jnp.sum))[0]

  return apply


def _through_loss(heads, x_BTC, dx_BTC, weights_BT, cfg: GPTConfig):
  """Jᵀ·H·J of cross-entropy over softcapped logits c·tanh(xW/c) as a function of (x, W), on (dx, dW)."""
  head_CV, dhead_CV = heads
  chunk = chunk_size(weights_BT.size, cfg.padded_vocab, cfg.loss_chunk)
  pieces = split_chunks((x_BTC.reshape(-1, cfg.n_embd), dx_BTC.reshape(-1, cfg.n_embd), weights_BT.reshape(-1)), chunk)
  multiply = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)

  def body(total_CV, piece):
    x, dx, weight = piece
    z = capped_logits(x, head_CV, cfg.logit_softcap, cfg.vocab_size)
    p = jax.nn.softmax(z, axis=-1)
    slope = 1.0
    if cfg.logit_softcap:
      slope = 1 - jnp.square(jnp.where(jnp.isfinite(z), z, 0.0) * (1 / cfg.logit_softcap))
    dz = slope * (multiply(dx, head_CV) + multiply(x, dhead_CV))
    dz = slope * weight[:, None] * p * (dz - jnp.sum(p * dz, -1, keepdims=True))
    dz = dz.astype(x.dtype)
    return total_CV + multiply(x.T, dz), multiply(dz, head_CV.T).astype(x.dtype)

  dhead, dx = jax.lax.scan(body, jnp.zeros(head_CV.shape, jnp.float32), pieces)
  return dx.reshape(-1, cfg.n_embd)[: weights_BT.size].reshape(x_BTC.shape), dhead.astype(head_CV.dtype)
