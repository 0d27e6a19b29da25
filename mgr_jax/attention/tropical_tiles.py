"""Max-plus attention for any score, one tile of queries at a time, and the dense form all others are tested against.

Arrays: q [B, K, R, T, D], k [B, K, S, D], v [B, K, S, E]; outputs [B, K, R, T, E]. T²·(D + E) pairs per head.
"""

import jax
import jax.numpy as jnp

from mgr_jax.algebra.tropical_matmul import largest, tmm, tmm_argmax
from mgr_jax.attention import tropical_winners
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
from mgr_jax.attention.tropical_options import Options


def scores(q, k, opts: Options):
  """a_ts [B, K, R, T, S] before decay: Σ_g max_{r in g}(q_r + k_r), -d_H(q, k), or <q, k>/√D."""
  B, K, R, T, D = q.shape
  if opts.score == "dot":
    return tropical_winners.products(q, k)
  rows, columns = q.reshape(B, K, R * T, D), k.swapaxes(2, 3)
  if opts.score == "hilbert":
    a = -(tmm(rows, -columns) + tmm(-rows, columns))
  else:
    n = D // opts.score_groups
    a = sum(tmm(rows[..., g : g + n], columns[..., g : g + n, :]) for g in range(0, D, n))
  return a.reshape(B, K, R, T, -1)


def best(a, v):
  """max_s (a_ts + v_sd) and the winning s, the lowest at ties; a masked with -inf."""
  B, K, R, T, S = a.shape
  return tuple(x.reshape(B, K, R, T, -1) for x in tmm_argmax(a.reshape(B, K, R * T, S), v))


def penalty(decay_K, q_position, k_position):
  """λ(t - s) [B, K, 1, T, S] from positions [B, T] and [B, S]."""
  lag = (q_position[:, :, None] - k_position[:, None, :])[:, None, None]
  return decay_K[:, None, None, None] * lag


def tile_output(q, k, v, decay_K, q_position, k_position, mask, opts: Options):
  """Attention of a few queries over given keys: what `opts.agg` makes of the winners. Not for training."""
  a = jnp.where(mask, scores(q, k, opts) - penalty(decay_K, q_position, k_position), -jnp.inf)
  if opts.agg == "maxplus":
    return best(a, v)[0]
  return tropical_winners.take(v, jnp.broadcast_to(jnp.argmax(a, -1)[..., None], (*a.shape[:-1], v.shape[-1])))


def tiled_attention(q, k, v, decay_K, position_BT, segment_ids_BT, opts: Options):
  """Causal attention over a whole sequence; memory O(T), see `tropical_winners.attention`.

  Args:
    position_BT: of tokens in their documents; they follow one another, so that t - s counts tokens.
  """

  def search(q, k, v, decay_K, where, track):
    return _search(q, k, v, decay_K, *where, opts, track)

  return tropical_winners.attention(search, q, k, v, decay_K, (position_BT, segment_ids_BT), opts)


def _search(q, k, v, decay_K, position, segment_ids, opts, track):
  T = q.shape[3]
  length = padded_length(T)
  q, k, v = pad_to(q, length, 3), pad_to(k, length, 2), pad_to(v, length, 2)
  position = pad_to(position, length, 1)
  if segment_ids is not None:
    segment_ids = pad_to(segment_ids, length, 1, value=-1)
  outs = []
  for span in spans(length):
    keys, values = k[:, :, : span.stop], v[:, :, : span.stop]
    k_position = position[:, : span.stop]

    def tile(_, xs, span=span, keys=keys, values=values, k_position=k_position):
      i, q_tile, q_position = xs
      a = scores(q_tile, keys, opts) - penalty(decay_K, q_position, k_position)
      y, winner = best(jnp.where(tile_mask(span, i, segment_ids), a, -jnp.inf), values)
      return None, (y, winner) if track else (y,)

    xs = tile_numbers(span, q), split_tiles(q, span, 3), split_tiles(position, span, 1)
    outs.append([join_tiles(x, 3) for x in jax.lax.scan(tile, None, xs)[1]])
  y, *winner = (jnp.concatenate(x, 3)[:, :, :, :T] for x in zip(*outs, strict=True))
  return y, winner[0] if track else None


def reference_attention(q, k, v, decay_K, position_BT, segment_ids_BT, opts: Options, beta=None):
  """The definition, written with dense arrays [.., T, S, D] and differentiated as it stands; maxima or β-sums."""
  hard = lambda z, axis: jnp.squeeze(largest(z, axis), axis)
  oplus = hard if beta is None else lambda z, axis: jax.nn.logsumexp(beta * z, axis) / beta
  q, keys = q[..., :, None, :], k[:, :, None, None]
  if opts.score == "dot":
    a = jnp.sum(q * keys, -1) / q.shape[-1] ** 0.5
  elif opts.score == "hilbert":
    a = -hard(keys - q, -1) - hard(q - keys, -1)
  else:
    z = q + keys
    a = jnp.sum(oplus(z.reshape(*z.shape[:-1], opts.score_groups, -1), axis=-1), -1)
  index = jnp.arange(k.shape[2])
  mask = visible(index[:, None], index, 0, *segment_axes(segment_ids_BT, segment_ids_BT))
  a = jnp.where(mask, a - penalty(decay_K, position_BT, position_BT), -jnp.inf)
  if opts.agg == "route":
    hit = jnp.argmax(a, -1)[..., None] == index
    return jnp.einsum("bkrts,bksd->bkrtd", hit.astype(v.dtype), v)
  return oplus(a[..., None] + v[:, :, None, None], axis=-2)
