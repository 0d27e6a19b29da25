"""Claims about the exponentials: that they are rotations, are the exponential, and have its derivative at zero too."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mgr_jax.algebra import lie
from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.claims import Check, claim, largest_difference, worst_of

BLOCKS = (2, 3, 4, 6, 8)
CAP = 4.0


def sample(rng, b: int, size: float, count: int = 16) -> np.ndarray:
  """Normal coordinates; for blocks without a closed form they are capped at length 4, as their bound is static."""
  a = size * rng.normal(size=(count, lie.dimension(b)))
  return a if b <= 4 else a * CAP / np.sqrt(CAP**2 + np.sum(a * a, -1, keepdims=True))


@functools.partial(jax.jit, static_argnums=1)
def _exp(a, b):
  return lie.exp_so(a, b, CAP)


def skew_float64(a, b: int) -> np.ndarray:
  """The skew matrices [..., b, b] of coordinates [..., b(b-1)/2]. NumPy, for comparison."""
  a, (rows, columns) = np.asarray(a), np.triu_indices(b, 1)
  A = np.zeros((*a.shape[:-1], b, b), np.result_type(a.dtype, np.float64))
  A[..., rows, columns] = a
  return A - np.swapaxes(A, -1, -2)


def exp_float64(A: np.ndarray) -> np.ndarray:
  """exp of matrices [..., b, b], also complex ones, by 20 terms and squarings; all at once. NumPy, for comparison."""
  squarings = max(0, math.ceil(math.log2(max(np.max(np.linalg.norm(A, axis=(-2, -1))), 1))))
  A, one = A / 2**squarings, np.eye(A.shape[-1])
  U = one + A / 20
  for k in range(19, 0, -1):
    U = one + A @ U / k
  for _ in range(squarings):
    U = U @ U
  return U


def _rotation(solve: bool) -> Check:
  """Worst |UᵀU - I| and |det U - 1| in float32; the broken twin is the numerator of Cayley's map without its solve."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    for b in BLOCKS:
      a = np.concatenate([sample(rng, b, size, 16 * scale) for size in (1e-4, 1, 10)]).astype(np.float32)
      U = np.asarray(_exp(a, b) if solve else np.eye(b) + 0.5 * skew_float64(a, b), np.float64)
      worst = worst_of(worst, drift_float64(U), float(np.max(np.abs(np.linalg.det(U) - 1))))
    return worst

  return measure


def drift_float64(U: np.ndarray) -> float:
  """max |UᵀU - I| in double precision."""
  U = np.asarray(U, np.float64)
  return float(np.max(np.abs(np.swapaxes(U, -1, -2) @ U - np.eye(U.shape[-1]))))


def _exponential(blocks: tuple[int, ...], factor: float) -> Check:
  """Largest difference from scipy's expm of `factor` times the matrix, in double precision."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    with jax.enable_x64(True):
      for b in blocks:
        a = np.concatenate([sample(rng, b, size, 4 * scale) for size in (1e-4, 1, 10)])
        exact = scipy.linalg.expm(factor * skew_float64(a, b))
        worst = worst_of(worst, float(np.max(np.abs(np.asarray(_exp(a, b)) - exact))))
    return worst

  return measure


def _naive_so3(a):
  """Rodrigues with sin θ / θ as written."""
  theta = jnp.sqrt(jnp.sum(a * a))
  A = lie.skew(a, 3)
  return jnp.eye(3, dtype=a.dtype) + jnp.sin(theta) / theta * A + (1 - jnp.cos(theta)) / theta**2 * (A @ A)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _derivatives(a, direction, b, naive):
  """The derivative of exp in one direction, and its sum by the reverse mode."""
  U, forward = jax.linearize(_naive_so3 if naive else lambda a: lie.exp_so(a, b, CAP), a)
  (backward,) = jax.linear_transpose(forward, a)(jnp.ones_like(U))
  return forward(direction), jnp.vdot(backward, direction)


def _derivative(naive: bool) -> Check:
  def measure(key, scale):
    rng, errors = generator(key), []
    with jax.enable_x64(True):
      for b in (3,) if naive else (3, 4, 6):
        direction = rng.normal(size=lie.dimension(b))
        for size in (0.0, 1e-8, *rng.uniform(0, 1, scale)):
          a = size * sample(rng, b, 1.0, 1)[0]
          A, E = (skew_float64(x, b) for x in (a, direction))
          exact = scipy.linalg.expm_frechet(A, E, compute_expm=False)
          forward, backward = _derivatives(a, direction, b, naive)
          errors += [largest_difference(forward, exact), abs(float(backward) - exact.sum())]
    return float(np.max(errors))

  return measure


CLAIMS = (
  claim(
    "gauge.exponentials_are_rotations",
    "UᵀU = I and det U = 1 for U = exp A, A in so(2), so(3), so(4), so(6), so(8), float32, |A| from 1e-4 to 25",
    _rotation(True),
    4e-6,
    _rotation(False),
  ),
  claim(
    "gauge.closed_exponentials",
    "cos and sin, Rodrigues, and two quaternions are the matrix exponential for b = 2, 3, 4",
    _exponential((2, 3, 4), 1.0),
    1e-12,
    _exponential((2, 3, 4), 2.0),
    refs=("Rodrigues 1840", "Cayley 1855"),
  ),
  claim(
    "gauge.scaled_exponential",
    "degree 8 Taylor with a static number of squarings is the matrix exponential for b = 6, 8 and |a| <= 4",
    _exponential((6, 8), 1.0),
    5e-7,
    _exponential((6, 8), 2.0),
    refs=("Moler and Van Loan 2003",),
  ),
  claim(
    "gauge.exponential_derivative",
    "forward and reverse derivatives of exp are those of Fréchet, and finite, at a = 0 and near it too",
    _derivative(False),
    1e-6,
    _derivative(True),
  ),
)
