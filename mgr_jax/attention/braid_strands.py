"""Linear recurrences with tridiagonal transitions: how braid letters and writes act on a few strands.

S_t = M_t S_{t-1} + write_t v_tᵀ,   y_t = S_tᵀ read_t,   M_t tridiagonal [n, n], S [n, D]

Because the transitions act on strands only,
y_tᵀ = Σ_{s≤t} (read_tᵀ M_t ··· M_{s+1} write_s) v_sᵀ + (read_tᵀ M_t ··· M_1) S_0:
the tokens of a chunk are scanned with strand vectors alone, for all chunks at once, and values enter only through
matrix products. A short scan over chunks carries S. With chunks of C tokens the cost per token and head is n·(n + C)
elementwise and 2·D·(C + 2n) FLOPs in products. (Chunked linear recurrences as in Yang et al., 2024, arXiv 2406.06484.)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.tiles import pad_to

MAX_CHUNK = 32


class Letters(NamedTuple):
  """What each token does to the strands. Bands of M [B, K, R, T, n], with lower[..., 0] = upper[..., n-1] = 0.

  M[i, i-1] = lower[i], M[i, i] = diag[i], M[i, i+1] = upper[i]; write and read [B, K, R, T, n]; restart
  [B or 1, 1, 1, T] is 1 where the state before the token is replaced by the initial one, else 0.
  """

  lower: jax.Array
  diag: jax.Array
  upper: jax.Array
  write: jax.Array
  read: jax.Array
  restart: jax.Array


def token_scan(letters: Letters, v_BKTD, initial_KRnD, state_BKRnD):
  """The recurrence as it is written, token after token. Returns (y [B, K, R, T, D], last state)."""

  def step(state, xs):
    token, v = xs
    state = jnp.where(token.restart[..., None, None] > 0, initial_KRnD, state)
    down, up = jnp.roll(state, 1, -2), jnp.roll(state, -1, -2)
    state = token.lower[..., None] * down + token.diag[..., None] * state + token.upper[..., None] * up
    state = state + token.write[..., None] * v[:, :, None, None, :]
    return state, jnp.einsum("bkrn,bkrnd->bkrd", token.read, state)

  xs = jax.tree.map(lambda x: jnp.moveaxis(x, 3, 0), letters), jnp.moveaxis(v_BKTD, 2, 0)
  state, out = jax.lax.scan(step, state_BKRnD, xs)
  return jnp.moveaxis(out, 0, 3), state


def chunk_length(T: int) -> int:
  """A power of two near √T, at most 32."""
  return min(MAX_CHUNK, 1 << round(math.log2(T) / 2))


def strand_scan(letters: Letters, v_BKTD, initial_KRnD, state_BKRnD):
  """`token_scan` in chunks of about √T tokens."""
  B, K, R, T, n = letters.write.shape
  C = chunk_length(T)
  N = -(-T // C)
  v = pad_to(v_BKTD, N * C, 2).reshape(B, K, N, C, -1)
  paths, last = chunk_paths(*_by_chunk(letters, C, N))
  # [C, n + C, ..., N] -> q [B, K, R, N, C, n] and A [B, K, R, N, C, C]; last -> Q [.., n, n] and U [.., n, C].
  split = lambda x: jnp.split(jnp.moveaxis(x.reshape(*x.shape[:2], B, K, R, N), (0, 1), (4, 5)), [n], -1)
  (from_start, from_values), (through, written) = split(paths), split(last)
  restarted = pad_to(letters.restart, N * C, 3).reshape(-1, 1, 1, N, C)
  restarted = jax.lax.cummax(restarted, axis=4)[..., None]
  kept = 1 - restarted[..., -1:, :]
  written = jnp.einsum("bkrnis,bknsd->bkrnid", written, v)
  written += jnp.einsum("bkrnij,krjd->bkrnid", (1 - kept) * through, initial_KRnD)
  starts, state = affine_scan(kept * through, written, state_BKRnD)
  out = jnp.einsum("bkrncs,bknsd->bkrncd", from_values, v)
  out += jnp.einsum("bkrnci,bkrnid->bkrncd", (1 - restarted) * from_start, starts)
  out += jnp.einsum("bkrnci,krid->bkrncd", restarted * from_start, initial_KRnD)
  return out.reshape(B, K, R, N * C, -1)[:, :, :, :T], state


def _by_chunk(letters, C, N):
  """Strand vectors [C, n, B·K·R·N] and restart [C, 1, B·K·R·N]; padding leaves the state as it is."""
  shape = letters.write.shape[:3]
  letters = letters._replace(restart=jnp.broadcast_to(letters.restart, letters.write.shape[:4])[..., None])

  def cut(x, value):
    x = pad_to(x, N * C, 3, value).reshape(*shape, N, C, -1)
    return jnp.moveaxis(x, (4, 5), (0, 1)).reshape(C, x.shape[-1], -1)

  return tuple(cut(x, float(name == "diag")) for name, x in letters._asdict().items())


@jax.custom_vjp
def chunk_paths(lower, diag, upper, write, read, restart):
  """Path sums inside chunks: p_t = read_tᵀ Z_t with Z_t = M_t Z_{t-1} + write_t e_{n+t}ᵀ and Z_0 = [I | 0].

  So p_t[:n] is the weight of the chunk's initial state, p_t[n+s] that of value s. A restart sets Z back to Z_0.

  Args: strand vectors [C, n, L] over L independent chunks; restart [C, 1, L].
  Returns: p [C, n+C, L] and the last Z [n, n+C, L].
  """
  return _paths_forward(lower, diag, upper, write, read, restart)[:2]


def _paths_forward(lower, diag, upper, write, read, restart):
  C, n, L = write.shape
  start = _initial_rows(n, C, write.dtype)

  def step(Z, xs):
    t, bands, write, read, restart = xs
    before = tuple(jnp.where(restart > 0, row, z) for row, z in zip(start, Z, strict=True))
    Z = _advance(before, bands, write, t)
    return Z, (sum(r * z for r, z in zip(read, Z, strict=True)), before)

  xs = (jnp.arange(C), (lower, diag, upper), write, read, restart)
  last, (paths, before) = jax.lax.scan(step, tuple(jnp.broadcast_to(row, (n + C, L)) for row in start), xs)
  return paths, jnp.stack(last), before


def _initial_rows(n, C, dtype):
  return tuple(jnp.eye(n, n + C, dtype=dtype)[:, :, None])


def _advance(Z, bands, write, t):
  """M Z + write e_{n+t}ᵀ. Rows are separate arrays: shifting one array along the strands is 7 times slower on CPU."""
  column = (jnp.arange(Z[0].shape[0]) == len(Z) + t).astype(write.dtype)[:, None]
  return tuple(row + w * column for row, w in zip(_bands(Z, *bands), write, strict=True))


def _bands(Z, lower, diag, upper):
  zero = jnp.zeros_like(Z[0])
  below, above = (zero, *Z[:-1]), (*Z[1:], zero)
  return tuple(a * x + b * y + c * z for a, b, c, x, y, z in zip(lower, diag, upper, below, Z, above, strict=True))


def _paths_fwd_rule(*args):
  return _paths_forward(*args)[:2], args


def _paths_bwd_rule(args, cotangents):
  """The adjoint runs the transposed transitions backwards: Λ_t = read_t dp_tᵀ + M_{t+1}ᵀ Λ_{t+1}."""
  lower, diag, upper, write, read, restart = args
  d_paths, d_last = cotangents
  C, n, _ = write.shape
  before = _paths_forward(*args)[2]
  transposed = jnp.roll(upper, 1, 1), diag, jnp.roll(lower, -1, 1)
  along = lambda adjoint, rows: jnp.stack([jnp.sum(a * z, 0) for a, z in zip(adjoint, rows, strict=True)])

  def step(back, xs):
    t, bands, transposed, write, read, restart, d_path, before = xs
    adjoint = tuple(b + r * d_path for b, r in zip(back, read, strict=True))
    zero = jnp.zeros_like(before[0])
    d_bands = tuple(along(adjoint, rows) for rows in ((zero, *before[:-1]), before, (*before[1:], zero)))
    d_write = jnp.stack([jax.lax.dynamic_index_in_dim(a, n + t, keepdims=False) for a in adjoint])
    d_read = along([d_path] * n, _advance(before, bands, write, t))
    back = tuple(jnp.where(restart > 0, 0.0, b) for b in _bands(adjoint, *transposed))
    return back, (*d_bands, d_write, d_read)

  xs = (jnp.arange(C), (lower, diag, upper), transposed, write, read, restart, d_paths, before)
  _, grads = jax.lax.scan(step, tuple(d_last), xs, reverse=True)
  return *grads, jnp.zeros_like(restart)


chunk_paths.defvjp(_paths_fwd_rule, _paths_bwd_rule)


@jax.custom_vjp
def affine_scan(A, U, state):
  """S_{c+1} = A_c S_c + U_c over axis 3: A [B, K, R, N, n, n], U [B, K, R, N, n, D]. Returns every S_c and the last."""
  return _affine_forward(A, U, state)


def _affine_forward(A, U, state):
  xs = jax.tree.map(lambda x: jnp.moveaxis(x, 3, 0), (A, U))
  last, starts = jax.lax.scan(lambda S, x: (jnp.matmul(x[0], S, precision="highest") + x[1], S), state, xs)
  return jnp.moveaxis(starts, 0, 3), last


def _affine_fwd_rule(A, U, state):
  starts, last = _affine_forward(A, U, state)
  return (starts, last), (A, starts)


def _affine_bwd_rule(saved, cotangents):
  A, starts = saved
  d_starts, d_last = cotangents

  def step(d_next, xs):
    A, d_start = xs
    return jnp.matmul(A.mT, d_next, precision="highest") + d_start, d_next

  xs = jax.tree.map(lambda x: jnp.moveaxis(x, 3, 0), (A, d_starts))
  d_state, d_U = jax.lax.scan(step, d_last, xs, reverse=True)
  d_U = jnp.moveaxis(d_U, 0, 3)
  return d_U @ starts.mT, d_U, d_state


affine_scan.defvjp(_affine_fwd_rule, _affine_bwd_rule)
