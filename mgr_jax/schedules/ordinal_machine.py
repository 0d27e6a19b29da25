"""A counter below ω^3 that pays for learning-rate cuts and restarts: configuration, state and one branch-free step.

The rank ω²·a + ω·b + c has c observations of patience left, b cuts left in this phase and a restarts left. It never
rises. An observation that is no improvement lowers c; at c = 0 it spends a cut, or a restart when no cut is left, and
only then are lower coefficients refilled. The learning rate is not part of the rank, so a restart may raise it.

With geometric refills the ranks visited are one fixed list of `n_drops` ranks whatever the losses are: the machine is
a counter that improvements pause. With adaptive refills, patience comes from the noise that was measured, no bound on
the length is known beforehand, and the run still ends, because every refill is paid by a higher coefficient.

  (1) the rank never rises; (2) an observation that is no improvement lowers it, until `done`; (3) at most
  (A0+1)(B0+1)-1 cuts and restarts happen, whatever the refills; (4) with geometric refills exactly `n_drops` such
  observations lead to rank 0 and one more sets `done`; (5) `done` is absorbing; (6) a full descent restarts A0 times.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.schedules.base import ANNEAL, EXHAUSTED, NO_EVENT, RESTART

LARGEST_PATIENCE = 2**30
# The square of a larger loss would overflow float32.
LARGEST_LOSS = 1e18
# Adaptive patience asks for a relative drop of at least this size.
SMALLEST_DROP = 1e-3
REFILLS = ("geometric", "adaptive")


@dataclasses.dataclass(frozen=True)
class OrdinalConfig:
  """Static settings.

  Args:
    A0, B0: restarts, and cuts of the learning rate per phase.
    P0: patience of the first level, in observations.
    growth: geometric patience P(b) = P0·growth^(B0-b): it grows as the rate falls.
    refill: `geometric`, or `adaptive`: as many observations as a relative drop of max(rel_tol, 1e-3) needs to show
      at the noise measured, ((z_tol+2)·sd/drop)²·(1+β)/(1-β), between P0 and `p_max`.
    gamma, min_scale: a cut multiplies the scale by `gamma`, never below `min_scale`.
    ema_decay: β of the debiased running mean of the loss.
    rel_tol, z_tol: an improvement lies below the best mean by max(rel_tol·|best|, z_tol standard errors).
    clip_loss: losses further than this many running mean absolute deviations from the mean are moved there; 0 is off.
    rise_z, rise_count: a mean above the best by `rise_z` standard errors in `rise_count` observations in a row spends
      a restart at once; `rise_count` 0 is off.
    rewarm: steps of linear warm-up after each restart.
    reset_moments: whether a restart clears the optimizer's moments.
    observe_every: the loss is looked at in every n-th step of a phase.

  Raises:
    ValueError: naming every field that is out of range.
  """

  A0: int = 2
  B0: int = 3
  P0: int = 100
  growth: int = 2
  refill: str = "geometric"
  p_max: int = LARGEST_PATIENCE
  gamma: float = 0.5
  min_scale: float = 1e-3
  ema_decay: float = 0.9
  rel_tol: float = 0.0
  z_tol: float = 1.0
  clip_loss: float = 0.0
  rise_z: float = 3.0
  rise_count: int = 0
  rewarm: int = 0
  reset_moments: bool = True
  observe_every: int = 1

  def __post_init__(self):
    found = [f"{field}={value!r} is not {wanted}" for field, value, wanted in faults(dataclasses.asdict(self))]
    if found:
      raise ValueError("; ".join(found))


def _integer(least: int, most: int = LARGEST_PATIENCE) -> tuple[str, Callable[[Any], bool]]:
  text = f"an integer from {least} to {most}"
  return text, lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


_FRACTION = ("in [0, 1)", lambda v: 0 <= v < 1)
_TOLERANCE = ("finite and 0 or more", lambda v: 0 <= v < float("inf"))
_RANGES = {
  "A0": _integer(0),
  "B0": _integer(0, 1000),
  "P0": _integer(1, LARGEST_PATIENCE - 1),
  "growth": _integer(1),
  "refill": (" or ".join(REFILLS), lambda v: v in REFILLS),
  "p_max": _integer(1),
  "gamma": ("in (0, 1)", lambda v: 0 < v < 1),
  "min_scale": _FRACTION,
  "ema_decay": _FRACTION,
  "rel_tol": _TOLERANCE,
  "z_tol": _TOLERANCE,
  "clip_loss": ("0 (off) or above 1", lambda v: v == 0 or 1 < v < float("inf")),
  "rise_z": _TOLERANCE,
  "rise_count": _integer(0),
  "rewarm": _integer(0),
  "observe_every": _integer(1),
}


def faults(fields: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
  """(field, value, what is wanted) of each entry of `fields` that is out of range; rules that join fields come last."""
  wrong = [(name, value, _RANGES[name][0]) for name, value in fields.items() if not _allowed(name, value)]
  yield from wrong
  if not wrong:
    most = most_levels(fields["P0"], fields["growth"])
    if fields["B0"] > most:
      yield "B0", fields["B0"], f"at most {most}, beyond which the patience P0·growth^B0 reaches 2^30"
    if fields["P0"] > fields["p_max"]:
      yield "p_max", fields["p_max"], f"at least P0={fields['P0']}"


def most_levels(P0: int, growth: int) -> int:
  """The largest B0 with P0·growth^B0 < 2^30 (1000 without growth)."""
  if growth == 1:
    return 1000
  most = 0
  while P0 * growth ** (most + 1) < LARGEST_PATIENCE:
    most += 1
  return most


def _allowed(name: str, value) -> bool:
  return name not in _RANGES or _RANGES[name][1](value)


class OrdinalState(NamedTuple):
  """Scalars. The rank: `a`, `b`, `c`, int32. Statistics of the loss, float32: running mean `ema`, the weight that
  debiases it, variance and mean absolute deviation; `best` mean of this level, +inf before its first observation.
  `scale` of the learning rate. int32 counters: `since_restart` numbers the next step within its phase, `rise` the
  observations in a row above the best. `done`: nothing is left to spend.
  """

  a: jax.Array
  b: jax.Array
  c: jax.Array
  ema: jax.Array
  weight: jax.Array
  variance: jax.Array
  deviation: jax.Array
  best: jax.Array
  scale: jax.Array
  since_restart: jax.Array
  rise: jax.Array
  n_obs: jax.Array
  n_anneal: jax.Array
  n_restart: jax.Array
  n_improve: jax.Array
  n_nonfinite: jax.Array
  done: jax.Array


def ordinal_init(cfg: OrdinalConfig) -> OrdinalState:
  """The state before the first step: rank ω²·A0 + ω·B0 + P0, scale 1."""
  whole, real = (lambda v: jnp.full((), v, jnp.int32)), (lambda v: jnp.full((), v, jnp.float32))
  statistics = {name: real(0) for name in ("ema", "weight", "variance", "deviation")}
  counters = {name: whole(0) for name in OrdinalState._fields if name.startswith(("n_", "since", "rise"))}
  rank = {"a": whole(cfg.A0), "b": whole(cfg.B0), "c": whole(cfg.P0)}
  return OrdinalState(**rank, **statistics, **counters, best=real(jnp.inf), scale=real(1), done=jnp.full((), False))


def ordinal_step(
  cfg: OrdinalConfig, state: OrdinalState, loss: jax.Array, observed: jax.Array | bool = True
) -> tuple[OrdinalState, jax.Array, jax.Array]:
  """One step on one loss: `(state, multiplier, event)`; about 60 scalar operations, no branch, vmappable.

  The mean e of the losses and its standard error se = sd·√((1-β)/(1+β)) are updated first. An improvement is
  e < best - max(rel_tol·|best|, z_tol·se), or the first observation of a level: best <- e and the rank stays.
  Anything else lowers the rank, see `descend`. A loss that is not finite, or beyond 1e18, is no improvement and leaves
  mean and error alone. The margin is there because on a noisy loss that does not fall, records alone go on for ever,
  about log n of them among n observations, and one early lucky low hides progress afterwards.

  Args:
    loss: the mean loss of this step over all devices, so that every replica decides alike.
    observed: False where there is no new value; then only the phase's step number moves.

  Returns:
    The state, the multiplier of the learning rates (float32, scale times the warm-up after a restart), and ANNEAL,
    RESTART, EXHAUSTED (on the step on which `done` becomes true) or NO_EVENT, int32.
  """
  loss = jnp.asarray(loss, jnp.float32)
  seen = jnp.asarray(observed) & (state.since_restart % cfg.observe_every == 0)
  usable = seen & (jnp.abs(loss) < LARGEST_LOSS)
  measured = _measure(cfg, state, loss)
  new = jax.tree.map(lambda x, y: jnp.where(usable, x, y), measured, state)

  se = standard_error(cfg, new)
  first = jnp.isposinf(state.best)
  best = jnp.where(first, 0.0, state.best)
  margin = jnp.maximum(cfg.rel_tol * jnp.abs(best), cfg.z_tol * se)
  improved = usable & (first | (new.ema < best - margin))
  rise = state.rise
  if cfg.rise_count:
    above = ~first & (new.ema > best + cfg.rise_z * se)
    rise = jnp.where(usable, jnp.where(above, rise + 1, 0), rise)
  risen = seen & (rise >= cfg.rise_count) if cfg.rise_count else jnp.bool_(False)

  refill = lambda b: _patience(cfg, b, new)
  (a, b, c), event = descend((state.a, state.b, state.c), seen & ~improved, risen, cfg.B0, refill)
  restart, anneal = event == RESTART, event == ANNEAL
  cut = jnp.maximum(cfg.gamma * state.scale, cfg.min_scale)
  since = jnp.where(restart, 0, state.since_restart)
  new = new._replace(
    a=a,
    b=b,
    c=c,
    best=jnp.where(restart | anneal, jnp.inf, jnp.where(improved, new.ema, state.best)),
    scale=jnp.where(restart, 1.0, jnp.where(anneal, cut, state.scale)),
    since_restart=since + 1,
    rise=jnp.where(restart, 0, rise),
    n_obs=state.n_obs + seen,
    n_anneal=state.n_anneal + anneal,
    n_restart=state.n_restart + restart,
    n_improve=state.n_improve + improved,
    n_nonfinite=state.n_nonfinite + (seen & ~usable),
    done=state.done | (event == EXHAUSTED),
  )
  multiplier = new.scale
  if cfg.rewarm:
    warm = jnp.minimum(1.0, (since + 1) / cfg.rewarm)
    multiplier = multiplier * jnp.where(new.n_restart > 0, warm, 1.0)
  event = jnp.where(state.done & (event == EXHAUSTED), NO_EVENT, event)
  return new, multiplier.astype(jnp.float32), event.astype(jnp.int32)


def descend(rank, drop: jax.Array, risen: jax.Array, levels: int, refill: Callable[[jax.Array], jax.Array]):
  """The rank after one observation, and what was spent: (ω²a + ω b + c, drop) -> ((a, b, c), event).

  A drop at c > 0 lowers c; at c = 0 it spends one of b and refills c (ANNEAL), at b = c = 0 one of a and refills both
  (RESTART), at 0 nothing (EXHAUSTED, however often). `risen` spends one of a from any rank that has one.

  Args:
    rank: int32 scalars a, b, c.
    drop: whether to lower the rank at all.
    levels: b after a restart.
    refill: c of a level, from its b.
  """
  a, b, c = rank
  empty = drop & (c == 0)
  restart = (a > 0) & (risen | (empty & (b == 0)))
  anneal = empty & (b > 0) & ~restart
  exhausted = empty & (b == 0) & (a == 0)
  b = jnp.where(restart, levels, b - anneal)
  c = jnp.where(restart | anneal, refill(b), c - (drop & (c > 0)))
  event = jnp.where(restart, RESTART, jnp.where(anneal, ANNEAL, jnp.where(exhausted, EXHAUSTED, NO_EVENT)))
  return (a - restart, b, c), event


def standard_error(cfg: OrdinalConfig, state: OrdinalState) -> jax.Array:
  """sd·√((1-β)/(1+β)): the error of the running mean of independent losses after many of them.

  Within the first 1/(1-β) losses it is too small: the mean that deviations are taken from still follows each of them.
  """
  return jnp.sqrt(state.variance * ((1 - cfg.ema_decay) / (1 + cfg.ema_decay)))


def _measure(cfg: OrdinalConfig, state: OrdinalState, loss: jax.Array) -> OrdinalState:
  """Debiased running mean, variance and mean absolute deviation, with this loss.

  e + (1-β)/w·(loss - e) is m/w of the running numerator m, but stays exactly where it is on a constant loss, where m/w
  moves by a rounding that would count as an improvement.
  """
  weight = cfg.ema_decay * state.weight + (1 - cfg.ema_decay)
  share = (1 - cfg.ema_decay) / weight
  if cfg.clip_loss:
    # Deviations are those of clipped losses: one wild loss cannot widen the window, a lasting shift widens it fast.
    width = jnp.where(state.deviation > 0, cfg.clip_loss * state.deviation, jnp.inf)
    loss = jnp.clip(loss, state.ema - width, state.ema + width)
  ema = state.ema + share * (loss - state.ema)
  residual = loss - ema
  return state._replace(
    ema=ema,
    weight=weight,
    variance=state.variance + share * (residual**2 - state.variance),
    deviation=state.deviation + share * (jnp.abs(residual) - state.deviation),
  )


def _patience(cfg: OrdinalConfig, b: jax.Array, state: OrdinalState) -> jax.Array:
  if cfg.refill == "geometric":
    return jnp.asarray([cfg.P0 * cfg.growth ** (cfg.B0 - left) for left in range(cfg.B0 + 1)], jnp.int32)[b]
  drop = max(cfg.rel_tol, SMALLEST_DROP) * jnp.abs(state.ema)
  ratio = (cfg.z_tol + 2) * jnp.sqrt(state.variance) / jnp.maximum(drop, jnp.finfo(jnp.float32).tiny)
  needed = jnp.ceil(ratio**2 * ((1 + cfg.ema_decay) / (1 - cfg.ema_decay)))
  return jnp.clip(jnp.minimum(needed, LARGEST_PATIENCE).astype(jnp.int32), cfg.P0, cfg.p_max)


def n_drops(cfg: OrdinalConfig) -> int:
  """Observations without improvement from the first rank to rank 0, with geometric refills and without rises:
  (A0+1)·Σ_j (P0·growth^j + 1) - 1, j = 0 ... B0.

  >>> n_drops(OrdinalConfig(A0=2, B0=3, P0=1200)), limit_events(OrdinalConfig(A0=2, B0=3))
  (54011, 11)
  """
  return (cfg.A0 + 1) * sum(cfg.P0 * cfg.growth**j + 1 for j in range(cfg.B0 + 1)) - 1


def limit_events(cfg: OrdinalConfig) -> int:
  """The most cuts and restarts of a run, with any refills: (A0+1)(B0+1) - 1."""
  return (cfg.A0 + 1) * (cfg.B0 + 1) - 1


def suggested_patience(total_steps: int, cfg: OrdinalConfig) -> int:
  """P0 whose geometric descent spans `total_steps`: (N/(A0+1) - B0 - 1)/Σ_j growth^j of N observations, at least 1."""
  observations = total_steps / cfg.observe_every
  spread = sum(cfg.growth**j for j in range(cfg.B0 + 1))
  return max(1, int((observations / (cfg.A0 + 1) - cfg.B0 - 1) / spread))


def rank(state: OrdinalState) -> tuple[int, int, int]:
  """(a, b, c) of one state, on the host; tuples compare like the ordinals ω²·a + ω·b + c."""
  return tuple(int(x) for x in np.asarray(jax.device_get((state.a, state.b, state.c))))
