"""Linear symplectic maps, and splitting integrators of separable Hamiltonians H(q, p) = T(p) + V(q).

Ω = [[0, I], [-I, 0]] on states (q, p). A matrix M is symplectic when MᵀΩM = Ω; then det M = 1, and its singular values
come in pairs σ, 1/σ, which bounds neither.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Gradient = Callable[[jax.Array], jax.Array]


def symplectic_form(n: int, dtype=None) -> jax.Array:
  """Ω for n coordinates and n momenta: [2n, 2n]."""
  zero, one = jnp.zeros((n, n), dtype), jnp.eye(n, dtype=dtype)
  return jnp.block([[zero, one], [-one, zero]])


def defect(M: jax.Array) -> jax.Array:
  """max |MᵀΩM - Ω| of matrices [..., 2n, 2n]; zero exactly for symplectic ones.

  >>> defect(jnp.array([[2.0, 0.0], [0.0, 0.5]])).item(), defect(2 * jnp.eye(2)).item()
  (0.0, 3.0)
  """
  form = symplectic_form(M.shape[-1] // 2, M.dtype)
  return jnp.max(jnp.abs(M.mT @ form @ M - form), axis=(-2, -1))


def hamiltonian_matrix(S: jax.Array) -> jax.Array:
  """Ω(S + Sᵀ)/2, the general element of the Lie algebra sp(2n): the linear flow of H = xᵀSx/2."""
  return symplectic_form(S.shape[-1] // 2, S.dtype) @ (S + S.mT) / 2


def exp_sp(S: jax.Array) -> jax.Array:
  """exp(Ω(S + Sᵀ)/2), symplectic: the exact flow for time one. Cubic in n."""
  return jax.scipy.linalg.expm(hamiltonian_matrix(S))


def cayley_sp(S: jax.Array) -> jax.Array:
  """(I - A/2)⁻¹(I + A/2) with A = Ω(S + Sᵀ)/2: symplectic, and equal to `exp_sp` to second order.

  The implicit midpoint rule. It exists unless 2 is an eigenvalue of A.
  """
  A = hamiltonian_matrix(S)
  one = jnp.eye(A.shape[-1], dtype=A.dtype)
  return jnp.linalg.solve(one - A / 2, one + A / 2)


def euler(q: jax.Array, p: jax.Array, grad_V: Gradient, grad_T: Gradient, h) -> tuple[jax.Array, jax.Array]:
  """One step p <- p - h∇V(q), q <- q + h∇T(p). Symplectic, first order: it conserves some H̃ = H + O(h) almost exactly.

  The two signs differ. With equal ones H̃ is close to T - V, which bounds nothing (Hairer, Lubich, Wanner, Geometric
  Numerical Integration, 2006, ch. VI and IX).
  """
  p = p - h * grad_V(q)
  return q + h * grad_T(p), p


def leapfrog(q: jax.Array, p: jax.Array, grad_V: Gradient, grad_T: Gradient, h) -> tuple[jax.Array, jax.Array]:
  """Half a kick, a drift, half a kick (Störmer-Verlet): symplectic, second order, and its own inverse with -h.

  >>> spring = lambda x: x
  >>> q, p = leapfrog(1.0, 0.0, spring, spring, 0.1)
  >>> q, p = leapfrog(q, p, spring, spring, -0.1)
  >>> round(q, 12), abs(round(p, 12))
  (1.0, 0.0)
  """
  p = p - h / 2 * grad_V(q)
  q = q + h * grad_T(p)
  return q, p - h / 2 * grad_V(q)
