"""Trains and tests one arm on one task: one compiled program per arm, called once per seed."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mgr_jax import optim, params, schedules
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim import groups
from mgr_jax.params import fold_in_name
from mgr_jax.schedules import Schedule
from mgr_jax.step import init_train_state, make_train_step
from train.experiments.records import Arm, Experiment, Task

CURVE_POINTS = 20
EQUAL_PARAMETERS = 0.02
TUNING_SEED = 1_000_003
TUNING_SCALES = (0.3, 1.0, 3.0)


def model_fields(experiment: Experiment, task: Task, arm: Arm) -> dict[str, Any]:
  """The fields of `GPTConfig` of an arm, before its MLP is widened."""
  shape = {"vocab_size": task.vocab_size, "seq_len": task.seq_len, "attention": arm.attention}
  return {**experiment.model, **shape, **dict(arm.fields)}


def configurations(experiment: Experiment, task: Task) -> dict[str, GPTConfig]:
  """The model of each arm. MLPs of widened arms grow until all have as many parameters as the largest of them.

  Raises:
    UserError: a field or an attention pattern that is not accepted.
  """
  arms = experiment.arms_of(task)
  configs = {arm.name: GPTConfig(**model_fields(experiment, task, arm)) for arm in arms}
  counts = {name: params.count(gpt.specs(cfg)) for name, cfg in configs.items()}
  target = max((counts[arm.name] for arm in arms if arm.widened), default=0)
  for arm in arms:
    if arm.widened:
      cfg = configs[arm.name]
      per_unit = 2 * cfg.n_embd * cfg.n_layer
      hidden = cfg.mlp_dim + round((target - counts[arm.name]) / per_unit)
      # Half a unit more, so that rounding of the ratio cannot lose one.
      configs[arm.name] = dataclasses.replace(cfg, mlp_ratio=(hidden + 0.5) / cfg.n_embd)
  return configs


def freeze(
  optimizer: optax.GradientTransformationExtraArgs, specs, names: Iterable[str]
) -> optax.GradientTransformationExtraArgs:
  """`optimizer`, without any update (weight decay included) of parameters whose path ends in one of `names`.

  Raises:
    ValueError: a name that no parameter has.
  """
  names = set(names)
  last = [path.rsplit("/", 1)[-1] for path in params.leaf_names(specs)]
  if names - set(last):
    raise ValueError(f"no parameter is called {', '.join(sorted(names - set(last)))}; there are {sorted(set(last))}")
  tree = jax.tree.structure(specs, is_leaf=params.is_spec)
  return groups.freeze(optimizer, jax.tree.unflatten(tree, [name in names for name in last]))


def scaled(schedule: Schedule, scale: jax.Array) -> Schedule:
  """`schedule` times a number that may be traced: one program serves every learning rate."""

  def update(state, loss):
    state, multiplier, event = schedule.update(state, loss)
    return state, scale * multiplier, event

  return schedule._replace(update=update)


def make_run(experiment: Experiment, task: Task, arm: Arm, cfg: GPTConfig, steps: int):
  """`run(seed, lr_scale, data) -> {"scores", "curve", "skipped"}`, to be jitted.

  Batches and tests depend on the seed alone, so that arms are compared on the same data; initial values depend on the
  seed and the names of the parameters. `skipped` counts updates after the first that was not finite.
  """
  specs = gpt.specs(cfg)
  optimizer = freeze(optim.make_optimizer("adamw", specs, cfg), specs, arm.frozen)
  schedule = schedules.make_schedule("wsd", steps)
  stride = max(1, steps // CURVE_POINTS)

  def run(seed, lr_scale, data):
    rated = scaled(schedule, lr_scale)
    step = make_train_step(cfg, optimizer, rated, total_steps=steps)
    key = jax.random.key(seed)
    train_key = fold_in_name(key, "train batches")

    def body(state, i):
      batch = task.train(jax.random.fold_in(train_key, i), experiment.batch_size, data)
      state, metrics = step(state, batch)
      return state, metrics["loss"]

    state, losses = jax.lax.scan(body, init_train_state(cfg, optimizer, rated, seed), jnp.arange(steps))
    score = {"accuracy": _accuracy, "loss": _loss}[experiment.metric]
    chunks = -(-experiment.test_rows // experiment.batch_size)
    scores = {}
    for name, generator in task.tests.items():
      keys = jax.random.split(fold_in_name(key, f"test {name}"), chunks)
      counts = jax.lax.map(lambda k, g=generator: score(state, g(k, experiment.batch_size, data), cfg), keys)
      right, weight = (jnp.sum(x) for x in counts)
      scores[name] = right / weight
    return {"scores": scores, "curve": losses[::stride], "skipped": state.skipped}

  return run


def _accuracy(state, batch, cfg):
  """Weight of the right targets, and of all."""
  logits, _ = gpt.forward(state.params, batch["tokens"], cfg, annealed=state.annealed)
  # Not finite logits have no largest entry; they must not pass for an answer.
  sound = jnp.all(jnp.isfinite(logits), axis=-1)
  right = sound & (jnp.argmax(logits, axis=-1) == batch["targets"])
  return jnp.sum(right * batch["weights"]), jnp.sum(batch["weights"])


def _loss(state, batch, cfg):
  """Weighted nats, and the weight."""
  nll = gpt.nll(state.params, batch, cfg, annealed=state.annealed)
  return jnp.sum(nll * batch["weights"]), jnp.sum(batch["weights"])


@dataclasses.dataclass
class Cell:
  """One arm on one task: what it is, and what it did. `scores[test][i]` belongs to seed number i."""

  task: str
  arm: str
  attention: str
  n_layer: int
  parameters: int
  flops_per_token: float
  state_bytes: float = 0.0
  lr_scale: float = 1.0
  tuning: dict[str, float] = dataclasses.field(default_factory=dict)
  compile_s: float = 0.0
  run_s: list[float] = dataclasses.field(default_factory=list)
  scores: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  curves: list[list[float]] = dataclasses.field(default_factory=list)
  skipped: list[int] = dataclasses.field(default_factory=list)
  error: str = ""


def new_cell(task: Task, arm: Arm, cfg: GPTConfig) -> Cell:
  """The cell of an arm before it has run."""
  count = params.count(gpt.specs(cfg))
  cost = gpt.cost(cfg)
  return Cell(task.name, arm.name, arm.attention, cfg.n_layer, count, cost.flops, cost.bytes)


def fill(cell: Cell, experiment: Experiment, task: Task, arm: Arm, cfg, data, seeds: int, steps: int, tune: bool):
  """Compiles, picks a learning rate if asked, and runs every seed, writing into `cell` as it goes."""
  start = time.perf_counter()
  arguments = jnp.int32(0), jnp.float32(1), data
  program = jax.jit(make_run(experiment, task, arm, cfg, steps)).lower(*arguments).compile()
  cell.compile_s = time.perf_counter() - start
  if tune:
    sign = 1 if experiment.metric == "accuracy" else -1
    for scale in TUNING_SCALES:
      scores = program(jnp.int32(TUNING_SEED), jnp.float32(scale), data)["scores"]
      cell.tuning[str(scale)] = float(sum(scores.values()) / len(scores))
    # A score that is not finite loses against every other.
    best = max(TUNING_SCALES, key=lambda s: jnp.nan_to_num(sign * cell.tuning[str(s)], nan=-jnp.inf))
    cell.lr_scale = best
  for seed in range(seeds):
    start = time.perf_counter()
    result = jax.device_get(program(jnp.int32(seed), jnp.float32(cell.lr_scale), data))
    cell.run_s.append(time.perf_counter() - start)
    for name in task.tests:
      cell.scores.setdefault(name, []).append(float(result["scores"][name]))
    cell.curves.append([float(x) for x in result["curve"]])
    cell.skipped.append(int(result["skipped"]))
