"""Where a run starts: at step 0, at its own newest checkpoint, or at a checkpoint of another run."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mgr_jax.problems import Problem, UserError, raise_if_any
from train import distributed
from train.artifacts import RunDirectory
from train.checkpoint import Checkpoints
from train.identity import compare_meta, make_meta
from train.plan import Plan
from train.runs import find_run


class Start(NamedTuple):
  """`step` updates are done. `source` holds the checkpoint to go on from, None at step 0.

  `own` tells that it is the run's own: then its records are kept, and `earlier` is its summary as far as it got.
  `lineage` are the runs that came before this one.
  """

  step: int = 0
  source: Checkpoints | None = None
  own: bool = False
  lineage: tuple[str, ...] = ()
  earlier: Mapping[str, Any] = MappingProxyType({})


def find_start(plan: Plan, directory: RunDirectory, checkpoints: Checkpoints) -> Start:
  """Reads what `--resume` and the run's directory say; restores nothing.

  Raises:
    UserError: the run exists and `--resume=none`; no such checkpoint; it has other settings, data or tokenizer.
  """
  find = lambda: _newest(plan, directory, checkpoints)
  start = distributed.together(find, lambda start: {"the step to go on from": start.step})
  if start.source is None:
    return start
  # Reading a checkpoint is a meeting point of all processes.
  saved = start.source.read_meta(start.step)
  raise_if_any(compare_meta(saved, describe(plan, directory.run_id), plan.settings.resume_strict))
  return start._replace(lineage=tuple(saved["lineage"][:-1] if start.own else saved["lineage"]))


def _newest(plan: Plan, directory: RunDirectory, checkpoints: Checkpoints) -> Start:
  """Which checkpoint to go on from, by the names of directories alone; its lineage is still to be read."""
  settings = plan.settings
  own_step = checkpoints.latest_step()
  if settings.resume == "none" and directory.holds_a_run():
    fix = f"choose another --run_id, or leave --resume out to go on from step {own_step or 0}"
    raise UserError(Problem(f"--resume=none, but {directory.path} already holds a run", fix))
  if own_step is not None:
    return Start(own_step, checkpoints, own=True, earlier=directory.read_summary())
  if settings.resume in ("auto", "none"):
    return Start()
  path, asked = find_run(settings.resume, settings.workdir)
  source = Checkpoints(path / "checkpoints")
  step = source.existing_step(asked)
  if step >= plan.steps:
    error = f"--resume={settings.resume} is at step {step}, but the run is planned for {plan.steps} steps in all"
    raise UserError(Problem(error, f"use --max_steps={2 * step}, or an earlier step: --resume=RUN@STEP"))
  return Start(step, source)


def describe(plan: Plan, run_id: str, lineage: tuple[str, ...] = ()) -> dict[str, Any]:
  """The `meta` of this run's checkpoints."""
  return make_meta(
    plan.cfg,
    dataclasses.asdict(plan.settings),
    tokenizer_sha256=plan.tokenizer.sha256,
    data_sha256=plan.corpus.sha256,
    run_id=run_id,
    lineage=lineage,
    data_shards=plan.data_shards,
  )
