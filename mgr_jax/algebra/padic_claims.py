"""Claims about p-adic digits, valuations and the LCP kernel, each with a broken twin."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import padic, padic_kernel
from mgr_jax.claims import Check, claim, worst_of


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


_digits = jax.jit(padic.digits, static_argnums=(1, 2))
_lcp = jax.jit(padic.lcp)
_vp = jax.jit(padic.vp, static_argnums=(1, 2))
_level_weights = jax.jit(padic.level_weights, static_argnums=1)
_shell_mass = jax.jit(padic.shell_mass, static_argnums=(0, 1, 2))


def _broken_balls(distance: np.ndarray) -> int:
  """How often a distance matrix violates: strong triangle, isosceles triangles, balls as equivalence classes."""
  a, b, c = distance[:, :, None], distance[None], distance[:, None]
  sides = np.sort(np.stack(np.broadcast_arrays(a, b, c)), 0)
  violations = np.sum(c > np.maximum(a, b)) + np.sum(sides[2] != sides[1])
  for radius in np.unique(distance):
    inside = distance <= radius
    counted = inside.astype(np.float32)
    violations += np.sum((counted @ counted > 0) != inside)
  return int(violations)


def _ultrametric(real: bool) -> Check:
  def measure(key, scale):
    rng, violations = _rng(key), 0
    for p in (2, 3, 5):
      x = rng.integers(0, p**6, 64)
      if real:
        distance = np.abs(x[:, None] - x).astype(float)
      else:
        d = np.asarray(_digits(x, p, 6))
        distance = float(p) ** -np.asarray(_lcp(d[:, None], d[None]))
      violations += _broken_balls(distance)
    return float(violations)

  return measure


def _valuation(most_significant_first: bool) -> Check:
  """Pairs for which lcp of the digits differs from v_p(x - y); half the pairs share a long suffix."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for p, K in ((2, 8), (3, 8), (5, 8), (7, 8)):
      x = rng.integers(0, p**K, 5000 * scale)
      shared = p ** rng.integers(0, K + 1, x.size)
      y = np.where(
        rng.random(x.size) < 0.5, rng.integers(0, p**K, x.size), (x + shared * rng.integers(0, p, x.size)) % p**K
      )
      a, b = np.asarray(_digits(x, p, K)), np.asarray(_digits(y, p, K))
      if most_significant_first:
        a, b = a[:, ::-1], b[:, ::-1]
      wrong += int(np.sum(np.asarray(_lcp(a, b)) != np.asarray(_vp(x - y, p, K))))
    return float(wrong)

  return measure


def _valuation_laws(planted: bool) -> Check:
  """Violations of v(xy) = v(x) + v(y), v(x+y) >= min (equal where they differ), and of the cancellation criterion.

  `planted` claims that v(Σ q_j k_j) always equals its (min,+) shadow, on vectors whose leading terms cancel.
  """

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for p, K in ((2, 20), (3, 12), (5, 8)):
      q, k = (rng.integers(1, 41, (5000 * scale, 6)) * p ** rng.integers(0, 3, (5000 * scale, 6)) for _ in range(2))
      if planted:
        q[:, 1], k[:, 1] = -q[:, 0], k[:, 0]
        q[:, 2:] *= p**3
      vq, vk = np.asarray(_vp(q, p, K)), np.asarray(_vp(k, p, K))
      v = np.asarray(_vp(np.sum(q * k, -1), p, K))
      shadow = np.asarray(padic.tropical_shadow(vq, vk))
      if planted:
        wrong += int(np.sum(v != shadow))
        continue
      leading = np.where(vq + vk == shadow[:, None], q // p**vq * (k // p**vk), 0)
      cancels = np.sum(leading, -1) % p == 0
      wrong += int(np.sum(v < shadow) + np.sum((v > shadow) != cancels))
      wrong += int(np.sum(np.asarray(_vp(q * k, p, K)) != vq + vk))
      total, low = np.asarray(_vp(q + k, p, K)), np.minimum(vq, vk)
      wrong += int(np.sum(total < low) + np.sum((total > low) & (vq != vk)))
    return float(wrong)

  return measure


def _tie_rate(rate) -> Check:
  """Largest deviation, in standard deviations, of the measured cancellation rate from `rate(p)`."""

  def measure(key, scale):
    rng, n, worst = _rng(key), 200_000 * scale, 0.0
    for p, K in ((2, 20), (3, 12), (5, 8)):
      x, y = rng.integers(0, p**K, (2, n))
      v = [np.asarray(_vp(z, p, K)) for z in (x, y, x + y)]
      expected = rate(p)
      measured = np.mean(v[2] > np.minimum(v[0], v[1]))
      worst = worst_of(worst, abs(measured - expected) / math.sqrt(expected * (1 - expected) / n))
    return worst

  return measure


def _telescoping(shift: int) -> Check:
  """Largest |Σ_{d <= l} c_d - α^l| for dyadic α, and of shell masses against a full enumeration; float64."""

  def measure(key, scale):
    del key, scale
    worst = 0.0
    with jax.enable_x64(True):
      for alpha, p, K in ((2.0, 2, 8), (4.0, 3, 5), (8.0, 4, 3), (1.5, 2, 6)):
        c = np.asarray(_level_weights(np.float64(alpha), K))
        depth = np.arange(K + 1)
        worst = worst_of(worst, np.max(np.abs(np.cumsum(np.roll(c, shift)) - alpha**depth)))
        keys = np.where(depth < K, float(p) ** (K - depth) * (1 - 1 / p), 1.0)
        mass = np.asarray(_shell_mass(p**K, p, K, np.float64(alpha)))
        worst = worst_of(worst, np.max(np.abs(mass - np.round(keys) * alpha**depth) / mass) - 1e-14)
    return worst_of(worst, 0.0)

  return measure


@jax.jit
def _gram(a, c):
  return padic_kernel.kernel_tile(a, a, c), padic_kernel.query_features(a, c).T @ padic_kernel.key_features(a)


def _positive_definite(*alphas: float) -> Check:
  """Most negative eigenvalue (sign changed) of α^lcp on 120 points, and 10³ times the error of <Ψ, Φ>; float64."""

  def measure(key, scale):
    del scale
    classes = _rng(key).integers(0, 3, (120, 4))
    worst = 0.0
    with jax.enable_x64(True):
      a = jnp.asarray((classes[:, :, None] == np.arange(3)).transpose(1, 2, 0), jnp.float64)
      agree = np.cumprod(classes[:, None] == classes[None], -1).sum(-1)
      for alpha in alphas:
        kernel, features = map(np.asarray, _gram(a, _level_weights(np.float64(alpha), 4)))
        error = worst_of(np.max(np.abs(kernel - alpha**agree)), np.max(np.abs(kernel - features))) / alpha**4
        worst = worst_of(worst, -np.linalg.eigvalsh(kernel)[0], 1e3 * error)
    return worst

  return measure


def _mean_kernel(power_of_mean: bool) -> Check:
  """Relative error of Horner's form against Σ_xy P(x)Q(y) α^lcp over all 243² pairs of strings; or of α^E[lcp]."""

  def measure(key, scale):
    rng, alpha, worst = _rng(key), 3.0, 0.0
    strings = np.array(list(itertools.product(range(3), repeat=5)))
    lcp = np.cumprod(strings[:, None] == strings[None], -1).sum(-1)
    with jax.enable_x64(True):
      for _ in range(2 * scale):
        a, b = rng.dirichlet(np.ones(3), (2, 5))
        chance = [np.prod(x[np.arange(5), strings], -1) for x in (a, b)]
        exact = chance[0] @ alpha**lcp @ chance[1]
        if power_of_mean:
          found = alpha ** (chance[0] @ lcp @ chance[1])
        else:
          c = _level_weights(np.float64(alpha), 5)
          found = float(_tile(jnp.asarray(a[:, :, None]), jnp.asarray(b[:, :, None]), c)[0, 0])
        worst = worst_of(worst, abs(found / exact - 1))
    return worst

  return measure


_tile = jax.jit(padic_kernel.kernel_tile)


CLAIMS = (
  claim(
    "padic.ultrametric",
    "d = p^-lcp: strong triangle, isosceles triangles, balls nested or disjoint with every point a centre",
    _ultrametric(False),
    0.0,
    _ultrametric(True),
    refs=("Robert, 2000, A Course in p-adic Analysis, ch. 2",),
  ),
  claim(
    "padic.valuation",
    "with the least significant digit first, lcp(x, y) = v_p(x - y)",
    _valuation(False),
    0.0,
    _valuation(True),
  ),
  claim(
    "padic.valuation_laws",
    "v(xy) = v(x) + v(y), v(x+y) >= min; v(Σ q_j k_j) exceeds its (min,+) shadow iff the leading digits cancel mod p",
    _valuation_laws(False),
    0.0,
    _valuation_laws(True),
  ),
  claim(
    "padic.tie_rate",
    "uniform x, y cancel, v(x+y) > min, with probability 1/(p+1): within 4 standard deviations; 1/p is rejected",
    _tie_rate(padic.haar_tie_rate),
    4.0,
    _tie_rate(lambda p: 1 / p),
  ),
  claim(
    "padic.telescoping",
    "Σ_{d <= l} c_d = α^l, and the shells of a complete tree weigh T(1 - 1/p)(α/p)^d",
    _telescoping(0),
    0.0,
    _telescoping(1),
  ),
  claim(
    "padic.positive_definite",
    "α^lcp = <Ψ, Φ> is positive semidefinite for α > 1; for α = 1/2 it is not",
    _positive_definite(1.1, 2.0, 5.0),
    1e-9,
    _positive_definite(0.5),
  ),
  claim(
    "padic.mean_kernel",
    "E[α^lcp] = c_0 + m_1(c_1 + m_2(c_2 + ...)), m_j = <A_j, B_j>; α^E[lcp] is another number",
    _mean_kernel(False),
    1e-12,
    _mean_kernel(True),
  ),
)
