"""Training of one recipe: a full run, and branches of it that warm down early and so stand for runs on less data."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax import optim
from mgr_jax.config import GPTConfig
from mgr_jax.data import stream
from mgr_jax.data.corpus import Corpus
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.model import gpt
from mgr_jax.schedules import NO_EVENT, Schedule
from mgr_jax.schedules.base import warmup_multiplier
from mgr_jax.step import TrainState, init_train_state, make_train_step
from train.dominance import documents as documents_lib
from train.dominance.documents import Documents
from train.dominance.systems import Recipe

ROWS = 16  # documents evaluated at once


class Horizon(NamedTuple):
  """Number of updates made, and the number at which the learning rate reaches 0."""

  step: jax.Array
  total: jax.Array


def warming_down_at(total_steps: int, warmup: int, warmdown_frac: float) -> Schedule:
  """Warm-up, stable, linear to 0 at a horizon that is part of the state.

  One compiled step then serves the full run and its branches: a run over n steps is the branch that leaves the stable
  part of a longer run at (1 - warmdown_frac)·n.
  """

  def update(state: Horizon, loss):
    del loss
    left = jnp.clip((state.total - state.step) / (warmdown_frac * state.total), 0.0, 1.0)
    return Horizon(state.step + 1, state.total), warmup_multiplier(state.step, warmup) * left, jnp.int32(NO_EVENT)

  return Schedule(lambda: Horizon(jnp.int32(0), jnp.float32(total_steps)), update)


class Setting(NamedTuple):
  """What all systems of a ladder share. Steps, and sequences per step."""

  corpus: Corpus
  tokenizer: Tokenizer
  steps: int
  batch_size: int
  warmdown_frac: float
  data_threads: int = 2

  @property
  def warmup(self) -> int:
    return min(100, self.steps // 50)


class Trained(NamedTuple):
  """A finished recipe: nats of each system [N], the mean training loss of the last tenth, dropped updates, seconds."""

  nats: dict[str, np.ndarray]
  train_loss: dict[str, float]
  skipped: int
  seconds: float
  params: Any
  annealed: Any


class Trainer:
  """Trains one recipe on any number of seeds with one compiled update."""

  def __init__(self, recipe: Recipe, setting: Setting, documents: Documents):
    self._recipe, self._setting = recipe, setting
    self._schedule = warming_down_at(setting.steps, setting.warmup, setting.warmdown_frac)
    self._optimizer = optim.make_optimizer("adamw", gpt.specs(recipe.cfg), recipe.cfg)
    self._documents = documents_lib.padded(documents, ROWS)
    self._count = len(documents.tokens)
    self._evaluate = jax.jit(lambda params, annealed, d: documents_lib.nats(params, annealed, d, recipe.cfg, ROWS))
    self._step = make_train_step(recipe.cfg, self._optimizer, self._schedule, total_steps=setting.steps)

  @property
  def cfg(self) -> GPTConfig:
    return self._recipe.cfg

  def run(self, seed: int) -> Trained:
    """The full run and its branches. Weights and the order of the data depend on the seed alone."""
    start, setting = time.perf_counter(), self._setting
    leaves, kept, snapshots = self._branches(), [], {}
    state, losses = init_train_state(self.cfg, self._optimizer, self._schedule, seed), []
    with stream.train_iterator(
      setting.corpus,
      setting.tokenizer,
      seq_len=self.cfg.seq_len,
      batch_size=setting.batch_size,
      seed=seed,
      threads=setting.data_threads,
    ) as batches:
      for i in range(setting.steps):
        for name, (leave, _) in leaves.items():
          if i == leave:
            snapshots[name] = jax.tree.map(jnp.copy, state)
        batch = {k: v for k, v in next(batches).items() if k in ("tokens", "targets", "segment_ids")}
        if any(leave <= i < total for leave, total in leaves.values()):
          kept.append((i, batch))
        state, metrics = self._step(state, batch)
        losses.append(metrics["loss"])
    finished = {self._full: (state, losses)}
    for name, (leave, total) in leaves.items():
      finished[name] = self._branch(snapshots[name], total, [b for i, b in kept if leave <= i < total])
    nats = {name: np.asarray(self._nats(s), np.float64)[: self._count] for name, (s, _) in finished.items()}
    last_tenth = {name: float(np.mean(jax.device_get(x[-max(1, len(x) // 10) :]))) for name, (_, x) in finished.items()}
    skipped = sum(int(s.skipped) for s, _ in finished.values())
    return Trained(nats, last_tenth, skipped, time.perf_counter() - start, state.params, state.annealed)

  @property
  def _full(self) -> str:
    return next(name for name, share in self._recipe.systems.items() if share == 1)

  def _branches(self) -> dict[str, tuple[int, int]]:
    """First step of its own and last step of every branch."""
    totals = {n: round(share * self._setting.steps) for n, share in self._recipe.systems.items() if share < 1}
    return {name: (int((1 - self._setting.warmdown_frac) * total), total) for name, total in totals.items()}

  def _branch(self, state: TrainState, total: int, batches) -> tuple[TrainState, list]:
    state, losses = state.replace(schedule_state=state.schedule_state._replace(total=jnp.float32(total))), []
    for batch in batches:
      state, metrics = self._step(state, batch)
      losses.append(metrics["loss"])
    return state, losses

  def _nats(self, state: TrainState) -> jax.Array:
    return self._evaluate(state.params, state.annealed, self._documents)
