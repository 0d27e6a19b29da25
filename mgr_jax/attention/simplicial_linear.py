"""Sums over all pairs of earlier tokens with a factorised weight, in time linear in T.

With non-negative features f, g, h [.., r] and a decay γ per key/value head,

    y_t[e] = Σ_{i,j≤t} γ^{(t-i)+(t-j)} Σ_r f_t[r] g_i[r] h_j[r] a_i[e] b_j[e] = Σ_r f_t[r] M_t[r, e] M'_t[r, e]

where M_t = Σ_{i≤t} γ^{t-i} g_i a_iᵀ, and M'_t alike from h and b. Over ordered pairs i < j the product M∘M' becomes the
iterated sum S_t = γ² S_{t-1} + γ M_{t-1}∘(h_t b_tᵀ), the second level of a path signature.

States are formed only at the borders of chunks of a few tokens; inside a chunk the product is expanded into
state·state + state·token + token·state + token·token, so that nearly all work is matrix products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.tiles import pad_to

CHUNK = 8
BLOCK = 128


class Features(NamedTuple):
  """f [B, K, R, T, r]; g, h [B, K, T, r]; a, b [B, K, T, E]. A token with g = h = 0 leaves no trace."""

  f: jax.Array
  g: jax.Array
  h: jax.Array
  a: jax.Array
  b: jax.Array


class Times(NamedTuple):
  """clock [B or 1, T] counts the real tokens since `State`; the document of each token, [B or 1, T]."""

  clock: jax.Array
  segment: jax.Array


class State(NamedTuple):
  """M and M', or for ordered pairs M and S, each [B, K, r, E], decayed to the last token at `at`."""

  first: jax.Array
  second: jax.Array | None
  ordered: jax.Array | None
  at: Times


def empty_state(batch: int, n_kv_head: int, features: int, width: int, ordered: bool, dtype=jnp.float32) -> State:
  """The state before any token of document 0, at clock 0."""
  zeros = jnp.zeros((batch, n_kv_head, features, width), dtype)
  origin = jnp.zeros((batch,), jnp.int32)
  return State(zeros, None if ordered else zeros, zeros if ordered else None, Times(origin, origin))


def fade(rate_K, ticks, same):
  """γ^ticks where both ends lie in one document, else 0; [B', ...] -> [B', K, ...]."""
  rate = rate_K.reshape(-1, *[1] * (ticks.ndim - 1))
  return jnp.where(same[:, None], jnp.exp(-rate * ticks[:, None]), 0.0)


def dense_pair_sums(features: Features, rate_K, times: Times, ordered: bool) -> jax.Array:
  """y [B, K, R, T, E] from the states of all tokens at once: the obvious form, O(T²·r·E) and O(T·r·E) memory."""
  f, g, h, a, b = features
  times = jax.tree.map(jnp.asarray, times)
  ticks = times.clock[:, :, None] - times.clock[:, None, :]
  faded = fade(rate_K, ticks, times.segment[:, :, None] == times.segment[:, None, :])
  causal = np.tri(g.shape[2], dtype=np.float32)
  state = lambda x, y: jnp.einsum("bkts,bksf,bkse->bktfe", causal * faded, x, y)
  if ordered:
    before = state(g, a) - g[..., None] * a[..., None, :]
    both = jnp.einsum("bkts,bksfe,bksf,bkse->bktfe", causal * faded**2, before, h, b)
  else:
    both = state(g, a) * state(h, b)
  return jnp.einsum("bkrtf,bktfe->bkrte", f, both)


def chunked_pair_sums(features: Features, rate_K, times: Times, state: State):
  """The sums of T tokens after `state`. Returns (y [B, K, R, T, E], state).

  About 4·r·E·(CHUNK + 1 + BLOCK/CHUNK²) FLOPs per token and query head. Residuals are one state per block: the gradient
  recomputes what lies inside.
  """
  B, K, R, T, _ = features.f.shape
  chunk = min(CHUNK, T)
  size = min(BLOCK, -(-T // chunk) * chunk)
  blocks = -(-T // size)
  length = blocks * size

  def cut(x):
    x = pad_to(x, length, x.ndim - 2)
    x = x.reshape(*x.shape[:-2], blocks, size // chunk, chunk, x.shape[-1])
    return jnp.moveaxis(x, -4, 0)

  def cut_times(x):
    x = jnp.pad(jnp.broadcast_to(x, (B, T)).astype(jnp.int32), ((0, 0), (0, length - T)), mode="edge")
    return jnp.moveaxis(x.reshape(B, blocks, size // chunk, chunk), 1, 0)

  body = jax.checkpoint(lambda state, xs: _chunks(rate_K, state, *xs), prevent_cse=False)
  state, out = jax.lax.scan(body, state, (jax.tree.map(cut, features), jax.tree.map(cut_times, times)))
  out = jnp.moveaxis(out, 0, 3)  # [B, K, R, blocks, chunks, chunk, E]
  return out.reshape(B, K, R, length, -1)[:, :, :, :T], state


def _chunks(rate_K, state: State, features: Features, times: Times):
  """One block: f [B, K, R, N, c, r], g, h [B, K, N, c, r], a, b [B, K, N, c, E], times [B, N, c]."""
  f, g, h, a, b = features
  chunk = g.shape[-2]
  ends = jax.tree.map(lambda x: x[..., -1], times)
  border = jax.tree.map(lambda first, rest: jnp.concatenate([first[:, None], rest], 1), state.at, ends)
  ago = lambda later, earlier: fade(rate_K, later.clock - earlier.clock, later.segment == earlier.segment)
  at = lambda x, *index: jax.tree.map(lambda y: y[(slice(None), *index)], x)
  new = None
  to_end = ago(at(ends, slice(None), new), times)[..., None]
  before = at(border, slice(None, -1))
  since_border = ago(times, at(before, slice(None), new))
  within = ago(at(times, slice(None), slice(None), new), at(times, slice(None), new, slice(None)))
  within *= np.tri(chunk, dtype=within.dtype)
  carry = ago(at(border, slice(None), new), at(border, new)) * np.tri(border.clock.shape[1], dtype=g.dtype)

  def at_borders(initial, sums, weight):
    sources = jnp.concatenate([initial[:, :, None], sums], 2)
    return jnp.einsum("bknm,bkmfe->bknfe", weight, sources)

  outer = lambda x, y: jnp.einsum("bknif,bknie->bknfe", x, y)
  update = outer(to_end * h, b)
  first = at_borders(state.first, outer(to_end * g, a), carry)
  if state.ordered is None:
    second = at_borders(state.second, update, carry)
    both, ordered = first * second, None
  else:
    across = ago(ends, before)[..., None, None]
    sums = across * first[:, :, :-1] * update + _ordered_inside(to_end * g, a, to_end * h, b)
    second, both = None, at_borders(state.ordered, sums, carry**2)
    ordered = both

  # With all chunks on one axis nothing has more than six: XLA's CPU kernels crash on products summed over seven.
  lead = (*g.shape[:3],)
  fold = lambda x: jnp.broadcast_to(x, (*lead, *x.shape[3:])).reshape(-1, *x.shape[3:])
  at_start = lambda states: fold(states[:, :, :-1])
  since_border, within = fold(since_border)[:, None, :, None], fold(within)
  f, g, h, a, b = folded = Features(*map(fold, (jnp.moveaxis(f, 2, 3), g, h, a, b)))
  faded = since_border * f
  out = jnp.einsum("zrtf,zfe->zrte", since_border * faded, at_start(both))
  out += _state_and_token(faded, h, at_start(first), b, within)
  if second is not None:
    out += _state_and_token(faded, g, at_start(second), a, within)
  out += _inside(folded, within, second is None)
  last = lambda x: None if x is None else x[:, :, -1]
  state = State(last(first), last(second), last(ordered), at(border, -1))
  return state, jnp.moveaxis(out.reshape(*lead, *out.shape[1:]), 3, 2)


def _state_and_token(f, h, state, b, within):
  """Σ_j within_tj Σ_r f_t[r] h_j[r] state[r, e] b_j[e]."""
  both = f[..., None, :] * h[:, None, None]  # [Z, R, t, j, r]
  seen = jnp.einsum("zrtjf,zfe->zrtje", both, state)
  return jnp.sum(seen * (within[..., None] * b[:, None])[:, None], -2)


def _inside(features: Features, within, ordered: bool):
  """Pairs of which both tokens lie in the query's chunk."""
  f, g, h, a, b = features
  both = f[..., None, :] * g[:, None, None]  # [Z, R, t, i, r]
  weight = jnp.einsum("zrtif,zjf->zrtij", both, h)
  weight *= (within[..., :, None] * within[..., None, :])[:, None]
  if ordered:
    weight *= np.tri(g.shape[-2], k=-1, dtype=weight.dtype).T
  return jnp.einsum("zrtie,zie->zrte", jnp.einsum("zrtij,zje->zrtie", weight, b), a)


def _ordered_inside(g, a, h, b):
  """Σ_{i<j} (g_i a_iᵀ)∘(h_j b_jᵀ) over each chunk [B, K, N, r, E]."""
  total = running = jnp.zeros((*g.shape[:3], g.shape[-1], a.shape[-1]), a.dtype)
  for j in range(g.shape[-2]):
    outer = lambda x, y, j=j: x[..., j, :, None] * y[..., j, None, :]
    total += running * outer(h, b)
    running += outer(g, a)
  return total
