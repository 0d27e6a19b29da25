"""Chunks of a sequence: which pairs inside a chunk see each other, and how sums cross from one chunk to the next.

Chunked arrays have the chunk's number N first and its tokens c where the sequence axis was. A prefix sum is valid for
the one document that runs through a border: tokens of another document neither read it nor write to it, and it is
dropped when a new document takes over. Recency decay λ^(t-s) <= 1 is split at the border, so no factor exceeds one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.tiles import pad_to

PADDING = -1  # Segment number of padding: no document has it.


class Links(NamedTuple):
  """Factors between tokens and sums; axes that do not matter are 1, `None` means that all factors are one.

  Attributes:
    pair: [N, B, G, 1, c, c], λ^(t-s) where token t of a chunk sees token s of it, else 0.
    read: [N, B, G, 1, 1, c], λ^(distance from the last token of the chunk before).
    write: [N, B, G, 1, c], λ^(distance to the last token of the chunk).
    carry: [N, B, G, 1, 1], the factor of the sum so far when the chunk's own is added.
  """

  pair: jax.Array
  read: jax.Array | None
  write: jax.Array | None
  carry: jax.Array | None


def wide(x: jax.Array) -> jax.Array:
  """At least float32: digits, kernels and sums never run in less."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def with_ones(v: jax.Array) -> jax.Array:
  """Values with a last column of ones, whose weighted sum is the normaliser; at least float32."""
  return wide(jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1))


def decay_gradient(v_BGTD: jax.Array, d_v_BGTD: jax.Array) -> jax.Array:
  """∂L/∂log λ of the key/value heads, Σ_{s<=t} (t-s)·κ_ts·λ^(t-s)·(<u_t, v_s> + w_t), from values with ones.

  It is -Σ_s s·<v_s, dv_s>. The queries' part Σ_t t·(<u_t, num_t> + w_t·mass_t) vanishes because y is normalised.
  """
  earned = jnp.sum(v_BGTD * d_v_BGTD, (0, 3))
  return -jnp.sum(jnp.arange(earned.shape[1]) * earned, -1)


def split(x: jax.Array, axis: int, chunk: int, n_chunk: int, fill=0) -> jax.Array:
  """[..., T, ...] -> [N, ..., c, ...], padded with `fill`."""
  x = pad_to(x, chunk * n_chunk, axis, fill)
  x = x.reshape(*x.shape[:axis], n_chunk, chunk, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def join(x: jax.Array, axis: int, T: int) -> jax.Array:
  """Inverse of `split`; `axis` is where the sequence stands in the result."""
  x = jnp.moveaxis(x, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return jax.lax.slice_in_dim(x, 0, T, axis=axis)


def links(log_decay_G, segment_ids_BT, chunk: int, n_chunk: int) -> Links:
  """The factors of causal sums with decay exp(log_decay·(t - s)); `None` stands for no decay, and for one document."""
  token = jnp.arange(chunk)
  lag = token[:, None] - token
  pair = (lag >= 0)[None, None, None, None].astype(jnp.float32)
  read = write = carry = None
  if log_decay_G is not None:
    power = lambda steps: jnp.exp(log_decay_G[:, None, None, None] * steps)
    pair = pair * power(jnp.maximum(lag, 0))[None, None]
    read, write = power(token + 1)[None, None], power(chunk - 1 - token)[:, :, 0][None, None]
    carry = power(jnp.full((1,), chunk))[:, :, 0][None, None]
  if segment_ids_BT is not None:
    segment = pad_to(segment_ids_BT, chunk * n_chunk, 1, PADDING)
    segment = jnp.moveaxis(segment.reshape(segment.shape[0], n_chunk, chunk), 1, 0)
    last = segment[:, :, -1:]
    before = jnp.concatenate([jnp.full_like(last[:1], PADDING - 1), last[:-1]])
    times = lambda factor, same: same if factor is None else factor * same
    same = lambda x, y, n_axes: (x == y).astype(jnp.float32).reshape(*x.shape[:2], *[1] * n_axes, *x.shape[2:])
    shown = (segment[..., :, None] == segment[..., None, :]).astype(jnp.float32)
    pair = pair * shown[:, :, None, None]
    read = times(read, same(segment, before, 3))
    write = times(write, same(segment, last, 2))
    carry = times(carry, same(last, before, 2))
  return Links(pair, read, write, carry)


def running(added: jax.Array, carry: jax.Array | None, start: jax.Array, reverse: bool = False):
  """Sums before each chunk: S_0 = start, S_{n+1} = carry_n·S_n + added_n, or from the other end.

  Returns (S_n stacked like `added`, the sum after the last chunk).
  """

  def step(total, xs):
    new, factor = xs if carry is not None else (xs, 1.0)
    return factor * total + new, total

  if carry is not None:
    carry = jnp.broadcast_to(carry, (added.shape[0], *carry.shape[1:]))
  last, before = jax.lax.scan(step, start, added if carry is None else (added, carry), reverse=reverse)
  return before, last
