"""Streaming linear regression whose truth changes twice: does a schedule that looks at the loss gain anything by it?

Sample t is y = <x, θ_k> + ξ with x ~ N(0, I) in 20 dimensions, ξ ~ Student-t(3), and unit vectors θ_k that change at
0.4 T and 0.7 T; plain gradient steps on (y - <x, θ>)²/2, one sample each. The score is the excess risk |θ - θ_k|², free
of noise, averaged over the last 5% of each segment and then over segments. Every arm sees the same streams, and takes
the learning rate of one grid that is best for it on streams used for nothing else.

The decisive arms are the blind twins: the same ordinal machine that never sees a loss, so a timer. Where a machine and
its twin score alike, the loss contributed nothing.

  feedback  a machine scores below 0.95 times its blind twin in the median over streams, and wins in 80% of them
  best      the same against the best (lowest median) arm that is no ordinal machine

Supported when that holds; not supported when the 95% interval of the mean log ratio lies above log 0.95; inconclusive
in between, or when the rate of either arm is at the border of the grid.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mgr_jax.problems import Problem, raise_if_any
from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED, interval
from train.races import regime_simulation as simulation
from train.races.regime_simulation import BLIND, BLOCKS

MARGIN, WINS = 0.95, 0.8
TUNING_SEED = 1000


def run(seeds: int = 20, steps: int = 20_000, say: Callable[[str], Any] = print) -> dict[str, Any]:
  """Runs every arm and judges both claims of every machine.

  Args:
    seeds: streams that are judged; half as many others, at least 4, choose the learning rates.
    steps: samples per stream, a multiple of 100.
    say: receives a line when something long begins.

  Returns:
    A dict for JSON. `arms`: per name its `rate`, whether that is at the grid's `edge`, `risk` per stream (None where it
    diverged), their `median`, the curves `excess` and `multiplier` (median over streams, 100 points); for machines the
    medians of `improvements`, `cuts` and `restarts`. `claims`: see `judge`.

  Raises:
    UserError: sizes that cannot be run.
  """
  found = []
  if seeds < 2:
    found.append(Problem(f"--seeds={seeds} gives no interval", "use --seeds=20"))
  if steps < 10 * BLOCKS or steps % BLOCKS:
    found.append(Problem(f"--steps={steps} is no multiple of {BLOCKS} from 1000 on", "use --steps=20000"))
  raise_if_any(found)
  start, tuning = time.perf_counter(), max(4, seeds // 2)
  names, grid = simulation.names(steps), simulation.rates(steps)
  say(f"{len(names)} arms, {len(grid)} learning rates, {seeds} + {tuning} streams of {steps:,} samples")
  streams = simulation.draw([*range(TUNING_SEED, TUNING_SEED + tuning), *range(seeds)], steps)
  race = simulation.race(steps, np.float32(grid), streams, simulation.timetable(steps))
  risk = np.array(race.risk, np.float64)
  risk[~np.isfinite(risk)] = np.inf
  chosen = np.mean(np.log(risk[:, :tuning]), axis=1).argmin(-1)
  curves = {"excess": np.asarray(race.excess), "multiplier": np.asarray(race.multiplier)}
  arms = {}
  for i, (name, g) in enumerate(zip(names, chosen.tolist(), strict=True)):
    scores = risk[i, tuning:, g]
    arms[name] = {"rate": float(grid[g]), "edge": g in (0, len(grid) - 1), "risk": scores.tolist()}
    arms[name]["median"] = float(np.median(scores))
    arms[name] |= {kind: np.median(v[:, i, tuning:, g], axis=-1).tolist() for kind, v in curves.items()}
  machines = list(simulation.ordinal_configs(steps))
  for name, state in zip(machines, race.states[-len(machines) :], strict=True):
    g = chosen[names.index(name)]
    counts = {"improvements": "n_improve", "cuts": "n_anneal", "restarts": "n_restart"}
    arms[name] |= {k: float(np.median(getattr(state.ordinal, v)[tuning:, g])) for k, v in counts.items()}
  others = [name for name in names if not name.startswith("ordinal")]
  best = min(others, key=lambda name: arms[name]["median"])
  claims = {f"feedback: {name}": judge(arms, name, name + BLIND) for name in machines}
  claims |= {f"best: {name}": judge(arms, name, best) for name in machines}
  for arm in arms.values():
    arm["risk"] = [r if math.isfinite(r) else None for r in arm["risk"]]
  return {
    "steps": steps,
    "seeds": seeds,
    "tuning_seeds": tuning,
    "rates": grid.tolist(),
    "arms": arms,
    "claims": claims,
    "seconds": time.perf_counter() - start,
  }


def judge(arms: dict[str, Any], arm: str, baseline: str) -> dict[str, Any]:
  """Paired comparison of scores, by the rules in the module's docstring.

  Returns:
    The names, `ratio` (median of arm/baseline), `wins` (share of streams with a ratio below 1), `interval` (95%, of
    exp of the mean log ratio), `verdict` and `reason`.
  """
  risk, other = np.asarray(arms[arm]["risk"]), np.asarray(arms[baseline]["risk"])
  finite = bool(np.all(np.isfinite(risk)) and np.all(np.isfinite(other)))
  low, high = None, None
  if finite:
    found = interval(np.log(risk / other))
    low, high = math.exp(found.low), math.exp(found.high)
  middle, wins = float(np.median(risk / other)) if finite else None, float(np.mean(risk < other))
  edges = [name for name in (arm, baseline) if arms[name]["edge"]]
  if not finite:
    verdict, reason = INCONCLUSIVE, "a score is not finite"
  elif edges:
    verdict, reason = INCONCLUSIVE, f"the best rate of {' and of '.join(edges)} is at the border of the grid"
  elif middle < MARGIN and wins >= WINS:
    verdict, reason = SUPPORTED, f"below {MARGIN} in the median, and better in {wins:.0%} of the streams"
  elif low > MARGIN:
    verdict, reason = REFUTED, f"the interval lies above {MARGIN}"
  else:
    verdict, reason = INCONCLUSIVE, "neither rule applies"
  return {
    "arm": arm,
    "baseline": baseline,
    "ratio": middle,
    "wins": wins,
    "interval": [low, high],
    "verdict": verdict,
    "reason": reason,
  }


def report(result: dict[str, Any]) -> str:
  """The scores, best first, and the verdicts; at most 100 columns."""
  lines = [
    f"Excess risk at the ends of the segments, {result['seeds']} streams of {result['steps']:,} samples.",
    f"Rates: best of {len(result['rates'])} from {result['rates'][0]:.2g} to {result['rates'][-1]:.2g}"
    f" on {result['tuning_seeds']} other streams; * is at the border.",
    "",
    f"{'arm':<24}{'rate':>9} {'median':>9}{'quartiles':>19}{'cuts':>7}{'restarts':>10}{'improved':>10}",
  ]
  for name, arm in sorted(result["arms"].items(), key=lambda item: item[1]["median"]):
    low, high = np.quantile([math.inf if r is None else r for r in arm["risk"]], [0.25, 0.75])
    counts = "".join(
      f"{arm[kind]:{width}.0f}" if kind in arm else "-".rjust(width)
      for kind, width in (("cuts", 7), ("restarts", 10), ("improvements", 10))
    )
    spread = f"{low:.4f} to {high:.4f}"
    lines.append(f"{name:<24}{arm['rate']:9.2g}{'*' if arm['edge'] else ' '}{arm['median']:9.4f}{spread:>19}{counts}")
  for title, what in (("feedback", "against its blind twin"), ("best", "against the best other arm")):
    lines += ["", f"{title}: {what}, ratio of risks [95% interval of the mean]"]
    for name, c in result["claims"].items():
      if name.startswith(title + ":"):
        against = "" if title == "feedback" else f" ({c['baseline']})"
        low, high = c["interval"]
        ratio = "     -" if low is None else f"{c['ratio']:6.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"  {c['arm']:<18}{ratio}  wins {c['wins']:4.0%}{against}  {c['verdict']}")
        if c["verdict"] == INCONCLUSIVE:
          lines.append(f"    {c['reason']}")
  return "\n".join(lines)
