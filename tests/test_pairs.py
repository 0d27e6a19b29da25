"""Every optimizer with every schedule: training through events, saved and restored in the middle, bit for bit."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim import OPTIMIZERS
from mgr_jax.schedules import EXHAUSTED, NO_EVENT, RESTART, SCHEDULES
from mgr_jax.step import init_train_state
from train import flags, plan
from train.checkpoint import Checkpoints

SETTINGS = flags.Settings(
  attention="tropical(beta=linear:1:2)",
  n_layer=1,
  n_head=2,
  n_embd=16,
  seq_len=8,
  batch_size=4,
  max_steps=12,
  lr_warmup_steps=2,
  mlp="none",
)
# One level and one restart of a single step each, and rates that hardly move: the machine runs through in no time.
ORDINAL = {"ord_restarts": 1, "ord_levels": 1, "ord_patience": 1}
NOISY = {"hoss_rank": 2, "hoss_hvp_frac": 0.5, "hoss_noise": "full", "hoss_temperature": 1e-4, "hoss_metric": "adam"}
PAIRS = sorted(itertools.product(OPTIMIZERS, SCHEDULES), key=lambda pair: pair[1] != "ordinal")


def settings_of(optimizer: str, schedule: str) -> flags.Settings:
  chosen = dataclasses.replace(SETTINGS, optimizer=optimizer, schedule=schedule, lr_scale=1e-3)
  if schedule == "ordinal":
    chosen = dataclasses.replace(chosen, attention="tropical(beta=ordinal:1:8)", **ORDINAL)
  return dataclasses.replace(chosen, **NOISY) if optimizer.startswith("hoss") else chosen


@functools.cache
def batches():
  tokens = np.random.default_rng(0).integers(0, 64, (12, 4, 9)).astype(np.int32)
  return [{"tokens": t[:, :-1], "targets": t[:, 1:]} for t in tokens]


@pytest.mark.parametrize(("optimizer_name", "schedule_name"), PAIRS)
def test_a_restored_run_goes_on_bit_for_bit(optimizer_name, schedule_name, tmp_path):
  settings, checkpoints = settings_of(optimizer_name, schedule_name), Checkpoints(tmp_path, 1)
  cfg = GPTConfig(vocab_size=64, **plan.model_fields(settings))
  optimizer = plan.make_optimizer(settings, gpt.specs(cfg), cfg)
  schedule = plan.make_schedule(settings, settings.max_steps)
  step = plan.make_step(settings, cfg, optimizer, schedule, settings.max_steps)
  init = lambda: init_train_state(cfg, optimizer, schedule, 0)

  def train(state, first: int, save_after: int | None = None):
    """Losses, multipliers and events from step `first` on, and the last state."""
    found = []
    for t in range(first, 12):
      state, metrics = step(state, batches()[t])
      found.append([metrics["loss"], metrics["multiplier"], metrics["event"]])
      if t + 1 == save_after:
        checkpoints.save(t + 1, state, {"place": t}, {"made": "here"})
        checkpoints.wait()
    return np.asarray(jax.device_get(found), np.float64), state

  whole, end = train(jax.jit(init)(), 0, save_after=7)
  state, _, _ = checkpoints.restore(jax.eval_shape(init), 7)
  checkpoints.close()
  rest, again = train(state, 7)
  np.testing.assert_array_equal(rest, whole[7:])
  for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(again), strict=True):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)

  assert np.all(np.isfinite(whole))
  seen = step(again, batches()[0])[1]["optimizer"]
  assert ("hoss/residual" in seen) == optimizer_name.startswith("hoss")
  assert all(np.isfinite(value) and np.shape(value) == () for value in seen.values())
  events = whole[:, 2]
  if schedule_name == "ordinal":
    assert RESTART in events
    assert np.sum(events == EXHAUSTED) <= 1
    assert float(next(iter(end.annealed.values()))) > 1
  else:
    assert np.all(events == NO_EVENT)
  assert len(np.unique(whole[:, 1])) > 1, "the multiplier moves"
