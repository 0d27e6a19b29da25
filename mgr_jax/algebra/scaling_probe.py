"""Which axis to scale next: predictions from a trained system and the same system with one axis halved.

For axis i let E_i(f) be the loss of a system trained with axis i at the fraction f, all others full, and

    g_i = E_i(1/2) - E(1),  r_i = g_i / (E_i(1/4) - E_i(1/2)),  ĝ_i = r_i g_i

so that ĝ_i predicts the benefit of the next doubling (Aitken's extrapolation; exact for E∞ + A X^-α, where r = 2^-α).
Losses are arrays of any common shape: one number, or one per bootstrap sample.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

FULL = "full"
P_BEST = 0.9  # share of bootstrap samples in which a dominant axis must lead
MARGIN = 1.5  # how many times the runner-up's score it must reach
INTERACTION = 0.3  # of the largest g, above which axes are not separable enough for a verdict
VERDICTS = ("dominant", "balanced", "floor", "tentative")


def halved(*axes: str, by: int = 2) -> str:
  """The name of the system with the given axes divided: `depth/2`, or `depth/2 width/2` for a pair."""
  return " ".join(f"{axis}/{by}" for axis in sorted(axes))


class Prediction(NamedTuple):
  """What one axis promises; arrays of one shape.

  Attributes:
    g: benefit of the last doubling.
    r: decay ratio of successive benefits, NaN without a quarter.
    low, high: predicted benefit of the next doubling; both r·g where `fitted`, both g where benefits do not yet decay
      (r >= 1, most often noise on a slow decay), else the interval [0, max(g, 0)].
    alpha, floor: implied exponent -log2 r and limit E(1) - g r/(1 - r); NaN where not fitted.
    fitted: r is in (0, 1).
    score_low, score_high: the benefit divided by log2 of the cost multiplier of doubling this axis.
  """

  g: np.ndarray
  r: np.ndarray
  low: np.ndarray
  high: np.ndarray
  alpha: np.ndarray
  floor: np.ndarray
  fitted: np.ndarray
  score_low: np.ndarray
  score_high: np.ndarray


def predict(full, half, quarter=None, cost_multiplier: float = 2.0) -> Prediction:
  """The prediction of one axis from the losses of the full, half and quarter systems.

  >>> law = lambda x: 1.7 + 3 * x**-0.34
  >>> round(float(predict(law(1), law(0.5), law(0.25)).low), 6), round(law(1) - law(2), 6)
  (0.629876, 0.629876)
  """
  full, half = np.asarray(full, np.float64), np.asarray(half, np.float64)
  quarter = np.full_like(half, np.nan) if quarter is None else np.asarray(quarter, np.float64)
  g = half - full
  with np.errstate(divide="ignore", invalid="ignore"):
    r = g / (quarter - half)
    fitted = (r > 0) & (r < 1) & (g > 0)
    good = np.where(fitted, r, np.nan)
    alpha, floor = -np.log2(good), full - g * good / (1 - good)
    high = np.where(fitted, r * g, np.maximum(g, 0.0))
    low = np.where(fitted | ((r >= 1) & (g > 0)), high, 0.0)
  scale = np.log2(cost_multiplier)
  return Prediction(g, r, low, high, alpha, floor, fitted, low / scale, high / scale)


def predictions(losses: Mapping[str, np.ndarray], multipliers: Mapping[str, float]) -> dict[str, Prediction]:
  """The prediction of every axis in `multipliers`; `losses` by system name, see `halved`."""
  return {
    axis: predict(losses[FULL], losses[halved(axis)], losses.get(halved(axis, by=4)), multiplier)
    for axis, multiplier in multipliers.items()
  }


def interactions(losses: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """I_ij = E(½_i, ½_j) - E(½_i) - E(½_j) + E(1) of every measured pair; 0 when axes act separately."""
  axes = sorted(name.removesuffix("/2") for name in losses if name.endswith("/2") and " " not in name)
  return {
    f"{i} {j}": losses[halved(i, j)] - losses[halved(i)] - losses[halved(j)] + losses[FULL]
    for i, j in itertools.combinations(axes, 2)
    if halved(i, j) in losses
  }


def bootstrap(
  nats: Mapping[str, np.ndarray], tokens_N: np.ndarray, rng: np.random.Generator, samples: int
) -> dict[str, np.ndarray]:
  """Losses of `samples` paired resamples of documents and of seeds, [samples] per system.

  Args:
    nats: per system the summed loss of every seed and document, [S, N]; all systems share seeds and documents.
    tokens_N: scored tokens of each document.

  One draw serves all systems, so that what documents and seeds have in common cancels in differences.
  """
  seeds, documents = next(iter(nats.values())).shape
  weight = rng.multinomial(documents, np.full(documents, 1 / documents), samples).astype(np.float64)
  share = rng.multinomial(seeds, np.full(seeds, 1 / seeds), samples) / seeds
  tokens = weight @ tokens_N
  return {name: np.sum((weight @ x.T) / tokens[:, None] * share, -1) for name, x in nats.items()}


def mean_losses(nats: Mapping[str, np.ndarray], tokens_N: np.ndarray) -> dict[str, np.ndarray]:
  """Nats per token of each system, mean over its seeds."""
  return {name: np.asarray(np.mean(np.sum(x, -1) / np.sum(tokens_N))) for name, x in nats.items()}


class Verdict(NamedTuple):
  """One of `VERDICTS`, the leading axis (empty unless one leads), P(best) of every axis, and why."""

  word: str
  axis: str
  p_best: dict[str, float]
  interaction: float
  reason: str


def judge(
  point: Mapping[str, Prediction], samples: Mapping[str, Prediction], interaction: Mapping[str, np.ndarray]
) -> Verdict:
  """Compares the axes' scores, by name-free rules: ties are `balanced`, and the order of axes never matters.

  `floor`: no predicted benefit reaches two standard errors. `dominant`: one axis leads in 90% of the samples, its score
  counted at the low end of its interval and the others' at the high end, and has 1.5 times the runner-up's; `tentative`
  instead when axes interact. `balanced`: the best two scores are within a factor 1.5. `tentative`: anything else.
  """
  largest_g = max(float(p.g) for p in point.values())
  strongest = max((abs(float(x)) for x in interaction.values()), default=0.0)
  strength = strongest / largest_g if largest_g > 0 else 0.0
  p_best = {axis: float(np.mean(_leads(samples, axis))) for axis in samples}
  verdict = lambda word, reason, axis="": Verdict(word, axis, p_best, strength, reason)
  if all(float(p.high) < 2 * float(np.std(samples[axis].high)) or p.high <= 0 for axis, p in point.items()):
    return verdict("floor", "no predicted benefit reaches two standard errors")
  leader = max(p_best, key=p_best.get)
  rest = max((float(p.score_high) for axis, p in point.items() if axis != leader), default=0.0)
  if p_best[leader] >= P_BEST and float(point[leader].score_low) >= MARGIN * rest:
    if strength > INTERACTION:
      return verdict("tentative", f"axes interact: |I| is {strength:.2f} of the largest benefit", leader)
    return verdict("dominant", f"leads in {p_best[leader]:.0%} of the samples", leader)
  second, first = sorted(float(p.score_high) for p in point.values())[-2:] if len(point) > 1 else (0.0, 1.0)
  if first <= MARGIN * second:
    return verdict("balanced", f"the best two scores are within a factor {MARGIN:g}")
  return verdict("tentative", "no axis leads in 90% of the samples with the margin asked for")


def _leads(samples: Mapping[str, Prediction], axis: str) -> np.ndarray:
  """Whether the axis is ahead of all others in each sample, strictly."""
  others = [p.score_high for name, p in samples.items() if name != axis]
  bar = np.max(others, 0) if others else np.zeros_like(samples[axis].score_low)
  return samples[axis].score_low > bar
