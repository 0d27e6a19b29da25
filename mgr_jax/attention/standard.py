"""Softmax attention, the yardstick: y_i = Σ_{j≤i} softmax_j(⟨q_i, k_j⟩/√D) v_j (Vaswani et al., 2017, 1706.03762).

Arrays here carry the query heads of one key/value head on their own axis R = H/K: q_BKRTD, k_BKSD, v_BKSD, so grouped
heads share keys without copies.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mgr_jax.attention import standard_cudnn
from mgr_jax.attention.mechanism import Context, group_heads, qkv_mechanism, rope_tables, rotate, ungroup_heads
from mgr_jax.attention.tiles import (
  join_tiles,
  pad_to,
  padded_length,
  segment_axes,
  spans,
  split_tiles,
  tile_mask,
  tile_numbers,
  visible,
)
from mgr_jax.claims import claim
from mgr_jax.flops import Cost
from mgr_jax.problems import raise_if_any


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `standard`.

  Args:
    window: a query sees itself and the `window - 1` tokens before it; 0 sees all.
    qk_norm: RMS-normalise queries and keys, which bounds every score by √D.
    impl: `tiled` (what `auto` picks), `cudnn` (a fused kernel for NVIDIA GPUs in bfloat16) or `reference` (dense
      scores).
  """

  window: int = 0
  qk_norm: bool = True
  impl: str = "auto"

  def __post_init__(self):
    if self.window < 0:
      raise ValueError(f"standard option window={self.window} is negative; use 0 (no window) or a number of tokens")
    if self.impl not in ("auto", "tiled", "cudnn", "reference"):
      raise ValueError(f"standard option impl={self.impl} is not one of auto, tiled, cudnn, reference")


def extra_specs(cfg, opts: Options) -> dict:
  """No parameters of its own; refuses a configuration that the implementation cannot serve."""
  raise_if_any(standard_cudnn.problems(cfg) if opts.impl == "cudnn" else ())
  return {}


def mix(q_BTHD, k_BTKD, v_BTKD, params, ctx: Context, cfg, opts: Options):
  """Attention over a whole sequence: 2·T²·H·D FLOPs causal; memory O(T) tiled, O(T²) in the reference."""
  del params, cfg
  if opts.impl == "cudnn":
    out, lse = standard_cudnn.attention(q_BTHD, k_BTKD, v_BTKD, ctx.segment_ids_BT, opts.window, ctx.probe)
    return out, {"logsumexp": jnp.mean(lse, dtype=jnp.float32)} if ctx.probe else {}
  q = group_heads(q_BTHD, k_BTKD.shape[2])
  k, v = k_BTKD.swapaxes(1, 2), v_BTKD.swapaxes(1, 2)
  if opts.impl == "reference":
    out, lse = dense_attention(q, k, v, ctx.segment_ids_BT, opts.window)
  else:
    out, lse = tiled_attention(q, k, v, ctx.segment_ids_BT, opts.window, opts.qk_norm)
  return ungroup_heads(out), {"logsumexp": jnp.mean(lse)} if ctx.probe else {}


def dense_attention(q, k, v, segment_ids_BT=None, window: int = 0):
  """The obvious form, scores [B, K, R, T, S] in float32. Returns (o_BKRTD, logsumexp_BKRT)."""
  scores = _scores(q, k)
  position = jnp.arange(q.shape[3])
  mask = visible(position[:, None], position[None, :], window, *segment_axes(segment_ids_BT, segment_ids_BT))
  scores = jnp.where(mask, scores, -jnp.inf)
  out = jnp.einsum("bkrts,bksd->bkrtd", jax.nn.softmax(scores, -1), v.astype(jnp.float32))
  return out.astype(v.dtype), jax.nn.logsumexp(scores, -1)


def _scores(q, k):
  scale = q.shape[-1] ** -0.5
  return scale * jnp.einsum("bkrtd,bksd->bkrts", q, k, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def tiled_attention(q, k, v, segment_ids_BT, window: int, bounded: bool):
  """`dense_attention` one query tile at a time, with its own gradient (Dao et al., 2022, arXiv 2205.14135).

  Values may be wider than keys, and of another dtype, which the output then has.

  Args:
    bounded: scores are known to stay below √D in size, so exp needs no running maximum.

  Returns:
    (o_BKRTD, logsumexp_BKRT). The logsumexp is a diagnostic and has no gradient.
  """
  return _tiled_forward(q, k, v, segment_ids_BT, window, bounded)


def _tiled_forward(q, k, v, segment_ids, window, bounded):
  T = q.shape[3]
  q, k, v, segment_ids = _pad(q, k, v, segment_ids)
  outs, lses = [], []
  for span in spans(q.shape[3], window):
    keys, values = k[:, :, span.k_start : span.stop], v[:, :, span.k_start : span.stop]

    def tile(_, xs, span=span, keys=keys, values=values):
      i, q_tile = xs
      scores = jnp.where(tile_mask(span, i, segment_ids, window), _scores(q_tile, keys), -jnp.inf)
      top = 0.0 if bounded else jnp.max(scores, -1, keepdims=True)
      weight = jnp.exp(scores - top)
      mass = jnp.sum(weight, -1, keepdims=True)
      out = jnp.einsum("bkrts,bksd->bkrtd", weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
      return None, ((out / mass).astype(values.dtype), (top + jnp.log(mass))[..., 0])

    _, (out, lse) = jax.lax.scan(tile, None, (tile_numbers(span, q), split_tiles(q, span, 3)))
    outs.append(join_tiles(out, 3))
    lses.append(join_tiles(lse, 3))
  return jnp.concatenate(outs, 3)[:, :, :, :T], jnp.concatenate(lses, 3)[..., :T]


def _tiled_fwd_rule(q, k, v, segment_ids, window, bounded):
  out, lse = _tiled_forward(q, k, v, segment_ids, window, bounded)
  return (out, lse), (q, k, v, segment_ids, out, lse)


def _tiled_bwd_rule(window, bounded, saved, cotangents):
  """With P the weights and δ_i = ⟨dy_i, y_i⟩: dV = Pᵀ dY, dS = P ∘ (dY Vᵀ - δ), dQ = dS K, dK = dSᵀ Q."""
  del bounded
  q, k, v, segment_ids, out, lse = saved
  T, dtype = q.shape[3], q.dtype
  scale = q.shape[-1] ** -0.5
  d_out = cotangents[0]
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
  q, k, v, segment_ids = _pad(q, k, v, segment_ids)
  d_out, delta = pad_to(d_out, q.shape[3], 3), pad_to(delta, q.shape[3], 3)
  lse = pad_to(lse, q.shape[3], 3)
  dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  dqs = []
  for span in spans(q.shape[3], window):
    seen = slice(span.k_start, span.stop)
    keys, values = k[:, :, seen], v[:, :, seen]

    def tile(carry, xs, span=span, keys=keys, values=values):
      dk_seen, dv_seen = carry
      i, q_tile, d_tile, delta_tile, lse_tile = xs
      mask = tile_mask(span, i, segment_ids, window)
      weight = jnp.where(mask, jnp.exp(_scores(q_tile, keys) - lse_tile[..., None]), 0.0)
      d_weight = jnp.einsum("bkrtd,bksd->bkrts", d_tile, values, preferred_element_type=jnp.float32)
      d_score = (scale * weight * (d_weight - delta_tile[..., None])).astype(dtype)
      dq = jnp.einsum("bkrts,bksd->bkrtd", d_score, keys, preferred_element_type=jnp.float32)
      back = functools.partial(jnp.einsum, "bkrts,bkrtd->bksd", preferred_element_type=jnp.float32)
      return (dk_seen + back(d_score, q_tile), dv_seen + back(weight.astype(d_tile.dtype), d_tile)), dq.astype(dtype)

    tiles = [split_tiles(x, span, 3) for x in (q, d_out, delta, lse)]
    zeros = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    (dk_seen, dv_seen), dq = jax.lax.scan(tile, zeros, (tile_numbers(span, q), *tiles))
    dk, dv = dk.at[:, :, seen].add(dk_seen), dv.at[:, :, seen].add(dv_seen)
    dqs.append(join_tiles(dq, 3))
  dq = jnp.concatenate(dqs, 3)[:, :, :, :T]
  return dq, dk[:, :, :T].astype(dtype), dv[:, :, :T].astype(v.dtype), None


tiled_attention.defvjp(_tiled_fwd_rule, _tiled_bwd_rule)


def _pad(q, k, v, segment_ids):
  length = padded_length(q.shape[3])
  if segment_ids is not None:
    segment_ids = pad_to(segment_ids, length, 1, value=-1)
  return pad_to(q, length, 3), pad_to(k, length, 2), pad_to(v, length, 2), segment_ids


def mix_cached(q_BtHD, k_BSKD, v_BSKD, params, ctx: Context, cfg, opts: Options):
  """Decode: each new query against the cache; O(S) time per token. All implementations share it."""
  del params, cfg
  q = group_heads(q_BtHD, k_BSKD.shape[2])
  k, v = k_BSKD.swapaxes(1, 2), v_BSKD.swapaxes(1, 2)
  position = ctx.positions_BT[:, None, None, :, None]
  mask = visible(position, jnp.arange(k.shape[2]), opts.window)
  weight = jax.nn.softmax(jnp.where(mask, _scores(q, k), -jnp.inf), -1)
  out = jnp.einsum("bkrts,bksd->bkrtd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return ungroup_heads(out).astype(q_BtHD.dtype)


def mix_cost(cfg, opts: Options, T: int) -> Cost:
  """Scores and weighted sum over the visible keys: T/2 on average, at most the window."""
  keys = T / 2 if not opts.window else min(opts.window, T / 2)
  width = cfg.n_head * cfg.head_dim
  cache = 2 * cfg.n_kv_head * cfg.head_dim * jnp.dtype(cfg.compute_dtype).itemsize
  return Cost(matmul=4.0 * keys * width, vector=3.0 * keys * cfg.n_head, exp=keys * cfg.n_head, bytes=cache * keys)


def _draw(key, T: int = 70):
  """Random q, k, v [1, T, 2, 8] with unit-variance entries."""
  return tuple(jax.random.normal(k, (1, T, 2, 8)) for k in jax.random.split(key, 3))


def _constant_values(key, scale: int, weight: float = 1.0) -> float:
  """Largest deviation from 1 when every value is 1."""
  del scale
  q, k, v = _draw(key)
  out, _ = mix(q, k, weight * jnp.ones_like(v), {}, Context(jnp.arange(70)[None, :]), None, Options(qk_norm=False))
  return float(jnp.max(jnp.abs(out - 1)))


def _shifted_positions(key, scale: int, stretch: int = 1) -> float:
  """Largest change of the output when all positions move by 1000 (and are multiplied by `stretch`)."""
  del scale
  q, k, v = _draw(key)

  def out(positions):
    rope = rope_tables(positions[None, :], 8, 10000.0)
    return mix(rotate(q, rope), rotate(k, rope), v, {}, Context(positions[None, :]), None, Options(qk_norm=False))[0]

  return float(jnp.max(jnp.abs(out(jnp.arange(70)) - out(1000 + stretch * jnp.arange(70)))))


CLAIMS = (
  claim(
    "standard.convex_weights",
    "the weights of every query sum to one: constant values come back unchanged",
    _constant_values,
    1e-6,
    lambda key, scale: _constant_values(key, scale, weight=1.01),
  ),
  claim(
    "standard.relative_positions",
    "with rotary embedding, adding one number to all positions changes no output",
    _shifted_positions,
    5e-4,
    lambda key, scale: _shifted_positions(key, scale, stretch=2),
    refs=("Su et al., 2021, arXiv 2104.09864",),
  ),
)


MECHANISM = qkv_mechanism(
  name="standard",
  options=Options,
  mix=mix,
  mix_cached=mix_cached,
  mix_cost=mix_cost,
  extra_specs=extra_specs,
  qk_norm=lambda opts: opts.qk_norm,
  claims=CLAIMS,
  refs=("Vaswani et al., 2017, arXiv 1706.03762", "Dao et al., 2022, arXiv 2205.14135 (tiling; not its GPU kernel)"),
  variants=("standard", "standard(window=7)", "standard(qk_norm=false)"),
)
