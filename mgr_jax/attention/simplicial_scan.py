"""Sums over pairs token after token, with their own gradient: the fastest form on a CPU.

The states of `simplicial_linear` stay in the cache from one token to the next. A group of G of the B·K sequences runs
at a time, with states [r, E, G], and sums over r or E are static loops: every operation is over contiguous entries.
The gradient keeps one state per `BLOCK` tokens, recomputes those in between and carries the cotangents of the states
backwards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.simplicial_linear import Features, State, Times, fade
from mgr_jax.attention.tiles import pad_to

BLOCK = 16
GROUP = 8


class Token(NamedTuple):
  """One token, or T of them on a leading axis: f [R, r, G], g, h [r, G], a, b [E, G], and what it keeps of M, [G]."""

  features: Features
  keep: jax.Array | None


class Sums(NamedTuple):
  """M, and M' or, for ordered pairs, S; each [r, E, G]."""

  first: jax.Array
  second: jax.Array | None
  ordered: jax.Array | None


def scan_pair_sums(features: Features, rate_K, times: Times, state: State):
  """The sums of T tokens after `state`, about 7·r·E vector operations each. Returns (y [B, K, R, T, E], state).

  Args:
    rate_K: `None` where nothing fades. If rows hold one document each, `times.segment` may be `None` as well, and then
      nothing is multiplied.
  """
  B, K, _, T, _ = features.f.shape
  keep = None
  if rate_K is not None or times.segment is not None:
    keep = _kept(jnp.zeros(K) if rate_K is None else rate_K, times, state.at, (B, T))
  groups = -(-B * K // GROUP)
  size = -(-B * K // groups)

  def inside(x):
    x = pad_to(x.reshape(B * K, *x.shape[2:]), groups * size, 0)
    return jnp.moveaxis(x.reshape(groups, size, *x.shape[1:]), 1, -1)

  def outside(x):
    x = jnp.moveaxis(x, -1, 1)
    return x.reshape(-1, *x.shape[2:])[: B * K].reshape(B, K, *x.shape[2:])

  features, keep, sums = jax.tree.map(inside, (features, keep, Sums(*state[:3])))
  features = features._replace(f=jnp.moveaxis(features.f, 1, 2))
  sums, out = jax.lax.map(lambda xs: _scan(*xs), (Token(features, keep), sums))
  segment = state.at.segment if times.segment is None else times.segment[:, -1]
  at = Times(jnp.broadcast_to(times.clock[:, -1], (B,)), jnp.broadcast_to(segment, (B,)))
  return jnp.moveaxis(outside(out), 2, 3), State(*jax.tree.map(outside, sums), at)


def _kept(rate_K, times: Times, at: Times, shape):
  """γ^ticks since the token before, 0 across documents; [B, K, T]."""
  segment = jnp.zeros((1, 1), jnp.int32) if times.segment is None else times.segment
  first = at.segment if times.segment is not None else jnp.zeros_like(at.segment)
  clock, segment = (jnp.broadcast_to(x, shape) for x in (times.clock, segment))
  before = lambda x, start: jnp.concatenate([start[:, None], x[:, :-1]], 1)
  ticks = clock - before(clock, at.clock)
  return fade(rate_K, ticks, segment == before(segment, first))


def _loop(size: int, term):
  """Σ_i term(i), unrolled: compilers fuse it into one pass over the remaining axes."""
  total = term(0)
  for i in range(1, size):
    total += term(i)
  return total


def _outer(x, y):
  return x[:, None] * y


def _faded(sums: Sums, keep) -> Sums:
  if keep is None:
    return sums
  fades = Sums(keep, keep, keep**2)
  return Sums(*(None if x is None else fade * x for fade, x in zip(fades, sums, strict=True)))


def _advance(sums: Sums, token: Token) -> Sums:
  """The recurrences, one token on."""
  (_, g, h, a, b), keep = token
  first, second, ordered = _faded(sums, keep)
  update = _outer(h, b)
  if ordered is None:
    return Sums(first + _outer(g, a), second + update, None)
  return Sums(first + _outer(g, a), None, ordered + first * update)


def _read(f, sums: Sums):
  """Σ_r f[r] (M∘M')[r] or Σ_r f[r] S[r] for each query head, [R, E, G]."""
  first, second, ordered = sums
  both = (lambda r: first[r] * second[r]) if ordered is None else (lambda r: ordered[r])
  return jnp.stack([_loop(len(first), lambda r, head=head: head[r] * both(r)) for head in f])


def _step(sums: Sums, token: Token):
  # Without the barrier the sums would be computed again for each of their uses.
  sums = jax.lax.optimization_barrier(_advance(sums, token))
  return sums, _read(token.features.f, sums)


def _step_back(d_sums: Sums, xs):
  """The transposed `_step`: with P = M∘M' or S, dP += Σ_R f dyᵀ, then the product rule.

  xs: the sums before the token (`None` if nothing fades) and after it, the token, and the cotangent of its output.
  """
  before, after, token, d_out = xs
  (f, g, h, a, b), keep = token
  r, E = after.first.shape[:2]
  both = (lambda e: after.first[:, e] * after.second[:, e]) if after.ordered is None else lambda e: after.ordered[:, e]
  df = jnp.stack([_loop(E, lambda e, dy=dy: dy[e] * both(e)) for dy in d_out])
  d_both = _loop(len(f), lambda i: _outer(f[i], d_out[i]))
  if after.ordered is None:
    d_sums = Sums(d_sums.first + d_both * after.second, d_sums.second + d_both * after.first, None)
    d_first, d_update = d_sums[:2]
  else:
    d_ordered = d_sums.ordered + d_both
    seen = after.first - _outer(g, a)
    d_first, d_update = d_sums.first, d_ordered * seen
    d_sums = Sums(d_first + d_ordered * _outer(h, b), None, d_ordered)
  d_sums, d_first, d_update = jax.lax.optimization_barrier((d_sums, d_first, d_update))
  over_E = lambda d, y: _loop(E, lambda e: d[:, e] * y[e])
  over_r = lambda d, x: _loop(r, lambda i: d[i] * x[i])
  d_features = Features(df, over_E(d_first, a), over_E(d_update, b), over_r(d_first, g), over_r(d_update, h))
  d_keep = None
  if keep is not None:
    d_keep = jax.vjp(lambda keep: _faded(before, keep), keep)[1](d_sums)[0]
    d_sums = _faded(d_sums, keep)
  return d_sums, Token(d_features, d_keep)


def _blocks(x, value=0):
  """[T, ...] -> [blocks, BLOCK, ...], padded at the end."""
  x = pad_to(x, -(-x.shape[0] // BLOCK) * BLOCK, 0, value)
  return x.reshape(-1, BLOCK, *x.shape[1:])


def _cut(tokens: Token) -> Token:
  """Whole blocks; tokens without features, which keep the state, fill the last one."""
  return Token(jax.tree.map(_blocks, tokens.features), None if tokens.keep is None else _blocks(tokens.keep, 1))


def _uncut(x, T):
  return x.reshape(-1, *x.shape[2:])[:T]


@jax.custom_vjp
def _scan(tokens: Token, sums: Sums):
  """Runs `_step` over the leading axis. Returns the last sums and the outputs [T, R, E, G]."""
  return jax.lax.scan(_step, sums, tokens)


def _fwd_rule(tokens, sums):
  def block(sums, tokens):
    last, out = jax.lax.scan(_step, sums, tokens)
    return last, (sums, out)

  last, (starts, out) = jax.lax.scan(block, sums, _cut(tokens))
  return (last, _uncut(out, len(tokens.features.g))), (tokens, starts)


def _bwd_rule(saved, cotangents):
  tokens, starts = saved
  d_last, d_out = cotangents

  def advance(sums, token):
    sums = _advance(sums, token)
    return sums, sums

  def block_back(d_sums, xs):
    start, tokens, d_out = xs
    _, after = jax.lax.scan(advance, start, tokens)
    before = None
    if tokens.keep is not None:
      before = jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest[:-1]]), start, after)
    return jax.lax.scan(_step_back, d_sums, (before, after, tokens, d_out), reverse=True)

  d_sums, d_tokens = jax.lax.scan(block_back, d_last, (starts, _cut(tokens), _blocks(d_out)), reverse=True)
  return jax.tree.map(lambda x: _uncut(x, len(tokens.features.g)), d_tokens), d_sums


_scan.defvjp(_fwd_rule, _bwd_rule)
