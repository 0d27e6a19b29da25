"""One macro step in a Krylov space, as functions of its Ritz values: the whole curve over the macro time is free."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra.phi import phi1, phi_delta, psi_delta
from mgr_jax.optim.lanczos import Krylov

NEGATIVE = ("abs", "flat", "flow")
# r by r products cost nothing; in the reduced precision of some accelerators steps would not add up to longer ones.
multiply = functools.partial(jnp.matmul, precision="highest")


class Spectrum(NamedTuple):
  """Eigenvalues `theta` [r] and eigenvectors `vectors` [r, r] of T, with what the macro step needs of `Krylov`."""

  theta: jax.Array
  vectors: jax.Array
  active: jax.Array
  norm: jax.Array
  residual: jax.Array

  @property
  def start(self) -> jax.Array:
    """Components of the first basis vector e_1 along the eigenvectors, [r]."""
    return self.vectors[0]


def spectrum(krylov: Krylov) -> Spectrum:
  """Diagonalises T. Cost O(r³)."""
  theta, vectors = jnp.linalg.eigh(krylov.tridiagonal)
  return Spectrum(theta, vectors, krylov.active, krylov.norm, krylov.residual)


def transformed(theta: jax.Array, neg: str, delta, growth: float = 1.0) -> jax.Array:
  """The curvature that is used in place of θ, by mean and noise alike.

  `abs`: |θ|, saddle-free descent (Dauphin et al., 2014, arXiv 1406.2572). `flat`: max(θ, 0), a gradient step along
  negative curvature. `flow`: θ itself, true gradient flow, bounded below by -growth/δ so that nothing grows by more
  than e^growth.

  Raises:
    ValueError: unknown `neg`.
  """
  if neg not in NEGATIVE:
    raise ValueError(f"neg={neg!r} is not one of {NEGATIVE}")
  if neg == "abs":
    return jnp.abs(theta)
  return jnp.maximum(theta, 0 if neg == "flat" else -growth / delta)


def mean_coefficients(s: Spectrum, delta, neg: str, growth: float = 1.0) -> jax.Array:
  """[r], coefficients in the basis of m = -|g| Q Φ_δ(T~) e_1."""
  phi = phi_delta(transformed(s.theta, neg, delta, growth), delta)
  return -s.norm * multiply(s.vectors, phi * s.start)


def step_norm(s: Spectrum, delta, neg: str) -> jax.Array:
  """|m|; it grows with δ."""
  return s.norm * jnp.linalg.norm(phi_delta(transformed(s.theta, neg, delta), delta) * s.start)


def decrease(s: Spectrum, delta, neg: str) -> jax.Array:
  """-(g·m + m·T~·m/2) = |g|² e_1ᵀ Ψ_δ(T~) e_1: what the frozen model falls by with the mean step, never negative."""
  return s.norm**2 * jnp.sum(psi_delta(transformed(s.theta, neg, delta), delta) * s.start**2)


def residual(s: Spectrum, delta, neg: str) -> jax.Array:
  """β_r |e_rᵀ Φ_δ(T~) e_1|: defect at time δ of w' = -(A·w + g) in the Krylov space, over |g|.

  δ|g| times it estimates the error of m. Zero where the space is invariant and m therefore exact.
  """
  phi = phi_delta(transformed(s.theta, neg, delta), delta)
  return s.residual * jnp.abs(jnp.sum(s.vectors[-1] * phi * s.start))


def negative_mass(s: Spectrum) -> jax.Array:
  """Share of |g|² along Ritz vectors of negative curvature, in [0, 1]."""
  return jnp.sum(jnp.where(s.theta < 0, s.start**2, 0))


def resolved_time(s: Spectrum, delta) -> jax.Array:
  """min(δ, (r/1.7)²/max|θ|): how far r products resolve a broad spectrum to about one percent.

  An invariant space is exact for every δ. (Hochbruck & Lubich, 1997: r of a few sqrt(δ·|θ|_max) suffice.)
  """
  bound = (s.theta.size / 1.7) ** 2 / jnp.maximum(jnp.max(jnp.abs(s.theta)), jnp.finfo(s.theta.dtype).tiny)
  return jnp.where(s.residual > 0, jnp.minimum(delta, bound), delta)


def trusted_time(s: Spectrum, delta, neg: str, radius: float) -> jax.Array:
  """The largest δ' <= δ with |m(δ')| <= radius, by 40 geometric bisections of O(r²) each.

  Unlike clipping the gradient it leaves a step that is the flow of some time.
  """
  # Φ_δ < 2δ under every policy, so that this one is inside.
  inside = jnp.minimum(delta, 0.5 * radius / jnp.maximum(s.norm, jnp.finfo(s.norm.dtype).tiny))

  def halve(_, bracket):
    low, high = bracket
    middle = jnp.sqrt(low) * jnp.sqrt(high)
    fits = step_norm(s, middle, neg) <= radius
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

  low, _ = jax.lax.fori_loop(0, 40, halve, (inside, jnp.asarray(delta, inside.dtype)))
  return jnp.where(step_norm(s, delta, neg) <= radius, delta, low)


def spread(s: Spectrum, delta, neg: str, z: jax.Array) -> jax.Array:
  """[r], coefficients of Q Ψ_δ(T~)^{1/2} z for a vector z in the basis; components that are not active are dropped."""
  psi = psi_delta(transformed(s.theta, neg, delta), delta)
  return multiply(s.vectors, jnp.sqrt(psi) * multiply(s.vectors.T, jnp.where(s.active, z, 0)))


def covariance(s: Spectrum, delta, neg: str, sigma: jax.Array) -> jax.Array:
  """C = ∫_0^δ e^{-tT~} Σ e^{-tT~} dt in the eigenvectors, [r, r]: C_ij = Σ_ij · δ·φ1(-δ(θ~_i + θ~_j)).

  Args:
    sigma: Σ in the basis, [r, r], positive semidefinite.
  """
  theta = transformed(s.theta, neg, delta)
  pairs = theta[:, None] + theta
  return multiply(multiply(s.vectors.T, sigma), s.vectors) * (delta * phi1(-delta * pairs))
