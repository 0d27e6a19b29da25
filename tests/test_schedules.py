"""Schedules against closed forms at every step, and their errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax.problems import UserError
from mgr_jax.schedules import NO_EVENT, make_schedule, schedule_settings

OPEN_LOOP = ("constant", "cosine", "wsd")  # those that the step alone decides


def multipliers(schedule, steps: int) -> np.ndarray:
  """The multiplier of every step, from one compiled update."""

  def body(state, loss):
    state, multiplier, event = schedule.update(state, loss)
    return state, (multiplier, event)

  _, (got, events) = jax.lax.scan(body, schedule.init(), jnp.full((steps,), 3.0, jnp.float32))
  assert got.dtype == jnp.float32
  assert events.dtype == jnp.int32
  assert np.all(np.asarray(events) == NO_EVENT)
  return np.asarray(got, np.float64)


def closed_form(name: str, t: int, N: int, W: int, f: float, D: float) -> float:
  warmup = min(1.0, (t + 1) / W) if W else 1.0
  if name == "constant":
    return warmup
  if name == "cosine":
    x = min(max((t - W) / (N - W), 0.0), 1.0)
    return warmup * (f + (1 - f) * (1 + math.cos(math.pi * x)) / 2)
  y = min(max((t - (N - D)) / D, 0.0), 1.0)
  return warmup * (1 - (1 - f) * y)


CASES = [(1, 0, 0.0), (1, 0, 0.3), (2, 1, 0.0), (7, 3, 0.1), (200, 4, 0.0), (200, 50, 0.25), (1003, 100, 0.0)]


@pytest.mark.parametrize("name", OPEN_LOOP)
@pytest.mark.parametrize(("N", "W", "f"), CASES)
def test_every_step_equals_the_closed_form(name, N, W, f):
  asked = {"lr_warmup_steps": W, "final_lr_frac": f, "warmdown_frac": 0.3}
  settings = {k: v for k, v in asked.items() if k in schedule_settings(name)}
  got = multipliers(make_schedule(name, N, **settings), N + 5)
  want = np.array([closed_form(name, t, N, W, f, 0.3 * N) for t in range(N + 5)])
  np.testing.assert_allclose(got, want, atol=2e-6)
  if N > 2:
    late = np.array([closed_form(name, t + 1, N, W, f, 0.3 * N) for t in range(N + 5)])
    assert np.max(np.abs(got - late)) > 1e-4


def test_warmup_begins_at_the_first_step_and_never_at_zero():
  got = multipliers(make_schedule("constant", 100, lr_warmup_steps=10), 100)
  np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, atol=1e-7)
  assert np.all(got[9:] == 1.0)


@pytest.mark.parametrize(("N", "W"), [(1, 0), (49, 0), (50, 1), (200, 4), (5000, 100), (10**6, 100)])
def test_default_warmup_is_two_percent_up_to_a_hundred_steps(N, W):
  got = multipliers(make_schedule("constant", N), 110)
  want = [closed_form("constant", t, N, W, 0, 0) for t in range(110)]
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_wsd_is_exactly_one_on_its_plateau_and_then_falls_in_a_line():
  got = multipliers(make_schedule("wsd", 200), 201)
  assert np.all(got[3:161] == 1.0)
  np.testing.assert_allclose(np.diff(got[160:201]), -1 / 40, atol=1e-6)
  assert got[199] == pytest.approx(1 / 40, abs=1e-6)
  assert got[200] == 0.0


@pytest.mark.parametrize(
  ("shape", "middle", "integral"), [("linear", 0.5, 1 / 2), ("sqrt", 0.5**0.5, 2 / 3), ("cosine", 0.5, 1 / 2)]
)
def test_shapes_of_the_warmdown(shape, middle, integral):
  N, f = 1000, 0.2
  settings = {"lr_warmup_steps": 0, "warmdown_frac": 0.4, "final_lr_frac": f}
  got = multipliers(make_schedule("wsd", N, warmdown_shape=shape, **settings), N + 3)
  assert np.all(got[:600] == 1.0)
  assert got[800] == pytest.approx(1 - (1 - f) * middle, abs=1e-6)
  np.testing.assert_allclose(got[N:], f, atol=1e-6)
  assert np.all(np.diff(got[600:]) <= 0)
  assert got.sum() == pytest.approx(600 + 400 * (1 - (1 - f) * integral) + 3 * f, rel=2 / 400)
  other = multipliers(
    make_schedule("wsd", N, warmdown_shape="sqrt" if shape != "sqrt" else "linear", **settings), N + 3
  )
  assert np.max(np.abs(got - other)) > 0.05


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_never_increases_after_warmup_and_ends_at_the_final_fraction(name):
  got = multipliers(make_schedule(name, 300, lr_warmup_steps=20, final_lr_frac=0.1), 320)
  assert np.all(np.diff(got[20:]) <= 0)
  assert np.all(np.diff(got[:20]) > 0)
  np.testing.assert_allclose(got[300:], 0.1, atol=1e-6)


def test_cosine_equals_optax_after_matching_conventions():
  # optax starts the decay one step after its warm-up has reached the peak; ours reaches the peak at t = W - 1.
  got = multipliers(make_schedule("cosine", 100, lr_warmup_steps=10, final_lr_frac=0.2), 100)
  oracle = optax.cosine_decay_schedule(1.0, 90, alpha=0.2)
  want = np.array([oracle(t - 10) for t in range(10, 100)])
  np.testing.assert_allclose(got[10:], want, atol=1e-6)
  assert np.max(np.abs(got[9:99] - want)) > 1e-3


def test_sum_over_the_run_is_the_integral():
  N, W, f = 1000, 100, 0.1
  settings = {"lr_warmup_steps": W, "final_lr_frac": f}
  warm = (W + 1) / 2
  cosine = multipliers(make_schedule("cosine", N, **settings), N).sum()
  wsd = multipliers(make_schedule("wsd", N, **settings), N).sum()
  assert cosine == pytest.approx(warm + (1 + f) * (N - W) / 2, rel=2 / W)
  assert wsd == pytest.approx(warm + 0.8 * N - W + (1 + f) * 0.2 * N / 2, rel=2 / W)


@pytest.mark.parametrize("name", OPEN_LOOP)
def test_state_is_small_vmappable_and_ignores_the_loss(name):
  schedule = make_schedule(name, 50)
  state = schedule.init()
  assert sum(x.size for x in jax.tree.leaves(state)) == 1
  many = jax.tree.map(lambda x: jnp.arange(50, dtype=x.dtype), state)
  after, together, _ = jax.vmap(schedule.update)(many, jnp.full((50,), jnp.nan))
  np.testing.assert_allclose(np.asarray(together), multipliers(schedule, 50), atol=1e-7)
  np.testing.assert_array_equal(np.asarray(jax.tree.leaves(after)[0]), np.arange(1, 51))


def test_no_decay_without_warmdown():
  assert np.all(multipliers(make_schedule("wsd", 10, lr_warmup_steps=0, warmdown_frac=0.0), 10) == 1.0)


@pytest.mark.parametrize(
  ("name", "steps", "settings", "parts"),
  [
    ("wds", 10, {}, ("--schedule=wds", "did you mean wsd?", "cosine")),
    ("wsd", 0, {}, ("0 steps", "--max_steps")),
    ("cosine", 10, {"final_lr_frac": 1.5}, ("--final_lr_frac=1.5", "[0, 1]")),
    ("wsd", 10, {"warmdown_frac": -0.1}, ("--warmdown_frac=-0.1",)),
    ("wsd", 10, {"warmdown_shape": "line"}, ("--warmdown_shape=line is unknown", "linear, sqrt, cosine")),
    ("wsd", 10, {"lr_warmup_steps": -2}, ("--lr_warmup_steps=-2", "-1 for 2%")),
    ("wsd", 10, {"lr_warmup_steps": 9}, ("--lr_warmup_steps=9", "10 steps", "--lr_warmup_steps=8")),
    ("constant", 10, {"lr_warmup_steps": 11}, ("--lr_warmup_steps=11 does not fit", "--lr_warmup_steps=10")),
    ("constant", 10, {"warmdown_frac": 0.5}, ("--warmdown_frac=0.5 has no effect", "--lr_warmup_steps")),
  ],
)
def test_errors_name_the_value_and_a_way_out(name, steps, settings, parts):
  with pytest.raises(UserError) as e:
    make_schedule(name, steps, **settings)
  for part in parts:
    assert part in str(e.value)
