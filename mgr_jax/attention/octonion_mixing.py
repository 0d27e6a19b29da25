"""Octonion products on arrays of heads, with gradients that are octonion products again.

A head of size D holds N = D/8 octonions, component c of octonion n at index c·N + n, so that octonions fill the lanes.
Results are materialised on purpose (`optimization_barrier`): left alone, the compiler merges a chain of products into
kernels that compute each factor once per component of the result, several times slower in the gradient.
"""

import jax
import jax.numpy as jnp

from mgr_jax.algebra import octonions
from mgr_jax.attention.octonion_options import COMPONENTS, OPERATOR


def split(x: jax.Array, n: int = COMPONENTS) -> list[jax.Array]:
  """The n components [..., N] of [..., n·N]."""
  return list(jnp.unstack(x.reshape(*x.shape[:-1], n, -1), axis=-2))


def join(components) -> jax.Array:
  """Inverse of `split`."""
  x = jnp.stack(components, -2)
  return jax.lax.optimization_barrier(x.reshape(*x.shape[:-2], -1))


def unit(x: jax.Array) -> jax.Array:
  """Every octonion divided by its size, in float32; 1 where it is zero."""
  y = octonions.unit(wide(x).reshape(*x.shape[:-1], COMPONENTS, -1), axis=-2)
  return jax.lax.optimization_barrier(y.reshape(x.shape))


def _multiply(a, b, conjugated=(False, False)):
  sides = (octonions.conjugate(split(x)) if c else split(x) for x, c in zip((a, b), conjugated, strict=True))
  return join(octonions.multiply(*sides))


@jax.custom_vjp
def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
  """ab; a cotangent g becomes (g b̄, ā g), because ⟨g, ab⟩ = ⟨g b̄, a⟩ = ⟨ā g, b⟩."""
  return _multiply(a, b)


multiply.defvjp(
  lambda a, b: (_multiply(a, b), (a, b)),
  lambda saved, g: (_multiply(g, saved[1], (False, True)), _multiply(saved[0], g, (True, False))),
)


def _divide(a, b):
  return _multiply(a, b, (True, False))


@jax.custom_vjp
def divide(a: jax.Array, b: jax.Array) -> jax.Array:
  """āb, which is a⁻¹b for unit a; a cotangent g becomes (b ḡ, a g)."""
  return _divide(a, b)


divide.defvjp(
  lambda a, b: (_divide(a, b), (a, b)),
  lambda saved, g: (_multiply(saved[1], g, (False, True)), _multiply(saved[0], g)),
)


def _wedge(k, v):
  return join(octonions.wedge(split(k), split(v)))


def _operator(wedges, transposed=False):
  return join(octonions.operator(split(wedges, OPERATOR), transposed))


def _act(matrix, x, transposed=False):
  return join(octonions.act(split(matrix, OPERATOR), split(x), transposed))


@jax.custom_vjp
def operator(k: jax.Array, v: jax.Array) -> jax.Array:
  """The operator q -> (q k̄)v of every octonion, [..., D] and [..., D] -> [..., 29·N]."""
  return _operator(_wedge(k, v))


def _operator_back(saved, g):
  k, v = saved
  wedges = _operator(g, transposed=True)
  return _act(wedges, v), _act(wedges, k, transposed=True)


operator.defvjp(lambda k, v: (_operator(_wedge(k, v)), (k, v)), _operator_back)


@jax.custom_vjp
def act(matrix: jax.Array, x: jax.Array) -> jax.Array:
  """Applies operators, or weighted sums of them, [..., 29·N] and [..., D] -> [..., D]."""
  return _act(matrix, x)


act.defvjp(
  lambda matrix, x: (_act(matrix, x), (matrix, x)),
  lambda saved, g: (_wedge(g, saved[1]), _act(saved[0], g, transposed=True)),
)


def column(matrix: jax.Array) -> jax.Array:
  """k̄v of an operator [..., 29·N], [..., D]."""
  n = matrix.shape[-1] // OPERATOR
  return jnp.concatenate([matrix[..., :n], -matrix[..., n : COMPONENTS * n]], -1)


def wide(x: jax.Array) -> jax.Array:
  """x in float32 or wider: products of components cancel."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
