"""The max-plus matrix product and its gradient, which follows the winners."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.loops import tied

BLOCK = 32  # Terms per fused pass: the pass reads and writes the running maximum once.


@jax.custom_vjp
def tmm(a: jax.Array, b: jax.Array) -> jax.Array:
  """(a ⊗ b)_ij = max_k (a_ik + b_kj), the matrix product of the semiring (max, +).

  Args:
    a, b: [..., m, k] and [..., k, n] with equal leading axes; entries may be -inf, the zero of the semiring.

  Returns:
    [..., m, n]. m·k·n pairs (one addition, one maximum); no buffer of that size. The gradient goes to the winning k,
    the lowest at ties: a valid subgradient.

  >>> tmm(jnp.array([[0.0, 5.0]]), jnp.array([[7.0, 1.0], [1.0, 4.0]])).tolist()
  [[7.0, 9.0]]
  """
  return tmm_argmax(a, b)[0]


def tmm_argmax(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`tmm` and the winning k, int32; the lowest at ties."""
  k = a.shape[-1]
  whole = k // BLOCK * BLOCK
  running = _terms(a[..., :, :1], b[..., :1, :], 0, None)
  if whole:

    def block(running, xs):
      return _terms(*xs, running), None

    xs = _blocks(a, whole, -1), _blocks(b, whole, -2), tied(np.arange(0, whole, BLOCK, dtype=np.int32), a)
    running = jax.lax.scan(block, running, xs)[0]
  return _terms(a[..., whole:], b[..., whole:, :], whole, running)


def largest(x: jax.Array, axis: int) -> jax.Array:
  """The maximum over one axis, which is kept; its gradient goes to the first of the largest entries, by index.

  The gradient of `jnp.max` compares values again. Where a compiler has contracted the sums inside x differently in the
  backward pass it finds no winner, and the gradient is wrong or NaN.
  """
  return jnp.take_along_axis(x, jnp.argmax(x, axis, keepdims=True), axis)


def _blocks(x, whole, axis):
  x = jax.lax.slice_in_dim(x, 0, whole, axis=axis)
  axis %= x.ndim
  return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]), axis, 0)


def _terms(a, b, first, running):
  for j in range(a.shape[-1]):
    z = a[..., :, j, None] + b[..., None, j, :]
    if running is None:
      running = z, jnp.zeros(z.shape, jnp.int32)
    else:
      better = z > running[0]
      running = jnp.where(better, z, running[0]), jnp.where(better, first + j, running[1])
  return running


def _fwd_rule(a, b):
  value, index = tmm_argmax(a, b)
  return value, (index, jnp.zeros((0, a.shape[-1])))


def _bwd_rule(saved, g):
  index, like = saved
  *batch, m, n = index.shape
  k, N = like.shape[-1], math.prod(batch)
  flat = index.reshape(N, m, n)
  case = jnp.arange(N)[:, None, None]
  row, column = jnp.arange(m)[:, None], jnp.arange(n)
  da = scatter_add(N * m * k, (case * m + row) * k + flat, g)
  db = scatter_add(N * k * n, (case * k + flat) * n + column, g)
  return da.reshape(*batch, m, k), db.reshape(*batch, k, n)


tmm.defvjp(_fwd_rule, _bwd_rule)


def scatter_add(size: int, index: jax.Array, values: jax.Array, deterministic: bool = False) -> jax.Array:
  """out[i] = Σ values where index == i, [size]; indices must be in range.

  Args:
    deterministic: sum in the order of the positions on every backend, where an accelerator's atomic additions may
      reorder: sorts the indices and takes segmented prefix sums, some ten times dearer.
  """
  index, values = index.reshape(-1), values.reshape(-1)
  if not deterministic:
    return jnp.zeros(size, values.dtype).at[index].add(values, mode="promise_in_bounds")
  index, values = jax.lax.sort((index, values), num_keys=1, is_stable=True)
  starts = jnp.concatenate([jnp.ones(1, bool), index[1:] != index[:-1]])

  def join(left, right):
    return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

  sums = jax.lax.associative_scan(join, (starts, values))[1]
  ends = jnp.concatenate([starts[1:], jnp.ones(1, bool)])
  target = jnp.where(ends, index, size + jnp.arange(index.shape[0]))
  return jnp.zeros(size, values.dtype).at[target].set(sums, mode="drop", unique_indices=True)
