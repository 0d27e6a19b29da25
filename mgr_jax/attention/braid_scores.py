"""Scores of the braid gates: additive a_i + b_j, bilinear <q_i, k_j>/√D + β, and rapidity differences.

Each score is a pair of per-token trees (query side, key side) and a `Score` that combines them, so the gated sum and
the stick-breaking sweep do not know which one they run.
"""

import jax
import jax.numpy as jnp

from mgr_jax.attention.braid_gates import Score, wide

MIN_RAPIDITY = 1e-12  # log sinh and two derivatives stay finite on masked pairs and where an increment has underflowed.


def _sum_keys(d_BKRTS):
  return jnp.sum(d_BKRTS, -1)


def _sum_queries(d_BKRTS, like):
  axes = (2, 3) if like.shape[2] == 1 else (3,)
  return jnp.sum(d_BKRTS, axes).reshape(*d_BKRTS.shape[:2], like.shape[2], d_BKRTS.shape[4])


def _additive_logit(a, b):
  return a[..., :, None] + b[..., None, :]


def _additive_pull(a, b, d):
  return _sum_keys(d), _sum_queries(d, b)


def _product_odds(a, b):
  """exp(-a_i) exp(-b_j): one exponential per token instead of one per pair."""
  return jnp.exp(-a)[..., :, None] * jnp.exp(-b)[..., None, :]


ADDITIVE = Score(_additive_logit, _additive_pull)
BOUNDED_ADDITIVE = ADDITIVE._replace(product_odds=_product_odds)


def _bilinear_logit(q, k):
  scale = k.shape[-1] ** -0.5
  dots = jnp.einsum("bkrtd,bksd->bkrts", q["q"], k[:, :, 0], preferred_element_type=wide(k.dtype))
  return scale * dots + q["bias"][..., None]


def _bilinear_pull(q, k, d):
  scaled = (d * k.shape[-1] ** -0.5).astype(k.dtype)
  dq = jnp.einsum("bkrts,bksd->bkrtd", scaled, k[:, :, 0], preferred_element_type=wide(k.dtype))
  dk = jnp.einsum("bkrts,bkrtd->bksd", scaled, q["q"], preferred_element_type=wide(k.dtype))
  return {"q": dq, "bias": _sum_keys(d)}, dk[:, :, None]


BILINEAR = Score(_bilinear_logit, _bilinear_pull)


def _log_sinh(w):
  """log sinh w for w > 0 without overflow: w + log(1 - e^-2w) - log 2."""
  return w + jnp.log(-jnp.expm1(-2 * w)) - jnp.log(2.0).astype(w.dtype)


def _rapidity_logit(q, k):
  """log sinh(u_i - u_j) - log sinh η, with u = table + tail·increment so that the difference of two tails is exact."""
  tails = q["tail"][..., :, None] - k["tail"][..., None, :]
  w = q["table"][..., :, None] - k["table"][..., None, :] + tails * q["increment"][..., None]
  return _log_sinh(jnp.maximum(w, MIN_RAPIDITY)) - q["log_sinh_eta"][..., None]


def _rapidity_pull(q, k, d):
  return jax.vjp(_rapidity_logit, q, k)[1](d)


RAPIDITY = Score(_rapidity_logit, _rapidity_pull, strict=True)
