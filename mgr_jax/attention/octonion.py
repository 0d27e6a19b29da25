"""Octonion attention: values reach the query through q, k⁻¹ and v as octonions, where the bracketing matters.

y_i = Σ_j p_ij m(q̂_i, k̂_j, v_j) with softmax weights p, unit octonions q̂, k̂, and m = (q k̄)v (early) or q(k̄v) (late).
Late is one attention pass over the values k̄v. Early is one over the 29 numbers of the operator q -> (q k̄)v, since a
weighted sum of operators is an operator: no product of a query and a key is ever formed.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention import octonion_claims, octonion_probe
from mgr_jax.attention import octonion_mixing as mixing
from mgr_jax.attention.mechanism import (
  KVCache,
  Mechanism,
  append,
  group_heads,
  init_cache,
  merge_heads,
  project_qkv,
  projection_cost,
  qkv_specs,
  rope_tables,
  rotate,
  ungroup_heads,
)
from mgr_jax.attention.octonion_options import INITIAL_SHARE, Options, check_head_size
from mgr_jax.attention.octonion_pairs import FEW_QUERIES, blend, dense_mixing, softmax_weights, weighted_operators
from mgr_jax.attention.standard import tiled_attention
from mgr_jax.attention.tiles import padded_length, spans, visible
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec


def param_specs(cfg, opts: Options):
  """Projections, and lam_raw [K] for mix. Raises `ValueError` unless the head size is a multiple of 8."""
  check_head_size(cfg)
  specs = qkv_specs(cfg)
  if opts.bracketing == "mix":
    start = math.log(INITIAL_SHARE / (1 - INITIAL_SHARE))
    specs["lam_raw"] = ParamSpec((cfg.n_kv_head,), ("kv_heads",), role="scalar", init="constant", std=start)
  return specs


class Inputs(NamedTuple):
  """Normalised queries [B, K, R, T, D] and keys [B, K, T, D], as they are scored and as they are multiplied; values."""

  q_score: jax.Array
  k_score: jax.Array
  q: jax.Array
  k: jax.Array
  v: jax.Array


def inputs(params, x_BTC, ctx, cfg, opts: Options) -> Inputs:
  """Projections, norms and positions."""
  q, k, v = project_qkv(params, x_BTC, ctx, rope=False, qk_norm=True)
  rotated = rotate(q, ctx.shared["rope"]), rotate(k, ctx.shared["rope"])
  q, k = rotated if opts.rope_mode == "standard" else (q, k)
  by_head = lambda q, k: (group_heads(q, cfg.n_kv_head), k.swapaxes(1, 2))
  return Inputs(*by_head(*rotated), *by_head(q, k), v.swapaxes(1, 2))


def share(params, opts: Options):
  """λ of every key/value head [K, 1, 1, 1], or `None`: sigmoid(lam_raw)."""
  return jax.nn.sigmoid(params["lam_raw"])[:, None, None, None] if opts.bracketing == "mix" else None


def features(k_BKTD, v_BKTD, opts: Options):
  """What is summed over keys, float32 [B, K, T, width·N]: k̄v for late, else operators."""
  form = mixing.divide if opts.bracketing == "late" else mixing.operator
  return form(mixing.unit(k_BKTD), mixing.wide(v_BKTD))


def finish(sums_BKRTF, q_BKRTD, params, opts: Options):
  """Applies what was summed to the unit queries, float32 [B, K, R, T, D]."""
  sums, q_unit = mixing.wide(sums_BKRTF), mixing.unit(q_BKRTD)
  if opts.bracketing == "late":
    return mixing.multiply(q_unit, sums)
  early = mixing.act(sums, q_unit)
  if opts.bracketing == "early":
    return early
  return blend(share(params, opts), early, mixing.multiply(q_unit, mixing.column(sums)))


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`. Memory O(T) tiled, O(T²·D) in the reference."""
  x = inputs(params, x_BTC, ctx, cfg, opts)
  if opts.impl == "reference":
    out = dense_mixing(x, ctx.segment_ids_BT, opts.bracketing, share(params, opts))
  else:
    summed = features(x.k, x.v, opts).astype(opts.dtype(cfg))
    sums, _ = tiled_attention(x.q_score, x.k_score, summed, ctx.segment_ids_BT, 0, True)
    out = finish(sums, x.q, params, opts)
  aux = octonion_probe.diagnostics(x, out, share(params, opts), ctx) if ctx.probe else {}
  return merge_heads(ungroup_heads(out.astype(x_BTC.dtype)), params["wo"]), aux


def init_state(cfg, opts: Options, batch: int, max_len: int) -> KVCache:
  """As large as that of softmax attention: for late rotated keys and k̄v, else keys as multiplied and values."""
  del opts
  return init_cache(cfg, batch, max_len)


def step(params, x_BtC, state: KVCache, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`. 8+8 multiply-adds per octonion and cached key for late, else 8+72."""
  new = inputs(params, x_BtC, ctx, cfg, opts)
  stored = (new.k_score, features(new.k, new.v, opts)) if opts.bracketing == "late" else (new.k, new.v)
  state = append(state, *(x.swapaxes(1, 2) for x in stored), ctx)
  k, v = (x.swapaxes(1, 2) for x in state)
  # The row of a cached key is its position.
  seen = visible(ctx.positions_BT[:, None, None, :, None], jnp.arange(k.shape[2]))
  if opts.bracketing != "late" and opts.rope_mode == "score_only":
    rope = rope_tables(jnp.arange(k.shape[2])[None], cfg.head_dim, cfg.rope_base)
    weight = softmax_weights(new.q_score, rotate(state.k_BSKD, rope).swapaxes(1, 2), seen)
  else:
    weight = softmax_weights(new.q_score, k, seen)
  if opts.bracketing != "late" and weight.shape[2] * weight.shape[3] < FEW_QUERIES:
    sums = weighted_operators(weight, mixing.unit(k), mixing.wide(v))
  else:
    summed = mixing.wide(v) if opts.bracketing == "late" else features(k, v, opts)
    sums = jnp.einsum("bkrts,bksf->bkrtf", weight, summed)
  out = finish(sums, new.q, params, opts)
  return merge_heads(ungroup_heads(out.astype(x_BtC.dtype)), params["wo"]), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """Projections, scores and the sums over keys that the tiles run through; products count as vector work."""
  H, K, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
  N = D // mixing.COMPONENTS
  if opts.impl == "reference":
    pairs = Cost(matmul=4.0 * T * H * D, vector=T * H * (3.0 + 2 * 128 * N), exp=T * H)
  else:
    keys = seen_keys(T)
    width = opts.width * N
    pairs = Cost(matmul=2.0 * keys * H * (D + width), vector=3.0 * keys * H, exp=keys * H)
    pairs += Cost(vector=2.0 * N * (64 * H + (64 if opts.bracketing == "late" else 176) * K))
  cache = 2.0 * K * D * jnp.dtype(cfg.compute_dtype).itemsize
  return projection_cost(cfg) + pairs + Cost(bytes=cache * T / 2)


def seen_keys(T: int) -> float:
  """Keys per query that tiles compute, masked ones included: T for one tile, 9T/16 for many."""
  found = spans(padded_length(T))
  return sum((s.stop - s.q_start) * (s.stop - s.k_start) for s in found) / T


_RECORD = Mechanism(
  name="octonion",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=init_state,
  step=step,
  cost=cost,
  refs=(
    "Baez, 2002, arXiv math/0105155 (octonions, Cayley-Dickson doubling)",
    "Conway and Smith, 2003, On quaternions and octonions",
    "Dao et al., 2022, arXiv 2205.14135 (tiling; not its GPU kernel)",
    "Parcollet et al., 2018, arXiv 1806.04418 (quaternion networks; not their layers)",
  ),
  variants=(
    "octonion",
    "octonion(bracketing=late,impl=tiled)",
    "octonion(bracketing=mix,feature_dtype=fp32)",
    "octonion(rope_mode=standard,impl=reference)",
  ),
)

MECHANISM = dataclasses.replace(_RECORD, claims=octonion_claims.mechanism_claims(_RECORD))
