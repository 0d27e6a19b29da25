"""Causal max-plus attention as a scan: y_td = max_{s<=t} max_r (q_tr + k_sr + v_sd) in T·D² pairs.

The two maxima exchange, so y_td = max_r (q_tr + U_t[r, d]) with U_t[r, d] = max_{s<=t} (k_sr + v_sd), a D×D state. A
recency penalty -λ(t-s) is a max-plus scalar: with local index l = position mod P, a token is inserted as (k + λl) + v,
read with q - λl, and U loses λP when l returns to 0. That rebasing keeps numbers small in long documents and is part of
the definition, so that every way to cut the sequence gives the same bits.

Arrays here have time in front: q [T, B, K, R, D], k [T, B, K, D], v [T, B, K, E]. Values may carry a column of zeros:
its output is the largest score max_s a_ts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.tropical_matmul import scatter_add
from mgr_jax.loops import tied


class Clock(NamedTuple):
  """Where the tokens stand, as arrays [T, B]: position in the document, and whether a document begins here."""

  position: jax.Array
  starts: jax.Array


class Plan(NamedTuple):
  """How to run a scan; static. `chunk` tokens are one step's worth of serial work (the whole sequence: no chunks)."""

  chunk: int
  rebase: int
  deterministic: bool = False


def shifted(q, k, v, decay_K, clock: Clock, rebase: int):
  """q - λl, k + λl, v, and what the state loses before each token [T, B, K, 1, 1]: 0, λP, or all at a document's start.

  The barrier keeps compilers from contracting products into the additions of the scan, which would make the bits depend
  on how the sequence is cut.
  """
  local = (decay_K * (clock.position % rebase)[..., None])[..., None]
  wraps = (clock.position % rebase == 0) & ~clock.starts
  loss = jnp.where(clock.starts[..., None], jnp.inf, jnp.where(wraps[..., None], decay_K * rebase, 0.0))
  return jax.lax.optimization_barrier((q - local[..., None], k + local, v, loss[..., None, None]))


def empty_state(batch: int, n_kv_head: int, head_dim: int, columns: int, dtype=jnp.float32) -> jax.Array:
  """U before any token: -inf [B, K, D, E]."""
  return jnp.full((batch, n_kv_head, head_dim, columns), -jnp.inf, dtype)


def outer_sum(k, v):
  return k[..., :, None] + v[..., None, :]


def read(q, U, I=None):
  """max_r (q_r + U[r, :]), and with I the entry of I at the winner; the lowest r at ties.

  The loop is static: compilers fuse it into one pass with the last axis innermost.
  """
  y = q[..., 0, None] + U[..., None, 0, :]
  winner = None if I is None else jnp.broadcast_to(I[..., None, 0, :], y.shape)
  for r in range(1, q.shape[-1]):
    z = q[..., r, None] + U[..., None, r, :]
    better = z > y
    y = jnp.where(better, z, y)
    if I is not None:
      winner = jnp.where(better, I[..., None, r, :], winner)
  return y, winner


def _insert(state, xs, track):
  """One token into (U, I); I holds s·D + r of the token s that owns entry (r, d). The earliest wins ties."""
  U, I = state
  t, k, v, loss = xs
  U = U - loss
  x = outer_sum(k, v)
  new = x > U
  if track:
    owner = t * k.shape[-1] + jnp.arange(k.shape[-1], dtype=jnp.int32)[:, None]
    I = jnp.where(new, owner, I)
  return jnp.where(new, x, U), I


def run(q, k, v, loss, U, chunk: int, track: bool):
  """The scan over shifted inputs from state U.

  With several chunks all of them advance together: first each from an empty state, then a short scan hands the states
  on, then each again from its true state. Serial steps: 2·chunk + T/chunk instead of T; the bits are the same, because
  maxima are exact and a chunk of at most `rebase` tokens loses at most one finite amount.

  Returns:
    (y [T, B, K, R, E], winners like y in int32 or `None`, last U).
  """
  T = k.shape[0]
  chunk = min(chunk, T)
  N = -(-T // chunk)
  I = jnp.zeros(U.shape, jnp.int32) if track else None
  token = tied(np.arange(N * chunk, dtype=np.int32), k)  # Owners of all entries for all tokens are T·D·E numbers.
  xs = (_cut(q, N, chunk), token.reshape(N, chunk).T[:, :, None, None, None, None])
  xs += (_cut(k, N, chunk, -jnp.inf), _cut(v, N, chunk), _cut(loss, N, chunk))
  U, I = (None if a is None else a[None] for a in (U, I))
  if N > 1:
    U, I = _starts(xs[1:], U, I, track)

  def token_step(state, xs):
    state = _insert(state, xs[1:], track)
    return state, read(xs[0], *state)

  (U, _), (y, winner) = jax.lax.scan(token_step, (U, I), xs)
  join = lambda a: a.swapaxes(0, 1).reshape(N * chunk, *a.shape[2:])[:T]
  return join(y), join(winner) if track else None, U[-1]


def _cut(x, N, chunk, fill=0.0):
  """[T, ...] -> [chunk, N, ...], padded at the end."""
  x = jnp.pad(x, [(0, N * chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
  return x.reshape(N, chunk, *x.shape[1:]).swapaxes(0, 1)


def _starts(xs, U, I, track):
  """The state before each chunk, [N, ...]."""
  empty = lambda a, value: None if a is None else jnp.full((xs[1].shape[1], *a.shape[1:]), value, a.dtype)
  insert = lambda state, xs: (_insert(state, xs, track), None)
  local, _ = jax.lax.scan(insert, (empty(U, -jnp.inf), empty(I, 0)), xs)
  return hand_on(local, jnp.sum(xs[3], 0), (U[0], I[0] if track else None))


def hand_on(local, loss, first):
  """The state (U, I) before each of N chunks, [N, ...], from what each chunk makes of an empty state.

  Args:
    local: (U, I) after each chunk, [N, ...]; I may be `None`.
    loss: what a state loses over each chunk, broadcasting against U.
    first: (U, I) before the first chunk.
  """

  def chunk(state, xs):
    U, I = state
    local_U, local_I, loss = xs
    U = U - loss
    new = local_U > U
    return (jnp.where(new, local_U, U), None if I is None else jnp.where(new, local_I, I)), state

  return jax.lax.scan(chunk, first, (*local, loss))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def maxplus_attention(q, k, v, decay_K, clock: Clock, plan: Plan) -> jax.Array:
  """y_td = max_{s<=t, same document} (max_r(q_tr + k_sr) - λ(t-s) + v_sd), [T, B, K, R, E].

  Costs 2·T·D·E pairs per head. The gradient goes to the winning key and coordinate (the earliest, the lowest at ties);
  only one int32 per output is kept for it.
  """
  return _forward(q, k, v, decay_K, clock, plan, track=False)[0]


def _forward(q, k, v, decay_K, clock, plan, track):
  q, k, v, loss = shifted(q, k, v, decay_K, clock, plan.rebase)
  U = empty_state(*k.shape[1:], v.shape[-1], k.dtype)
  return run(q, k, v, loss, U, plan.chunk, track)[:2]


def winners(q, k, v, decay_K, clock: Clock, plan: Plan):
  """(y, s*, r*): the output of `maxplus_attention` with the winning key and coordinate, int32."""
  y, winner = _forward(q, k, v, decay_K, clock, plan, track=True)
  return y, winner // k.shape[-1], winner % k.shape[-1]


def _fwd_rule(q, k, v, decay_K, clock, plan):
  y, winner = _forward(q, k, v, decay_K, clock, plan, track=True)
  return y, (winner, clock.position, jnp.zeros((0, k.shape[-1])))


def _bwd_rule(plan, saved, g):
  winner, position, like = saved
  return (*pull_back(winner, position, like.shape[-1], g, plan.deterministic), None)


def pull_back(winner, position, D: int, g, deterministic: bool):
  """dq[t, r*] += g, dk[s*, r*] += g, dv[s*, d] += g, dλ -= (t - s*)·g; `winner` is s*·D + r*, like g."""
  T, B, K, R, E = g.shape
  s, r = winner // D, winner % D
  add = functools.partial(scatter_add, values=g, deterministic=deterministic)
  query = jnp.arange(T * B * K * R, dtype=jnp.int32).reshape(T, B, K, R, 1)
  head = jnp.arange(B * K, dtype=jnp.int32).reshape(B, K, 1, 1)
  key = s * (B * K) + head
  dq = add(T * B * K * R * D, query * D + r).reshape(T, B, K, R, D)
  dk = add(T * B * K * D, key * D + r).reshape(T, B, K, D)
  dv = add(T * B * K * E, key * E + jnp.arange(E, dtype=jnp.int32)).reshape(T, B, K, E)
  return dq, dk, dv, decay_gradient(dq, dk, position)


def decay_gradient(dq, dk, position):
  """dλ_K = Σ_s pos_s Σ_r dk_sr - Σ_t pos_t Σ_r dq_tr: what the winners' distances t - s add up to."""
  pos = position.astype(dk.dtype)[..., None]
  of_keys = jnp.sum(pos * jnp.sum(dk, -1), (0, 1))
  return of_keys - jnp.sum(pos * jnp.sum(dq, (-2, -1)), (0, 1))


maxplus_attention.defvjp(_fwd_rule, _bwd_rule)
