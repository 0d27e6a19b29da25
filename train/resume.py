"""Where a run starts: at step 0, at its own newest checkpoint, or at a checkpoint of another run."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mgr_jax.problems import Problem, UserError, raise_if_any
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
  settings = plan.settings
  own_step = checkpoints.latest_step()
  if settings.resume == "none" and directory.holds_a_run():
    fix = f"choose another --run_id, or leave --resume out to go on from step {own_step or 0}"
    raise UserError(Problem(f"--resume=none, but {directory.path} already holds a run", fix))
  if own_step is not None:
    source, step, own = checkpoints, own_step, True
  elif settings.resume in ("auto", "none"):
    return Start()
  else:
    path, asked = find_run(settings.resume, settings.workdir)
    source, own = Checkpoints(path / "checkpoints"), False
    step = source.latest_step() if asked is None else asked
  if not own and step >= plan.steps:
    error = f"--resume={settings.resume} is at step {step}, but the run is planned for {plan.steps} steps in all"
    raise UserError(Problem(error, f"use --max_steps={2 * step}, or an earlier step: --resume=RUN@STEP"))
  saved = source.read_meta(step)
  raise_if_any(compare_meta(saved, describe(plan, directory.run_id), settings.resume_strict))
  lineage = saved["lineage"][:-1] if own else saved["lineage"]
  return Start(step, source, own, tuple(lineage), directory.read_summary() if own else {})


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
