"""The registry of schedules. A new one is its own file and one line in `SCHEDULES`."""

import inspect

from mgr_jax.config import nearest
from mgr_jax.problems import Problem, UserError, raise_if_any
from mgr_jax.schedules.base import (
  ANNEAL,
  EVENT_NAMES,
  EXHAUSTED,
  NO_EVENT,
  RESTART,
  Schedule,
  constant,
  cosine,
  wsd,
)
from mgr_jax.schedules.ordinal import ordinal

SCHEDULES = {"constant": constant, "cosine": cosine, "wsd": wsd, "ordinal": ordinal}


def make_schedule(name: str, total_steps: int, **settings) -> Schedule:
  """Builds a schedule over `total_steps` optimizer updates, numbered from 0.

  Args:
    name: one of `SCHEDULES`.
    settings: keyword arguments of the schedule, see `schedule_settings`.

  Raises:
    UserError: unknown name (with the nearest one), a setting this schedule does not have, values out of range.

  >>> schedule = make_schedule("cosine", 100, lr_warmup_steps=0)
  >>> state, multiplier, event = schedule.update(schedule.init(), 2.5)
  >>> float(multiplier)
  1.0
  """
  defaults = schedule_settings(name)
  raise_if_any(
    Problem(
      f"--{key}={value} has no effect with --schedule={name}",
      f"leave it out; {nearest(key, list(defaults))}settings of {name}: " + ", ".join(f"--{k}" for k in defaults),
    )
    for key, value in settings.items()
    if key not in defaults
  )
  return SCHEDULES[name](total_steps, **settings)


def schedule_settings(name: str) -> dict[str, float]:
  """The settings of a schedule and their defaults.

  Raises:
    UserError: unknown name, with the nearest one.
  """
  if name not in SCHEDULES:
    hint = f"{nearest(name, list(SCHEDULES))}known schedules: {', '.join(SCHEDULES)}"
    raise UserError(Problem(f"unknown --schedule={name}", hint))
  parameters = inspect.signature(SCHEDULES[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


__all__ = [
  "ANNEAL",
  "EVENT_NAMES",
  "EXHAUSTED",
  "NO_EVENT",
  "RESTART",
  "SCHEDULES",
  "Schedule",
  "make_schedule",
  "schedule_settings",
]
