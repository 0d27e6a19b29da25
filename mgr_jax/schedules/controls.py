"""Schedules that experiments compare against: linear, inverse square root, warm restarts, tables, reduce on plateau.

They are no settings of a training run, so mistakes in them are a `ValueError` that names the argument.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from mgr_jax.schedules.base import NO_EVENT, Schedule, from_step, warmup_multiplier


def linear(total_steps: int, *, lr_warmup_steps: int = 0, final_lr_frac: float = 0.0) -> Schedule:
  """Warm-up over W steps times 1 - (1-f)·x with x = (t-W)/(N-W) clipped to [0, 1].

  Raises:
    ValueError: with every argument that is out of range, here and in the other schedules.
  """
  _check(total_steps, lr_warmup_steps, final_lr_frac)
  length = max(total_steps - lr_warmup_steps, 1)

  def multiplier(t):
    x = jnp.clip((t - lr_warmup_steps) / length, 0.0, 1.0)
    return warmup_multiplier(t, lr_warmup_steps) * (1 - (1 - final_lr_frac) * x)

  return from_step(multiplier)


def inv_sqrt(total_steps: int, *, lr_warmup_steps: int = 0) -> Schedule:
  """Warm-up over W steps times sqrt(max(W, 1)/max(t+1, W, 1)); constant from t = N (Vaswani et al., 2017)."""
  _check(total_steps, lr_warmup_steps)
  first = max(lr_warmup_steps, 1)

  def multiplier(t):
    t = jnp.minimum(t, total_steps)
    return warmup_multiplier(t, lr_warmup_steps) * jnp.sqrt(first / jnp.maximum(t + 1, first))

  return from_step(multiplier)


def sgdr(total_steps: int, *, period: int, growth: float = 1.0, final_lr_frac: float = 0.0) -> Schedule:
  """f + (1-f)·(1 + cos πx)/2 with x the share of the present cycle that has passed; f from t = N on.

  Cycle i is `period`·growth^i steps long and starts at s_i = period·(growth^i - 1)/(growth - 1), so i is the floor of
  log(1 + t·(growth-1)/period)/log(growth): no loop over cycles. (Loshchilov & Hutter, 2016, arXiv 1608.03983.)
  """
  _check(total_steps, 0, final_lr_frac)
  if period < 1:
    raise ValueError(f"period={period} is not positive")
  if growth < 1:
    raise ValueError(f"growth={growth} is below 1")

  def cycle(t):
    """Start and length of the cycle that holds t."""
    if growth == 1:
      return t // period * period, period
    start = lambda i: period * (growth**i - 1) / (growth - 1)
    i = jnp.floor(jnp.log1p(t * (growth - 1) / period) / math.log(growth))
    # The quotient of rounded logarithms can miss an integer by one rounding, at the first step of a cycle.
    i = i + (t >= start(i + 1)) - (t < start(i))
    return start(i), period * growth**i

  def multiplier(t):
    start, length = cycle(t)
    wave = final_lr_frac + (1 - final_lr_frac) * 0.5 * (1 + jnp.cos(math.pi * (t - start) / length))
    return jnp.where(t < total_steps, wave, final_lr_frac)

  return from_step(multiplier)


def piecewise(boundaries: Sequence[int], values: Sequence[float]) -> Schedule:
  """`values[i]` from step `boundaries[i-1]` on, before step `boundaries[i]`; one value more than boundaries."""
  if len(values) != len(boundaries) + 1:
    raise ValueError(f"values: {len(values)} of them for {len(boundaries)} boundaries, not one more")
  if any(b >= c for b, c in itertools.pairwise(boundaries)):
    raise ValueError(f"boundaries={list(boundaries)} do not increase")
  at, table = jnp.asarray(boundaries, jnp.int32), jnp.asarray(values, jnp.float32)
  return from_step(lambda t: table[jnp.searchsorted(at, t, side="right")])


def plateau(**settings: Any) -> Schedule:
  """The scale of `optax.contrib.reduce_on_plateau(**settings)`, fed with the loss of every step.

  Raises:
    ValueError: settings that optax refuses.
  """
  transform = optax.contrib.reduce_on_plateau(**settings)

  def update(state, loss):
    _, state = transform.update((), state, value=jnp.asarray(loss, jnp.float32))
    return state, state.scale.astype(jnp.float32), jnp.int32(NO_EVENT)

  return Schedule(lambda: transform.init(jnp.zeros((), jnp.float32)), update)


def _check(total_steps: int, warmup: int, final: float = 0.0) -> None:
  found = []
  if total_steps < 1:
    found.append(f"total_steps={total_steps} is not positive")
  if not 0 <= warmup <= max(total_steps, 0):
    found.append(f"lr_warmup_steps={warmup} is outside [0, {total_steps}]")
  if not 0 <= final <= 1:
    found.append(f"final_lr_frac={final} is outside [0, 1]")
  if found:
    raise ValueError("; ".join(found))
