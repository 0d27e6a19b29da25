"""Levi-Civita numbers: arithmetic, what is lost, order, functions, calculus, and work under jit, vmap and grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import hyperreal_functions as functions
from mgr_jax.algebra.hyperreal import (
  EXACT,
  coefficient,
  decided,
  eps,
  infinitely_close,
  integer_power,
  is_infinite,
  is_infinitesimal,
  is_limited,
  omega,
  power,
  real,
  replaced,
  series,
  sqrt,
  st,
)
from mgr_jax.algebra.hyperreal_claims import CLAIMS
from mgr_jax.claims import run_claims


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claims_hold_and_their_controls_fail(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


def test_operators_and_text():
  e, w = eps(), omega()
  assert repr(3 + 2 * e - e**2) == "3 + 2ε - ε²"
  assert repr(1 / (1 - e)) == "1 + ε + ε² + ε³ + ε⁴ + ε⁵ + O(ε⁶)"
  assert repr(-w + 0.5) == "-ε⁻¹ + 0.5"
  assert repr(e - e) == "0"
  assert repr(1 / (e - e)) == "undefined"
  assert repr(np.array([1.0, 2.0]) * e) == "[ε, 2ε]"
  assert repr(sqrt(1 + e)[()]).startswith("1 + 0.5ε - 0.125ε²")
  assert repr(abs(-w)) == "ε⁻¹"
  assert repr((1 + e) ** 2) == "1 + 2ε + ε²"
  assert repr(e**-2) == "ε⁻²"
  assert bool(w > 1e300) and bool(e > 0) and bool(1 - e < 1) and bool(e * w == 1) and bool(2 * e != e)
  assert bool(e <= e) and bool(e >= e**2) and not bool(e <= e**2)


def test_undefined_numbers_compare_false_and_spread():
  bad = 1 / (eps() - eps())
  for y in (bad, real(0.0)):
    assert not any(map(bool, (bad < y, bad > y, bad == y, bad <= y, bad >= y)))
    assert bool(bad != y)
  assert np.isnan(st(bad + omega() ** 9)) and np.isnan(st(bad * 0))
  assert not any(bool(f(bad)) for f in (is_limited, is_infinite, is_infinitesimal))


def test_operands_that_do_not_fit():
  with pytest.raises(ValueError, match="terms: numbers with 6 and with 4 terms do not mix"):
    eps() + eps(4)
  with pytest.raises(TypeError):
    eps() + "1"
  with pytest.raises(TypeError):
    hash(eps())


def test_what_is_lost_is_marked_and_nothing_else_is():
  e = eps()
  assert not bool((1 + e + e**5).lost)
  spilled = 1 + e**6
  assert bool(spilled.lost) and int(spilled.order) == 6
  # After cancellation the window is deeper than what is known.
  hidden = spilled - 1
  assert repr(hidden) == "O(ε⁶)"
  assert bool(hidden == e**6) and not bool(decided(hidden, e**6)), "the comparison is hidden by the lost terms"
  assert bool(decided(hidden, e**5)) and bool(hidden < e**5)
  assert np.isnan(coefficient(hidden, 6)) and float(coefficient(hidden, 5)) == 0
  assert np.isnan(st(hidden / e**6)) and np.isnan(st(1 / hidden))
  assert int((spilled * e**-8).order) == -2
  assert not bool((0 * spilled).lost)


def test_predicates():
  numbers = omega(), real(1.0), eps(), real(0.0)
  assert [bool(is_infinite(x)) for x in numbers] == [True, False, False, False]
  assert [bool(is_limited(x)) for x in numbers] == [False, True, True, True]
  assert [bool(is_infinitesimal(x)) for x in numbers] == [False, False, True, True]
  np.testing.assert_array_equal([st(x) for x in numbers], [np.nan, 1, 0, 0])
  assert bool(infinitely_close(1 + eps(), 1)) and not bool(infinitely_close(eps(), 1))
  assert int(real(0.0).val) == EXACT
  assert int(series(np.array([0, 0, 3.0, 0, 0, 0]), -1).val) == 1


def test_powers():
  e = eps()
  x = 4 * e**2 + e**3
  root = sqrt(x)
  assert bool(root * root == x) and float(root.coef[0]) == 2 and int(root.val) == 1
  assert repr(sqrt(e)) == repr(sqrt(real(-1.0))) == repr((-1 + e) ** 0.5) == "undefined"
  assert repr(sqrt(real(0.0))) == "0"
  assert repr(power(-2 + e, 3.0)) == "-8 + 12ε - 6ε² + ε³ + O(ε⁶)"
  assert repr(integer_power(-2 + e, 3)) == "-8 + 12ε - 6ε² + ε³"
  np.testing.assert_allclose(((1 + e) ** 2.5).coef[:3], [1, 2.5, 1.875])


def test_functions_at_their_borders():
  e = eps()
  assert repr(functions.exp(omega())) == repr(functions.log(e)) == repr(functions.log(e - 1)) == "undefined"
  assert repr(functions.cos(real(0.0))) == "1", "the value at a standard number is exact"
  s, c = functions.sin_cos(0.5 + e)
  np.testing.assert_allclose((s * s + c * c - 1).coef, 0, atol=1e-15)
  np.testing.assert_allclose((functions.log(functions.exp(0.5 + e)) - 0.5 - e).coef, 0, atol=1e-15)
  squared = functions.exp(1 + 2 * e)
  np.testing.assert_allclose(functions.tanh(0.5 + e).coef, ((squared - 1) / (squared + 1)).coef, atol=1e-15)


def test_taylor_mode_and_nested_gradients_agree():
  jet = pytest.importorskip("jax.experimental.jet").jet
  f = lambda x: jnp.exp(jnp.sin(x))
  found = functions.derivatives(lambda x: functions.exp(functions.sin(x)), 0.3, 4, terms=6)
  value, terms = jet(f, (0.3,), ((1.0, 0.0, 0.0, 0.0),))
  np.testing.assert_allclose(found, jnp.stack([value, *terms]), rtol=1e-12)
  np.testing.assert_allclose(found[2], jax.grad(jax.grad(f))(0.3), rtol=1e-12)
  assert np.isnan(functions.derivatives(functions.exp, 0.3, 6, terms=6)[6]), "not determined by so few terms"


def test_jit_vmap_and_grad():
  f = lambda x: coefficient(functions.exp(x * (1 + eps())), 1)
  x = jnp.array([0.3, 0.7])
  value, slope = jax.jit(jax.vmap(jax.value_and_grad(f)))(x)
  np.testing.assert_allclose(value, x * np.exp(x), rtol=1e-12)
  np.testing.assert_allclose(slope, (1 + x) * np.exp(x), rtol=1e-12)
  assert jax.eval_shape(lambda x: st(x) if "traced" in repr(x) else None, eps()).shape == ()


def test_a_real_number_in_the_place_of_epsilon():
  x = 3 * omega() + 2 - eps()
  np.testing.assert_allclose(replaced(x, jnp.array([0.1, 0.5])), [31.9, 7.5])
  assert float(replaced(x, 0.1, 2)) == 32.0
  assert float(replaced(real(0.0), 0.1)) == 0.0
