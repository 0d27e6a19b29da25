"""Max-plus attention read at winners that are known: O(T·E) memory, and derivatives of every kind.

Where no winner changes, the output of a maximum is its term there, so the derivatives of that term are those of the
output. Arrays: q [B, K, R, T, D], k [B, K, T, D], v [B, K, T, E]; winners s [B, K, R, T, E].
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.tiles import join_tiles, pad_to, padded_length, spans, split_tiles, tied
from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_tiles import scores


def at_winners(q, k, v, decay_K, winner, opts: Options) -> jax.Array:
  """a_ts - λ(t-s) + v_sd at s = winner[t, d], [B, K, R, T, E].

  Differentiable both ways, any number of times; in a maximum of the score derivatives follow the winning coordinate,
  the lowest at ties. R·T·E·D pairs per key/value head behind as many gathers, or tiles of scores for a dot product.
  """
  lag = jnp.arange(q.shape[3], dtype=jnp.int32)[:, None] - winner
  a = _products(q, k, winner, opts) if opts.score == "dot" else _maxima(q, k, winner, opts)
  return a - decay_K[:, None, None, None] * lag.astype(a.dtype) + take(v, winner)


def take(x, s):
  """x[s[t, d], d] for x [B, K, T, E] and s [B, K, R, T, E]."""
  B, K, R, T, E = s.shape
  return jnp.take_along_axis(x, s.reshape(B, K, R * T, E), 2, mode="promise_in_bounds").reshape(s.shape)


def _maxima(q, k, winner, opts):
  """Σ_g max_{r in g}(q_r + k_r) of the winners; Hilbert's metric is that of (q, -q) and (-k, k), with a minus sign."""
  B, K, R, T, E = winner.shape
  rows = winner.reshape(B, K, R * T, E)
  q = q.reshape(B, K, R * T, -1)
  if opts.score == "hilbert":
    groups = jnp.stack([q, -q]), jnp.stack([-k, k])
  else:
    groups = tuple(jnp.moveaxis(x.reshape(*x.shape[:3], opts.score_groups, -1), 3, 0) for x in (q, k))

  def group(a, xs):
    q, k = xs
    r = _coordinates(*jax.lax.stop_gradient(xs), rows)
    flat = (rows * q.shape[-1] + r).reshape(B, K, -1)
    k_r = jnp.take_along_axis(k.reshape(B, K, -1), flat, 2, mode="promise_in_bounds").reshape(rows.shape)
    return a + (jnp.take_along_axis(q, r, 3, mode="promise_in_bounds") + k_r), None

  # Coordinates are found again in the backward pass, so that those of one group are in memory at a time.
  a = jax.lax.scan(jax.checkpoint(group, prevent_cse=False), jnp.zeros(rows.shape, q.dtype), groups)[0]
  return (-a if opts.score == "hilbert" else a).reshape(winner.shape)


def _coordinates(q, k, rows):
  """The lowest r with the largest q_r + k_sr for every s in rows [B, K, R·T, E]; one coordinate at a time."""
  flat = rows.reshape(*rows.shape[:2], -1)

  def coordinate(best, xs):
    r, q, k = xs
    z = q[..., None] + jnp.take_along_axis(k, flat, 2, mode="promise_in_bounds").reshape(rows.shape)
    better = z > best[0]
    return (jnp.where(better, z, best[0]), jnp.where(better, r, best[1])), None

  xs = tied(np.arange(q.shape[-1], dtype=np.int32), q), jnp.moveaxis(q, -1, 0), jnp.moveaxis(k, -1, 0)
  none = jnp.full(rows.shape, -jnp.inf, q.dtype), jnp.zeros(rows.shape, jnp.int32)
  return jax.lax.scan(coordinate, none, xs)[0][1]


def _products(q, k, winner, opts):
  """<q, k>/√D of the winners by tiles of scores: their gradients then are matrix products too."""
  T = q.shape[3]
  length = padded_length(T)
  q, k, winner = pad_to(q, length, 3), pad_to(k, length, 2), pad_to(winner, length, 3)
  outs = []
  for span in spans(length):

    def tile(_, xs, keys=k[:, :, : span.stop]):
      q, winner = xs
      return None, jnp.take_along_axis(scores(q, keys, opts), winner, -1, mode="promise_in_bounds")

    xs = split_tiles(q, span, 3), split_tiles(winner, span, 3)
    outs.append(join_tiles(jax.lax.scan(jax.checkpoint(tile, prevent_cse=False), None, xs)[1], 3))
  return jnp.concatenate(outs, 3)[:, :, :, :T]
