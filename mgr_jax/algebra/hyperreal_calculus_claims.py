"""Claims about calculus and optimisation computed with infinitesimals, each with a broken twin."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import hyperreal_functions as functions
from mgr_jax.algebra.hyperreal import LC, coefficient, eps, omega, real, replaced, st
from mgr_jax.claims import Check, claim

# One shape for all batches, so that each operation is compiled once.
CASES, K = 256, 6

# Each as a function of Levi-Civita numbers, and of real numbers.
ANALYTIC = (
  (lambda x: functions.exp(functions.sin(x)), lambda x: jnp.exp(jnp.sin(x))),
  (lambda x: x**5 - 2 * x**2 + 1, lambda x: x**5 - 2 * x**2 + 1),
  (lambda x: 1 / (1 + x * x), lambda x: 1 / (1 + x * x)),
  (functions.tanh, jnp.tanh),
  (lambda x: functions.log(2 + functions.cos(x)), lambda x: jnp.log(2 + jnp.cos(x))),
)


def _transferred(x):
  """Coefficients 0..K-1 of f(x + ε) for every f of `ANALYTIC`, [f, n, K]."""
  point = real(x, K) + eps(K)
  found = [f(point) for f, _ in ANALYTIC]
  return jnp.stack([jnp.stack([coefficient(y, k) for k in range(K)], -1) for y in found])


@jax.jit
def _nested(x):
  """Derivatives 0..K-1 of the same functions by forward differentiation, nested K-1 times, [f, n, K]."""

  def along(f):
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]

  found = []
  for _, f in ANALYTIC:
    values = [f(x)]
    for _ in range(K - 1):
      f = along(f)
      values.append(f(x))
    found.append(jnp.stack(values, -1))
  return jnp.stack(found)


def _taylor(divided: bool) -> Check:
  """Largest difference of the coefficients of f(x + ε) from f⁽ᵏ⁾(x)/k!, relative to the larger of 1 and the latter."""

  def measure(key, scale):
    with jax.enable_x64(True):
      x = jax.random.uniform(key, (CASES * scale,), jnp.float64, -1, 1)
      wanted = _nested(x) / (np.array([math.factorial(k) for k in range(K)]) if divided else 1)
      return float(jnp.max(jnp.abs(_transferred(x) - wanted) / jnp.maximum(jnp.abs(wanted), 1)))

  return measure


def quotients(terms: int) -> jax.Array:
  """The limits at 0 of sin x/x, (1 - cos x)/x², (e^x - 1 - x)/x², from numbers of `terms` terms."""
  limits = (
    lambda x: functions.sin(x) / x,
    lambda x: (1 - functions.cos(x)) / (x * x),
    lambda x: (functions.exp(x) - 1 - x) / (x * x),
  )
  return jnp.stack([functions.limit(f, terms=terms) for f in limits])


def _lhopital(terms: int) -> Check:
  """Largest error of the three limits; NaN where too few terms are carried to know one."""

  def measure(key, scale):
    del key, scale
    with jax.enable_x64(True):
      return float(jnp.max(jnp.abs(quotients(terms) - jnp.array([1, 0.5, 0.5]))))

  return measure


def infinitely_many_steps(z: jax.Array) -> LC:
  """(1 - zε)^(1/ε): what 1/ε steps of gradient descent of length δ·ε leave of a mode with δλ = z.

  For real z [...]: e^-z·(1 - ε z²/2 + ...), so a finite number m of steps costs z²/(2m) relative to the flow.
  """
  return functions.raised(1 - z * eps(K), omega(K))


def _times(key, scale):
  return jax.random.uniform(key, (CASES * scale,), jnp.float64, 0.5, 3)


def _euler(m: int | None) -> Check:
  """Largest error of st (1 - zε)^(1/ε) = e^-z and of the coefficient -z²e^-z/2 of ε; with m, of m real steps."""

  def measure(key, scale):
    with jax.enable_x64(True):
      z = _times(key, scale)
      if m:
        return float(jnp.max(jnp.abs((1 - z / m) ** m - jnp.exp(-z))))
      left = infinitely_many_steps(z)
      errors = st(left) - jnp.exp(-z), coefficient(left, 1) + z**2 * jnp.exp(-z) / 2
      return float(jnp.max(jnp.abs(jnp.stack(errors))))

  return measure


def _finite_steps(terms: int) -> Check:
  """Largest difference of 100 real steps from the first `terms` terms of the hyperreal answer, 1/100 in place of ε."""

  def measure(key, scale):
    with jax.enable_x64(True):
      z = _times(key, scale)
      return float(jnp.max(jnp.abs((1 - z / 100) ** 100 - replaced(infinitely_many_steps(z), 0.01, terms))))

  return measure


def _schedules(second: float) -> Check:
  """How far two schedules with infinitesimal steps differ in what they leave of a mode with λ = 1.

  The first takes macro time 1 in steps of ε; the other macro time 0.6 in steps of 2ε and then `second` in steps of ε/2.
  """

  def measure(key, scale):
    del key, scale
    with jax.enable_x64(True):
      flow = lambda time, step: functions.raised(1 - step * eps(K), time / step * omega(K))
      one, other = flow(1.0, 1.0), flow(0.6, 2.0) * flow(second, 0.5)
      # The first corrections do differ, or the two would be the same computation.
      differ = abs(float(coefficient(one - other, 1))) > 1e-3
      return abs(float(st(one) - st(other))) if differ else math.nan

  return measure


def _sharpness(gradient: float) -> Check:
  """Largest error of st((F(w + ρu) - F(w))/ρ²) = λ/2 along an eigenvector, for ρ = ε, 3ε, ε²; λ = 2.

  F(x) = e^x + e^-x + gradient·x at w = 0.
  """

  def measure(key, scale):
    del key, scale
    with jax.enable_x64(True):
      F = lambda x: functions.exp(x) + functions.exp(-x) + gradient * x
      e = eps(K)
      quotient = [st((F(rho) - 2) / (rho * rho)) for rho in (e, 3 * e, e * e)]
      return float(jnp.max(jnp.abs(jnp.stack(quotient) - 1)))

  return measure


def mean_value_fraction(x: float, iterations: int = 3) -> LC:
  """θ with e^(x+ε) - e^x = ε·e^(x+θε), by Newton's method in the field, from θ = 1/2; = 1/2 + ε/24 + ..."""
  e = eps(K)
  slope = (functions.exp(x + e) - functions.exp(real(x, K))) / e
  theta = real(0.5, K)
  for _ in range(iterations):
    value = functions.exp(x + theta * e)
    theta = theta - (value - slope) / (e * value)
  return theta


def _mean_value(theta) -> Check:
  """|st θ - 1/2| + |coefficient of ε - 1/24| for the mean value of exp on [x, x + ε]."""

  def measure(key, scale):
    del key, scale
    with jax.enable_x64(True):
      found = theta()
      return float(abs(st(found) - 0.5) + abs(coefficient(found, 1) - 1 / 24))

  return measure


CLAIMS = (
  claim(
    "hyperreal.taylor",
    "the coefficient of ε^k in f(x + ε) is f⁽ᵏ⁾(x)/k! for five analytic f and k < 6; relative error",
    _taylor(True),
    1e-10,
    _taylor(False),
    ("Griewank, Walther 2008",),
  ),
  claim(
    "hyperreal.lhopital",
    "st(sin ε/ε) = 1, st((1 - cos ε)/ε²) = st((e^ε - 1 - ε)/ε²) = 1/2; two terms, as in dual numbers, cannot tell",
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
    _mean_value(lambda: mean_value_fraction(0.3)),
    1e-9,
    _mean_value(lambda: real(0.5, K)),
  ),
)
