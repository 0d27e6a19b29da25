"""Samplers of the noise of one macro step, dw = -(A·w + g) dt + B dW with B·Bᵀ = τ·I or τ·Cov(per-example gradients).

All use the transformed curvature of the mean: fluctuation and dissipation belong to the same operator. A draw inside
the Krylov space is its coefficients [r] in the basis.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgr_jax.algebra.phi import psi_delta
from mgr_jax.optim.hoss_spectrum import Spectrum, covariance, multiply, spectrum, spread, transformed
from mgr_jax.optim.lanczos import Krylov, combine, lanczos, project

PROBES = 4


def krylov_noise(key, s: Spectrum, delta, neg: str, temperature: float):
  """√τ Q Ψ_δ(T~)^{1/2} z: exact inside an invariant Krylov space. It covers r of all dimensions and nothing else."""
  z = jax.random.normal(key, s.theta.shape, s.theta.dtype)
  return jnp.sqrt(temperature) * spread(s, delta, neg, z)


def tail_noise(key, krylov: Krylov, s: Spectrum, delta, neg: str, temperature: float, trace):
  """`krylov_noise`, and outside of the space isotropic noise for the mean curvature l = (tr A - tr T)/(d - r) there.

  Right in the trace of the curvature, not in its shape. Returns coefficients, and a tree to be added.
  """
  inner, outer = jax.random.split(key)
  coefficients = krylov_noise(inner, s, delta, neg, temperature)
  z = normal_like(outer, jax.tree.map(lambda Q: Q[0], krylov.basis))
  rest = sum(x.size for x in jax.tree.leaves(z)) - jnp.sum(s.active)
  mean_curvature = (trace - jnp.sum(krylov.alpha)) / jnp.maximum(rest, 1)
  size = jnp.sqrt(temperature * psi_delta(transformed(mean_curvature, neg, delta), delta))
  # The part of z inside the space is taken off through the coefficients.
  outside = jax.tree.map(lambda x: (size * x).astype(x.dtype), z)
  return coefficients - size * project(krylov.basis, z), outside


def full_noise(key, product: Callable, like, delta, neg: str, temperature: float, rank: int, **settings):
  """√τ |z| Q_z Ψ_δ(T~_z)^{1/2} e_1, from a second Lanczos run that starts at z ~ N(0, I).

  Converges to the exact law as r grows, in all directions, for r more products (Chow & Saad, 2014, SIAM J. Sci.
  Comput. 36).
  """
  z = normal_like(key, like)
  krylov = lanczos(product, z, rank, **settings)
  first = krylov.norm * (jnp.arange(rank) == 0)
  return combine(krylov.basis, jnp.sqrt(temperature) * spread(spectrum(krylov), delta, neg, first))


def minibatch_noise(key, slopes_rb, s: Spectrum, delta, neg: str, temperature: float):
  """A draw from N(0, τ·C) with the noise Σ = Cov of the per-example gradients in the basis.

  Args:
    slopes_rb: [r, b], derivative of each example's loss along each basis vector.
  """
  centred = slopes_rb - jnp.mean(slopes_rb, 1, keepdims=True)
  sigma = multiply(centred, centred.T) / (slopes_rb.shape[1] - 1)
  values, vectors = jnp.linalg.eigh(covariance(s, delta, neg, sigma))
  z = jax.random.normal(key, values.shape, values.dtype)
  draw = multiply(s.vectors, multiply(vectors, jnp.sqrt(temperature * jnp.maximum(values, 0)) * z))
  return jnp.where(s.active, draw, 0)


def hutchinson_trace(key, product: Callable, like, probes: int = PROBES) -> jax.Array:
  """Unbiased estimate of tr A, the mean of z·A·z over random signs z. (Hutchinson, 1990.)"""

  def one(k):
    z = jax.tree.map(lambda x: jnp.sign(x) + (x == 0), normal_like(k, like))
    return sum(jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (z, product(z))), strict=True))

  return jnp.mean(jax.lax.map(one, jax.random.split(key, probes)))


def normal_like(key, tree):
  """Standard normal tree; the key of each leaf is folded from its index, so that leaves are independent."""
  leaves, treedef = jax.tree.flatten(tree)
  draws = [jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(treedef, draws)
