"""Quaternions as arrays: component order (w, x, y, z) = w + x·i + y·j + z·k along one axis, leading axes broadcast.

i² = j² = k² = -1, ij = k, jk = i, ki = j, and the reversed products have the other sign (Hamilton, 1844). The product
is associative, not commutative, and |ab| = |a||b|. Unit quaternions are rotors: x ↦ u x ū fixes the real part and turns
the imaginary part by SO(3), blind to the sign of u; x ↦ u x is an isometry of R⁴ that is not blind to it.
"""

import jax
import jax.numpy as jnp
import numpy as np

DEGENERATE = 1e-12

# e_a e_b = SIGN[a, b] e_{a xor b}: the one table from which both matrix forms are derived.
SIGN = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, -1, -1, 1], [1, 1, -1, -1]], np.int8)
_INDEX = np.arange(4)
STRUCTURE = np.zeros((4, 4, 4), np.int8)
STRUCTURE[_INDEX[:, None] ^ _INDEX, _INDEX[:, None], _INDEX] = SIGN


def components(a: jax.Array, axis: int = -1) -> tuple[jax.Array, ...]:
  """The four components, without the axis."""
  return tuple(jax.lax.index_in_dim(a, n, axis, keepdims=False) for n in range(4))


def product(a: tuple, b: tuple) -> tuple:
  """ab of two quaternions given as component tuples, 16 multiplications; the form for inner loops."""
  (aw, ax, ay, az), (bw, bx, by, bz) = a, b
  return (
    aw * bw - ax * bx - ay * by - az * bz,
    aw * bx + ax * bw + ay * bz - az * by,
    aw * by - ax * bz + ay * bw + az * bx,
    aw * bz + ax * by - ay * bx + az * bw,
  )


def hamilton(a: jax.Array, b: jax.Array, axis: int = -1) -> jax.Array:
  """The product ab of quaternions along `axis` (counted from the end for arrays of different rank).

  >>> i, j = np.eye(4, dtype=int)[1:3]
  >>> ij, ji = jax.jit(hamilton)(np.stack([i, j]), np.stack([j, i])).tolist()
  >>> ij, ji
  ([0, 0, 0, 1], [0, 0, 0, -1])
  """
  return jnp.stack(product(components(a, axis), components(b, axis)), axis)


def conjugate(a: jax.Array, axis: int = -1) -> jax.Array:
  """ā = (w, -x, -y, -z); reverses products, and aā = |a|²."""
  shape = [1] * a.ndim
  shape[axis] = 4
  return a * jnp.array([1, -1, -1, -1], a.dtype).reshape(shape)


def unit(a: jax.Array, axis: int = -1) -> jax.Array:
  """a / |a|, and the identity 1 where |a|² <= 1e-12, with gradient zero there.

  >>> jax.jit(unit)(np.zeros(4)).tolist()
  [1.0, 0.0, 0.0, 0.0]
  """
  n2 = jnp.sum(a * a, axis, keepdims=True)
  regular = n2 > DEGENERATE
  # Both branches must be finite, since a gradient flows through the one that is not chosen as 0 · its derivative.
  inverse = jax.lax.rsqrt(jnp.where(regular, n2, 1))
  shape = [1] * a.ndim
  shape[axis] = 4
  one = jnp.array([1, 0, 0, 0], a.dtype).reshape(shape)
  return jnp.where(regular, a * inverse, one)


def quat_exp(omega: jax.Array, axis: int = -1) -> jax.Array:
  """exp(ω) = (cos θ, ω·sin θ / θ) with θ = |ω|: three components to four. u = exp(ω) turns by the angle 2θ.

  Below θ = 1e-3 the series is used, exact to rounding in float32 and float64, so that the gradient at 0 is finite.

  >>> jax.jit(quat_exp)(np.array([np.pi / 2, 0, 0])).round(3).astype(int).tolist()  # i, which turns by π
  [0, 1, 0, 0]
  """
  theta2 = jnp.sum(omega * omega, axis, keepdims=True)
  small = theta2 < 1e-6
  theta = jnp.sqrt(jnp.where(small, 1, theta2))
  cos = jnp.where(small, 1 - theta2 / 2 + theta2 * theta2 / 24, jnp.cos(theta))
  sinc = jnp.where(small, 1 - theta2 / 6 + theta2 * theta2 / 120, jnp.sin(theta) / theta)
  return jnp.concatenate([cos, omega * sinc], axis)


def quat_log(u: jax.Array, axis: int = -1) -> jax.Array:
  """log u = atan2(|v|, w)·v / |v| for u = (w, v): four components to three, |log u| <= π.

  For |u| ≠ 1 this is the imaginary part of the logarithm. Within 1e-6 of the negative reals, where every axis is as
  good, it is (π, 0, 0): the derivative grows as 1/|v| there, and is cut to zero.
  """
  w = jax.lax.slice_in_dim(u, 0, 1, axis=axis)
  v = jax.lax.slice_in_dim(u, 1, 4, axis=axis)
  v2 = jnp.sum(v * v, axis, keepdims=True)
  near_one = (w > 0) & (v2 < 1e-6 * w * w)
  opposite = (w <= 0) & (v2 <= 1e-12 * w * w)
  safe_w = jnp.where(near_one, w, 1)
  t2 = jnp.where(near_one, v2, 0) / (safe_w * safe_w)
  series = (1 - t2 / 3 + t2 * t2 / 5) / safe_w
  length = jnp.sqrt(jnp.where(near_one | opposite, 1, v2))
  factor = jnp.where(near_one, series, jnp.arctan2(length, w) / length)
  shape = [1] * u.ndim
  shape[axis] = 3
  turned = jnp.array([np.pi, 0, 0], u.dtype).reshape(shape)
  return jnp.where(opposite, turned, v * factor)


def power(u: jax.Array, exponent, axis: int = -1) -> jax.Array:
  """u^λ = exp(λ log u), the point at fraction λ of the geodesic from 1 to the unit quaternion u.

  >>> root = jax.jit(power)(np.array([0.0, 1, 0, 0]), 0.5)  # of i
  >>> [round(x, 3) for x in root.tolist()]
  [0.707, 0.707, 0.0, 0.0]
  """
  return quat_exp(exponent * quat_log(u, axis), axis)


def left_matrix(a: jax.Array) -> jax.Array:
  """L(a) [..., 4, 4] with L(a) x = ax.

  >>> left_matrix(jnp.array([0, 1, 0, 0])).tolist()
  [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]]
  """
  return jnp.einsum("cab,...a->...cb", jnp.asarray(STRUCTURE, a.dtype), a, precision="highest")


def right_matrix(b: jax.Array) -> jax.Array:
  """R(b) [..., 4, 4] with R(b) x = xb; commutes with every L(a). L(a)R(b), a and b unit, is all of SO(4)."""
  return jnp.einsum("cab,...b->...ca", jnp.asarray(STRUCTURE, b.dtype), b, precision="highest")


def rotor_gate(x: jax.Array, omega: jax.Array, omega_right: jax.Array, tau, axis: int = -1) -> jax.Array:
  """e^τ · exp(ω) x exp(ω'): a rotation of R⁴ with a dilation, 7 numbers. n-fold it is the gate of nω, nω' and nτ."""
  turned = hamilton(hamilton(quat_exp(omega, axis), x, axis), quat_exp(omega_right, axis), axis)
  return jnp.exp(tau) * turned
