"""Scalars that are annealed during training: an inverse temperature, a router's sharpness.

A mechanism option holds the text of a homotopy, e.g. `tropical(beta=exp:1:64)`. Its state is part of the training
state, its current value reaches the mechanism as the traced scalar `ctx.annealed["beta"]`.

    B                      constant
    linear:B0:B1           B0 + (B1 - B0)·x,  x = t / (N - 1) of N updates
    exp:B0:B1              B0·(B1 / B0)^x
    coverage:B0:BMAX:FLOOR closed loop on a reading c in [0, 1]: b·1.02 up to BMAX when c >= FLOOR, b/1.05 down to B0
                           when c < FLOOR, unchanged without a reading
    ordinal:B0:BMAX        b·2 up to BMAX at each limit event of the ordinal schedule
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

RISE, FALL = 1.02, 1.05
_ARITY = {"linear": 2, "exp": 2, "coverage": 3, "ordinal": 2}


class Homotopy(NamedTuple):
  """A parsed homotopy; static. `stop` is the last value of the open loops, the largest of the others."""

  kind: str
  start: float
  stop: float
  floor: float = 0.0

  @property
  def is_constant(self) -> bool:
    return self.kind == "constant"


def parse(text: str) -> Homotopy:
  """Parses a constant or one of the forms above.

  Raises:
    ValueError: with what is wrong; the caller adds the option's name.
  """
  kind, *numbers = str(text).split(":")
  if not numbers:
    kind, numbers = "constant", [kind]
  elif kind not in _ARITY:
    raise ValueError(f"{kind!r} is not one of {', '.join(_ARITY)}")
  elif len(numbers) != _ARITY[kind]:
    raise ValueError(f"{kind} takes {_ARITY[kind]} numbers, as in {_example(kind)}, not {len(numbers)}")
  try:
    values = [float(n) for n in numbers]
  except ValueError:
    raise ValueError(f"{text!r} is not a number or a schedule such as {_example('exp')}") from None
  if not all(v > 0 and math.isfinite(v) for v in values):
    raise ValueError(f"{text!r} has values that are not positive and finite")
  if kind in ("coverage", "ordinal") and values[1] < values[0]:
    raise ValueError(f"the largest value {values[1]:g} is below the first, {values[0]:g}")
  if kind == "coverage" and not values[2] < 1:
    raise ValueError(f"the floor {values[2]:g} is outside (0, 1)")
  return Homotopy(kind, *values) if kind != "constant" else Homotopy(kind, values[0], values[0])


def _example(kind: str) -> str:
  return f"{kind}:1:64" + (":0.5" if kind == "coverage" else "")


def init(h: Homotopy) -> jax.Array:
  """The state: the value of the next step, float32."""
  return jnp.float32(h.start)


def update(h: Homotopy, state: jax.Array, step: jax.Array, total_steps: int, reading, event) -> jax.Array:
  """The state after update number `step` (0-based).

  Args:
    reading: coverage in [0, 1] that this update measured; NaN when it did not.
    event: True at a limit event of the ordinal schedule.
  """
  if h.kind in ("linear", "exp"):
    x = jnp.clip((step + 1) / max(total_steps - 1, 1), 0.0, 1.0).astype(jnp.float32)
    if h.kind == "linear":
      return h.start + (h.stop - h.start) * x
    return h.start * jnp.float32(h.stop / h.start) ** x
  if h.kind == "coverage":
    risen, fallen = jnp.minimum(RISE * state, h.stop), jnp.maximum(state / FALL, h.start)
    return jnp.where(jnp.isnan(reading), state, jnp.where(reading >= h.floor, risen, fallen))
  if h.kind == "ordinal":
    return jnp.where(event, jnp.minimum(2 * state, h.stop), state)
  return state
