"""Max-plus attention for any hard score as a Pallas kernel: the scores of `tropical_tiles` never leave the chip.

One program owns a tile of queries of one key/value head, those of all its query heads, with their outputs and winners.
It walks through the keys one by one, from where the first document of its tile begins to its last query: the scores of
one key with all queries are a reduction over coordinates, and its value is added to them. Queries lie along the last
axis, so that the reduction crosses few threads or none. Outputs are those of `tropical_tiles.tiled_attention`, bit for
bit where scores are sums of maxima and no compiler contracts the penalty; dot products are summed in another order.

What it costs, per key/value head with R query heads, T tokens, head size D, E columns of values, and N queries of all
heads per tile, float32:
- pairs (one addition, one maximum): R·T·(T + N/R)/2·(D + E), with D twice for Hilbert's metric; packed documents cost
  what they cost alone, up to a tile each. A dot product takes D multiplications and additions instead, on the vector
  and not the matrix unit: with agg=route, where E counts as 1, `tiled` may be the better choice;
- state on chip: 4·N·(D + E) bytes per program, 4·N·E more when winners are kept for the gradient;
- device memory: R·T·(D + E) numbers of queries and outputs, with as many indices as outputs for the gradient. Every
  tile reads the keys and values up to its diagonal, R·T²/(2·N)·(D + E) numbers in all, on GPUs mostly from cache: the
  past of one head is 4·T·(D + E) bytes;
- the gradient itself: R·T·E·D pairs behind as many gathers, without a loop over pairs of tokens (`tropical_winners`);
  for dot products tiles of scores as in `tropical_tiles`.

On GPUs the kernel goes through the Triton back end. A program is one warp with 1024 entries of queries, 32 per thread,
and all keys are one tile. Arrays there need lengths that are powers of two: coordinates and columns are cut into such
pieces (65 = 64 + 1), not padded. On TPUs it goes through Mosaic, and tiles of keys are the last dimension of the grid:
outputs stay on chip while the keys of one tile of queries pass. On a CPU it is interpreted: for tests, not for speed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_pallas import Target, target
from mgr_jax.attention.tropical_winners import attention


class Tile(NamedTuple):
  """What one step of the grid takes: rows of queries, a power of two, one for each query head; and keys."""

  queries: int
  keys: int


def tiled_attention(
  q, k, v, decay_K, starts_BT, opts: Options, where: Target | None = None, tile: Tile | None = None
) -> jax.Array:
  """y_td = max_{s<=t, same document} (a_ts - λ(t-s) + v_sd), or with agg=route the value of argmax_s of the score.

  Args:
    q, k, v: [B, K, R, T, D], [B, K, T, D] and [B, K, T, E].
    decay_K: λ per key/value head.
    starts_BT: where a document begins; its tokens follow one another, so that t - s counts tokens.
    opts: the score and `agg`; hard.
    where: the target; that of the default backend when not given.
    tile: its sizes; those that fit the target when not given.

  Returns:
    [B, K, R, T, E], with the gradient of `tropical_winners.attention`.

  Raises:
    ValueError: the backend has no kernels.
  """
  where = where or target(jax.default_backend())

  def search(q, k, v, decay_K, first, track):
    return _run(q, k, v, decay_K, first, opts, where, tile, track)

  index = jnp.arange(starts_BT.shape[1], dtype=jnp.int32)
  first = jax.lax.cummax(jnp.where(starts_BT, index, 0), axis=1)
  return attention(search, q, k, v, decay_K, first, opts)


class _Size(NamedTuple):
  """Of a problem as the kernel sees it; `groups` of coordinates and `columns` of values are lists of slices."""

  tile: Tile
  key_tiles: int
  groups: list[list[slice]]
  columns: list[slice]


def _run(q, k, v, decay_K, first, opts, where, tile, track):
  """(y [B, K, R, T, E], winners alike or `None`)."""
  (B, K, R, T, D), E = q.shape, v.shape[-1]
  queries, keys = tile or (Tile(max(1, where.entries // pl.next_power_of_2(D)), T) if where.entries else Tile(128, 512))
  tile = Tile(min(queries, pl.next_power_of_2(T * R)), min(keys, T))
  length, rows = (-(-n // size) * size for n, size in ((T, tile.keys), (T * R, tile.queries)))
  n_groups = opts.score_groups if opts.score == "maxplus" else 1
  groups = [_pieces(start, start + D // n_groups, where) for start in range(0, D, D // n_groups)]
  size = _Size(tile, length // tile.keys, groups, _pieces(0, E, where))

  pad = lambda x, axis, length, value=0: jnp.pad(
    x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value
  )
  q = pad(q.transpose(0, 1, 4, 3, 2).reshape(B * K, D, T * R), 2, rows)
  k, v = (pad(x.reshape(B * K, T, -1), 1, length) for x in (k, v))
  token = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  # Rows of padding see nothing and widen no tile's walk.
  first, token = pad(jnp.repeat(first, R, 1), 1, rows, T), pad(jnp.repeat(token, R, 1), 1, rows, -1)

  n_tiles = rows // tile.queries
  # The longest walks start first.
  at = lambda i: n_tiles - 1 - i
  last_tile = lambda i: jax.lax.div((at(i) + 1) * tile.queries - 1, np.int32(R * tile.keys))
  # Tiles of keys beyond the diagonal are not fetched: the block stays where it is.
  key_block = lambda width: pl.BlockSpec(
    (None, tile.keys, width), lambda h, i, j: (h, jnp.minimum(j, last_tile(i)) if size.key_tiles > 1 else 0, 0)
  )
  query_block = lambda width: pl.BlockSpec((None, width, tile.queries), lambda h, i, j: (h, 0, at(i)))
  found = pl.pallas_call(
    functools.partial(_kernel, size=size, opts=opts),
    grid=(B * K, n_tiles, size.key_tiles),
    in_specs=[
      query_block(D),
      key_block(D),
      key_block(E),
      pl.BlockSpec((None, 1, 1), lambda h, i, j: (jax.lax.rem(h, np.int32(K)), 0, 0)),
      pl.BlockSpec((None, 2, tile.queries), lambda h, i, j: (jax.lax.div(h, np.int32(K)), 0, at(i))),
    ],
    out_specs=[query_block(E)] * (1 + track),
    out_shape=[jax.ShapeDtypeStruct((B * K, E, rows), dtype) for dtype in (q.dtype, jnp.int32)[: 1 + track]],
    interpret=where.interpret,
    compiler_params=where.params,
  )(q, k, v, decay_K[:, None, None], jnp.stack([first, token], 1))
  found = [x[:, :, : T * R].reshape(B, K, E, T, R).transpose(0, 1, 4, 3, 2) for x in found]
  return found[0], found[1] if track else None


def _pieces(start: int, stop: int, where: Target) -> list[slice]:
  """A range as one slice, or for Triton as slices whose lengths are powers of two."""
  if not where.entries:
    return [slice(start, stop)]
  found = []
  while start < stop:
    length = 1 << (stop - start).bit_length() - 1
    found.append(slice(start, start + length))
    start += length
  return found


def _kernel(q_ref, k_ref, v_ref, decay_ref, bounds_ref, *state_refs, size, opts):
  """One tile of queries against the keys of one tile."""
  several = size.key_tiles > 1
  start = pl.program_id(2) * size.tile.keys if several else 0
  first, token = bounds_ref[0, :], bounds_ref[1, :]
  begin, end = jnp.maximum(jnp.min(first), start), jnp.minimum(jnp.max(token) + 1, start + size.tile.keys)
  first, token, decay = first[None, :], token[None, :], decay_ref[...]
  groups = [[(part, q_ref[part, :]) for part in group] for group in size.groups]
  fills = [(ref, fill) for ref, fill in zip(state_refs, (-jnp.inf, 0), strict=False)]

  if several:

    @pl.when(pl.program_id(2) == 0)
    def _():
      for ref, fill in fills:
        ref[...] = jnp.full(ref.shape, fill, ref.dtype)

  def initial(part, ref, fill):
    return ref[part, :] if several else jnp.full((part.stop - part.start, ref.shape[1]), fill, ref.dtype)

  def key(s, state):
    a = _score(groups, k_ref, s - start, opts) - decay * (token - s).astype(decay.dtype)
    a = jnp.where((first <= s) & (s <= token), a, -jnp.inf)
    found = []
    for part, (y, *winner) in zip(size.columns, state, strict=True):
      z = a + v_ref[s - start, part][:, None]
      new = z > y
      found.append((jnp.where(new, z, y), *(jnp.where(new, s, w) for w in winner)))
    return found

  state = [tuple(initial(part, *fill) for fill in fills) for part in size.columns]
  for part, values in zip(size.columns, jax.lax.fori_loop(begin, end, key, state), strict=True):
    for ref, value in zip(state_refs, values, strict=True):
      ref[part, :] = value


def _score(groups, k_ref, s, opts):
  """a_ts of key s with every query of the tile before decay, [1, queries]."""
  groups = [[(q, k_ref[s, part][:, None]) for part, q in group] for group in groups]
  largest = lambda group, f: functools.reduce(jnp.maximum, [jnp.max(f(q, k), 0, keepdims=True) for q, k in group])
  if opts.score == "dot":
    size = sum(q.shape[0] for q, _ in groups[0])
    return size**-0.5 * sum(jnp.sum(q * k, 0, keepdims=True) for q, k in groups[0])
  if opts.score == "hilbert":
    return -(largest(groups[0], lambda q, k: q - k) + largest(groups[0], lambda q, k: k - q))
  return sum(largest(group, lambda q, k: q + k) for group in groups)
