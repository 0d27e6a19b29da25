"""Claims about surreal numbers of finite birthday, each with a broken twin."""

import functools
import itertools
from fractions import Fraction

import jax
import numpy as np

from mgr_jax.algebra import surreal, surreal_batch, surreal_dyadic
from mgr_jax.algebra.surreal import Form, add, equal, form, less_equal, multiply, negative, value
from mgr_jax.algebra.surreal_dyadic import Dyadic, birthday, inverse, signs, simplest_between
from mgr_jax.claims import Check, claim


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


@functools.cache
def born_by(day: int, one_sided: bool = False) -> tuple[Dyadic, ...]:
  """All numbers {a | b} of earlier days, sorted; `one_sided` leaves one of the two options out."""
  if day == 0:
    return (surreal_dyadic.ZERO,)
  old = born_by(day - 1, one_sided)
  pairs = [(None, a) for a in old] + [(a, None) for a in old]
  if not one_sided:
    pairs += itertools.combinations(old, 2)
  return tuple(sorted({*old, *(simplest_between(a, b) for a, b in pairs)}))


def _census(one_sided: bool) -> Check:
  """Days on which the count differs from 2^{n+1} - 1; day 2 also counted from all sets of options."""

  def measure(key, scale):
    del key, scale
    wrong = sum(len(born_by(n, one_sided)) != 2 ** (n + 1) - 1 for n in range(7))
    sets = [s for r in range(4) for s in itertools.combinations(map(form, born_by(1)), r)]
    found = set()
    for left, right in itertools.product(sets, sets):
      try:
        found.add(value(Form(left, right)))
      except surreal.NotNumericError:
        continue
    return float(wrong + (found != set(born_by(2))))

  return measure


def _total_order(by_birthday: bool) -> Check:
  """Pairs of the 63 numbers of day 5 for which the order of forms differs from that of fractions, or is not total."""

  def measure(key, scale):
    del key, scale
    numbers, wrong = born_by(5), 0
    for a, b in itertools.product(numbers, numbers):
      at_most = birthday(a) <= birthday(b) if by_birthday else less_equal(form(a), form(b))
      at_least = birthday(a) >= birthday(b) if by_birthday else less_equal(form(b), form(a))
      wrong += at_most != (a.fraction <= b.fraction) or at_least != (a.fraction >= b.fraction)
      wrong += not (at_most or at_least) or (at_most and at_least) != (a == b)
    return float(wrong)

  return measure


@functools.cache
def _product_without_correction(x: Form, y: Form) -> Form:
  """The product without the terms -x^L y^L: the options are then not between the right bounds."""
  rule = _product_without_correction
  options = lambda *sides: tuple(add(rule(a, y), rule(x, b)) for s, t in sides for a in s for b in t)
  left, right = options((x.left, y.left), (x.right, y.right)), options((x.left, y.right), (x.right, y.left))
  return surreal.canonical(Form(left, right))


def _arithmetic(product) -> Check:
  """Sums and products of forms that differ from those of fractions: all pairs, reduced and literal recursion."""

  def measure(key, scale):
    del key, scale
    cases = [(add, Fraction.__add__, 5, {}), (add, Fraction.__add__, 3, {"reduce": False})]
    if product is multiply:
      cases += [(multiply, Fraction.__mul__, 4, {}), (multiply, Fraction.__mul__, 2, {"reduce": False})]
    else:
      cases += [(product, Fraction.__mul__, 2, {})]
    wrong = 0
    for operation, expected, day, settings in cases:
      for a, b in itertools.product(born_by(day), repeat=2):
        try:
          found = value(operation(form(a), form(b), **settings)).fraction
        except (surreal.NotNumericError, surreal.SurrealBudgetError):
          found = None
        wrong += found != expected(a.fraction, b.fraction)
    return float(wrong)

  return measure


def _ring(product) -> Check:
  """Violations of the ring axioms on 500 random triples of numbers of day 3."""

  def measure(key, scale):
    numbers, wrong = [form(x) for x in born_by(3)], 0
    zero, one = form(0), form(1)
    for triple in _rng(key).integers(0, len(numbers), (500 * scale, 3)):
      x, y, z = (numbers[i] for i in triple)
      try:
        laws = (
          add(x, y) is add(y, x),
          product(x, y) is product(y, x),
          add(add(x, y), z) is add(x, add(y, z)),
          product(product(x, y), z) is product(x, product(y, z)),
          product(x, add(y, z)) is add(product(x, y), product(x, z)),
          product(x, zero) is zero and product(x, one) is x,
          negative(negative(x)) is x and add(x, negative(x)) is zero,
        )
        wrong += not all(laws)
      except (surreal.NotNumericError, surreal.SurrealBudgetError):
        wrong += 1
    return float(wrong)

  return measure


def _birthdays(shift: int) -> Check:
  """Numbers whose formula differs from their first day or path length, and pairs born later than their days add up."""

  def measure(key, scale):
    del key, scale
    formula = lambda x: birthday(x) - shift * (x.k > 0)
    first = {x: day for day in range(6, -1, -1) for x in born_by(day)}
    wrong = sum(formula(x) != day or len(signs(x)) != day for x, day in first.items())
    wrong += sum(formula(x + y) > formula(x) + formula(y) for x, y in itertools.product(born_by(5), repeat=2))
    return float(wrong)

  return measure


def _known_forms(half: Fraction) -> Check:
  """How many of six known forms have another value, or are accepted although they are no numbers."""

  def measure(key, scale):
    del key, scale
    of = lambda left, right: Form(tuple(map(form, left)), tuple(map(form, right)))
    known = {
      half: of([0], [1]),
      Fraction(1): of([0], []),
      Fraction(3, 4): of([Fraction(1, 2)], [1]),
      Fraction(0): of([-1], [1]),
    }
    wrong = sum(not equal(form(x), f) for x, f in known.items())
    wrong += not equal(of([0, Fraction(1, 2)], [1]), of([Fraction(1, 2)], [1]))
    try:
      of([1], [0])
    except surreal.NotNumericError:
      return float(wrong)
    return float(wrong + 1)

  return measure


def _inverse(late: int) -> Check:
  """Truncations of 1/3 outside their bound, and pairs of days without progress; `late` tightens the bound."""

  def measure(key, scale):
    del key, scale
    cut = [inverse(Dyadic(3), days) for days in range(4, 21)]
    errors = [abs(3 * a.value.fraction - 1) for a in cut]
    wrong = sum(e > 3 * a.bound / 2**late for e, a in zip(errors, cut, strict=True))
    return float(wrong + sum(b >= a for a, b in zip(errors, errors[2:], strict=False)))

  return measure


@jax.jit
def _batched(a, b):
  x, y = surreal_batch.dyadic_array(*a), surreal_batch.dyadic_array(*b)
  return surreal_batch.add(x, y), surreal_batch.multiply(x, y), surreal_batch.compare(x, y)


def _batches(ignore_flag: bool) -> Check:
  """Entries that int32 batches get wrong without saying so, small and large; `ignore_flag` trusts all of them."""

  def measure(key, scale):
    rng, wrong, n = _rng(key), 0, 200 * scale
    size = 2 ** rng.integers(1, 31, (2, n))
    num, k = rng.integers(-size, size), rng.integers(0, 20, (2, n))
    total, product, (order, lost) = jax.device_get(_batched((num[0], k[0]), (num[1], k[1])))
    for i in range(n):
      a, b = (Dyadic(int(num[j, i]), int(k[j, i])) for j in (0, 1))
      for found, true in ((total, a + b), (product, a * b)):
        if ignore_flag or not found.overflow[i]:
          wrong += (int(found.num[i]), int(found.k[i])) != (true.num, true.k)
        wrong += bool(found.overflow[i]) and abs(true.num) < 2**24
      wrong += not lost[i] and int(order[i]) != (a > b) - (a < b)
    return float(wrong)

  return measure


CLAIMS = (
  claim(
    "surreal.census",
    "2^{n+1} - 1 numbers are born by day n, for n <= 6; options from both sides are needed",
    _census(False),
    0.0,
    _census(True),
    refs=("Conway, 2001, On Numbers and Games",),
  ),
  claim(
    "surreal.total_order",
    "on all 63 numbers of day 5, x <= y by options alone is the order of fractions; order of birth is not",
    _total_order(False),
    0.0,
    _total_order(True),
  ),
  claim(
    "surreal.arithmetic",
    "sums (day <= 5) and products (day <= 4) of forms are those of fractions; without -x^L y^L they are not",
    _arithmetic(multiply),
    0.0,
    _arithmetic(_product_without_correction),
  ),
  claim(
    "surreal.ring",
    "commutative ring axioms, x·0 = 0, -(-x) = x, x + (-x) = 0, on random triples of day 3",
    _ring(multiply),
    0.0,
    _ring(_product_without_correction),
  ),
  claim(
    "surreal.birthday",
    "birthday of m/2^k is ⌊|x|⌋ + 1 + k, its first day and path length; birthday(x + y) <= birthday x + birthday y",
    _birthdays(0),
    0.0,
    _birthdays(1),
    refs=("Gonshor, 1986, An Introduction to the Theory of Surreal Numbers",),
  ),
  claim(
    "surreal.known_forms",
    "{0|1} = 1/2, {0|} = 1, {1/2|1} = 3/4, {-1|1} = 0, {0,1/2|1} = {1/2|1}, and {1|0} is refused",
    _known_forms(Fraction(1, 2)),
    0.0,
    _known_forms(Fraction(5, 8)),
  ),
  claim(
    "surreal.inverse",
    "1/3 is born on day ω: its n-day truncation errs by at most 2^-(n-1), and every two days err less",
    _inverse(0),
    0.0,
    _inverse(2),
  ),
  claim(
    "surreal.batches",
    "int32 batches add, multiply and compare exactly or say that they overflowed",
    _batches(False),
    0.0,
    _batches(True),
  ),
)
