"""Ordered prefix products T_t = U_t U_(t-1) ··· U_0 of rotations, with a gradient that never runs through the scan.

Newest on the left. The same law serves orthogonal matrices and unit quaternions; a rotation of R⁴ is two unit
quaternions, and both multiply in this order (`mgr_jax.algebra.lie.so4_quaternions`).

The gradient is closed. Move one edge by U_s → e^ξ U_s: every T_t with t >= s becomes T_t T_sᵀ e^ξ T_s, so with
cotangents Ḡ_t the cotangent of ξ is skew(T_s S_s T_sᵀ) with S_s = Σ_(t>=s) T_tᵀ Ḡ_t: one reverse cumulative sum and no
second product. As a cotangent of the matrix U_s this is T_s skew(S_s) T_(s-1)ᵀ, which needs T alone. Only motions in
the group are seen: the part of a gradient that would leave it is dropped.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.hypercomplex import components, conjugate, hamilton, product, unit
from mgr_jax.algebra.lie import matmul, reorthogonalise

_map = jax.tree.map
_ONE = (1.0, 0.0, 0.0, 0.0)


def check_scan(scan: str) -> int:
  """The chunk of a scan name: `assoc` -> 0, `serial` -> 1, `chunk:c` -> c.

  Raises:
    ValueError: any other name, or c < 2.

  >>> check_scan("chunk:64")
  64
  """
  name, _, size = scan.partition(":")
  if scan in ("assoc", "serial"):
    return int(scan == "serial")
  if name == "chunk" and size.isdecimal() and int(size) >= 2:
    return int(size)
  raise ValueError(f"scan={scan} is not one of assoc, serial, chunk:c with c of 2 or more")


def prefix_product(
  U: jax.Array, initial: jax.Array | None = None, scan: str = "assoc", *, axis: int = 0, reorthogonal: bool = True
) -> jax.Array:
  """T_t = U_t ··· U_0 · initial for orthogonal matrices, of the shape of U.

  Args:
    U: edges; the last two axes are b×b, `axis` (counted from the start) is time.
    initial: the product so far, shaped like U without `axis`; the identity when absent.
    scan: `assoc` (about 2T products, depth 2 log₂ T), `serial` (T products, depth T), or `chunk:c` (serial inside
      chunks of c, all chunks at once, then over the chunk totals: about 2T products, depth c + T/c).
    reorthogonal: one Newton-Schulz step on every T_t, taken as the identity in the gradient.

  The gradient with respect to U is the one along the group (see above); it needs no memory beyond T.

  >>> quarter = np.array([[0.0, -1.0], [1.0, 0.0]], np.float32)
  >>> T = jax.jit(prefix_product)(np.stack([quarter] * 4))
  >>> T[-1].tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  check_scan(scan)
  return _matrices(U, initial, scan, axis, reorthogonal)


def prefix_quaternions(
  u: jax.Array,
  initial: jax.Array | None = None,
  scan: str = "assoc",
  *,
  axis: int = 0,
  component: int = -1,
  normalise: bool = True,
) -> jax.Array:
  """T_t = u_t ··· u_0 · initial for unit quaternions, of the shape of u.

  Args:
    u: edges; the four components lie along `component` (counted from the end), time along `axis` (from the start).
    initial: the product so far, shaped like u without `axis`; 1 when absent.
    scan: as in `prefix_product`.
    normalise: divide every T_t by its length, taken as the identity in the gradient.

  The gradient with respect to u is the one along the sphere of unit quaternions.

  >>> i, j = np.eye(4, dtype=np.float32)[1:3]
  >>> jax.jit(prefix_quaternions)(np.stack([i, j]))[1].tolist()  # j · i = -k
  [0.0, 0.0, 0.0, -1.0]
  """
  check_scan(scan)
  return _quaternions(u, initial, scan, axis, component, normalise)


def scan_products(multiply, one, u, initial, scan: str, axis: int):
  """Prefix products of a tree of arrays under multiply(newer, older); `one` broadcasts to its identity."""
  chunk = check_scan(scan)
  if chunk == 0:
    T = jax.lax.associative_scan(lambda older, newer: multiply(newer, older), u, axis=axis)
    return T if initial is None else multiply(T, _map(lambda x: jnp.expand_dims(x, axis), initial))
  length = jax.tree.leaves(u)[0].shape[axis]
  if chunk == 1 or length <= chunk:
    return _serial(multiply, one, u, initial, axis)
  return _chunked(multiply, one, u, initial, axis, length, chunk)


def _serial(multiply, one, u, initial, axis: int):
  u = _map(lambda x: jnp.moveaxis(x, axis, 0), u)
  if initial is None:
    initial = _map(lambda e, x: jnp.broadcast_to(e, x.shape[1:]).astype(x.dtype), one, u)
  _, T = jax.lax.scan(lambda T, x: (multiply(x, T),) * 2, initial, u)
  return _map(lambda x: jnp.moveaxis(x, 0, axis), T)


def _chunked(multiply, one, u, initial, axis: int, length: int, chunk: int):
  """Serial within chunks, then along the totals of whole chunks, then one product back; the tail chunk may be short."""
  n = -(-length // chunk)

  def split(x):
    # Products with the padding come after everything that is kept.
    pad = [(0, n * chunk - length if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad).reshape(*x.shape[:axis], n, chunk, *x.shape[axis + 1 :])

  inner = _serial(multiply, one, _map(split, u), None, axis + 1)
  totals = _map(lambda x: x[(slice(None),) * (axis + 1) + (-1,)], inner)
  before = _shifted(_serial(multiply, one, totals, initial, axis), initial, one, axis)
  T = multiply(inner, _map(lambda x: jnp.expand_dims(x, axis + 1), before))
  merge = lambda x: x.reshape(*x.shape[:axis], n * chunk, *x.shape[axis + 2 :])
  return _map(lambda x: jax.lax.slice_in_dim(merge(x), 0, length, axis=axis), T)


def _shifted(T, initial, one, axis: int):
  """T_(s-1) for every s: `initial`, or the identity, comes first."""
  older = _map(lambda x: jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis), T)
  if initial is None:
    like = _map(lambda x: jax.lax.index_in_dim(x, 0, axis, keepdims=False), T)
    initial = _map(lambda e, x: jnp.broadcast_to(e, x.shape).astype(x.dtype), one, like)
  return _map(lambda first, x: jnp.concatenate([jnp.expand_dims(first, axis), x], axis), initial, older)


def _sum_from(x, scan: str, axis: int):
  """Σ_(t>=s) x_t for every s."""
  if scan == "assoc":
    return jax.lax.cumsum(x, axis, reverse=True)
  return jnp.flip(scan_products(jnp.add, 0.0, jnp.flip(x, axis), None, scan, axis), axis)


def _transposed(T):
  return jnp.swapaxes(T, -1, -2)


def _matrix_products(U, initial, scan, axis, reorthogonal):
  T = scan_products(matmul, np.eye(U.shape[-1]), U, initial, scan, axis)
  return reorthogonalise(T) if reorthogonal else T


_matrices = jax.custom_vjp(_matrix_products, nondiff_argnums=(2, 3, 4))


def _matrices_forward(U, initial, scan, axis, reorthogonal):
  T = _matrix_products(U, initial, scan, axis, reorthogonal)
  return T, (T, initial)


def _matrices_backward(scan, axis, reorthogonal, saved, T_bar):
  T, initial = saved
  M = matmul(_transposed(T), T_bar)
  S = _sum_from(0.5 * (M - _transposed(M)), scan, axis)
  before = _shifted(T, initial, np.eye(T.shape[-1]), axis)
  U_bar = matmul(matmul(T, S), _transposed(before))
  if initial is None:
    return U_bar, None
  return U_bar, matmul(initial, jax.lax.index_in_dim(S, 0, axis, keepdims=False))


_matrices.defvjp(_matrices_forward, _matrices_backward)


def _quaternion_products(u, initial, scan, axis, component, normalise):
  # A tree of products compiles three times sooner on whole arrays; step by step, separate components are faster.
  if scan == "assoc":
    T = scan_products(lambda newer, older: hamilton(newer, older, component), None, u, initial, scan, axis)
  else:
    start = None if initial is None else components(initial, component)
    T = jnp.stack(scan_products(product, _ONE, components(u, component), start, scan, axis), component)
  return unit(T, component) if normalise else T


_quaternions = jax.custom_vjp(_quaternion_products, nondiff_argnums=(2, 3, 4, 5))


def _quaternions_forward(u, initial, scan, axis, component, normalise):
  T = _quaternion_products(u, initial, scan, axis, component, normalise)
  return T, (T, initial)


def _quaternions_backward(scan, axis, component, normalise, saved, T_bar):
  T, initial = saved
  M = components(hamilton(conjugate(T, component), T_bar, component), component)[1:]
  sums = [_sum_from(m, scan, axis) for m in M]
  S = jnp.stack([jnp.zeros_like(sums[0]), *sums], component)
  start = None if initial is None else components(initial, component)
  before = jnp.stack(_shifted(components(T, component), start, _ONE, axis), component)
  u_bar = hamilton(hamilton(T, S, component), conjugate(before, component), component)
  if initial is None:
    return u_bar, None
  return u_bar, hamilton(initial, jax.lax.index_in_dim(S, 0, axis, keepdims=False), component)


_quaternions.defvjp(_quaternions_forward, _quaternions_backward)
