"""What the stories and pictures of demos say, where it is computed outside of claims."""

import jax.numpy as jnp
import numpy as np
import pytest

from demos import braid as braid_demo
from demos import braid_tasks
from demos import fractal as fractal_demo
from mgr_jax.algebra import braid


class TestBraidDemo:
  def test_story(self, key):
    text = braid_demo.story(key)
    assert max(map(len, text.splitlines())) <= 100
    # The closure is the knot 5_2.
    assert "Δ(t) = 2t - 3 + 2t^-1\n" in text
    assert "V(t) = -t^6 + t^5 - t^4 + 2t^3 - t^2 + t;  of β': the same\n" in text
    assert "16 of 16 random words of length 10,000" in text

  def test_laws_before_and_after_the_move(self, key):
    moved = braid_demo.third_reidemeister(braid_demo.WORD, braid_demo.SITE)
    changes = braid_demo.law_changes(braid_demo.WORD, moved, key)
    assert max(changes["swap"], changes["Burau, t = 1/2"]) < 1e-12
    assert changes["restricted"] > 1e-2

  def test_texts(self):
    assert braid_demo.word_text(np.array([1, -12, 0])) == "σ₁σ₁₂⁻¹"
    assert braid_demo.word_text(np.array([0])) == "1"
    assert braid_demo.polynomial_text(np.array([1.0, 0, 3, -1, -2])) == "-2t - t^(1/2) + 3 + t^-1"
    assert braid_demo.polynomial_text(np.zeros(3)) == "0"
    assert braid_demo.mathtext("t^2 - t^(1/2) + t^-1") == "t^{2} - t^{(1/2)} + t^{-1}"

  def test_over_strands_are_unbroken(self):
    word = np.array([1, -2])
    broken = [bool(np.isnan(y).any()) for _, y in braid_demo.strand_paths(word)]
    # σ_1: strand 1 goes down over strand 2. σ_2⁻¹: strand 1 goes down under strand 3.
    assert broken == [True, True, False]
    ends = [-round(y[-1]) for _, y in braid_demo.strand_paths(word)]
    np.testing.assert_array_equal(ends, braid.permutation(jnp.array(word), 3))

  def test_low_rank_plot_shows_measured_and_predicted_decay(self, key, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(braid_demo, "RANKS", np.array([4, 12]))
    spectrum, interpolation = braid_demo.low_rank(key).axes
    for ax in (spectrum, interpolation):
      assert ax.get_xlabel() and ax.get_ylabel()
    measured, predicted = interpolation.lines[:2]
    ratio = np.asarray(measured.get_ydata()) / np.asarray(predicted.get_ydata())
    assert (ratio > 0.5).all() and (ratio < 2).all()


class TestBraidTasks:
  def test_trained_sums(self, monkeypatch):
    monkeypatch.setattr(braid_tasks, "STEPS", 300)
    rng = np.random.default_rng(0)
    error = braid_tasks.sum_errors(rng, braid_tasks.trained(rng), 100)
    assert error["hard gates"] < 1e-2 < error["softmax and count"]
    assert max(error["soft gates"], error["DeepSets"]) < 0.2 < error["softmax and count"]

  def test_trained_gates_are_words(self):
    rng = np.random.default_rng(0)
    k, off = braid_tasks.as_words(rng, {"hard gates": np.float32([1.0, 0.1, 1.0])}, 50)
    assert len(set(k)) > 1 and off < 1e-4

  def test_hard_letters_track_products(self):
    right = braid_tasks.tracked(np.random.default_rng(0), 2, 300, (1.0, 0.9))
    assert right[:, :, 0].all()
    assert right[:, -1, 1].mean() < 0.5

  def test_products_multiply_transpositions(self):
    np.testing.assert_array_equal(
      braid_tasks.products(np.array([[1, 2, 0]]))[0], [[1, 0, 2, 3, 4], [1, 2, 0, 3, 4], [1, 2, 0, 3, 4]]
    )


class TestFractalDemo:
  def test_the_store_is_the_array_and_follows_the_law(self):
    arms = fractal_demo.retention_arms(np.random.default_rng(0), (16, 64, 256, 1024))
    assert arms["IFS store"] == arms["plain array"]
    np.testing.assert_allclose(arms["plain array"], fractal_demo.law((16, 64, 256, 1024)), atol=0.1)
    assert arms["queue"] == [1, 1, 1, 0.25] and arms["neighbours"] == [1, 1, 0.5, 0.125]

  def test_distances_fall_as_the_theorem_says(self):
    for name in ("triangle", "corners"):
      distance, s = fractal_demo.approaches(name)
      np.testing.assert_allclose(distance, distance[0] * s ** np.arange(len(distance)), rtol=0.05)

  def test_noise_below_the_margin_is_harmless(self):
    margins = fractal_demo.margins()
    assert np.all(np.diag(fractal_demo.corrupted(np.random.default_rng(0), 0.99 * margins, 2000)) == 0)
    assert np.all(np.diag(fractal_demo.corrupted(np.random.default_rng(0), 1.5 * margins, 2000)) > 0.02)

  def test_binary_digits_gain_six_decibels_each(self):
    gain = np.diff(fractal_demo.code_quality(np.random.default_rng(0), 0.5))
    np.testing.assert_allclose(gain, 20 * np.log10(2), atol=0.2)
    assert fractal_demo.code_quality(np.random.default_rng(0), 0.4)[-1] < 35
