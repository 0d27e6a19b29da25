"""What logging, checkpoints and data loading add to the steps of a run, measured by switching them off.

Each arm is the training program itself on the builtin corpus. The arms take `steps` steps in turns, so drift of the
machine cancels; a log line comes every 10 steps, a checkpoint every 50, and its writing in the background counts until
it is finished. Without data, one batch is repeated. Everything up to the first checkpoint, which compiles, is not
counted. The overhead of a round is the difference to the arm with all switched off, over that arm's mean. That all of
them together cost at most 5% is supported when the 95% interval over rounds lies below that, and not supported when it
lies above. On a CPU that others use as well, the processor time of this process, which comes in a column of its own,
says more.

One step at a time is what resolves most on such a machine, and bounds the overhead from above: nothing overlaps with
the next step. On an accelerator, where all of it should, let an arm take many.
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
from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED, interval
from train.flags import Settings
from train.journal import Journal
from train.plan import make_plan
from train.resume import Start
from train.signals import StopSignals

LOG_EVERY, SAVE_EVERY, NEVER = 10, 50, 1_000_000_000
LIMIT = 0.05


class Arm(NamedTuple):
  """What is switched on."""

  logging: bool = True
  checkpoints: bool = True
  data: bool = True


ALL_OFF = "all off"
ALL_ON = "all on"
ARMS = {
  ALL_OFF: Arm(False, False, False),
  ALL_ON: Arm(),
  "logging": Arm(True, False, False),
  "checkpoints": Arm(False, True, False),
  "data": Arm(False, False, True),
}


class _OneBatch:
  """The first batch of a stream, again and again."""

  epoch = 0.0

  def __init__(self, batches):
    self._batch, self.get_state = next(batches), batches.get_state

  def __next__(self):
    return self._batch


def run(steps: int, rounds: int, say: Callable[[str], Any] = print, **fields) -> dict[str, Any]:
  """One row per arm: seconds per step in every round, wall and processor, and mean ± half width of the overhead.

  Args:
    fields: of `Settings`.

  Raises:
    UserError: a run that cannot start.
  """
  with tempfile.TemporaryDirectory() as folder:
    arms = {name: _trainer(Path(folder), name, arm, steps, rounds, fields) for name, arm in ARMS.items()}
    said = max(1, rounds // 20)
    wall, cpu = {name: [] for name in ARMS}, {name: [] for name in ARMS}
    for i in range(rounds + 1):
      for name, (trainer, _) in arms.items():
        begun = time.perf_counter(), time.process_time()
        trainer.take_steps(StopSignals(), until=trainer.step + steps if i else SAVE_EVERY)
        jax.block_until_ready(trainer.state)
        trainer.checkpoints.wait()
        if i:
          wall[name].append((time.perf_counter() - begun[0]) / steps)
          cpu[name].append((time.process_time() - begun[1]) / steps)
      if i and i % said == 0:
        say(f"round {i} of {rounds}, ms per step: " + ", ".join(f"{n} {1e3 * np.mean(s):.1f}" for n, s in wall.items()))
    for trainer, batches in arms.values():
      trainer.checkpoints.close()
      trainer.journal.close()
      batches.close()
  rows = []
  for name in ARMS:
    found, of_cpu = (interval(_overheads(seconds[name], seconds[ALL_OFF])) for seconds in (wall, cpu))
    row = {"arm": name, "ms": 1e3 * float(np.mean(wall[name])), "cpu_ms": 1e3 * float(np.mean(cpu[name]))}
    row |= {"overhead": found.mean, "half": found.half, "cpu_overhead": of_cpu.mean, "cpu_half": of_cpu.half}
    rows.append(row | {"seconds": wall[name], "cpu_seconds": cpu[name]})
  return {"rows": rows, "verdict": verdict(next(row for row in rows if row["arm"] == ALL_ON))}


def _overheads(seconds, base) -> np.ndarray:
  """Per round, over the mean of the base: with single rounds below the line, their noise would look like overhead."""
  return np.subtract(seconds, base) / np.mean(base)


def verdict(row: dict[str, Any]) -> str:
  """What the interval of an overhead says of the limit."""
  low, high = row["overhead"] - row["half"], row["overhead"] + row["half"]
  return SUPPORTED if high <= LIMIT else REFUTED if low > LIMIT else INCONCLUSIVE


def _trainer(folder: Path, name: str, arm: Arm, steps: int, rounds: int, fields):
  """A trainer that is ready for its first step, and its batches."""
  settings = Settings(
    workdir=str(folder),
    run_id=name.replace(" ", "-"),
    max_steps=SAVE_EVERY + steps * rounds + 1,  # the last step of a run is never reached
    log_every=LOG_EVERY if arm.logging else NEVER,
    ckpt_every=SAVE_EVERY if arm.checkpoints else 0,
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
  lines = [f"{'switched on':<13}{'ms per step':>12}{'overhead, 95%':>17}{'CPU ms':>10}{'overhead, 95%':>17}"]
  percent = lambda mean, half: f"{100 * mean:+.1f}% ±{100 * half:.1f}"
  for row in result["rows"]:
    one, two = percent(row["overhead"], row["half"]), percent(row["cpu_overhead"], row["cpu_half"])
    one, two = ("", "") if row["arm"] == ALL_OFF else (one, two)
    lines.append(f"{row['arm']:<13}{row['ms']:>12.1f}{one:>17}{row['cpu_ms']:>10.1f}{two:>17}".rstrip())
  return "\n".join([*lines, "", f"all of them together cost at most {100 * LIMIT:.0f}%: {result['verdict']}"])
