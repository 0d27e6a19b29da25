"""Iterated function systems: attractors, dimensions, addresses and the memory built on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import ifs, ifs_address, ifs_memory
from mgr_jax.algebra.ifs_claims import CLAIMS
from mgr_jax.claims import run_claims


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


def test_chaos_game_stays_on_the_attractor(key):
  maps = ifs.sierpinski()
  points = np.asarray(jax.jit(ifs.chaos_game, static_argnums=(2, 3))(key, maps, 200, 300))
  assert points.shape == (60000, 2)
  # In barycentric binary digits no digit of the triangle is one twice at the same place.
  y = points[:, 1] / (3**0.5 / 2)
  x = points[:, 0] - y / 2
  digits = lambda t: np.floor(np.clip(t, 0, 1 - 1e-9)[:, None] * 2.0 ** np.arange(1, 9)).astype(int) % 2
  inside = (digits(x) & digits(y)) == 0
  assert np.mean(inside.all(1)) > 0.99
  assert np.mean(((digits(np.random.default_rng(0).uniform(size=5000)) & digits(y[:5000])) == 0).all(1)) < 0.5


def test_box_counting_finds_the_similarity_dimension(key):
  points = jax.jit(ifs.chaos_game, static_argnums=(2, 3))(key, ifs.sierpinski(), 1000, 300)
  found = ifs.box_counting_dimension(points, 2.0 ** -np.arange(2, 8))
  assert abs(found - np.log(3) / np.log(2)) < 0.05
  square = np.random.default_rng(0).uniform(size=(100_000, 2))
  assert abs(ifs.box_counting_dimension(square, 2.0 ** -np.arange(2, 7)) - 2) < 0.05


def test_the_fern_contracts_and_its_points_stay_inside_its_box(key):
  maps = ifs.barnsley_fern()
  assert float(jnp.max(ifs.lipschitz(maps))) < 1
  game = jax.jit(ifs.chaos_game, static_argnums=(2, 3))
  points = np.asarray(game(key, maps, 100, 100, jnp.array(ifs.FERN_PROBABILITIES)))
  assert -2.5 < points[:, 0].min() < points[:, 0].max() < 3
  assert -0.1 < points[:, 1].min() < points[:, 1].max() < 10.2


def test_words_and_indices_are_inverse():
  index = jnp.arange(81)
  words = ifs_address.word_of(index, 3, 4)
  np.testing.assert_array_equal(ifs_address.index_of(words, 3), index)
  np.testing.assert_array_equal(words[5], [0, 0, 1, 2])


def test_a_word_is_its_composition():
  offsets = ifs_address.corner_offsets(4, 2, 0.4)
  word = jnp.array([2, 0, 3])
  maps = ifs.similarities(np.full(4, 0.4), offsets)
  _, t = ifs.compose(maps, word)
  np.testing.assert_allclose(t, ifs_address.translation(word, offsets, 0.4), rtol=1e-6)
  np.testing.assert_allclose(
    ifs.fixed_point(*ifs.compose(maps, word)), ifs_address.leaf_point(word, offsets, 0.4), rtol=1e-5
  )
  assert not np.allclose(t, ifs_address.translation(word[::-1], offsets, 0.4))


def test_unwritten_leaves_read_as_their_points():
  offsets = ifs_address.corner_offsets(2, 2, 0.3)
  store = ifs_memory.empty_store(offsets, 0.3, 3)
  store = ifs_memory.write(store, jnp.array([5]), jnp.array([[7.0, 8.0]]))
  read = np.asarray(ifs_memory.read(store, jnp.arange(8)))
  points = np.asarray(ifs_address.leaf_point(ifs_address.word_of(jnp.arange(8), 2, 3), offsets, 0.3))
  np.testing.assert_allclose(read[5], [7, 8], rtol=1e-6)
  np.testing.assert_allclose(np.delete(read, 5, 0), np.delete(points, 5, 0), rtol=1e-6)


def test_known_figures_of_the_retention_law():
  even = np.full(4096, 1 / 4096)
  assert ifs_memory.intact_fraction(1024, even) == pytest.approx(0.885, abs=5e-4)
  assert ifs_memory.intact_fraction(4096, even) == pytest.approx(0.632, abs=5e-4)
  assert ifs_memory.utilisation(1024, 4096) == pytest.approx(0.221, abs=5e-4)
  assert ifs_memory.no_collision(10, 4096) == pytest.approx(np.exp(-(10**2) / 2 / 4096), rel=2e-3)
  assert ifs_memory.no_collision(5000, 4096) == 0


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="m=3"):
    ifs_address.corner_offsets(3, 4, 0.4)
  with pytest.raises(ValueError, match="m=8"):
    ifs_address.corner_offsets(8, 2, 0.4)
  with pytest.raises(ValueError, match=r"1\.05"):
    ifs.similarity_dimension([0.5, 1.05])
