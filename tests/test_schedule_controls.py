"""Schedules that experiments compare against, and what holds for schedules of every kind."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax.schedules import base, controls

N, W, F = 600, 60, 0.1
OFF = {"lr_warmup_steps": W, "final_lr_frac": F}
SCHEDULES = {
  "constant": base.constant(N, lr_warmup_steps=W),
  "cosine": base.cosine(N, **OFF),
  **{f"wsd-{shape}": base.wsd(N, warmdown_shape=shape, **OFF) for shape in base.WARMDOWN_SHAPES},
  "linear": controls.linear(N, **OFF),
  "inv_sqrt": controls.inv_sqrt(N, lr_warmup_steps=W),
  "sgdr": controls.sgdr(N, period=200, final_lr_frac=F),
  "sgdr-growing": controls.sgdr(N, period=40, growth=2, final_lr_frac=F),
  "piecewise": controls.piecewise([200, 400], [1.0, 0.5, F]),
}
DECREASING = [name for name in SCHEDULES if not name.startswith("sgdr")]
TO_THE_END = [name for name in SCHEDULES if name not in ("constant", "inv_sqrt")]


def at_steps(schedule: base.Schedule, t: jax.Array):
  """State, multiplier and event of each step of `t`, without running to it."""
  return jax.vmap(schedule.update, in_axes=(0, None))(base.StepState(t), jnp.float32(1))


@pytest.fixture(scope="module")
def multipliers() -> dict[str, np.ndarray]:
  """The multiplier of every step and twenty more, of every schedule, from one compiled scan."""

  def body(states, loss):
    found = [s.update(state, loss) for s, state in zip(SCHEDULES.values(), states, strict=True)]
    return [state for state, _, _ in found], jnp.stack([m for _, m, _ in found])

  run = jax.jit(lambda losses: jax.lax.scan(body, [s.init() for s in SCHEDULES.values()], losses)[1])
  found = np.asarray(run(np.full(N + 20, np.nan, np.float32)), np.float64)
  return dict(zip(SCHEDULES, found.T, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_range_peak_and_end(name, multipliers):
  got = multipliers[name]
  assert got[0] > 0 and np.all((got >= 0) & (got <= 1 + 1e-6))
  assert got[W - 1] == pytest.approx(1.0, abs=1e-6) or name.startswith("sgdr")
  assert np.all(got[N:] == got[N])
  if name in TO_THE_END:
    assert got[N] == pytest.approx(F, abs=1e-6)


def test_only_warm_restarts_rise_after_the_warmup(multipliers):
  rises = {name for name, got in multipliers.items() if np.any(np.diff(got[W - 1 :]) > 1e-7)}
  assert rises == set(SCHEDULES) - set(DECREASING)
  for shape in base.WARMDOWN_SHAPES:
    assert np.all(multipliers[f"wsd-{shape}"][W - 1 : N - N // 5 + 1] == 1.0)


SUMS = {
  "constant": N - W,
  "cosine": (1 + F) * (N - W) / 2,
  "linear": (1 + F) * (N - W) / 2,
  "wsd-linear": 0.8 * N - W + (1 + F) * 0.2 * N / 2,
  "wsd-cosine": 0.8 * N - W + (1 + F) * 0.2 * N / 2,
  "wsd-sqrt": 0.8 * N - W + 0.2 * N * (1 + 2 * F) / 3,
  "inv_sqrt": 2 * math.sqrt(W) * (math.sqrt(N) - math.sqrt(W)),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_sum_of_multipliers_is_the_integral(name, multipliers):
  got = multipliers[name][:N].sum()
  assert got == pytest.approx((W + 1) / 2 + SUMS[name], rel=2 / W)
  assert got != pytest.approx((W + 1) / 2 + 1.1 * SUMS[name], rel=2 / W)


def test_every_step_equals_the_closed_form(multipliers):
  t = np.arange(N + 1)
  x = np.clip((t - W) / (N - W), 0, 1)
  warm = np.minimum(1, (t + 1) / W)
  want = {
    "linear": warm * (1 - (1 - F) * x),
    "inv_sqrt": warm * np.sqrt(W / np.maximum(t + 1, W)),
    "sgdr": np.where(t < N, F + (1 - F) * 0.5 * (1 + np.cos(np.pi * (t % 200) / 200)), F),
    "piecewise": np.where(t < 200, 1.0, np.where(t < 400, 0.5, F)),
  }
  for name, values in want.items():
    np.testing.assert_allclose(multipliers[name][: N + 1], values, atol=2e-6, err_msg=name)
    assert np.max(np.abs(multipliers[name][:N] - values[1:])) > 1e-3, "off by one"


@pytest.mark.parametrize(("period", "growth"), [(40, 2.0), (7, 3.0), (1, 2.0), (10, 1.5), (1000, 2.0), (3, 1.0)])
def test_cycles_of_warm_restarts_equal_a_loop_over_them(period, growth):
  steps, want, length = 30_000, [], float(period)
  begin = 0.0
  for t in range(steps):
    while t >= begin + length:
      begin, length = begin + length, length * growth
    want.append(0.5 * (1 + math.cos(math.pi * (t - begin) / length)))
  schedule = controls.sgdr(steps, period=period, growth=growth)
  # All steps: around the starts of late cycles a rounded logarithm would choose the wrong cycle.
  _, got, _ = jax.jit(lambda t: at_steps(schedule, t))(jnp.arange(steps, dtype=jnp.int32))
  np.testing.assert_allclose(got, want, atol=1e-3 if growth == 1.5 else 1e-5)


def test_warm_restarts_equal_optax():
  cycle = {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0}
  theirs = optax.sgdr_schedule([cycle | {"decay_steps": 40 * 2**i} for i in range(4)])
  ours = controls.sgdr(N, period=40, growth=2)
  t = jnp.arange(N - 1, dtype=jnp.int32)
  got, want = jax.jit(lambda t: (at_steps(ours, t)[1], jax.vmap(theirs)(t)))(t)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.max(np.abs(got[1:] - want[:-1])) > 1e-2


def test_a_vmapped_table_of_steps_equals_the_scan(multipliers):
  t = jnp.arange(N + 20, dtype=jnp.int32)
  tables = jax.jit(lambda t: {name: at_steps(schedule, t) for name, schedule in SCHEDULES.items()})(t)
  for name, (_, got, events) in tables.items():
    assert got.dtype == jnp.float32 and not np.any(events)
    np.testing.assert_allclose(got, multipliers[name], atol=1e-6, err_msg=name)


def test_plateau_cuts_after_its_patience_and_not_while_the_loss_falls():
  schedule = controls.plateau(factor=0.5, patience=3, rtol=1e-6, min_scale=0.25)
  step = jax.jit(lambda losses: jax.lax.scan(lambda s, x: schedule.update(s, x)[:2], schedule.init(), losses)[1])
  np.testing.assert_array_equal(step(np.ones(12, np.float32)), [1, 1, 1, *[0.5] * 3, *[0.25] * 6])
  np.testing.assert_array_equal(step(np.arange(12, 0, -1, dtype=np.float32)), np.ones(12))


@pytest.mark.parametrize(
  ("make", "parts"),
  [
    (lambda: controls.linear(0), ["total_steps=0"]),
    (lambda: controls.linear(10, lr_warmup_steps=11, final_lr_frac=2), ["lr_warmup_steps=11", "final_lr_frac=2"]),
    (lambda: controls.inv_sqrt(10, lr_warmup_steps=-1), ["lr_warmup_steps=-1"]),
    (lambda: controls.sgdr(10, period=0), ["period=0"]),
    (lambda: controls.sgdr(10, period=2, growth=0.5), ["growth=0.5"]),
    (lambda: controls.piecewise([3], [1.0]), ["values: 1", "1 boundaries"]),
    (lambda: controls.piecewise([3, 3], [1.0, 0.5, 0.1]), ["boundaries=[3, 3]"]),
    (lambda: controls.plateau(factor=2.0), ["(0, 1)"]),
  ],
)
def test_errors_name_the_argument(make, parts):
  with pytest.raises(ValueError) as e:
    make()
  for part in parts:
    assert part in str(e.value)
