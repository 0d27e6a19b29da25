"""Max-plus attention as Pallas kernels that keep the D×E state of `tropical_scan` in registers.

One program owns some columns of the state of one key/value head and walks through one chunk of tokens; a program per
head, chunk and group of columns. All chunks run at once, twice: from an empty state, to find what each adds, and again
from their true starts, to answer the queries. A short scan over chunks between the two hands the states on. Outputs are
those of `tropical_scan.maxplus_attention`, which takes the same chunks.

What it costs, per key/value head with R query heads, T tokens in N chunks, E columns, float32:
- pairs (one addition, one maximum): T·D·E to insert, twice, and R·T·D·E to read;
- state on chip: 4·D·columns bytes per program, twice that when winners are kept for the gradient;
- device memory traffic: T·(R·D + 2·D + 2·E) numbers read and R·T·E written, with as many indices for the gradient, and
  4·N·D·E numbers of chunk states (8·N·D·E with winners). Chunks of at least 2·D tokens keep those below the inputs.
  Every group of columns reads all queries and keys, from cache but for the first;
- saved for the gradient: one int32 per output, as for the scan.

On GPUs the kernels go through the Triton back end, on TPUs through Mosaic, where all columns are one program. On a CPU
they are interpreted: for tests, not for speed. `jit` over several devices does not cut them up: GPUs gather what they
read and TPUs refuse, so each device should run its own rows, as models do (`model.rows`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from mgr_jax.attention.tropical_scan import Clock, Plan, hand_on, pull_back, shifted


class Target(NamedTuple):
  """How kernels are compiled; static.

  Attributes:
    interpret: run as ordinary XLA operations, one program after the other.
    entries: of the state that a program may hold, 0 for all.
    params: of the back end, or `None` for its defaults.
  """

  interpret: bool
  entries: int = 0
  params: object = None


def target(platform: str) -> Target:
  """The `Target` for a platform: `cpu` interpreted, `gpu` (also `cuda`, `rocm`) Triton, `tpu` Mosaic.

  Raises:
    ValueError: there is no back end for it.
  """
  if platform == "cpu":
    return Target(True)
  if platform == "tpu":
    return Target(False)
  if platform in ("gpu", "cuda", "rocm"):
    from jax.experimental.pallas import triton  # Not everywhere: later releases may come without it.

    # Each thread of one warp then has 32 entries and their owners in 64 of its 255 registers, few enough not to spill.
    return Target(False, 1024, triton.CompilerParams(num_warps=1, num_stages=1))
  raise ValueError(f"tropical option impl=pallas has no kernels for the platform {platform}; use impl=scan")


def maxplus_attention(q, k, v, decay_K, clock: Clock, plan: Plan, where: Target | None = None) -> jax.Array:
  """`tropical_scan.maxplus_attention` by kernels: y_td = max_{s<=t} (max_r(q_tr + k_sr) - λ(t-s) + v_sd).

  Args:
    q, k, v, decay_K, clock, plan: as there; q [T, B, K, R, D], k [T, B, K, D], v [T, B, K, E].
    where: the target; that of the default backend when not given.

  Returns:
    [T, B, K, R, E], the same numbers. Gradients and their derivatives follow the winning key and coordinate.
  """
  return _attention(q, k, v, decay_K, clock, plan, where or target(jax.default_backend()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, decay_K, clock, plan, where):
  return _run(q, k, v, decay_K, clock, plan, where, track=False)[0]


def _fwd_rule(q, k, v, decay_K, clock, plan, where):
  y, winner = _winners(q, k, v, decay_K, clock, plan, where)
  return y, (winner, clock.position, jnp.zeros((0, k.shape[-1])))


def _bwd_rule(plan, where, saved, g):
  del where
  winner, position, like = saved
  return (*pull_back(winner, position, like.shape[-1], g, plan.deterministic), None)


_attention.defvjp(_fwd_rule, _bwd_rule)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _winners(q, k, v, decay_K, clock, plan, where):
  """(y, s*·D + r*), differentiable forwards: curvature products take the derivative of a gradient that way."""
  return _run(q, k, v, decay_K, clock, plan, where, track=True)


@_winners.defjvp
def _winners_jvp(plan, where, primals, tangents):
  """dy = dq[t, r*] + dk[s*, r*] + dv[s*, d] - dλ·(t - s*)."""
  y, winner = _winners(*primals, plan, where)
  dq, dk, dv, d_decay, _ = tangents
  _, B, K, D = dk.shape
  s, r = winner // D, winner % D
  row = (s * B + jnp.arange(B, dtype=jnp.int32)[:, None, None, None]) * K
  row += jnp.arange(K, dtype=jnp.int32)[:, None, None]
  column = jnp.arange(y.shape[-1], dtype=jnp.int32)
  position = jnp.asarray(primals[4].position)
  rows = jnp.arange(B)[:, None, None, None]
  lag = (position[..., None, None, None] - position[s, rows]).astype(y.dtype)
  dy = jnp.take_along_axis(dq, r, -1) + dk.reshape(-1)[row * D + r] + dv.reshape(-1)[row * y.shape[-1] + column]
  return (y, winner), (dy - d_decay[:, None, None] * lag, np.zeros(winner.shape, jax.dtypes.float0))


class _Size(NamedTuple):
  """Of a problem as the kernels see it: `rows` is D and `width` E, both padded; `columns` of them per program."""

  heads: int
  chunks: int
  chunk: int
  D: int
  rows: int
  columns: int
  width: int


def _run(q, k, v, decay_K, clock, plan, where, track):
  """(y [T, B, K, R, E], winners alike or `None`)."""
  (T, B, K, R, D), E = q.shape, v.shape[-1]
  chunk = min(plan.chunk, T)
  size = _Size(B * K, -(-T // chunk), chunk, D, pl.next_power_of_2(D), *_columns(E, pl.next_power_of_2(D), where))
  q, k, v, loss = shifted(q, k, v, decay_K, clock, plan.rebase)
  q, k = _by_head(q, size, size.rows), _by_head(k, size, size.rows, -jnp.inf)
  v, loss = _by_head(v, size, size.width), _by_head(loss[..., 0], size, 1)
  start = (jnp.full((1, B * K, size.rows, size.width), -jnp.inf, k.dtype),)
  if track:
    start += (jnp.zeros(start[0].shape, jnp.int32),)
  if size.chunks > 1:
    local = _local_states(k, v, loss, size, where, track)
    lost = jnp.sum(loss.reshape(size.heads, size.chunks, chunk), 2).T[..., None, None]
    pair = lambda state: state if track else (*state, None)
    start = hand_on(pair(local), lost, pair(tuple(a[0] for a in start)))[: 1 + track]
  found = _outputs(start, q, k, v, loss, size, where)
  found = [jnp.moveaxis(a[:, :T, :, :E].reshape(B, K, T, R, E), 2, 0) for a in found]
  return found[0], found[1] if track else None


def _columns(E, rows, where):
  """Columns per program and of all programs: powers of two that pad little, as the score's makes E no round number."""
  if not where.entries:
    return E, E
  columns = min(32, max(8, where.entries // rows))
  while columns > 8 and -E % columns > E // 4:
    columns //= 2
  return columns, -(-E // columns) * columns


def _by_head(x, size, width, fill=0.0):
  """[T, B, K, ..., D] -> [B·K, chunks·chunk, ..., width], padded at the ends; a key of `fill` -inf never wins."""
  x = jnp.moveaxis(x, 0, 2).reshape(size.heads, x.shape[0], *x.shape[3:])
  widths = [(0, 0)] * x.ndim
  widths[1], widths[-1] = (0, size.chunks * size.chunk - x.shape[1]), (0, width - x.shape[-1])
  return jnp.pad(x, widths, constant_values=fill)


def _specs(size, R: int = 1):
  """Blocks of states, queries, keys, values, losses and outputs at grid point (head, chunk, group of columns)."""
  chunk, rows, columns = size.chunk, size.rows, size.columns
  return {
    "state": pl.BlockSpec((None, None, rows, columns), lambda h, n, e: (n, h, 0, e)),
    "q": pl.BlockSpec((None, chunk, R, rows), lambda h, n, e: (h, n, 0, 0)),
    "k": pl.BlockSpec((None, chunk, rows), lambda h, n, e: (h, n, 0)),
    "v": pl.BlockSpec((None, chunk, columns), lambda h, n, e: (h, n, e)),
    "loss": pl.BlockSpec((None, chunk, 1), lambda h, n, e: (h, n, 0)),
    "y": pl.BlockSpec((None, chunk, R, columns), lambda h, n, e: (h, n, 0, e)),
  }


def _call(kernel, size, where, inputs, in_specs, shape, spec, dtypes):
  return pl.pallas_call(
    functools.partial(kernel, size=size),
    grid=(size.heads, size.chunks, size.width // size.columns),
    in_specs=in_specs,
    out_specs=[spec] * len(dtypes),
    out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
    interpret=where.interpret,
    compiler_params=where.params,
  )(*inputs)


def _local_states(k, v, loss, size, where, track):
  """(U,) or (U, I) of every chunk alone, [chunks, heads, rows, width]."""
  specs = _specs(size)
  shape = size.chunks, size.heads, size.rows, size.width
  dtypes = (k.dtype, jnp.int32)[: 1 + track]
  in_specs = [specs[name] for name in ("k", "v", "loss")]
  return tuple(_call(_insert_kernel, size, where, (k, v, loss), in_specs, shape, specs["state"], dtypes))


def _outputs(start, q, k, v, loss, size, where):
  """[y] or [y, winners] of chunks that begin in the states `start`, [heads, time, R, width]."""
  R = q.shape[2]
  specs = _specs(size, R)
  shape = size.heads, size.chunks * size.chunk, R, size.width
  in_specs = [specs["state"]] * len(start) + [specs[name] for name in ("q", "k", "v", "loss")]
  dtypes = [a.dtype for a in start]
  return _call(_read_kernel, size, where, (*start, q, k, v, loss), in_specs, shape, specs["y"], dtypes)


def _insert_kernel(k_ref, v_ref, loss_ref, *state_refs, size):
  """One chunk into an empty state."""
  state = [jnp.full(ref.shape, -jnp.inf if i == 0 else 0, ref.dtype) for i, ref in enumerate(state_refs)]
  owner = _owners(size)
  insert = lambda t, state: _insert(t, state, owner, k_ref, v_ref, loss_ref, size)
  for ref, value in zip(state_refs, jax.lax.fori_loop(0, size.chunk, insert, tuple(state)), strict=True):
    ref[...] = value


def _read_kernel(*refs, size):
  """One chunk into the state before it, and max_r (q_r + U[r, :]) after each token, for every query head."""
  n = (len(refs) - 4) // 2
  start_refs, (q_ref, k_ref, v_ref, loss_ref), out_refs = refs[:n], refs[n : n + 4], refs[n + 4 :]
  owner = _owners(size)

  def token(t, state):
    state = _insert(t, state, owner, k_ref, v_ref, loss_ref, size)
    for head in range(q_ref.shape[1]):
      z = q_ref[t, head, :][:, None] + state[0]
      out_refs[0][t, head, :] = jnp.max(z, 0)
      if n > 1:
        best = jax.lax.argmax(z, 0, jnp.int32)
        out_refs[1][t, head, :] = jnp.max(jnp.where(_rows(size) == best[None, :], state[1], -1), 0)
    return state

  jax.lax.fori_loop(0, size.chunk, token, tuple(ref[...] for ref in start_refs))


def _insert(t, state, owner, k_ref, v_ref, loss_ref, size):
  """Token t of the chunk into (U,) or (U, I); I holds s·D + r of the token s that owns entry (r, d)."""
  U = state[0] - loss_ref[t, :][:, None]
  x = k_ref[t, :][:, None] + v_ref[t, :][None, :]
  new = x > U
  U = jnp.where(new, x, U)
  return (U,) if len(state) == 1 else (U, jnp.where(new, owner + t * size.D, state[1]))


def _rows(size):
  return jax.lax.broadcasted_iota(jnp.int32, (size.rows, size.columns), 0)


def _owners(size):
  """s·D + r of the first token s of this chunk."""
  return _rows(size) + pl.program_id(1) * (size.chunk * size.D)
