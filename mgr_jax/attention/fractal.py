"""Fractal attention: tokens choose paths in an m-ary tree, and meet with the probability that their paths coincide.

`attend` weighs earlier values by that probability; `memory` keeps one value per leaf of the tree. With rule `sum` both
are one function, exactly: path overlap is an inner product of m^depth features. The tree's geometry as an iterated
function system is in `algebra.ifs`; a table returns what was stored in it whatever that geometry is.
"""

import dataclasses

import jax.numpy as jnp

from mgr_jax.algebra import ifs_claims
from mgr_jax.attention import fractal_claims, fractal_decode, fractal_probe
from mgr_jax.attention.fractal_chunks import table_sum
from mgr_jax.attention.fractal_inputs import addresses, extra_specs, inputs, merge_null
from mgr_jax.attention.fractal_latest import merge_levels, read_latest, read_levels
from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_overlap import dense_sum, path_overlap
from mgr_jax.attention.fractal_routing import level_groups, table_features
from mgr_jax.attention.fractal_table import CHUNK, ERASE_CHUNK, read, table_overwrite, token_by_token
from mgr_jax.attention.fractal_tiles import tiled_sum
from mgr_jax.attention.mechanism import Mechanism, merge_heads, projection_cost, qkv_specs, ungroup_heads
from mgr_jax.attention.tiles import MAX_SPANS, TILE
from mgr_jax.flops import Cost


def param_specs(cfg, opts: Options):
  """Projections, router, and what the kernel, the decay, the null value and the write gate need."""
  return qkv_specs(cfg) | extra_specs(cfg, opts)


def implementation(cfg, opts: Options, T: int) -> str:
  """The implementation that serves a sequence of length T."""
  if opts.impl != "auto":
    return opts.impl
  if opts.rule == "overwrite":
    return "sorted" if opts.address == "hard" else "chunked"
  return "tiled" if opts.beta == "learned" or break_even(cfg, opts) > T else "chunked"


def break_even(cfg, opts: Options) -> float:
  """The length from which a table costs fewer multiply-adds than pairs: C + 4·L·D/(Σf + D)."""
  D = cfg.head_dim
  return CHUNK + 4.0 * opts.nodes * D / (_pair_width(opts) + D)


def _pair_width(opts: Options) -> int:
  """Σ f of `pair_features`."""
  groups = [len(levels) for levels in level_groups(opts)]
  if opts.kernel == "leaf":
    return sum(opts.m**n for n in groups)
  return 1 + sum(opts.m**i for n in groups for i in range(1, n + 1)) + sum(opts.m**n for n in groups[:-1])


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`."""
  given = inputs(params, x_BTC, ctx, cfg, opts)
  impl = implementation(cfg, opts, x_BTC.shape[1])
  out, mass = _mix(params, given, ctx, opts, impl)
  aux = {}
  if opts.balance:
    aux["aux_loss"] = opts.balance * fractal_probe.imbalance(given.k_digits, opts)
  if ctx.probe:
    aux |= fractal_probe.diagnostics(params, given, mass, ctx, opts)
  return merge_heads(ungroup_heads(out).astype(x_BTC.dtype), params["wo"]), aux


def _mix(params, given, ctx, opts, impl):
  """What every query gets [B, K, R, T, D], and the mass it saw (`None` where there is no such thing)."""
  sides = addresses(params, given, opts)
  if opts.rule == "overwrite":
    return _overwrite(params, sides, given, ctx, opts, impl), None
  out, mass = _sums(sides, given, ctx, opts, impl)
  return merge_null(params, out, mass, given.q_digits.shape), mass


def _sums(sides, given, ctx, opts, impl):
  T = sides.v.shape[2]
  segments = ctx.segment_ids_BT
  if impl == "tiled":
    return tiled_sum(sides, given.beta_KR, segments, opts)
  if impl == "reference" and opts.mode == "attend":
    kernel = path_overlap(sides.q, sides.k, opts.m, sides.alpha_K)
    lag = jnp.arange(T)[:, None] - jnp.arange(T)
    mask = lag >= 0
    if segments is not None:
      mask = mask & (segments[:, :, None] == segments[:, None])[:, None, None]
    return dense_sum(kernel, sides.v, mask, lag, sides.slope_KG, given.beta_KR)
  if impl == "reference":
    soft_read = lambda table, q: read(table, table_features(q, opts, sides.alpha_K)[:, :, :, None])[:, :, :, 0]
    out, _ = token_by_token(sides, None, opts, soft_read, segments)
  else:
    out = table_sum(sides, segments, opts)
  return out[..., :-1], out[..., -1]


def _overwrite(params, sides, given, ctx, opts, impl):
  v_null = params["v_null"].reshape(*given.q_digits.shape[1:3], 1, -1)
  fill = lambda out: out[..., :-1] + (1 - out[..., -1:]) * v_null
  if impl == "sorted":
    return merge_levels(read_latest(sides, opts, ctx.segment_ids_BT), v_null, sides.alpha_K, opts)
  if impl == "chunked":
    return fill(table_overwrite(sides, None, opts, ctx.segment_ids_BT)[0])

  def read_token(table, q):
    if opts.backoff:
      reads = [x[..., None, :] for x in read_levels(table, q, opts)]
      return merge_levels(reads, v_null, None, opts)[..., 0, :]
    return read(table, table_features(q, opts, sides.alpha_K)[:, :, :, None])[:, :, :, 0]

  out, _ = token_by_token(sides, None, opts, read_token, ctx.segment_ids_BT)
  return out if opts.backoff else fill(out)


def cost(cfg, opts: Options, T: int) -> Cost:
  """Per token: projections; router 2·D·depth·m FLOPs per query and key head and 2·(depth·m)² for its normalisation;
  joint features, 2·depth·m FLOPs for each level and feature.

  tiled: 2·(Σf + D) FLOPs, and 4 vector operations, for each of (T + max(64, T/8))/2 keys per head: what whole tiles of
  64 queries and 8 spans of them multiply. chunked: the same with a chunk in the place of T,
  and 2·L·(D+1) to read (per query head) and to write (per table). overwrite: 2·L·(16 + D+1) and 2·L·(D+1).
  sorted: log T comparisons of 3 numbers per item and level. The reference's dense or serial form is not counted.
  """
  H, K, D, f = cfg.n_head, cfg.n_kv_head, cfg.head_dim, opts.depth * opts.m
  impl = implementation(cfg, opts, T)
  total = projection_cost(cfg)
  total += (H + K) * Cost(matmul=2.0 * D * f + 2.0 * f * f, vector=6.0 * f, exp=f)
  if opts.rule == "overwrite" and opts.address == "soft":
    total += Cost(matmul=2.0 * cfg.n_embd * K)
  item = jnp.dtype(cfg.compute_dtype).itemsize
  state = K * 4.0 * opts.nodes * (D + 1) if opts.mode == "memory" else K * T / 2 * (4.0 * f + D * item)
  total += Cost(bytes=state)
  if impl == "sorted":
    levels = len(range(opts.depth + 1)) if opts.nodes > opts.leaves else 1
    return total + H * levels * Cost(vector=3.0 * max(1, T - 1).bit_length() + 4.0 * D)
  tables = H if opts.mode == "attend" and opts.decays else K
  rows = Cost(matmul=2.0 * opts.nodes * (D + 1))
  features = lambda heads: heads * Cost(vector=2.0 * opts.nodes)
  if opts.rule == "overwrite":
    inside = H * Cost(matmul=2.0 * ERASE_CHUNK * (opts.nodes + D + 1))
    return total + inside + H * rows + K * rows + 3 * features(H + K) + Cost(exp=4.0 * K * opts.nodes)
  joint = (H + K) * Cost(matmul=2.0 * f * _pair_width(opts) * max(len(g) for g in level_groups(opts)))
  length = min(T, CHUNK) if impl == "chunked" else T
  keys = (length + max(TILE, length / MAX_SPANS)) / 2
  pairs = H * keys * Cost(matmul=2.0 * (_pair_width(opts) + D), vector=4.0)
  total += joint + pairs
  if impl == "chunked" and T > CHUNK:
    total += H * rows + tables * rows + features(H + tables)
  return total


VARIANTS = (
  "fractal",
  "fractal(kernel=prefix,beta=learned,m=3,depth=3,position=none,balance=0.01)",
  "fractal(impl=chunked,address=hard,depth=3)",
  "fractal(mode=memory,kernel=prefix,impl=chunked,depth=3)",
  "fractal(mode=memory,rule=overwrite,m=2,depth=5,position=rope)",
  "fractal(mode=memory,rule=overwrite,address=hard,m=2,depth=3,backoff=true)",
  "fractal(mode=memory,rule=overwrite,address=hard,kernel=prefix,m=3,depth=2)",
  "fractal(impl=reference,floor_eps=0.1)",
)

_RECORD = Mechanism(
  name="fractal",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=fractal_decode.init_state,
  step=fractal_decode.step,
  cost=cost,
  refs=(
    "Hutchinson, 1981, Fractals and self-similarity",
    "Barnsley and Demko, 1985, Iterated function systems (chaos game, collage theorem)",
    "Katharopoulos et al., 2020, arXiv 2006.16236 (linear attention state)",
    "Yang et al., 2023, arXiv 2312.06635 (gated linear attention in chunks; not its kernel)",
    "Press et al., 2021, arXiv 2108.12409 (linear position decay; here as a factor, not a bias)",
  ),
  variants=VARIANTS,
)

MECHANISM = dataclasses.replace(_RECORD, claims=ifs_claims.CLAIMS + fractal_claims.mechanism_claims(_RECORD))
