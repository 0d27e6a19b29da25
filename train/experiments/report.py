"""Tables of an experiment: what each arm is and scored, differences, verdicts."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from train.experiments.records import Experiment
from train.experiments.training import EQUAL_PARAMETERS, Cell
from train.experiments.verdict import Verdict, differences, interval, judge

PASS = 0.9  # accuracy that counts as solving a rung of the ladder


def line(cell: Cell) -> str:
  """One finished cell, for the progress report."""
  if cell.error:
    return f"{cell.task} / {cell.arm}: FAILED {cell.error}"
  means = ", ".join(f"{test} {interval(scores).mean:.3f}" for test, scores in cell.scores.items())
  seconds = sum(cell.run_s) / len(cell.run_s)
  return f"{cell.task} / {cell.arm}: {means} ({seconds:.1f} s a run, compiled in {cell.compile_s:.1f} s)"


def scores_of(cells: Sequence[Cell], arm: str, test: str) -> list[float]:
  """Scores by seed; empty when that arm did not run."""
  return next((cell.scores[test] for cell in cells if cell.arm == arm and test in cell.scores), [])


def verdicts(experiment: Experiment, cells: Sequence[Cell], chance: dict[str, float]) -> list[Verdict]:
  """One verdict per prediction."""
  return [
    judge(p, *(scores_of(cells, arm, p.test) for arm in (p.arm, p.baseline)), experiment.metric, chance[p.test])
    for p in experiment.predictions
  ]


def judged(experiment: Experiment, cells: Sequence[Cell], chance: dict[str, float]) -> list[dict[str, Any]]:
  """Predictions with their verdicts, as plain data."""
  found = zip(experiment.predictions, verdicts(experiment, cells, chance), strict=True)
  return [
    dataclasses.asdict(p)
    | {
      "verdict": v.word,
      "reason": v.reason,
      "mean": v.difference.mean,
      "low": v.difference.low,
      "high": v.difference.high,
    }
    for p, v in found
  ]


def text(experiment: Experiment, cells: Sequence[Cell], chance: dict[str, float]) -> str:
  """The whole report."""
  parts = []
  for task in experiment.tasks:
    own = [cell for cell in cells if cell.task == task.name]
    parts += [f"\n{task.name}", _arms(own), "", _scores(own, list(task.tests), experiment.metric, chance), *_notes(own)]
  if experiment.ladder:
    parts += ["", _ladder(experiment, cells)]
  parts.append("\npredictions")
  for p, v in zip(experiment.predictions, verdicts(experiment, cells, chance), strict=True):
    parts.append(f"  {v.word.upper()}: {p.statement}")
    parts.append(f"    {p.arm} against {p.baseline} on {p.test}: {_interval(v.difference, True)}; {v.reason}")
  if experiment.limits:
    parts.append("\n" + textwrap.fill(f"limits: {experiment.limits}", 110))
  return "\n".join(parts)


def _columns(rows: Sequence[Sequence[str]]) -> str:
  """Aligned columns, the first to the left."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  align = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
  return "\n".join("  " + "  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows)


def _arms(cells: Sequence[Cell]) -> str:
  rows = [["arm", "layers", "parameters", "of first", "kFLOPs/token", "state kB", "s a run", "lr x"]]
  for cell in cells:
    seconds = f"{sum(cell.run_s) / len(cell.run_s):.1f}" if cell.run_s else "-"
    share = f"{cell.parameters / cells[0].parameters:.3f}"
    size = f"{cell.flops_per_token / 1e3:.1f}", f"{cell.state_bytes / 1e3:.1f}"
    rows.append([cell.arm, str(cell.n_layer), str(cell.parameters), share, *size, seconds, f"{cell.lr_scale:g}"])
  return _columns(rows)


def _scores(cells: Sequence[Cell], tests: Sequence[str], metric: str, chance: dict[str, float]) -> str:
  """Mean ± 95% half width of every test, and below, the paired gain over the first arm."""
  unit = (
    "nats per token, and share of the first arm's loss saved" if metric == "loss" else "and gain over the first arm"
  )
  rows = [[f"{metric} ({unit})", *tests], ["chance", *(f"{chance[test]:.3f}" for test in tests)]]
  for cell in cells:
    rows.append([cell.arm, *(_interval(interval(cell.scores[t])) if t in cell.scores else "failed" for t in tests)])
  for cell in cells[1:]:
    gains = []
    for test in tests:
      pair = cell.scores.get(test, []), cells[0].scores.get(test, [])
      gains.append(_interval(interval(differences(*pair, metric)), True) if all(pair) else "-")
    rows.append([f"{cell.arm} - {cells[0].arm}", *gains])
  return _columns(rows)


def _notes(cells: Sequence[Cell]) -> list[str]:
  """What a reader must know before comparing: unequal parameters, failures, updates that were dropped."""
  found = []
  for cell in cells:
    share = cell.parameters / cells[0].parameters - 1
    if abs(share) > EQUAL_PARAMETERS:
      found.append(f"  note: {cell.arm} has {share:+.1%} parameters compared with {cells[0].arm}")
    if cell.error:
      found.append(f"  note: {cell.arm} failed: {cell.error}")
    if any(cell.skipped):
      found.append(f"  note: {cell.arm} met a loss or gradient that is not finite; updates dropped: {cell.skipped}")
  return found


def _ladder(experiment: Experiment, cells: Sequence[Cell]) -> str:
  """The first rung that each arm does not pass, by mean accuracy."""
  rows = [[f"first rung below {PASS:.0%}", "mean over seeds", "by seed"]]
  for arm in dict.fromkeys(cell.arm for cell in cells):
    scores = {test: scores_of(cells, arm, test) for test in experiment.ladder}
    if not all(scores.values()):
      rows.append([arm, "failed", ""])
      continue
    first = lambda passed: next((test for test in experiment.ladder if not passed(test)), "none")
    seeds = range(len(scores[experiment.ladder[0]]))
    by_seed = [first(lambda test, s=s, scores=scores: scores[test][s] >= PASS) for s in seeds]
    mean = first(lambda test, scores=scores: interval(scores[test]).mean >= PASS)
    rows.append([arm, mean, " ".join(by_seed)])
  return _columns(rows)


def _interval(found, signed: bool = False) -> str:
  if not math.isfinite(found.mean):
    return "not finite"
  mean = f"{found.mean:+.3f}" if signed else f"{found.mean:.3f}"
  return f"{mean} ±{found.half:.3f}" if math.isfinite(found.half) else f"{mean} (one seed)"


def finite(value: Any) -> Any:
  """The same data with null for every number that is not finite."""
  if isinstance(value, dict):
    return {k: finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
