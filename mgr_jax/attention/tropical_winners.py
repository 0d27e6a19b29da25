"""Max-plus attention for any score, differentiated at the winners that some search has found: O(T·E) memory.

Where no winner changes, the output of a maximum is its term there, so the derivatives of that term are those of the
output. Arrays: q [B, K, R, T, D], k [B, K, T, D], v [B, K, T, E]; winners s [B, K, R, T, E].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.tiles import join_tiles, pad_to, padded_length, spans, split_tiles
from mgr_jax.attention.tropical_options import Options
from mgr_jax.loops import tied

Search = Callable[..., tuple[jax.Array, jax.Array | None]]
"""`(q, k, v, decay_K, where, track) -> (y, s)`: maxima over the keys that `where`, arrays of integers, lets be seen.

The winners s are the earliest at ties, and `None` unless asked for by `track`. Static: it must not close over arrays.
"""


def attention(search: Search, q, k, v, decay_K, where: Any, opts: Options) -> jax.Array:
  """y_td = max_s (a_ts - λ(t-s) + v_sd), or with agg=route the value of the key with the largest score.

  Gradients and their derivatives follow the winning key, and in a maximum of the score its winning coordinate, the
  lowest at ties. With agg=route the score has no gradient. Saved for the gradient: an int32 per output, beside queries,
  keys and values. Not differentiable forwards, but its gradient is.
  """
  if opts.agg == "maxplus":
    return _attention(search, opts, q, k, v, decay_K, where)
  # The winner of a column of zeros is that of the score.
  q, k, zeros, decay_K = jax.lax.stop_gradient((q, k, jnp.zeros_like(v[..., :1]), decay_K))
  winner = search(q, k, zeros, decay_K, where, track=True)[1]
  return take(v, jnp.broadcast_to(winner, (*winner.shape[:-1], v.shape[-1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(search, opts, q, k, v, decay_K, where):
  del opts
  return search(q, k, v, decay_K, where, track=False)[0]


def _fwd_rule(search, opts, q, k, v, decay_K, where):
  y, winner = _found(search, opts, q, k, v, decay_K, where)
  return y, (q, k, v, decay_K, winner)


def _bwd_rule(search, opts, saved, g):
  del search
  *inputs, winner = saved
  return (*jax.vjp(lambda *x: at_winners(*x, winner, opts), *inputs)[1](g), None)


_attention.defvjp(_fwd_rule, _bwd_rule)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _found(search, opts, q, k, v, decay_K, where):
  """(y, s), differentiable forwards: curvature products take the derivative of a gradient that way."""
  del opts
  return search(q, k, v, decay_K, where, track=True)


@_found.defjvp
def _found_jvp(search, opts, primals, tangents):
  y, winner = _found(search, opts, *primals)
  dy = jax.jvp(lambda *x: at_winners(*x, winner, opts), primals[:4], tangents[:4])[1]
  return (y, winner), (dy, np.zeros(winner.shape, jax.dtypes.float0))


def at_winners(q, k, v, decay_K, winner, opts: Options) -> jax.Array:
  """a_ts - λ(t-s) + v_sd at s = winner[t, d], [B, K, R, T, E].

  Differentiable both ways, any number of times; in a maximum of the score derivatives follow the winning coordinate,
  the lowest at ties. R·T·E·D pairs per key/value head behind as many gathers, or tiles of scores for a dot product.
  """
  lag = jnp.arange(q.shape[3], dtype=jnp.int32)[:, None] - winner
  a = _products(q, k, winner) if opts.score == "dot" else _maxima(q, k, winner, opts)
  return a - decay_K[:, None, None, None] * lag.astype(a.dtype) + take(v, winner)


def products(q, k):
  """<q, k>/√D of all queries and keys, [B, K, R, T, S]."""
  return q.shape[-1] ** -0.5 * jnp.einsum("bkrtd,bksd->bkrts", q, k)


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


def _products(q, k, winner):
  """<q, k>/√D of the winners by tiles of scores: their gradients then are matrix products too."""
  T = q.shape[3]
  length = padded_length(T)
  q, k, winner = pad_to(q, length, 3), pad_to(k, length, 2), pad_to(winner, length, 3)
  outs = []
  for span in spans(length):

    def tile(_, xs, keys=k[:, :, : span.stop]):
      q, winner = xs
      return None, jnp.take_along_axis(products(q, keys), winner, -1, mode="promise_in_bounds")

    xs = split_tiles(q, span, 3), split_tiles(winner, span, 3)
    outs.append(join_tiles(jax.lax.scan(jax.checkpoint(tile, prevent_cse=False), None, xs)[1], 3))
  return jnp.concatenate(outs, 3)[:, :, :, :T]
