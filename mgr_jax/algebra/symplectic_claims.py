"""Claims about linear symplectic maps, and about what splitting integrators conserve. All in double precision."""

import jax
import numpy as np
import scipy.linalg

from mgr_jax.algebra import symplectic
from mgr_jax.algebra.reversible_claims import generator
from mgr_jax.claims import Check, claim, worst_of

LAYERS = 4000
STEPS = np.array([0.2, 0.1, 0.05, 0.025])


def _linear(form: bool) -> Check:
  """Defect of both maps and their difference near one; without the form, the defect of exp of a symmetric matrix."""

  def measure(key, scale):
    del scale
    rng = generator(key)
    with jax.enable_x64(True):
      S = rng.normal(size=(6, 6)) / 4
      if not form:
        return float(_defect(scipy.linalg.expm(S + S.T)))
      exact, near = (_maps(x) for x in (S, S * 1e-4))
      apart = np.max(np.abs(np.subtract(*near)))
      return worst_of(*map(_defect, exact), apart)

  return measure


@jax.jit
def _maps(S):
  return symplectic.exp_sp(S), symplectic.cayley_sp(S)


_defect = jax.jit(symplectic.defect)


class Pendulum:
  """H = |p|²/2 + Σ_j a_j log cosh(w_j·q) + λ|q|²/2 in n dimensions, on NumPy arrays [..., n]."""

  def __init__(self, rng: np.random.Generator, n: int = 2, confinement: float = 0.1):
    self.w, self.a, self.confinement = rng.normal(size=(n, 3)), rng.uniform(0.5, 1, 3), confinement

  def grad_V(self, q):
    return (self.a * np.tanh(q @ self.w)) @ self.w.T + self.confinement * q

  def grad_T(self, p):
    return p

  def energy(self, q, p):
    z = np.abs(q @ self.w)
    wells = (z + np.log1p(np.exp(-2 * z)) - np.log(2)) @ self.a
    return np.sum(p * p, -1) / 2 + wells + self.confinement * np.sum(q * q, -1) / 2


def energy_path(system, step, q, p, steps=STEPS, layers: int = LAYERS) -> np.ndarray:
  """|H - H_0| after each of `layers` steps of an integrator, for all step sizes side by side, [layers, sizes]."""
  h = np.asarray(steps)[:, None]
  q, p = (np.broadcast_to(x, (len(steps), len(x))) for x in (q, p))
  start, path = system.energy(q, p), np.empty((layers, len(steps)))
  for layer in range(layers):
    q, p = step(q, p, system.grad_V, system.grad_T, h)
    path[layer] = np.abs(system.energy(q, p) - start)
  return path


def energy_bands(system, step, q, p, steps=STEPS, layers: int = LAYERS) -> np.ndarray:
  """The largest |H - H_0| along the path, by step size."""
  return np.max(energy_path(system, step, q, p, steps, layers), axis=0)


def order(bands: np.ndarray, steps=STEPS) -> float:
  """Slope of log band against log step."""
  return float(np.polyfit(np.log(steps), np.log(bands), 1)[0])


def equal_signs(q, p, grad_V, grad_T, h):
  """Both kicks with a plus: symplectic as well, for T - V, which bounds nothing."""
  p = p + h * grad_V(q)
  return q + h * grad_T(p), p


def _order(step, expected: float, layers: int = LAYERS) -> Check:
  def measure(key, scale):
    del scale
    rng = generator(key)
    system = Pendulum(rng)
    q, p = rng.uniform(0.5, 1, (2, 2))
    return abs(order(energy_bands(system, step, q, p, layers=layers)) - expected)

  return measure


def _explicit(q, p, grad_V, grad_T, h):
  """The explicit Euler method: both gradients at the old point, not symplectic."""
  return q + h * grad_T(p), p - h * grad_V(q)


def _momenta(radial: bool) -> Check:
  """Relative change of q_1 p_2 - q_2 p_1 and of the momentum along a direction that V does not see, 500 layers."""

  def measure(key, scale):
    del scale
    rng = generator(key)
    q, p = rng.normal(size=(2, 4))
    stretch = np.ones(4) if radial else np.array([1.0, 1.5, 1.0, 1.0])
    well = lambda q: (0.1 + np.tanh(q @ (stretch * q) / 2)) * stretch * q
    blind = lambda q: well(q) * np.array([1.0, 1.0, 1.0, 0.0 if radial else 1.0])
    turning = lambda q, p: np.outer(q, p) - np.outer(p, q)
    before, along = turning(q, p), p[3]
    x, y = q, p
    for _ in range(500):
      x, y = symplectic.euler(x, y, well, lambda p: p / np.sqrt(1 + p @ p), 0.1)
    change = np.max(np.abs(turning(x, y) - before)) / np.max(np.abs(before))
    x, y = q, p
    for _ in range(500):
      x, y = symplectic.leapfrog(x, y, blind, lambda p: p, 0.1)
    return worst_of(change, abs(y[3] / along - 1))

  return measure


CLAIMS = (
  claim(
    "symplectic.linear_maps",
    "exp and Cayley of a Hamiltonian matrix keep the form, M'ΩM = Ω, and agree to second order",
    _linear(True),
    1e-11,
    _linear(False),
  ),
  claim(
    "symplectic.euler_order",
    "the energy of symplectic Euler oscillates in a band of width O(h): slope 1 over 4000 layers",
    _order(symplectic.euler, 1.0),
    0.1,
    _order(_explicit, 1.0, layers=100),
    refs=("Hairer, Lubich, Wanner, Geometric Numerical Integration, 2006",),
  ),
  claim(
    "symplectic.leapfrog_order",
    "that of leapfrog in a band of width O(h²): slope 2 over 4000 layers",
    _order(symplectic.leapfrog, 2.0),
    0.1,
    _order(symplectic.euler, 2.0),
    refs=("Hairer, Lubich, Wanner, Geometric Numerical Integration, 2006",),
  ),
  claim(
    "symplectic.momenta",
    "a radial potential keeps the angular momentum, one blind to a direction keeps the momentum along it: 500 layers",
    _momenta(True),
    1e-10,
    _momenta(False),
  ),
)
