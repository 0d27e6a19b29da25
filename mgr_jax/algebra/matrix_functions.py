"""Exponentials of symmetric and of nilpotent matrices, and the derivative of the exponential of any matrix."""

import jax
import jax.numpy as jnp

from mgr_jax.algebra.lie import matmul


@jax.custom_jvp
def exp_spd(S: jax.Array) -> jax.Array:
  """exp of a symmetric matrix [..., n, n], symmetric positive definite: V diag(e^λ) Vᵀ with S = V diag(λ) Vᵀ.

  Only the symmetric part of S is used. Its derivative is that of Daleckii and Krein, V (Φ ∘ VᵀṠV) Vᵀ with the divided
  differences Φ_ij = e^((λi+λj)/2) sinh(δ)/δ, δ = (λi-λj)/2, which are finite where eigenvalues meet; that of `eigh` is
  not. Twice differentiable only where eigenvalues differ. Cost: one `eigh`.

  >>> exp_spd(jnp.zeros((2, 2))).tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  values, V = jnp.linalg.eigh(0.5 * (S + jnp.swapaxes(S, -1, -2)))
  return matmul(V * jnp.exp(values)[..., None, :], jnp.swapaxes(V, -1, -2))


@exp_spd.defjvp
def _exp_spd_jvp(primals, tangents):
  (S,), (dS,) = primals, tangents
  symmetric = lambda M: 0.5 * (M + jnp.swapaxes(M, -1, -2))
  values, V = jnp.linalg.eigh(symmetric(S))
  Vt = jnp.swapaxes(V, -1, -2)
  mean = 0.5 * (values[..., :, None] + values[..., None, :])
  half = 0.5 * (values[..., :, None] - values[..., None, :])
  divided = jnp.exp(mean) * _sinhc(half)
  out = matmul(V * jnp.exp(values)[..., None, :], Vt)
  return out, matmul(V, matmul(divided * matmul(Vt, matmul(symmetric(dS), V)), Vt))


def _sinhc(x):
  """sinh(x) / x."""
  small = jnp.abs(x) < 1e-2
  x2 = x * x
  safe = jnp.where(small, 1, x)
  return jnp.where(small, 1 + x2 / 6 + x2 * x2 / 120, jnp.sinh(safe) / safe)


def exp_nilp(N: jax.Array) -> jax.Array:
  """exp of the strictly upper triangle of N [..., n, n], exactly: the series ends at Nⁿ⁻¹/(n-1)!, since Nⁿ = 0.

  What lies on or below the diagonal is not read, so the result is unipotent: ones on the diagonal, determinant 1.
  Cost: n - 2 products.

  >>> exp_nilp(jnp.array([[9.0, 2.0], [9.0, 9.0]])).tolist()
  [[1.0, 2.0], [0.0, 1.0]]
  """
  return truncated_exp(jnp.triu(N, 1), N.shape[-1])


def truncated_exp(A: jax.Array, terms: int) -> jax.Array:
  """The first `terms` terms of the exponential series of A [..., n, n], Σ_(k<terms) A^k/k!, by Horner's rule."""
  identity = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
  out = identity
  for k in range(terms - 1, 0, -1):
    out = identity + matmul(A, out) / k
  return out


def dexp(A: jax.Array, B: jax.Array) -> jax.Array:
  """The derivative of exp at A in the direction B, both [n, n]: the corner of exp [[A, B], [0, A]] (Mathias, 1996)."""
  n = A.shape[-1]
  block = jnp.block([[A, B], [jnp.zeros_like(A), A]])
  return jax.scipy.linalg.expm(block)[:n, n:]
