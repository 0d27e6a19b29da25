"""The regression with two changes of truth: its parts against plain NumPy, one small race, verdicts, the report."""

import json
import math

import numpy as np
import pytest

from mgr_jax.problems import UserError
from mgr_jax.schedules.ordinal_machine import n_drops
from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED
from train.races import regime
from train.races import regime_simulation as simulation

STEPS = 1000


@pytest.fixture(scope="module")
def result():
  return regime.run(2, STEPS, say=lambda line: None)


def test_scored_steps_are_the_ends_of_the_segments():
  which, weight = simulation.segments(20_000)
  np.testing.assert_array_equal(np.flatnonzero(np.diff(which)), [7_999, 13_999])
  assert weight.sum() == pytest.approx(1.0, abs=1e-5)
  starts = np.flatnonzero(np.diff(np.r_[0, weight > 0]) == 1)
  np.testing.assert_array_equal(starts, [7_600, 13_700, 19_700])


def test_streams_depend_on_their_seed_alone_and_truths_are_unit():
  both, one = simulation.draw([7, 3], 200), simulation.draw([3], 200)
  np.testing.assert_array_equal(both.x[:, 1], one.x[:, 0])
  np.testing.assert_allclose(np.linalg.norm(both.truth, axis=-1), 1.0, atol=1e-6)
  assert not np.array_equal(both.x[:, 0], both.x[:, 1])
  assert both.x.shape == (200, 2, simulation.DIM) and both.noise.shape == (200, 2) and both.truth.shape[0] == 3


def test_budgets_span_the_run_or_half_of_it_and_no_phase_of_rise_ends_by_itself():
  for steps in (2000, 20_000):
    configs = simulation.ordinal_configs(steps)
    assert 0.97 < n_drops(configs["ordinal"]) / steps <= 1.0
    assert n_drops(configs["ordinal early"]) / steps < 0.5
    rise = configs["ordinal rise"]
    assert n_drops(rise) / (rise.A0 + 1) > 0.4 * steps


def test_a_run_by_hand_scores_the_same(result):
  name, g = "linear", result["rates"].index(result["arms"]["linear"]["rate"])
  streams = simulation.draw([0, 1], STEPS)
  which, weight = simulation.segments(STEPS)
  point, risk = np.zeros((2, simulation.DIM)), np.zeros(2)
  for t in range(STEPS):
    x, truth = streams.x[t], streams.truth[which[t]]
    error = np.sum(x * (point - truth), -1) - streams.noise[t]
    point = point - result["rates"][g] * (1 - t / STEPS) * error[:, None] * x
    risk += weight[t] * np.sum((point - truth) ** 2, -1)
  np.testing.assert_allclose(result["arms"][name]["risk"], risk, rtol=1e-3)
  assert not np.allclose(result["arms"]["constant"]["risk"], risk, rtol=1e-2)


def test_a_race_holds_every_arm_and_fits_into_json_and_a_page(result):
  arms = result["arms"]
  assert set(arms) == set(simulation.names(STEPS)) and len(arms) == 15
  for name, arm in arms.items():
    assert len(arm["risk"]) == 2 and len(arm["excess"]) == len(arm["multiplier"]) == simulation.BLOCKS
    assert min(arm["risk"]) > 0 and arm["rate"] in result["rates"], name
  twin, machine = arms["ordinal blind"]["multiplier"], arms["ordinal"]["multiplier"]
  assert max(np.abs(np.subtract(twin, machine))) < 1 and twin != machine
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  text = regime.report(result)
  assert max(map(len, text.splitlines())) <= 100
  assert all(name in text for name in arms) and len(result["claims"]) == 8


def arms_with(ratios, edge=False):
  baseline = np.full(len(ratios), 0.02)
  row = lambda risk, edge: {"risk": list(risk), "edge": edge}
  return {"arm": row(baseline * ratios, edge), "baseline": row(baseline, False)}


@pytest.mark.parametrize(
  ("ratios", "edge", "verdict"),
  [
    ([0.8, 0.85, 0.9, 0.9, 1.02] * 4, False, SUPPORTED),
    ([0.8, 0.85, 0.9, 0.9, 1.02] * 4, True, INCONCLUSIVE),
    ([0.6, 0.8, 0.9, 1.1, 1.2] * 4, False, INCONCLUSIVE),
    ([0.98, 1.0, 1.01, 0.99, 1.0] * 4, False, REFUTED),
    ([0.8, 0.9, math.inf, 0.9], False, INCONCLUSIVE),
    ([0.9, 0.9, 1.02, 0.9, 1.02] * 4, False, INCONCLUSIVE),
  ],
)
def test_verdicts_follow_the_stated_rules(ratios, edge, verdict):
  found = regime.judge(arms_with(np.array(ratios), edge), "arm", "baseline")
  assert found["verdict"] == verdict, found["reason"]


@pytest.mark.parametrize(("seeds", "steps", "part"), [(1, 1000, "--seeds=1"), (4, 950, "--steps=950")])
def test_sizes_that_cannot_be_run(seeds, steps, part):
  with pytest.raises(UserError, match=part):
    regime.run(seeds, steps)
