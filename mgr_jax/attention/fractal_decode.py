"""Decoding: `attend` keeps the address (depth·m numbers) and value of every token, `memory` a table of fixed size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.fractal_chunks import continue_sum
from mgr_jax.attention.fractal_inputs import addresses, inputs, merge_null
from mgr_jax.attention.fractal_latest import merge_levels, read_levels
from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_overlap import dense_sum, path_overlap
from mgr_jax.attention.fractal_routing import choices, node_ids, table_features
from mgr_jax.attention.fractal_table import (
  empty_table,
  read,
  table_overwrite,
  token_by_token,
  with_ones,
)
from mgr_jax.attention.mechanism import merge_heads, ungroup_heads, write_rows


class PathCache(NamedTuple):
  """Addresses (float32) and values of all tokens so far; row b holds its tokens at 0 .. length_b - 1."""

  k_BSKF: jax.Array
  v_BSKD: jax.Array


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """A cache for `max_len` tokens, or a table [B, K, 1, nodes, D+1] whatever `max_len` is."""
  K, D = cfg.n_kv_head, cfg.head_dim
  if opts.mode == "memory":
    return empty_table(batch, K, 1, opts.nodes, D)
  paths = jnp.zeros((batch, max_len, K, opts.depth * opts.m), jnp.float32)
  return PathCache(paths, jnp.zeros((batch, max_len, K, D), cfg.compute_dtype))


def step(params, x_BtC, state, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`."""
  given = inputs(params, x_BtC, ctx, cfg, opts)
  sides = addresses(params, given, opts)
  v_null = params["v_null"].reshape(*sides.q.shape[1:3], 1, -1)
  if opts.mode == "attend":
    out, mass, state = _attend(sides, given.beta_KR, state, ctx, opts)
    out = merge_null(params, out, mass, sides.q.shape)
  elif opts.rule == "sum":
    out, state = _table_step(continue_sum, sides, state, ctx, opts)
    out = merge_null(params, out[..., :-1], out[..., -1], sides.q.shape)
  elif opts.address == "soft":
    out, state = _table_step(table_overwrite, sides, state, ctx, opts)
    out = out[..., :-1] + (1 - out[..., -1:]) * v_null
  else:
    out, state = _overwrite_rows(sides, v_null, state, ctx, opts)
  return merge_heads(ungroup_heads(out).astype(x_BtC.dtype), params["wo"]), state


def _attend(sides, beta_KR, state, ctx, opts):
  put = lambda buffer, new: write_rows(buffer, new.swapaxes(1, 2), ctx.positions_BT, ctx.valid_BT)
  state = PathCache(put(state.k_BSKF, sides.k), put(state.v_BSKD, sides.v))
  kernel = path_overlap(sides.q, state.k_BSKF.swapaxes(1, 2), opts.m, sides.alpha_K)
  lag = ctx.positions_BT[:, None, None, :, None] - jnp.arange(kernel.shape[-1])
  return *dense_sum(kernel, state.v_BSKD.swapaxes(1, 2), lag >= 0, lag, sides.slope_KG, beta_KR), state


def _table_step(chunked, sides, table, ctx, opts):
  if sides.v.shape[2] > 1 and opts.impl != "reference":
    return chunked(sides, table, opts, None, ctx.valid_BT)
  read_token = lambda table, q: read(table, table_features(q, opts, sides.alpha_K)[:, :, :, None])[:, :, :, 0]
  return token_by_token(sides, table, opts, read_token, None, ctx.valid_BT)


def _overwrite_rows(sides, v_null, table, ctx, opts):
  """Hard overwrite: each token replaces one row, with back-off or prefixes one row per level."""
  B, K = sides.v.shape[:2]
  whole_tree = opts.nodes > opts.leaves
  ids = node_ids(choices(sides.k, opts), opts)
  starts = [sum(opts.m**i for i in range(level)) for level in range(opts.depth + 1)]
  rows = jnp.stack([start + i for start, i in zip(starts, ids, strict=True)] if whole_tree else ids[-1:], -1)
  if ctx.valid_BT is not None:
    rows = jnp.where(ctx.valid_BT[:, None, :, None], rows, opts.nodes)
  at_row, at_head = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]

  def token(table, xs):
    q, row, value = xs
    table = table.at[at_row, at_head, 0, row].set(value[:, :, None], mode="drop")
    reads = [x[:, :, :, None] for x in read_levels(table, q, opts)]
    return table, merge_levels(reads, v_null, sides.alpha_K, opts)[:, :, :, 0]

  xs = (jnp.moveaxis(sides.q, 3, 0), jnp.moveaxis(rows, 2, 0), jnp.moveaxis(with_ones(sides.v), 2, 0))
  table, out = jax.lax.scan(token, table, xs)
  return jnp.moveaxis(out, 0, 3), table
