"""Random ordinals below ω^ω^ω, random smaller ones, and choosers for programs: the cases of the claims."""

import random
from collections.abc import Iterator

import jax
import numpy as np

from mgr_jax.algebra.ordinal import OMEGA, ONE, ZERO, Ord

_SPECIAL = (ZERO, ONE, Ord.of(2), OMEGA, OMEGA + 1, OMEGA * 2, OMEGA**2, OMEGA**OMEGA, OMEGA**OMEGA + OMEGA)


def rng_of(key: jax.Array) -> random.Random:
  """A generator of Python numbers, which are faster to draw one by one than NumPy's."""
  return random.Random(np.asarray(jax.random.key_data(key)).tobytes())


def draw(rng: random.Random, height: int = 2, terms: int = 3, coefficient: int = 3) -> Ord:
  """A normal form of at most `terms` terms with coefficients up to `coefficient`; finite at height 0."""
  if height == 0:
    return Ord.of(rng.randint(0, coefficient))
  exponents = {draw(rng, rng.randrange(height), terms, coefficient) for _ in range(rng.randint(1, terms))}
  return _with_coefficients(rng, exponents, coefficient)


def _with_coefficients(rng, exponents: set[Ord], coefficient: int) -> Ord:
  return Ord(tuple((e, rng.randint(1, coefficient)) for e in sorted(exponents, reverse=True)))


def tuples(key: jax.Array, cases: int, size: int) -> Iterator[tuple[Ord, ...]]:
  """`cases` tuples of ordinals, a quarter of their members from a short list of 0, 1, 2, ω, ω + 1, ..."""
  rng = rng_of(key)
  for _ in range(cases):
    yield tuple(rng.choice(_SPECIAL) if rng.random() < 0.25 else draw(rng) for _ in range(size))


def draw_below(rng: random.Random, alpha: Ord, slowly: bool = False) -> Ord:
  """An ordinal < α > 0: one term of α lowered, what stands behind it drawn anew.

  `slowly` takes the last term, lowers it by one, and the exponents behind it slowly too.
  """
  i = len(alpha.terms) - 1 if slowly else rng.randrange(len(alpha.terms))
  exponent, coefficient = alpha.terms[i]
  lower = coefficient - 1 if slowly else rng.randrange(coefficient)
  count = 0 if exponent.is_zero else 1 if slowly else rng.randint(0, 2)
  below = {draw_below(rng, exponent, slowly) for _ in range(count)}
  return Ord((*alpha.terms[:i], *(((exponent, lower),) if lower else ()), *_with_coefficients(rng, below, 3).terms))


class RandomChooser:
  """Any smaller rank, any alternative."""

  def __init__(self, rng: random.Random):
    self.rng = rng

  def below(self, rank: Ord) -> Ord:
    return draw_below(self.rng, rank)

  def which(self, n: int) -> int:
    return self.rng.randrange(n)
