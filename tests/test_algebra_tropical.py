"""Max-plus algebra: claims, products with gradients, the toolkit's refusals and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import tropical
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
    index = tmm_argmax(jnp.zeros((2, 70)), jnp.zeros((70, 3)))[1]
    np.testing.assert_array_equal(index, 0)
    later = jnp.zeros((70, 3)).at[40].set(1.0)
    np.testing.assert_array_equal(tmm_argmax(jnp.zeros((2, 70)), later)[1], 40)

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


def test_hilbert_distance_is_a_metric_up_to_shifts():
  x, y, z = draw(0, 3, 50, 6)
  d = tropical.hilbert_dist
  np.testing.assert_allclose(d(x + 3, y - 2), d(x, y), atol=1e-5)
  np.testing.assert_allclose(d(x, y), d(y, x), atol=1e-6)
  np.testing.assert_allclose(d(x, x + 1.5), 0, atol=1e-6)
  assert np.all(d(x, z) <= d(x, y) + d(y, z) + 1e-5)
  assert np.any(d(x, z) > d(x, y)), "the triangle inequality needs its second term"
  np.testing.assert_allclose(jnp.max(tropical.gauge(x), -1), 0)


def test_the_smooth_family_lies_above_the_maximum():
  x = draw(0, 20, 8)
  for beta in (0.5, 4.0):
    gap = tropical.lse_beta(x, beta) - x.max(-1)
    assert np.all(gap >= 0) and np.all(gap <= np.log(8) / beta + 1e-6)
    two = tropical.maslov_add(x[:, 0], x[:, 1], beta)
    np.testing.assert_allclose(two, tropical.lse_beta(x[:, :2], beta), rtol=1e-5)
  assert np.any(tropical.lse_beta(x, 0.5) - x.max(-1) > np.log(8) / 4)


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
