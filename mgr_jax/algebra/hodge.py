"""Discrete Hodge theory: Laplacians, the split of a chain into gradient, harmonic and curl parts, and heat flow.

L_k = D_kᵀ D_k + D_{k+1} D_{k+1}ᵀ; its kernel is H_k over the reals (Eckmann, 1944). Operators are applied, never
stored. Everything works in the dtype of the chain; the tolerances given here need float64.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ive

from mgr_jax.algebra.simplicial import Boundary, Complex, boundary


def hodge_laplacian(complex_: Complex, k: int, x: jax.Array) -> jax.Array:
  """L_k x for a chain [n_k, ...]. Cost about 4(k+1)·n_k + 4(k+2)·n_{k+1} operations per channel.

  Raises:
    ValueError: k outside 0..dim.
  """
  complex_.check_level(k)
  return _laplacian(boundary(complex_, k), boundary(complex_, k + 1), x)


def _laplacian(D_k: Boundary, D_next: Boundary, x: jax.Array) -> jax.Array:
  return D_k.transpose(D_k.apply(x)) + D_next.apply(D_next.transpose(x))


def dense_laplacian(complex_: Complex, k: int) -> np.ndarray:
  """L_k as an integer matrix [n_k, n_k].

  >>> from mgr_jax.algebra.simplicial import circle
  >>> dense_laplacian(circle(3), 0).tolist()
  [[2, -1, -1], [-1, 2, -1], [-1, -1, 2]]
  """
  complex_.check_level(k)
  D_k, D_next = boundary(complex_, k).dense(), boundary(complex_, k + 1).dense()
  return D_k.T @ D_k + D_next @ D_next.T


def hodge_decompose(
  complex_: Complex, x: jax.Array, k: int, tol: float = 1e-10
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The orthogonal split x = D_kᵀ p + h + D_{k+1} q.

  p and q solve the normal equations D_k D_kᵀ p = D_k x and D_{k+1}ᵀ D_{k+1} q = D_{k+1}ᵀ x by conjugate gradients from
  zero. Both systems are consistent; where they are singular this gives the solution of least norm.

  Args:
    x: [n_k, ...], float; channels are split at once.
    tol: relative residual of the solves; below about 1e-6 it needs float64.

  Returns:
    (p [n_{k-1}, ...], h [n_k, ...], q [n_{k+1}, ...]): for k = 1 a potential, the harmonic flow, and a stream function.

  Raises:
    ValueError: k outside 0..dim.
  """
  complex_.check_level(k)
  D_k, D_next = boundary(complex_, k), boundary(complex_, k + 1)
  solve = functools.partial(jax.scipy.sparse.linalg.cg, tol=tol, maxiter=20 * max(complex_.sizes))
  p, _ = solve(lambda z: D_k.apply(D_k.transpose(z)), D_k.apply(x))
  q, _ = solve(lambda z: D_next.transpose(D_next.apply(z)), D_next.transpose(x))
  return p, x - D_k.transpose(p) - D_next.apply(q), q


def heat(complex_: Complex, x: jax.Array, k: int, t: float) -> jax.Array:
  """exp(-t L_k) x, which tends to the harmonic part as t grows.

  A Chebyshev series on the interval [0, n_0], which holds the spectrum (Duval & Reiner, 2002), cut where its
  coefficients fall below 1e-17: 10·√(t·n_0/2) + 20 applications of L_k.

  Raises:
    ValueError: k outside 0..dim, or t negative or not finite.
  """
  complex_.check_level(k)
  if not 0 <= t < math.inf:
    raise ValueError(f"t={t} is not a finite non-negative time")
  D_k, D_next = boundary(complex_, k), boundary(complex_, k + 1)
  half = complex_.size(0) / 2
  scaled = lambda y: _laplacian(D_k, D_next, y) / half - y
  # exp(-a(1+s)) = Σ_n c_n T_n(s) with c_0 = e^{-a} I_0(a) and c_n = 2 (-1)^n e^{-a} I_n(a).
  terms = np.arange(2, int(10 * math.sqrt(t * half)) + 21)
  coefficients = 2.0 * (-1.0) ** terms * ive(terms, t * half)

  def term(carry, c):
    older, old, total = carry
    new = 2 * scaled(old) - older
    return (old, new, total + c.astype(x.dtype) * new), None

  first = scaled(x)
  total = ive(0, t * half).astype(x.dtype) * x - 2 * ive(1, t * half).astype(x.dtype) * first
  return jax.lax.scan(term, (x, first, total), coefficients)[0][2]


def sheaf_laplacian(edges: np.ndarray, maps: jax.Array, x: jax.Array) -> jax.Array:
  """δᵀδ x for a cellular sheaf on a graph, (δx)_e = F_{e,head} x_head - F_{e,tail} x_tail.

  With orthogonal maps F this is a connection Laplacian; identity maps give the graph Laplacian on each channel (Hansen
  and Ghrist, 2019, arXiv 1808.01513; Bodnar et al., 2022, arXiv 2202.04579).

  Args:
    edges: int [E, 2], tail and head.
    maps: [E, 2, d_edge, d], restriction maps of tail and head.
    x: [n, d].
  """
  signed = maps * jnp.array([-1, 1], maps.dtype)[:, None, None]
  delta = jnp.einsum("esab,esb->ea", signed, x[edges])
  back = jnp.einsum("esab,ea->esb", signed, delta)
  return jax.ops.segment_sum(back.reshape(-1, x.shape[1]), edges.reshape(-1), x.shape[0])
