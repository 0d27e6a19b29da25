"""Max-plus algebra: claims, products with gradients, the toolkit's refusals and limits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import tropical, tropical_training
from mgr_jax.algebra.tropical_claims import CLAIMS
from mgr_jax.algebra.tropical_matmul import scatter_add, tmm, tmm_argmax
from mgr_jax.claims import run_claims


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def test_claims_of_the_algebra_hold(key):
  for result in run_claims(CLAIMS, key):
    assert result.holds, result.message or result


class TestProduct:
  @pytest.mark.parametrize("k", [1, 31, 32, 70])
  def test_value_gradient_and_hessian_vector_product(self, k):
    with jax.enable_x64(True):
      a, b, g = jnp.asarray(draw(0, 2, 5, k)), jnp.asarray(draw(1, 2, k, 4)), draw(2, 2, 5, 4)
      dense = lambda a, b: jnp.max(a[..., None] + b[:, None], 2)

      @functools.partial(jax.jit, static_argnums=0)
      def run(f, a, b):
        gradient = jax.grad(lambda args: jnp.sum(g * jnp.sin(f(*args))))
        return f(a, b), gradient((a, b)), jax.jvp(gradient, ((a, b),), ((b.swapaxes(1, 2)[:, :1] + a, b),))[1]

      got, want = run(tmm, a, b), run(dense, a, b)
      jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), got, want)

  def test_the_lowest_index_wins_ties(self):
    winner, zeros, b = jax.jit(lambda a, b: tmm_argmax(a, b)[1]), np.zeros((2, 70)), np.zeros((70, 3))
    np.testing.assert_array_equal(winner(zeros, b), 0)
    b[40] = 1.0
    np.testing.assert_array_equal(winner(zeros, b), 40)

  def test_the_zero_of_the_semiring_absorbs(self):
    a = jnp.full((2, 3), -jnp.inf)
    np.testing.assert_array_equal(tmm(a, jnp.ones((3, 4))), -np.inf)

  def test_no_buffer_of_the_dense_size(self):
    m = k = n = 256
    shapes = jax.ShapeDtypeStruct((m, k), jnp.float32), jax.ShapeDtypeStruct((k, n), jnp.float32)

    def temp_bytes(f):
      gradient = jax.grad(lambda a, b: jnp.sum(jnp.sin(f(a, b))), (0, 1))
      return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(tmm) < 4 * m * k * n / 4
    assert temp_bytes(lambda a, b: jnp.max(a[..., None] + b, 1)) >= m * k * n / 4


def test_scatter_in_fixed_order_equals_the_plain_one():
  index = np.random.default_rng(0).integers(0, 50, 1000)
  values = draw(1, 1000).astype(np.float32)
  fixed = jax.jit(lambda i, v: scatter_add(60, i, v, deterministic=True))
  got = fixed(index, values)
  np.testing.assert_allclose(got, np.bincount(index, values, 60), atol=1e-5)
  # Permuting equal values inside the list changes nothing.
  order = np.argsort(index, kind="stable")
  np.testing.assert_array_equal(got, fixed(index[order], values[order]))
  assert np.max(np.abs(got - fixed((index + 1) % 50, values))) > 0.1


class TestGraphs:
  def test_a_cycle_of_positive_weight_is_refused(self):
    a = jnp.array([[-jnp.inf, 1.0], [-0.5, -jnp.inf]])
    with pytest.raises(ValueError, match="positive weight"):
      tropical.kleene_star(a)
    assert tropical.kleene_star(a, tolerance=0.6).shape == (2, 2)

  def test_the_eigenvalue_is_the_largest_cycle_mean(self):
    # Cycles: 0 -> 0 of mean 1, 0 -> 1 -> 0 of mean (2 + 4)/2 = 3.
    value, vector = tropical.eigen_karp(jnp.array([[1.0, 2.0], [4.0, -jnp.inf]]))
    assert value == 3
    np.testing.assert_allclose(vector - vector[0], [0.0, 1.0])
    with pytest.raises(ValueError, match="irreducible"):
      tropical.eigen_karp(jnp.array([[-jnp.inf, 1.0], [-jnp.inf, -jnp.inf]]))


def test_roots_of_a_known_polynomial():
  # max(0, x + 3, 2x + 4, 5x - 2): slopes 0, 1, 2, 5 change at -3, -1 and 2 (three times).
  c = np.full(6, -np.inf)
  c[[0, 1, 2, 5]] = 0, 3, 4, -2
  roots = tropical.trop_roots(c)
  np.testing.assert_allclose(roots.at, [-3, -1, 2])
  np.testing.assert_array_equal(roots.multiplicity, [1, 1, 3])
  assert tropical.trop_poly_eval(jnp.asarray(c).at[3:5].set(-1e9), jnp.array(-3.0)) == 0


def test_a_route_adds_up_to_its_value_exactly():
  q, k, v = draw(0, 8).astype(np.float32), draw(1, 30, 8).astype(np.float32), draw(2, 30, 4).astype(np.float32)
  route = tropical.route_trace(q, k, v)
  score = np.max(q + k, -1)
  np.testing.assert_allclose(route.value, np.max(score[:, None] + v, 0), atol=1e-5)
  again = (k[route.key, route.coordinate] + v[route.key, np.arange(4)]) + q[route.coordinate]
  np.testing.assert_array_equal(route.value, again)


def test_margin_radius():
  assert tropical.margin_radius(3.0, "one") == 1.5
  assert tropical.margin_radius(3.0, "all") == 0.5
  with pytest.raises(KeyError):
    tropical.margin_radius(3.0, "none")


def test_the_smallest_flip_is_the_smallest_of_all_sign_patterns():
  """No perturbation of one size reaches further than its corners: all 2^11 of them, for two coordinates, three keys."""
  signs = np.array(list(itertools.product((-1.0, 1.0), repeat=11)))
  of_q, of_k, of_v = signs[:, :2], signs[:, 2:8].reshape(-1, 3, 2), signs[:, 8:]
  for seed in range(20):
    q, k, v = draw(3 * seed, 2), draw(3 * seed + 1, 3, 2), draw(3 * seed + 2, 3)
    flip = tropical.smallest_flip(q, k, v)
    total = np.max(q + k, -1) + v

    def winners(size, q=q, k=k, v=v):
      return np.argmax(np.max((q + size * of_q)[:, None] + k + size * of_k, -1) + v + size * of_v, -1)

    assert np.all(winners(0.999 * flip.size) == np.argmax(total))
    assert flip.rival in winners(1.001 * flip.size)
    gap = np.subtract(*np.sort(total)[:-3:-1])
    assert gap / 6 * (1 - 1e-9) <= flip.size <= gap / 4 * (1 + 1e-9)


class TestPerceptronSteps:
  def changes(self, factor):
    """Per step of random tasks: the own loss over η, the entries that moved, and the mean loss over η."""
    found = []
    for seed in range(4):
      tables, words, labels = tropical_training.random_task(np.random.default_rng(seed), 12)
      loss_of = lambda tables, words=words, labels=labels: tropical_training.losses(
        tropical_training.classify(tables, words).logits, labels
      )
      loss = loss_of(tables)
      for step in range(60):
        i = step % 12
        tables, size, moved = tropical_training.perceptron_step(tables, words[i], labels[i], factor)
        before, loss = loss, loss_of(tables)
        found.append(((loss[i] - before[i]) / size, moved, np.mean(loss - before) / size))
    return np.array(found).T

  def test_certified_steps_do_what_the_routes_count_and_the_mean_may_rise(self):
    own, moved, mean = self.changes(1.0)
    np.testing.assert_allclose(own, -moved, atol=1e-6)
    assert set(moved) <= {2, 4, 6, 8} and len(set(moved)) > 1
    assert np.any(mean > 1e-6) and np.any(mean < -1e-6)

  def test_long_steps_still_never_raise_the_own_loss(self):
    own, moved, _ = self.changes(50.0)
    assert np.all(own <= -1 + 1e-9)
    assert np.mean(np.abs(own + moved) > 1e-6) > 0.1, "long steps change winners"

  def test_a_logit_is_the_sum_of_the_four_entries_on_its_route(self):
    (q, k, v, w), words, _ = tropical_training.random_task(np.random.default_rng(0), 5)
    found = tropical_training.classify((q, k, v, w), words)
    t, s, r, d = found.route
    at = lambda i: np.take_along_axis(words, i, 1)
    np.testing.assert_allclose(found.logits, q[at(t), r] + k[at(s), r] + v[at(s), d] + w[d, np.arange(3)], atol=1e-12)
    assert np.all(s <= t) and np.all(found.lead > 0)
