"""Diagnostics of gated sums: what the gates of the last few queries look like. Run only when asked for."""

import jax
import jax.numpy as jnp

from mgr_jax.algebra.additive_gate import chebyshev_features, non_nested_fraction
from mgr_jax.attention.braid_chebyshev import key_features
from mgr_jax.attention.braid_gates import Score, dense_gates
from mgr_jax.attention.braid_options import Options
from mgr_jax.attention.mechanism import group_heads
from mgr_jax.attention.tiles import segment_axes, visible

QUERIES = 64
QUANTILES = (0.1, 0.5, 0.9)


def gate_diagnostics(score: Score, q, k, mass_BTH, n_kv_head: int, ctx, opts: Options) -> dict[str, jax.Array]:
  """Float32 scalars and small arrays, from at most the last 64 queries of each row.

  gate_mean, gate_variance: over visible pairs. mass: mean Σ_j w_ij. selected_quantiles (discrete): 10, 50 and 90 %
  points of the selected share of the visible keys. saturation: share of scores with |a|, |b| > 0.95·M (additive).
  interpolation: largest error of the Chebyshev gates (soft additive without recency). non_nested: share of query pairs
  whose selections are not ordered by inclusion (bilinear; zero by construction otherwise).
  """
  T = mass_BTH.shape[1]
  start = max(0, T - QUERIES)
  q, k = jax.tree.map(lambda x: group_heads(x, n_kv_head), (jax.tree.map(lambda x: x[:, start:], q), k))
  segments = ctx.segment_ids_BT
  segments = (None, None) if segments is None else segment_axes(segments[:, start:], segments)
  mask = visible(jnp.arange(start, T)[:, None], jnp.arange(T), 0, *segments)
  hard = opts.mode == "discrete"
  gate = dense_gates(score, hard, q, k, mask)
  mask = jnp.broadcast_to(mask, gate.shape)
  pairs = jnp.sum(mask)
  mean = jnp.sum(gate) / pairs
  aux = {
    "gate_mean": mean,
    "gate_variance": jnp.sum(jnp.where(mask, jnp.square(gate - mean), 0.0)) / pairs,
    "mass": jnp.mean(mass_BTH),
  }
  if hard:
    share = jnp.sum(gate, -1) / jnp.sum(mask, -1)
    aux["selected_quantiles"] = jnp.quantile(share, jnp.asarray(QUANTILES))
  if opts.scoring == "bilinear":
    selected = (score.logit(q, k) > 0).reshape(-1, *gate.shape[-2:])
    aux["non_nested"] = jnp.mean(jax.vmap(non_nested_fraction)(selected, mask.reshape(selected.shape)))
  elif not opts.recency:
    edge = 0.95 * opts.bound_M
    aux["saturation"] = 0.5 * (jnp.mean(jnp.abs(q) > edge) + jnp.mean(jnp.abs(k + opts.tau) > edge))
    if not hard:
      features = chebyshev_features(q, opts.cheb_rank, opts.bound_M)
      interpolant = jnp.einsum("bkrtm,bksm->bkrts", features, key_features(k[:, :, 0], opts.cheb_rank, opts.bound_M))
      aux["interpolation"] = jnp.max(jnp.where(mask, jnp.abs(interpolant - gate), 0.0))
  return aux
