"""Claims about exponentials that do not commute, and about exponentials of matrices that are not rotations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mgr_jax.algebra import lie_series, matrix_functions
from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.algebra.lie_exp_claims import exp_float64
from mgr_jax.claims import Check, claim, worst_of

STEPS = (0.1, 0.05, 0.025)


def _skew(rng, *shape):
  M = rng.normal(size=shape)
  return M - np.swapaxes(M, -1, -2)


def _conjugation(commuting_only: bool) -> Check:
  """| 𝒯⁻¹ exp(Q ⊗ I) 𝒯 - exp(Σ Q_ij E_ij ⊗ twist_ij) | with twist T_i⁻¹ T_j, or e^-(Φ_i - Φ_j) for T = e^Φ."""

  def measure(key, scale):
    rng, worst, n, b = generator(key), 0.0, 3, 4
    for _ in range(4 * scale):
      Phi, Q = _skew(rng, n, b, b), rng.normal(size=(n, n))
      T = exp_float64(Phi)
      # twists[i, j] is the block that multiplies Q_ij.
      twists = exp_float64(Phi - Phi[:, None]) if commuting_only else np.swapaxes(T, -1, -2)[:, None] @ T
      whole = scipy.linalg.block_diag(*T)
      left = whole.T @ exp_float64(np.kron(Q, np.eye(b))) @ whole
      twisted = np.swapaxes(Q[:, :, None, None] * twists, 1, 2).reshape(n * b, n * b)
      worst = worst_of(worst, float(np.max(np.abs(left - exp_float64(twisted)))))
    return worst

  return measure


@jax.jit
def _series(pair, four):
  """log(e^X e^Y) for pair = (Y, X), and that of a product of four, by their series of orders 1 to 4."""
  return [(lie_series.bch(pair[1], pair[0], k), lie_series.magnus(four, k)) for k in range(1, 5)]


def series_errors(rng: np.random.Generator, steps=STEPS, swapped: bool = False) -> np.ndarray:
  """Largest errors [4 orders, len(steps), 2] of the series for log(e^X e^Y), and for a product of four; b = 5, float64.

  Generators have spectral norm 1 times the step. `swapped` gives the series its factors in the opposite order.
  """
  A = _skew(rng, 4, 5, 5)
  A /= np.linalg.norm(A, 2, (-2, -1), keepdims=True)
  errors = np.zeros((4, len(steps), 2))
  with jax.enable_x64(True):
    for e, step in enumerate(steps):
      U = scipy.linalg.expm(step * A)
      exact = [scipy.linalg.logm(product).real for product in (U[1] @ U[0], U[3] @ U[2] @ U[1] @ U[0])]
      used = step * A
      found = _series(used[1::-1], used[::-1]) if swapped else _series(used[:2], used)
      errors[:, e] = [[np.max(np.abs(np.asarray(s) - x)) for s, x in zip(pair, exact, strict=True)] for pair in found]
  return errors


def slopes(errors: np.ndarray, steps=STEPS) -> np.ndarray:
  """Least-squares slopes of log error against log step, along axis 1."""
  x = np.log(steps) - np.mean(np.log(steps))
  return np.einsum("s,ks...->k...", x, np.log(errors)) / np.sum(x * x)


def _series_order(swapped: bool) -> Check:
  """Largest distance of a slope from order + 1."""

  def measure(key, scale):
    rng = generator(key)
    found = [slopes(series_errors(rng, swapped=swapped)) for _ in range(scale)]
    return float(np.max(np.abs(np.array(found) - np.arange(2, 6)[:, None])))

  return measure


@functools.partial(jax.jit, static_argnums=2)
def _spd_derivative(S, direction, through_eigh):
  def plain(S):
    values, V = jnp.linalg.eigh(S)
    return (V * jnp.exp(values)) @ V.T

  exp = plain if through_eigh else matrix_functions.exp_spd
  weights = jnp.arange(16.0).reshape(4, 4)
  forward = jax.jvp(exp, (S,), (direction,))[1]
  backward = jnp.vdot(jax.grad(lambda S: jnp.vdot(weights, exp(S)))(S), direction)
  return forward, backward - jnp.vdot(weights, forward)


def _repeated_eigenvalues(through_eigh: bool) -> Check:
  """Error of the derivative against central differences at I and at I + 1e-9 E."""

  def measure(key, scale):
    rng, errors = generator(key), []
    with jax.enable_x64(True):
      for size in (0.0, 1e-9) * scale:
        E, D = rng.normal(size=(2, 4, 4))
        S, D = np.eye(4) + size * (E + E.T), D + D.T
        central = (scipy.linalg.expm(S + 1e-5 * D) - scipy.linalg.expm(S - 1e-5 * D)) / 2e-5
        forward, mismatch = _spd_derivative(S, D, through_eigh)
        errors += [np.max(np.abs(np.asarray(forward) - central)), abs(float(mismatch))]
    return float(np.max(errors))

  return measure


_exp_nilp = jax.jit(matrix_functions.exp_nilp)
_truncated_exp = jax.jit(matrix_functions.truncated_exp, static_argnums=1)


def _nilpotent(terms: int) -> Check:
  def measure(key, scale):
    rng, worst = generator(key), 0.0
    with jax.enable_x64(True):
      for _ in range(4 * scale):
        N = np.triu(rng.normal(size=(8, 8)), 1) - np.triu(rng.normal(size=(8, 8)), 4)
        found = np.asarray(_truncated_exp(N, terms) if terms else _exp_nilp(N))
        worst = worst_of(worst, float(np.max(np.abs(found - scipy.linalg.expm(N)))), abs(np.linalg.det(found) - 1))
    return worst

  return measure


CLAIMS = (
  claim(
    "gauge.conjugation",
    "𝒯⁻¹ exp(Q ⊗ I) 𝒯 = exp(Σ Q_ij E_ij ⊗ T_i⁻¹T_j), commuting or not; the twist e^-(Φ_i - Φ_j) is another matrix",
    _conjugation(False),
    1e-11,
    _conjugation(True),
  ),
  claim(
    "gauge.series_order",
    "the series for log(e^X e^Y) and for ordered products, cut after order k = 1 .. 4, err as ε^(k+1)",
    _series_order(False),
    0.1,
    _series_order(True),
    refs=("Blanes et al. 2009, arXiv 0810.5488",),
  ),
  claim(
    "gauge.exp_at_repeated_eigenvalues",
    "the derivative of exp of a symmetric matrix by divided differences is right where eigenvalues meet",
    _repeated_eigenvalues(False),
    1e-5,
    _repeated_eigenvalues(True),
    refs=("Daleckii and Krein 1965",),
  ),
  claim(
    "gauge.nilpotent_exponential",
    "exp of a strictly triangular 8×8 matrix is a sum of 8 terms, with determinant 1; three terms are not enough",
    _nilpotent(0),
    1e-10,
    _nilpotent(3),
  ),
)
