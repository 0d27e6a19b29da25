"""Options of mechanisms that change during training: their values, how they move, and configurations that hold them.

Values are a dict of float32 scalars by `stack.annealed_keys`, part of the training state. A trained model needs no
schedule: `frozen` writes the live numbers into the attention grammar.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax import homotopy
from mgr_jax.attention import resolve, with_options
from mgr_jax.config import GPTConfig
from mgr_jax.homotopy import Homotopy
from mgr_jax.model import stack
from mgr_jax.problems import Problem

SNAP = 0.05  # share of the updates, at the end, for which `final=snap` options hold


def courses(cfg: GPTConfig) -> dict[str, Homotopy]:
  """The course of every value, by key."""
  found = {}
  for run in stack.runs(cfg):
    named = run.mechanism.annealed(run.options)
    found |= {key: named[option] for option, key in stack.annealed_keys(run).items()}
  return found


def init(cfg: GPTConfig) -> dict[str, jax.Array]:
  """The values of the first step."""
  return {key: homotopy.init(course) for key, course in courses(cfg).items()}


def readings(aux: dict[str, jax.Array], cfg: GPTConfig) -> dict[str, jax.Array]:
  """What closed-loop courses look at: the `coverage` that their mechanism reports, mean over its layers."""
  closed = [key for key, course in courses(cfg).items() if course.kind == "coverage"]
  return {key: jnp.mean(aux[f"{key.partition('.')[0]}/coverage"]) for key in closed}


def update(values, cfg: GPTConfig, step: jax.Array, total_steps: int, measured, event: jax.Array):
  """The values of the next step; a value that `cfg` has no course for stays.

  Args:
    step: int32, the number of the update that was just made, from 0.
    measured: `readings` of that update.
    event: True when the schedule reported a limit event.
  """
  moved = {
    key: homotopy.update(course, values[key], step, total_steps, measured.get(key, jnp.nan), event)
    for key, course in courses(cfg).items()
  }
  return values | moved


def frozen(cfg: GPTConfig, values) -> GPTConfig:
  """`cfg` with every annealed option at its live number; the same parameter tree."""
  layers = []
  for run in stack.runs(cfg):
    live = {option: _number(values[key]) for option, key in stack.annealed_keys(run).items()}
    layers += [dataclasses.replace(run.options, **live)] * run.n_layer
  return with_options(cfg, layers)


def _number(value) -> str:
  """The shortest text that reads back to the same float32."""
  return np.format_float_positional(np.float32(value), trim="-")


def snapped(cfg: GPTConfig) -> GPTConfig:
  """`cfg` as it trains in the last `SNAP` of its updates; `cfg` itself when nothing snaps."""
  layers = resolve(cfg)
  options = [layer.mechanism.snapped(layer.options) for layer in layers]
  return cfg if options == [layer.options for layer in layers] else with_options(cfg, options)


def snap_step(cfg: GPTConfig, total_steps: int) -> int:
  """The first update that trains `snapped(cfg)`; `total_steps` when nothing snaps."""
  return total_steps if snapped(cfg) == cfg else total_steps - max(1, round(SNAP * total_steps))


def problems(cfg: GPTConfig, schedule: str) -> list[Problem]:
  """What is wrong with the courses of `cfg` under the learning-rate schedule of that name."""
  found = []
  if schedule != "ordinal" and any(course.kind == "ordinal" for course in courses(cfg).values()):
    what = f"--attention={cfg.attention!r} follows the ordinal schedule, but --schedule={schedule}"
    found.append(Problem(what, "add --schedule=ordinal, or use linear:B0:B1 or exp:B0:B1 instead of ordinal:B0:BMAX"))
  if len(stack.runs(frozen(cfg, dict.fromkeys(courses(cfg), 1.0)))) != len(stack.runs(cfg)):
    what = f"--attention={cfg.attention!r}: neighbouring layers differ only in the course of an annealed option"
    found.append(Problem(what, "give neighbouring layers of one mechanism the same course"))
  return found
