"""Claims about braid words, crossing laws, link invariants and additive gates, each with a broken twin.

Identities are measured in double precision. Where a statement says "exact" the states are integers and the tolerance 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import additive_gate, braid, knot_claims
from mgr_jax.algebra.braid_sampling import (
  Sample,
  additive,
  distance,
  equal_words,
  exact_additive,
  letters,
  worst,
)
from mgr_jax.claims import Check, Claim, claim


def _rays(rng: np.random.Generator, count: int) -> tuple[braid.Rays, np.ndarray]:
  """Values and rapidities of five strands, and an η larger than every rapidity difference."""
  return braid.Rays(rng.normal(size=(count, 5, 3)), rng.uniform(size=(count, 5))), rng.uniform(1.2, 2, count)


def _relations(n: int) -> tuple[np.ndarray, np.ndarray]:
  """Both sides of every defining relation of B_n, and of σ_i σ_i⁻¹ = 1, as words of length 3."""
  pairs = []
  for i in range(1, n):
    pairs.append(((i, -i, 0), (0, 0, 0)))
    pairs += [((s * i, s * (i + 1), s * i), (s * (i + 1), s * i, s * (i + 1))) for s in (1, -1) if i + 1 < n]
    pairs += [((i, s * j, 0), (s * j, i, 0)) for j in range(i + 2, n) for s in (1, -1)]
  left, right = zip(*pairs, strict=True)
  return np.asarray(left), np.asarray(right)


def _relation_residual(states, law: braid.Law) -> jax.Array:
  n = jax.tree.leaves(states)[0].shape[0]
  return distance(*(jax.vmap(lambda w: braid.execute(w, states, law))(jnp.asarray(side)) for side in _relations(n)))


def _chosen(choose: jax.Array, law: braid.Law, other: braid.Law) -> braid.Law:
  """`law` where `choose`, else `other`: a law and its broken twin in one compiled program."""

  def mixed(left, right, sign: jax.Array):
    both = law(left, right, sign), other(left, right, sign)
    return jax.tree.map(lambda x, y: jnp.where(choose, x, y), *both)

  return mixed


def _relation_residuals(states, values, t, whole):
  law = _chosen(whole, braid.swap, braid.restricted)
  return jnp.maximum(_relation_residual(states, law), _relation_residual(values, braid.burau(t)))


def _braid_relation(whole: bool) -> Check:
  """Residual of the relations under swap and Burau; restricted takes the place of swap unless `whole`."""

  def sample(rng, count):
    # Half of the cases have a real t.
    t = rng.uniform(0.3, 2.0, count) * np.exp(1j * rng.uniform(0, 2 * np.pi, count) * (np.arange(count) % 2))
    return *additive(rng, count, 5), rng.normal(size=(count, 5, 3)) + 0j, t, np.full(count, whole)

  return worst(sample, _relation_residuals, count=16)


def _stochastic_gauge(eta: jax.Array) -> braid.Law:
  """The six-vertex law with its columns normalised to sum one."""

  def law(left: braid.Rays, right: braid.Rays, sign: jax.Array):
    total = sum(braid.six_vertex_weights(left.rapidity - right.rapidity, eta))
    crossed = braid.six_vertex(eta)(left, right, sign)
    return tuple(ray._replace(value=ray.value / total) for ray in crossed)

  return law


def _yang_baxter_residual(rays, eta, whole):
  return _relation_residual(rays, _chosen(whole, braid.six_vertex(eta), _stochastic_gauge(eta)))


def _yang_baxter(whole: bool) -> Check:
  return worst(lambda rng, count: (*_rays(rng, count), np.full(count, whole)), _yang_baxter_residual, count=16)


def _six_vertex_block(w: jax.Array, eta: jax.Array) -> jax.Array:
  b, c = braid.six_vertex_weights(w, eta)
  return jnp.array([[c, b], [b, c]])


def _inversion_residual(w, back, eta):
  product = _six_vertex_block(w, eta) @ _six_vertex_block(back, eta)
  return jnp.maximum(distance(product, jnp.eye(2)), distance(_six_vertex_block(0 * w, eta), jnp.eye(2)))


def _six_vertex_inversion(sign: int) -> Check:
  """N(w) N(sign·w) = 1 for sign = -1, and N(0) = 1."""

  def sample(rng, count):
    eta = rng.uniform(0.5, 2.0, count)
    w = eta * rng.uniform(-0.9, 0.9, count)
    return w, sign * w, eta

  return worst(sample, _inversion_residual)


def _defect_residual(states, whole):
  law = _chosen(whole, braid.restricted, braid.swap)
  after = jax.vmap(lambda word: braid.execute(word, states, law).acc)(jnp.array([[1, 2, 1], [2, 1, 2]]))
  y1, y2, y3 = states.payload
  return distance(after[0] - after[1], jnp.stack([y2, y1 - y3, -y2]))


def _restricted_defect(whole: bool) -> Check:
  return worst(lambda rng, count: (*exact_additive(rng, count), np.full(count, whole)), _defect_residual)


def _linking_residual(word, counted, states):
  final = braid.execute(word, states, braid.swap)
  by_strand = jax.tree.map(lambda s: s[braid.permutation(word, 6)], final)
  collected = states.acc + braid.linking_matrix(counted, 6) @ states.payload
  return distance(by_strand, braid.Strands(collected, states.payload))


def _linking_theorem(signed: bool) -> Check:
  def sample(rng, count):
    words = letters(rng, count, 40, 6)
    return words, words if signed else np.abs(words), *additive(rng, count, 6)

  return worst(sample, _linking_residual, count=500)


def _commutator_of_squares(law: braid.Law, sample: Sample) -> Check:
  """How far a law is from the identity on [σ_1², σ_2²]."""
  word = (1, 1, 2, 2, -1, -1, -2, -2)
  return worst(sample, lambda states: distance(braid.execute(jnp.asarray(word), states, law), states))


def _stochastic_residual(word, t):
  matrix = braid.burau_matrix(word, 5, t)
  return jnp.maximum(jnp.max(-matrix), distance(matrix.sum(axis=1), jnp.ones(5)))


def _row_stochastic(sign: int) -> Check:
  """Negative part and row-sum defect of Burau matrices of positive words whose first letter is raised to `sign`."""

  def sample(rng, count):
    words = np.abs(letters(rng, count, 30, 5))
    words[:, 0] *= sign
    return words, rng.uniform(0.5, 0.95, count)

  return worst(sample, _stochastic_residual)


def _determinant_residual(word, t, base):
  return jnp.abs(jnp.linalg.det(braid.burau_matrix(word, 5, t)) / base ** braid.writhe(word) - 1)


def _burau_determinant(sign: int) -> Check:
  """Relative error of det B(word) against (sign·t)^writhe, on words of odd length."""

  def sample(rng, count):
    t = rng.uniform(0.5, 1.5, count)
    return letters(rng, count, 13, 5), t, sign * t

  return worst(sample, _determinant_residual)


def _unitary_residual(word, s):
  form, diagonal = braid.squier_form(5, s), s ** jnp.arange(1, 5)
  matrix = diagonal[:, None] * braid.reduced_burau_matrix(word, 5, s * s) / diagonal
  return distance(matrix @ form @ matrix.conj().T, form)


def _burau_unitary(modulus: float) -> Check:
  """M J M* - J for the reduced Burau matrix at s = modulus·e^{iθ}."""
  return worst(
    lambda rng, count: (letters(rng, count, 12, 5), modulus * np.exp(1j * rng.uniform(-np.pi, np.pi, count))),
    _unitary_residual,
  )


def _payload_residual(word, states, rays, eta, t):
  payload = states.payload[:, 0]
  after = [braid.execute(word, states, law).payload[:, 0] for law in (braid.restricted, braid.swap)]
  after.append(braid.execute(word, payload, braid.burau(t)))
  rapidity = braid.execute(word, rays, braid.six_vertex(eta)).rapidity
  back = braid.execute(jnp.concatenate([word, braid.inverse(word)]), states, braid.restricted)
  moved = [distance(jnp.sort(x), jnp.sort(payload)) for x in after]
  return jnp.max(jnp.stack([*moved, distance(jnp.sort(rapidity), jnp.sort(rays.rapidity)), distance(back, states)]))


def _payload_conserved(t: float) -> Check:
  """Payloads after a word, as a multiset, under the additive laws and Burau at t; and restricted word·word⁻¹ = 1."""

  def sample(rng, count):
    return letters(rng, count, 30, 5), *exact_additive(rng, count, 5), *_rays(rng, count), np.full(count, t)

  return worst(sample, _payload_residual)


def _rewrite_residual(words, states, whole):
  law = _chosen(whole, braid.swap, braid.restricted)

  def seen(word):
    track = braid.permutation(word, 4), braid.writhe(word), braid.linking_matrix(word, 4)
    return braid.execute(word, states, law), braid.burau_matrix(word, 4, 0.7), track

  both = jax.vmap(seen)(words)
  return distance(*(jax.tree.map(lambda x, at=at: x[at], both) for at in (0, 1)))


def _rewrite_invariance(whole: bool) -> Check:
  def sample(rng, count):
    return np.stack(equal_words(rng, count), axis=1), *additive(rng, count, 4), np.full(count, whole)

  return worst(sample, _rewrite_residual)


def _prefix_residual(a, b, shuffled, payload):
  mask, (order, k) = additive_gate.additive_mask(a, b, 0.25), additive_gate.prefix_schedule(a, b, 0.25)
  mask = jnp.take_along_axis(mask, shuffled, axis=1)
  misplaced = jnp.max(mask[:, order] ^ (jnp.arange(b.shape[0]) < k[:, None]))
  masked = jnp.matmul(mask.astype(payload.dtype), payload, precision="highest")
  sums = jnp.concatenate([jnp.zeros_like(payload[:1]), jnp.cumsum(payload[order], axis=0)])
  executed = jax.vmap(additive_gate.execute_schedule, (None, 0, None))(order, k, payload)
  error = jnp.maximum(distance(sums[k], masked), distance(executed, masked))
  return jnp.maximum(misplaced.astype(payload.dtype), error / jnp.min(jnp.sum(jnp.abs(payload), axis=0)))


def _prefix(shuffle: bool) -> Check:
  """Mask against sorted prefix, and mask sum against prefix sum and executed word, in float32 with tied scores."""

  def sample(rng, count):
    keys = np.tile(np.arange(24), (count, 7, 1))
    return (
      rng.normal(size=(count, 7)).astype(np.float32),
      np.round(2 * rng.normal(size=(count, 24))).astype(np.float32) / 2,
      rng.permuted(keys, axis=-1) if shuffle else keys,
      rng.normal(size=(count, 24, 3)).astype(np.float32),
    )

  return worst(sample, _prefix_residual, double=False)


def _nested_residual(scores):
  return additive_gate.non_nested_fraction(scores > 0, jnp.tri(scores.shape[0], dtype=bool))


def _nestedness(rank: int) -> Check:
  """Fraction of query pairs with crossing selections: additive scores for rank 1, else bilinear ones."""

  def sample(rng, count):
    q, k = rng.normal(size=(2, count, 16, rank))
    return (q + k.swapaxes(1, 2) if rank == 1 else q @ k.swapaxes(1, 2),)

  return worst(sample, _nested_residual)


CLAIMS: tuple[Claim, ...] = (
  claim(
    "braid.braid_relation",
    "σiσi+1σi = σi+1σiσi+1, σiσj = σjσi for |i-j| >= 2 and σiσi⁻¹ = 1 under swap and Burau(t), t real or complex",
    _braid_relation(True),
    1e-12,
    _braid_relation(False),
    ("Artin 1947", "Burau 1935"),
  ),
  claim(
    "braid.yang_baxter",
    "the six-vertex law with travelling rapidities satisfies the braid relations; dividing by b + c breaks them",
    _yang_baxter(True),
    1e-12,
    _yang_baxter(False),
    ("Baxter 1982",),
  ),
  claim(
    "braid.six_vertex_inversion",
    "N(w)N(-w) = 1 and N(0) = 1 for N(w) = [[c, b], [b, c]], b = sinh w / sinh(w+η), c = sinh η / sinh(w+η)",
    _six_vertex_inversion(-1),
    1e-12,
    _six_vertex_inversion(1),
    ("Baxter 1982",),
  ),
  claim(
    "braid.restricted_defect",
    "under the restricted law σ1σ2σ1 - σ2σ1σ2 adds exactly (y2, y1 - y3, -y2): it is no braid representation",
    _restricted_defect(True),
    0.0,
    _restricted_defect(False),
  ),
  claim(
    "braid.linking_theorem",
    "under the swap law strand a ends with (x_a + Σ_b n_ab y_b, y_a), n_ab the signed number of crossings of a and b",
    _linking_theorem(signed=True),
    1e-10,
    _linking_theorem(signed=False),
  ),
  claim(
    "braid.swap_blind_to_commutator",
    "the swap law acts as the identity on [σ1², σ2²] (exact); Burau(1/2) is 1.5 away",
    _commutator_of_squares(braid.swap, exact_additive),
    0.0,
    _commutator_of_squares(braid.burau(0.5), lambda rng, count: (np.tile(np.eye(3), (count, 1, 1)),)),
  ),
  claim(
    "braid.burau_stochastic",
    "for 0 < t <= 1 the Burau matrix of a positive word has entries >= 0 and rows that sum to 1",
    _row_stochastic(1),
    1e-10,
    _row_stochastic(-1),
  ),
  claim(
    "braid.burau_determinant",
    "det Burau(word) = (-t)^writhe (relative error)",
    _burau_determinant(-1),
    1e-10,
    _burau_determinant(1),
  ),
  claim(
    "braid.burau_unitary",
    "for |t| = 1 the reduced Burau matrix preserves the Squier form, M J M* = J",
    _burau_unitary(1.0),
    1e-10,
    _burau_unitary(1.1),
    ("Squier 1984",),
  ),
  *knot_claims.CLAIMS,
  claim(
    "braid.rewrite_invariance",
    "group relations leave swap, Burau, permutation, writhe and crossing numbers unchanged, but not the restricted law",
    _rewrite_invariance(True),
    1e-10,
    _rewrite_invariance(False),
  ),
  claim(
    "braid.payload_conserved",
    "restricted, swap and Burau(1) permute the payloads, six-vertex the rapidities; restricted word·word⁻¹ = 1 (exact)",
    _payload_conserved(1.0),
    0.0,
    _payload_conserved(0.5),
  ),
  claim(
    "braid.sorted_prefix",
    "an additive hard gate selects a prefix of the keys sorted by b, and mask sum = prefix sum = executed σ1σ2...σk",
    _prefix(shuffle=False),
    1e-6,
    _prefix(shuffle=True),
  ),
  claim(
    "braid.nestedness",
    "the sets selected by an additive gate are nested over the queries; a bilinear score's are not",
    _nestedness(rank=1),
    0.0,
    _nestedness(rank=8),
  ),
)
