"""Softmax attention matrices one tile of rows at a time, forwards and backwards, for recursions over A.

A chain such as y_2 = A(A v), or y = A z with z depending on earlier y, needs every row tile of A once: going forwards,
the tile finds the values of all earlier tokens finished; going backwards, their cotangents. Nothing of size T×T exists.

Layout as in `standard`: q_BKRTD (already scaled), k_BKSD; state buffers carry tokens on axis -2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.tiles import (
  TILE,
  Span,
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


def wide(x: jax.Array) -> jax.Array:
  """float32, or float64 when x is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """einsum with the inputs in b's dtype and the sum in float32 or wider."""
  return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.promote_types(b.dtype, jnp.float32))


def attend(weight_BKRTS: jax.Array, values: jax.Array) -> jax.Array:
  """Weighted sums of values shared by the query heads of a group, [B, K, S, D], or of each, [B, K, R, S, D]."""
  return product("bkrts,bksd->bkrtd" if values.ndim == 4 else "bkrts,bkrsd->bkrtd", weight_BKRTS, values)


def attend_back(weight_BKRTS: jax.Array, g_BKRTD: jax.Array, shared: bool) -> jax.Array:
  """Transpose of `attend` with respect to the values."""
  return product("bkrts,bkrtd->bksd" if shared else "bkrts,bkrtd->bkrsd", weight_BKRTS, g_BKRTD)


def weight_back(g_BKRTD: jax.Array, values: jax.Array) -> jax.Array:
  """Transpose of `attend` with respect to the weights."""
  return product("bkrtd,bksd->bkrts" if values.ndim == 4 else "bkrtd,bkrsd->bkrts", g_BKRTD, values)


def dense_weights(q, k, segment_ids_BT=None) -> tuple[jax.Array, jax.Array]:
  """The obvious form: A [B, K, R, T, T] = softmax of the causal scores <q, k>, and its logsumexp."""
  scores = product("bkrtd,bksd->bkrts", q, k)
  position = jnp.arange(q.shape[3])
  mask = visible(position[:, None], position[None, :], 0, *segment_axes(segment_ids_BT, segment_ids_BT))
  scores = jnp.where(mask, scores, -jnp.inf)
  return jax.nn.softmax(scores, -1), jax.nn.logsumexp(scores, -1)


def rows_of(x: jax.Array, start) -> jax.Array:
  """The tile of tokens that begins at `start`."""
  return jax.lax.dynamic_slice_in_dim(x, start, TILE, -2)


def put_rows(x: jax.Array, rows: jax.Array, start) -> jax.Array:
  """x with the tile of tokens that begins at `start` replaced."""
  return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, x.ndim - 2)


def own_block(weight_BKRTS: jax.Array, start) -> jax.Array:
  """The square of a row tile whose keys are its own tokens; lower triangular."""
  return jax.lax.dynamic_slice_in_dim(weight_BKRTS, start, TILE, -1)


def _padded(q, k, segment_ids):
  length = padded_length(q.shape[3])
  if segment_ids is not None:
    segment_ids = pad_to(segment_ids, length, 1, value=-1)
  return pad_to(q, length, 3), pad_to(k, length, 2), segment_ids


def _scores(span: Span, i, q_tile, k, segment_ids):
  scores = product("bkrtd,bksd->bkrts", q_tile, k[:, :, : span.stop])
  return jnp.where(tile_mask(span, i, segment_ids), scores, -jnp.inf)


def sweep(q, k, segment_ids, state, advance: Callable):
  """Runs over the row tiles of A in order.

  Args:
    state: buffers with T tokens (padded here to whole tiles) on axis -2.
    advance: `(weight [B, K, R, TILE, S], start, state) -> (state, rows)`: `rows` are what the tile outputs
      [..., TILE, D]; `weight` covers the first S tokens, at least all that the tile sees.

  Returns:
    (rows of all tiles [..., T, D], logsumexp [B, K, R, T]). Cost of the scores: T²·D FLOPs per head.
  """
  T = q.shape[3]
  q, k, segment_ids = _padded(q, k, segment_ids)
  state = jax.tree.map(lambda x: pad_to(x, q.shape[3], x.ndim - 2), state)
  rows_of_span, lses = [], []
  for span in spans(q.shape[3]):

    def tile(state, xs, span=span):
      i, q_tile = xs
      scores = _scores(span, i, q_tile, k, segment_ids)
      top = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
      weight = jnp.exp(scores - top)
      mass = jnp.sum(weight, -1, keepdims=True)
      state, rows = advance(weight / mass, span.q_start + i * TILE, state)
      return state, (rows, (top + jnp.log(mass))[..., 0])

    state, (rows, lse) = jax.lax.scan(tile, state, (tile_numbers(span, q), split_tiles(q, span, 3)))
    rows_of_span.append(jax.tree.map(lambda x: join_tiles(x, x.ndim - 3), rows))
    lses.append(join_tiles(lse, 3))
  rows = jax.tree.map(lambda *parts: jnp.concatenate(parts, -2)[..., :T, :], *rows_of_span)
  return rows, jnp.concatenate(lses, 3)[..., :T]


def sweep_back(q, k, segment_ids, lse, state, retreat: Callable):
  """Runs over the row tiles of A in reverse, for the gradient of a `sweep`.

  Args:
    retreat: `(weight, start, state) -> (state, d_weight)` with the cotangent of the tile's weights.

  Returns:
    (dq, dk, state), the state cut back to T tokens.
  """
  T = q.shape[3]
  dtype = q.dtype
  q, k, segment_ids = _padded(q, k, segment_ids)
  length = q.shape[3]
  lse = pad_to(lse, length, 3)
  state = jax.tree.map(lambda x: pad_to(x, length, x.ndim - 2), state)
  dk, dqs = jnp.zeros_like(wide(k)), []
  for span in reversed(spans(length)):

    def tile(carry, xs, span=span):
      dk, state = carry
      i, q_tile, lse_tile = xs
      weight = jnp.exp(_scores(span, i, q_tile, k, segment_ids) - lse_tile[..., None])
      state, d_weight = retreat(weight, span.q_start + i * TILE, state)
      d_score = (weight * d_weight).astype(dtype)
      dq = product("bkrts,bksd->bkrtd", d_score, k[:, :, : span.stop])
      dk = dk.at[:, :, : span.stop].add(product("bkrts,bkrtd->bksd", d_score, q_tile))
      return (dk, state), dq.astype(dtype)

    tiles = (tile_numbers(span, q), split_tiles(q, span, 3), split_tiles(lse, span, 3))
    (dk, state), dq = jax.lax.scan(tile, (dk, state), tiles, reverse=True)
    dqs.append(join_tiles(dq, 3))
  dq = jnp.concatenate(dqs[::-1], 3)[:, :, :, :T]
  return dq, dk[:, :, :T].astype(dtype), jax.tree.map(lambda x: x[..., :T, :], state)


def solve_resolvent(rho: jax.Array, weight: jax.Array, rhs: jax.Array, transpose: bool = False) -> jax.Array:
  """Solves (I - ρA) x = rhs, or with Aᵀ, for lower triangular A >= 0 with rows that sum to at most 1 and 0 <= ρ < 1.

  I - ρA = (I - N) diag(1 - ρA_tt) up to the side of the diagonal, with N strictly triangular, so (I - N)⁻¹ =
  (I + N)(I + N²)(I + N⁴)... ends after log2(n) factors: matrix products alone, all terms non-negative.

  Args: rho broadcastable to [B, K, R, 1, 1], weight [B, K, R, n, n], rhs [B, K, R, n, D].
  """
  n = weight.shape[-1]
  diagonal = 1 - rho[..., 0] * jnp.diagonal(weight, axis1=-2, axis2=-1)
  strict = rho * weight * np.tri(n, k=-1, dtype=weight.dtype)
  strict = strict.mT if transpose else strict
  power, x = strict / diagonal[..., None], rhs / diagonal[..., None]
  for i in range((n - 1).bit_length()):
    power = power @ power if i else power
    x = x + power @ x
  return x
