"""Causal tiling: which keys a block of queries needs, so that dense scores never exist beyond a tile.

A sequence is cut into at most `MAX_SPANS` spans of query tiles. All tiles of a span share one static key range, so a
span is one `lax.scan`; keys after the span are never touched. With n tiles and s spans the work is (1 + 1/s)/2 of the
full square, and the program text does not grow with T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.loops import tied

TILE = 64
MAX_SPANS = 8


class Span(NamedTuple):
  """Queries `q_start .. stop - 1` (whole tiles) and the keys `k_start .. stop - 1` that any of them may see."""

  q_start: int
  stop: int
  k_start: int


def padded_length(T: int, tile: int = TILE) -> int:
  """T rounded up to whole tiles."""
  return -(-T // tile) * tile


def spans(T_padded: int, window: int = 0, tile: int = TILE) -> list[Span]:
  """Cuts `T_padded` queries into spans; `window` (0 = none) limits how far back keys are needed."""
  n_tiles = T_padded // tile
  per_span = -(-n_tiles // MAX_SPANS)
  starts = range(0, T_padded, per_span * tile)
  stops = [min(start + per_span * tile, T_padded) for start in starts]
  first_key = lambda start: max(0, start - window + 1) // tile * tile if window else 0
  return [Span(start, stop, first_key(start)) for start, stop in zip(starts, stops, strict=True)]


def split_tiles(x: jax.Array, span: Span, axis: int, tile: int = TILE) -> jax.Array:
  """The span's slice of `x` along `axis`, as [n_tiles, ..., tile, ...] for `lax.scan`."""
  x = jax.lax.slice_in_dim(x, span.q_start, span.stop, axis=axis)
  n = (span.stop - span.q_start) // tile
  return jnp.moveaxis(x.reshape(*x.shape[:axis], n, tile, *x.shape[axis + 1 :]), axis, 0)


def join_tiles(x: jax.Array, axis: int) -> jax.Array:
  """Inverse of `split_tiles`."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def pad_to(x: jax.Array, length: int, axis: int, value=0) -> jax.Array:
  """Appends `value` along `axis` up to `length`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def visible(q_position, k_position, window: int = 0, q_segment=None, k_segment=None):
  """Boolean mask: key not after the query, inside the window, in the same document."""
  ok = k_position <= q_position
  if window:
    ok &= k_position > q_position - window
  if q_segment is not None:
    ok &= q_segment == k_segment
  return ok


def segment_axes(q_segment_Bt, k_segment_BS):
  """Segment numbers shaped to compare as [B, 1, 1, t, S], or a pair of `None`."""
  if q_segment_Bt is None:
    return None, None
  return q_segment_Bt[:, None, None, :, None], k_segment_BS[:, None, None, None, :]


def tile_numbers(span: Span, data: jax.Array) -> jax.Array:
  """0 .. n-1 for the tiles of a span, to scan over, `tied` to what the tiles hold."""
  return tied(np.arange((span.stop - span.q_start) // TILE, dtype=np.int32), data)


def tile_mask(span: Span, i: jax.Array, segment_ids_BT=None, window: int = 0, strict: bool = False) -> jax.Array:
  """Which of the span's keys tile `i` sees: [TILE, S], or [B, 1, 1, TILE, S] with segments. `strict`: not itself."""
  start = span.q_start + i * TILE
  q_position = start + jnp.arange(TILE) - int(strict)
  segments = (None, None)
  if segment_ids_BT is not None:
    q_segment = jax.lax.dynamic_slice_in_dim(segment_ids_BT, start, TILE, axis=1)
    segments = segment_axes(q_segment, segment_ids_BT[:, span.k_start : span.stop])
  return visible(q_position[:, None], jnp.arange(span.k_start, span.stop)[None, :], window, *segments)
