"""Orthogonal maps of channels with an exact inverse: Givens rotations by lifting, and Cayley transforms of low rank.

A rotation is a product of three shears,

    [cos θ  -sin θ]   [1  -t] [1  0] [1  -t]
    [sin θ   cos θ] = [0   1] [s  1] [0   1],     t = tan(θ/2),  s = sin θ = 2t/(1 + t²),

and a shear that adds a rounded multiple of one integer to another is undone exactly (Daubechies and Sweldens, 1998).
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.fixed_point import add, subtract, to_fixed


def bounded_angle(raw: jax.Array) -> jax.Array:
  """(π/2)·tanh(2 raw/π): slope one at 0, and |θ| < π/2, so that every lifting coefficient is at most one."""
  half_turn = np.pi / 2
  return half_turn * jnp.tanh(raw / half_turn)


def pairing(width: int, layer: int) -> np.ndarray:
  """A fixed permutation of `width` channels for a layer; `givens` turns entry i with entry i + width/2.

  Raises:
    ValueError: odd width.
  """
  if width % 2:
    raise ValueError(f"width={width} is odd; Givens rotations turn pairs of channels")
  return np.random.default_rng((width, layer)).permutation(width).astype(np.int32)


def lifting(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(t, s) of the three shears. Forward and inverse must use the very same numbers: compute them once, pass both."""
  t = jnp.tan(angle / 2)
  return t, 2 * t / (1 + t * t)


def turn(a: jax.Array, b: jax.Array, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(a cos θ - b sin θ, a sin θ + b cos θ) in floating point; its inverse is `turn(a, b, -angle)`."""
  cos, sin = jnp.cos(angle).astype(a.dtype), jnp.sin(angle).astype(a.dtype)
  return a * cos - b * sin, a * sin + b * cos


def turn_fixed(a: jax.Array, b: jax.Array, coefficients: tuple[jax.Array, jax.Array]):
  """`turn` of int32 arrays by three rounded shears; `coefficients` from `lifting`, for |θ| <= π/2.

  Off by less than two units from the real rotation while |a|, |b| < 2^22, and a bijection everywhere.
  """
  t, s = coefficients
  a = subtract(a, _product(t, b))
  b = add(b, _product(s, a))
  return subtract(a, _product(t, b)), b


def turn_fixed_inverse(a: jax.Array, b: jax.Array, coefficients: tuple[jax.Array, jax.Array]):
  """The exact inverse of `turn_fixed`: the shears undone in the opposite order.

  >>> coefficients = lifting(jnp.float32(0.7))
  >>> turned = turn_fixed(jnp.int32(1000), jnp.int32(-3), coefficients)
  >>> [z.item() for z in turn_fixed_inverse(*turned, coefficients)]
  [1000, -3]
  """
  t, s = coefficients
  a = add(a, _product(t, b))
  b = subtract(b, _product(s, a))
  return add(a, _product(t, b)), b


def _product(coefficient, z):
  """round(c·Z). One product and one rounding: no compiler can fuse it into another value."""
  return to_fixed(coefficient * z.astype(coefficient.dtype), 0)


def _on_pairs(function, x, permutation):
  a, b = jnp.split(jnp.take(x, permutation, axis=-1), 2, axis=-1)
  turned = jnp.concatenate(function(a, b), axis=-1)
  return jnp.take(turned, jnp.argsort(permutation), axis=-1)


def givens(x: jax.Array, angle: jax.Array, permutation: jax.Array) -> jax.Array:
  """Turns width/2 disjoint pairs of the last axis: x [..., w], angle [w/2], permutation [w] from `pairing`.

  Floating point; differentiable in x and angle. The inverse is `givens(y, -angle, permutation)`. The derivative of the
  integer form is taken to be that of this one.
  """
  return _on_pairs(lambda a, b: turn(a, b, angle), x, permutation)


def givens_fixed(z: jax.Array, coefficients, permutation: jax.Array) -> jax.Array:
  """`givens` of int32 [..., w]; `coefficients` = `lifting(angle)` with |angle| <= π/2."""
  return _on_pairs(lambda a, b: turn_fixed(a, b, coefficients), z, permutation)


def givens_fixed_inverse(z: jax.Array, coefficients, permutation: jax.Array) -> jax.Array:
  """The exact inverse of `givens_fixed`."""
  return _on_pairs(lambda a, b: turn_fixed_inverse(a, b, coefficients), z, permutation)


def cayley(x: jax.Array, U: jax.Array, V: jax.Array) -> jax.Array:
  """Q x on the last axis, Q = (I - A)⁻¹(I + A) with A = UVᵀ - VUᵀ: orthogonal, of determinant one.

  With L = [U V] and R = [V -U], A = LRᵀ and Q = I + 2L(I - RᵀL)⁻¹Rᵀ (Woodbury): a solve of size 2r instead of w.

  Args:
    x: [..., w].
    U, V: [w, r]. Either may be zero: then Q = I.

  >>> x, U, V = jnp.array([3.0, 4.0]), jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [0.5]])
  >>> round(float(jnp.linalg.norm(cayley(x, U, V))), 4)
  5.0
  """
  L, R = jnp.concatenate([U, V], 1), jnp.concatenate([V, -U], 1)
  core = jnp.eye(L.shape[1], dtype=L.dtype) - R.T @ L
  return x + (2 * jnp.linalg.solve(core, (x @ R)[..., None])[..., 0] @ L.T).astype(x.dtype)


def cayley_inverse(y: jax.Array, U: jax.Array, V: jax.Array) -> jax.Array:
  """Qᵀ y: swapping U and V changes the sign of A."""
  return cayley(y, V, U)
