"""Hard overwrite: a query reads the latest token of its own leaf, or of a prefix of it, found by sorting.

Sorting tokens by (node, time), queries after keys of the same time, puts in front of every query the key it looks for:
T log T per level, and exact in integers of any size. With prefixes, o = Σ_l α_l (latest value at level l); with
back-off the deepest level with a value. Where nothing was written, the null value stands.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_routing import choices, confidence, node_ids
from mgr_jax.attention.fractal_table import Sides, with_ones


class Found(NamedTuple):
  """Token numbers, -1 where there is none: what each query reads [..., R, T], and what each key overwrites [..., T]."""

  latest: jax.Array
  overwritten: jax.Array


def find_latest(query_node_RT: jax.Array, key_node_T: jax.Array) -> Found:
  """For each query i the latest key j <= i with the same node; for each key the one before it with the same node."""
  R, T = query_node_RT.shape
  time = jnp.arange(T, dtype=jnp.int32)
  node = jnp.concatenate([key_node_T, query_node_RT.reshape(-1)])
  when = jnp.concatenate([2 * time, jnp.tile(2 * time + 1, R)])
  node, when, item = jax.lax.sort((node, when, jnp.arange(len(node), dtype=jnp.int32)), num_keys=2)
  place = jnp.arange(len(node), dtype=jnp.int32)
  is_key = item < T
  newest = jax.lax.cummax(jnp.where(is_key, place, -1))
  before = jnp.pad(newest[:-1], (1, 0), constant_values=-1)
  source = jnp.where(is_key, before, newest)
  same = (source >= 0) & (node[source] == node)
  found = jnp.zeros_like(item).at[item].set(jnp.where(same, item[source], -1))
  return Found(found[T:].reshape(R, T), found[:T])


def read_latest(sides: Sides, opts: Options, segment_ids_BT=None) -> list[jax.Array]:
  """[value, 1 if found] of the levels that the options read, each [B, K, R, T, D+1]; gradients as of the table's."""
  T = sides.v.shape[2]
  index = jnp.arange(T)
  first = jnp.zeros((1, T), jnp.int32)
  if segment_ids_BT is not None:
    border = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    first = jax.lax.cummax(jnp.where(jnp.pad(border, ((0, 0), (1, 0))), index, 0), axis=1)
  nodes = [node_ids(choices(p, opts), opts) for p in (sides.q, sides.k)]
  trust = [jnp.concatenate([jnp.ones_like(p[..., :1]), confidence(p, opts)], -1) for p in (sides.q, sides.k)]
  rows = with_ones(sides.v)
  out = []
  for level in levels_read(opts):
    found = jax.vmap(jax.vmap(find_latest))(nodes[0][level], nodes[1][level])
    overwritten = jnp.where(found.overwritten >= first[:, None], found.overwritten, -1)
    latest = jnp.where(found.latest >= first[:, None, None], found.latest, -1)
    # A write leaves (1 - φ) of what was there: nothing, since φ = 1, but φ's gradient sees it.
    written = trust[1][..., level, None]
    table = written * rows + (1 - written) * jax.lax.stop_gradient(_take(rows, overwritten))
    B, K, R = latest.shape[:3]
    read = _take(table, latest.reshape(B, K, R * T)).reshape(B, K, R, T, -1)
    out.append(trust[0][..., level, None] * read)
  return out


def levels_read(opts: Options) -> range:
  """The leaf level alone, all levels from the root for `prefix`, all but the root for back-off."""
  if opts.kernel == "prefix":
    return range(opts.depth + 1)
  return range(1 if opts.backoff else opts.depth, opts.depth + 1)


def _take(rows_BKTE, index_BKN):
  """rows[b, k, index], zero where the index is -1."""
  taken = jnp.take_along_axis(rows_BKTE, jnp.maximum(index_BKN, 0)[..., None], axis=2)
  return jnp.where(index_BKN[..., None] >= 0, taken, 0.0)


def merge_levels(reads: list[jax.Array], v_null, alpha_K, opts: Options) -> jax.Array:
  """One value per query from [value, found] of the levels, [B, K, R, T, D]; `v_null` [K, R, 1, D]."""
  fill = lambda read: read[..., :-1] + (1 - read[..., -1:]) * v_null
  if opts.kernel == "prefix":
    weights = jnp.moveaxis(alpha_K, 1, 0)[..., None, None, None]
    return sum(weight * fill(read) for weight, read in zip(weights, reads, strict=True))
  out = fill(reads[0])
  for read in reads[1:]:
    out = jnp.where(read[..., -1:] > 0.5, fill(read), out)
  return out


def read_levels(table_BKGLE, q_BKR, opts: Options) -> list[jax.Array]:
  """`read_latest` of one query per row, from a table of all nodes: each [B, K, R, D+1]."""
  ids = node_ids(choices(q_BKR, opts), opts)
  trust = jnp.concatenate([jnp.ones_like(q_BKR[..., :1]), confidence(q_BKR, opts)], -1)
  out = []
  for level in levels_read(opts):
    start = sum(opts.m**i for i in range(level)) if opts.nodes > opts.leaves else 0
    row = jnp.take_along_axis(table_BKGLE[:, :, 0], (start + ids[level])[..., None], axis=2)
    out.append(trust[..., level, None] * row)
  return out
