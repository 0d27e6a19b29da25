"""Claims about complexes, homology, the Hodge split and the conserved mixer, each with a broken twin."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import hodge, homology, mixer, simplicial
from mgr_jax.claims import Check, claim, worst_of


def _rng(key: jax.Array) -> np.random.Generator:
  """Cases are drawn by numpy: nothing to compile for them."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def random_flag_complex(rng: np.random.Generator, n: int = 12, p: float = 0.4) -> simplicial.Complex:
  """Cliques, up to dimension 3, of a random graph that holds each edge with probability p."""
  upper = np.triu(rng.random((n, n)) < p, 1)
  return simplicial.flag_complex(upper | upper.T, 3)


def _wrong_sign(D: simplicial.Boundary) -> simplicial.Boundary:
  """The same boundary with the sign of the first face dropped."""
  signs = np.array(D.signs)
  signs[:1, 1:2] *= -1
  return dataclasses.replace(D, signs=signs)


def _boundary_law(broken: bool) -> Check:
  """Nonzero entries of D_{k-1}D_k, and entries in which relabelled or flipped boundaries miss their formula."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for _ in range(20 * scale):
      complex_ = random_flag_complex(rng)
      maps = list(simplicial.boundaries(complex_))
      if broken:
        maps[2:3] = [_wrong_sign(D) for D in maps[2:3]]
      dense = [D.dense() for D in maps]
      wrong += sum(np.count_nonzero(a @ b) for a, b in itertools.pairwise(dense))
      renamed, moves = simplicial.relabel(complex_, dict(enumerate(rng.permutation(12).tolist())))
      flips = [rng.choice([-1, 1], n) for n in complex_.sizes]
      for k in range(1, complex_.dim + 1):
        expected = simplicial.move(simplicial.move(dense[k], *moves[k - 1]).T, *moves[k]).T
        wrong += np.count_nonzero(simplicial.boundary(renamed, k).dense() - expected)
        flipped = simplicial.flip(maps[k], flips[k - 1], flips[k]).dense()
        wrong += np.count_nonzero(flipped - flips[k - 1][:, None] * dense[k] * flips[k])
    return float(wrong)

  return measure


# Space, Betti numbers over ℚ, over 𝔽₂, and the torsion of H_1.
SPACES = {
  "circle": (simplicial.circle, (1, 1), (1, 1), ()),
  "sphere": (simplicial.sphere, (1, 0, 1), (1, 0, 1), ()),
  "torus": (simplicial.torus, (1, 2, 1), (1, 2, 1), ()),
  "projective plane": (simplicial.projective_plane, (1, 0, 0), (1, 1, 1), (2,)),
  "Klein bottle": (simplicial.klein_bottle, (1, 1, 0), (1, 2, 1), (2,)),
}


def _known_spaces(fill: bool) -> Check:
  """Betti numbers, torsion and Euler characteristics that differ from the known ones; the circle may be filled."""

  def measure(key, scale):
    del key, scale
    wrong = 0
    for name, (make, rational, binary, torsion) in SPACES.items():
      complex_ = simplicial.build_complex([(0, 1, 2)]) if fill and name == "circle" else make()
      found = [homology.betti_numbers(complex_, field) for field in ("Q", "F2")]
      pad = lambda numbers, n=complex_.dim + 1: (*numbers, *[0] * (n - len(numbers)))
      wrong += sum(got != pad(known) for got, known in zip(found, (rational, binary), strict=True))
      wrong += homology.torsion(complex_, 1) != torsion
      alternating = [sum((-1) ** k * b for k, b in enumerate(numbers)) for numbers in found]
      wrong += sum(chi != homology.euler_characteristic(complex_) for chi in alternating)
    return float(wrong)

  return measure


SURFACES = (simplicial.torus(), simplicial.projective_plane())


@functools.partial(jax.jit, static_argnums=0)
def edge_split(complex_, x):
  """Gradient, harmonic and curl part of an edge flow."""
  p, h, q = hodge.hodge_decompose(complex_, x, 1)
  return simplicial.boundary(complex_, 1).transpose(p), h, simplicial.boundary(complex_, 2).apply(q)


def _hodge_split(omit_curl: bool) -> Check:
  """Largest error of the sum, of orthogonality and of L h = 0, and of dim ker L_k - β_k; the curl may stay in h."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    with jax.enable_x64(True):
      for complex_ in SURFACES:
        x = rng.standard_normal((complex_.size(1), 2 * scale))
        gradient, h, curl = map(np.asarray, edge_split(complex_, x))
        if omit_curl:
          h, curl = h + curl, np.zeros_like(curl)
        products = [np.sum(a * b, axis=0) for a, b in itertools.combinations((gradient, h, curl), 2)]
        laplacian = hodge.dense_laplacian(complex_, 1)
        kernel = np.sum(np.linalg.eigvalsh(laplacian.astype(float)) < 1e-8)
        errors = [gradient + h + curl - x, laplacian @ h, *products, kernel - homology.betti(complex_, 1)]
        worst = worst_of(worst, *(float(np.max(np.abs(e))) for e in errors))
    return worst

  return measure


def _distances(points: np.ndarray) -> np.ndarray:
  return np.sqrt(np.sum(np.square(points[:, None] - points), axis=-1))


def minimum_spanning_tree(distances: np.ndarray) -> np.ndarray:
  """Sorted edge lengths of the tree that Prim's algorithm grows from vertex 0."""
  near, inside, lengths = distances[0].copy(), np.arange(len(distances)) == 0, []
  for _ in range(len(distances) - 1):
    v = int(np.argmin(np.where(inside, np.inf, near)))
    lengths.append(near[v])
    inside[v] = True
    near = np.minimum(near, distances[v])
  return np.sort(lengths)


def _persistence(line: bool) -> Check:
  """Errors of the component bars against the spanning tree, and of the one long loop bar of a 12-gon (or a line)."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for _ in range(scale):
      distances = _distances(rng.standard_normal((24, 3)))
      (components,) = homology.persistence(distances, 0)
      worst = worst_of(worst, float(np.max(np.abs(components.death[:-1] - minimum_spanning_tree(distances)))))
    angles = 2 * np.pi * np.arange(12) / 12
    points = np.arange(24.0)[:, None] if line else np.stack([np.cos(angles), np.sin(angles)], axis=1)
    loops = homology.persistence(_distances(points))[1]
    long = loops.death - loops.birth > 1e-9
    if np.sum(long) != 1:
      return np.inf
    # The loop closes with the sides and is filled when chords over four sides, a third of the circle, arrive.
    known = 2 * np.sin(np.pi / 12), np.sqrt(3)
    return worst_of(worst, abs(loops.birth[long][0] - known[0]), abs(loops.death[long][0] - known[1]))

  return measure


WIDTH = 4


def mixer_case(rng: np.random.Generator, complex_: simplicial.Complex, layers: int = 3):
  """Parameters, and a state in which no simplex is empty."""
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  n_level = complex_.dim + 1
  square = [0.5 * normal(layers, n_level, WIDTH, WIDTH) for _ in range(3)]
  params = mixer.Mixer(normal(layers, n_level, WIDTH, 3), *square)
  masses = tuple(rng.uniform(0.5, 1.5, n).astype(np.float32) for n in complex_.sizes)
  return params, mixer.Levels(tuple(normal(n, WIDTH) for n in complex_.sizes), masses)


def _total(masses) -> float:
  return float(sum(np.sum(np.asarray(m, np.float64)) for m in masses))


run_mixer, _increments = jax.jit(mixer.mix), jax.jit(mixer.increments)


def _leaky(params, state, boundaries):
  """The mixer, with mass that finds no coface lost on the way."""
  state = jax.tree.map(np.asarray, run_mixer(params, state, boundaries))
  alone = np.bincount(np.asarray(boundaries[2].faces).reshape(-1), minlength=boundaries[2].n_faces) == 0
  masses = list(state.masses)
  masses[1] = np.where(alone, 0, masses[1])
  return state._replace(masses=tuple(masses))


def _mass(run) -> Check:
  """Largest relative change of the total mass; any negative mass counts as infinite."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for _ in range(scale):
      # A loose edge and a lone vertex: shares that have nowhere to go.
      complex_ = simplicial.build_complex([(0, 1, 2), (1, 2, 3), (3, 4), (5,), (0, 4, 6, 7)])
      params, state = mixer_case(rng, complex_)
      after = run(params, state, simplicial.boundaries(complex_)).masses
      if min(float(np.min(m)) for m in after) < 0:
        return np.inf
      worst = worst_of(worst, abs(_total(after) / _total(state.masses) - 1))
    return worst

  return measure


def _signed_gate_mix(params, state, boundaries):
  """The mixer with gates that read h itself, so they depend on the orientation."""

  def layer(state, p):
    gates = [jax.nn.softmax(h @ gate, axis=-1) for h, gate in zip(state.features, p.gate, strict=True)]
    masses = mixer.transfer(boundaries, state.masses, gates)
    after = mixer.mix(jax.tree.map(lambda a: a[None], p), state, boundaries)
    return after._replace(masses=masses), None

  return jax.lax.scan(layer, state, params)[0]


def _equivariance(run) -> Check:
  """Largest error of f(S x) = S f(x) for flips S and of f(P x) = P f(x) for an automorphism P of the torus."""

  def measure(key, scale):
    rng, errors = _rng(key), []
    complex_ = simplicial.torus()
    maps = simplicial.boundaries(complex_)
    # Multiplication by 2 maps {0,1,3} to {0,2,6} = {6,0,2}: it permutes the triangles.
    renamed, moves = simplicial.relabel(complex_, {v: (2 * v + 1) % 7 for v in range(7)})
    assert all(np.array_equal(a, b) for a, b in zip(renamed.simplices, complex_.simplices, strict=True))
    for _ in range(scale):
      params, state = mixer_case(rng, complex_)
      signs = [np.ones(7, np.int32), *(rng.choice([-1, 1], n) for n in complex_.sizes[1:])]
      flipped = [simplicial.flip(maps[k], signs[k - 1], signs[k]) for k in (1, 2)]
      turn = lambda x, signs=signs: x._replace(
        features=tuple(s[:, None] * np.asarray(h) for s, h in zip(signs, x.features, strict=True))
      )
      carry = lambda x: mixer.Levels(
        tuple(simplicial.move(np.asarray(h), *m) for h, m in zip(x.features, moves, strict=True)),
        tuple(
          simplicial.move(np.asarray(m), at, np.ones_like(sign)) for m, (at, sign) in zip(x.masses, moves, strict=True)
        ),
      )
      result = lambda state, maps, params=params: jax.tree.map(np.asarray, run(params, state, maps))
      after = result(state, maps)
      pairs = [(result(jax.tree.map(np.float32, turn(state)), (maps[0], *flipped, maps[3])), turn(after))]
      pairs.append((result(carry(state), maps), carry(after)))
      errors += [np.max(np.abs(a - b)) for x, y in pairs for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True)]
    return worst_of(errors)

  return measure


def _closed_increments(summed: bool) -> Check:
  """Size of D_k(from above) and D_{k+1}ᵀ(from below), relative; `summed` adds the two before the test."""
  complex_ = simplicial.flag_complex(np.ones((5, 5)), 3)
  maps = simplicial.boundaries(complex_)

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for _ in range(scale):
      params, state = mixer_case(rng, complex_)
      above, below = jax.tree.map(np.asarray, _increments(maps, state.features, params.down[0], params.up[0]))
      for k in range(complex_.dim + 1):
        down, up = (above[k] + below[k],) * 2 if summed else (above[k], below[k])
        size = float(np.max(np.abs(above[k])) + np.max(np.abs(below[k])))
        residuals = [maps[k].dense() @ down, maps[k + 1].dense().T @ up]
        worst = worst_of(worst, *(float(np.max(np.abs(r), initial=0)) / size for r in residuals))
    return worst

  return measure


@jax.jit
def _net(params, flow, masses, boundaries, readouts):
  """The mixer on N edge flows [N, n_1, d], and two readouts of it: 16 odd ones [N, 16], and squares [N, d]."""
  identity = [jnp.eye(flow.shape[-1], dtype=flow.dtype)] * len(masses)

  def one(flow):
    zeros = [jnp.zeros((m.shape[0], flow.shape[-1]), flow.dtype) for m in masses]
    features = mixer.mix(params, mixer.Levels((zeros[0], flow, zeros[2]), masses), boundaries).features
    odd = jax.vmap(lambda w: mixer.linear_readout(features, w))(readouts)
    return odd, mixer.even_readout(features, identity)

  return jax.vmap(one)(flow)


class Parity(NamedTuple):
  """Accuracies on antipodal pairs: of 16 odd readouts [16], of an even one on pairs it was not fitted to, and of the
  more frequent label."""

  odd: np.ndarray
  even: float
  majority: float


def parity(rng: np.random.Generator, count: int = 512) -> Parity:
  """Of a network that is odd in h, for the label "large circulation around the triangles", which is even.

  The odd readouts are random ones: nothing about them matters. The even one is fitted by least squares on half of the
  pairs and tested on the others.
  """
  complex_ = simplicial.torus()
  maps = simplicial.boundaries(complex_)
  params, state = mixer_case(rng, complex_, layers=2)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  flow = normal(count, complex_.size(1), WIDTH)
  flux = np.sum(np.square(np.einsum("et,nec->ntc", maps[2].dense(), flow)), axis=(1, 2))
  label = flux > np.median(flux)
  weights = [(normal(16, n), normal(16, WIDTH)) for n in complex_.sizes]
  # The same program on x and on -x, so that both are rounded alike.
  sides = [_net(params, np.float32(s) * flow, state.masses, maps, weights) for s in (1, -1)]
  right = [(np.asarray(odd) > 0) == label[:, None] for odd, _ in sides]
  inputs = np.pad(np.asarray(sides[0][1]), ((0, 0), (0, 1)), constant_values=1.0)
  half = count // 2
  fitted = np.linalg.lstsq(inputs[:half], 2.0 * label[:half] - 1, rcond=None)[0]
  even = float(np.mean((inputs[half:] @ fitted > 0) == label[half:]))
  return Parity(np.mean(right, axis=(0, 1)), even, max(np.mean(label), 1 - np.mean(label)))


def _parity(even: bool) -> Check:
  """|accuracy - 1/2| on 512 antipodal pairs."""

  def measure(key, scale):
    found = parity(_rng(key), 512 * scale)
    return abs(found.even - 0.5) if even else float(np.max(np.abs(found.odd - 0.5)))

  return measure


CLAIMS = (
  claim(
    "simplicial.boundary",
    "D_{k-1} D_k = 0 over the integers; relabelling gives P D Pᵀ and reorientation S D S, exactly",
    _boundary_law(False),
    0.0,
    _boundary_law(True),
  ),
  claim(
    "simplicial.betti",
    "circle, sphere, torus, projective plane and Klein bottle have their Betti numbers over ℚ and 𝔽₂, torsion and χ",
    _known_spaces(False),
    0.0,
    _known_spaces(True),
    ("Munkres 1984",),
  ),
  claim(
    "simplicial.hodge",
    "x = D_kᵀp + h + D_{k+1}q with orthogonal parts and L_k h = 0, and dim ker L_k = β_k",
    _hodge_split(False),
    1e-8,
    _hodge_split(True),
    ("Eckmann 1944",),
  ),
  claim(
    "simplicial.persistence",
    "component bars die at the edges of the minimum spanning tree; a 12-gon has one loop, alive on [2 sin π/12, √3)",
    _persistence(False),
    1e-12,
    _persistence(True),
  ),
  claim(
    "simplicial.mixer_mass",
    "the mixer conserves Σ m to rounding and keeps every m >= 0",
    _mass(run_mixer),
    1e-6,
    _mass(_leaky),
  ),
  claim(
    "simplicial.mixer_equivariance",
    "the mixer commutes with orientation flips and with automorphisms; gates that read signed features do not",
    _equivariance(run_mixer),
    1e-5,
    _equivariance(jax.jit(_signed_gate_mix)),
  ),
  claim(
    "simplicial.mixer_increments",
    "D_k maps what level k gets from above to 0, and D_{k+1}ᵀ what it gets from below, but neither kills the sum",
    _closed_increments(False),
    1e-5,
    _closed_increments(True),
  ),
  claim(
    "simplicial.parity",
    "an odd network with a linear readout gets exactly half of any even label right on antipodal pairs; squares do not",
    _parity(False),
    0.0,
    _parity(True),
  ),
)
