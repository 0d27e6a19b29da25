"""The race on stiff quadratics: its problems, its arms against closed forms, tuning, plateaus and verdicts."""

import math

import jax
import numpy as np
import pytest

from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED
from train.races import stiff


@pytest.fixture(scope="module")
def problems():
  return stiff.cases([0, 1])


def test_spectra_and_starts(problems):
  l, w, U = problems
  assert l.shape == w.shape == (len(stiff.SPECTRA) * len(stiff.CONDITIONS) * 2, stiff.DIM)
  np.testing.assert_allclose(l.max(1) / l.min(1), np.tile(np.repeat(stiff.CONDITIONS, 2), len(stiff.SPECTRA)))
  np.testing.assert_array_equal(w[0], w[2])
  assert not np.array_equal(w[0], w[1])
  np.testing.assert_allclose(U[0] @ U[0].T, np.eye(stiff.DIM), atol=1e-12)
  last = stiff.spectrum("outliers", 1e6, np.random.default_rng(0))
  assert np.sum(last > 1e-3) == 10 and np.sum(last <= 1e-5) == stiff.DIM - 10


def test_arms_equal_closed_forms(problems):
  l, w, _ = (x[:2] for x in problems)
  sizes = np.array([0.5, 1.5])
  with jax.enable_x64(True):
    flat = stiff._first_order("sgd", 7, l, w, sizes)
    np.testing.assert_allclose(flat, w[:, None] * (1 - sizes[:, None] * l[:, None]) ** 7, rtol=1e-10, atol=1e-12)
    # A spectrum of two values: rank 2 is exact, and steps add up to one of their total time.
    two = np.where(np.arange(stiff.DIM) % 2, 1.0, 1e-4)[None]
    found = stiff._hoss(2, 3, two, w[:1], sizes)
    np.testing.assert_allclose(found[0], w[0] * np.exp(-3 * sizes[:, None] * two), rtol=1e-6)


def test_tuning_and_plateaus():
  loss = np.array([[1.0, 0.1, 0.11, math.inf], [1.0, 0.3, 0.1, math.inf]])
  assert stiff.best(loss) == 2
  np.testing.assert_allclose(stiff.tuned(loss), np.log10([0.11, 0.1]))
  np.testing.assert_allclose(stiff.plateau(loss), [0.5, 0.5])
  assert stiff.plateau(np.array([1.0, 1.04, 1.06])) == 1.0


def test_verdicts():
  shape = (len(stiff.SPECTRA), len(stiff.CONDITIONS), 3, len(stiff.GRID))
  rng = np.random.default_rng(0)
  peaked = np.where(np.arange(len(stiff.GRID)) == 4, 1e-3, 1.0) * rng.uniform(0.9, 1.1, shape)
  loss = {arm: peaked * rng.uniform(0.99, 1.01, shape) for arm in stiff.arms()}
  words = lambda: [row["verdict"] for row in stiff.verdicts(loss)[:3]]
  assert words()[2] == REFUTED, "plateaus of one point each"
  for arm in ("hoss 2", "hoss 4", "hoss 8", "hoss 16"):
    loss[arm] = np.full(shape, 1e-5)
  assert words() == [SUPPORTED] * 3
  loss["hoss 8"] = np.full(shape, 1e-2)
  assert words()[2] == REFUTED, "wider, but worse"
  assert "its best is worse" in stiff.verdicts(loss)[2]["prediction"]
  loss["momentum"] = np.where(np.arange(3)[:, None] == 0, 1e-9, 1e-3) * np.ones(shape)
  assert words()[1] == INCONCLUSIVE
