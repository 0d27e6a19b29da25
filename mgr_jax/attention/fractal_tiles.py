"""Sums weighted by path overlap, one tile of queries at a time, with a gradient of their own.

Per head T²/2 · (Σ f + D) multiply-adds forward. Beyond the inputs nothing is kept for the gradient: joint features are
formed again from the addresses, for a few rows and heads at a time.
"""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.attention.fractal_groups import map_groups
from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_overlap import Pairs, combine, mix, overlap, pull
from mgr_jax.attention.fractal_routing import pair_features
from mgr_jax.attention.fractal_table import Sides
from mgr_jax.attention.tiles import TILE, join_tiles, pad_to, padded_length, spans, split_tiles, tile_mask, tile_numbers

_exact = functools.partial(jnp.einsum, precision="highest")


def tiled_sum(sides: Sides, beta_KR, segment_ids_BT, opts: Options):
  """`dense_sum` of `path_overlap` under the causal mask; memory O(T). Returns (o_BKRTD, mass_BKRT), float32."""
  return _tiled_sum(sides._replace(gate_BKT=None), beta_KR, segment_ids_BT, opts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiled_sum(sides, beta_KR, segment_ids_BT, opts):
  return _forward(sides, beta_KR, segment_ids_BT, opts)


def _cells(sides):
  return sides.q.shape[2] * TILE * padded_length(sides.v.shape[2])


def _forward(sides, beta_KR, segment_ids, opts):
  def group(tokens, heads, segment_ids):
    q, k, v = tokens
    alpha, slope, beta = heads
    pairs = Pairs(*features(q, k, alpha, opts), slope, beta)
    return forward_tiles(pairs, v, segment_ids, opts.kernel == "prefix"), ()

  heads = sides.alpha_K, sides.slope_KG, beta_KR
  return map_groups(group, _cells(sides), (sides.q, sides.k, sides.v), heads, segment_ids)[0]


def _fwd_rule(sides, beta_KR, segment_ids, opts):
  out, mass = _forward(sides, beta_KR, segment_ids, opts)
  return (out, mass), (sides, beta_KR, segment_ids, out, mass)


def _bwd_rule(opts, saved, cotangents):
  sides, beta_KR, segment_ids, out, mass = saved

  def group(tokens, heads, segment_ids):
    q, k, v, out, mass, d_out, d_mass = tokens
    alpha, slope, beta = heads
    pairs, to_addresses = jax.vjp(functools.partial(features, opts=opts), q, k, alpha)
    d_out = jnp.concatenate([d_out, d_mass[..., None]], -1)
    dq, dk, d_values, d_beta = gradient_tiles(
      Pairs(*pairs, slope, beta), v, segment_ids, opts.kernel == "prefix", d_out
    )
    dq, dk, d_alpha = to_addresses((dq, dk))
    row = jnp.sum(d_out[..., :-1] * out, -1) + d_mass * mass
    d_slope = None if slope is None else slope_gradient(row, d_values, v)
    dv = jnp.sum(d_values, 2)[:, :, :-1].swapaxes(2, 3).astype(v.dtype)
    return (dq, dk, dv), (d_alpha, d_slope, d_beta)

  tokens = sides.q, sides.k, sides.v, out, mass, *cotangents
  heads = sides.alpha_K, sides.slope_KG, beta_KR
  d_tokens, (d_alpha, d_slope, d_beta) = map_groups(group, _cells(sides), tokens, heads, segment_ids)
  return Sides(*d_tokens, d_alpha, d_slope), d_beta, None


_tiled_sum.defvjp(_fwd_rule, _bwd_rule)


def features(q, k, alpha_K, opts: Options):
  """Pair features of both sides."""
  return pair_features(q, opts, alpha_K), pair_features(k, opts)


def slope_gradient(row_BKRT, d_values_BKGET, v) -> jax.Array:
  """Σ_j j·c_j - Σ_i i·r_i [K, G], r and c the row and column sums of w∘dw: no pass over pairs.

  Args:
    row_BKRT: r = <do, o> + dmass·mass.
    d_values_BKGET: gradient of [v, 1] under each slope; c is its product with [v, 1].
    v: values [B, K, T, D].
  """
  B, K, G, _, T = d_values_BKGET.shape
  column = jnp.sum(d_values_BKGET[:, :, :, :-1] * v.swapaxes(2, 3)[:, :, None], 3) + d_values_BKGET[:, :, :, -1]
  row = jnp.sum(row_BKRT.reshape(B, K, G, -1, T), 3)
  return jnp.sum((column - row) * jnp.arange(T, dtype=row.dtype), (0, 3))


def forward_tiles(pairs: Pairs, v, segment_ids, prefix: bool):
  """(o, mass) of all tiles."""
  T = v.shape[2]
  pairs, v, segment_ids = _pad(pairs, v, segment_ids)
  outs, masses = [], []
  for span in spans(v.shape[2]):
    keys = [k[:, :, span.k_start : span.stop] for k in pairs.k]
    values = v[:, :, span.k_start : span.stop]

    def tile(_, xs, span=span, keys=keys, values=values):
      i, q_tile = xs
      _, weight, _ = _weights(pairs, q_tile, keys, span, i, segment_ids, prefix)
      return None, (mix(weight, values), jnp.sum(weight, -1))

    queries = [split_tiles(q, span, 3) for q in pairs.q]
    _, (out, mass) = jax.lax.scan(tile, None, (tile_numbers(span, v), queries))
    outs.append(join_tiles(out, 3))
    masses.append(join_tiles(mass, 3))
  return jnp.concatenate(outs, 3)[:, :, :, :T], jnp.concatenate(masses, 3)[..., :T]


def _weights(pairs, q_tile, keys, span, i, segment_ids, prefix):
  """Products, weights and decay (0 where not visible) of tile `i` of a span."""
  products = [overlap(q, k) for q, k in zip(q_tile, keys, strict=True)]
  visible = tile_mask(span, i, segment_ids)
  if pairs.slope_KG is None:
    decay = visible.astype(products[0].dtype)
  else:
    lag = (span.q_start + i * TILE + jnp.arange(TILE))[:, None] - jnp.arange(span.k_start, span.stop)
    decay = jnp.exp(-pairs.slope_KG[..., None, None] * jnp.maximum(lag, 0))
    # Without documents the decay is the same for all rows; the barrier keeps its exponentials from being repeated.
    decay = jax.lax.optimization_barrier(jnp.where(visible, decay, 0.0))
  kernel = combine(products, prefix)
  if pairs.beta_KR is not None:
    kernel = kernel ** pairs.beta_KR[..., None, None]
  return products, kernel * decay, decay


def gradient_tiles(pairs: Pairs, v, segment_ids, prefix: bool, d_out_BKRTE):
  """dw_ij = <do_i, v_j> + dmass_i, d[v, 1] = Wᵀ [do, dmass], and dK pulled back through the products.

  Returns gradients of the query features, of the key features, of [v, 1] under each slope [B, K, G, D+1, T], and of β.
  """
  T = v.shape[2]
  values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
  pairs, values, segment_ids = _pad(pairs, values, segment_ids)
  d_out = pad_to(d_out_BKRTE, values.shape[2], 3)
  # Key gradients are accumulated with the key axis innermost: these products are twice as fast on CPU.
  zeros = lambda x, *heads: jnp.zeros((*x.shape[:2], *heads, x.shape[3], x.shape[2]), d_out.dtype)
  # Column sums are needed for every slope, so query heads with slopes of their own keep their shares of dV apart.
  slopes = 1 if pairs.slope_KG is None else pairs.slope_KG.shape[1]
  dk, dv = [zeros(k) for k in pairs.k], zeros(values, slopes)
  d_beta = None if pairs.beta_KR is None else jnp.zeros_like(pairs.beta_KR)
  dqs = []
  for span in spans(values.shape[2]):
    seen = slice(span.k_start, span.stop)
    keys, seen_values = [k[:, :, seen] for k in pairs.k], values[:, :, seen]

    def tile(carry, xs, span=span, keys=keys, seen_values=seen_values):
      dk_seen, dv_seen, d_beta = carry
      i, q_tile, d_tile = xs
      products, weight, decay = _weights(pairs, q_tile, keys, span, i, segment_ids, prefix)
      d_weight = jnp.einsum(
        "bkrtd,bksd->bkrts", d_tile.astype(v.dtype), seen_values, preferred_element_type=d_tile.dtype
      )
      d_kernel = d_weight * decay
      if pairs.beta_KR is not None:
        kernel = combine(products, prefix)
        beta = pairs.beta_KR[..., None, None]
        powered = kernel ** (beta - 1)
        d_beta = d_beta + jnp.sum(d_kernel * powered * kernel * jnp.log(kernel), (0, 3, 4))
        d_kernel = d_kernel * powered * beta
      d_products = pull(products, d_kernel, prefix)
      dq = [_exact("bkrts,bksf->bkrtf", d, k) for d, k in zip(d_products, keys, strict=True)]
      back = [_exact("bkrts,bkrtf->bkfs", d, q) for d, q in zip(d_products, q_tile, strict=True)]
      to_values = "bkrts,bkrtd->bkds" if slopes == 1 else "bkrts,bkrtd->bkrds"
      dv_new = jnp.einsum(
        to_values, weight.astype(v.dtype), d_tile.astype(v.dtype), preferred_element_type=d_tile.dtype
      ).reshape(dv_seen.shape)
      return ([a + b for a, b in zip(dk_seen, back, strict=True)], dv_seen + dv_new, d_beta), dq

    # Spans are chained by their sums: run side by side they would all hold tiles at once.
    start = ([x[..., seen] for x in dk], dv[..., seen], d_beta)
    xs = (tile_numbers(span, v), [split_tiles(q, span, 3) for q in pairs.q], split_tiles(d_out, span, 3))
    (dk_seen, dv_seen, d_beta), dq = jax.lax.scan(tile, start, xs)
    dk = [total.at[..., seen].set(new) for total, new in zip(dk, dk_seen, strict=True)]
    dv = dv.at[..., seen].set(dv_seen)
    dqs.append([join_tiles(x, 3) for x in dq])
  dq = tuple(jnp.concatenate(parts, 3)[:, :, :, :T] for parts in zip(*dqs, strict=True))
  return dq, tuple(x[..., :T].swapaxes(2, 3) for x in dk), dv[..., :T], d_beta


def _pad(pairs, v, segment_ids):
  length = padded_length(v.shape[2])
  if segment_ids is not None:
    segment_ids = pad_to(segment_ids, length, 1, value=-1)
  # Ones: the logarithm of a padded overlap must be finite, although its weight is zero.
  q, k = (tuple(pad_to(x, length, axis, value=1) for x in side) for side, axis in ((pairs.q, 3), (pairs.k, 2)))
  return pairs._replace(q=q, k=k), pad_to(v, length, 2), segment_ids
