"""Claims about three-way scores alone: positions, symmetry, scale, and the task that pairs cannot do."""

import itertools

import jax
import numpy as np

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
from mgr_jax.claims import Check, claim

MODULUS = 31
MATCH_W1, MATCH_W2 = 16, 16


def rng_of(key: jax.Array) -> np.random.Generator:
  """Cases are drawn by numpy: nothing to compile for them."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def largest(x) -> float:
  return float(np.max(np.abs(np.asarray(x))))


def _shift(charges, score: str = "complex") -> Check:
  """Largest change of the score of random triples when all positions move by 91."""

  def measure(key, scale):
    rng = rng_of(key)
    D, cases = 12, 64 * scale
    q, k, k2 = rng.standard_normal((3, cases, D))
    positions = rng.integers(0, 200, (3, cases, 1))
    inverse = 10000.0 ** (-np.arange(0, D, 2) / D)

    def at(shift):
      angles = (positions + shift) * inverse
      turned = (
        rotate_by_charge(x, np.cos(a), np.sin(a), n, charges)
        for n, (x, a) in enumerate(zip((q, k, k2), angles, strict=True))
      )
      return FORMS[score](*turned)

    with jax.enable_x64(True):
      return float(np.max(np.abs(at(91) - at(0))))

  return measure


def _det3(score: str) -> Check:
  """Change of det3 under a common rotation of its 3-vectors, plus the sum of the form and its exchanged twin."""

  def measure(key, scale):
    rng = rng_of(key)
    D, cases = 12, 64 * scale
    q, k, k2 = rng.standard_normal((3, cases, D))
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    turn = lambda x: np.einsum("ij,cjl->cil", rotation, x.reshape(cases, 3, -1)).reshape(cases, D)
    form = FORMS[score]
    with jax.enable_x64(True):
      invariant = np.max(np.abs(form(turn(q), turn(k), turn(k2)) - form(q, k, k2)))
      alternating = np.max(np.abs(form(q, k, k2) + form(q, k2, k)))
    return float(invariant + alternating)

  return measure


def _variance(wrong_scale: bool) -> Check:
  """Largest relative error of Var(scale · T3) - 1 over the three forms, 200000 triples each."""

  def measure(key, scale):
    rng = rng_of(key)
    D, worst = 12, 0.0
    for form in FORMS.values():
      q, k, k2 = rng.standard_normal((3, 200_000 * scale, D), np.float32)
      factor = D**-0.5 if wrong_scale else form.scale(D)
      worst = max(worst, abs(float(np.var(factor * np.asarray(form(q, k, k2)))) - 1))
    return worst

  return measure


def planted_triples(rng: np.random.Generator, cases: int, tokens: int = MATCH_W1):
  """Integers [cases, tokens] mod M in which exactly one pair of two different earlier tokens completes the last one.

  Returns the integers and the pair, [cases, 2]. Pairs with i = j or with the query itself complete nothing.
  """
  found, pairs = [], []
  while len(found) < cases:
    x = rng.integers(0, MODULUS, tokens)
    i, j = sorted(rng.choice(tokens - 1, 2, replace=False))
    x[-1] = -(x[i] + x[j]) % MODULUS
    total = (x[:, None] + x[None, :] + x[-1]) % MODULUS
    if np.argwhere(total == 0).tolist() == [[i, j], [j, i]]:
      found.append(x)
      pairs.append((i, j))
  return np.stack(found), np.array(pairs)


def match3_head(x: np.ndarray, temperature: float, pairwise: bool = False) -> np.ndarray:
  """Weights [cases, i, t - j] of the last query of a hand-built head; `pairwise` matches x_t + x_i ≡ 0 alone."""
  q, k = match3_vectors(x, MODULUS)
  group = lambda a: a[:, None].astype(np.float32)
  zero = np.zeros_like(k)
  query = lambda a: temperature * group(a)[:, :, None, -1:]
  three = Pairs(query(q), group(k), group(k), group(k))
  # Re q·conj(k): the dot product of <q, k> with k conjugated is the indicator of x_t + x_i ≡ 0.
  conjugate = k * np.repeat([1, -1], k.shape[-1] // 2)
  two = Pairs(query(zero), group(zero), group(zero), group(k), q_pair=query(q), k_pair=group(conjugate))
  masks = pair_mask(1, x.shape[1], MATCH_W1, MATCH_W2)
  weight, _ = pair_weights(FORMS["complex"], two if pairwise else three, masks)
  return np.asarray(weight, np.float64)[:, 0, 0, 0]


def match3_temperature() -> float:
  """Puts 99 % of the mass on one pair against w1·w2 others at score 0."""
  return float(np.log(MATCH_W1 * MATCH_W2 / 0.01))


def _missed(pairwise: bool) -> Check:
  """Share of sequences in which the planted pair (in both orders) gets less than 99 % of the mass."""

  def measure(key, scale):
    x, pairs = planted_triples(rng_of(key), 200 * scale)
    weight = match3_head(x, match3_temperature(), pairwise)
    rows, last = np.arange(len(x)), x.shape[1] - 1
    i, j = pairs.T
    mass = weight[rows, i, last - j] + weight[rows, j, last - i]
    return float(np.mean(mass <= 0.99))

  return measure


def _information(pairwise: bool) -> Check:
  """Mean mutual information in nats of the two tokens of the hand-built heads."""

  def measure(key, scale):
    x, _ = planted_triples(rng_of(key), 20 * scale)
    return float(np.mean(np.asarray(mutual_information(match3_head(x, match3_temperature(), pairwise)))))

  return measure


def _additive_information(three_way: float) -> Check:
  """Largest mutual information of softmax over f_i + g_j + three_way·noise_ij, 20 x 20, float64."""

  def measure(key, scale):
    rng = rng_of(key)
    logits = rng.standard_normal((8 * scale, 20, 1)) + rng.standard_normal((8 * scale, 1, 20))
    logits += three_way * rng.standard_normal((8 * scale, 20, 20))
    with jax.enable_x64(True):
      return float(np.max(np.abs(mutual_information(jax.nn.softmax(logits, (-2, -1))))))

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
      score = np.asarray(FORMS["complex"](q, k, k2))
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
