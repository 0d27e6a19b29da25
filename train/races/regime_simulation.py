"""Every schedule on the same streams of a linear regression whose truth changes twice, in one scan over time."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgr_jax.schedules import Schedule, base, controls
from mgr_jax.schedules.ordinal import machine
from mgr_jax.schedules.ordinal_machine import OrdinalConfig, suggested_patience

DIM = 20
SEGMENTS = (0.0, 0.4, 0.7, 1.0)
SCORED = 0.05  # share of each segment, at its end
BLOCKS = 100  # points of a learning curve
RATES = 18
FREE = "schedule_free"
BLIND = " blind"


def ordinal_configs(steps: int) -> dict[str, OrdinalConfig]:
  """The machines: one whose budget spans the run, one that is spent before half of it, and two that use more feedback.

  `adaptive` sets its patience from the noise, `rise` restarts when the mean loss has risen. Both clip the losses, as
  squares of t(3) noise have no variance. A phase of `rise` is longer than any segment, so that no timer restarts it;
  its trigger was chosen among seven on streams of seeds 2000 to 2011.
  """
  span = suggested_patience(steps, OrdinalConfig())
  clipped = {"clip_loss": 3.0}
  return {
    "ordinal": OrdinalConfig(P0=span),
    "ordinal early": OrdinalConfig(P0=max(1, steps // 100)),
    "ordinal adaptive": OrdinalConfig(
      P0=max(1, steps // 100), refill="adaptive", rel_tol=0.2, p_max=max(1, steps // 4), **clipped
    ),
    "ordinal rise": OrdinalConfig(
      P0=max(1, steps * 3 // 100), ema_decay=0.99, rise_z=6.0, rise_count=max(1, steps // 400), **clipped
    ),
  }


def schedules(steps: int) -> tuple[dict[str, Schedule], dict[str, Schedule]]:
  """(arms that ignore the loss, arms that look at it), by name; schedule-free averaging is no schedule.

  A blind twin is the machine of the same configuration fed with NaN, which is never an improvement: a timer.
  """
  configs = ordinal_configs(steps)
  off = {"lr_warmup_steps": 0}
  cycles = next(iter(configs.values())).A0 + 1
  blind = {
    "constant": base.constant(steps, **off),
    "cosine": base.cosine(steps, **off),
    "linear": controls.linear(steps),
    "wsd": base.wsd(steps, **off),
    "sgdr": controls.sgdr(steps, period=-(-steps // cycles)),
  }
  blind |= {name + BLIND: machine(cfg) for name, cfg in configs.items()}
  patience = max(1, steps // 200)  # means of 10 losses: T/20 losses
  seeing = {"plateau": controls.plateau(factor=0.5, patience=patience, accumulation_size=10, min_scale=1 / 8)}
  return blind, seeing | {name: machine(cfg) for name, cfg in configs.items()}


def names(steps: int) -> list[str]:
  """All arms, in the order of the arrays of `Race`."""
  blind, seeing = schedules(steps)
  return [*blind, *seeing, FREE]


def rates(steps: int) -> np.ndarray:
  """The grid: 4/T up to 1600/T or 0.9 of the largest stable rate 2/(d+2), equally spaced in the logarithm."""
  return np.geomspace(4 / steps, min(1600 / steps, 1.8 / (DIM + 2)), RATES)


class Streams(NamedTuple):
  """x float32 [T, S, d], noise [T, S], truths [3, S, d]."""

  x: np.ndarray
  noise: np.ndarray
  truth: np.ndarray


def draw(seeds: Sequence[int], steps: int) -> Streams:
  """One stream per seed."""
  parts = []
  for seed in seeds:
    rng = np.random.default_rng([20, seed])
    truth = rng.standard_normal((len(SEGMENTS) - 1, DIM))
    truth /= np.linalg.norm(truth, axis=-1, keepdims=True)
    parts.append((rng.standard_normal((steps, DIM), np.float32), rng.standard_t(3, steps), truth))
  return Streams(*(np.stack(part, axis=1).astype(np.float32) for part in zip(*parts, strict=True)))


def segments(steps: int) -> tuple[np.ndarray, np.ndarray]:
  """(segment of each step, weight of each step in the score); the weights sum to 1, alike for each segment."""
  edges = [round(edge * steps) for edge in SEGMENTS]
  which, weight = np.zeros(steps, np.int32), np.zeros(steps, np.float32)
  for k, (start, stop) in enumerate(itertools.pairwise(edges)):
    first = stop - max(1, round(SCORED * (stop - start)))
    which[start:stop] = k
    weight[first:stop] = 1 / (stop - first) / (len(edges) - 1)
  return which, weight


@functools.partial(jax.jit, static_argnums=0)
def timetable(steps: int) -> jax.Array:
  """Multipliers of the arms that ignore the loss, [T, arms]; the blind twins are fed NaN, which they cannot use."""
  arms = schedules(steps)[0].values()

  def body(states, _):
    found = [arm.update(state, jnp.float32(jnp.nan)) for arm, state in zip(arms, states, strict=True)]
    return [state for state, _, _ in found], jnp.stack([multiplier for _, multiplier, _ in found])

  return jax.lax.scan(body, [arm.init() for arm in arms], None, length=steps)[1]


class Race(NamedTuple):
  """`risk` [arms, S, rates], the score; learning curves `excess` and `multiplier` [BLOCKS, arms, S, rates], means over
  each block of steps; final states of the arms that look at the loss, [S, rates].
  """

  risk: jax.Array
  excess: jax.Array
  multiplier: jax.Array
  states: list[Any]


def _averaged(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
  return optax.contrib.schedule_free(optax.sgd(rate), rate, b1=0.9)


def _averaged_step(rate, point, state, x, y):
  """One step of schedule-free gradient descent, with the averaged point that is judged."""
  updates, state = _averaged(rate).update((point @ x - y) * x, state, point)
  point = optax.apply_updates(point, updates)
  return point, state, optax.contrib.schedule_free_eval_params(state, point)


@functools.partial(jax.jit, static_argnums=0)
def race(steps: int, rate_G: jax.Array, streams: Streams, table: jax.Array) -> Race:
  """All arms on all streams at all rates; arms in the order of `names`, `table` from `timetable`.

  θ <- θ - rate·multiplier·(<x, θ> - y)·x per sample. Cost: O(T·arms·S·G·d) in one compiled scan.
  """
  seeing = schedules(steps)[1].values()
  S, G, A = streams.x.shape[1], len(rate_G), table.shape[1] + len(seeing)
  lanes = lambda f: jax.vmap(jax.vmap(f))
  rate_SG = jnp.broadcast_to(rate_G, (S, G))

  def update(carry, now):
    point_ASGd, states, free, free_state = carry
    x_Sd, noise_S, truth_Sd, table_A = now
    y_S = jnp.sum(x_Sd * truth_Sd, -1) + noise_S
    error = jnp.einsum("asgd,sd->asg", point_ASGd, x_Sd) - y_S[:, None]
    losses = 0.5 * error[-len(seeing) :] ** 2
    found = [lanes(arm.update)(state, loss) for arm, state, loss in zip(seeing, states, losses, strict=True)]
    timed = jnp.broadcast_to(table_A[:, None, None], (len(table_A), S, G))
    multiplier = jnp.concatenate([timed, jnp.stack([m for _, m, _ in found])])
    sample = jnp.broadcast_to(x_Sd[:, None], (S, G, DIM)), jnp.broadcast_to(y_S[:, None], (S, G))
    free, free_state, mean = lanes(_averaged_step)(rate_SG, free, free_state, *sample)
    point_ASGd = point_ASGd - (rate_G * multiplier * error)[..., None] * x_Sd[:, None]
    excess = jnp.sum((jnp.concatenate([point_ASGd, mean[None]]) - truth_Sd[:, None]) ** 2, -1)
    multiplier = jnp.concatenate([multiplier, jnp.ones((1, S, G))])
    return (point_ASGd, [state for state, _, _ in found], free, free_state), (excess, multiplier)

  def step(carry, now):
    inner, risk, sums = carry
    weight, sample = now
    inner, found = update(inner, sample)
    return (inner, risk + weight * found[0], jax.tree.map(jnp.add, sums, found)), None

  def block(carry, now):
    zeros = (jnp.zeros((A + 1, S, G)),) * 2
    (inner, risk, sums), _ = jax.lax.scan(step, (*carry, zeros), now)
    return (inner, risk), jax.tree.map(lambda v: v / (steps // BLOCKS), sums)

  wide = lambda tree: jax.tree.map(lambda v: jnp.broadcast_to(v, (S, G, *v.shape)), tree)
  start = jnp.zeros((S, G, DIM))
  free_state = lanes(lambda rate, point: _averaged(rate).init(point))(rate_SG, start)
  first = jnp.zeros((A, S, G, DIM)), [wide(arm.init()) for arm in seeing], start, free_state
  which, weight = segments(steps)
  samples = weight, (streams.x, streams.noise, streams.truth[which], table)
  blocks = jax.tree.map(lambda v: jnp.reshape(v, (BLOCKS, steps // BLOCKS, *v.shape[1:])), samples)
  ((_, states, _, _), risk), curves = jax.lax.scan(block, (first, jnp.zeros((A + 1, S, G))), blocks)
  return Race(risk, *curves, states)
