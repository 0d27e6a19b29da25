"""Comparisons with verdicts: programs of `python -m train.bench`.

python -m train.bench throughput   whole steps at the size of a real run: tok/s, utilisation, memory
python -m train.bench overhead     what logging, checkpoints and data add to the steps of a run
python -m train.bench optimizers   steps and seconds to one validation loss on text, learning rates tuned alike
python -m train.bench step         cost of a training step with each optimizer, measured and counted
python -m train.bench stiff        quadratics of condition 1e2 to 1e6 at equal cost
python -m train.bench regime       schedules on a stream whose target jumps
"""

import importlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from mgr_jax.problems import Problem, UserError
from train.metrics import dumps


class Race(NamedTuple):
  """A module with `run(**flags, say=...) -> dict` and `report(dict) -> str`; flags as name -> (default, help)."""

  module: str
  flags: dict[str, tuple[Any, str]]


_SEEDS = "Seeds that every arm runs on; at least 2, for an interval."
RACES = {
  "throughput": Race(
    "train.races.throughput",
    {
      "attention": ((), "Attention pattern; repeatable. Default: every mechanism, and on a GPU cuDNN's attention."),
      "seq_len": ((1024, 4096), "Context; repeatable."),
      "tokens": (32_768, "Tokens per update, at every length."),
      "optimizer": ("adamw", "Optimizer."),
      "compute_dtype": ("bfloat16", "Type of activations and matrix products."),
      "n_layer": (12, "Layers."),
      "n_head": (6, "Heads."),
      "n_embd": (768, "Width."),
      "vocab_size": (50_304, "Vocabulary."),
      "rounds": (10, "Timed rounds."),
    },
  ),
  "overhead": Race(
    "train.races.overhead",
    {
      "attention": ("standard", "Mechanism of each layer."),
      "optimizer": ("adamw", "Optimizer."),
      "n_layer": (4, "Layers."),
      "n_head": (4, "Heads."),
      "n_embd": (128, "Width."),
      "seq_len": (256, "Context."),
      "batch_size": (8, "Sequences per update."),
      "steps": (1, "Steps that an arm takes in a row; many on an accelerator."),
      "rounds": (600, "Timed rounds; at least 2, for an interval."),
    },
  ),
  "optimizers": Race(
    "train.races.language",
    {"seeds": (3, _SEEDS), "steps": (300, "Updates per run."), "arms": ([], "Arms to run; default: all.")},
  ),
  "step": Race(
    "train.races.step_cost",
    {
      "attention": ("standard", "Mechanism of each layer."),
      "n_layer": (4, "Layers."),
      "n_head": (4, "Heads."),
      "n_embd": (128, "Width."),
      "seq_len": (256, "Context."),
      "vocab_size": (4096, "Vocabulary."),
      "batch_size": (8, "Sequences per update."),
      "rounds": (20, "Timed rounds."),
    },
  ),
  "stiff": Race("train.races.stiff", {"seeds": (5, _SEEDS)}),
  "regime": Race("train.races.regime", {"seeds": (20, _SEEDS), "steps": (20_000, "Samples per stream.")}),
}


def program(name: str) -> tuple[Callable[[list[str]], int], flags.FlagValues]:
  """The main function and the flags of a race."""
  race, fv = RACES[name], flags.FlagValues()
  for flag, (default, text) in race.flags.items():
    if isinstance(default, int):
      flags.DEFINE_integer(flag, default, text, lower_bound=2 if flag == "seeds" else 1, flag_values=fv)
    elif isinstance(default, tuple):
      define = flags.DEFINE_multi_integer if default else flags.DEFINE_multi_string
      define(flag, list(default), text, flag_values=fv)
    else:
      define = flags.DEFINE_list if isinstance(default, list) else flags.DEFINE_string
      define(flag, default, text, flag_values=fv)
  flags.DEFINE_string("json", "", "Write everything that was measured to this file.", flag_values=fv)

  def main(argv: list[str]) -> int:
    if argv[1:] != [name]:
      raise UserError(Problem(f"more than one benchmark: {' '.join(argv[1:])}", f"python -m train.bench {name}"))
    if fv.json and not os.path.isdir(os.path.dirname(os.path.abspath(fv.json))):
      raise UserError(Problem(f"--json={fv.json}: its folder does not exist", "create the folder first"))
    start = time.perf_counter()
    module = importlib.import_module(race.module)
    settings = {flag: fv[flag].value for flag in race.flags}
    result = module.run(**settings, say=lambda text: print(f"  {text}", flush=True))
    print(f"\n{module.report(result)}\n\n{time.perf_counter() - start:.0f} s in all")
    if fv.json:
      from train import bench

      with open(fv.json, "w", encoding="utf-8") as f:
        f.write(dumps({"race": name, "machine": bench.machine(), "settings": settings, **result}, indent=2) + "\n")
    return 0

  return main, fv
