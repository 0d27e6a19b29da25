"""A few steps of training as one call, for notebooks and small studies; `python -m train.main` is the real program."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from mgr_jax import optim, schedules
from mgr_jax.attention import model_problems
from mgr_jax.config import GPTConfig
from mgr_jax.model import annealing, gpt
from mgr_jax.problems import Problem, raise_if_any
from mgr_jax.step import init_train_state, make_train_step


class Fit(NamedTuple):
  """What `fit` returns.

  Attributes:
    params: trained parameters, float32.
    losses: float32 [steps], training loss of each batch before its update, nats per token.
    cfg: the configuration that goes with `params`; annealed options stand at their last number, others as given.
  """

  params: Any
  losses: np.ndarray
  cfg: GPTConfig


def windows(ids, batch_size: int, seq_len: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Endless batches of windows cut at uniformly random places from one sequence of token ids [n].

  Yields `tokens` and `targets`, int32 [batch_size, seq_len]; targets are one token later.

  Raises:
    ValueError: at the call, when `ids` is not one-dimensional or too short for a single window.

  >>> batch = next(windows(range(100), batch_size=2, seq_len=5))
  >>> batch["tokens"].shape, bool((batch["targets"] == batch["tokens"] + 1).all())
  ((2, 5), True)
  """
  ids = np.asarray(ids)
  if ids.ndim != 1 or len(ids) <= seq_len:
    raise ValueError(f"ids of shape {ids.shape} hold no window of seq_len + 1 = {seq_len + 1} tokens")
  return _windows(ids.astype(np.int32), batch_size, seq_len, np.random.default_rng(seed))


def _windows(ids, batch_size, seq_len, rng):
  while True:
    start = rng.integers(0, len(ids) - seq_len, (batch_size, 1))
    cut = ids[start + np.arange(seq_len + 1)]
    yield {"tokens": cut[:, :-1], "targets": cut[:, 1:]}


def fit(
  cfg: GPTConfig,
  batches: Iterable[dict[str, Any]],
  steps: int,
  *,
  optimizer: str = "adamw",
  schedule: str = "constant",
  grad_clip: float = 1.0,
  seed: int = 0,
  params=None,
  **settings,
) -> Fit:
  """Trains for `steps` batches and returns parameters and losses; compiles once.

  Args:
    batches: dicts as `gpt.loss` takes them, all of one shape; one more is never taken than trained on.
    optimizer, schedule: names known to `python -m train.main`.
    grad_clip: largest gradient norm, 0 for none. The optimizers that use curvature bound their steps themselves.
    seed: draws the initial parameters (unless `params` are given) and whatever is random in a step.
    params: start from these instead; they are left untouched. Optimizer and schedule start anew.
    settings: of the optimizer and the schedule by the names of their flags, as in `matrix_lr=1e-3`.

  Raises:
    UserError: settings that do not exist or do not fit, with what to do.
    FloatingPointError: loss, gradient or update was not finite; names the step.
    ValueError: `batches` ended early.
  """
  mine = optim.optimizer_settings(optimizer)
  of_schedule = {k: v for k, v in settings.items() if k in schedules.schedule_settings(schedule) and k not in mine}
  of_optimizer = {k: v for k, v in settings.items() if k not in of_schedule}
  problems = model_problems(cfg) or annealing.problems(cfg, schedule)
  if steps < 1:
    problems = [*problems, Problem(f"steps={steps} is not positive", "use steps=100")]
  raise_if_any(problems)
  transform = optim.make_optimizer(optimizer, gpt.specs(cfg), cfg, **of_optimizer)
  rates = schedules.make_schedule(schedule, steps, **of_schedule)
  products = optim.curvature(optimizer, **of_optimizer)
  state = jax.jit(lambda: init_train_state(cfg, transform, rates, seed))()
  if params is not None:
    state = state.replace(params=jax.tree.map(lambda p: np.array(p, np.float32), params))
  update = lambda c: make_train_step(
    c, transform, rates, total_steps=steps, grad_clip=0.0 if products else grad_clip, products=products
  )
  step, snap = update(cfg), annealing.snap_step(cfg, steps)
  losses, dropped = [], []
  for number, batch in zip(range(steps), batches, strict=False):
    if number == snap:
      cfg = annealing.snapped(cfg)
      step = update(cfg)
    state, metrics = step(state, batch)
    losses.append(metrics["loss"])
    dropped.append(metrics["nonfinite"])
  if len(losses) < steps:
    raise ValueError(f"batches ended after {len(losses)} of {steps} steps")
  if any(jax.device_get(dropped)):
    first = jax.device_get(dropped).index(True)
    raise FloatingPointError(f"step {first}: loss, gradient or update is not finite; try a smaller learning rate")
  cfg = annealing.frozen(cfg, jax.device_get(state.annealed)) if state.annealed else cfg
  return Fit(state.params, np.asarray(jax.device_get(losses)), cfg)
