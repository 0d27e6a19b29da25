"""Trained models by name: a run's directory holds all that is needed to use its model."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.config import GPTConfig, nearest
from mgr_jax.data import tokenizer as tokenizers
from mgr_jax.model import gpt
from mgr_jax.params import is_spec
from mgr_jax.problems import Problem, UserError, raise_if_any
from train.checkpoint import SUBDIRECTORY, Checkpoints
from train.identity import listed


class LoadedRun(NamedTuple):
  """A trained model with what is needed to use it; `params` are on the default device.

  `cfg` holds annealed options at the numbers that they had at `step`.
  """

  cfg: GPTConfig
  params: Any
  tokenizer: tokenizers.Tokenizer
  meta: dict[str, Any]
  step: int


def load_run(ref: str | os.PathLike, workdir: str | os.PathLike = "artifacts") -> LoadedRun:
  """Loads configuration, parameters and tokenizer of a run from its directory alone.

  Args:
    ref: a run id in `workdir` or the path of a run's directory, followed by `@step` for another than the newest step.

  Raises:
    UserError: no such run (with the runs there are), no such step, a damaged checkpoint, a model this version cannot
      build, or a `tokenizer.json` that is not the one the model was trained with.
  """
  directory, step = find_run(ref, workdir)
  checkpoints = Checkpoints(directory / SUBDIRECTORY)
  step = checkpoints.existing_step(step)
  meta = checkpoints.read_meta(step)
  try:
    cfg = GPTConfig(**(meta["model"] | {"attention": meta["live_attention"]}))
  except TypeError as e:
    error = f"{directory} holds a model that this version cannot build: {e}"
    raise UserError(Problem(error, "use the version that trained it")) from e
  path = directory / tokenizers.FILE_NAME
  if not path.exists():
    error = f"{directory} has no {tokenizers.FILE_NAME}, the copy of the tokenizer the model was trained with"
    raise UserError(Problem(error, f"copy the tokenizer with sha256 {meta['tokenizer_sha256']} to {path}"))
  tok = tokenizers.load(path)
  problems = (
    tokenizers.mismatch(tok, meta["tokenizer_sha256"], cfg.vocab_size, f"the checkpoint {directory}"),
    tokenizers.does_not_fit(tok, cfg.vocab_size),
  )
  raise_if_any(p for p in problems if p)
  abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), gpt.specs(cfg), is_leaf=is_spec)
  return LoadedRun(cfg, checkpoints.restore_params(abstract, step), tok, meta, step)


def find_run(ref: str | os.PathLike, workdir: str | os.PathLike = "artifacts") -> tuple[Path, int | None]:
  """The directory and the step (None: the newest) that `RUN`, `PATH`, `RUN@step` or `PATH@step` names.

  Raises:
    UserError: there is no such run; names the ones in `workdir`.
  """
  ref, workdir = os.fspath(ref), Path(workdir).expanduser()
  name, at, tail = ref.rpartition("@")
  candidates = [(ref, None)] + ([(name, int(tail))] if at and tail.isdecimal() else [])
  for run, step in candidates:
    for directory in (workdir / run, Path(run).expanduser()):
      if run and (directory / SUBDIRECTORY).is_dir():
        return directory.absolute(), step
  runs = sorted((p.parent for p in workdir.glob(f"*/{SUBDIRECTORY}")), key=lambda p: p.stat().st_mtime, reverse=True)
  names = [p.name for p in runs]
  known = f"{nearest(candidates[-1][0], names)}runs in {workdir}: {listed(names)}" if names else "train one first"
  problem = Problem(f"there is no run {ref!r}: neither a run id in {workdir.absolute()} nor a run's directory", known)
  raise UserError(problem)
