"""Rotations: coordinates, exponentials, logarithms, ordered products and their gradients, walks in continuous time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from mgr_jax.algebra import icosahedral, lie, lie_log, lie_prefix, lie_series, matrix_functions, uniformization
from mgr_jax.algebra.hypercomplex import hamilton
from mgr_jax.algebra.lie_claims import CLAIMS
from mgr_jax.algebra.lie_prefix import prefix_product, prefix_quaternions
from mgr_jax.algebra.lie_prefix_claims import serial_float64
from mgr_jax.claims import run_claims


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


class TestCoordinates:
  def test_entries_above_the_diagonal_come_row_by_row(self):
    A = np.asarray(lie.skew(jnp.arange(1.0, 7), 4))
    np.testing.assert_array_equal(A[0, 1:], [1, 2, 3])
    np.testing.assert_array_equal(A[1, 2:], [4, 5])
    np.testing.assert_array_equal(A, -A.T)
    np.testing.assert_array_equal(lie.coordinates(jnp.asarray(A)), np.arange(1.0, 7))

  def test_what_is_not_skew_is_projected(self):
    M = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    np.testing.assert_allclose(lie.skew(lie.coordinates(M), 5), (M - M.T) / 2, atol=1e-7)

  def test_a_wrong_number_of_coordinates_is_refused(self):
    with pytest.raises(ValueError, match=r"so\(4\) has 6 coordinates, got 5"):
      lie.skew(jnp.zeros(5), 4)
    with pytest.raises(ValueError, match="bound=0"):
      lie.exp_so(jnp.zeros(15), 6, 0)


class TestExponentials:
  def test_three_dimensional_quaternions_turn_imaginary_ones(self):
    a = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    by_quaternion = jax.jit(lambda a: lie.so3_from_quaternion(lie.so3_quaternion(a)))(a)
    np.testing.assert_allclose(by_quaternion, scipy.linalg.expm(np.asarray(lie.skew(a, 3))), atol=2e-6)

  def test_principal_angles_are_sum_and_difference_of_the_halves(self):
    a = 0.4 * np.random.default_rng(2).normal(size=6).astype(np.float32)
    half = [np.arccos(float(u[0])) for u in lie.so4_quaternions(a)]
    angles = np.sort(np.abs(np.angle(np.linalg.eigvals(np.asarray(lie.exp_so4(a))))))
    np.testing.assert_allclose(angles[::2], sorted((abs(half[0] - half[1]), half[0] + half[1])), atol=1e-3)

  def test_quaternion_pairs_compose_in_the_order_of_matrices(self):
    a, b = np.random.default_rng(3).normal(size=(2, 6)).astype(np.float32)
    pair = [hamilton(x, y) for x, y in zip(lie.so4_quaternions(a), lie.so4_quaternions(b), strict=True)]
    np.testing.assert_allclose(lie.so4_matrix(*pair), lie.exp_so4(a) @ lie.exp_so4(b), atol=3e-6)

  def test_cayley_agrees_to_third_order_only_with_its_halves(self):
    with jax.enable_x64(True):
      A = np.asarray(lie.skew(jnp.arange(1.0, 11), 5)) / 20
      cayley = jax.jit(lie.cayley_so)
      error = lambda step, factor: np.max(np.abs(cayley(factor * step * A) - scipy.linalg.expm(step * A)))
      halves, without = ([error(step, factor) for step in (0.2, 0.1)] for factor in (1, 2))
    assert abs(np.log2(halves[0] / halves[1]) - 3) < 0.05
    assert abs(np.log2(without[0] / without[1]) - 1) < 0.1
    Q = np.asarray(lie.cayley_so(lie.skew(jnp.full(10, 50.0), 5)))
    assert float(lie.drift(Q)) < 1e-4
    assert np.min(np.abs(np.linalg.eigvals(Q) + 1)) > 0

  def test_second_derivatives_are_finite_at_zero(self):
    for b in (3, 4, 6):
      value = lambda a, b=b: jnp.sum(jnp.cos(lie.exp_so(a, b)))
      hessian = jax.jit(jax.jacfwd(jax.grad(value)))(jnp.zeros(lie.dimension(b)))
      assert np.isfinite(np.asarray(hessian)).all()


class TestLogarithms:
  @pytest.mark.parametrize("b", [2, 3, 4])
  def test_closed_logarithms_invert_the_exponential(self, b):
    rng = np.random.default_rng(b)
    a = rng.normal(size=(200, lie.dimension(b)))
    a *= rng.uniform(0, 3.1, (200, 1)) / np.linalg.norm(a, axis=1, keepdims=True)
    with jax.enable_x64(True):
      a[0] = np.eye(lie.dimension(b))[0] * np.pi
      R = scipy.linalg.expm(np.asarray(lie.skew(jnp.asarray(a), b)))
      found, near = jax.jit(lie_log.log_so)(R)
    assert near[0] and not near[1:].any()
    assert abs(np.linalg.norm(found[0]) - np.pi) < 1e-6
    np.testing.assert_allclose(found[1:], a[1:], atol=1e-12)

  def test_a_longer_turn_comes_back_as_the_shorter_one(self):
    (found,), _ = lie_log.log_so(lie.exp_so2(jnp.array([4.0])))
    assert abs(float(found) - (4 - 2 * np.pi)) < 1e-5

  @pytest.mark.parametrize("b", [3, 5, 8])
  def test_on_the_host_any_size(self, b):
    a = np.random.default_rng(b).normal(size=lie.dimension(b))
    a *= 2.5 / np.linalg.norm(a)
    R = scipy.linalg.expm(np.asarray(lie.skew(a.astype(np.float32), b), np.float64))
    np.testing.assert_allclose(lie_log.log_so_host(R), a, atol=1e-5)

  def test_refusals(self):
    with pytest.raises(ValueError, match="got b=5"):
      lie_log.log_so(jnp.eye(5))
    for not_unique in (np.diag([-1.0, -1, 1]), np.diag([1.0, -1, -1, 1, 1])):
      with pytest.raises(ValueError, match="not unique"):
        lie_log.log_so_host(not_unique)
    for not_rotation in (2 * np.eye(3), np.diag([1.0, 1, -1])):
      with pytest.raises(ValueError, match="needs a rotation"):
        lie_log.log_so_host(not_rotation)


def _unit(rng, *shape):
  u = rng.normal(size=shape)
  return (u / np.linalg.norm(u, axis=-2, keepdims=True)).astype(np.float32)


class TestPrefixProducts:
  @pytest.mark.parametrize("length", [1, 33])
  def test_all_scans_continue_a_product_the_same(self, length):
    rng = np.random.default_rng(length)
    a = rng.normal(size=(2, length + 1, 3)).astype(np.float32)
    U = scipy.linalg.expm(np.asarray(lie.skew(a, 3))).astype(np.float32)
    exact = np.moveaxis(serial_float64(np.moveaxis(U, 1, 0)), 0, 1)
    product = jax.jit(lambda U, start, scan: prefix_product(U, start, scan, axis=1), static_argnums=2)
    for scan in ("assoc", "serial", "chunk:16"):
      whole = product(U, None, scan)
      rest = product(U[:, 1:], U[:, 0], scan)
      np.testing.assert_allclose(whole, exact, atol=3e-6)
      np.testing.assert_allclose(rest, exact[:, 1:], atol=3e-6)

  def test_components_may_lie_on_any_axis_behind_time(self):
    u = _unit(np.random.default_rng(0), 2, 9, 3, 4, 5)
    product = jax.jit(prefix_quaternions, static_argnums=2, static_argnames=("axis", "component"))
    inner = product(u, None, "chunk:4", axis=1, component=-2)
    last = product(np.moveaxis(u, -2, -1), None, "serial", axis=1, component=-1)
    np.testing.assert_allclose(np.moveaxis(inner, -2, -1), last, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(inner, axis=-2), 1, atol=3e-7)

  def test_gradients_reach_the_start_and_every_edge(self):
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
      a, first, W = (jnp.asarray(rng.normal(size=s)) for s in ((7, 6), (6,), (7, 4, 4)))

      def matrices(a, first):
        return prefix_product(lie.exp_so4(a), lie.exp_so4(first), "assoc")

      def quaternions(a, first):
        edges, start = (jnp.stack(lie.so4_quaternions(x), -2) for x in (a, first))
        return lie.so4_matrix(*jnp.moveaxis(prefix_quaternions(edges, start, "chunk:4"), -2, 0))

      def plain(a, first):
        return jax.lax.scan(lambda T, U: (U @ T,) * 2, lie.exp_so4(first), lie.exp_so4(a))[1]

      @jax.jit
      def gradients(a, first):
        gradient = lambda f: jax.grad(lambda a, s: jnp.vdot(W, f(a, s)), (0, 1))(a, first)
        return [gradient(f) for f in (plain, matrices, quaternions)]

      expected, *both = gradients(a, first)
      for found in both:
        for x, y in zip(found, expected, strict=True):
          np.testing.assert_allclose(x, y, atol=1e-12)

  def test_the_backward_pass_multiplies_no_second_time(self):
    u = jnp.zeros((64, 4)).at[:, 0].set(1)
    closed = lambda u: jnp.sum(prefix_quaternions(u, None, "serial"))
    through = lambda u: jnp.sum(lie_prefix._quaternion_products(u, None, "serial", 0, -1, True))
    program = lambda f: str(jax.make_jaxpr(jax.grad(f))(u))
    # One scan of products forward, and three sums backward; a scan that was differentiated runs in reverse.
    assert program(closed).count("= scan[") == 4
    assert "reverse=True" not in program(closed) and "reverse=True" in program(through)

  def test_forward_over_reverse(self):
    u = _unit(np.random.default_rng(6), 9, 4, 2)
    loss = lambda u: jnp.sum(jnp.sin(prefix_quaternions(u, None, "chunk:4", component=-2)))
    _, hvp = jax.jit(lambda u: jax.jvp(jax.grad(loss), (u,), (u,)))(u)
    assert np.isfinite(np.asarray(hvp)).all()

  @pytest.mark.parametrize("scan", ["chunk", "chunk:1", "chunk:x", "tree", ""])
  def test_unknown_scans_are_refused(self, scan):
    with pytest.raises(ValueError, match="assoc, serial, chunk"):
      prefix_product(jnp.eye(3)[None], None, scan)

  def test_correction_halves_the_exponent_of_the_error(self):
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
      T = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0] + 1e-4 * rng.normal(size=(4, 4)))
      before, after = jax.jit(lambda T: (lie.drift(T), lie.drift(lie.reorthogonalise(T))))(T)
    assert float(before) > 1e-4
    assert float(after) < 4 * float(before) ** 2


class TestSeries:
  def test_commuting_matrices_add_at_every_order(self):
    A = np.random.default_rng(8).normal(size=(4, 4)).astype(np.float32)
    for order in (1, 2, 3, 4):
      np.testing.assert_allclose(lie_series.bch(A, 2 * A, order), 3 * A, rtol=1e-5, atol=1e-4)

  def test_second_order_is_half_the_sum_of_commutators(self):
    A = np.random.default_rng(9).normal(size=(5, 3, 3)).astype(np.float32)
    pairs = sum(lie.bracket(A[t], A[s]) for t in range(5) for s in range(t))
    np.testing.assert_allclose(lie_series.magnus(A, 2), A.sum(0) + pairs / 2, atol=1e-4)

  @pytest.mark.parametrize("order", [0, 5])
  def test_orders_beyond_the_formula_are_refused(self, order):
    with pytest.raises(ValueError, match=f"order={order} is outside 1 to 4"):
      lie_series.magnus(jnp.zeros((2, 3, 3)), order)


class TestMatrixFunctions:
  def test_the_derivative_of_the_exponential(self):
    A, B = 0.5 * np.random.default_rng(15).normal(size=(2, 3, 3)).astype(np.float32)
    exact = scipy.linalg.expm_frechet(A, B, compute_expm=False)
    np.testing.assert_allclose(matrix_functions.dexp(A, B), exact, atol=1e-5)

  def test_only_the_strict_upper_triangle_is_exponentiated(self):
    M = np.random.default_rng(10).normal(size=(2, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(matrix_functions.exp_nilp(M), scipy.linalg.expm(np.triu(M, 1)), atol=1e-5)

  def test_exponentials_of_symmetric_matrices_are_positive_definite(self):
    S = np.random.default_rng(11).normal(size=(4, 4)).astype(np.float32)
    E = np.asarray(matrix_functions.exp_spd(S))
    np.testing.assert_allclose(E, scipy.linalg.expm((S + S.T) / 2), rtol=1e-4, atol=1e-5)
    assert np.linalg.eigvalsh(E).min() > 0


class TestUniformization:
  def test_terms_reach_the_tail_and_one_less_does_not(self):
    for m, expected in ((0.2, 5), (1, 10), (4, 18), (8, 27), (16, 41)):
      K = uniformization.fewest_terms(m)
      assert expected == K
      tails = [float(uniformization.poisson_tail(k, m)) for k in (K, K - 1)]
      assert tails[0] <= 1.001e-7 < tails[1]

  def test_a_rule_of_thumb_is_no_bound(self):
    few, many = (int(np.ceil(m + 8 * np.sqrt(m))) for m in (0.01, 4.0))
    assert few == 1 and float(uniformization.poisson_tail(few, 0.01)) > 4e-5
    assert many > uniformization.fewest_terms(4.0)

  @pytest.mark.parametrize(("m", "tail", "said"), [(0, 1e-7, "m=0"), (1e4, 1e-7, "m=10000"), (1, 0, "tail=0")])
  def test_refusals(self, m, tail, said):
    with pytest.raises(ValueError, match=said):
      uniformization.fewest_terms(m, tail)

  def test_a_larger_rate_changes_nothing(self):
    rng = np.random.default_rng(12)
    Q = rng.uniform(size=(6, 6))
    Q -= np.diag(Q.sum(1))
    u = rng.normal(size=(6, 2, 3))
    with jax.enable_x64(True):
      for rate in (4.0, 8.0):
        found = uniformization.expm_markov(jnp.asarray(Q), jnp.asarray(u), 0.7, rate, 40)
        np.testing.assert_allclose(found, np.einsum("ij,j...->i...", scipy.linalg.expm(0.7 * Q), u), atol=1e-12)

  def test_gradients_of_time_and_values_are_those_of_the_exponential(self):
    rng = np.random.default_rng(13)
    with jax.enable_x64(True):
      P = np.asarray(jax.jit(uniformization.dyadic_walk)(rng.normal(size=(8, 4))))
      u, w = rng.normal(size=(2, 8, 1))
      mixed = lambda m: jnp.vdot(w, uniformization.poisson_sum(lambda z: P @ z, jnp.asarray(u), m, 40))
      slope = float(jax.jit(jax.grad(mixed))(2.0))
      generator = P - np.eye(8)
      assert abs(slope - (w.T @ generator @ scipy.linalg.expm(2 * generator) @ u).item()) < 1e-12

  def test_any_distance_is_reached_in_as_many_hops_as_it_has_binary_ones(self):
    P = np.asarray(uniformization.dyadic_walk(jnp.zeros((16, 5)))) - np.diag(np.full(16, 1e-9))
    for distance in range(1, 16):
      hops = distance.bit_count()
      one_way = np.tril(P, -1)
      assert np.linalg.matrix_power(one_way, hops)[15, 15 - distance] > 0
      assert np.linalg.matrix_power(one_way, hops - 1)[15, 15 - distance] == 0 or hops == 1


class TestIcosahedralGroup:
  def test_it_is_a_perfect_group_of_sixty(self):
    table = icosahedral.multiplication_table()
    assert sorted(set(map(len, map(set, table)))) == [60] and len(set(map(tuple, table))) == 60
    np.testing.assert_array_equal(table[0], np.arange(60))
    rng = np.random.default_rng(14)
    g, h, k = rng.integers(0, 60, (3, 200))
    np.testing.assert_array_equal(table[table[g, h], k], table[g, table[h, k]])
    inverse = np.argmax(table == 0, 1)
    commutators = {int(table[table[g, h], table[inverse[g], inverse[h]]]) for g in range(60) for h in range(60)}
    assert len(commutators) == 60

  def test_rotations_are_at_least_72_degrees_apart(self):
    u = icosahedral.icosians()
    overlap = np.abs(u @ u.T) - 2 * np.eye(60)
    np.testing.assert_allclose(np.degrees(2 * np.arccos(overlap.max())), 72, atol=1e-9)

  def test_running_products(self):
    table = icosahedral.multiplication_table()
    np.testing.assert_array_equal(
      icosahedral.running_products(np.array([[3, 5, 7]]))[0], [3, table[5, 3], table[7, table[5, 3]]]
    )
