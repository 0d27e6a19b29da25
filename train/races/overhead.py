"""What logging, checkpoints and data loading add to the steps of a run, measured by switching them off.

Each arm is the training program itself on the builtin corpus. The arms take `steps` steps in turns, so drift of the
machine cancels; a log line comes every 10 steps, a checkpoint every `steps`, and its writing in the background counts
until it is finished. Without data, one batch is repeated. The other side of every ratio is the arm with all switched
off, and the claim is that all on costs at most 5% more.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from train import loop
from train.artifacts import RunDirectory
from train.checkpoint import Checkpoints
from train.flags import Settings
from train.journal import Journal
from train.plan import make_plan
from train.resume import Start
from train.signals import StopSignals

LOG_EVERY, NEVER = 10, 1_000_000_000
LIMIT = 0.05


class Arm(NamedTuple):
  """What is switched on."""

  logging: bool = True
  checkpoints: bool = True
  data: bool = True


ALL_OFF = "all off"
ARMS = {
  ALL_OFF: Arm(False, False, False),
  "logging": Arm(True, False, False),
  "checkpoints": Arm(False, True, False),
  "data": Arm(False, False, True),
  "all on": Arm(),
}


class _OneBatch:
  """The first batch of a stream, again and again."""

  epoch = 0.0

  def __init__(self, batches):
    self._batch, self.get_state = next(batches), batches.get_state

  def __next__(self):
    return self._batch


def run(steps: int, rounds: int, say: Callable[[str], Any] = print, **fields) -> dict[str, Any]:
  """Seconds per step of every arm and round, and medians of their paired ratios to `all off`.

  Args:
    fields: of `Settings`.

  Raises:
    UserError: a run that cannot start.
  """
  with tempfile.TemporaryDirectory() as folder:
    arms = {name: _trainer(Path(folder), name, arm, steps, rounds, fields) for name, arm in ARMS.items()}
    seconds = {name: [] for name in ARMS}
    for i in range(rounds + 1):  # the first warms caches and is not counted
      for name, (trainer, _) in arms.items():
        begun = time.perf_counter()
        trainer.take_steps(StopSignals(), until=trainer.step + steps)
        jax.block_until_ready(trainer.state)
        trainer.checkpoints.wait()
        seconds[name].append((time.perf_counter() - begun) / steps)
      if i:
        now = ", ".join(f"{name} {1e3 * s[-1]:.1f}" for name, s in seconds.items())
        say(f"round {i} of {rounds}, ms per step: {now}")
    for trainer, batches in arms.values():
      trainer.checkpoints.close()
      trainer.journal.close()
      batches.close()
  counted = {name: s[1:] for name, s in seconds.items()}
  ratios = {name: np.divide(s, counted[ALL_OFF]) for name, s in counted.items()}
  rows = [
    {
      "arm": name,
      "ms": 1e3 * float(np.median(counted[name])),
      "overhead": float(np.median(ratio)) - 1,
      "least": float(np.min(ratio)) - 1,
      "most": float(np.max(ratio)) - 1,
    }
    for name, ratio in ratios.items()
  ]
  return {"rows": rows, "seconds": counted, "within_limit": rows[-1]["overhead"] <= LIMIT}


def _trainer(folder: Path, name: str, arm: Arm, steps: int, rounds: int, fields):
  """A trainer that is ready for its first step, and its batches."""
  settings = Settings(
    workdir=str(folder),
    run_id=name.replace(" ", "-"),
    max_steps=steps * (rounds + 1) + 1,  # the last step of a run is never reached
    log_every=LOG_EVERY if arm.logging else NEVER,
    ckpt_every=steps if arm.checkpoints else 0,
    val_every=-1,
    sample_every=-1,
    certify="off",
    **fields,
  )
  plan, start = make_plan(settings), Start()
  directory = RunDirectory(settings.workdir, settings.run_id)
  stream = loop.open_batches(plan)
  batches = stream if arm.data else _OneBatch(stream)
  checkpoints = Checkpoints(directory.checkpoints, settings.ckpt_keep)
  trainer = loop.Trainer(plan, directory, checkpoints, start, batches, time.perf_counter())
  trainer.journal = Journal(plan, directory, start, "silent")
  trainer.compile()
  return trainer, stream


def report(result: dict[str, Any]) -> str:
  """A table and the verdict."""
  lines = [f"{'switched on':<14}{'ms per step':>12}{'overhead':>10}{'over rounds':>20}"]
  for row in result["rows"]:
    spread = f"{100 * row['least']:+.1f}% to {100 * row['most']:+.1f}%"
    lines.append(f"{row['arm']:<14}{row['ms']:>12.1f}{100 * row['overhead']:>+9.1f}%{spread:>20}")
  verdict = "supported" if result["within_limit"] else "not supported"
  return "\n".join([*lines, "", f"all of them together cost at most {100 * LIMIT:.0f}%: {verdict}"])
