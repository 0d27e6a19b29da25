"""Trains a GPT: `python -m train.main --attention=standard --max_steps=200`.

Without arguments it trains a small model on a corpus made from this Python's own documentation and library sources.
Writes `<workdir>/<run_id>/`; the same command with the same --run_id goes on where an interrupted run stopped.
"""

import os
from pathlib import Path

import jax
from absl import flags

from mgr_jax.data.builtin import cache_dir
from mgr_jax.problems import Problem, UserError
from train import cli
from train import flags as train_flags

FLAGS = flags.FlagValues()
train_flags.define(FLAGS)


def main(argv: list[str]) -> int:
  del argv
  from train import distributed, loop  # slow to import, and not needed to explain a wrong flag

  settings = train_flags.from_flags(FLAGS)
  distributed.start(settings.coordinator, settings.num_processes, settings.process_id)
  cache_compiled_programs(settings.compile_cache)
  return loop.run(settings).exit_code


def cache_compiled_programs(where: str = "auto") -> None:
  """Keeps compiled programs, so that a resumed or repeated run starts sooner; with `none` nothing is kept.

  `auto` does nothing where JAX's own settings already name a cache, or where no directory can be made for it.

  Raises:
    UserError: a directory that was asked for cannot be made or written.
  """
  jax.config.update("jax_enable_compilation_cache", where != "none")
  if where == "none" or (where == "auto" and jax.config.jax_compilation_cache_dir is not None):
    return
  directory = cache_dir() / "compiled" if where == "auto" else Path(where).expanduser().absolute()
  try:
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
      raise PermissionError("it is not writable")
  except OSError as e:
    if where == "auto":
      return
    why = e.strerror or e
    raise UserError(Problem(f"--compile_cache={where}: {why}", "name a directory you may write to, or none")) from e
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


if __name__ == "__main__":
  cli.run(main, FLAGS)
