"""Attention over pairs of tokens in two windows, one block of queries at a time, with its own gradient.

For a block of n queries and the m <= n + w1 keys they may see, all w2 second keys of every query are handled at once:

    x_{t,δ} = combine(q_t, k2_{t-δ}),   logit = X Kᵀ + pair bias,   U = P V,   y_t = Σ_δ gain_{t-δ}∘U_{t,δ} + ...

so the work is two matrix products of n·w2 rows forward and five backward, and nothing larger than n·w2·m exists.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.trilinear import Form, Pairs
from mgr_jax.attention.tiles import join_tiles, pad_to

HEAD_GROUPS = 4


class Shape(NamedTuple):
  """Static sizes: windows, queries per block, and whether a zero logit without value is added."""

  w1: int
  w2: int
  block: int
  sink: bool = False


class Group(NamedTuple):
  """Query blocks `start .. stop - 1` that see `keys` keys each: the first ones of the sequence, or (`steady`) those
  ending with the block."""

  start: int
  stop: int
  keys: int
  steady: bool


def groups(T: int, shape: Shape, history: int) -> list[Group]:
  """Splits T queries (whole blocks) so that blocks near the start, with no history, skip keys that do not exist."""
  n = shape.block
  head = 0 if history else min(-(-shape.w1 // n), T // n)
  per_group = -(-head // HEAD_GROUPS)
  starts = range(0, head, per_group) if head else ()
  found = [Group(i * n, min(i + per_group, head) * n, min(i + per_group, head) * n, False) for i in starts]
  if head * n < T:
    found.append(Group(head * n, T, n + shape.w1, True))
  return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def pair_attention(form: Form, shape: Shape, pairs: Pairs, segments_BS):
  """`dense_pair_attention` in windows: i in (t - w1, t], j in (t - w2, t], same document.

  FLOPs 4·T·w2·(w1 + block)·D per query head, memory O(T·D + block·w2·(w1 + block)).

  Args:
    pairs: the T queries are the last of the S tokens; S - T is 0 or w1.
    segments_BS: document numbers >= 0 [B or 1, S]; negative ones are seen by nobody.

  Returns:
    (out [B, K, R, T, D], logsumexp [B, K, R, T]). The logsumexp is a diagnostic and has no gradient.
  """
  return _forward(form, shape, pairs, segments_BS)


class _Layout(NamedTuple):
  """Padded arguments: w1 tokens before the first query, whole blocks of queries."""

  pairs: Pairs
  segments: jax.Array
  T: int
  history: int


def _layout(shape: Shape, pairs: Pairs, segments) -> _Layout:
  T, S = pairs.q.shape[3], pairs.k.shape[2]
  history = S - T
  length = -(-T // shape.block) * shape.block

  def key_side(x, axis=2, value=0):
    if x is None:
      return None
    widths = [(0, 0)] * x.ndim
    widths[axis] = (shape.w1 - history, length - T)
    return jnp.pad(x, widths, constant_values=value)

  query_side = lambda x: None if x is None else pad_to(x, length, 3)
  padded = Pairs(*(query_side(x) if name.startswith("q") else key_side(x) for name, x in pairs._asdict().items()))
  return _Layout(padded, key_side(segments, 1, -1), T, history)


class _Tile(NamedTuple):
  """What one block of queries sees: query side [B, K, R, n, D], keys [B, K, m, D], second keys [B, K, n, w2, D]."""

  pairs: Pairs
  near1: jax.Array
  near2: jax.Array


def _offsets(group: Group, shape: Shape, i):
  """Where block i of a group starts: queries, its keys, its second keys (padded coordinates)."""
  start = group.start + i * shape.block
  return start, (start if group.steady else shape.w1), start + shape.w1 - shape.w2


def _tile(layout: _Layout, group: Group, shape: Shape, i) -> _Tile:
  start, key_start, second_start = _offsets(group, shape, i)
  n, w2 = shape.block, shape.w2
  cut = lambda x, at, size, axis=2: None if x is None else jax.lax.dynamic_slice_in_dim(x, at, size, axis)
  keys = lambda x: cut(x, key_start, group.keys)
  second = lambda x: None if x is None else unfold(cut(x, second_start, n + w2), w2)
  queries = lambda x: cut(x, start, n, 3)
  p, segments = layout.pairs, layout.segments
  pairs = Pairs(
    queries(p.q), keys(p.k), second(p.k2), keys(p.v), second(p.gain), second(p.shift), queries(p.q_pair), keys(p.k_pair)
  )
  t = shape.w1 + start + jnp.arange(n)[:, None]
  s = key_start + jnp.arange(group.keys)
  own = cut(segments, shape.w1 + start, n, 1)
  near1 = (s <= t) & (s > t - shape.w1) & (own[:, :, None] == cut(segments, key_start, group.keys, 1)[:, None, :])
  near2 = own[:, :, None] == unfold(cut(segments, second_start, n + w2, 1)[:, None, :, None], w2)[:, 0, :, :, 0]
  return _Tile(pairs, _log(near1), _log(near2))


def _log(mask):
  return jnp.where(mask, 0.0, -jnp.inf)[:, None, None]


def unfold(x: jax.Array, width: int) -> jax.Array:
  """[B, K, n + width, ...] -> [B, K, n, width, ...]: row r holds x at r + width, r + width - 1, ..., r + 1."""
  n = x.shape[2] - width
  return jnp.take(x, np.arange(n)[:, None] + width - np.arange(width), axis=2)


def fold(x: jax.Array) -> jax.Array:
  """Transpose of `unfold`, without a scatter: reading [n, n + width + 1] as [n, n + width] moves row r right by r."""
  B, K, n, width, D = x.shape
  x = jnp.pad(x[:, :, :, ::-1], ((0, 0), (0, 0), (0, 0), (1, n), (0, 0)))
  x = x.reshape(B, K, -1, D)[:, :, : n * (n + width)]
  return jnp.sum(x.reshape(B, K, n, n + width, D), 2)


def _rows(x):
  """[B, K, R, n, w2, D] -> [B, K, rows, D]: the rows of a matrix product."""
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _combined(form, pairs):
  return form.combine(_wide(pairs.q)[:, :, :, :, None], _wide(pairs.k2)[:, :, None])


def _product(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(b.dtype, jnp.float32))


def _pair_bias(tile: _Tile):
  """Mask of i, plus the pairwise logits: [B or 1, K or 1, R or 1, n, m]."""
  if tile.pairs.q_pair is None:
    return tile.near1
  return _product("bkrtd,bksd->bkrts", tile.pairs.q_pair, tile.pairs.k_pair) + tile.near1


def _logits(x, bias, tile: _Tile):
  """[B, K, R, n, w2, m]."""
  dtype = tile.pairs.k.dtype
  scores = _product("bkxd,bksd->bkxs", _rows(x).astype(dtype), tile.pairs.k)
  scores = scores.reshape(*x.shape[:-1], -1)
  return scores + bias[..., None, :] + tile.near2[..., None]


def _forward(form, shape, pairs, segments):
  layout = _layout(shape, pairs, segments)
  outs, lses = [], []
  for group in groups(layout.pairs.q.shape[3], shape, layout.history):

    def block(_, i, group=group):
      tile = _tile(layout, group, shape, i)
      p = tile.pairs
      logits = _logits(_combined(form, p), _pair_bias(tile), tile)
      top = jax.lax.stop_gradient(jnp.max(logits, (-2, -1)))
      top = jnp.maximum(top, 0.0) if shape.sink else top
      weight = jnp.exp(logits - top[..., None, None])
      mass = jnp.sum(weight, -1)
      total = jnp.sum(mass, -1) + (jnp.exp(-top) if shape.sink else 0.0)
      u = _product("bkxs,bksd->bkxd", _rows(weight).astype(p.v.dtype), p.v).reshape(*mass.shape, -1)
      out = u if p.gain is None else u * _wide(p.gain)[:, :, None]
      if p.shift is not None:
        out += mass[..., None] * _wide(p.shift)[:, :, None]
      out = jnp.sum(out, -2) / total[..., None]
      return None, (out.astype(p.q.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(block, None, jnp.arange((group.stop - group.start) // shape.block))
    outs.append(join_tiles(out, 3))
    lses.append(join_tiles(lse, 3))
  return jnp.concatenate(outs, 3)[:, :, :, : layout.T], jnp.concatenate(lses, 3)[..., : layout.T]


def _fwd_rule(form, shape, pairs, segments):
  out, lse = _forward(form, shape, pairs, segments)
  return (out, lse), (pairs, segments, out, lse)


def _bwd_rule(form, shape, saved, cotangents):
  """With Δ_t = <dy_t, y_t>, dU = dy∘gain and dm = <dy, shift>: dlogit = P∘(dU Vᵀ + dm - Δ), dV = Pᵀ dU,
  dX = dlogit K, dK = dlogitᵀ X, dq = Σ_δ combine(k2, dX), dk2 = combine(dX, q), dgain = dy∘(P V)."""
  pairs, segments, out, lse = saved
  layout = _layout(shape, pairs, segments)
  d_out = cotangents[0]
  delta = jnp.sum(_wide(d_out) * _wide(out), -1)
  length = layout.pairs.q.shape[3]
  d_out, delta, lse = (pad_to(x, length, 3) for x in (d_out, delta, lse))
  key_names = [name for name in ("k", "k2", "v", "gain", "shift", "k_pair") if getattr(pairs, name) is not None]
  carry = {name: jnp.zeros_like(_wide(getattr(layout.pairs, name))) for name in key_names}
  d_queries = []
  for group in groups(length, shape, layout.history):

    def block(carry, i, group=group):
      start, key_start, second_start = _offsets(group, shape, i)
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, shape.block, 3)
      tile = _tile(layout, group, shape, i)
      p, dtype = tile.pairs, pairs.q.dtype
      dy, delta_t, lse_t = _wide(cut(d_out)), cut(delta), cut(lse)
      x = _combined(form, p)
      weight = jnp.exp(_logits(x, _pair_bias(tile) - lse_t[..., None], tile))
      dy_rows = jnp.broadcast_to(dy[..., None, :], x.shape)
      du = dy_rows if p.gain is None else dy_rows * _wide(p.gain)[:, :, None]
      offset = -delta_t[..., None]
      if p.shift is not None:
        offset += jnp.sum(dy_rows * _wide(p.shift)[:, :, None], -1)
      du_rows = _rows(du).astype(dtype)
      d_weight = _product("bkxd,bksd->bkxs", du_rows, p.v).reshape(weight.shape)
      d_logit = weight * (d_weight + offset[..., None])
      d_logit_rows, weight_rows = _rows(d_logit).astype(dtype), _rows(weight).astype(dtype)
      dx = _product("bkxs,bksd->bkxd", d_logit_rows, p.k).reshape(x.shape)
      d = {
        "k": _product("bkxs,bkxd->bksd", d_logit_rows, _rows(x).astype(dtype)),
        "k2": fold(jnp.sum(form.combine(dx, _wide(p.q)[:, :, :, :, None]), 2)),
        "v": _product("bkxs,bkxd->bksd", weight_rows, du_rows),
      }
      dq = {"q": jnp.sum(form.combine(_wide(p.k2)[:, :, None], dx), -2)}
      if p.gain is not None:
        u = _product("bkxs,bksd->bkxd", weight_rows, p.v).reshape(x.shape)
        d["gain"] = fold(jnp.sum(dy_rows * u, 2))
      if p.shift is not None:
        d["shift"] = fold(jnp.sum(dy_rows * jnp.sum(weight, -1)[..., None], 2))
      if p.q_pair is not None:
        d_bias = jnp.sum(d_logit, -2).astype(dtype)
        dq["q_pair"] = _product("bkrts,bksd->bkrtd", d_bias, p.k_pair)
        d["k_pair"] = _product("bkrts,bkrtd->bksd", d_bias, p.q_pair)
      at = {name: second_start if name in ("k2", "gain", "shift") else key_start for name in d}
      carry = {name: _add_at(carry[name], d[name], at[name]) for name in carry}
      return carry, {name: g.astype(dtype) for name, g in dq.items()}

    carry, dq = jax.lax.scan(block, carry, jnp.arange((group.stop - group.start) // shape.block))
    d_queries.append(jax.tree.map(lambda x: join_tiles(x, 3), dq))
  dq = jax.tree.map(lambda *parts: jnp.concatenate(parts, 3)[:, :, :, : layout.T], *d_queries)
  first = shape.w1 - layout.history
  dk = {name: g[:, :, first : shape.w1 + layout.T].astype(pairs.q.dtype) for name, g in carry.items()}
  return Pairs(**(dict.fromkeys(Pairs._fields) | dq | dk)), None


def _add_at(x, update, start):
  size = update.shape[2]
  new = jax.lax.dynamic_slice_in_dim(x, start, size, 2) + update
  return jax.lax.dynamic_update_slice_in_dim(x, new, start, 2)


pair_attention.defvjp(_fwd_rule, _bwd_rule)
