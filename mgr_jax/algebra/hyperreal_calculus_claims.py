"""Claims about calculus and optimisation computed with infinitesimals, each with a broken twin."""

import functools
import math
import operator

import jax
import numpy as np

from mgr_jax.algebra import hyperreal_functions as functions
from mgr_jax.algebra.hyperreal import LC, coefficient, eps, omega, real, replaced, st
from mgr_jax.claims import Check, claim

# One shape for all batches, so that each operation is compiled once.
CASES, K = 256, 6

# Each as a function of Levi-Civita numbers, and of complex ones; singularities are at least 1 away from [-1, 1].
ANALYTIC = (
  (lambda x: functions.exp(functions.sin(x)), lambda x: np.exp(np.sin(x))),
  (lambda x: x**5 - 2 * x**2 + 1, lambda x: x**5 - 2 * x**2 + 1),
  (lambda x: 1 / (1 + x * x), lambda x: 1 / (1 + x * x)),
  (functions.tanh, np.tanh),
  (lambda x: functions.log(2 + functions.cos(x)), lambda x: np.log(2 + np.cos(x))),
)
RADIUS, POINTS = 0.5, 64


def _uniform(key, scale: int, low: float, high: float = 1.0) -> np.ndarray:
  return np.random.default_rng(np.asarray(jax.random.key_data(key))).uniform(low, high, CASES * scale)


def _transferred(x):
  """Coefficients 0..K-1 of f(x + ε) for every f of `ANALYTIC`, [f, n, K]."""
  point = real(x, K) + eps(K)
  found = [f(point) for f, _ in ANALYTIC]
  return np.array([[coefficient(y, k) for k in range(K)] for y in found]).swapaxes(1, 2)


def _cauchy(x):
  """f⁽ᵏ⁾(x)/k! of the same functions, [f, n, K]: Cauchy's integral over a circle, by the trapezoidal rule."""
  turn = np.exp(2j * np.pi * np.arange(POINTS) / POINTS)
  k = np.arange(K)
  on_circle = np.array([f(x[:, None] + RADIUS * turn) for _, f in ANALYTIC])
  return np.fft.fft(on_circle)[..., :K].real / POINTS / RADIUS**k


def _taylor(divided: bool) -> Check:
  """Largest difference of the coefficients of f(x + ε) from f⁽ᵏ⁾(x)/k!, relative to the larger of 1 and the latter."""

  def measure(key, scale):
    x = _uniform(key, scale, -1)
    wanted = _cauchy(x) * (1 if divided else np.array([math.factorial(k) for k in range(K)]))
    with jax.enable_x64(True):
      return float(np.max(np.abs(_transferred(x) - wanted) / np.maximum(np.abs(wanted), 1)))

  return measure


def quotients(a, terms: int) -> np.ndarray:
  """The limits at 0 of sin ax/x, (1 - cos ax)/x², (e^ax - 1 - ax)/x² for real a [n], from `terms` terms; [3, n]."""
  limits = (
    lambda x: functions.sin(a * x) / x,
    lambda x: (1 - functions.cos(a * x)) / (x * x),
    lambda x: (functions.exp(a * x) - 1 - a * x) / (x * x),
  )
  return np.array([functions.limit(f, np.zeros_like(a), terms) for f in limits])


def _lhopital(terms: int) -> Check:
  """Largest error of the three limits for a in [1/2, 2]; NaN where too few terms are carried to know one."""

  def measure(key, scale):
    a = _uniform(key, scale, 0.5, 2)
    with jax.enable_x64(True):
      return float(np.max(np.abs(quotients(a, terms) - np.stack([a, a**2 / 2, a**2 / 2]))))

  return measure


def infinitely_many_steps(z: jax.Array) -> LC:
  """(1 - zε)^(1/ε): what 1/ε steps of gradient descent of length δ·ε leave of a mode with δλ = z.

  For real z [...]: e^-z·(1 - ε z²/2 + ...), so a finite number m of steps costs z²/(2m) relative to the flow.
  """
  return functions.raised(1 - z * eps(K), omega(K))


def _times(key, scale):
  return _uniform(key, scale, 0.5, 3)


def _euler(m: int | None) -> Check:
  """Largest error of st (1 - zε)^(1/ε) = e^-z and of the coefficient -z²e^-z/2 of ε; with m, of m real steps."""

  def measure(key, scale):
    with jax.enable_x64(True):
      z = _times(key, scale)
      if m:
        return float(np.max(np.abs((1 - z / m) ** m - np.exp(-z))))
      left = infinitely_many_steps(z)
      errors = st(left) - np.exp(-z), coefficient(left, 1) + z**2 * np.exp(-z) / 2
      return float(np.max(np.abs(errors)))

  return measure


def _finite_steps(terms: int) -> Check:
  """Largest difference of 100 real steps from the first `terms` terms of the hyperreal answer, 1/100 in place of ε."""

  def measure(key, scale):
    with jax.enable_x64(True):
      z = _times(key, scale)
      return float(np.max(np.abs((1 - z / 100) ** 100 - replaced(infinitely_many_steps(z), 0.01, terms))))

  return measure


def scheduled_steps(l, *phases: tuple[float, float]) -> LC:
  """What steps of infinitesimal length leave of modes with real λ [n]: phases of (macro time, step in units of ε)."""
  left = [functions.raised(1 - step * l * eps(K), time / step * omega(K)) for time, step in phases]
  return functools.reduce(operator.mul, left)


def _schedules(second: float) -> Check:
  """How far two schedules with infinitesimal steps differ in what they leave of modes with λ in [1/2, 2].

  The first takes macro time 1 in steps of ε; the other macro time 0.6 in steps of 2ε and then `second` in steps of ε/2.
  """

  def measure(key, scale):
    l = _uniform(key, scale, 0.5, 2)
    with jax.enable_x64(True):
      one, other = scheduled_steps(l, (1.0, 1.0)), scheduled_steps(l, (0.6, 2.0), (second, 0.5))
      # The first corrections do differ, or the two would be the same computation.
      differ = np.min(np.abs(coefficient(one - other, 1))) > 1e-3
      return float(np.max(np.abs(st(one) - st(other)))) if differ else math.nan

  return measure


def _sharpness(gradient: float) -> Check:
  """Largest error of st((F(w + ρu) - F(w))/ρ²) = λ/2 along an eigenvector, for ρ = ε, 3ε, ε²; λ = 2a².

  F(x) = e^ax + e^-ax + gradient·x at w = 0, with a in [1/2, 2].
  """

  def measure(key, scale):
    a = _uniform(key, scale, 0.5, 2)
    with jax.enable_x64(True):
      F = lambda x: functions.exp(a * x) + functions.exp(-a * x) + gradient * x
      e = real(np.zeros_like(a), K) + eps(K)
      quotient = [st((F(rho) - 2) / (rho * rho)) for rho in (e, 3 * e, e * e)]
      return float(np.max(np.abs(np.array(quotient) - a**2)))

  return measure


def mean_value_fraction(x, iterations: int = 3) -> LC:
  """θ with e^(x+ε) - e^x = ε·e^(x+θε) at real x [n], by Newton's method from θ = 1/2; it is 1/2 + ε/24 + ..."""
  e = eps(K)
  slope = (functions.exp(x + e) - functions.exp(real(x, K))) / e
  theta = real(np.full_like(x, 0.5), K)
  for _ in range(iterations):
    value = functions.exp(x + theta * e)
    theta = theta - (value - slope) / (e * value)
  return theta


def _mean_value(theta) -> Check:
  """Largest |st θ - 1/2| + |coefficient of ε - 1/24| for the mean value of exp on [x, x + ε], x in [-1, 1]."""

  def measure(key, scale):
    with jax.enable_x64(True):
      found = theta(_uniform(key, scale, -1))
      return float(np.max(np.abs(st(found) - 0.5) + np.abs(coefficient(found, 1) - 1 / 24)))

  return measure


CLAIMS = (
  claim(
    "hyperreal.taylor",
    "the coefficient of ε^k in f(x + ε) is f⁽ᵏ⁾(x)/k! for five analytic f and k < 6; relative error",
    _taylor(True),
    1e-10,
    _taylor(False),
    ("Griewank, Walther 2008", "Lyness, Moler 1967"),
  ),
  claim(
    "hyperreal.lhopital",
    "st(sin aε/ε) = a, st((1 - cos aε)/ε²) = st((e^aε - 1 - aε)/ε²) = a²/2; two terms, as in dual numbers, cannot tell",
    _lhopital(K),
    1e-12,
    _lhopital(2),
  ),
  claim(
    "hyperreal.euler",
    "1/ε Euler steps of size δε: st (1 - zε)^(1/ε) = e^-z and the ε-coefficient is -z²e^-z/2, z = δλ in [1/2, 3]",
    _euler(None),
    1e-10,
    _euler(100),
    ("Anderson 1976",),
  ),
  claim(
    "hyperreal.finite_steps",
    "100 Euler steps agree with the standard part and the first infinitesimal term at ε = 1/100",
    _finite_steps(2),
    2e-4,
    _finite_steps(1),
  ),
  claim(
    "hyperreal.macro_time",
    "steps ε, or 2ε and then ε/2: the standard part depends on the schedule through its macro time st Σε_t only",
    _schedules(0.4),
    1e-10,
    _schedules(0.5),
  ),
  claim(
    "hyperreal.sharpness",
    "st((F(w + ρu) - F(w))/ρ²) = λ_max/2 for every infinitesimal ρ at a critical point; infinite at any other",
    _sharpness(0.0),
    1e-10,
    _sharpness(0.1),
  ),
  claim(
    "hyperreal.mean_value",
    "e^(x+ε) - e^x = ε e^(x+θε) has θ = 1/2 + ε/24 + O(ε²), found by Newton's method with hyperreal numbers",
    _mean_value(mean_value_fraction),
    1e-9,
    _mean_value(lambda x: real(np.full_like(x, 0.5), K)),
  ),
)
