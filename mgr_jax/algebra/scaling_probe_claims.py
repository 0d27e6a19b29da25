"""Claims about the choice of the axis to scale, on planted landscapes, each with a broken twin."""

import jax
import numpy as np

from mgr_jax.algebra import scaling_probe
from mgr_jax.algebra.scaling_probe import (
  FULL,
  Verdict,
  bootstrap,
  halved,
  interactions,
  judge,
  mean_losses,
  predictions,
)
from mgr_jax.claims import Check, claim

AXES = {"depth": 2.0, "width": 4.0, "data": 2.0}  # the cost of doubling each
LANDSCAPES = 120
DOCUMENTS = 200
SAMPLES = 200
NOISE = 0.05  # standard error of a system's loss, as a share of the largest benefit of the next doubling


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def plant(rng: np.random.Generator, scores: dict[str, float], noise: float = NOISE) -> dict[str, np.ndarray]:
  """Nats of one seed on `DOCUMENTS` documents of one token each, from E∞ + Σ_i A_i X_i^-α_i with the given scores.

  Documents differ in difficulty, the same for all systems; every system adds noise of its own.
  """
  floor, alpha = rng.uniform(1, 2), {axis: rng.uniform(0.2, 0.8) for axis in scores}
  benefit = {axis: score * np.log2(AXES[axis]) for axis, score in scores.items()}
  size = {axis: benefit[axis] / (1 - 2.0 ** -alpha[axis]) for axis in scores}
  loss = lambda **at: floor + sum(size[x] * at.get(x, 1.0) ** -alpha[x] for x in scores)
  systems = {FULL: loss()} | {halved(x): loss(**{x: 0.5}) for x in scores}
  systems |= {halved(x, by=4): loss(**{x: 0.25}) for x in scores}
  difficulty = rng.normal(0, 0.5, DOCUMENTS)
  spread = noise * max(benefit.values()) * np.sqrt(DOCUMENTS)
  own = rng.normal(0, spread, (len(systems), DOCUMENTS))
  return {name: (value + difficulty + own[i])[None] for i, (name, value) in enumerate(systems.items())}


def probe(nats: dict[str, np.ndarray], rng: np.random.Generator, axes: dict[str, float] = AXES) -> Verdict:
  """The verdict on measured losses of documents of one token."""
  tokens = np.ones(next(iter(nats.values())).shape[1])
  losses, samples = mean_losses(nats, tokens), bootstrap(nats, tokens, rng, SAMPLES)
  return judge(predictions(losses, axes), predictions(samples, axes), interactions(losses))


def starved(rng: np.random.Generator, ratio: float = 3.0) -> tuple[str, dict[str, float]]:
  """A random axis, and scores of which its own is `ratio` times the next."""
  best = str(rng.choice(list(AXES)))
  return best, {axis: 0.1 if axis == best else 0.1 / ratio * rng.uniform(0.3, 1) for axis in AXES}


def near_tie(rng: np.random.Generator) -> dict[str, float]:
  return {axis: 0.1 * rng.uniform(0.9, 1) for axis in AXES}


def _aitken(second_power: float) -> Check:
  """Largest relative error of the predicted benefit for E∞ + A X^-α + B X^-2α, B = `second_power`·A; float64."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for alpha in np.linspace(0.05, 1, 40 * scale):
      floor, a = rng.uniform(0, 3), rng.uniform(0.5, 3)
      loss = lambda x, a=a, alpha=alpha, floor=floor: floor + a * (x**-alpha + second_power * x ** (-2 * alpha))
      found = scaling_probe.predict(loss(1.0), loss(0.5), loss(0.25))
      worst = np.max([worst, abs(float(found.low) / (loss(1.0) - loss(2.0)) - 1)])
    return worst

  return measure


def _recovers(shuffled: bool) -> Check:
  """Share of landscapes with one starved axis whose verdict does not name it."""

  def measure(key, scale):
    rng, wrong, n = _rng(key), 0, LANDSCAPES * scale
    for _ in range(n):
      best, scores = starved(rng)
      nats = plant(rng, scores)
      if shuffled:
        names = dict(zip(AXES, rng.permutation(list(AXES)), strict=True))
        nats = {k if k == FULL else f"{names[k[:-2]]}{k[-2:]}": x for k, x in nats.items()}
      found = probe(nats, rng)
      wrong += (found.word, found.axis) != ("dominant", best)
    return wrong / n

  return measure


def _abstains(largest_score: bool) -> Check:
  """Share of nearly balanced landscapes for which an axis is called dominant; a rule of the largest score always is."""

  def measure(key, scale):
    rng, named, n = _rng(key), 0, LANDSCAPES * scale
    for _ in range(n):
      found = probe(plant(rng, near_tie(rng)), rng)
      named += largest_score or found.word == "dominant"
    return named / n

  return measure


def _largest(nats: dict[str, np.ndarray]) -> str:
  """The axis with the largest score, the first of equal ones: a rule without uncertainty."""
  found = predictions(mean_losses(nats, np.ones(next(iter(nats.values())).shape[1])), AXES)
  return max(AXES, key=lambda axis: float(found[axis].score_high))


def _symmetric(default: bool) -> Check:
  """Landscapes in which two identical axes, or the order in which axes are named, change the verdict."""

  def measure(key, scale):
    rng, wrong, same = _rng(key), 0, {"depth": 2.0, "data": 2.0}
    for _ in range(20 * scale):
      nats = plant(rng, {"depth": 0.1, "width": 0.02, "data": 0.1})
      nats = {k: nats[k.replace("data", "depth")] for k in nats}
      verdicts = []
      for order in (("depth", "data", "width"), ("width", "data", "depth")):
        if default:
          verdicts.append(max((x for x in order if x in same), key=lambda x: float(np.mean(nats[halved(x)]))))
        else:
          found = probe(nats, np.random.default_rng(0), {axis: AXES[axis] for axis in order})
          verdicts.append((found.word, found.axis))
          wrong += found.word == "dominant"
      wrong += verdicts[0] != verdicts[1]
    return float(wrong)

  return measure


def _halves_agree(largest_score: bool) -> Check:
  """Share of landscapes, called dominant by one half of the documents, for which the other half says otherwise.

  The broken rule takes the axis with the largest score, on nearly balanced landscapes.
  """

  def measure(key, scale):
    rng, called, differ = _rng(key), 0, 0
    for _ in range(LANDSCAPES * scale):
      nats = plant(rng, near_tie(rng) if largest_score else starved(rng)[1])
      halves = [{k: x[:, i::2] for k, x in nats.items()} for i in (0, 1)]
      if largest_score:
        called, differ = called + 1, differ + (_largest(halves[0]) != _largest(halves[1]))
        continue
      first, second = (probe(half, rng) for half in halves)
      if first.word == "dominant":
        called, differ = called + 1, differ + (second[:2] != first[:2])
    return differ / called

  return measure


CLAIMS = (
  claim(
    "surreal.aitken",
    "ĝ = g²/(E(1/4) - E(1/2)) is the benefit of the next doubling, exactly, for E∞ + A X^-α; not for two powers",
    _aitken(0.0),
    1e-9,
    _aitken(0.5),
    refs=("Aitken, 1926",),
  ),
  claim(
    "surreal.planted_dominant",
    f"the starved axis is named in >= 95% of {LANDSCAPES} landscapes with 5% noise and a threefold lead",
    _recovers(False),
    0.05,
    _recovers(True),
  ),
  claim(
    "surreal.planted_balanced",
    f"<= 10% of {LANDSCAPES} nearly balanced landscapes are called dominant; the largest score always names one",
    _abstains(False),
    0.1,
    _abstains(True),
  ),
  claim(
    "surreal.symmetric_verdict",
    "identical axes are never separated, and the order of naming axes changes no verdict",
    _symmetric(False),
    0.0,
    _symmetric(True),
  ),
  claim(
    "surreal.halves_agree",
    "where one half of the documents says dominant, the other half says the same in >= 90%",
    _halves_agree(False),
    0.1,
    _halves_agree(True),
  ),
)
