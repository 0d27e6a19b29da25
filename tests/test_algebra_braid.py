import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import additive_gate, braid, knots
from mgr_jax.algebra.braid_claims import CLAIMS
from mgr_jax.claims import run_claims

# An eager scan compiles anew at every call; these compile once per law, shape and precision.
execute = jax.jit(braid.execute, static_argnums=2)
burau_matrix = jax.jit(braid.burau_matrix, static_argnums=1)
permutation = jax.jit(braid.permutation, static_argnums=1)
linking_matrix = jax.jit(braid.linking_matrix, static_argnums=1)
random_word = jax.jit(braid.random_word, static_argnums=(1, 2, 3))
jones = jax.jit(knots.jones, static_argnums=1)
alexander_coefficients = jax.jit(knots.alexander_coefficients, static_argnums=1)
jones_coefficients = jax.jit(knots.jones_coefficients, static_argnums=1)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


def test_claim_names():
  names = [claim.name for claim in CLAIMS]
  assert len(set(names)) == len(names)
  assert all(name.startswith("braid.") for name in names)


def test_claims_scale(key):
  claim = next(c for c in CLAIMS if c.name == "braid.nestedness")
  assert claim.check(key, 3) == 0.0


def _states(key, n=4, dtype=None):
  acc, payload = jax.random.normal(key, (2, n, 2), dtype or float)
  return braid.Strands(acc, payload)


@pytest.mark.usefixtures("x64")
class TestExecute:
  def test_idle_letters_do_nothing(self, key):
    states = _states(key)
    padded = execute(jnp.array([0, 1, 0, -3, 0]), states, braid.swap)
    np.testing.assert_array_equal(padded, execute(jnp.array([1, -3]), states, braid.swap))
    assert float(jnp.abs(padded.acc - states.acc).max()) > 0.1

  @pytest.mark.parametrize("law", [braid.restricted, braid.swap])
  def test_inverse_word_undoes_additive_laws(self, law, key):
    word, states = random_word(key, 20, 4), _states(key)
    after = execute(word, states, law)
    np.testing.assert_allclose(execute(braid.inverse(word), after, law), states, atol=1e-12)
    # Only negated, not reversed: no inverse for a law that does not commute.
    wrong = execute(-word, after, law)
    assert np.allclose(wrong, states) == (law is braid.restricted)

  @pytest.mark.parametrize("t", [0.4, 1.7, np.exp(0.8j)])
  def test_inverse_word_undoes_burau(self, t, key):
    word = random_word(key, 12, 4)
    both = jnp.concatenate([word, braid.inverse(word)])
    np.testing.assert_allclose(burau_matrix(both, 4, t), np.eye(4), atol=1e-9)

  def test_six_vertex_generators_are_involutions(self, key):
    rays = braid.Rays(jax.random.normal(key, (4, 2)), jnp.array([0.1, 0.5, 0.3, 0.9]))
    word = random_word(key, 12, 4)
    back = execute(jnp.concatenate([word, word[::-1]]), rays, braid.six_vertex(1.5))
    for x, y in zip(back, rays, strict=True):
      np.testing.assert_allclose(x, y, atol=1e-12)

  def test_jit_and_vmap_agree_with_one_word_at_a_time(self, key):
    words = jax.vmap(lambda k: random_word(k, 9, 4))(jax.random.split(key, 5))
    states = _states(key)
    batched = jax.jit(jax.vmap(lambda w: braid.execute(w, states, braid.swap)))(words)
    for i in range(2):
      np.testing.assert_array_equal(batched.acc[i], braid.execute(words[i], states, braid.swap).acc)

  def test_gradient_of_the_linear_law_is_its_matrix(self, key):
    word = random_word(key, 9, 4)
    jacobian = jax.jacobian(lambda z: braid.execute(word, z, braid.burau(0.6)))(jnp.ones(4))
    np.testing.assert_allclose(jacobian, burau_matrix(word, 4, 0.6), atol=1e-13)

  @pytest.mark.parametrize("letter", [4, -4, 9])
  def test_letter_out_of_range(self, letter):
    with pytest.raises(ValueError, match=rf"letter {letter} is outside \[-3, 3\] for 4 strands"):
      braid.execute([1, letter], jnp.ones(4), braid.burau(0.5))


@pytest.mark.usefixtures("x64")
class TestWordFunctions:
  def test_permutation_is_burau_at_one(self, key):
    word = random_word(key, 15, 5)
    matrix = np.zeros((5, 5))
    matrix[permutation(word, 5), np.arange(5)] = 1
    np.testing.assert_array_equal(burau_matrix(word, 5, 1.0), matrix)

  def test_permutation_is_a_homomorphism(self):
    first, second = jnp.array([1, 2]), jnp.array([2, 3])
    p, q = permutation(first, 4), permutation(second, 4)
    whole = permutation(jnp.concatenate([first, second]), 4)
    np.testing.assert_array_equal(whole, q[p])
    assert not np.array_equal(whole, p[q])

  def test_pure_braids_have_the_trivial_permutation(self):
    np.testing.assert_array_equal(permutation(jnp.array([1, 2, 2, -1, 3, -3]), 4), np.arange(4))

  def test_writhe_and_linking(self):
    word = jnp.array([1, 1, -2, 0])
    assert int(braid.writhe(word)) == 1
    np.testing.assert_array_equal(linking_matrix(word, 3), [[0, 2, 0], [2, 0, -1], [0, -1, 0]])

  def test_linking_counts_every_crossing(self, key):
    word = random_word(key, 30, 5)
    linking = np.asarray(linking_matrix(word, 5))
    np.testing.assert_array_equal(linking, linking.T)
    assert np.triu(linking).sum() == int(braid.writhe(word))

  def test_burau_forgets_below_one(self, key):
    def spread(t):
      matrix = burau_matrix(random_word(key, 200, 5, positive=True), 5, t)
      return float(jnp.max(jnp.ptp(matrix, axis=0)))

    assert spread(1.0) == 1.0
    assert spread(0.6) < 1e-5 < 0.3 < spread(0.99)

  def test_reduced_burau_is_the_quotient_by_constants(self, key):
    word, z = random_word(key, 8, 4), jax.random.normal(key, (4,))
    moved = burau_matrix(word, 4, 0.7) @ z
    np.testing.assert_allclose(braid.reduced_burau_matrix(word, 4, 0.7) @ -jnp.diff(z), -jnp.diff(moved), atol=1e-12)


@functools.partial(jax.jit, static_argnums=(1, 2))
def orbit(word, strands, steps):
  """The words that 64 random rewritings reach."""
  return jax.vmap(lambda k: braid.rewrite(k, word, strands, steps))(jax.random.split(jax.random.key(1), 64))


class TestRewrite:
  @pytest.mark.parametrize(
    ("word", "expected"),
    [
      ((1, 2, 1), {(2, 1, 2)}),
      ((1, 2, -1), {(-2, 1, 2)}),
      # The middle crossing alternates: no third Reidemeister move.
      ((1, -2, 1), {(1, -2, 1)}),
      ((1, 3, 3), {(3, 1, 3)}),
      ((2, -2, 2), {(0, 0, 2), (2, 0, 0)}),
      ((1, 0, 1), {(0, 1, 1), (1, 1, 0)}),
      ((0, 0, 0), {(a, -a, 0) for a in (1, -1, 2, -2, 3, -3)} | {(0, a, -a) for a in (1, -1, 2, -2, 3, -3)}),
    ],
  )
  def test_one_step(self, word, expected):
    assert {tuple(w) for w in orbit(jnp.array(word), 4, 1).tolist()} == expected

  def test_words_spread_but_stay_equal(self):
    words = orbit(jnp.array([1, 2, 1, 3, 2, -1, 0, 0, 0, 0]), 4, 30)
    assert len({tuple(w) for w in words.tolist()}) > 30
    with jax.enable_x64(True):
      matrices = jax.jit(jax.vmap(lambda w: braid.burau_matrix(w, 4, 0.7)))(words)
    np.testing.assert_allclose(matrices, np.broadcast_to(matrices[0], matrices.shape), atol=1e-12)


# Right-handed knots and links: coefficients by power of √t. Alexander polynomials are symmetric.
TABLE = {
  "two unlinked circles": ([0], 2, {}, {-1: -1, 1: -1}),
  "Hopf link": ([1, 1], 2, {-1: -1, 1: 1}, {1: -1, 5: -1}),
  "trefoil on three strands": ([1, 2, 1, 2], 3, {-2: 1, 0: -1, 2: 1}, {2: 1, 6: 1, 8: -1}),
  "left-handed trefoil": ([-1, -1, -1], 2, {-2: 1, 0: -1, 2: 1}, {-2: 1, -6: 1, -8: -1}),
  "5_2": ([1, 1, 1, 2, -1, 2], 3, {-2: 2, 0: -3, 2: 2}, {2: 1, 4: -1, 6: 2, 8: -1, 10: 1, 12: -1}),
  "8_19, the (3, 4) torus knot": ([1, 2] * 4, 3, {-6: 1, -4: -1, 0: 1, 4: -1, 6: 1}, {6: 1, 10: 1, 16: -1}),
  "Borromean rings": (
    [1, -2] * 3,
    3,
    {-4: 1, -2: -4, 0: 6, 2: -4, 4: 1},
    {-6: -1, -4: 3, -2: -2, 0: 4, 2: -2, 4: 3, 6: -1},
  ),
}


@pytest.mark.usefixtures("x64")
class TestKnots:
  @pytest.mark.parametrize("name", TABLE)
  def test_coefficients(self, name):
    letters, strands, alexander, jones = TABLE[name]
    word = jnp.array(letters + [0] * (8 - len(letters)))
    for expected, function in ((alexander, alexander_coefficients), (jones, jones_coefficients)):
      found = np.asarray(function(word, strands))
      planted = np.zeros_like(found)
      for power, c in expected.items():
        planted[power + len(found) // 2] = c
      np.testing.assert_allclose(found, planted, atol=1e-8)

  def test_curl_multiplies_the_bracket(self):
    a, word = 1.05 * jnp.exp(0.3j), jnp.array([1, 1, 1])
    bracket = jax.jit(knots.kauffman_bracket, static_argnums=1)
    plain = bracket(word, 2, a)
    for sign in (1, -1):
      curled = bracket(braid.stabilise(word, 2, sign), 3, a)
      np.testing.assert_allclose(curled, -(a ** (3 * sign)) * plain, rtol=1e-12)
      assert abs(curled - plain) > 0.1

  def test_batched_words(self, key):
    words = jax.vmap(lambda k: random_word(k, 6, 3))(jax.random.split(key, 4))
    batch = jax.jit(jax.vmap(lambda w: knots.jones(w, 3, 1.1)))(words)
    np.testing.assert_allclose(batch, [jones(w, 3, 1.1) for w in words], rtol=1e-10)


def test_invariants_in_single_precision():
  word = jnp.array([1, -2, 1, -2])
  v, delta = jones(word, 3, 1.1), jax.jit(knots.alexander, static_argnums=1)(word, 3, 0.7)
  assert v.dtype == delta.dtype == jnp.complex64
  t = 1.1**-4
  assert abs(v - (t**2 - t + 1 - 1 / t + t**-2)) < 1e-4
  assert abs(delta - (3 - 0.7 - 1 / 0.7)) < 1e-4


class TestSixVertexWeights:
  def test_match_the_hyperbolic_quotients(self):
    with jax.enable_x64(True):
      w, eta = jnp.linspace(-3, 3, 60), 0.7
      b, c = braid.six_vertex_weights(w, eta)
      np.testing.assert_allclose(b, np.sinh(w) / np.sinh(w + eta), rtol=1e-12)
      np.testing.assert_allclose(c, np.sinh(eta) / np.sinh(w + eta), rtol=1e-12)

  def test_finite_where_sinh_overflows(self):
    w = jnp.array([-1e4, -200.0, 0.0, 200.0, 1e4])
    b, c = braid.six_vertex_weights(w, 1.0)
    assert np.isfinite(b).all() and np.isfinite(c).all()
    np.testing.assert_allclose(b[-1], np.exp(-1), rtol=1e-6)
    assert not np.isfinite(jnp.sinh(w) / jnp.sinh(w + 1.0)).all()

  def test_gradient_at_equal_rapidities(self):
    slope = jax.grad(lambda w: braid.six_vertex_weights(w, 1.0)[0])(0.0)
    np.testing.assert_allclose(slope, 1 / np.sinh(1), rtol=1e-6)


class TestAdditiveGate:
  def test_ties_at_the_threshold_are_not_selected(self):
    a, b = jnp.array([0.0, 0.5, -9.0, 9.0]), jnp.array([1.0, 0.0, 1.0, -0.5])
    order, k = additive_gate.prefix_schedule(a, b)
    np.testing.assert_array_equal(order, [0, 2, 1, 3])
    np.testing.assert_array_equal(k, [2, 3, 0, 4])
    np.testing.assert_array_equal(additive_gate.additive_mask(a, b).sum(axis=1), k)

  def test_no_keys_and_all_keys(self):
    payload = jnp.arange(6.0).reshape(3, 2)
    for k, expected in ((0, [0, 0]), (3, [6, 9])):
      np.testing.assert_array_equal(additive_gate.execute_schedule(jnp.arange(3), k, payload), expected)

  def test_repeating_one_letter_is_another_word(self):
    y = jnp.array([0.0, 1.0, 10.0, 100.0])
    states = braid.Strands(jnp.zeros(4), y)
    prefix = execute(additive_gate.prefix_word(3, 3), states, braid.swap)
    assert float(prefix.acc[3]) == 111.0
    repeated = execute(jnp.array([1, 1, 1]), states, braid.swap)
    assert float(repeated.acc[1]) == 3.0

  def test_non_nested_fraction(self):
    nested = jnp.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    assert float(additive_gate.non_nested_fraction(nested)) == 0.0
    crossing = nested.at[1].set(jnp.array([False, True, False]))
    np.testing.assert_allclose(additive_gate.non_nested_fraction(crossing), 1 / 3)
    # The pair crosses only on a key that one of the two queries cannot see.
    hidden = jnp.ones((3, 3), bool).at[0, 1].set(False)
    assert float(additive_gate.non_nested_fraction(crossing, hidden)) == 0.0

  @pytest.mark.parametrize(
    ("bound", "rank", "low", "high"),
    [(4, 12, 1e-4, 3e-4), (4, 16, 5e-6, 2e-5), (4, 24, 2e-8, 6e-8), (2, 12, 2e-7, 6e-7), (8, 32, 3e-6, 9e-6)],
  )
  def test_interpolation_error_follows_the_bernstein_radius(self, bound, rank, low, high):
    with jax.enable_x64(True):
      error = float(_interpolation_error(rank, bound, jnp.linspace(-bound, bound, 201)))
      predicted = float(additive_gate.sigmoid_bernstein_radius(bound)) ** -rank
    assert low < error < high
    assert 0.5 < error / predicted < 2

  def test_interpolation_in_single_precision_and_its_control(self):
    grid = jnp.linspace(-4, 4, 201)
    assert _interpolation_error(24, 4, grid) < 5e-6
    assert _interpolation_error(4, 4, grid) > 1e-2

  def test_features_interpolate_and_differentiate_at_the_nodes(self):
    nodes = additive_gate.chebyshev_nodes(12, 4.0)
    features = jax.jit(additive_gate.chebyshev_features, static_argnums=(1, 2))(nodes, 12, 4.0)
    np.testing.assert_allclose(features, np.eye(12), atol=3e-6)
    slope = jax.jit(jax.vmap(jax.jacfwd(lambda a: additive_gate.chebyshev_features(a, 12, 4.0))))(nodes)
    gate = jax.nn.sigmoid(nodes)
    np.testing.assert_allclose(slope @ gate, gate * (1 - gate), atol=1e-2)

  def test_singular_values_stay_below_the_zolotarev_bound(self):
    index = np.arange(12)

    def below(bound, believed):
      grid = np.linspace(-bound, bound, 101)
      values = np.linalg.svd(1 / (1 + np.exp(-grid[:, None] - grid)), compute_uv=False)[:12]
      return (values / values[0] <= np.asarray(additive_gate.sigmoid_rank_bound(index, believed))).all()

    assert all(below(bound, bound) for bound in (1.0, 2.0, 4.0, 8.0))
    assert not below(8.0, 2.0)


@functools.partial(jax.jit, static_argnums=0)
def _interpolation_error(rank, bound, grid):
  nodes = additive_gate.chebyshev_nodes(rank, bound)
  product = additive_gate.chebyshev_features(grid, rank, bound) @ jax.nn.sigmoid(nodes[:, None] + grid)
  return jnp.max(jnp.abs(jax.nn.sigmoid(grid[:, None] + grid) - product))
