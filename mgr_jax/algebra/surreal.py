"""Surreal numbers {L | R} as Conway defined them: order, sum, negative and product by recursion on options alone.

A form is a number when no left option is >= a right option. x <= y when no x^L >= y and no y^R <= x; two forms are
equal numbers when x <= y <= x, however they are written (Conway, 2001, On Numbers and Games). `surreal_dyadic` has the
numbers that forms of finite birthday denote.
"""

import functools
import weakref
from fractions import Fraction

from mgr_jax.algebra.surreal_dyadic import Dyadic, birthday, simplest_between

MAX_OPS = 200_000
MAX_DEPTH = 120  # sum of both birthdays; each level of the recursion takes several Python frames


class NotNumericError(ValueError):
  """A left option is >= a right one: {1 | 0} is a game, not a number."""


class SurrealBudgetError(ValueError):
  """The recursion would need more steps, or go deeper, than allowed."""


class Form:
  """{left | right}, both tuples of forms. One object per way of writing: `is` compares writings, `equal` numbers.

  Raises:
    NotNumericError: a left option is >= a right option.

  >>> half = Form((form(0),), (form(1),))
  >>> half, value(half)
  ({0 | 1}, Dyadic(num=1, k=1))
  """

  __slots__ = ("__weakref__", "left", "right")
  left: tuple["Form", ...]
  right: tuple["Form", ...]

  def __new__(cls, left: tuple["Form", ...] = (), right: tuple["Form", ...] = ()):
    key = tuple(left), tuple(right)
    found = _FORMS.get(key)
    if found is None:
      for low in key[0]:
        for high in key[1]:
          if less_equal(high, low):
            raise NotNumericError(f"{{{low} | {high}}} is a game, not a number: {low} >= {high}")
      found = super().__new__(cls)
      found.left, found.right = key
      _FORMS[key] = found
    return found

  def __str__(self) -> str:
    return str(value(self))

  def __repr__(self) -> str:
    return f"{{{', '.join(map(str, self.left))} | {', '.join(map(str, self.right))}}}"


_FORMS: weakref.WeakValueDictionary[tuple, Form] = weakref.WeakValueDictionary()


@functools.lru_cache(maxsize=1 << 18)
def less_equal(x: Form, y: Form) -> bool:
  """x <= y: no left option of x is >= y, and no right option of y is <= x. Uses nothing but the definition."""
  return not any(less_equal(y, low) for low in x.left) and not any(less_equal(high, x) for high in y.right)


def equal(x: Form, y: Form) -> bool:
  """x <= y and y <= x: the same number, perhaps written differently.

  >>> two_ways = Form((form(-1),), (form(5),)), form(0)
  >>> equal(*two_ways), two_ways[0] is two_ways[1]
  (True, False)
  """
  return less_equal(x, y) and less_equal(y, x)


def less(x: Form, y: Form) -> bool:
  """Not y <= x: forms of numbers are totally ordered."""
  return not less_equal(y, x)


@functools.lru_cache(maxsize=1 << 18)
def value(x: Form) -> Dyadic:
  """The simplest number strictly between all left and all right options."""
  low = max((value(option) for option in x.left), default=None)
  high = min((value(option) for option in x.right), default=None)
  return simplest_between(low, high)


@functools.lru_cache(maxsize=1 << 16)
def form(x: Dyadic | int | Fraction) -> Form:
  """The canonical form: {n-1 | } for n > 0, { | n+1} for n < 0, {(m-1)/2^k | (m+1)/2^k} for m/2^k.

  Raises:
    ValueError: x is not dyadic.
    SurrealBudgetError: its birthday exceeds `MAX_DEPTH`.
  """
  x = Dyadic.of(x)
  if birthday(x) > MAX_DEPTH:
    raise SurrealBudgetError(f"{x} is born on day {birthday(x)}; forms go to day {MAX_DEPTH}")
  if x.k:
    return Form((form(Dyadic(x.num - 1, x.k)),), (form(Dyadic(x.num + 1, x.k)),))
  if x.num == 0:
    return Form()
  return Form((form(Dyadic(x.num - 1)),)) if x.num > 0 else Form((), (form(Dyadic(x.num + 1)),))


def canonical(x: Form) -> Form:
  """The canonical form of the same number: at most one option on each side."""
  return form(value(x))


def negative(x: Form) -> Form:
  """-{L | R} = {-R | -L}."""
  return Form(tuple(map(negative, x.right)), tuple(map(negative, x.left)))


def add(x: Form, y: Form, max_ops: int = MAX_OPS, reduce: bool = True) -> Form:
  """x + y = {x^L + y, x + y^L | x^R + y, x + y^R}.

  Args:
    max_ops: largest number of pairs of ancestors of x and y that may be visited.
    reduce: replace every partial result by its canonical form. Without it the recursion is Conway's literally, and the
      forms, equal as numbers, grow exponentially.

  Raises:
    SurrealBudgetError: with both birthdays.

  >>> add(form(1), form(Fraction(1, 2)))
  {1 | 2}
  """
  return _checked(_add, x, y, (_born(x) + 1) * (_born(y) + 1), max_ops, reduce)


def subtract(x: Form, y: Form, max_ops: int = MAX_OPS) -> Form:
  """x + (-y)."""
  return add(x, negative(y), max_ops)


def multiply(x: Form, y: Form, max_ops: int = MAX_OPS, reduce: bool = True) -> Form:
  """Conway's product; arguments as in `add`, at most birthday(x)²·birthday(y)² pairs.

  xy = {x^L y + x y^L - x^L y^L, x^R y + x y^R - x^R y^R | x^L y + x y^R - x^L y^R, x^R y + x y^L - x^R y^L}

  >>> print(multiply(form(Fraction(3, 4)), form(Fraction(3, 2))))
  9/8
  """
  return _checked(_multiply, x, y, _born(x) ** 2 * _born(y) ** 2, max_ops, reduce)


def _born(x: Form) -> int:
  return birthday(value(x))


def _checked(operation, x, y, ops, max_ops, reduce):
  days = _born(x), _born(y)
  if ops > max_ops:
    raise SurrealBudgetError(f"birthdays {days[0]} and {days[1]} need up to {ops} pairs, max_ops is {max_ops}")
  if sum(days) > MAX_DEPTH:
    raise SurrealBudgetError(f"birthdays {days[0]} and {days[1]} add up to more than {MAX_DEPTH}")
  return operation(canonical(x), canonical(y), True) if reduce else operation(x, y, False)


@functools.lru_cache(maxsize=1 << 18)
def _add(x: Form, y: Form, reduce: bool) -> Form:
  options = lambda a, b: (*(_add(o, y, reduce) for o in a), *(_add(x, o, reduce) for o in b))
  return _made(options(x.left, y.left), options(x.right, y.right), reduce)


def _made(left, right, reduce: bool) -> Form:
  made = Form(tuple(dict.fromkeys(left)), tuple(dict.fromkeys(right)))
  return canonical(made) if reduce else made


@functools.lru_cache(maxsize=1 << 18)
def _multiply(x: Form, y: Form, reduce: bool) -> Form:
  def options(*sides):
    return [
      _add(_add(_multiply(a, y, reduce), _multiply(x, b, reduce), reduce), negative(_multiply(a, b, reduce)), reduce)
      for x_side, y_side in sides
      for a in x_side
      for b in y_side
    ]

  left = options((x.left, y.left), (x.right, y.right))
  right = options((x.left, y.right), (x.right, y.left))
  return _made(left, right, reduce)
