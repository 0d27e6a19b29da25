"""The registry of experiments. A new one is its own file, exporting `EXPERIMENT`, and one name in `_FILES`."""

import importlib

from mgr_jax.config import nearest
from mgr_jax.problems import Problem, UserError
from train.experiments.records import Experiment

_FILES = (
  "tropical_capacity",
  "ultrametric_routing",
  "simplicial_triple",
  "fractal_retrieval",
  "quaternion_frames",
  "surreal_param",
  "gauge_word_problem",
  "octonion_words",
  "reversible_quality",
)

EXPERIMENTS: dict[str, Experiment] = {
  name: importlib.import_module(f"train.experiments.{name}").EXPERIMENT for name in _FILES
}


def find(name: str) -> Experiment:
  """The experiment of that name. Raises `UserError` with the nearest one."""
  if name not in EXPERIMENTS:
    hint = f"{nearest(name, list(EXPERIMENTS))}known experiments: {', '.join(EXPERIMENTS)}"
    raise UserError(Problem(f"unknown experiment {name!r}", hint))
  return EXPERIMENTS[name]
