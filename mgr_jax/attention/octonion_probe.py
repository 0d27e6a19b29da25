"""Diagnostics of `octonion`: how much the bracketing matters on what the layer sees."""

import jax
import jax.numpy as jnp

from mgr_jax.attention import octonion_mixing as mixing
from mgr_jax.attention.octonion_options import COMPONENTS
from mgr_jax.attention.octonion_pairs import both_bracketings, causal_weights

QUERIES = 16
TINY = 1e-30


def diagnostics(x, out_BKRTD, share, ctx) -> dict[str, jax.Array]:
  """Float32 scalars of the layer's `Inputs` and output, from the last `QUERIES` queries of every row.

  `associator_energy`: Σ p|[q̂, k̂⁻¹, v]|² / Σ p|m|², between 0 and 4; 21/16 for independent uniform directions.
  `coherence`: |y| / Σ p|v| per octonion, 1 when all transported values point the same way. `degenerate`: share of
  octonions of queries and keys that are zero and count as 1. `entropy`: of the softmax weights, nats. `feature_error`:
  relative error of the operators in bfloat16. `share`: λ of every key/value head, for mix.
  """
  q, q_score, out = (y[..., -QUERIES:, :] for y in (x.q, x.q_score, out_BKRTD))
  weight = causal_weights(q_score, x.k_score, ctx.segment_ids_BT)
  early, late = both_bracketings(q, x.k, x.v)
  gap = sum(jnp.square(a - b) for a, b in zip(early, late, strict=True))
  size = sum(jnp.square(a) for a in early)
  weighted = lambda y: jnp.einsum("bkrts,bkrtsn->bkrtn", weight, y)
  reached = sum(jnp.square(a) for a in mixing.split(out))
  carried = weighted(jnp.sqrt(size))
  features = mixing.operator(mixing.unit(x.k), mixing.wide(x.v))
  rounded = jax.lax.reduce_precision(features, exponent_bits=8, mantissa_bits=7)
  aux = {
    "associator_energy": jnp.sum(weighted(gap)) / (jnp.sum(weighted(size)) + TINY),
    "coherence": jnp.mean(jnp.sqrt(reached) / (carried + TINY)),
    "degenerate": (_zero(x.q) + _zero(x.k)) / 2,
    "entropy": -jnp.mean(jnp.sum(weight * jnp.log(weight + TINY), -1)),
    "feature_error": jnp.sqrt(jnp.sum(jnp.square(rounded - features)) / (jnp.sum(jnp.square(features)) + TINY)),
  }
  if share is not None:
    aux["share"] = share[:, 0, 0, 0]
  return jax.tree.map(lambda y: y.astype(jnp.float32), aux)


def _zero(x):
  """Share of octonions that `unit` replaces."""
  parts = mixing.wide(x).reshape(*x.shape[:-1], COMPONENTS, -1)
  return jnp.mean(jnp.sum(parts * parts, -2) <= 1e-12, dtype=jnp.float32)
