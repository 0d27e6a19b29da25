"""Braid words, the crossing laws by which they act on strand states, and the moves between equal words.

The braid group B_n has generators σ_1 .. σ_{n-1} and the relations σ_i σ_{i+1} σ_i = σ_{i+1} σ_i σ_{i+1} and
σ_i σ_j = σ_j σ_i for |i-j| >= 2 (Artin, 1947). A word is an int array: the letter +i crosses the strands at positions i
and i+1 (counted from 1), -i undoes that, 0 does nothing, so words of different lengths batch by padding. Letters act in
reading order. A crossing law is a function `(left, right, sign) -> (left', right')` on the states at the two positions.

Everything here is a pure function that works under `jit` and `vmap` (word lengths and strand counts are static).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

State = Any
Law = Callable[[State, State, jax.Array], tuple[State, State]]


class Strands(NamedTuple):
  """State of the additive laws, per strand: an accumulator x and a payload y, each [n, ...]."""

  acc: jax.Array
  payload: jax.Array


class Rays(NamedTuple):
  """State of the six-vertex law: values [n, ...] at positions, and the rapidity [n] of the strand passing there."""

  value: jax.Array
  rapidity: jax.Array


def restricted(left: Strands, right: Strands, sign: jax.Array) -> tuple[Strands, Strands]:
  """(a, b) -> (a + sign·Nb, b + sign·Na) with N(x, y) = (y, 0): payloads are exchanged, strands stay in place.

  All generators commute, so this is *not* a representation of the braid group: σ1σ2σ1 - σ2σ1σ2 adds
  (y2, y1 - y3, -y2) to the three accumulators.
  """
  return (
    left._replace(acc=left.acc + sign * right.payload),
    right._replace(acc=right.acc + sign * left.payload),
  )


def swap(left: Strands, right: Strands, sign: jax.Array) -> tuple[Strands, Strands]:
  """(a, b) -> (b + sign·Na, a + sign·Nb): the strands cross and each collects the other's payload.

  Satisfies the braid relation exactly. Strand a ends with x_a + Σ_b n_ab y_b, where n_ab is `linking_matrix`, so the
  law sees only the permutation and the pairwise crossing numbers.
  """
  return restricted(right, left, sign)


def six_vertex_weights(difference: jax.Array, eta: jax.Array) -> tuple[jax.Array, jax.Array]:
  """b = sinh w / sinh(w+η) and c = sinh η / sinh(w+η), finite for every w != -η without overflow of sinh."""
  # Both quotients are written with expm1 of the sign of w+η that decays.
  side = jnp.where(difference + eta > 0, 1.0, -1.0)
  denominator = jnp.expm1(-2 * side * (difference + eta))
  b = jnp.exp(-side * eta) * jnp.expm1(-2 * side * difference) / denominator
  c = side * jnp.exp(eta - side * (difference + eta)) * jnp.expm1(-2 * eta) / denominator
  return b, c


def six_vertex(eta: jax.Array) -> Law:
  """Crossing of two `Rays` with w = u_left - u_right: values are mixed by [[c, b], [b, c]], rapidities cross.

  One-excitation block of the six-vertex R-matrix (Baxter, 1982, ch. 8-9). N(w)N(-w) = 1, so every generator is its own
  inverse and the sign of a letter has no effect. Requires η > 0; the weights have a pole at w = -η.
  """

  def law(left: Rays, right: Rays, sign: jax.Array) -> tuple[Rays, Rays]:
    del sign
    b, c = six_vertex_weights(left.rapidity - right.rapidity, eta)
    return (
      Rays(c * left.value + b * right.value, right.rapidity),
      Rays(b * left.value + c * right.value, left.rapidity),
    )

  return law


def burau(t: jax.Array) -> Law:
  """σ_i acts on coordinates (i, i+1) by [[1-t, t], [1, 0]], t != 0; the state is any float or complex array [n, ...].

  A representation for every t (Burau, 1935); at t = 1 it permutes. For 0 < t <= 1 positive words are row-stochastic.
  Faithful for n <= 3, not for n >= 5 (Bigelow, 1999, math/9904100), open for n = 4.
  """

  def law(left: jax.Array, right: jax.Array, sign: jax.Array) -> tuple[jax.Array, jax.Array]:
    positive = sign >= 0
    return (
      jnp.where(positive, (1 - t) * left + t * right, right),
      jnp.where(positive, left, (left + (t - 1) * right) / t),
    )

  return law


def check_word(word: Any, strands: int) -> np.ndarray:
  """Returns `word` as an int32 array, or raises `ValueError` naming the first letter outside [-(n-1), n-1].

  >>> check_word([1, 3], strands=3)
  Traceback (most recent call last):
  ValueError: letter 3 is outside [-2, 2] for 3 strands
  """
  word = np.asarray(word, np.int32)
  bad = word[np.abs(word) >= strands]
  if bad.size:
    raise ValueError(f"letter {bad[0]} is outside [{1 - strands}, {strands - 1}] for {strands} strands")
  return word


def execute(word: jax.Array, states: State, law: Law) -> State:
  """Lets `word` [L] act on `states`, a PyTree whose leaves have the strand axis first, letter by letter.

  Args:
    word: int letters, |letter| < n (a letter out of range is reported by `check_word`, and under `jit` undefined).
    states: one state per position, in the structure that `law` expects.
    law: `restricted`, `swap`, `six_vertex(eta)`, `burau(t)`, or any function of the same signature.

  Returns the states by position. Cost O(L · size of two strands), sequential in L.

  >>> strands = Strands(np.zeros(3), np.array([1.0, 10.0, 100.0]))
  >>> execute([1, 2], strands, swap).acc.tolist()  # The first strand crosses both others and collects them.
  [1.0, 1.0, 110.0]
  """
  if not isinstance(word, jax.core.Tracer):
    word = jnp.asarray(check_word(word, jax.tree.leaves(states)[0].shape[0]))

  def cross(states: State, letter: jax.Array) -> tuple[State, None]:
    i = jnp.maximum(jnp.abs(letter) - 1, 0)
    left, right = (jax.tree.map(lambda s, at=at: s[at], states) for at in (i, i + 1))
    left, right = law(left, right, jnp.sign(letter))

    def put(old: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
      return jnp.where(letter == 0, old, old.at[i].set(a).at[i + 1].set(b))

    return jax.tree.map(put, states, left, right), None

  return lax.scan(cross, states, word)[0]


def _track(word: jax.Array, strands: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The strand at each final position [n], and the two strands that meet at each letter, [L] and [L]."""

  def cross(order: jax.Array, letter: jax.Array):
    i = jnp.maximum(jnp.abs(letter) - 1, 0)
    a, b = order[i], order[i + 1]
    return jnp.where(letter == 0, order, order.at[i].set(b).at[i + 1].set(a)), (a, b)

  order, (a, b) = lax.scan(cross, jnp.arange(strands), word)
  return order, a, b


def permutation(word: jax.Array, strands: int) -> jax.Array:
  """π[n]: the final position (from 0) of the strand that starts at each position. π: B_n -> S_n is a homomorphism.

  >>> permutation([1, 2], 3).tolist()
  [2, 0, 1]
  """
  return jnp.argsort(_track(jnp.asarray(word), strands)[0])


def writhe(word: jax.Array) -> jax.Array:
  """Sum of the exponents: positive minus negative crossings, a homomorphism B_n -> Z.

  >>> int(writhe([1, -2, 1]))
  1
  """
  return jnp.sum(jnp.sign(jnp.asarray(word)))


def linking_matrix(word: jax.Array, strands: int) -> jax.Array:
  """n_ab [n, n]: signed number of crossings between the strands that start at a and b; symmetric, zero diagonal.

  For a pure braid n_ab / 2 is the linking number of the closed strands a and b.

  >>> linking_matrix(np.array([1, 1]), 2).tolist()  # The Hopf link.
  [[0, 2], [2, 0]]
  """
  word = jnp.asarray(word)
  _, a, b = _track(word, strands)
  signs = jnp.sign(word)
  return jnp.zeros((strands, strands), signs.dtype).at[a, b].add(signs).at[b, a].add(signs)


def burau_matrix(word: jax.Array, strands: int, t: jax.Array) -> jax.Array:
  """Unreduced Burau matrix B(w_L) ··· B(w_1) [n, n]. det = (-t)^writhe; positive words, 0 < t <= 1: row-stochastic.

  >>> burau_matrix([1], 2, 0.25).tolist()
  [[0.75, 0.25], [1.0, 0.0]]
  """
  dtype = jnp.result_type(t, float)
  return execute(word, jnp.eye(strands, dtype=dtype), burau(jnp.asarray(t, dtype)))


def reduced_burau_matrix(word: jax.Array, strands: int, t: jax.Array) -> jax.Array:
  """Burau matrix [n-1, n-1] on the differences z_i - z_{i+1}: the unreduced one fixes the constant vector."""
  matrix = burau_matrix(word, strands, t)
  difference = jnp.eye(strands - 1, strands, dtype=matrix.dtype) - jnp.eye(strands - 1, strands, 1, dtype=matrix.dtype)
  section = jnp.triu(jnp.ones((strands, strands - 1), matrix.dtype))
  return jnp.matmul(difference @ matrix, section, precision="highest")


def squier_form(strands: int, s: jax.Array) -> jax.Array:
  """J [n-1, n-1], tridiagonal with s + 1/s and -1. With S = diag(s^i), M = S·reduced(t=s²)·S⁻¹ and |s| = 1: M J M* = J.

  So the reduced Burau matrix is unitary for J wherever J is positive definite (Squier, 1984).
  """
  identity = jnp.eye(strands - 1, dtype=jnp.result_type(s, complex))
  beside = jnp.eye(strands - 1, k=1) + jnp.eye(strands - 1, k=-1)
  return (s + 1 / s) * identity - beside


def inverse(word: jax.Array) -> jax.Array:
  """The word of the inverse braid: letters negated, order reversed.

  >>> inverse([1, 2, -3]).tolist()
  [3, -2, -1]
  """
  return -jnp.asarray(word)[::-1]


def conjugate(word: jax.Array, by: jax.Array) -> jax.Array:
  """by · word · by⁻¹. The closure is the same link (Markov's first move)."""
  return jnp.concatenate([jnp.asarray(by), jnp.asarray(word), inverse(by)])


def stabilise(word: jax.Array, strands: int, sign: int = 1) -> jax.Array:
  """word · σ_n^{±1}, a word on n+1 strands. The closure is the same link (Markov's second move)."""
  return jnp.append(jnp.asarray(word), sign * strands)


def random_word(key: jax.Array, length: int, strands: int, positive: bool = False) -> jax.Array:
  """`length` independent uniform letters from σ_1 .. σ_{n-1}, and their inverses unless `positive`."""
  index_key, sign_key = jax.random.split(key)
  letters = jax.random.randint(index_key, (length,), 1, strands, jnp.int32)
  return letters if positive else letters * jax.random.rademacher(sign_key, (length,), jnp.int32)


def rewrite(key: jax.Array, word: jax.Array, strands: int, steps: int) -> jax.Array:
  """Applies `steps` random group relations inside `word` [L]: the braid stays the same, the length L too.

  Each step draws one kind of move that applies somewhere, then a site: exchange of two far (or idle) letters,
  cancellation of g g⁻¹ into two idle letters, the reverse at two idle letters, or the third Reidemeister move
  σ_i^a σ_j^b σ_i^c -> σ_j^c σ_i^b σ_j^a for |i-j| = 1 unless a = c != b. Give a word room by padding it with zeros.
  """
  word = jnp.asarray(word)
  position = jnp.arange(word.shape[0])
  kind_key, site_key, letter_key = jax.random.split(key, 3)
  draws = (
    jax.random.uniform(kind_key, (steps, 4)),
    jax.random.uniform(site_key, (steps, word.shape[0])),
    random_word(letter_key, steps, strands).astype(word.dtype),
  )

  def step(word: jax.Array, draw: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    by_kind, by_site, fresh = draw
    a, b, c = word, jnp.roll(word, -1), jnp.roll(word, -2)
    i, j, k = jnp.abs(a), jnp.abs(b), jnp.abs(c)
    pair, triple = position < word.shape[0] - 1, position < word.shape[0] - 2
    aligned = (jnp.sign(a) != jnp.sign(c)) | (jnp.sign(a) == jnp.sign(b))
    enabled = jnp.stack(
      [
        pair & (a != b) & ((a == 0) | (b == 0) | (jnp.abs(i - j) >= 2)),
        pair & (a == -b) & (a != 0),
        pair & (a == 0) & (b == 0),
        triple & (i == k) & (i > 0) & (j > 0) & (jnp.abs(i - j) == 1) & aligned,
      ]
    )
    kind = jnp.argmax(jnp.where(enabled.any(axis=1), by_kind, -1))
    site = jnp.argmax(jnp.where(enabled[kind], by_site, -1))
    a, b, c = a[site], b[site], c[site]
    third = (jnp.sign(c) * jnp.abs(b), jnp.sign(b) * jnp.abs(a), jnp.sign(a) * jnp.abs(b))
    options = jnp.stack([jnp.stack(m) for m in ((b, a, c), (0 * a, 0 * b, c), (fresh, -fresh, c), third)])
    # The window of a pair move at the last site hangs over the end; its third letter is dropped there.
    moved = word.at[site + jnp.arange(3)].set(options[kind], mode="drop")
    return jnp.where(enabled.any(), moved, word), None

  return lax.scan(step, word, draws)[0]
