"""Claims about the ordinal machine, each with a broken twin."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.claims import Check, claim, worst_of
from mgr_jax.schedules.base import ANNEAL, EXHAUSTED, NO_EVENT, RESTART
from mgr_jax.schedules.controls import plateau
from mgr_jax.schedules.ordinal_machine import (
  OrdinalConfig,
  OrdinalState,
  descend,
  limit_events,
  n_drops,
  ordinal_init,
  ordinal_step,
)

STREAMS, STEPS = 64, 400
PLAIN = OrdinalConfig(A0=2, B0=1, P0=6)
EAGER = OrdinalConfig(A0=3, B0=4, P0=1, z_tol=0.0)
ADAPTIVE = OrdinalConfig(
  A0=1, B0=3, P0=3, refill="adaptive", p_max=40, rel_tol=0.05, clip_loss=3.0, rise_z=3.0, rise_count=3, observe_every=2
)
PATIENT = OrdinalConfig(A0=0, B0=0, P0=2000)
RECORDS = OrdinalConfig(A0=0, B0=0, P0=2000, z_tol=0.0)
DETECTOR = OrdinalConfig(A0=0, B0=1, P0=300, refill="adaptive", rel_tol=0.1, ema_decay=0.99)
IMPATIENT = OrdinalConfig(A0=0, B0=1, P0=1, growth=1, rel_tol=0.1, ema_decay=0.99)
ONE_WAY = OrdinalConfig(A0=0, B0=3, P0=7, growth=1, ema_decay=0.0, z_tol=0.0)


class Trace(NamedTuple):
  """What a run did, time first: `rank` [T, S, 3], the others [T, S]; `improved` and `seen` are booleans."""

  rank: np.ndarray
  event: np.ndarray
  multiplier: np.ndarray
  improved: np.ndarray
  seen: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _scan(cfg: OrdinalConfig, states: OrdinalState, loss_TS: jax.Array):
  def body(old, loss):
    new, multiplier, event = jax.vmap(functools.partial(ordinal_step, cfg))(old, loss)
    rank = jnp.stack([new.a, new.b, new.c], -1)
    return new, Trace(rank, event, multiplier, new.n_improve > old.n_improve, new.n_obs > old.n_obs)

  return jax.lax.scan(body, states, loss_TS)


def start(cfg: OrdinalConfig) -> OrdinalState:
  """The first state of `STREAMS` machines."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (STREAMS,)), ordinal_init(cfg))


def run(cfg: OrdinalConfig, loss_TS: np.ndarray, states: OrdinalState | None = None) -> tuple[OrdinalState, Trace]:
  """Runs 64 machines; T is a multiple of 400, so that every use of one configuration shares one compiled scan."""
  states, traces = start(cfg) if states is None else states, []
  for i in range(0, len(loss_TS), STEPS):
    states, trace = _scan(cfg, states, np.float32(loss_TS[i : i + STEPS]))
    traces.append(trace)
  return states, Trace(*(np.concatenate([np.asarray(x) for x in parts]) for parts in zip(*traces, strict=True)))


def constant_losses(steps: int = STEPS) -> np.ndarray:
  """A loss that never changes, [T, 64]."""
  return np.full((steps, STREAMS), 2.7)


def mixed_losses(rng: np.random.Generator) -> np.ndarray:
  """Streams of many kinds, [400, 64]: noise of all sizes, drifts up and down, jumps, and what is not a number."""
  t = np.linspace(0, 1, STEPS)[:, None]
  size = 10.0 ** rng.uniform(-6, 6, STREAMS)
  drift = rng.choice([-2.0, 0.0, 0.0, 1.0], STREAMS) * t
  loss = size * (rng.standard_t(2, (STEPS, STREAMS)) + rng.choice([-3.0, 0.0, 5.0], STREAMS) + 5 * drift)
  loss += size * 20 * (t > rng.uniform(0, 2, STREAMS))
  loss[:, 0], loss[:, 1] = 2.0, np.nan
  loss[:, 2] = 3 - 2 * t[:, 0]
  wild = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30, 1e17], loss.shape)
  return np.where((rng.random(loss.shape) < 0.05) & (np.arange(STREAMS) > 2), wild, loss)


def reference_trace(cfg: OrdinalConfig, loss_TS: np.ndarray) -> Trace:
  """A plain machine with two common mistakes: its mean starts at +inf, so that it stays there and no loss is ever an
  improvement; and it restarts below rank 0 as well. One stream.
  """
  a, b, c, mean, best = cfg.A0, cfg.B0, cfg.P0, math.inf, math.inf
  rows = []
  for loss in loss_TS[:, 0]:
    mean = cfg.ema_decay * mean + (1 - cfg.ema_decay) * loss
    improved, event = mean < best, NO_EVENT
    if improved:
      best = mean
    elif c > 0:
      c -= 1
    elif b > 0:
      b, event = b - 1, ANNEAL
      c = cfg.P0 * cfg.growth ** (cfg.B0 - b)
    else:
      a, b, c, event = a - 1, cfg.B0, cfg.P0, RESTART
    rows.append(((a, b, c), event, 1.0, improved, True))
  return Trace(*(np.array(column)[:, None] for column in zip(*rows, strict=True)))


def violations(cfg: OrdinalConfig, trace: Trace) -> int:
  """How often a run from the first rank breaks: never rising ranks; a strict drop at each observation without
  improvement before the end; coefficients >= 0; the bounds on events; and silence after EXHAUSTED.
  """
  first = np.broadcast_to([cfg.A0, cfg.B0, cfg.P0], (1, *trace.rank.shape[1:]))
  before, after = np.concatenate([first, trace.rank[:-1]]), trace.rank
  change = np.sign(after - before)
  up = np.where(change[..., 0] != 0, change[..., 0], np.where(change[..., 1] != 0, change[..., 1], change[..., 2]))
  count = lambda event: np.sum(trace.event == event, axis=0)
  wrong = np.sum(up > 0) + np.sum(after < 0) + np.sum((up != 0) & (trace.improved | ~trace.seen))
  wrong += np.sum((up == 0) & trace.seen & ~trace.improved & np.any(before > 0, -1))
  wrong += np.sum(count(ANNEAL) + count(RESTART) > limit_events(cfg)) + np.sum(count(EXHAUSTED) > 1)
  wrong += np.sum(count(RESTART) != cfg.A0 - after[-1, :, 0])
  over = np.cumsum(trace.event == EXHAUSTED, axis=0)[:-1] > 0
  return int(wrong + np.sum(over & ((trace.event[1:] != NO_EVENT) | np.any(after[1:] != 0, -1))))


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _descent(trace_of: Callable[[OrdinalConfig, np.ndarray], Trace], *configs: OrdinalConfig) -> Check:
  def measure(key, scale):
    rng = _rng(key)
    return float(sum(violations(cfg, trace_of(cfg, mixed_losses(rng))) for cfg in configs for _ in range(scale)))

  return measure


def _exact_length(extra: int) -> Check:
  """Largest deviation of the step at which rank 0 is reached, and of that of EXHAUSTED, on a constant loss."""

  def measure(key, scale):
    del key, scale
    worst = 0
    for cfg in (PLAIN, EAGER):
      trace = run(cfg, constant_losses())[1]
      holds = (cfg.A0 + 1) * (cfg.B0 + 1)  # the first observation of a level is its best
      zero, done = np.all(trace.rank == 0, -1).argmax(0), (trace.event == EXHAUSTED).argmax(0)
      length = n_drops(cfg) + holds + extra * holds
      worst = np.max([worst, np.max(np.abs(zero + 1 - length)), np.max(np.abs(done - zero - 1))])
    return float(worst)

  return measure


def _absorbing(reference: bool) -> Check:
  """Steps with an event, a rank or a scale other than before, among 10 000 after the end."""

  def measure(key, scale):
    del scale
    losses = np.concatenate([mixed_losses(_rng(key))] * 25)
    if reference:
      trace = reference_trace(PLAIN, constant_losses(10_400))
      return float(np.sum(trace.event[400:] != NO_EVENT) + np.sum(trace.rank[400:] != 0))
    states, _ = run(PLAIN, constant_losses())
    _, trace = run(PLAIN, losses, states)
    changed = trace.multiplier != np.asarray(states.scale)
    return float(np.sum(trace.event != NO_EVENT) + np.sum(trace.rank != 0) + np.sum(changed))

  return measure


def _improvement(from_infinity: bool) -> Check:
  """Drops of rank on a loss that falls at every step, without noise and with no margin asked."""

  def measure(key, scale):
    del key
    steps = 1200 * scale
    losses = np.broadcast_to(9 - 8 * np.arange(steps)[:, None] / steps, (steps, STREAMS))
    states = start(EAGER)
    if from_infinity:
      infinite = jnp.full((STREAMS,), jnp.inf, jnp.float32)
      states = states._replace(ema=infinite, weight=jnp.ones((STREAMS,), jnp.float32))
    _, trace = run(EAGER, losses, states)
    return float(np.sum(trace.rank != [EAGER.A0, EAGER.B0, EAGER.P0]) + np.sum(~trace.improved))

  return measure


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fall(steps: int, gives_back: bool, refill_TS: jax.Array):
  """Ranks that drop at every step, with the refills of an adversary; a broken rule gives every cut back."""

  def body(rank, refill):
    rank, event = descend(rank, jnp.bool_(True), jnp.bool_(False), PLAIN.B0 + 2, lambda b: refill)
    if gives_back:
      rank = rank[0], rank[1] + (event == ANNEAL), rank[2]
    return rank, event

  first = jnp.int32(PLAIN.A0), jnp.int32(PLAIN.B0 + 2), jnp.int32(1)
  one = lambda refills: jax.lax.scan(body, first, refills, length=steps)[1]
  return jax.vmap(one, in_axes=1, out_axes=1)(refill_TS)


def _adversary(gives_back: bool) -> Check:
  """Streams that have not ended after the largest sum of refills, or with more limit events than there are cuts and
  restarts. Refills up to 300: log-uniform, or all as large as possible.
  """

  def measure(key, scale):
    largest, cfg = 300 * scale, OrdinalConfig(A0=PLAIN.A0, B0=PLAIN.B0 + 2, P0=1)
    steps = (largest + 1) * (limit_events(cfg) + 1)
    refills = np.int32(largest ** _rng(key).random((steps, 16)))
    refills[:, 0] = largest
    event = np.asarray(_fall(steps, gives_back, refills))
    limits = np.sum((event == ANNEAL) | (event == RESTART), axis=0)
    return float(np.sum(limits > limit_events(cfg)) + np.sum(event[-1] != EXHAUSTED))

  return measure


def _false_alarms(cfg: OrdinalConfig) -> Check:
  """The larger share of observations 101 to 400 called improvements, of a Gaussian and a t(3) loss without trend."""

  def measure(key, scale):
    rng, shares = _rng(key), []
    for draw in (rng.standard_normal, lambda shape: rng.standard_t(3, shape)):
      shares.append(np.mean([run(cfg, 5 + draw((STEPS, STREAMS)))[1].improved[100:].mean() for _ in range(16 * scale)]))
    return worst_of(shares)

  return measure


def missed(cfg: OrdinalConfig, key: jax.Array, drop: float, rounds: int) -> float:
  """Share of streams in which no improvement is seen within 2400 observations after the mean loss has dropped by the
  fraction `drop`, 800 observations into the run, or only after patience has run out. Exponential losses: sd = mean.
  """
  rng, shares = _rng(key), []
  for _ in range(rounds):
    losses = rng.exponential(size=(8 * STEPS, STREAMS))
    losses[2 * STEPS :] *= 1 - drop
    _, trace = run(cfg, losses)
    alive = np.cumsum(trace.event == EXHAUSTED, axis=0) == 0
    shares.append(1 - np.mean(np.any((trace.improved & alive)[2 * STEPS :], axis=0)))
  return float(np.mean(shares))


def _plateau(aligned: bool) -> Check:
  """Largest difference of the scale from optax's reduce_on_plateau, on losses that rise: only first ones are best.

  The machine has one loss more before a cut, and after it spends one on the first best of the new level: a patience of
  P0 + 1 with a cooldown of 1.
  """

  def measure(key, scale):
    del scale
    losses = np.sort(_rng(key).random((STEPS, STREAMS)), axis=0)
    got = run(ONE_WAY, losses)[1].multiplier[:, 0]
    settings = {"patience": ONE_WAY.P0 + 1, "cooldown": 1} if aligned else {"patience": ONE_WAY.P0}
    return float(np.max(np.abs(got - _multipliers(losses[:, 0], **settings))))

  return measure


def _multipliers(losses: np.ndarray, **settings: Any) -> np.ndarray:
  schedule = plateau(factor=ONE_WAY.gamma, min_scale=ONE_WAY.gamma**ONE_WAY.B0, **settings)
  step = lambda state, loss: (lambda new, multiplier, event: (new, multiplier))(*schedule.update(state, loss))
  return np.asarray(jax.jit(lambda x: jax.lax.scan(step, schedule.init(), x)[1])(np.float32(losses)))


CLAIMS = (
  claim(
    "schedule.rank_descends",
    "the rank ω²a + ωb + c never rises, each loss without improvement lowers it, and at most (A0+1)(B0+1)-1 limit "
    "events happen, on any stream of losses",
    _descent(lambda cfg, losses: run(cfg, losses)[1], PLAIN, EAGER, ADAPTIVE),
    0.0,
    _descent(reference_trace, PLAIN),
  ),
  claim(
    "schedule.exact_length",
    "a constant loss reaches rank 0 after (A0+1) Σ_j (P0 g^j + 1) - 1 drops and (A0+1)(B0+1) first observations, and "
    "is exhausted one later",
    _exact_length(0),
    0.0,
    _exact_length(1),
  ),
  claim(
    "schedule.absorbing",
    "after EXHAUSTED, 10 000 further losses change neither rank nor scale and cause no event",
    _absorbing(False),
    0.0,
    _absorbing(True),
  ),
  claim(
    "schedule.improvement_holds",
    "while the mean loss falls the rank stays; with a mean that starts at +inf no improvement is ever seen",
    _improvement(False),
    0.0,
    _improvement(True),
  ),
  claim(
    "schedule.any_refill_ends",
    "with refills chosen by an adversary the descent ends within (A0+1)(B0+1)-1 limit events",
    _adversary(False),
    0.0,
    _adversary(True),
  ),
  claim(
    "schedule.false_alarms",
    "losses without trend: after 100 of them at most 1 in 400 counts as improvement; without the margin more do",
    _false_alarms(PATIENT),
    1 / 400,
    _false_alarms(RECORDS),
  ),
  claim(
    "schedule.detects_a_drop",
    "a drop of 10% in a mean as large as its standard deviation is seen within adaptive patience in 80% of streams",
    lambda key, scale: missed(DETECTOR, key, 0.1, 4 * scale),
    0.2,
    lambda key, scale: missed(IMPATIENT, key, 0.1, 4 * scale),
  ),
  claim(
    "schedule.reduces_on_plateau",
    "A0 = 0, g = 1, no averaging and no margin: the scale is that of reduce-on-plateau with patience P0+1, cooldown 1",
    _plateau(True),
    0.0,
    _plateau(False),
  ),
)
