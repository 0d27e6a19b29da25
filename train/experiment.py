"""Controlled comparisons. `python -m train.experiment NAME` trains every arm on every seed and judges predictions.

Arms see the same data on the same seed, have as many parameters as their widest sibling, and share optimizer, schedule
and number of updates. A prediction is supported or not supported only if the 95% interval of the paired differences
says so and neither floor nor ceiling explains the result; otherwise it is inconclusive.
"""

import json
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from absl import flags

from mgr_jax.attention import model_problems
from mgr_jax.config import GPTConfig
from mgr_jax.problems import Problem, UserError, raise_if_any
from train import cli
from train.bench import machine
from train.experiments import EXPERIMENTS, find, report
from train.experiments.records import Experiment
from train.experiments.training import Cell, configurations, fill, model_fields, new_cell

FLAGS = flags.FlagValues()
flags.DEFINE_integer("seeds", 5, "Runs of every arm, on seeds 0, 1, ...", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("steps", 0, "Updates per run; 0 takes the experiment's.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_boolean(
  "tune",
  False,
  "First pick each arm's learning rate from 0.3, 1 and 3 times the default, on a seed of its own.",
  flag_values=FLAGS,
)
flags.DEFINE_string("json", "", "Write everything that was measured to this file.", flag_values=FLAGS)
flags.DEFINE_boolean("list", False, "Print the experiments and stop.", flag_values=FLAGS)


class Outcome(NamedTuple):
  """Cells in the order of tasks and arms, and the chance level of every test."""

  cells: list[Cell]
  chance: dict[str, float]


def check(experiment: Experiment) -> None:
  """Raises one `UserError` with everything that keeps an arm from being built."""
  defaults = {name: field.default for name, field in GPTConfig.__dataclass_fields__.items()}
  fields = (model_fields(experiment, task, arm) for task in experiment.tasks for arm in experiment.arms_of(task))
  raise_if_any(dict.fromkeys(p for f in fields for p in model_problems(SimpleNamespace(**(defaults | f)))))


def run(
  experiment: Experiment, seeds: int, steps: int = 0, tune: bool = False, say: Callable[[str], None] = lambda text: None
) -> Outcome:
  """Trains every arm of every task on seeds 0 .. `seeds`-1; `say` hears one line per finished cell.

  An arm that raises is recorded with its error, and the others go on.
  """
  check(experiment)
  cells, chance = [], {}
  for task in experiment.tasks:
    configs, data = configurations(experiment, task), task.data()
    chance |= task.chance(data)
    for arm in experiment.arms_of(task):
      cfg = configs[arm.name]
      cells.append(cell := new_cell(task, arm, cfg))
      try:
        fill(cell, experiment, task, arm, cfg, data, seeds, steps or experiment.steps, tune)
      except Exception as e:
        cell.error = f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
        cell.scores = {}
      say(report.line(cell))
  return Outcome(cells, chance)


def as_json(experiment: Experiment, outcome: Outcome, settings: dict[str, Any]) -> dict[str, Any]:
  """Strict JSON: what is not finite becomes null."""
  return report.finite(
    {
      "experiment": experiment.name,
      "question": experiment.question,
      "limits": experiment.limits,
      "machine": machine(),
      "settings": settings,
      "metric": experiment.metric,
      "chance": outcome.chance,
      "cells": [vars(cell) for cell in outcome.cells],
      "predictions": report.judged(experiment, outcome.cells, outcome.chance),
    }
  )


def main(argv: list[str]) -> int:
  """Returns 1 when an arm could not run; verdicts do not change the exit code."""
  if FLAGS.list:
    for name, experiment in EXPERIMENTS.items():
      print(f"{name:<22} {experiment.question}")
    return 0
  if len(argv) < 2:
    raise UserError(Problem("no experiment named", f"python -m train.experiment NAME, one of {', '.join(EXPERIMENTS)}"))
  experiment = find(argv[1])
  if FLAGS.json and not os.path.isdir(os.path.dirname(os.path.abspath(FLAGS.json))):
    raise UserError(Problem(f"--json={FLAGS.json}: its folder does not exist", "create the folder first"))
  start = time.perf_counter()
  print(f"{experiment.name}: {experiment.question}", flush=True)
  outcome = run(experiment, FLAGS.seeds, FLAGS.steps, FLAGS.tune, lambda text: print(f"  {text}", flush=True))
  print(report.text(experiment, outcome.cells, outcome.chance))
  print(f"\n{time.perf_counter() - start:.0f} s in all")
  if FLAGS.json:
    settings = {"seeds": FLAGS.seeds, "steps": FLAGS.steps or experiment.steps, "tune": FLAGS.tune}
    settings |= {"batch_size": experiment.batch_size, "test_rows": experiment.test_rows, **experiment.model}
    with open(FLAGS.json, "w", encoding="utf-8") as f:
      json.dump(as_json(experiment, outcome, settings), f, indent=2, allow_nan=False)
  return 1 if any(cell.error for cell in outcome.cells) else 0


if __name__ == "__main__":
  cli.run(main, FLAGS, max_args=1)
