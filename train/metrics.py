"""`metrics.jsonl`, where each step stands once however often the run was interrupted, and the time between lines."""

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from mgr_jax.data import files

Record = dict[str, Any]


def strict(value):
  """`value` as strict JSON can hold it: array scalars as Python's, non-finite numbers as strings, tuples as lists.

  A float32 becomes the double of the same value, whose shortest decimal form reads back to the same bits.
  """
  if isinstance(value, dict):
    return {str(k): strict(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [strict(v) for v in value]
  if isinstance(value, (str, bool, int, type(None))):
    return value
  if hasattr(value, "tolist"):
    return strict(np.asarray(value).tolist())
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  return str(value)


def dumps(value, indent: int | None = None) -> str:
  """Strict JSON of anything `strict` accepts."""
  return json.dumps(strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


class MetricsLog:
  """The records of a run, in a file that a killed process leaves readable.

  Log records have `loss`, validation records `val_bpb`, event records `event`; all have `step`, the updates done.
  """

  def __init__(self, path: Path, keep_to: int | None = None, tensorboard: Path | None = None):
    """Opens `path`: empty when `keep_to` is None, else without a torn last line and the records after step `keep_to`.

    With `tensorboard`, numbers also go to event files in that directory.
    """
    self.records: list[Record] = []
    if keep_to is not None:
      self.records = [r for r in read_records(path) if r["step"] <= keep_to]
    self._path = path
    self._file = self._rewritten()
    self._torn = False
    self._board = None
    if tensorboard is not None:
      import tensorboardX  # an extra: the caller has checked that it is installed

      self._board = tensorboardX.SummaryWriter(str(tensorboard), purge_step=0 if keep_to is None else keep_to + 1)

  def write(self, record: Record) -> None:
    """Appends one record and hands it to the operating system.

    Raises `OSError` when that fails; the record is kept, and written with the first one that can be.
    """
    record = strict(record)
    self.records.append(record)
    if self._torn:
      file = self._rewritten()
      self._file.close()
      self._file, self._torn = file, False
    else:
      self._torn = True
      self._file.write((dumps(record) + "\n").encode("utf-8"))
      self._torn = False
    if self._board is not None:
      for name, value in record.items():
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
          self._board.add_scalar(name, value, record["step"])

  def _rewritten(self) -> io.FileIO:
    """Writes all records to the file, atomically, and opens it for more, unbuffered: nothing is written late."""
    files.write_text(self._path, "".join(dumps(r) + "\n" for r in self.records))
    return io.FileIO(self._path, "a")

  def select(self, field: str) -> list[Record]:
    """The records that have `field`."""
    return [r for r in self.records if field in r]

  def close(self) -> None:
    self._file.close()
    if self._board is not None:
      self._board.close()


def read_records(path: Path) -> list[Record]:
  """The records of a `metrics.jsonl`; a last line that a crash has torn is left out. Empty when there is no file."""
  records = []
  if path.exists():
    for line in path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]:
      try:
        records.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return records


class Meter:
  """Wall time of training, in laps from log line to log line, without the time between `pause` and `resume`."""

  def __init__(self, tokens_per_step: int):
    self._tokens_per_step = tokens_per_step
    self._resumed_at: float | None = None
    self._elapsed = self._waited = 0.0
    self.laps: list[tuple[int, float, float]] = []  # steps, seconds, seconds of waiting for data

  def resume(self) -> None:
    self._resumed_at = time.perf_counter()

  def pause(self) -> None:
    if self._resumed_at is not None:
      self._elapsed += time.perf_counter() - self._resumed_at
      self._resumed_at = None

  def wait(self, seconds: float) -> None:
    """Counts `seconds` of waiting for data."""
    self._waited += seconds

  def lap(self, steps: int) -> Record:
    """Ends a lap in which `steps` steps have finished; returns its figures."""
    running = self._resumed_at is not None
    self.pause()
    seconds, waited = max(self._elapsed, 1e-9), self._waited
    self.laps.append((steps, seconds, waited))
    self._elapsed = self._waited = 0.0
    if running:
      self.resume()
    return {
      "tokens_per_s": self._tokens_per_step * steps / seconds,
      "step_ms": 1e3 * seconds / steps,
      "data_wait_ms": 1e3 * waited / steps,
    }

  def totals(self) -> Record:
    """Figures of the whole run; the first lap, which warms up caches, is left out when there are others.

    `step_ms` holds quantiles over steps, where all steps of a lap count with the lap's mean.
    """
    laps = self.laps[1:] or self.laps
    steps, seconds, waited = (sum(column) for column in zip(*laps, strict=True)) if laps else (0, 0.0, 0.0)
    if not steps:
      return {"tokens_per_s": None, "step_ms": None, "data_wait_frac": None}
    step_ms = np.repeat([1e3 * s / n for n, s, _ in laps], [n for n, _, _ in laps])
    return {
      "tokens_per_s": self._tokens_per_step * steps / seconds,
      "step_ms": {"p50": float(np.quantile(step_ms, 0.5)), "p95": float(np.quantile(step_ms, 0.95))},
      "data_wait_frac": waited / seconds,
    }
