"""Mode `trilinear`: softmax over pairs (i, j) of earlier tokens, with a score linear in query, key and second key.

L_tij = τ (T3(q̃_t, k̃_i, k̃'_j)/√(2D) + <q_t, k_i>/√D),   i in (t - w1, t], j in (t - w2, t]
y_t = Σ_ij softmax(L_t)_ij v_i∘(1 + v'_j)

Without the three-way score and the second value this is windowed softmax attention. (Clift et al., 2019, arXiv
1909.00668; in windows: Roy et al., 2025, arXiv 2507.02754.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra.trilinear import FORMS, Pairs, dense_pair_attention, pair_mask, pair_values, rotate_by_charge
from mgr_jax.attention.mechanism import group_heads, project_heads, rotate, ungroup_heads
from mgr_jax.attention.simplicial_blocks import Shape, groups, pair_attention
from mgr_jax.attention.simplicial_inputs import (
  heated,
  key_side,
  normalised,
  second_edge_cost,
  second_edge_specs,
  segments_or_one,
  temperature_spec,
)
from mgr_jax.attention.simplicial_options import Options
from mgr_jax.attention.simplicial_probe import pair_diagnostics
from mgr_jax.flops import Cost


class Keys(NamedTuple):
  """What is remembered of a token, [B, T, K, D]; keys already rotated."""

  k: jax.Array
  v: jax.Array
  k_pair: jax.Array | None
  k2: jax.Array
  v2: jax.Array


SECOND = ("k2", "v2")
"""Fields that only the short window needs."""


def specs(cfg, opts: Options):
  """wk2, wv2 [C, K, D] and log τ [H]."""
  del opts
  return second_edge_specs(cfg) | temperature_spec(cfg)


def _queries_and_keys(params, x_BTC, ctx, opts: Options):
  """(q, q_pair) [B, T, H, D] scaled, and `Keys`."""
  q, k, k2 = (normalised(params, x_BTC, name) for name in ("wq", "wk", "wk2"))
  v, v2 = (project_heads(x_BTC, params[name]) for name in ("wv", "wv2"))
  D = q.shape[-1]
  q_pair = k_pair = None
  if opts.pair:
    q_pair, k_pair = (rotate(x, ctx.shared["rope"]) for x in (heated(q, params, D**-0.5), k))
  q = heated(q, params, FORMS[opts.score].scale(D))
  if opts.rotates:
    cos, sin = (table[:, :, None] for table in ctx.shared["rope"])
    turn = lambda x, n: rotate_by_charge(x.astype(jnp.float32), cos, sin, n).astype(x.dtype)
    q, k, k2 = turn(q, 0), turn(k, 1), turn(k2, 2)
  return (q, q_pair), Keys(k, v, k_pair, k2, v2)


def _pairs(queries, keys: Keys, n_kv_head: int, opts: Options) -> Pairs:
  q, q_pair = (None if x is None else group_heads(x, n_kv_head) for x in queries)
  k, v, k_pair, k2, v2 = (None if x is None else key_side(x) for x in keys)
  return Pairs(q, k, k2, v, *pair_values(opts.value_mix, v2), q_pair, k_pair)


def _attend(pairs: Pairs, windows, segments, opts: Options):
  form, (w1, w2) = FORMS[opts.score], windows
  T, S = pairs.q.shape[3], pairs.k.shape[2]
  if opts.impl == "reference":
    return dense_pair_attention(form, pairs, pair_mask(T, S, w1, w2, segments), opts.sink)
  return pair_attention(form, Shape(w1, w2, min(opts.block, T), opts.sink), pairs, segments)


def mix(params, x_BTC, ctx, cfg, opts: Options):
  """Outputs [B, T, H, D] of a whole sequence, and diagnostics."""
  T = x_BTC.shape[1]
  pairs = _pairs(*_queries_and_keys(params, x_BTC, ctx, opts), cfg.n_kv_head, opts)
  windows = opts.windows(T)
  out, lse = _attend(pairs, windows, segments_or_one(ctx, T), opts)
  aux = {}
  if ctx.probe:
    aux = pair_diagnostics(params, pairs, windows, ctx.segment_ids_BT, opts) | {"logsumexp": jnp.mean(lse)}
  return ungroup_heads(out), aux


def init_state(cfg, opts: Options, batch: int, max_len: int) -> Keys:
  """Ring buffers of the last w1 (first token) and w2 (second token) tokens; the size does not grow with `max_len`."""
  w1, w2 = opts.windows(max_len)
  ring = lambda w: jnp.zeros((batch, w, cfg.n_kv_head, cfg.head_dim), cfg.compute_dtype)
  return Keys(ring(w1), ring(w1), ring(w1) if opts.pair else None, ring(w2), ring(w2))


def step(params, x_BtC, state: Keys, ctx, cfg, opts: Options):
  """t new tokens against the rings: 4·w1·w2·D FLOPs per token and query head."""
  t = x_BtC.shape[1]
  windows = state.k.shape[1], state.k2.shape[1]
  queries, new = _queries_and_keys(params, x_BtC, ctx, opts)
  start = jnp.broadcast_to(ctx.positions_BT[:, :1], (x_BtC.shape[0], 1))
  past = start + jnp.arange(-windows[0], 0)
  both = jax.tree.map(lambda ring, x: jnp.concatenate([_history(ring, past), x], 1), state, new)
  segments = jnp.pad(jnp.where(past >= 0, 0, -1), ((0, 0), (0, t)))
  out, _ = _attend(_pairs(queries, both, cfg.n_kv_head, opts), windows, segments, opts)
  state = jax.tree.map(lambda ring, x: _remember(ring, x, start, ctx.valid_BT), state, new)
  return ungroup_heads(out), state


def _history(ring_BWKD, past_BS):
  """The tokens at positions `past`; whatever lies beyond the ring's reach is arbitrary and outside the window."""
  slots = (past_BS % ring_BWKD.shape[1])[:, :, None, None]
  return jnp.take_along_axis(ring_BWKD, slots, axis=1)


def _remember(ring_BWKD, new_BtKD, start_B1, valid_BT):
  """Writes the last W real tokens to slot position mod W; two tokens never meet in one slot."""
  (B, W), t = ring_BWKD.shape[:2], new_BtKD.shape[1]
  real = jnp.ones((B, t), bool) if valid_BT is None else valid_BT
  count = jnp.sum(real, -1, keepdims=True)
  index = jnp.arange(t)
  slots = jnp.where(real & (index >= count - W), (start_B1 + index) % W, W)
  return ring_BWKD.at[jnp.arange(B)[:, None], slots].set(new_BtKD.astype(ring_BWKD.dtype), mode="drop")


def cost(cfg, opts: Options, T: int) -> Cost:
  """wk2, wv2, and per token and query head 4·w2·m·D FLOPs, 2·m·D more with `pair`; m counts the keys of whole tiles."""
  w1, w2 = opts.windows(T)
  n = min(opts.block, T)
  length = -(-T // n) * n
  area = sum((g.stop - g.start) * g.keys for g in groups(length, Shape(w1, w2, n), 0))
  rows, width = cfg.n_head * area / T, cfg.head_dim
  state = jnp.dtype(cfg.compute_dtype).itemsize * cfg.n_kv_head * width
  return second_edge_cost(cfg) + Cost(
    matmul=rows * width * (4.0 * w2 + 2.0 * opts.pair),
    vector=5.0 * rows * w2 + 7.0 * cfg.n_head * w2 * width,
    exp=rows * w2,
    bytes=state * ((2.0 + opts.pair) * w1 + 2.0 * w2),
  )
