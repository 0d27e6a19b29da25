"""The ordinal schedule: warm-up times a counter below ω^3 that cuts the rate when the loss stalls, and restarts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.problems import Problem, UserError, raise_if_any
from mgr_jax.schedules.base import RESTART, Schedule, constant
from mgr_jax.schedules.ordinal_machine import (
  OrdinalConfig,
  OrdinalState,
  faults,
  most_levels,
  ordinal_init,
  ordinal_step,
  standard_error,
)

_FIELDS = {
  "A0": "ord_restarts",
  "B0": "ord_levels",
  "P0": "ord_patience",
  "refill": "ord_refill",
  "gamma": "ord_gamma",
  "ema_decay": "ord_ema",
}
_DEFAULTS = OrdinalConfig()


class MachineState(NamedTuple):
  """State of the base schedule, () without one, and of the machine."""

  base: Any
  ordinal: OrdinalState


def ordinal(
  total_steps: int,
  *,
  lr_warmup_steps: int = -1,
  ord_restarts: int = _DEFAULTS.A0,
  ord_levels: int = _DEFAULTS.B0,
  ord_patience: int = _DEFAULTS.P0,
  ord_refill: str = _DEFAULTS.refill,
  ord_gamma: float = _DEFAULTS.gamma,
  ord_ema: float = _DEFAULTS.ema_decay,
) -> Schedule:
  """Warm-up over W steps times the scale of the ordinal machine; restarts clear the optimizer's moments.

  After `ord_patience` losses without improvement, in a row or not, the rate is multiplied by `ord_gamma` and the
  patience doubled, up to `ord_levels` times; then the rate goes back to 1, up to `ord_restarts` times. `ord_refill` is
  `geometric` or `adaptive`, `ord_ema` the decay of the running mean of the loss. See `OrdinalConfig` for the rest.

  Raises:
    UserError: with every setting that is out of range.
  """
  given = (ord_restarts, ord_levels, ord_patience, ord_refill, ord_gamma, ord_ema)
  fields = dict(zip(_FIELDS, given, strict=True))
  found, base = [], None
  try:
    base = constant(total_steps, lr_warmup_steps=lr_warmup_steps)
  except UserError as e:
    found += e.problems
  hidden = {name: getattr(_DEFAULTS, name) for name in ("growth", "p_max")}
  for field, value, wanted in faults(fields | hidden):
    most = most_levels(ord_patience, _DEFAULTS.growth) if wanted.startswith("at most") else None
    fix = f"use e.g. --{_FIELDS[field]}={getattr(_DEFAULTS, field) if most is None else most}"
    found.append(Problem(f"--{_FIELDS[field]}={value} is not {wanted.replace('P0', '--ord_patience')}", fix))
  raise_if_any(found)
  return machine(OrdinalConfig(**fields), base)


def machine(cfg: OrdinalConfig, base: Schedule | None = None, *, phase_base: bool = False) -> Schedule:
  """The ordinal machine as a schedule, times `base`.

  Args:
    base: any schedule; its events are not passed on.
    phase_base: begin `base` anew at every restart, so that it is a function of the step within the phase.
  """

  def init() -> MachineState:
    return MachineState(base.init() if base else (), ordinal_init(cfg))

  def update(state: MachineState, loss):
    inner, multiplier, event = ordinal_step(cfg, state.ordinal, loss)
    if base is None:
      return MachineState((), inner), multiplier, event
    outer = state.base
    if phase_base:
      outer = jax.tree.map(lambda new, old: jnp.where(event == RESTART, new, old), base.init(), outer)
    outer, factor, _ = base.update(outer, loss)
    return MachineState(outer, inner), multiplier * factor, event

  def metrics(state: MachineState) -> dict[str, jax.Array]:
    s = state.ordinal
    names = ("a", "b", "c", "scale", "ema", "best", "n_improve", "n_restart", "done")
    return {f"ord/{name}": getattr(s, name) for name in names} | {"ord/se": standard_error(cfg, s)}

  return Schedule(init, update, resets_moments=cfg.reset_moments, metrics=metrics)
