"""Pairs of a query and a key: the obvious form, and the sums that a few queries need. Layout as in `standard`."""

import jax
import jax.numpy as jnp

from mgr_jax.algebra import octonions
from mgr_jax.attention import octonion_mixing as mixing
from mgr_jax.attention.octonion_options import COMPONENTS
from mgr_jax.attention.tiles import segment_axes, visible

# With fewer queries per key/value head, forming the operators of all keys costs more than it saves.
FEW_QUERIES = 5


def softmax_weights(q_BKRTD, k_BKSD, seen) -> jax.Array:
  """softmax_j(⟨q_i, k_j⟩/√D) over the keys that are seen, float32 [B, K, R, T, S]."""
  scores = jnp.einsum("bkrtd,bksd->bkrts", q_BKRTD, k_BKSD, preferred_element_type=jnp.float32)
  return jax.nn.softmax(jnp.where(seen, scores * q_BKRTD.shape[-1] ** -0.5, -jnp.inf), -1)


def causal_weights(q_BKRtD, k_BKTD, segment_ids_BT=None) -> jax.Array:
  """`softmax_weights` of the last t of T queries."""
  t, T = q_BKRtD.shape[3], k_BKTD.shape[2]
  segments = (None, None) if segment_ids_BT is None else (segment_ids_BT[:, T - t :], segment_ids_BT)
  seen = visible(jnp.arange(T - t, T)[:, None], jnp.arange(T), 0, *segment_axes(*segments))
  return softmax_weights(q_BKRtD, k_BKTD, seen)


def both_bracketings(q_BKRtD, k_BKTD, v_BKTD):
  """(q̂_i k̂_j⁻¹)v_j and q̂_i(k̂_j⁻¹v_j) for all pairs, each as eight arrays [B, K, R, t, T, N]."""
  q = [x[..., None, :] for x in mixing.split(mixing.unit(q_BKRtD))]
  k, v = ([x[:, :, None, None] for x in mixing.split(y)] for y in (mixing.unit(k_BKTD), mixing.wide(v_BKTD)))
  early = octonions.multiply(octonions.multiply(q, octonions.conjugate(k)), v)
  return early, octonions.multiply(q, octonions.multiply(octonions.conjugate(k), v))


def blend(share, early, late):
  """The mixture with a share of `early`."""
  return late + share * (early - late)


def dense_mixing(x, segment_ids_BT, bracketing: str, share=None):
  """Σ_j p_ij m(q̂_i, k̂_j, v_j) of the layer's `Inputs`, float32 [B, K, R, T, D]; time and memory O(T²·D)."""
  weight = causal_weights(x.q_score, x.k_score, segment_ids_BT)
  early, late = (
    mixing.join([jnp.einsum("bkrts,bkrtsn->bkrtn", weight, part) for part in m])
    for m in both_bracketings(x.q, x.k, x.v)
  )
  return {"early": early, "late": late}[bracketing] if bracketing != "mix" else blend(share, early, late)


def weighted_operators(weight_BKRTS, k_BKSD, v_BKSD) -> jax.Array:
  """Σ_j p_j times the operator of (k_j, v_j), [B, K, R, T, 29·N], from the 64 sums Σ_j p_j k_ja v_jb per octonion.

  Time and memory O(R·T·S·D): no features of the keys, but a weighted copy of them for every query.
  """
  (B, K, R, T, S), D = weight_BKRTS.shape, k_BKSD.shape[-1]
  n = D // COMPONENTS
  weighted = (weight_BKRTS[..., None] * k_BKSD[:, :, None, None]).reshape(B, K, R * T, S, COMPONENTS, n)
  outer = jnp.einsum("bkisan,bkscn->bkiacn", weighted, v_BKSD.reshape(B, K, S, COMPONENTS, n))
  at = lambda a, c: outer[:, :, :, a, c]
  trace = octonions.signed_sum([(1, at(a, a)) for a in range(COMPONENTS)])
  skew = [at(a, b) - at(b, a) for a, b in octonions.PAIRS]
  return mixing.join(octonions.operator([trace, *skew])).reshape(B, K, R, T, -1)
