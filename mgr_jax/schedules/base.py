"""Constant, cosine and warm-up/stable/decay schedules: multipliers of every learning rate, from the step alone."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.problems import Problem, raise_if_any

# What a schedule can report of a step. Limit events are ANNEAL and RESTART; EXHAUSTED is reported once.
NO_EVENT, ANNEAL, RESTART, EXHAUSTED = range(4)
EVENT_NAMES = ("none", "anneal", "restart", "exhausted")


class Schedule(NamedTuple):
  """A pure state machine.

  `init() -> state`; `update(state, loss) -> (state, multiplier, event)`. One call per optimizer update, the first at
  step 0. The state is a small PyTree of arrays, `loss` the batch's mean loss over all devices, `multiplier` a
  float32 scalar, `event` an int32 scalar, one of the codes above.

  With `resets_moments` the train step clears the optimizer's moments at RESTART, before the update of that step.
  `metrics(state)` gives the scalars that belong into the log.
  """

  init: Callable[[], Any]
  update: Callable[[Any, jax.Array], tuple[Any, jax.Array, jax.Array]]
  resets_moments: bool = False
  metrics: Callable[[Any], dict[str, jax.Array]] = lambda state: {}


class StepState(NamedTuple):
  """Number of updates made, int32."""

  step: jax.Array


def constant(total_steps: int, *, lr_warmup_steps: int = -1) -> Schedule:
  """min(1, (t+1)/W): linear warm-up over W = `lr_warmup_steps` steps, then 1.

  Raises:
    UserError: with every setting that is out of range, here and in the other schedules.
  """
  warmup = _warmup_steps(lr_warmup_steps, total_steps)
  raise_if_any(_problems(total_steps, warmup))
  return from_step(lambda t: warmup_multiplier(t, warmup))


def cosine(total_steps: int, *, lr_warmup_steps: int = -1, final_lr_frac: float = 0.0) -> Schedule:
  """Warm-up over W steps times f + (1-f)·(1 + cos πx)/2 with x = (t-W)/(N-W) clipped to [0, 1].

  N = `total_steps`, f = `final_lr_frac`, reached at t = N, one step after the last (Loshchilov & Hutter, 2016, arXiv
  1608.03983, without restarts).
  """
  warmup = _warmup_steps(lr_warmup_steps, total_steps)
  raise_if_any(_problems(total_steps, warmup, final_lr_frac))
  length = max(total_steps - warmup, 1)

  def multiplier(t):
    x = jnp.clip((t - warmup) / length, 0.0, 1.0)
    return warmup_multiplier(t, warmup) * (final_lr_frac + (1 - final_lr_frac) * 0.5 * (1 + jnp.cos(math.pi * x)))

  return from_step(multiplier)


WARMDOWN_SHAPES = {
  "linear": lambda y: y,
  "sqrt": jnp.sqrt,
  "cosine": lambda y: 0.5 * (1 - jnp.cos(math.pi * y)),
}


def wsd(
  total_steps: int,
  *,
  lr_warmup_steps: int = -1,
  warmdown_frac: float = 0.2,
  warmdown_shape: str = "linear",
  final_lr_frac: float = 0.0,
) -> Schedule:
  """Warm-up over W steps, 1 until N-D, then 1 - (1-f)·s(y) with y = (t-(N-D))/D, D = `warmdown_frac`·N.

  The shape s is y, sqrt(y) or (1 - cos πy)/2; f = `final_lr_frac` is reached at t = N, one step after the last. (Hägele
  et al., 2024, arXiv 2405.18392, who find sqrt best.)
  """
  warmup = _warmup_steps(lr_warmup_steps, total_steps)
  found = _problems(total_steps, warmup, final_lr_frac, warmdown_frac)
  if warmdown_shape not in WARMDOWN_SHAPES:
    found.append(Problem(f"--warmdown_shape={warmdown_shape} is unknown", f"use one of {', '.join(WARMDOWN_SHAPES)}"))
  raise_if_any(found)
  length = warmdown_frac * total_steps
  shape = WARMDOWN_SHAPES[warmdown_shape]

  def multiplier(t):
    gone = 1 - (jnp.clip((total_steps - t) / length, 0.0, 1.0) if length else jnp.where(t < total_steps, 1.0, 0.0))
    return warmup_multiplier(t, warmup) * (1 - (1 - final_lr_frac) * shape(gone))

  return from_step(multiplier)


def warmup_multiplier(t: jax.Array, warmup: int) -> jax.Array:
  """min(1, (t+1)/warmup), float32; 1 without warm-up. Never 0, so that step 0 is not wasted."""
  return jnp.minimum(1.0, (t + 1) / max(warmup, 1)).astype(jnp.float32)


def from_step(multiplier: Callable[[jax.Array], jax.Array]) -> Schedule:
  """The state machine that counts updates and ignores the loss."""

  def update(state: StepState, loss):
    del loss
    return StepState(state.step + 1), multiplier(state.step).astype(jnp.float32), jnp.int32(NO_EVENT)

  return Schedule(lambda: StepState(jnp.zeros((), jnp.int32)), update)


def _warmup_steps(asked: int, total_steps: int) -> int:
  """-1 stands for 2% of the steps, at most 100."""
  return min(100, max(total_steps, 0) // 50) if asked == -1 else asked


def _problems(total_steps: int, warmup: int, final: float = 0.0, warmdown: float = 0.0) -> list[Problem]:
  found = []
  if total_steps < 1:
    found.append(Problem(f"a schedule over {total_steps} steps has no step", "use --max_steps of 1 or more"))
  if warmup < 0:
    found.append(Problem(f"--lr_warmup_steps={warmup} is negative", "use 0 for none, or -1 for 2% of the steps"))
  for name, value in (("final_lr_frac", final), ("warmdown_frac", warmdown)):
    if not 0 <= value <= 1:
      found.append(Problem(f"--{name}={value} is outside [0, 1]", f"use e.g. --{name}=0.2"))
  if not found and warmup + warmdown * total_steps > total_steps:
    room = int(total_steps - warmdown * total_steps)
    decay = f" and --warmdown_frac={warmdown} do" if warmdown else " does"
    found.append(
      Problem(
        f"--lr_warmup_steps={warmup}{decay} not fit into {total_steps} steps",
        f"use --lr_warmup_steps={room} or less, or more steps",
      )
    )
  return found
