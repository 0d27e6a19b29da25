"""Exact flow maps of a frozen linear system, as functions of one eigenvalue l of the curvature.

All are smooth in l through zero and negative values, and in the damped oscillator through critical damping: what looks
like a division by l is an integral over time.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# Terms of the Taylor series of φ1 that reach the last bit of float32 and float64 for |z| < 1.
_TERMS = {4: 12, 8: 19}


def phi1(z: jax.Array) -> jax.Array:
  """φ1(z) = (e^z - 1)/z = ∫_0^1 e^{sz} ds, with φ1(0) = 1; elementwise, float32 or float64.

  Within 4 units in the last place; every derivative is finite. For |z| < 1 it is the Taylor series, since neither
  `expm1` of every backend nor the derivative of the quotient keeps that accuracy near zero; `(exp(z) - 1)/z` is wrong
  in the first digit once |z| is near the rounding unit.
  """
  z = jnp.asarray(z)
  z = z.astype(jnp.result_type(z, jnp.float32))
  near = jnp.abs(z) < 1
  far, small = jnp.where(near, 1, z), jnp.where(near, z, 0)
  series = jnp.zeros_like(z)
  for n in reversed(range(_TERMS.get(z.dtype.itemsize, 12))):
    series = series * small + 1 / math.factorial(n + 1)
  return jnp.where(near, series, jnp.expm1(far) / far)


def phi_delta(l: jax.Array, delta) -> jax.Array:
  """Φ_δ(l) = (1 - e^{-δl})/l = ∫_0^δ e^{-sl} ds = δ·φ1(-δl): time δ of w' = -(l·w + g) from 0 gives w = -Φ_δ(l)·g.

  δ for l -> 0, 1/l for δ·l -> inf.

  >>> round(float(phi_delta(0.0, 0.5)), 4), round(float(phi_delta(2.0, 1e9)), 4)
  (0.5, 0.5)
  """
  return delta * phi1(-delta * l)


def psi_delta(l: jax.Array, delta) -> jax.Array:
  """Ψ_δ(l) = (1 - e^{-2δl})/(2l) = ∫_0^δ e^{-2sl} ds = δ·φ1(-2δl).

  It is the variance after time δ of dw = -l·w dt + dB from 0 (Ornstein-Uhlenbeck), and also the decrease of the model
  g·w + l·w²/2 by the step w = -Φ_δ(l)·g, per unit of g².
  """
  return delta * phi1(-2 * delta * l)


def oscillator(l: jax.Array, friction, delta) -> tuple[jax.Array, jax.Array]:
  """Responses of w'' + γ·w' + l·w = -g at time δ: w(δ) = -K·g + S·v with w(0) = 0, w'(0) = v.

      S = e^{-γδ/2} sin(ωδ)/ω,  K = ∫_0^δ S = (1 - e^{-γδ/2}(cos ωδ + γ/(2ω) sin ωδ))/l,  ω² = l - γ²/4

  Shadow momentum: the limit of heavy-ball descent for vanishing steps. Smooth through ω = 0 (critical damping),
  imaginary ω (overdamped) and l = 0, where the quotients are 0/0.

  Args:
    l: eigenvalues, any shape and sign.
    friction: γ >= 0, inverse time.
    delta: δ >= 0, time.

  Returns:
    K and S, each of the shape of `l`.
  """
  l = jnp.asarray(l)
  l = l.astype(jnp.result_type(l, jnp.float32))
  h, u = 0.5 * friction * delta, l * delta**2
  gap = h * h - u  # of the roots -h ± sqrt(gap), in units of 1/δ
  impulse = delta * _impulse(h, gap)

  # Real, distant roots x > y: K = δ² (φ1(x) - φ1(y))/(x - y), with x in the form that does not cancel.
  distant = (gap >= 1) & ((u < h * h / 4) | (u < 1))
  root = jnp.sqrt(jnp.where(distant, gap, 1))
  x = jnp.where(distant, -u / (h + root), -1)
  by_roots = (phi1(x) - phi1(-h - root)) / (2 * root)

  # Everything of order one: ∫_0^1 by Gauss-Legendre, exact to rounding.
  close = ~distant & (jnp.abs(u) < 1)
  nodes, weights = _gauss_legendre(l.dtype)
  hs, gap_s = h * nodes, jnp.where(close, gap, 0)[..., None] * nodes**2
  by_quadrature = jnp.sum(weights * nodes * _impulse(hs, gap_s), -1)

  # Otherwise the quotient by l does not cancel.
  rest = ~distant & ~close
  gap_r = jnp.where(rest, gap, 0)
  quotient = (1 - _decay(h, gap_r) - h * _impulse(h, gap_r)) / jnp.where(rest, u, 1)
  return delta**2 * jnp.where(distant, by_roots, jnp.where(close, by_quadrature, quotient)), impulse


def _impulse(h, gap):
  """e^{-h} sinh(sqrt(gap))/sqrt(gap), an entire function of `gap`."""
  real, imaginary = _roots(gap)
  growing = -0.5 * jnp.exp(real - h) * jnp.expm1(-2 * real) / real
  return _entire(h, gap, 1, growing, jnp.sin(imaginary) / imaginary)


def _decay(h, gap):
  """e^{-h} cosh(sqrt(gap)), an entire function of `gap`."""
  real, imaginary = _roots(gap)
  return _entire(h, gap, 0, 0.5 * (jnp.exp(real - h) + jnp.exp(-real - h)), jnp.cos(imaginary))


def _entire(h, gap, odd, growing, oscillating):
  """e^{-h} Σ_n gap^n/(2n + odd)! for |gap| < 1, beyond it the closed forms for positive and negative `gap`."""
  near = jnp.abs(gap) < 1
  small, series = jnp.where(near, gap, 0), jnp.zeros_like(gap)
  for n in reversed(range(_TERMS.get(gap.dtype.itemsize, 12) // 2 + 1)):
    series = series * small + 1 / math.factorial(2 * n + odd)
  return jnp.where(near, jnp.exp(-h) * series, jnp.where(gap > 0, growing, jnp.exp(-h) * oscillating))


def _roots(gap):
  """sqrt(gap) and sqrt(-gap), each 1 where it is not used, so that derivatives stay finite."""
  return jnp.sqrt(jnp.where(gap >= 1, gap, 1)), jnp.sqrt(jnp.where(gap <= -1, -gap, 1))


def _gauss_legendre(dtype):
  """Nodes and weights on [0, 1] of 12 points: exact to rounding for integrands that are entire and of order one."""
  x, w = np.polynomial.legendre.leggauss(12)
  return jnp.asarray((x + 1) / 2, dtype), jnp.asarray(w / 2, dtype)
