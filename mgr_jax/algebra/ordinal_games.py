"""Two games that end although their integers explode, because an ordinal descends: Goodstein's and the hydra.

That every Goodstein sequence and every battle ends cannot be proved in Peano arithmetic (Goodstein, 1944; Kirby &
Paris, 1982, Accessible independence results for Peano arithmetic).
"""

from collections.abc import Iterator
from typing import NamedTuple

from mgr_jax.algebra.ordinal import ZERO, Ord, natural_sum, omega

Hydra = tuple["Hydra", ...]  # a node is the tuple of its children; () is a head


def shadow(n: int, base: int) -> Ord:
  """n written in hereditary base `base`, with ω in place of the base: 4 = 2² is ω^ω in base 2.

  Raises:
    ValueError: n < 0 or base < 2.

  >>> shadow(26, 3), 3**3 - 1
  (Ord.parse('w^2*2 + w*2 + 2'), 26)
  """
  if n < 0 or base < 2:
    raise ValueError(f"n={n}, base={base}: n must be at least 0 and base at least 2")
  terms, exponent = [], 0
  while n:
    n, digit = divmod(n, base)
    if digit:
      terms.append((shadow(exponent, base), digit))
    exponent += 1
  return Ord(tuple(reversed(terms)))


def substitute(alpha: Ord, base: int) -> int:
  """The integer with `base` in place of ω; inverse of `shadow` when all coefficients are below the base."""
  return sum(c * base ** substitute(exponent, base) for exponent, c in alpha.terms)


class GoodsteinStep(NamedTuple):
  """A member of a Goodstein sequence with the base it is written in and its shadow."""

  base: int
  value: int
  shadow: Ord


def goodstein(n: int) -> Iterator[GoodsteinStep]:
  """Write n in hereditary base b = 2, 3, ...; replace b by b + 1; subtract 1; until 0. Shadows strictly descend.

  The number of steps is H_α(3) - 3 for the first shadow α: 5 from 3, 3·2^402653211 - 3 from 4.

  >>> [(step.value, str(step.shadow)) for step in goodstein(3)]
  [(3, 'w + 1'), (3, 'w'), (3, '3'), (2, '2'), (1, '1'), (0, '0')]
  """
  base, at = 2, shadow(n, 2)
  while True:
    yield GoodsteinStep(base, n, at)
    if n == 0:
      return
    base += 1
    n = substitute(at, base) - 1
    at = shadow(n, base)


def hydra_rank(hydra: Hydra) -> Ord:
  """Σ⊕ ω^{rank(child)}; a head has rank 0. Each cut lowers it, however many copies grow.

  >>> hydra_rank((((), ()),))
  Ord.parse('w^2')
  """
  rank = ZERO
  for child in hydra:
    rank = natural_sum(rank, omega(hydra_rank(child)))
  return rank


def heads(hydra: Hydra) -> list[tuple[int, ...]]:
  """Paths of child numbers from the root to every head; none when the hydra is dead."""
  return [(i, *path) for i, child in enumerate(hydra) for path in (heads(child) if child else [()])]


def cut(hydra: Hydra, path: tuple[int, ...], copies: int) -> Hydra:
  """Cuts off the head at `path`; then its grandparent, if any, grows `copies` more of the branch the head was on.

  Raises:
    ValueError: no head at `path`.
  """
  if tuple(path) not in heads(hydra):
    raise ValueError(f"path={path} leads to no head of {hydra}")
  at, *rest = path
  if not rest:
    return hydra[:at] + hydra[at + 1 :]
  grown = (cut(hydra[at], tuple(rest), copies),) * (copies + 1 if len(rest) == 1 else 1)
  return hydra[:at] + grown + hydra[at + 1 :]
