"""Claims about three-way scores alone: positions, symmetry, scale, and the task that pairs cannot do."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from mgr_jax.algebra.trilinear import (
  CHARGES,
  FORMS,
  Pairs,
  match3_vectors,
  mutual_information,
  pair_mask,
  pair_weights,
  rotate_by_charge,
)
from mgr_jax.claims import Check, claim, worst_of

MODULUS = 31
MATCH_W1, MATCH_W2 = 16, 16
# Rows at a time in every use of the hand-built head, so that all share one compiled program.
ROWS = 100


def rng_of(key: jax.Array) -> np.random.Generator:
  """Cases are drawn by numpy: nothing to compile for them."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def largest(x) -> float:
  return float(np.max(np.abs(np.asarray(x))))


@functools.partial(jax.jit, static_argnums=0)
def _score(form, q, k, k2):
  return FORMS[form](q, k, k2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _turned_score(score, charges, vectors, angles):
  turned = (
    rotate_by_charge(x, jnp.cos(a), jnp.sin(a), n, charges)
    for n, (x, a) in enumerate(zip(vectors, angles, strict=True))
  )
  return FORMS[score](*turned)


def score_drift(rng: np.random.Generator, charges, score: str, shifts, cases: int = 64) -> np.ndarray:
  """Largest change of the score of random triples when all positions move by each of `shifts`; double precision."""
  D = 12
  vectors = tuple(rng.standard_normal((3, cases, D)))
  positions = rng.integers(0, 200, (3, cases, 1))
  inverse = 10000.0 ** (-np.arange(0, D, 2) / D)
  with jax.enable_x64(True):
    at = lambda shift: np.asarray(_turned_score(score, charges, vectors, tuple((positions + shift) * inverse)))
    start = at(0)
    return np.array([np.max(np.abs(at(shift) - start)) for shift in shifts])


def _shift(charges, score: str = "complex") -> Check:
  """Largest change of the score of random triples when all positions move by 91."""

  return lambda key, scale: float(score_drift(rng_of(key), charges, score, (91,), 64 * scale)[0])


def _det3(score: str) -> Check:
  """Change of det3 under a common rotation of its 3-vectors, plus the sum of the form and its exchanged twin."""

  def measure(key, scale):
    rng = rng_of(key)
    D, cases = 12, 64 * scale
    q, k, k2 = rng.standard_normal((3, cases, D))
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    turn = lambda x: np.einsum("ij,cjl->cil", rotation, x.reshape(cases, 3, -1)).reshape(cases, D)
    form = functools.partial(_score, score)
    with jax.enable_x64(True):
      invariant = np.max(np.abs(form(turn(q), turn(k), turn(k2)) - form(q, k, k2)))
      alternating = np.max(np.abs(form(q, k, k2) + form(q, k2, k)))
    return float(invariant + alternating)

  return measure


@jax.jit
def _all_scores(q, k, k2):
  return [form(q, k, k2) for form in FORMS.values()]


def _variance(wrong_scale: bool) -> Check:
  """Largest relative error of Var(scale · T3) - 1 over the three forms, on the same 200000 triples."""

  def measure(key, scale):
    D = 12
    found = _all_scores(*rng_of(key).standard_normal((3, 200_000 * scale, D), np.float32))
    factors = [D**-0.5 if wrong_scale else form.scale(D) for form in FORMS.values()]
    return worst_of(abs(float(np.var(factor * np.float64(x))) - 1) for factor, x in zip(factors, found, strict=True))

  return measure


def planted_triples(rng: np.random.Generator, cases: int, tokens: int = MATCH_W1):
  """Integers [cases, tokens] mod M in which exactly one pair of two different earlier tokens completes the last one.

  Returns the integers and the pair, [cases, 2]. Pairs with i = j or with the query itself complete nothing.
  """
  found, pairs = [], []
  while sum(map(len, found)) < cases:
    x = rng.integers(0, MODULUS, (cases, tokens))
    pair = np.sort(rng.permuted(np.tile(np.arange(tokens - 1), (cases, 1)), axis=1)[:, :2], axis=1)
    x[:, -1] = -np.take_along_axis(x, pair, 1).sum(1) % MODULUS
    total = (x[:, :, None] + x[:, None, :] + x[:, -1, None, None]) % MODULUS
    unique = np.sum(total == 0, axis=(1, 2)) == 2
    found.append(x[unique])
    pairs.append(pair[unique])
  return np.concatenate(found)[:cases], np.concatenate(pairs)[:cases]


@functools.partial(jax.jit, static_argnums=0)
def _last_weights(length: int, pairs: Pairs):
  return pair_weights(FORMS["complex"], pairs, pair_mask(1, length, MATCH_W1, MATCH_W2))[0]


def match3_head(x: np.ndarray, temperature: float, pairwise: bool = False) -> np.ndarray:
  """Weights [cases, i, t - j] of the last query of a hand-built head; `pairwise` matches x_t + x_i ≡ 0 alone."""
  q, k = match3_vectors(x, MODULUS)
  group = lambda a: a[:, None].astype(np.float32)
  query = lambda a: np.float32(temperature) * group(a)[:, :, None, -1:]
  # Re q·conj(k): the dot product of <q, k> with k conjugated is the indicator of x_t + x_i ≡ 0.
  conjugate = k * np.repeat([1, -1], k.shape[-1] // 2)
  three, two = (0, 1) if pairwise else (1, 0)
  keys = group(three * k)
  pairs = Pairs(query(three * q), keys, keys, group(k), q_pair=query(two * q), k_pair=group(two * conjugate))
  return np.asarray(_last_weights(x.shape[1], pairs), np.float64)[:, 0, 0, 0]


def match3_temperature() -> float:
  """Puts 99 % of the mass on one pair against w1·w2 others at score 0."""
  return float(np.log(MATCH_W1 * MATCH_W2 / 0.01))


def planted_mass(weight: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """What weights [cases, i, t - j] give to the pairs (i, j), in both orders."""
  rows, last = np.arange(len(weight)), weight.shape[1] - 1
  i, j = pairs.T
  return weight[rows, i, last - j] + weight[rows, j, last - i]


_mutual_information = jax.jit(mutual_information)


def information_of(weight: np.ndarray) -> float:
  """Mean mutual information in nats of weights [cases, i, j]."""
  return float(np.mean(_mutual_information(weight)))


def _missed(pairwise: bool) -> Check:
  """Share of sequences in which the planted pair (in both orders) gets less than 99 % of the mass."""

  def measure(key, scale):
    rng, masses = rng_of(key), []
    for _ in range(2 * scale):
      x, pairs = planted_triples(rng, ROWS)
      masses.append(planted_mass(match3_head(x, match3_temperature(), pairwise), pairs))
    return float(np.mean(np.concatenate(masses) <= 0.99))

  return measure


def _information(pairwise: bool) -> Check:
  """Mean mutual information in nats of the two tokens of the hand-built heads."""

  def measure(key, scale):
    rng = rng_of(key)
    heads = [match3_head(planted_triples(rng, ROWS)[0], match3_temperature(), pairwise) for _ in range(scale)]
    return float(np.mean([information_of(weight) for weight in heads]))

  return measure


def _additive_information(three_way: float) -> Check:
  """Largest mutual information of softmax over f_i + g_j + three_way·noise_ij, 20 x 20, float64."""

  def measure(key, scale):
    rng = rng_of(key)
    logits = rng.standard_normal((8 * scale, 20, 1)) + rng.standard_normal((8 * scale, 1, 20))
    logits += three_way * rng.standard_normal((8 * scale, 20, 20))
    with jax.enable_x64(True):
      return float(np.max(np.abs(_mutual_information(scipy.special.softmax(logits, (-2, -1))))))

  return measure


def _indicator(modulus_off: int) -> Check:
  """Largest error of the form on Match3 vectors against the indicator of x + y + z ≡ 0 (mod M), all triples below 9."""

  def measure(key, scale):
    del key, scale
    triples = np.array(list(itertools.product(range(9), repeat=3)))
    q, _ = match3_vectors(triples[:, 0], 9)
    _, k = match3_vectors(triples[:, 1], 9)
    _, k2 = match3_vectors(triples[:, 2], 9)
    with jax.enable_x64(True):
      score = np.asarray(_score("complex", q, k, k2))
    return float(np.max(np.abs(score - (triples.sum(1) % (9 + modulus_off) == 0))))

  return measure


CLAIMS = (
  claim(
    "simplicial.charge_balance",
    "Re Σ q k k' with rotation charges that sum to zero depends on position differences alone",
    _shift(CHARGES),
    1e-10,
    _shift(((-1, 1, 1),)),
    refs=("Roy et al., 2025, arXiv 2507.02754",),
  ),
  claim(
    "simplicial.hadamard_has_no_rotation",
    "the Hadamard form Σ q k k' without rotation is trivially shift-invariant; with charges it is not",
    _shift(((0, 0, 0),), "hadamard"),
    1e-10,
    _shift(CHARGES, "hadamard"),
  ),
  claim(
    "simplicial.det3_symmetry",
    "Σ det[q, k, k'] is invariant under rotations and changes sign when k and k' are exchanged",
    _det3("det3"),
    1e-10,
    _det3("hadamard"),
  ),
  claim(
    "simplicial.unit_variance",
    "scaled scores of independent unit-variance vectors have variance 1: Var T3 = 2D, D, 2D",
    _variance(wrong_scale=False),
    0.02,
    _variance(wrong_scale=True),
  ),
  claim(
    "simplicial.match3_indicator",
    "Σ_f e^{2πi f (x+y+z)/M} / M is the indicator of x + y + z ≡ 0 (mod M), as a form of D = M + 1",
    _indicator(0),
    1e-12,
    _indicator(1),
  ),
  claim(
    "simplicial.match3_head",
    "one hand-built head puts more than 99 % of its mass on the unique pair with x_t + x_i + x_j ≡ 0 (mod 31)",
    _missed(pairwise=False),
    0.0,
    _missed(pairwise=True),
    refs=("Sanford et al., 2023, arXiv 2306.02896",),
  ),
  claim(
    "simplicial.pairs_have_no_information",
    "softmax over f_i + g_j has mutual information 0 between i and j",
    _additive_information(0.0),
    1e-10,
    _additive_information(1.0),
  ),
  claim(
    "simplicial.match3_needs_three",
    "the Match3 head has mutual information above 0.05 nats, a head of pairs has none (measured: 0.05 - MI)",
    lambda key, scale: 0.05 - _information(pairwise=False)(key, scale),
    0.0,
    lambda key, scale: 0.05 - _information(pairwise=True)(key, scale),
  ),
)
