"""Log-exp transseries in x → ∞ over monomials e^{P(x)} x^a (log x)^b (log log x)^c, all exponents rational.

P = Σ c_j x^{e_j} with e_j > 0. A larger monomial grows faster: the sign of the leading coefficient of P₁ - P₂ decides,
then a, b, c in this order. Closed under sums, products and inverses; logarithm, exponential and derivative where the
result stays in this class, else `DomainError`. (van den Dries, Aschenbrenner, van der Hoeven, 2017.)
"""

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction

from mgr_jax.algebra import transseries
from mgr_jax.algebra.transseries import MAX_TERMS, DomainError, Series, Undecidable

Powers = tuple[tuple[Fraction, Fraction], ...]


def _collected(pairs: Iterable[tuple[Fraction, Fraction]]) -> Powers:
  """(exponent, coefficient) pairs of P with falling exponents, without zeros."""
  total: dict[Fraction, Fraction] = {}
  for e, c in pairs:
    total[e] = total.get(e, Fraction(0)) + c
  return tuple(sorted(((e, c) for e, c in total.items() if c), reverse=True))


@dataclasses.dataclass(frozen=True)
class Growth:
  """e^P x^a (log x)^b (log log x)^c; `p` lists (exponent, coefficient) of P with falling exponents."""

  p: Powers = ()
  a: Fraction = Fraction(0)
  b: Fraction = Fraction(0)
  c: Fraction = Fraction(0)

  def __mul__(self, other: "Growth") -> "Growth":
    return Growth(_collected((*self.p, *other.p)), self.a + other.a, self.b + other.b, self.c + other.c)

  def inverse(self) -> "Growth":
    return Growth(tuple((e, -c) for e, c in self.p), -self.a, -self.b, -self.c)

  def compare(self, other: "Growth") -> int:
    ratio = self * other.inverse()
    first = next((x for x in (*(c for _, c in ratio.p[:1]), ratio.a, ratio.b, ratio.c) if x), 0)
    return (first > 0) - (first < 0)

  def __str__(self) -> str:
    parts = [f"exp({_polynomial_text(self.p)})"] if self.p else []
    named = (("x", self.a), ("log x", self.b), ("log log x", self.c))
    return " ".join(parts + [_power_text(base, e) for base, e in named if e]) or "1"


def _power_text(base: str, e: Fraction) -> str:
  if e == 1:
    return base
  base = f"({base})" if " " in base else base
  return f"{base}^{e}" if e.denominator == 1 else f"{base}^({e})"


def _polynomial_text(p: Powers) -> str:
  text = lambda e, c: {1: "", -1: "-"}.get(c, f"{c}·") + _power_text("x", e)
  return " + ".join(text(e, c) for e, c in p).replace("+ -", "- ")


ONE = Growth()


def number(value: int | Fraction) -> Series:
  """A rational number as a transseries."""
  return transseries.constant(ONE, value)


def growth(*, p=(), a=0, b=0, c=0) -> Series:
  """The monomial e^P x^a (log x)^b (log log x)^c, `p` a list of (exponent, coefficient).

  Raises:
    ValueError: an exponent of P that is not positive; it belongs elsewhere.
  """
  p = _collected((Fraction(e), Fraction(k)) for e, k in p)
  if any(e <= 0 for e, _ in p):
    raise ValueError(f"P = {_polynomial_text(p)} has an exponent that is not positive")
  return transseries.monomial(Growth(p, Fraction(a), Fraction(b), Fraction(c)), ONE)


X = growth(a=1)
LOG_X = growth(b=1)
LOG_LOG_X = growth(c=1)


def log(f: Series) -> Series:
  """log f = log m + Σ_{k>=1} (-1)^{k+1} δ^k/k of f = m(1 + δ), with log m = P + a·log x + b·log log x.

  Raises:
    DomainError: a leading coefficient other than 1, whose logarithm is no rational number, or a power of log log x.

  >>> print(log(exp(X * X) * X))
  x^2 + log x
  """
  m, c = transseries.lead(f)
  if c <= 0:
    raise DomainError(f"the leading coefficient {c} is not positive")
  if c != 1:
    raise DomainError(f"log {c} is not rational; divide by {c} first")
  if m.c:
    raise DomainError(f"the logarithm of {m} contains log log log x")
  factor = Series(ONE, ((m.inverse(), Fraction(1)),)) * f
  delta = Series(ONE, factor.terms[1:], factor.tail)
  mercator = (Fraction(0), *(Fraction((-1) ** (k + 1), k) for k in range(1, MAX_TERMS + 2)))
  main = [(Growth(a=e), k) for e, k in m.p] + [(Growth(b=Fraction(1)), m.a), (Growth(c=Fraction(1)), m.b)]
  return transseries.series(ONE, main) + transseries.compose(mercator, delta)


def exp(f: Series) -> Series:
  """e^f = e^{large part} Σ_k small^k/k!.

  Raises:
    DomainError: a constant term, or a large part other than P + α·log x + β·log log x.
    Undecidable: a tail of 1 or more.

  >>> exp(X) > growth(a=50), exp(LOG_X) == X
  (True, True)
  """
  large, fixed, small = transseries.split(f)
  if fixed:
    raise DomainError(f"e^({fixed}) is not rational; take the constant {fixed} out first")
  p, a, b = [], Fraction(0), Fraction(0)
  for m, k in large.terms:
    if m == Growth(a=m.a):
      p.append((m.a, k))
    elif m == Growth(b=Fraction(1)):
      a = k
    elif m == Growth(c=Fraction(1)):
      b = k
    else:
      raise DomainError(f"the exponential of {m} is no monomial here")
  series = (Fraction(1, math.factorial(k)) for k in range(MAX_TERMS + 2))
  return Series(ONE, ((Growth(_collected(p), a, b), Fraction(1)),)) * transseries.compose(series, small)


def derivative(f: Series) -> Series:
  """f' from m'/m = P' + a/x + b/(x log x) + c/(x log x log log x), term by term.

  The derivative of O(m) is O(m'); that of a tail of order 1, whose own derivative says nothing, is
  O(1/(x log x log log x)), the bound for all functions here that tend to a constant.

  >>> print(derivative(X * LOG_X))
  log x + 1
  """
  total = transseries.series(ONE, [(n, k * c) for m, c in f.terms for n, k in _logarithmic(m, m)])
  if f.tail is None:
    return total
  hidden = _logarithmic(f.tail, f.tail) or _logarithmic(Growth(c=Fraction(1)), ONE)
  return total + Series(ONE, (), hidden[0][0])


def _logarithmic(m: Growth, times: Growth) -> list[tuple[Growth, Fraction]]:
  """The terms of m'/m times a monomial, largest first."""
  one = Fraction(1)
  terms = [(Growth(a=e - 1), e * k) for e, k in m.p]
  terms += [(Growth(a=-one), m.a), (Growth(a=-one, b=-one), m.b), (Growth(a=-one, b=-one, c=-one), m.c)]
  return [(times * n, k) for n, k in terms if k]


__all__ = [
  "LOG_LOG_X",
  "LOG_X",
  "ONE",
  "DomainError",
  "Growth",
  "Undecidable",
  "X",
  "derivative",
  "exp",
  "growth",
  "log",
  "number",
]
