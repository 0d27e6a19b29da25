"""Fixed point, mixers and splitting integrators: the mathematics below reversible stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demos import reversible as demo
from mgr_jax.algebra import fixed_point, mixers, reversible_claims, symplectic, symplectic_claims
from mgr_jax.claims import run_claims

CLAIMS = reversible_claims.CLAIMS + symplectic_claims.CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


def test_conversion_rounds_to_even_and_saturates():
  x = jnp.array([1.5, -0.5, 2.5, -1.25, 1e30, -1e30, jnp.inf, jnp.nan, 2.0**31 - 128])
  ends = 2**31 - 1, -(2**31)
  np.testing.assert_array_equal(fixed_point.to_fixed(x, 0), [2, 0, 2, -1, *ends, ends[0], 0, 2**31 - 128])
  np.testing.assert_array_equal(fixed_point.to_fixed(jnp.array([1.0, -1 / 256]), 8), [256, -1])
  np.testing.assert_array_equal(fixed_point.from_fixed(jnp.array([256, -1], jnp.int32), 8), [1.0, -1 / 256])


def test_integers_survive_the_round_trip_through_floats_of_24_bits():
  z = jnp.arange(-(2**24), 2**24, 4099, dtype=jnp.int32)
  np.testing.assert_array_equal(fixed_point.to_fixed(fixed_point.from_fixed(z, 16), 16), z)
  large = jnp.array([2**24 + 1], jnp.int32)
  assert fixed_point.to_fixed(fixed_point.from_fixed(large, 16), 16)[0] != large[0]


def test_addition_wraps_around_and_refuses_other_types():
  top = jnp.array([2**31 - 1], jnp.int32)
  one = jnp.array([1], jnp.int32)
  assert fixed_point.add(top, one)[0] == -(2**31)
  assert fixed_point.subtract(fixed_point.add(top, one), one)[0] == top[0]
  for other in (jnp.float32(1.0), jnp.uint32(1)):
    with pytest.raises(TypeError, match=f"int32, not in int32 and {other.dtype}"):
      fixed_point.add(top, other)


def test_rounding_has_the_gradient_of_the_identity():
  x = jnp.array([0.3, -1.7])
  value, tangent = jax.jvp(lambda x: fixed_point.quantize(x, 8) ** 2, (x,), (jnp.ones(2),))
  grid = jnp.round(x * 256) / 256
  np.testing.assert_array_equal(value, grid**2)
  np.testing.assert_allclose(tangent, 2 * grid)
  assert np.all(jax.grad(lambda x: jnp.sum(jnp.round(x * 256) / 256))(x) == 0)  # what plain rounding gives
  np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(fixed_point.with_gradient_of(jnp.ones(2), x)))(x), [1, 1])


def test_givens_pairs_every_channel_once_and_differs_by_layer():
  for width in (2, 16):
    np.testing.assert_array_equal(np.sort(mixers.pairing(width, 3)), np.arange(width))
  assert np.any(mixers.pairing(16, 0) != mixers.pairing(16, 1))
  np.testing.assert_array_equal(mixers.pairing(16, 1), mixers.pairing(16, 1))
  with pytest.raises(ValueError, match="width=7 is odd"):
    mixers.pairing(7, 0)


def test_givens_of_integers_is_givens_of_numbers(key):
  x = jax.random.normal(key, (3, 5, 8))
  angle, permutation = mixers.bounded_angle(jnp.linspace(-3, 3, 4)), mixers.pairing(8, 0)
  assert np.max(np.abs(angle)) < np.pi / 2
  real = mixers.givens(x, angle, permutation)
  fixed = mixers.givens_fixed(fixed_point.to_fixed(x, 16), mixers.lifting(angle), permutation)
  np.testing.assert_allclose(fixed_point.from_fixed(fixed, 16), real, atol=2.5 * 2.0**-16)
  np.testing.assert_allclose(mixers.givens(real, -angle, permutation), x, atol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(real, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
  assert not np.allclose(real, x, atol=0.1)


def test_angle_gradient_is_not_lost(key):
  x, permutation = jax.random.normal(key, (6, 8)), mixers.pairing(8, 0)
  gradient = jax.grad(lambda a: jnp.sum(mixers.givens(x, a, permutation)[:, :3] ** 2))(jnp.zeros(4))
  step = 1e-2
  for i in range(4):
    f = lambda s, i=i: jnp.sum(mixers.givens(x, jnp.zeros(4).at[i].set(s), permutation)[:, :3] ** 2)
    np.testing.assert_allclose(gradient[i], (f(step) - f(-step)) / (2 * step), rtol=2e-3, atol=2e-3)
  assert np.max(np.abs(gradient)) > 0.1


def test_cayley_inverse_and_its_starting_point(key):
  x, U, V = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), ((5, 8), (8, 2), (8, 2)), strict=True))
  back = mixers.cayley_inverse(mixers.cayley(x, U, V), U, V)
  np.testing.assert_allclose(back, x, atol=2e-5)
  np.testing.assert_allclose(mixers.cayley(x, U, 0 * V), x, atol=2e-6)
  gradient = jax.grad(lambda V: jnp.sum(mixers.cayley(x, U, V)[:, 0]))(0 * V)
  assert np.max(np.abs(gradient)) > 0.1


def test_leapfrog_is_its_own_inverse_with_the_step_reversed():
  rng = np.random.default_rng(0)
  system = symplectic_claims.Pendulum(rng)
  q, p = rng.normal(size=(2, 2))
  there = symplectic.leapfrog(q, p, system.grad_V, system.grad_T, 0.3)
  back = symplectic.leapfrog(*there, system.grad_V, system.grad_T, -0.3)
  np.testing.assert_allclose(back, (q, p), atol=1e-14)
  there = symplectic.euler(q, p, system.grad_V, system.grad_T, 0.3)
  back = symplectic.euler(*there, system.grad_V, system.grad_T, -0.3)
  assert np.max(np.abs(np.subtract(back, (q, p)))) > 1e-2


def test_equal_signs_blow_up():
  rng = np.random.default_rng(0)
  system = symplectic_claims.Pendulum(rng, confinement=1.0)
  q, p = rng.uniform(0.5, 1, (2, 2))
  growth = {}
  for step in (symplectic.euler, symplectic_claims.equal_signs):
    x, y = q, p
    for _ in range(256):
      x, y = step(x, y, system.grad_V, system.grad_T, 0.2)
    growth[step] = np.linalg.norm([x, y]) / np.linalg.norm([q, p])
  assert growth[symplectic.euler] < 10
  assert growth[symplectic_claims.equal_signs] > 100


def test_unit_volume_bounds_no_norm():
  rng = np.random.default_rng(0)
  M = np.eye(8)
  for i in range(10):
    shear = np.eye(8)
    shear[:4, 4:] = rng.normal(size=(4, 4)) if i % 2 else 0
    shear[4:, :4] = 0 if i % 2 else rng.normal(size=(4, 4))
    M = shear @ M
  assert abs(np.linalg.det(M) - 1) < 1e-6
  assert np.linalg.norm(M, 2) > 100


def test_demo_orbits_stay_in_a_band_or_do_not():
  paths = demo.energies()
  assert paths["euler"].shape == (1000, len(symplectic_claims.STEPS))
  late = lambda name: paths[name][500:].max(0) / paths[name][:500].max(0)
  assert np.all(late("euler") < 1.1) and np.all(late("leapfrog") < 1.1)
  assert np.all(np.diff(paths["equal signs"][20:, 0]) > 0)
