"""Generalised power series over an ordered group of monomials: leading term first, error terms carried along.

A series is Σ c_i m_i with monomials in strictly decreasing order and rational coefficients, plus O(tail). A comparison
that the tail hides raises `Undecidable` instead of guessing. Monomials: `transseries_omega` (Conway's normal form) and
`transseries_growth` (growth at infinity, closed under log, exp and derivative). (Hahn, 1907; van den Dries,
Aschenbrenner, van der Hoeven, 2017, Asymptotic Differential Algebra and Model Theory of Transseries.)
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Protocol

MAX_TERMS = 24


class Undecidable(ValueError):
  """The answer depends on terms that were cut off."""


class DomainError(ValueError):
  """The result is no series with rational coefficients over these monomials."""


class Monomial(Protocol):
  """An element of an ordered abelian group, written multiplicatively; hashable."""

  def __mul__(self, other): ...

  def inverse(self): ...

  def compare(self, other) -> int:
    """-1, 0 or 1 as self is smaller than, equal to or larger than other."""


@dataclasses.dataclass(frozen=True)
class Series:
  """Σ coefficient·monomial + O(tail); `tail` is None for an exact series.

  Args:
    one: the neutral monomial, which also says which group this is a series over.
    terms: (monomial, coefficient ≠ 0) in strictly decreasing order, all above the tail; `series` orders any list.
  """

  one: Monomial
  terms: tuple[tuple[Monomial, Fraction], ...]
  tail: Monomial | None = None

  def __add__(self, other) -> "Series":
    other = self._like(other)
    return series(self.one, (*self.terms, *other.terms), _largest((self.tail, other.tail)))

  def __neg__(self) -> "Series":
    return dataclasses.replace(self, terms=tuple((m, -c) for m, c in self.terms))

  def __sub__(self, other) -> "Series":
    return self + -self._like(other)

  def __mul__(self, other) -> "Series":
    other = self._like(other)
    products = [(m * n, c * d) for m, c in self.terms for n, d in other.terms]
    return series(self.one, products, _largest(_product_tails(self, other)))

  def __truediv__(self, other) -> "Series":
    return self * inverse(self._like(other))

  def __rtruediv__(self, other) -> "Series":
    return self._like(other) / self

  __radd__ = __add__
  __rmul__ = __mul__

  def __rsub__(self, other) -> "Series":
    return self._like(other) - self

  def __lt__(self, other) -> bool:
    return compare(self, self._like(other)) < 0

  def __gt__(self, other) -> bool:
    return compare(self, self._like(other)) > 0

  def _like(self, other) -> "Series":
    return other if isinstance(other, Series) else constant(self.one, other)

  def __str__(self) -> str:
    parts = [_term_text(m, c, m.compare(self.one) == 0) for m, c in self.terms]
    if self.tail is not None:
      parts.append(f"O({self.tail})")
    return " + ".join(parts).replace("+ -", "- ") or "0"


def _term_text(m: Monomial, c: Fraction, is_one: bool) -> str:
  if is_one:
    return str(c)
  return {1: str(m), -1: f"-{m}"}.get(c, f"{c}·{m}")


_DESCENDING = functools.cmp_to_key(lambda m, n: n.compare(m))


def series(one: Monomial, terms: Iterable[tuple[Monomial, Fraction]], tail=None, max_terms: int = MAX_TERMS) -> Series:
  """Collects, sorts and cuts: at most `max_terms` terms; the first one that is dropped becomes the tail."""
  total: dict[Monomial, Fraction] = {}
  for m, c in terms:
    total[m] = total.get(m, Fraction(0)) + c
  kept = sorted((m for m, c in total.items() if c and (tail is None or m.compare(tail) > 0)), key=_DESCENDING)
  if len(kept) > max_terms:
    tail = kept[max_terms]
  return Series(one, tuple((m, total[m]) for m in kept[:max_terms]), tail)


def truncated(f: Series, n: int) -> Series:
  """The first `n` terms of f, the next one as the tail."""
  return series(f.one, f.terms, f.tail, n)


def constant(one: Monomial, value: int | Fraction) -> Series:
  """The number `value`, exact."""
  return series(one, [(one, Fraction(value))])


def monomial(m: Monomial, one: Monomial) -> Series:
  """The series 1·m."""
  return Series(one, ((m, Fraction(1)),))


def _largest(monomials: Iterable[Monomial | None]) -> Monomial | None:
  return max((m for m in monomials if m is not None), key=functools.cmp_to_key(lambda m, n: m.compare(n)), default=None)


def _product_tails(f: Series, g: Series) -> Sequence[Monomial]:
  """lead(f)·tail(g), tail(f)·lead(g) and tail(f)·tail(g), as far as there are such."""
  tails = []
  for a, b in ((f, g), (g, f)):
    if b.tail is not None:
      tails += [m * b.tail for m, _ in a.terms[:1]]
  if f.tail is not None and g.tail is not None:
    tails.append(f.tail * g.tail)
  return tails


def lead(f: Series) -> tuple[Monomial, Fraction]:
  """The leading monomial and its coefficient.

  Raises:
    Undecidable: all terms are hidden by the tail.
    ZeroDivisionError: f is exactly 0.
  """
  if f.terms:
    return f.terms[0]
  if f.tail is None:
    raise ZeroDivisionError("0 has no leading term")
  raise Undecidable(f"the leading term is hidden by O({f.tail})")


def sign(f: Series) -> int:
  """The sign of the leading coefficient; 0 for the exact 0. Raises `Undecidable` when only a tail is left."""
  if not f.terms and f.tail is None:
    return 0
  return 1 if lead(f)[1] > 0 else -1


def compare(f: Series, g: Series) -> int:
  """The sign of f - g. Raises `Undecidable` when they agree up to a tail."""
  return sign(f - g)


def dominates(f: Series, g: Series) -> bool:
  """f ≻ g: g/f is infinitesimal."""
  if not g.terms and g.tail is None:
    return sign(f) != 0
  return lead(f)[0].compare(_largest([*(m for m, _ in g.terms[:1]), g.tail])) > 0


def asymptotic(f: Series, g: Series) -> bool:
  """f ≍ g: the same leading monomial."""
  return lead(f)[0].compare(lead(g)[0]) == 0


def equivalent(f: Series, g: Series) -> bool:
  """f ∼ g: the same leading term, f/g = 1 + infinitesimal."""
  return lead(f) == lead(g)


def split(f: Series) -> tuple[Series, Fraction, Series]:
  """f = large + constant + small, with monomials above, equal to and below 1.

  Raises:
    Undecidable: the tail reaches 1, so the constant is not known.
  """
  if f.tail is not None and f.tail.compare(f.one) >= 0:
    raise Undecidable(f"the constant term is hidden by O({f.tail})")
  parts = {1: [], 0: [], -1: []}
  for m, c in f.terms:
    parts[m.compare(f.one)].append((m, c))
  fixed = parts[0][0][1] if parts[0] else Fraction(0)
  return Series(f.one, tuple(parts[1])), fixed, Series(f.one, tuple(parts[-1]), f.tail)


def compose(coefficients: Iterable[Fraction], small: Series) -> Series:
  """Σ_k a_k small^k for an infinitesimal argument, until a power drops below the tail.

  Stops after `MAX_TERMS` powers at the latest; the first power left out becomes the tail.

  Raises:
    DomainError: the argument is not infinitesimal.
  """
  if any(m.compare(small.one) >= 0 for m, _ in small.terms[:1]):
    raise DomainError(f"{small} is not infinitesimal")
  total, power = constant(small.one, 0), constant(small.one, 1)
  for k, a in enumerate(coefficients):
    exhausted = not power.terms or (total.tail is not None and lead(power)[0].compare(total.tail) <= 0)
    if exhausted or k > MAX_TERMS:
      hidden = power.terms[0][0] if power.terms else power.tail
      return Series(total.one, total.terms, total.tail) if hidden is None else total + Series(total.one, (), hidden)
    total = total + constant(small.one, a) * power
    power = power * small
  return total


def inverse(f: Series) -> Series:
  """1/f: with f = c·m·(1 + δ), δ infinitesimal, c⁻¹m⁻¹ Σ_k (-δ)^k.

  Raises:
    ZeroDivisionError, Undecidable: see `lead`.
  """
  factor, delta = _reduced(f)
  geometric = compose((Fraction((-1) ** k) for k in range(MAX_TERMS + 2)), delta)
  return factor * geometric


def _reduced(f: Series) -> tuple[Series, Series]:
  """c⁻¹m⁻¹ and δ of f = c·m·(1 + δ)."""
  m, c = lead(f)
  factor = Series(f.one, ((m.inverse(), 1 / c),))
  scaled = factor * f
  return factor, Series(f.one, scaled.terms[1:], scaled.tail)
