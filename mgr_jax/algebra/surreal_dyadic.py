"""Dyadic rationals m/2^k as the surreal numbers born on finite days: exact, on Python integers.

Every surreal number born on a finite day is dyadic and every dyadic is born on a finite day (Conway, 2001, On Numbers
and Games, ch. 0-3). Its place in the tree of simplicity is a word of signs: + takes the simplest larger number, - the
simplest smaller one (Gonshor, 1986, ch. 2).
"""

import dataclasses
import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


@functools.total_ordering
@dataclasses.dataclass(frozen=True, eq=False)
class Dyadic:
  """num/2^k in lowest terms: `num` is odd, or `k` is 0. Closed under sums and products, not under division.

  >>> print(Dyadic(6, 3), Dyadic.of(0.625) + Dyadic(3, 3))
  3/4 1
  """

  num: int
  k: int = 0

  def __post_init__(self):
    if self.k < 0:
      raise ValueError(f"k={self.k} is negative; write {self.num}/2^{self.k} as an integer")
    num, k = self.num, self.k
    while k and num % 2 == 0:
      num, k = num // 2, k - 1
    object.__setattr__(self, "num", num)
    object.__setattr__(self, "k", k)

  @classmethod
  def of(cls, x: "int | float | Fraction | Dyadic") -> "Dyadic":
    """`x` as a dyadic number, exactly.

    Raises:
      ValueError: the denominator is not a power of two; such a number is born on day ω, see `inverse`.
    """
    if isinstance(x, Dyadic):
      return x
    exact = Fraction(x)
    k = exact.denominator.bit_length() - 1
    if exact.denominator != 1 << k:
      raise ValueError(f"{exact} is no dyadic number: its denominator is not a power of two")
    return cls(exact.numerator, k)

  @property
  def fraction(self) -> Fraction:
    return Fraction(self.num, 1 << self.k)

  def __add__(self, other: "Dyadic") -> "Dyadic":
    k = max(self.k, other.k)
    return Dyadic((self.num << (k - self.k)) + (other.num << (k - other.k)), k)

  def __sub__(self, other: "Dyadic") -> "Dyadic":
    return self + -other

  def __neg__(self) -> "Dyadic":
    return Dyadic(-self.num, self.k)

  def __mul__(self, other: "Dyadic") -> "Dyadic":
    return Dyadic(self.num * other.num, self.k + other.k)

  def __eq__(self, other) -> bool:
    return isinstance(other, Dyadic) and (self.num, self.k) == (other.num, other.k)

  def __lt__(self, other: "Dyadic") -> bool:
    return self.num << other.k < other.num << self.k

  def __hash__(self) -> int:
    return hash((self.num, self.k))

  def __str__(self) -> str:
    return str(self.fraction)


ZERO = Dyadic(0)


def birthday(x: Dyadic) -> int:
  """The day on which x is born: |x| for integers, ⌊|x|⌋ + 1 + k for m/2^k in lowest terms.

  >>> birthday(Dyadic(5, 1)), birthday(Dyadic(-3))
  (4, 3)
  """
  return abs(x.num) if x.k == 0 else (abs(x.num) >> x.k) + 1 + x.k


def _descent(above) -> Iterator[tuple[str, Dyadic]]:
  """Sign and number of each step down the tree from 0; `above(at)` says whether the goal is larger than `at`."""
  low, high, at = None, None, ZERO
  while True:
    if above(at):
      sign, low = "+", at
    else:
      sign, high = "-", at
    at = between(low, high)
    yield sign, at


def between(low: Dyadic | None, high: Dyadic | None) -> Dyadic:
  """The next number of the tree under the neighbours `low` < `high`, `None` for none: one further, or the middle."""
  if low is None and high is None:
    return ZERO
  if low is None or high is None:
    return high - Dyadic(1) if low is None else low + Dyadic(1)
  total = low + high
  return Dyadic(total.num, total.k + 1)


def signs(x: Dyadic) -> str:
  """The path from 0 to x, a word of `+` and `-` as long as its birthday: 3/4 is `+-+`.

  >>> signs(Dyadic(3, 2))
  '+-+'
  """
  word, steps, at = "", _descent(lambda at: x > at), ZERO
  while at != x:
    sign, at = next(steps)
    word += sign
  return word


def from_signs(word: str) -> Dyadic:
  """The number at the end of a path; inverse of `signs`.

  Raises:
    ValueError: a character other than `+` and `-`.
  """
  low, high, at = None, None, ZERO
  for sign in word:
    if sign not in "+-":
      raise ValueError(f"sign expansion {word!r} has {sign!r}; it consists of + and -")
    low, high = (at, high) if sign == "+" else (low, at)
    at = between(low, high)
  return at


def simplest_between(low: Dyadic | None, high: Dyadic | None) -> Dyadic:
  """The earliest-born number x with low < x < high; `None` is no bound. It is unique. O(its birthday) steps.

  Raises:
    ValueError: low >= high.

  >>> print(simplest_between(Dyadic(2), Dyadic(3)), simplest_between(None, Dyadic(-4)))
  5/2 -5
  """
  if low is not None and high is not None and low >= high:
    raise ValueError(f"no number is larger than {low} and smaller than {high}")
  inside = lambda x: (low is None or low < x) and (high is None or x < high)
  if inside(ZERO):
    return ZERO
  return next(x for _, x in _descent(lambda at: low is not None and at <= low) if inside(x))


class Approx(NamedTuple):
  """A number known to within `bound`: |truth - value| <= bound; exact where `bound` is 0."""

  value: Dyadic
  bound: Fraction


def inverse(x: Dyadic, days: int) -> Approx:
  """1/x, cut off after `days` signs of its expansion: 1/3 is born on day ω, its truncations on finite days.

  The error is at most 2^-(days - ⌊1/|x|⌋ - 1). Exact for x = ±2^j once `days` reaches the birthday.

  Raises:
    ZeroDivisionError: x = 0.
    ValueError: `days` is less than ⌊1/|x|⌋ + 2, where the integer part is not yet complete.

  >>> third = inverse(Dyadic(3), 8)
  >>> print(third.value, third.bound)
  43/128 1/128
  """
  if x == ZERO:
    raise ZeroDivisionError("0 has no inverse")
  goal = 1 / x.fraction
  whole = abs(goal) // 1
  if days < whole + 2:
    raise ValueError(f"days={days} is less than {whole + 2}, at which the integer part of {goal} is complete")
  steps, at = _descent(lambda at: goal > at.fraction), ZERO
  for _ in range(days):
    if at.fraction == goal:
      return Approx(at, Fraction(0))
    at = next(steps)[1]
  return Approx(at, Fraction(0) if at.fraction == goal else Fraction(1, 2 ** int(days - whole - 1)))
