"""Conway's normal form Σ r_i ω^{y_i}: infinite and infinitesimal numbers in one ordered field.

The exponents y_i are finite normal forms themselves, r_i rational. ω = ω^1, ε = ω^-1, √ω = ω^{1/2}, ω^ω. Order is
lexicographic in exponent and coefficient (Conway, 2001, On Numbers and Games, ch. 3; Gonshor, 1986, ch. 5).
"""

import dataclasses
from fractions import Fraction

from mgr_jax.algebra import transseries
from mgr_jax.algebra.transseries import DomainError, Series, Undecidable

MAX_NESTING = 4


@dataclasses.dataclass(frozen=True)
class Power:
  """ω^exponent; the terms of an exact series, so that the group's product adds exponents."""

  exponent: tuple[tuple["Power", Fraction], ...] = ()

  def __mul__(self, other: "Power") -> "Power":
    total = _exact(self) + _exact(other)
    if total.tail is not None:
      raise Undecidable(f"an exponent of more than {transseries.MAX_TERMS} terms would be cut off")
    return Power(total.terms)

  def inverse(self) -> "Power":
    return Power((-_exact(self)).terms)

  def compare(self, other: "Power") -> int:
    if self.exponent == other.exponent:
      return 0
    # Sorted sums: the first place in which they differ decides, an absent term counting as 0.
    for (m, c), (n, d) in zip(self.exponent, other.exponent, strict=False):
      order = m.compare(n)
      if order:
        return (1 if c > 0 else -1) if order > 0 else (-1 if d > 0 else 1)
      if c != d:
        return 1 if c > d else -1
    longer, way = (self.exponent, 1) if len(self.exponent) > len(other.exponent) else (other.exponent, -1)
    return way if longer[min(len(self.exponent), len(other.exponent))][1] > 0 else -way

  @property
  def nesting(self) -> int:
    """How many ω stand above each other."""
    return 1 + max((m.nesting for m, _ in self.exponent), default=-1)

  def __str__(self) -> str:
    if not self.exponent:
      return "1"
    if len(self.exponent) == 1 and not self.exponent[0][0].exponent:
      power = self.exponent[0][1]
      return "ω" if power == 1 else f"ω^{power}" if power.denominator == 1 else f"ω^({power})"
    text = str(_exact(self))
    return f"ω^{text}" if text == "ω" else f"ω^({text})"


ONE = Power()


def _exact(m: Power) -> Series:
  return Series(ONE, m.exponent)


def number(value: int | Fraction) -> Series:
  """A rational number as a normal form.

  >>> OMEGA > number(10**100), EPSILON * OMEGA == number(1)
  (True, True)
  """
  return transseries.constant(ONE, value)


def omega(exponent: int | Fraction | Series = 1) -> Series:
  """ω^exponent.

  Raises:
    Undecidable: an exponent that is known only up to a tail.
    ValueError: more than `MAX_NESTING` levels of exponents.

  >>> print(omega(Fraction(1, 2)) * omega(Fraction(1, 2)), OMEGA - 1)
  ω ω - 1
  """
  exponent = exponent if isinstance(exponent, Series) else number(exponent)
  if exponent.tail is not None:
    raise Undecidable(f"the exponent {exponent} is cut off, so ω to that power has no known leading term")
  power = Power(exponent.terms)
  if power.nesting > MAX_NESTING:
    raise ValueError(f"{power} nests {power.nesting} exponents; at most {MAX_NESTING} are kept")
  return transseries.monomial(power, ONE)


OMEGA = omega()
EPSILON = omega(-1)


def standard_part(f: Series) -> Fraction:
  """The rational number infinitely close to a finite f.

  Raises:
    DomainError: f is infinite.
    Undecidable: the tail hides it.

  >>> standard_part((2 + EPSILON) * (3 - EPSILON))
  Fraction(6, 1)
  """
  large, fixed, _ = transseries.split(f)
  if large.terms:
    raise DomainError(f"{f} is infinite and has no standard part")
  return fixed


def is_infinitesimal(f: Series) -> bool:
  """|f| < 1/n for every n. Raises `Undecidable` when a tail of 1 or more hides it."""
  if f.terms:
    return f.terms[0][0].compare(ONE) < 0
  if f.tail is None or f.tail.compare(ONE) < 0:
    return True
  raise Undecidable(f"O({f.tail}) may be infinitesimal or not")


def archimedean_class(f: Series) -> Series:
  """The y of the leading ω^y: two numbers are within rational multiples of each other iff their classes agree."""
  return _exact(transseries.lead(f)[0])
