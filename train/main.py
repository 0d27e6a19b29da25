"""Trains a GPT: `python -m train.main --attention=standard --max_steps=200`.

Without arguments it trains a small model on a corpus made from this Python's own documentation and library sources.
Writes `<workdir>/<run_id>/`; the same command with the same --run_id goes on where an interrupted run stopped.
"""

import contextlib

import jax
from absl import flags

from mgr_jax.data.builtin import cache_dir
from train import cli
from train import flags as train_flags

FLAGS = flags.FlagValues()
train_flags.define(FLAGS)


def main(argv: list[str]) -> int:
  del argv
  from train import loop  # slow to import, and not needed to explain a wrong flag

  cache_compiled_programs()
  return loop.run(train_flags.from_flags(FLAGS)).exit_code


def cache_compiled_programs() -> None:
  """Keeps compiled programs in the cache directory, so that a resumed or repeated run starts sooner.

  Does nothing where JAX's own settings already name a cache, or where no directory can be made for it.
  """
  directory = cache_dir() / "compiled"
  if jax.config.jax_compilation_cache_dir is None:
    with contextlib.suppress(OSError):
      directory.mkdir(parents=True, exist_ok=True)
      jax.config.update("jax_compilation_cache_dir", str(directory))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


if __name__ == "__main__":
  cli.run(main, FLAGS)
