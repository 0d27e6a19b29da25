"""Rotations from their Lie algebra: coordinates of so(b), the exponential in closed form, Cayley's map, the logarithm.

so(b) is the space of skew b×b matrices with p = b(b-1)/2 coordinates, the entries above the diagonal in row-major
order; exp maps it onto SO(b). Matrices hold the last two axes, coordinates the last one; leading axes broadcast. A skew
matrix has |A|₂ <= |a|₂, so no principal angle of exp(A) exceeds the length of the coordinates.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.hypercomplex import left_matrix, quat_exp, right_matrix

# Below this θ² a Taylor polynomial replaces the trigonometric form. Seven terms leave θ¹⁴/15! < 1e-16 there.
_SERIES = 0.25
_TAYLOR_DEGREE = 8
_TAYLOR_NORM = 0.5


def dimension(b: int) -> int:
  """dim so(b) = b(b-1)/2.

  >>> dimension(4)
  6
  """
  return b * (b - 1) // 2


def skew(a: jax.Array, b: int) -> jax.Array:
  """Coordinates [..., b(b-1)/2] -> skew matrix [..., b, b] with A[i, j] = a = -A[j, i] for i < j, row-major.

  Raises:
    ValueError: the last axis is not b(b-1)/2 long.

  >>> skew(jnp.array([1, 2, 3]), 3).tolist()
  [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]
  """
  if a.shape[-1] != dimension(b):
    raise ValueError(f"so({b}) has {dimension(b)} coordinates, got {a.shape[-1]}")
  rows, columns = np.triu_indices(b, 1)
  upper = jnp.zeros((*a.shape[:-1], b, b), a.dtype).at[..., rows, columns].set(a)
  return upper - jnp.swapaxes(upper, -1, -2)


def coordinates(A: jax.Array) -> jax.Array:
  """Inverse of `skew`, [..., b, b] -> [..., b(b-1)/2]; the orthogonal projection for a matrix that is not skew."""
  rows, columns = np.triu_indices(A.shape[-1], 1)
  return 0.5 * (A[..., rows, columns] - A[..., columns, rows])


def bracket(A: jax.Array, B: jax.Array) -> jax.Array:
  """[A, B] = AB - BA, zero when A and B commute.

  >>> bracket(np.array([[0, 1], [0, 0]]), np.array([[0, 0], [1, 0]])).tolist()
  [[1, 0], [0, -1]]
  """
  return matmul(A, B) - matmul(B, A)


def matmul(A: jax.Array, B: jax.Array) -> jax.Array:
  """AB at full float precision on every accelerator: an error of 1e-3 per factor would ruin a product of thousands."""
  return jnp.matmul(A, B, precision="highest")


def exp_so2(a: jax.Array) -> jax.Array:
  """exp [[0, a], [-a, 0]] = [[cos a, sin a], [-sin a, cos a]]: [..., 1] -> [..., 2, 2]."""
  cos, sin = jnp.cos(a[..., 0]), jnp.sin(a[..., 0])
  return jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)


def sinc(x: jax.Array) -> jax.Array:
  """sin θ / θ as a function of x = θ² >= 0; smooth, with finite derivatives of all orders at 0."""
  small = x < _SERIES
  series = jnp.zeros_like(x)
  for n in range(6, -1, -1):
    series = (-1) ** n / math.factorial(2 * n + 1) + x * series
  theta = jnp.sqrt(jnp.where(small, 1, x))
  return jnp.where(small, series, jnp.sin(theta) / theta)


def exp_so3(a: jax.Array) -> jax.Array:
  """Rodrigues: exp A = I + sin θ / θ · A + (1 - cos θ) / θ² · A² with θ = |a|: [..., 3] -> [..., 3, 3].

  (1 - cos θ) / θ² is taken as ½ (sin ½θ / ½θ)², which does not cancel. Smooth at a = 0.

  >>> turn = jax.jit(exp_so3)(np.array([-np.pi / 2, 0, 0]))
  >>> np.asarray(turn).round(3).astype(int).tolist()
  [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
  """
  A = skew(a, 3)
  x = jnp.sum(a * a, -1)[..., None, None]
  half = sinc(x / 4)
  return jnp.eye(3, dtype=a.dtype) + sinc(x) * A + 0.5 * half * half * matmul(A, A)


def so3_quaternion(a: jax.Array, axis: int = -1) -> jax.Array:
  """Unit quaternion u with exp(A) x = u x ū on imaginary x: three components along `axis` -> four.

  A x = ω × x with ω = (-A₁₂, A₀₂, -A₀₁), and u = e^(ω/2).
  """
  a01, a02, a12 = (jax.lax.index_in_dim(a, n, axis, keepdims=False) for n in range(3))
  return quat_exp(0.5 * jnp.stack([-a12, a02, -a01], axis), axis)


def so4_quaternions(a: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
  """Unit quaternions (p, c) with exp(A) x = p x c̄ for x ∈ R⁴: six components along `axis` -> two times four.

  so(4) = su(2) ⊕ su(2): A x = ux + xw with imaginary u, w = ½(A₁₀ ± A₃₂, A₂₀ ± A₁₃, A₃₀ ± A₂₁), so p = e^u, c = e^(-w).
  Both factors multiply in the same order: exp(A₂) exp(A₁) is (p₂p₁, c₂c₁). The principal angles are |u| ± |w|.
  """
  a01, a02, a03, a12, a13, a23 = (jax.lax.index_in_dim(a, n, axis, keepdims=False) for n in range(6))
  u = 0.5 * jnp.stack([-a01 - a23, a13 - a02, -a03 - a12], axis)
  minus_w = 0.5 * jnp.stack([a01 - a23, a02 + a13, a03 - a12], axis)
  return quat_exp(u, axis), quat_exp(minus_w, axis)


def so4_matrix(p: jax.Array, c: jax.Array) -> jax.Array:
  """The matrix of x ↦ p x c̄, [..., 4], [..., 4] -> [..., 4, 4]; SO(4) is the pairs (p, c) up to a common sign."""
  return matmul(left_matrix(p), jnp.swapaxes(right_matrix(c), -1, -2))


def exp_so4(a: jax.Array) -> jax.Array:
  """exp of so(4) by two quaternions: [..., 6] -> [..., 4, 4]."""
  return so4_matrix(*so4_quaternions(a))


def exp_so(a: jax.Array, b: int, bound: float = 4.0) -> jax.Array:
  """exp skew(a), [..., b(b-1)/2] -> [..., b, b]: closed form for b = 2, 3, 4, else by scaling and squaring.

  `bound` must not be below |a|₂. It alone fixes the number of squarings, s = ⌈log₂(bound / ½)⌉, so the cost never
  depends on data: degree 8 Taylor at |A| <= ½ leaves 0.5⁹/9! < 6e-9, at most 2^s times that after squaring.

  Raises:
    ValueError: the last axis is not b(b-1)/2 long, or bound <= 0.

  >>> U = np.asarray(jax.jit(exp_so, static_argnums=1)(np.linspace(-1, 1, 15), 6))
  >>> bool(np.allclose(U.T @ U, np.eye(6), atol=1e-5))
  True
  """
  if bound <= 0:
    raise ValueError(f"bound={bound} must be positive")
  A = skew(a, b)
  closed = {2: exp_so2, 3: exp_so3, 4: exp_so4}.get(b)
  return closed(a) if closed else _exp_taylor(A, bound)


def _exp_taylor(A: jax.Array, bound: float) -> jax.Array:
  squarings = max(0, math.ceil(math.log2(bound / _TAYLOR_NORM)))
  A = A * 0.5**squarings
  identity = jnp.eye(A.shape[-1], dtype=A.dtype)
  U = identity + A / _TAYLOR_DEGREE
  for n in range(_TAYLOR_DEGREE - 1, 0, -1):
    U = identity + matmul(A, U) / n
  for _ in range(squarings):
    U = matmul(U, U)
  return U


def cayley_so(A: jax.Array) -> jax.Array:
  """(I - ½A)⁻¹ (I + ½A) for skew A: orthogonal, exp(A) + O(A³), and never with an eigenvalue -1.

  The halves matter: without them the map is exp(2A) + O(A³).
  """
  identity = jnp.eye(A.shape[-1], dtype=A.dtype)
  return jnp.linalg.solve(identity - 0.5 * A, identity + 0.5 * A)


def so3_from_quaternion(u: jax.Array) -> jax.Array:
  """The matrix of x ↦ u x ū on imaginary x, [..., 4] -> [..., 3, 3]; u and -u give the same."""
  return so4_matrix(u, u)[..., 1:, 1:]


def reorthogonalise(T: jax.Array) -> jax.Array:
  """One Newton-Schulz step ½ T (3I - TᵀT) towards the nearest orthogonal matrix; the error e becomes ¾ e²."""
  identity = jnp.eye(T.shape[-1], dtype=T.dtype)
  return 0.5 * matmul(T, 3 * identity - matmul(jnp.swapaxes(T, -1, -2), T))


def drift(T: jax.Array) -> jax.Array:
  """max |TᵀT - I| over the last two axes: how far T is from orthogonal."""
  gram = matmul(jnp.swapaxes(T, -1, -2), T)
  return jnp.max(jnp.abs(gram - jnp.eye(T.shape[-1], dtype=T.dtype)), (-1, -2))
