"""Diagnostics of `fractal` and the loss that spreads keys over the tree."""

import jax
import jax.numpy as jnp

from mgr_jax.attention.fractal_inputs import addresses, null_mass
from mgr_jax.attention.fractal_latest import find_latest
from mgr_jax.attention.fractal_options import MAX_LEAVES, Options
from mgr_jax.attention.fractal_overlap import path_overlap
from mgr_jax.attention.fractal_routing import choices, level_entropy, node_ids


def imbalance(digits, opts: Options) -> jax.Array:
  """-Σ_l H(mean over tokens of p_l), averaged over heads: least when every branch is used alike. One scalar."""
  return -jnp.mean(jnp.sum(level_entropy(jnp.mean(digits, (0, 2)), opts), -1))


def diagnostics(params, given, mass, ctx, opts: Options) -> dict[str, jax.Array]:
  """Float32 scalars and arrays per level.

  `entropy_q`, `entropy_k`: of the digits, nats. `overlap`: mean <q_l, k_l> over all pairs. `same_leaf`: share of tokens
  whose own query and key choose one leaf. Of the keys' most likely leaves: `utilisation` (used/L), `perplexity` of
  their use, `fragmentation` 1 - H/log L, `collisions` (share of keys that share a leaf with an earlier one).
  `null_share`: weight of the null value; `least_mass`: smallest denominator over z₀; `largest_weight`: of the last
  query; `staleness`: tokens since the value read was written; `gate`: mean write gate.
  """
  q, k = given.q_digits, given.k_digits
  by_level = lambda p: p.reshape(*p.shape[:-1], opts.depth, opts.m)
  mean_q, mean_k = by_level(jnp.mean(q, (0, 2, 3))), by_level(jnp.mean(k, (0, 2)))
  chosen_q, chosen_k = choices(q, opts), choices(k, opts)
  aux = {
    "entropy_q": jnp.mean(level_entropy(q, opts), (0, 1, 2, 3)),
    "entropy_k": jnp.mean(level_entropy(k, opts), (0, 1, 2)),
    "overlap": jnp.mean(jnp.sum(mean_q * mean_k, -1), 0),
    "same_leaf": jnp.mean(jnp.all(chosen_q == chosen_k[:, :, None], -1).astype(jnp.float32)),
  }
  if opts.leaves <= MAX_LEAVES:
    aux |= _usage(node_ids(chosen_k, opts)[-1], opts)
  sides = addresses(params, given, opts)
  if mass is not None:
    aux |= _weights(sides, mass, null_mass(params, k.shape[1]), given.beta_KR, ctx, opts)
  if sides.slope_KG is not None:
    aux["slope"] = sides.slope_KG.reshape(-1)
  if sides.alpha_K is not None:
    aux["alpha"] = sides.alpha_K
  if given.beta_KR is not None:
    aux["beta"] = given.beta_KR.reshape(-1)
  if given.gate_BKT is not None:
    aux["gate"] = jnp.mean(given.gate_BKT)
  if opts.rule == "overwrite" and opts.address == "hard":
    aux |= _staleness(node_ids(chosen_q, opts)[-1], node_ids(chosen_k, opts)[-1])
  return jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(jnp.float32), aux)


def _usage(leaf_BKT, opts):
  counts = jax.vmap(lambda leaf: jnp.bincount(leaf.reshape(-1), length=opts.leaves))(leaf_BKT.swapaxes(0, 1))
  share = counts / leaf_BKT[:, 0].size
  entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), -1)
  used = jnp.sum(counts > 0, -1)
  return {
    "utilisation": jnp.mean(used / opts.leaves),
    "perplexity": jnp.mean(jnp.exp(entropy)),
    "fragmentation": jnp.mean(1 - entropy / jnp.log(float(opts.leaves))),
    "collisions": jnp.mean(1 - used / leaf_BKT[:, 0].size),
  }


def _weights(sides, mass, z, beta_KR, ctx, opts):
  T = mass.shape[-1]
  last = path_overlap(sides.q[:, :, :, -1:], sides.k, opts.m, sides.alpha_K)[..., 0, :]
  if beta_KR is not None:
    last = last ** beta_KR[..., None]
  if sides.slope_KG is not None:
    last = last * jnp.exp(-sides.slope_KG[..., None] * (T - 1 - jnp.arange(T)))
  if ctx.segment_ids_BT is not None:
    last = jnp.where((ctx.segment_ids_BT == ctx.segment_ids_BT[:, -1:])[:, None, None], last, 0.0)
  return {
    "null_share": jnp.mean(z / (mass + z)),
    "least_mass": jnp.min((mass + z) / z),
    "largest_weight": jnp.mean(jnp.max(last, -1) / (mass + z)[..., -1]),
  }


def _staleness(query_leaf, key_leaf):
  latest = jax.vmap(jax.vmap(find_latest))(query_leaf, key_leaf).latest
  found = latest >= 0
  age = jnp.where(found, jnp.arange(latest.shape[-1]) - latest, 0)
  return {
    "staleness": jnp.sum(age) / jnp.maximum(jnp.sum(found), 1),
    "hits": jnp.mean(found.astype(jnp.float32)),
  }
