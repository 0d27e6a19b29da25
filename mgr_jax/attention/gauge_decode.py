"""Decoding: keys and values are cached in the common frame, and only the frame of the last token moves on.

A cached key is never transported again: the new query carries T_t. Beside the cache stand T of the last token (2·D
numbers per key/value head at b = 4) and the number of tokens it belongs to. A cache that is cut back without its frame
would give wrong answers; it gives NaN instead.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.gauge_connection import capped, connect, push, raw_generators
from mgr_jax.attention.gauge_fibres import fibre
from mgr_jax.attention.gauge_options import Options
from mgr_jax.attention.gauge_poisson import init_hops, step_hops
from mgr_jax.attention.mechanism import KVCache, append, init_cache, merge_heads, project_qkv
from mgr_jax.attention.standard import Options as Softmax
from mgr_jax.attention.standard import mix_cached


class GaugeState(NamedTuple):
  """Cache in the common frame, T of the last token [B, K or 1] in float32, how many tokens it has seen [B], and where
  they apply the last input [B, C] and the powers of the Poisson mixer."""

  cache: KVCache
  frame_BK: Any
  seen_B: jax.Array
  last_BC: jax.Array | None
  hops: Any


def init_state(cfg, opts: Options, batch: int, max_len: int) -> GaugeState:
  """Nothing seen yet: every frame is the identity."""
  heads = cfg.n_kv_head if opts.share == "kv" else 1
  return GaugeState(
    cache=init_cache(cfg, batch, max_len),
    frame_BK=fibre(opts.b).identity(batch, heads, cfg.head_dim // opts.b),
    seen_B=jnp.zeros((batch,), jnp.int32),
    last_BC=jnp.zeros((batch, cfg.n_embd), cfg.compute_dtype) if opts.context == "edge" else None,
    hops=init_hops(cfg, opts, batch, max_len) if opts.mixer == "poisson" else None,
  )


def step(params, x_BtC, state: GaugeState, ctx, cfg, opts: Options, pulled):
  """t >= 1 new tokens; see `Mechanism`. `pulled` maps frames and q, k, v to the common frame."""
  B, t = x_BtC.shape[:2]
  in_step = state.seen_B == ctx.positions_BT[:, 0]
  start = jax.tree.map(lambda x: jnp.where(in_step.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan), state.frame_BK)
  a = capped(raw_generators(params, x_BtC, opts, state.last_BC), opts.theta_max)
  F = connect(a, cfg, opts, start, ctx.valid_BT)
  q, k, v = project_qkv(params, x_BtC, ctx, rope=False, qk_norm=True)
  q, k, v = pulled(F, q, k, v, ctx, cfg, opts)
  cache = append(state.cache, k, v, ctx)
  if opts.mixer == "poisson":
    out, hops = step_hops(params, q, cache, state.hops, ctx, cfg, opts)
  else:
    out, hops = mix_cached(q, cache.k_BSKD, cache.v_BSKD, params, ctx, cfg, Softmax()), None
  if opts.values == "transport":
    out = push(F, out, cfg, opts)
  n_valid = jnp.full((B,), t, jnp.int32) if ctx.valid_BT is None else jnp.sum(ctx.valid_BT, 1, dtype=jnp.int32)
  last = state.last_BC
  if last is not None:
    inputs = jnp.concatenate([last[:, None], x_BtC.astype(last.dtype)], 1)
    last = jnp.take_along_axis(inputs, n_valid[:, None, None], 1)[:, 0]
  state = GaugeState(
    cache, jax.tree.map(lambda x: x[:, -1], fibre(opts.b).rotation(F)), state.seen_B + n_valid, last, hops
  )
  return merge_heads(out, params["wo"]), state
