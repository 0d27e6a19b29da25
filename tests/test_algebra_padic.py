"""p-adic digits, valuations, functions, the kernel's feature map, and the write-once tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import padic, padic_claims, padic_functions, padic_kernel, padic_tree, padic_tree_claims
from mgr_jax.claims import run_claims

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("claim", padic_claims.CLAIMS + padic_tree_claims.CLAIMS, ids=lambda c: c.name)
def test_claims_hold_and_their_controls_fail(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


@pytest.mark.parametrize(("p", "K"), [(2, 8), (5, 13), (3, 40)])
def test_digits_round_trip_beyond_machine_integers(p, K):
  n = [0, 1, p**K - 1, int(RNG.integers(0, 2**31)) ** 2 % p**K]
  a = padic.digits(np.array(n, object) if p**K >= 2**31 else np.array(n), p, K)
  assert a.shape == (4, K)
  assert [int(x) for x in padic.undigits(a, p)] == n
  swapped = padic.undigits(np.asarray(a)[:, ::-1], p)
  assert [int(x) for x in swapped] != n


def test_digit_arithmetic_is_arithmetic_modulo_p_to_the_K():
  for p, K in ((2, 10), (7, 4)):
    x, y = RNG.integers(0, p**K, (2, 50))

    @jax.jit
    def run(x, y, p=p, K=K):
      a, b = padic.digits(x, p, K), padic.digits(y, p, K)
      return [padic.undigits(z, p) for z in (padic.padic_add(a, b, p), padic.padic_mul(a, b, p), a ^ b)]

    total, product, broken = run(x, y)
    np.testing.assert_array_equal(total, (x + y) % p**K)
    np.testing.assert_array_equal(product, (x * y) % p**K)
    assert np.any(np.asarray(broken) != (x + y) % p**K)


def test_hensel_lifts_a_simple_root_and_refuses_others():
  roots = padic_functions.hensel_lift([-2, 0, 1], 3, 7, 8)
  for k, r in enumerate(roots, start=1):
    assert (r * r - 2) % 7**k == 0
    assert (r - roots[0]) % 7 == 0
  with pytest.raises(ValueError, match="root=1 is not a simple root mod 7"):
    padic_functions.hensel_lift([-2, 0, 1], 1, 7, 8)
  with pytest.raises(ValueError, match="f' = 0"):
    padic_functions.hensel_lift([0, 0, 1], 0, 7, 8)


@pytest.mark.parametrize(("p", "K"), [(4, 3), (2, 5), (5, 1)])
def test_pullbacks_of_the_feature_map_equal_autodiff(p, K):
  with jax.enable_x64(True):
    draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape))
    a, c, d = draw(2, K, p, 7), draw(2, K + 1), draw(2, p**K, 7)
    pulled_back = jax.jit(
      lambda a, c, d: (padic_kernel.query_features_pullback(a, c, d), padic_kernel.key_features_pullback(a, d))
    )
    auto = jax.jit(
      lambda a, c, d: (jax.vjp(padic_kernel.query_features, a, c)[1](d), jax.vjp(padic_kernel.key_features, a)[1](d))
    )
    ((auto_a, auto_c), (auto_b,)), ((d_a, d_c), d_b) = auto(a, c, d), pulled_back(a, c, d)
    np.testing.assert_allclose(d_a, auto_a, atol=1e-12)
    np.testing.assert_allclose(jnp.sum(d_c, -1), auto_c, atol=1e-11)
    np.testing.assert_allclose(d_b, auto_b, atol=1e-12)
    assert not np.allclose(pulled_back(a[:, ::-1], c, d)[1], auto_b) or K == 1


def test_the_write_once_tree_handles_leaf_exceptions_and_bounds_its_size():
  p, depth = 3, 4
  strings = np.arange(p**depth)
  digits = np.asarray(padic.digits(strings, p, depth))
  label = np.ones((p**depth, 1), np.int32)
  label[[5, 17, 60]] = 2
  order = np.tile(strings, 6)
  tree, erred = jax.jit(padic_tree.tree_fit, static_argnums=2)(digits[order], label[order], p)
  assert int(np.sum(erred)) == int(np.sum(tree.exists)) < padic_tree.n_nodes(p, depth) / 4, "exceptions are sparse"
  found = jax.jit(lambda tree, digits: padic_tree.predict(tree, padic_tree.paths(digits, p), p))(tree, digits)
  np.testing.assert_array_equal(found, label)
  with pytest.raises(ValueError, match="at most 4194304"):
    padic_tree.tree_fit(np.zeros((1, 12), np.int32), np.zeros((1, 1), np.int32), 4)
