"""The ladder: full system, halves, quarters and pairs of halves, trained alike and judged on the same documents."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mgr_jax.algebra import scaling_probe
from mgr_jax.algebra.scaling_probe import FULL, Prediction, Verdict
from train.dominance.documents import Documents
from train.dominance.systems import Recipe, cost_multipliers, relative_cost
from train.dominance.training import Setting, Trained, Trainer

LEARNING_RATES = "matrices keep one learning rate at all widths, embedding and head scale as width^-1/2"


class Ladder(NamedTuple):
  """What was measured, and what follows from it; `samples` are bootstrap samples of `point`."""

  losses: dict[str, np.ndarray]
  train_losses: dict[str, list[float]]
  point: dict[str, Prediction]
  samples: dict[str, Prediction]
  interactions: dict[str, np.ndarray]
  verdict: Verdict
  multipliers: dict[str, float]
  cost: float
  skipped: int
  full: list[Trained]


def climb(
  recipes: Sequence[Recipe],
  setting: Setting,
  documents: Documents,
  axes: Sequence[str],
  seeds: Sequence[int],
  bootstrap: int,
  say: Callable[[str], None] = lambda text: None,
) -> Ladder:
  """Trains every recipe on every seed and judges the axes; `say` hears one line per recipe."""
  nats: dict[str, list[np.ndarray]] = {}
  train_losses: dict[str, list[float]] = {}
  full, skipped = [], 0
  for recipe in recipes:
    trainer, seconds = Trainer(recipe, setting, documents), 0.0
    for seed in seeds:
      trained = trainer.run(seed)
      seconds, skipped = seconds + trained.seconds, skipped + trained.skipped
      for name, values in trained.nats.items():
        nats.setdefault(name, []).append(values)
        train_losses.setdefault(name, []).append(trained.train_loss[name])
      full += [trained] if FULL in trained.nats else []
    losses = {name: float(np.mean(np.sum(nats[name], -1)) / documents.lengths.sum()) for name in recipe.systems}
    say(f"{', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}  ({seconds:.0f} s)")
  measured = {name: np.stack(values) for name, values in nats.items()}
  multipliers = cost_multipliers(recipes[0].cfg, axes)
  losses = scaling_probe.mean_losses(measured, documents.lengths)
  resampled = scaling_probe.bootstrap(measured, documents.lengths, np.random.default_rng(0), bootstrap)
  point = scaling_probe.predictions(losses, multipliers)
  samples = scaling_probe.predictions(resampled, multipliers)
  interaction = scaling_probe.interactions(losses)
  verdict = scaling_probe.judge(point, samples, interaction)
  cost = sum(relative_cost(recipe, recipes[0].cfg, setting.warmdown_frac) for recipe in recipes)
  return Ladder(losses, train_losses, point, samples, interaction, verdict, multipliers, cost, skipped, full)


def as_json(ladder: Ladder, documents: Documents) -> dict[str, Any]:
  """Everything measured, for a file; numbers that are not finite become null."""
  clean = lambda x: float(x) if np.isfinite(x) else None
  axes = {}
  for axis, p in ladder.point.items():
    fields = {name: clean(value) for name, value in p._asdict().items() if name != "fitted"}
    spread = {f"{name}_se": clean(np.std(getattr(ladder.samples[axis], name))) for name in ("g", "high", "score_high")}
    own = {"fitted": bool(p.fitted), "cost_multiplier": ladder.multipliers[axis], "p_best": ladder.verdict.p_best[axis]}
    axes[axis] = fields | spread | own
  gaps = {name: clean(loss - np.mean(ladder.train_losses[name])) for name, loss in ladder.losses.items()}
  return {
    "losses": {name: clean(loss) for name, loss in ladder.losses.items()},
    "generalisation_gap": gaps,
    "axes": axes,
    "interactions": {name: clean(value) for name, value in ladder.interactions.items()},
    "verdict": ladder.verdict._asdict(),
    "cost_in_full_runs": ladder.cost,
    "documents": len(documents.tokens),
    "updates_dropped": ladder.skipped,
    "learning_rates": LEARNING_RATES,
  }
