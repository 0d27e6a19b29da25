"""Intervals and verdicts: Student's t on paired seeds, with gates that make a cell inconclusive."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from train.experiments.records import Prediction

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
FLOOR_MARGIN = 0.10  # accuracy above chance that the better arm must reach
LOSS_MARGIN = 0.05  # share of the context-free loss that the better arm must save
CEILING = 0.95


class Interval(NamedTuple):
  """Mean with the half width of its 95% confidence interval; infinite with fewer than two values."""

  mean: float
  half: float

  @property
  def low(self) -> float:
    return self.mean - self.half

  @property
  def high(self) -> float:
    return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
  """mean ± t_{0.975, n-1}·s/√n."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return Interval(float(values.mean()) if len(values) else math.nan, math.inf)
  quantile = stats.t.ppf(0.975, len(values) - 1)
  return Interval(float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values))))


def differences(arm: Sequence[float], baseline: Sequence[float], metric: str) -> np.ndarray:
  """Per seed, how much better `arm` is: the difference of accuracies, or the share of the baseline's loss saved."""
  arm, baseline = np.asarray(arm, np.float64), np.asarray(baseline, np.float64)
  return arm - baseline if metric == "accuracy" else 1 - arm / baseline


class Verdict(NamedTuple):
  """One of the three words, why, and the interval it rests on."""

  word: str
  reason: str
  difference: Interval


def judge(
  prediction: Prediction, arm: Sequence[float], baseline: Sequence[float], metric: str, chance: float
) -> Verdict:
  """Compares the 95% interval of the paired differences with the prediction, if the cell can tell anything at all.

  Supported when the whole interval satisfies it, not supported when the whole interval violates it. Inconclusive in
  between, with fewer than two seeds, when a score is not finite, when neither arm clears the floor (chance + 10 points,
  or 5% below the context-free loss), when both are at the ceiling (95%) although one should be better, or when the
  baseline leaves no room for the predicted difference.
  """
  if not len(arm) or not len(baseline):
    return Verdict(INCONCLUSIVE, "an arm did not run", Interval(math.nan, math.inf))
  found = interval(differences(arm, baseline, metric))
  gate = _gate(prediction, float(np.mean(arm)), float(np.mean(baseline)), metric, chance)
  if not math.isfinite(found.mean):
    return Verdict(INCONCLUSIVE, "a score is not finite", found)
  if gate:
    return Verdict(INCONCLUSIVE, gate, found)
  if len(arm) < 2:
    return Verdict(INCONCLUSIVE, "one seed gives no interval", found)
  if prediction.within is not None:
    wanted, limit = f"within ±{prediction.within:g}", prediction.within
    holds, fails = found.low >= -limit and found.high <= limit, found.low > limit or found.high < -limit
  else:
    wanted = f"at least {prediction.at_least:+g}"
    holds, fails = found.low >= prediction.at_least, found.high < prediction.at_least
  word = SUPPORTED if holds else REFUTED if fails else INCONCLUSIVE
  relation = "lies" if holds else "lies outside" if fails else "straddles the border of"
  return Verdict(word, f"the interval {relation} {wanted}", found)


def _gate(p: Prediction, arm: float, baseline: float, metric: str, chance: float) -> str:
  """Why the cell tells nothing, or an empty string."""
  if metric == "loss":
    best = min(arm, baseline)
    limit = (1 - LOSS_MARGIN) * chance
    return f"floor: the better loss {best:.3f} is not below {limit:.3f}" if best > limit else ""
  best, limit = max(arm, baseline), chance + FLOOR_MARGIN
  if best < limit:
    return f"floor: the better accuracy {best:.3f} is below chance + {FLOOR_MARGIN:g} = {limit:.3f}"
  if p.within is None and p.at_least >= 0:
    if min(arm, baseline) > CEILING:
      return f"ceiling: both accuracies are above {CEILING:g}"
    if baseline + p.at_least > 1:
      return f"ceiling: from {baseline:.3f} there is no room for {p.at_least:+g}"
  return ""
