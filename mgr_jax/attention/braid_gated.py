"""Modes `soft` and `discrete`: gated sums y_i = N(Σ_{j≤i} w_ij v_j) with w = σ(logit) or step(logit).

With additive logits a_i + b_j every query ranks the keys alike (selections are nested), so one such layer selects by
threshold and cannot recall by content; `score=bilinear` can. Without recency y_i is a symmetric function of the pairs
(b_j, v_j), j <= i. See `braid_chebyshev` and `braid_sorted` for what the additive form buys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention import braid_bins, braid_chebyshev, braid_inputs
from mgr_jax.attention.braid_gates import (
  causal_mask,
  dense_gated_sum,
  gated_sum,
)
from mgr_jax.attention.braid_options import Options
from mgr_jax.attention.braid_probe import gate_diagnostics
from mgr_jax.attention.braid_scores import ADDITIVE, BILINEAR, BOUNDED_ADDITIVE
from mgr_jax.attention.braid_sorted import BASE, sorted_gated_sum
from mgr_jax.attention.mechanism import (
  append,
  group_heads,
  init_cache,
  project_heads,
  rms_norm,
  rotate,
  ungroup_heads,
  write_rows,
)
from mgr_jax.attention.tiles import TILE
from mgr_jax.flops import Cost

# Sequence lengths from which `impl=auto` leaves the tiles, measured on CPU at D = 32 and 64. Sorting is bound by memory
# traffic, where accelerators are relatively slower, so there it starts much later.
CHEBYSHEV_FROM = 512
SORTED_FROM = {"cpu": 2048}
SORTED_FROM_ACCELERATOR = 32768


class ScoreCache(NamedTuple):
  """Key scores (float32) and values of all tokens so far; row b holds its tokens at 0 .. length_b - 1."""

  b_BSK: jax.Array
  v_BSKD: jax.Array


def interpolates(opts: Options) -> bool:
  """Whether σ(a+b) may be replaced by its interpolant: bounded scores, and an error below float32 noise."""
  bounded = opts.scoring == "additive" and not opts.recency
  return bounded and braid_chebyshev.interpolation_error(opts.cheb_rank, opts.bound_M) <= 1e-6


def implementation(opts: Options, T: int) -> str:
  """The implementation that serves a sequence of length T."""
  if opts.impl != "auto":
    return opts.impl
  if opts.mode == "soft" and T >= CHEBYSHEV_FROM and interpolates(opts):
    return "chebyshev"
  sorted_from = SORTED_FROM.get(jax.default_backend(), SORTED_FROM_ACCELERATOR)
  if opts.mode == "discrete" and opts.scoring == "additive" and sorted_from <= T:
    return "sorted"
  return "tiled"


def mix(params, x_BTC, v_BTKD, ctx, cfg, opts: Options):
  """The normalised gated sum [B, T, H, D] of a whole sequence, and diagnostics."""
  del cfg
  q, k = _sides(params, x_BTC, ctx, opts)
  out, mass = gated_sums(q, k, v_BTKD, ctx.segment_ids_BT, opts)
  aux = gate_diagnostics(_score(opts), q, k, mass, v_BTKD.shape[2], ctx, opts) if ctx.probe else {}
  return _normalise(out, mass, ctx.positions_BT, opts.norm), aux


def _sides(params, x, ctx, opts):
  """Query and key side of the logits, trees of [B, T, H or K, ...]."""
  if opts.scoring == "bilinear":
    return _bilinear_queries(params, x, ctx, opts), _bilinear_keys(params, x, ctx)
  a, b = braid_inputs.query_scores(params, x, opts), braid_inputs.key_scores(params, x, opts)
  return braid_inputs.shifted(params, a, b, ctx.positions_BT, ctx.positions_BT, opts)


def _bilinear_queries(params, x, ctx, opts):
  q = rotate(rms_norm(project_heads(x, params["wq"])), ctx.shared["rope"])
  return {"q": q, "bias": jnp.broadcast_to(params["beta"] - opts.tau, q.shape[:3])}


def _bilinear_keys(params, x, ctx):
  return rotate(rms_norm(project_heads(x, params["wk"])), ctx.shared["rope"])


def _score(opts):
  if opts.scoring == "bilinear":
    return BILINEAR
  return ADDITIVE if opts.recency else BOUNDED_ADDITIVE


def gated_sums(q, k, v_BTKD, segment_ids_BT, opts: Options):
  """Σ_j w_ij v_j [B, T, H, D] and Σ_j w_ij [B, T, H], float32, by the implementation that `opts` asks for."""
  hard = opts.mode == "discrete"
  impl = implementation(opts, v_BTKD.shape[1])
  if impl == "chebyshev":
    return _interpolated(opts)(q, k, v_BTKD, segment_ids_BT)
  if impl == "sorted":
    long = v_BTKD.shape[1] >= CHEBYSHEV_FROM
    soft = _interpolated(opts) if long and interpolates(opts) else _tiled(_score(opts), False)
    return sorted_gated_sum(soft, q, k, v_BTKD, segment_ids_BT)
  if impl == "tiled":
    return _tiled(_score(opts), hard)(q, k, v_BTKD, segment_ids_BT)
  return _dense(_score(opts), hard, q, k, v_BTKD, causal_mask(v_BTKD.shape[1], segment_ids_BT))


def _interpolated(opts):
  return functools.partial(braid_chebyshev.chebyshev_gated_sum, rank=opts.cheb_rank, bound=opts.bound_M)


def _tiled(score, hard):
  def run(q, k, v, segment_ids):
    q, k = _group((q, k), v.shape[2])
    return _ungroup(gated_sum(score, hard, q, k, v.swapaxes(1, 2), segment_ids))

  return run


def _dense(score, hard, q, k, v, mask):
  q, k = _group((q, k), v.shape[2])
  return _ungroup(dense_gated_sum(score, hard, q, k, v.swapaxes(1, 2), mask))


def _group(tree, n_kv_head):
  return jax.tree.map(lambda x: group_heads(x, n_kv_head), tree)


def _ungroup(tree):
  return jax.tree.map(ungroup_heads, tree)


def _normalise(out, mass, positions_BT, norm):
  if norm == "sqrt_mass":
    return out * jax.lax.rsqrt(1 + mass)[..., None]
  if norm == "mass":
    return out / (1 + mass)[..., None]
  if norm == "sqrt_count":
    return out * jax.lax.rsqrt(positions_BT + 1.0)[:, :, None, None]
  return out


def _state_kind(opts):
  """What decoding carries: `sums` per interpolation node, per `bins` level, or a `cache` of all tokens."""
  if opts.scoring == "bilinear":
    return "keys"
  if opts.bins and opts.impl != "reference":
    return "bins"
  if opts.mode == "soft" and (opts.impl == "chebyshev" or (opts.impl == "auto" and interpolates(opts))):
    return "nodes"
  return "scores"


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """O(1) sums [B, K, rank or bins, D+1] where the mode allows it, else a cache of `max_len` tokens."""
  kind, K, D = _state_kind(opts), cfg.n_kv_head, cfg.head_dim
  if kind == "keys":
    return init_cache(cfg, batch, max_len)
  if kind == "scores":
    scores = jnp.zeros((batch, max_len, K), jnp.float32)
    return ScoreCache(scores, jnp.zeros((batch, max_len, K, D), cfg.compute_dtype))
  return jnp.zeros((batch, K, opts.bins if kind == "bins" else opts.cheb_rank, D + 1), jnp.float32)


def step(params, x_BtC, v_BtKD, state, ctx, cfg, opts: Options):
  """The normalised gated sums of t new tokens, and the new state."""
  del cfg
  kind, hard = _state_kind(opts), opts.mode == "discrete"
  if kind == "keys":
    state = append(state, _bilinear_keys(params, x_BtC, ctx), v_BtKD, ctx)
    q, k, v = _bilinear_queries(params, x_BtC, ctx, opts), state.k_BSKD, state.v_BSKD
    out, mass = _dense(BILINEAR, hard, q, k, v, _cache_mask(ctx, v))
    return _normalise(out, mass, ctx.positions_BT, opts.norm), state
  a, b = braid_inputs.query_scores(params, x_BtC, opts), braid_inputs.key_scores(params, x_BtC, opts)
  if kind == "scores":
    put = lambda buffer, new: write_rows(buffer, new, ctx.positions_BT, ctx.valid_BT)
    state = ScoreCache(put(state.b_BSK, b), put(state.v_BSKD, v_BtKD))
    index = jnp.arange(state.b_BSK.shape[1])[None, :]
    q, k = braid_inputs.shifted(params, a, state.b_BSK, ctx.positions_BT, index, opts)
    out, mass = _dense(_score(opts), hard, q, k, state.v_BSKD, _cache_mask(ctx, state.v_BSKD))
    return _normalise(out, mass, ctx.positions_BT, opts.norm), state
  if kind == "bins":
    past = braid_bins.read_table(a, state, opts.bound_M, opts.tau)
    state = braid_bins.write_table(state, b, v_BtKD, opts.bound_M, ctx.valid_BT)
  else:
    past = braid_chebyshev.read_state(a, state, opts.bound_M)
    state = braid_chebyshev.write_state(state, b, v_BtKD, opts.bound_M, ctx.valid_BT)
  # The new tokens see each other exactly; padding comes last, so no real token sees it.
  if v_BtKD.shape[1] <= TILE:
    new = _dense(_score(opts), hard, a, b - opts.tau, v_BtKD, causal_mask(v_BtKD.shape[1]))
  else:
    new = gated_sums(a, b - opts.tau, v_BtKD, None, opts)
  out, mass = jax.tree.map(jnp.add, past, new)
  return _normalise(out, mass, ctx.positions_BT, opts.norm), state


def _cache_mask(ctx, cache_BS):
  return ctx.positions_BT[:, None, None, :, None] >= jnp.arange(cache_BS.shape[1])


def cost(cfg, opts: Options, T: int) -> Cost:
  """Per token: scores, gates over the visible keys (4 vector operations each), values at 2·D FLOPs per gate.

  tiled, reference: T/2 gates per head. chebyshev: half a chunk of gates, 2·r² FLOPs for the features and 2·r·(D+1) to
  read (per head) and to write (per key/value head) the state. sorted: half a base block, and per doubling one prefix
  sum per key/value head and one gathered row per head.
  """
  H, K, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
  impl, kind = implementation(opts, T), _state_kind(opts)
  gates = {"chebyshev": min(T, braid_chebyshev.CHUNK) / 2, "sorted": min(T, BASE) / 2}.get(impl, T / 2)
  total = H * gates * Cost(matmul=2.0 * D, vector=4.0)
  item = jnp.dtype(cfg.compute_dtype).itemsize
  if opts.scoring == "bilinear":
    return total + H * gates * Cost(matmul=2.0 * D, exp=1.0) + Cost(bytes=K * T * D * item)
  total += (H + K) * Cost(vector=6.0 * D, exp=2.0)
  if impl == "chebyshev":
    r = opts.cheb_rank
    total += Cost(matmul=2.0 * r * r * H + 2.0 * r * (D + 1) * (H + K), vector=3.0 * r * H, exp=r * K)
  if impl == "sorted":
    total += max(0.0, math.log2(T / BASE)) * Cost(matmul=32.0 * D * K, vector=(H + K) * (D + 2.0))
  rows = {"nodes": 4.0 * opts.cheb_rank * (D + 1), "bins": 4.0 * (D + 1) * max(1, opts.bins).bit_length()}
  return total + Cost(bytes=K * rows.get(kind, T / 2 * (D * item + 4)))
