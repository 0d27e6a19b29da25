"""The smaller systems that a ladder trains: their configurations, what they share, and what they cost."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

from mgr_jax.algebra.scaling_probe import FULL, halved
from mgr_jax.attention import model_problems
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.problems import Problem

AXES = ("depth", "width", "data")


class Recipe(NamedTuple):
  """One model to train on all data, and the systems that its run yields: name -> share of the tokens.

  A share below 1 is a branch of the same run with a warm-down of its own.
  """

  cfg: GPTConfig
  systems: dict[str, float]


def shrunk(fields: dict, axis: str, by: int) -> dict:
  """The fields of a configuration with one axis divided; heads keep their size.

  Query heads are halved inside each group of a key/value head where the group is large enough, else whole groups are.
  """
  if axis == "depth":
    return fields | {"n_layer": fields["n_layer"] // by}
  heads, groups = fields["n_head"], fields["n_kv_head"]
  kept = groups // (by // math.gcd(heads // groups, by))
  return fields | {"n_head": heads // by, "n_kv_head": kept, "n_embd": fields["n_embd"] // by}


def doubled(cfg: GPTConfig, axis: str) -> GPTConfig:
  """`cfg` with twice the layers, or twice the width and heads."""
  if axis == "depth":
    return dataclasses.replace(cfg, n_layer=2 * cfg.n_layer)
  return dataclasses.replace(cfg, n_embd=2 * cfg.n_embd, n_head=2 * cfg.n_head, n_kv_head=2 * cfg.n_kv_head)


def cost_multipliers(cfg: GPTConfig, axes: Sequence[str]) -> dict[str, float]:
  """By how much doubling each axis multiplies the FLOPs of training: near 2 for depth, near 4 for width, 2 for data."""
  base = gpt.cost(cfg).flops
  return {axis: 2.0 if axis == "data" else gpt.cost(doubled(cfg, axis)).flops / base for axis in axes}


def divisibility_problems(fields: dict, axes: Sequence[str], quarters: bool) -> list[Problem]:
  """Which axes cannot be divided as asked."""
  by, found = (4 if quarters else 2), []
  names = [name for axis, name in (("depth", "n_layer"), ("width", "n_head")) if axis in axes]
  for name in names:
    value = fields[name]
    if value % by == 0 and value > 0:
      continue
    works = f"use --{name}={max(1, -(-value // by)) * by}"
    halves = (
      ", or --quarters=false, which gives intervals instead of predictions" if quarters and value % 2 == 0 else ""
    )
    what = f"--{name}={value} is not divisible by {by}, so its {'quarter' if quarters else 'half'} cannot be built"
    found.append(Problem(what, works + halves))
  return found


def recipes(fields: dict, axes: Sequence[str], quarters: bool) -> tuple[list[Recipe], list[Problem]]:
  """What to train for the halves, quarters and pairs of halves of `axes`, or what keeps a model from being built."""
  models = {FULL: fields}
  shape_axes = [axis for axis in AXES if axis in axes and axis != "data"]
  for axis in shape_axes:
    models[halved(axis)] = shrunk(fields, axis, 2)
    if quarters:
      models[halved(axis, by=4)] = shrunk(fields, axis, 4)
  for pair in itertools.combinations(shape_axes, 2):
    models[halved(*pair)] = shrunk(shrunk(fields, pair[0], 2), pair[1], 2)
  defaults = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
  problems = dict.fromkeys(p for m in models.values() for p in model_problems(SimpleNamespace(**(defaults | m))))
  if problems:
    return [], list(problems)
  found = []
  for name, model in models.items():
    systems = {name: 1.0}
    if "data" in axes and name == FULL:
      systems |= {halved("data"): 0.5} | ({halved("data", by=4): 0.25} if quarters else {})
    elif "data" in axes and name in map(halved, shape_axes):
      systems[halved(name.removesuffix("/2"), "data")] = 0.5
    found.append(Recipe(GPTConfig(**model), systems))
  return found, []


def relative_cost(recipe: Recipe, full: GPTConfig, warmdown: float) -> float:
  """FLOPs of a recipe in units of the full system's run; a branch costs its warm-down alone."""
  steps = sum(share if share == 1 else warmdown * share for share in recipe.systems.values())
  return steps * gpt.cost(recipe.cfg).flops / gpt.cost(full).flops
