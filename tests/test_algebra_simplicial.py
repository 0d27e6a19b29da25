import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import hodge, homology, mixer, simplicial
from mgr_jax.algebra.simplicial_claims import CLAIMS, minimum_spanning_tree, random_flag_complex
from mgr_jax.claims import run_claims


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


def test_claim_names():
  names = [claim.name for claim in CLAIMS]
  assert len(set(names)) == len(names)
  assert all(name.startswith("simplicial.") for name in names)


class TestComplex:
  def test_vertices_are_sorted_and_repetitions_dropped(self):
    complex_ = simplicial.build_complex([(2, 0, 2), (1, 0, 2)])
    assert [rows.tolist() for rows in complex_.simplices] == [[[0], [1], [2]], [[0, 1], [0, 2], [1, 2]], [[0, 1, 2]]]

  def test_max_dim_cuts_the_top(self):
    complex_ = simplicial.build_complex([range(5)], max_dim=1)
    assert complex_.sizes == (5, 10)

  def test_missing_face_is_named(self):
    rows = np.array([[0], [1], [2]]), np.array([[0, 1], [0, 2]]), np.array([[0, 1, 2]])
    with pytest.raises(ValueError, match=r"\(1, 2\), a face of \(0, 1, 2\)"):
      simplicial.Complex(rows)

  @pytest.mark.parametrize("edges", [[[1, 0]], [[0, 1], [0, 1]], [[1, 2], [0, 1]], [[1, 1]]])
  def test_unsorted_levels_are_refused(self, edges):
    with pytest.raises(ValueError, match="level 1"):
      simplicial.Complex((np.array([[0], [1], [2]]), np.array(edges)))

  def test_empty_complex(self):
    complex_ = simplicial.build_complex([])
    assert (complex_.dim, complex_.sizes) == (-1, ())
    assert simplicial.boundary(complex_, 0).shape == (0, 0)
    assert homology.betti_numbers(complex_) == ()

  def test_flag_complex_holds_every_clique(self, rng):
    upper = np.triu(rng.random((8, 8)) < 0.6, 1)
    adjacency = upper | upper.T
    complex_ = simplicial.flag_complex(adjacency, 3)
    for k in range(4):
      cliques = [
        c for c in itertools.combinations(range(8), k + 1) if all(adjacency[e] for e in itertools.combinations(c, 2))
      ]
      assert complex_.size(k) == len(cliques)
      assert k > complex_.dim or complex_.simplices[k].tolist() == [list(c) for c in cliques]

  def test_flag_complex_refuses_a_directed_graph(self):
    with pytest.raises(ValueError, match="symmetric"):
      simplicial.flag_complex(np.triu(np.ones((3, 3))), 2)
    with pytest.raises(ValueError, match="max_dim=-1"):
      simplicial.flag_complex(np.ones((3, 3)), -1)

  def test_grid_torus_is_a_torus(self):
    assert homology.betti_numbers(simplicial.grid_torus(4, 5)) == (1, 2, 1)

  def test_relabel_needs_a_bijection(self):
    with pytest.raises(ValueError, match="same new name"):
      simplicial.relabel(simplicial.circle(), {0: 0, 1: 0, 2: 2})


class TestBoundary:
  def test_signs(self):
    dense = simplicial.boundary(simplicial.build_complex([(0, 1, 2)]), 2).dense()
    assert dense.tolist() == [[1], [-1], [1]]  # faces 01, 02, 12 omit vertices 2, 1, 0

  @pytest.mark.parametrize("k", range(5))
  def test_application_equals_the_matrix(self, k, rng):
    complex_ = simplicial.flag_complex(np.ones((5, 5)), 3)
    D = simplicial.boundary(complex_, k)
    assert D.shape == (complex_.size(k - 1), complex_.size(k))
    x, y = (rng.integers(-9, 9, (n, 2, 3)).astype(np.float32) for n in reversed(D.shape))
    np.testing.assert_array_equal(D.apply(x), np.tensordot(D.dense(), x, 1))
    np.testing.assert_array_equal(D.transpose(y), np.tensordot(D.dense().T, y, 1))
    np.testing.assert_array_equal(D.apply(x[:, 0, 0]), D.dense() @ x[:, 0, 0])

  def test_integers_stay_integers(self):
    D = simplicial.boundary(simplicial.torus(), 1)
    assert D.apply(jnp.arange(21)).dtype == jnp.int32
    assert D.transpose(jnp.arange(7)).dtype == jnp.int32

  def test_is_a_pytree_of_static_shape(self, rng):
    D = simplicial.boundary(simplicial.torus(), 2)
    x = rng.standard_normal((5, 14)).astype(np.float32)
    batched = jax.jit(jax.vmap(lambda D, x: D.apply(x), in_axes=(None, 0)))(D, x)
    np.testing.assert_allclose(batched, x @ D.dense().T, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize("k", [-1, 4])
  def test_level_out_of_range(self, k):
    with pytest.raises(ValueError, match=rf"k={k} is outside 0\.\.3"):
      simplicial.boundary(simplicial.torus(), k)


class TestHomology:
  def test_rational_rank_agrees_with_singular_values(self, rng):
    for _ in range(10):
      complex_ = random_flag_complex(rng)
      for k in range(1, complex_.dim + 1):
        D = simplicial.boundary(complex_, k).dense()
        assert homology.rank_rational(D) == np.linalg.matrix_rank(D) == len(homology.invariant_factors(D))

  def test_primes(self):
    for prime in homology.PRIMES:
      assert prime < 2**31
      assert all(prime % d for d in range(2, math.isqrt(prime) + 1))

  def test_rank_depends_on_the_field(self):
    matrix = np.array([[2, 0], [0, 3]])
    assert [homology.rank_modulo(matrix, p) for p in (2, 3, 5)] == [1, 1, 2]
    assert homology.rank_rational(matrix) == 2

  def test_invariant_factors(self, rng):
    assert homology.invariant_factors(np.diag([2, 3])) == (1, 6)
    assert homology.invariant_factors(np.array([[2, 4, 4], [-6, 6, 12], [10, 4, 16]])) == (2, 2, 156)
    assert homology.invariant_factors(np.zeros((2, 0), int)) == ()
    matrix = rng.integers(-5, 6, (5, 7))
    factors = homology.invariant_factors(matrix)
    assert all(b % a == 0 for a, b in itertools.pairwise(factors))
    # The product of the first j factors is the greatest common divisor of the j x j minors.
    for j in (1, 2):
      minors = (
        round(np.linalg.det(matrix[np.ix_(r, c)]))
        for r in itertools.combinations(range(5), j)
        for c in itertools.combinations(range(7), j)
      )
      assert math.gcd(*minors) == math.prod(factors[:j])

  def test_bad_arguments(self):
    with pytest.raises(ValueError, match="field='Z'"):
      homology.betti(simplicial.torus(), 1, "Z")
    with pytest.raises(ValueError, match=r"k=3 is outside 0\.\.2"):
      homology.betti(simplicial.torus(), 3)
    with pytest.raises(ValueError, match="k=-1"):
      homology.torsion(simplicial.torus(), -1)


class TestPersistence:
  def test_long_loops_are_the_loops_of_the_space(self, rng):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 20))
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    points = np.concatenate([ring, ring + np.array([5, 0])])
    distances = np.sqrt(((points[:, None] - points) ** 2).sum(-1))
    components, loops = homology.persistence(distances)
    assert np.sum(components.death > 1.5) == 2  # two circles: one bar until they meet, one for ever
    assert np.sum(loops.death - loops.birth > 0.4) == 2
    np.testing.assert_allclose(components.death[:-1], minimum_spanning_tree(distances))

  def test_one_point(self):
    components, loops = homology.persistence(np.zeros((1, 1)))
    assert components.death.tolist() == [np.inf]
    assert len(loops.birth) == 0

  @pytest.mark.parametrize(
    ("distances", "max_dim", "message"),
    [
      (np.ones((3, 3)), 1, "zero diagonal"),
      (np.array([[0, 1], [2, 0]]), 1, "symmetric"),
      (np.zeros((65, 65)), 1, "65 points"),
      (np.zeros((3, 3)), 2, "max_dim=2"),
    ],
  )
  def test_bad_arguments(self, distances, max_dim, message):
    with pytest.raises(ValueError, match=message):
      homology.persistence(distances, max_dim)


@pytest.mark.usefixtures("x64")
class TestHodge:
  @pytest.mark.parametrize("k", [0, 1, 2])
  def test_laplacian_equals_the_matrix(self, k, rng):
    complex_ = simplicial.torus()
    x = rng.standard_normal((complex_.size(k), 3))
    dense = hodge.dense_laplacian(complex_, k)
    np.testing.assert_allclose(hodge.hodge_laplacian(complex_, k, x), dense @ x, atol=1e-12)
    assert np.array_equal(dense, dense.T)
    assert np.linalg.eigvalsh(dense.astype(float)).min() > -1e-12

  def test_decomposition_at_the_ends(self, rng):
    complex_ = simplicial.build_complex([(0, 1), (1, 2), (3, 4)])
    x = rng.standard_normal(5)
    p, h, q = hodge.hodge_decompose(complex_, x, 0)
    assert p.shape == (0,)
    np.testing.assert_allclose(h, [*[x[:3].mean()] * 3, *[x[3:].mean()] * 2], atol=1e-9)
    np.testing.assert_allclose(h + simplicial.boundary(complex_, 1).apply(q), x, atol=1e-12)
    p, h, q = hodge.hodge_decompose(complex_, x[:3], 1)
    assert q.shape == (0,)
    np.testing.assert_allclose(h, 0, atol=1e-9)  # a forest has no cycle: every flow is a gradient

  @pytest.mark.parametrize("t", [0.0, 0.3, 20.0])
  def test_heat_is_the_matrix_exponential(self, t, rng):
    complex_ = simplicial.projective_plane()
    x = rng.standard_normal((complex_.size(1), 2))
    values, vectors = np.linalg.eigh(hodge.dense_laplacian(complex_, 1).astype(float))
    exact = vectors @ (np.exp(-t * values)[:, None] * (vectors.T @ x))
    np.testing.assert_allclose(jax.jit(lambda x: hodge.heat(complex_, x, 1, t))(x), exact, atol=1e-12)

  def test_spectrum_stays_below_the_number_of_vertices(self, rng):
    for _ in range(5):
      complex_ = random_flag_complex(rng, p=0.7)
      for k in range(complex_.dim + 1):
        assert np.linalg.eigvalsh(hodge.dense_laplacian(complex_, k).astype(float)).max() < 12 + 1e-9

  def test_heat_tends_to_the_harmonic_part(self, rng):
    complex_ = simplicial.torus()
    x = rng.standard_normal(complex_.size(1))
    _, h, _ = hodge.hodge_decompose(complex_, x, 1)
    heat = jax.jit(hodge.heat, static_argnums=(0, 2, 3))
    np.testing.assert_allclose(heat(complex_, x, 1, 20.0), h, atol=1e-9)
    assert np.max(np.abs(heat(complex_, x, 1, 0.1) - h)) > 0.1

  @pytest.mark.parametrize("t", [-1.0, math.inf, math.nan])
  def test_heat_refuses_other_times(self, t):
    with pytest.raises(ValueError, match="t="):
      hodge.heat(simplicial.torus(), jnp.zeros(21), 1, t)

  def test_sheaf_laplacian(self, rng):
    complex_ = simplicial.circle(5)
    edges = complex_.simplices[1]
    x = rng.standard_normal((5, 3))
    identity = np.broadcast_to(np.eye(3), (5, 2, 3, 3))
    graph = hodge.hodge_laplacian(complex_, 0, x)
    np.testing.assert_allclose(hodge.sheaf_laplacian(edges, identity, x), graph, atol=1e-12)
    # Maps F_{e,v} = O_v of a gauge change leave one section per stalk: O_vᵀ c. A half turn on one edge leaves none.
    gauge = np.linalg.qr(rng.standard_normal((5, 3, 3)))[0]
    section = np.einsum("vba,b->va", gauge, rng.standard_normal(3))
    np.testing.assert_allclose(hodge.sheaf_laplacian(edges, gauge[edges], section), 0, atol=1e-12)
    twisted = gauge[edges].copy()
    twisted[0, 1] *= -1
    assert np.max(np.abs(hodge.sheaf_laplacian(edges, twisted, section))) > 0.1


class TestMixer:
  def test_mass_goes_where_the_gates_say(self):
    complex_ = simplicial.build_complex([(0, 1, 2), (3,)])
    maps = simplicial.boundaries(complex_)
    masses = tuple(jnp.array(m, jnp.float32) for m in ([0, 0, 0, 1], [1, 0, 0], [0]))
    send = lambda *gate: [jnp.tile(jnp.array(gate, jnp.float32), (n, 1)) for n in complex_.sizes]
    down = mixer.transfer(maps, masses, send(0, 1, 0))
    np.testing.assert_allclose(down[0], [0.5, 0.5, 0, 1])  # a vertex has no faces: its share stays
    up = mixer.transfer(maps, masses, send(0, 0, 1))
    np.testing.assert_allclose(up[2], [1.0])
    np.testing.assert_allclose(up[0], [0, 0, 0, 1])  # nor has a lone vertex cofaces

  def test_odd_and_even_readouts(self, key, rng):
    complex_ = simplicial.torus()
    params = mixer.init_mixer(key, 2, 3, 4)
    maps = simplicial.boundaries(complex_)
    h = tuple(rng.standard_normal((n, 4)).astype(np.float32) for n in complex_.sizes)
    run = jax.jit(lambda h: mixer.mix(params, mixer.Levels(h, tuple(np.ones(n) for n in complex_.sizes)), maps))
    plus, minus = run(h), run(tuple(-x for x in h))
    linear = [(np.ones(n, np.float32), np.ones(4, np.float32)) for n in complex_.sizes]
    square = [np.eye(4, dtype=np.float32)] * 3
    odd = [float(mixer.linear_readout(s.features, linear)) for s in (plus, minus)]
    assert odd[0] == -odd[1] != 0
    even = [mixer.even_readout(s.features, square) for s in (plus, minus)]
    np.testing.assert_array_equal(*even)
    np.testing.assert_array_equal(plus.masses[1], minus.masses[1])

  def test_gradients_are_finite_at_zero(self, key):
    complex_ = simplicial.circle()
    params, maps = mixer.init_mixer(key, 2, 2, 4), simplicial.boundaries(complex_)
    zeros = mixer.Levels(tuple(jnp.zeros((n, 4)) for n in complex_.sizes), tuple(jnp.ones(n) for n in complex_.sizes))

    def objective(params):
      out = mixer.mix(params, zeros, maps)
      return sum(jnp.sum(x * jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))) for x in jax.tree.leaves(out))

    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(jax.jit(jax.grad(objective))(params)))


def test_a_wrong_sign_breaks_the_application_too(rng):
  D = simplicial.boundary(simplicial.torus(), 2)
  signs = np.array(D.signs)
  signs[0, 0] *= -1
  wrong = dataclasses.replace(D, signs=signs)
  x = rng.standard_normal(14).astype(np.float32)
  D1 = simplicial.boundary(simplicial.torus(), 1)
  assert np.max(np.abs(D1.apply(D.apply(x)))) < 1e-5
  assert np.max(np.abs(D1.apply(wrong.apply(x)))) > 0.01
