"""Lanczos tridiagonalisation of a symmetric linear map over PyTrees of arrays; nothing is ever ravelled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Krylov(NamedTuple):
  """An orthonormal basis of span{g, A·g, ..., A^(r-1)·g} and A in it, T = tridiag(beta, alpha, beta).

  Args:
    basis: the columns q_1 = g/|g|, ..., q_r; the tree of g, each leaf with a leading axis [r, ...]. Inactive columns
      are zero.
    alpha: [r], diagonal of T.
    beta: [r - 1], off-diagonal of T.
    active: bool [r], a prefix: False from the breakdown on, when the space is invariant and T is decoupled.
    norm: |g|.
    residual: the off-diagonal that follows T; 0 when the space is invariant.
  """

  basis: Any
  alpha: jax.Array
  beta: jax.Array
  active: jax.Array
  norm: jax.Array
  residual: jax.Array

  @property
  def tridiagonal(self) -> jax.Array:
    """T, [r, r]."""
    return jnp.diag(self.alpha) + jnp.diag(self.beta, 1) + jnp.diag(self.beta, -1)


def lanczos(hvp_fn: Callable, start, rank: int, *, reorth: int = 2, breakdown_tol: float = 1e-5) -> Krylov:
  """Runs `rank` steps of A·q_i = beta_{i-1}·q_{i-1} + alpha_i·q_i + beta_i·q_{i+1} as one `lax.scan`.

  Each new vector is made orthogonal to all former ones `reorth` times (classical Gram-Schmidt; two passes keep
  orthogonality at rounding level, Giraud, Langou, Rozložník & van den Eshof, 2005). Without it outlying eigenvalues
  reappear as copies. The process ends where beta_i <= breakdown_tol · max_j |A·q_j|: an absolute threshold would take
  rounding noise for a direction. Computation is in float32, or float64 for float64 vectors.

  Args:
    hvp_fn: symmetric linear map of trees like `start`.
    start: g, a tree of float arrays; zero gives no active column.
    rank: r >= 1, number of products.
    reorth: passes of re-orthogonalisation; 0 is the bare three-term recurrence, for comparison.
    breakdown_tol: relative; about 1e-5 for float32 products, 1e-2 for bfloat16 ones.

  Cost: r products, and 2·reorth passes over the basis after each: 2·reorth·r² vectors read, which memory bandwidth
  bounds. Memory: r + 2 vectors.

  Raises:
    ValueError: rank < 1 or reorth < 0.

  >>> A = jnp.array([1.0, 2.0, 5.0])
  >>> krylov = lanczos(lambda v: A * v, jnp.array([1.0, 1.0, 0.0]), 3)
  >>> krylov.active.tolist(), [round(x, 3) for x in krylov.alpha.tolist()]
  ([True, True, False], [1.5, 1.5, 0.0])
  """
  if rank < 1:
    raise ValueError(f"rank={rank} is not positive")
  if reorth < 0:
    raise ValueError(f"reorth={reorth} is negative")
  g = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), start)
  norm = tree_norm(g)
  column = jnp.arange(rank)

  def orthogonalise(basis, v, i):
    """v - Q·h with h = Qᵀ·v, the sums of h over all passes; the three-term recurrence keeps two entries of h."""

    def one_pass(_, carry):
      v, total = carry
      h = project(basis, v)
      h = h if reorth else jnp.where((column == i) | (column == i - 1), h, 0)
      return jax.tree.map(jnp.subtract, v, combine(basis, h)), total + h

    # As a loop and not unrolled: XLA then reads the basis in place (on a CPU half the time, and no copies of it).
    return jax.lax.fori_loop(0, max(reorth, 1), one_pass, (v, jnp.zeros(rank, norm.dtype)))

  def step(carry, i):
    basis, q, alive, largest = carry
    basis = jax.tree.map(lambda Q, x: jax.lax.dynamic_update_index_in_dim(Q, x, i, 0), basis, q)
    v = jax.tree.map(lambda x, y: x.astype(y.dtype), hvp_fn(q), q)
    largest = jnp.maximum(largest, tree_norm(v))
    v, h = orthogonalise(basis, v, i)
    beta = tree_norm(v)
    goes_on = alive & (beta > breakdown_tol * largest)
    inverse = jnp.where(goes_on, 1 / jnp.where(goes_on, beta, 1), 0)
    q = jax.tree.map(lambda x: inverse * x, v)
    alpha = jnp.where(alive, h[i], 0)
    return (basis, q, goes_on, largest), (alpha, jnp.where(goes_on, beta, 0), alive)

  alive = norm > 0
  inverse = jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0)
  basis = jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), x.dtype), g)
  first = basis, jax.tree.map(lambda x: inverse * x, g), alive, jnp.zeros_like(norm)
  (basis, *_), (alpha, beta, active) = jax.lax.scan(step, first, column)
  return Krylov(basis, alpha, beta[:-1], active, norm, beta[-1])


def project(basis, v) -> jax.Array:
  """Qᵀ·v, [r], of a basis with leading axis r in every leaf; the leaves' sums are added up last."""
  dots = jax.tree.map(lambda Q, x: jnp.tensordot(Q, x, x.ndim, precision="highest"), basis, v)
  return sum(jax.tree.leaves(dots))


def combine(basis, coefficients: jax.Array):
  """Q·c = Σ_j c_j·q_j, a tree like one column."""
  return jax.tree.map(lambda Q: jnp.tensordot(coefficients.astype(Q.dtype), Q, 1, precision="highest"), basis)


def tree_norm(v) -> jax.Array:
  """Euclidean norm of a tree."""
  return jnp.sqrt(sum(jnp.tensordot(x, x, x.ndim, precision="highest") for x in jax.tree.leaves(v)))
