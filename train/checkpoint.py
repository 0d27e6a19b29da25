"""Checkpoints of a run: written in the background, atomic, verified when read, and refused where they do not fit."""

import contextlib
import gc
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mgr_jax.problems import Problem, UserError, raise_if_any
from train import distributed
from train.fingerprint import fingerprints, table
from train.identity import listed, tree_problems

SCHEMA = "mgr_jax.checkpoint.v1"
SUBDIRECTORY = "checkpoints"
_TEMPORARY = ".orbax-checkpoint-tmp"
_PRUNED = ".pruned"  # a step leaves its place by one rename, so that a kill never leaves half of one


class Checkpoints:
  """The checkpoints in one directory, `<directory>/<step>/`.

  Args:
    directory: made by the first `save`.
    keep: how many of the newest to keep, beside the one with the lowest `val_bpb`.

  Raises:
    UserError: the directory has numbered entries that are not checkpoints of this program; pruning would delete them.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 3):
    self.directory = Path(directory).expanduser().absolute()
    self.failures: list[Problem] = []
    score = lambda metrics: metrics["val_bpb"]
    kept = checkpoint_managers.LatestN(keep), checkpoint_managers.BestN(get_metric_fn=score, reverse=True, n=1)
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
      best_fn=score,
      best_mode="min",
      todelete_subdir=_PRUNED,
    )
    self._manager: ocp.CheckpointManager | None = None
    ours = lambda p: (p / "meta").is_dir() or (p / "params").is_dir()
    foreign = [p.name for p in self._entries() if p.name.isdecimal() and not ours(p)]
    if foreign:
      raise UserError(
        Problem(
          f"{self.directory} holds {listed(foreign)}, not written by this program as checkpoints",
          "choose another --workdir or --run_id",
        )
      )

  def steps(self) -> list[int]:
    """The finished steps, ascending. A step gets its name when it is complete, so a torn one is never among them."""
    return sorted(int(p.name) for p in self._entries() if p.name.isdecimal())

  def latest_step(self) -> int | None:
    """The newest finished step, or None."""
    return max(self.steps(), default=None)

  def save(
    self, step: int, state, data_state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
  ) -> None:
    """Copies the state from the devices and writes it in the background; the state may be donated right after.

    Args:
      state: a `TrainState`.
      data_state: JSON-able state of the data iterator; of several processes, the list of their states.
      meta: JSON-able description of the run, see `make_meta`.
      metrics: `{"val_bpb": ...}` if this step was validated.

    A step that is already there is left as it is. A failed write does not raise: training goes on, and the `Problem` is
    appended to `failures` by the next `save`, `wait` or `close`.

    Raises:
      UserError: there are newer steps, which belong to another course of the run.
    """
    self.wait()
    newest = self.latest_step()
    if newest is not None and step < newest:
      raise UserError(
        Problem(
          f"{self.directory} already has step {newest}, newer than {step}",
          "give the run that starts from an older step its own --run_id",
        )
      )
    if step == newest:
      return
    parts = _parts(state)
    tree = {name: [spec, mark] for (name, spec), mark in zip(table(parts).items(), fingerprints(parts), strict=True)}
    body = json.loads(json.dumps({"meta": meta, "data": data_state, "tree": tree}, allow_nan=False))
    arrays = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
    record = ocp.args.JsonSave({"schema": SCHEMA, "crc32": _crc32(body), "body": body})
    score = (metrics or {}).get("val_bpb", math.inf)  # what was not validated is never the best
    metrics = {"val_bpb": score if math.isfinite(score) else math.inf}
    try:
      # Orbax's own threads would wait for minutes on a directory in which nothing can be made.
      if distributed.leads():
        probe = self.directory / f".write-test-{os.getpid()}"
        probe.mkdir(parents=True)
        probe.rmdir()
      self._writer().save(step, args=ocp.args.Composite(**arrays, meta=record), metrics=metrics, force=True)
    except Exception as e:  # whatever the disk did, it must not stop the training
      self._failed(e)

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """The `meta` given to `save`; of the newest step by default. Raises `UserError` as `restore` does."""
    return self._body(self.existing_step(step))["meta"]

  def restore(self, abstract_state, step: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Returns `(state, data_state, meta)` of a step, the newest by default; arrays are bitwise those saved.

    Args:
      abstract_state: a `TrainState` of arrays or `jax.ShapeDtypeStruct`s. Their shardings say where the arrays go,
        whatever devices they were saved from; without one they go to the default device.

    Raises:
      UserError: no finished step; no such step; damaged files; leaves that differ in name, shape or type.
    """
    step = self.existing_step(step)
    parts = self._arrays(step, _parts(abstract_state))
    body = self._body(step)
    return abstract_state.replace(params=parts["params"], **parts["state"]), body["data"], body["meta"]

  def restore_params(self, abstract_params, step: int | None = None):
    """The parameters alone, as `restore` does it."""
    return self._arrays(self.existing_step(step), {"params": abstract_params})["params"]

  def wait(self) -> None:
    """Returns when the last save is on disk, or has failed."""
    if self._manager is not None:
      try:
        self._manager.wait_until_finished()
      except Exception as e:
        self._failed(e)
      if distributed.leads():
        shutil.rmtree(self.directory / _PRUNED, ignore_errors=True)

  def close(self) -> None:
    """Waits, then stops the background threads."""
    self.wait()
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _entries(self) -> list[Path]:
    return sorted(self.directory.iterdir()) if self.directory.is_dir() else []

  def _writer(self) -> ocp.CheckpointManager:
    if self._manager is None:
      for entry in self._entries() if distributed.leads() else ():
        if entry.name.endswith(_TEMPORARY) or entry.name == _PRUNED:
          shutil.rmtree(entry, ignore_errors=True)
      distributed.meet()
      self._manager = ocp.CheckpointManager(self.directory, options=self._options)
    return self._manager

  def _failed(self, e: Exception) -> None:
    self.failures.append(
      Problem(
        f"a checkpoint could not be written to {self.directory}: {_reason(e)}",
        "free space on that disk, or choose another --workdir",
      )
    )

  def existing_step(self, step: int | None = None) -> int:
    """`step`, or the newest finished step. Raises `UserError` when it is not there."""
    steps = self.steps()
    if not steps:
      unfinished = [p.name for p in self._entries() if p.name.endswith(_TEMPORARY)]
      others = [p.name for p in self._entries() if not p.name.endswith(_TEMPORARY)]
      if not self.directory.is_dir():
        there = "the directory does not exist"
      else:
        there = f"unfinished: {listed(unfinished)}; other entries: {listed(others)}"
      raise UserError(
        Problem(
          f"{self.directory} has no finished checkpoint ({there})", "name a run that has one, or use --resume=none"
        )
      )
    if step is not None and step not in steps:
      fix = f"use one of {', '.join(map(str, steps))}"
      raise UserError(Problem(f"{self.directory} has no step {step}", fix))
    return steps[-1] if step is None else step

  def _body(self, step: int) -> dict[str, Any]:
    record = self._read(step, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
      where = self.directory / str(step)
      found = record.get("schema") if isinstance(record, dict) else None
      raise UserError(
        Problem(
          f"{where} has schema {found!r}, this program reads {SCHEMA!r}",
          "name a run of this program, or use the version that wrote it",
        )
      )
    if record.get("crc32") != _crc32(record.get("body")):
      raise self._damaged(step, "the checksum of its description is wrong")
    return record["body"]

  def _arrays(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    saved = {n: v for n, v in self._body(step)["tree"].items() if n.partition("/")[0] in abstract}
    current = table(abstract)
    where = str(self.directory / str(step))
    raise_if_any(tree_problems({name: spec for name, (spec, _) in saved.items()}, current, where))
    default = jax.device_put(0).sharding
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default), abstract
    )
    parts = self._read(step, **{name: ocp.args.StandardRestore(part) for name, part in target.items()})
    parts = {name: parts[name] for name in target}
    wrong = [n for n, mark in zip(current, fingerprints(parts), strict=True) if saved[n][1] != mark]
    if wrong:
      raise self._damaged(step, f"wrong checksum of {listed(wrong)}")
    return parts

  def _read(self, step: int, **items) -> Mapping[str, Any]:
    why = ""
    with _quiet_coroutines():
      try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
          return reader.restore(self.directory / str(step), args=ocp.args.Composite(**items))
      except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # the device is at fault, not the files
      except Exception as e:  # Orbax, TensorStore and JSON have no common error for a file that is missing or cut
        why = _reason(e)
      time.sleep(0.2)  # the reads of the other leaves are still under way
      gc.collect()
    raise self._damaged(step, why)

  def _damaged(self, step: int, why: str) -> UserError:
    earlier = max((s for s in self.steps() if s < step), default=None)
    instead = "there is no earlier one; start again with --resume=none"
    if earlier is not None:
      instead = f"use the one before it, {self.directory.parent}@{earlier}"
    return UserError(Problem(f"checkpoint {self.directory / str(step)} is damaged: {why}", instead))


def _parts(state) -> dict[str, Any]:
  """The parameters, and everything else by field name, so that the former can be read alone."""
  return {"params": state.params, "state": {k: v for k, v in vars(state).items() if k != "params"}}


def _crc32(body) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _reason(e: BaseException) -> str:
  """The first line of the error that started it."""
  while e.__cause__ is not None:
    e = e.__cause__
  line = next(iter(str(e).splitlines()), "")
  return f"{type(e).__name__}: {line[:300]}"


@contextlib.contextmanager
def _quiet_coroutines():
  """Orbax reads leaves concurrently; if one fails, Python prints the errors of the others when it collects them."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
  try:
    yield
  finally:
    sys.unraisablehook = hook
