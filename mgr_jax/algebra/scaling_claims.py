"""Claims about exact frontiers of sums of power laws, each with a broken twin."""

from fractions import Fraction

import jax
import numpy as np

from mgr_jax.algebra.scaling import ErrorModel, balance, frontier, substitute, term
from mgr_jax.claims import Check, claim

MODELS = 50


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _positive(rng: np.random.Generator) -> Fraction:
  return Fraction(int(rng.integers(2, 10)), int(rng.integers(6, 12)))


def _compute_frontier(swapped: bool) -> Check:
  """Largest relative difference between exact exponents and a grid search; 1 where a closed form is missed.

  A N^-α + B D^-β with C = ND. `swapped` gives parameters the exponent of tokens.
  """

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    log_n = np.linspace(-100, 160, 40001)
    for _ in range(MODELS * scale):
      alpha, beta, a, b = (_positive(rng) for _ in range(4))
      model = ErrorModel(1.7, (term(float(a), N=-alpha), term(float(b), D=-beta)))
      exponents, rate, _ = frontier(model, {"N": 1, "D": 1})
      if (exponents["N"], rate) != (beta / (alpha + beta), -alpha * beta / (alpha + beta)):
        return 1.0
      best = []
      for log_c in (20.0, 60.0):
        excess = float(a) * np.exp(-float(alpha) * log_n) + float(b) * np.exp(-float(beta) * (log_c - log_n))
        best.append(log_n[np.argmin(excess)])
      found = exponents["D" if swapped else "N"]
      worst = np.max([worst, abs((best[1] - best[0]) / 40 / float(found) - 1)])
    return worst

  return measure


def _width_frontiers(stability_sign: int) -> Check:
  """The same for M^-b, D^-n M^m and C^-c η^-u M^v, and for the compute that a stability ceiling η <= M^-s requires."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    log_m = np.linspace(-40, 160, 40001)
    for _ in range(MODELS * scale):
      b, n, m, c, u, v, s = (_positive(rng) for _ in range(7))
      width, data, steps = term(M=-b), term(D=-n, M=m), term(C=-c, eta=-u, M=v)
      of_data = frontier(ErrorModel(0.0, (width, data)), {"D": 1})
      if (of_data.exponents["M"], of_data.rate) != (n / (b + m), -n * b / (b + m)):
        return 1.0
      if balance(width, steps, "M") != {"C": c / (b + v), "eta": u / (b + v)}:
        return 1.0
      best = [
        log_m[np.argmin(np.exp(-float(b) * log_m) + np.exp(float(m) * log_m - float(n) * log_d))]
        for log_d in (5.0, 25.0)
      ]
      worst = np.max([worst, abs((best[1] - best[0]) / 20 / float(n / (b + m)) - 1)])
      # The least compute, on a grid, for which the third term at the largest stable η is no larger than the first.
      floor = balance(width, substitute(steps, "eta", {"M": -stability_sign * s}), "C").get("M", Fraction(0))
      grid = np.linspace(-10, 1200, 40001)
      needed = []
      for at in (10.0, 40.0):
        third = -float(c) * grid + float(u * s) * at + float(v) * at
        needed.append(grid[np.argmax(third <= -float(b) * at)])
      worst = np.max([worst, abs((needed[1] - needed[0]) / 30 - float(floor)) / float((b + v + u * s) / c)])
    return worst

  return measure


CLAIMS = (
  claim(
    "surreal.compute_frontier",
    "A N^-α + B D^-β under C = ND: N ∝ C^{β/(α+β)}, E - E∞ ∝ C^{-αβ/(α+β)}, exact, and by grid search within 1%",
    _compute_frontier(False),
    0.01,
    _compute_frontier(True),
    refs=("Hoffmann et al., 2022, arXiv 2203.15556",),
  ),
  claim(
    "surreal.width_frontiers",
    "M^{b+m} ≍ D^n, M^{b+v} ≍ C^c η^u; a ceiling η <= M^-s needs C^c >= M^{b+v+us}, not M^{b+v-us}",
    _width_frontiers(1),
    0.01,
    _width_frontiers(-1),
  ),
)
