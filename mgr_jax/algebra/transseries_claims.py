"""Claims about normal forms in ω and log-exp transseries, each with a broken twin."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import jax
import numpy as np

from mgr_jax.algebra import transseries, transseries_growth, transseries_omega
from mgr_jax.algebra.transseries import Series, Undecidable, compare, dominates, inverse, sign
from mgr_jax.algebra.transseries_eval import log_eval
from mgr_jax.algebra.transseries_growth import LOG_LOG_X, LOG_X, X, derivative, exp, growth, log
from mgr_jax.algebra.transseries_omega import EPSILON, OMEGA, omega
from mgr_jax.claims import Check, claim


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _ratio(rng: np.random.Generator, top: int = 6) -> Fraction:
  return Fraction(int(rng.integers(-top, top + 1)), int(rng.integers(1, 4)))


def _coefficient(rng: np.random.Generator) -> int:
  return int(rng.choice([-1, 1]) * rng.integers(1, 10))


def _normal_form(rng: np.random.Generator, nested: bool = True) -> Series:
  """A nonzero Σ r_i ω^{y_i} with one or two terms, some with infinite exponents."""
  total = transseries_omega.number(0)
  while not total.terms:
    for _ in range(int(rng.integers(1, 3))):
      exponent = transseries_omega.number(_ratio(rng))
      if nested and rng.random() < 0.3:
        exponent = exponent + omega(_ratio(rng, 2)) * _coefficient(rng)
      total = total + omega(exponent) * _coefficient(rng)
  return total


def _is_zero(f: Series) -> bool:
  return not f.terms and f.tail is None


def _field(add_exponents: Callable[[Fraction, Fraction], Fraction]) -> Check:
  """The first violation of the ordered-field axioms on 300 random triples, and those of the laws of ω and ε."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for _ in range(300 * scale):
      f, g, h = (_normal_form(rng) for _ in range(3))
      a, b = Fraction(int(rng.integers(1, 10)), 10), Fraction(int(rng.integers(1, 10)), 10)
      laws = (
        _is_zero((f + g) + h - (f + (g + h))),
        _is_zero(f * g - g * f),
        _is_zero((f * g) * h - f * (g * h)),
        _is_zero(f * (g + h) - (f * g + f * h)),
        compare(f, g) == -compare(g, f) == compare(f + h, g + h),
        sign(f * g) == sign(f) * sign(g),
        omega(a) * omega(b) == omega(add_exponents(a, b)),
      )
      wrong += not all(laws)
      if wrong:
        break
    one = transseries_omega.number(1)
    wrong += not _is_zero(EPSILON * OMEGA - one)
    wrong += any(sign(OMEGA - n) < 0 or sign(one * Fraction(1, 2**n) - EPSILON) < 0 for n in range(60))
    wrong += sign(EPSILON) < 0
    return float(wrong)

  return measure


def _truncated_inverse(forget_tail: bool) -> Check:
  """Random f for which f·(1/f) - 1 keeps a term above its tail."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for _ in range(40 * scale):
      f = _normal_form(rng)
      g = transseries.truncated(inverse(f), 12)
      if forget_tail:
        g = dataclasses.replace(g, tail=None)
      wrong += bool((f * g - 1).terms)
    return float(wrong)

  return measure


def _growth_sample(rng: np.random.Generator) -> Series:
  """Up to three terms whose growth differs visibly at log x = 1000: exponents of logarithms are multiples of 3."""
  total = transseries_growth.number(0)
  while not total.terms:
    for _ in range(int(rng.integers(1, 4))):
      p = [(Fraction(int(rng.integers(1, 5)), 2), _coefficient(rng))] if rng.random() < 0.4 else ()
      b, c = (3 * int(x) for x in rng.integers(-1, 2, 2))
      total = total + growth(p=p, a=_ratio(rng, 3), b=b, c=c) * _coefficient(rng)
  return total


def _reversed_order(f: Series, g: Series) -> int:
  """A wrong order: log log x first, e^P last."""
  key = lambda m: (m.c, m.b, m.a, m.p)
  m, k = max((f - g).terms, key=lambda term: key(term[0]))
  del m
  return 1 if k > 0 else -1


def _numeric_order(order: Callable[[Series, Series], int]) -> Check:
  """Whether, on 500 pairs, the formal order ever is not that of the values at log x = 10³ and 10⁵."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for _ in range(500 * scale):
      f, g = _growth_sample(rng), _growth_sample(rng)
      if f != g:
        found = order(f, g)
        wrong += any(log_eval(f - g, log_x).sign != found for log_x in (1_000, 100_000))
      if wrong:
        break
    return float(wrong)

  return measure


def _differential(product_rule: Callable[[Series, Series], Series]) -> Check:
  """Whether, in random cases, exp(log f) = f, the product rule or (e^P)' = P'e^P ever fails above the tail."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for _ in range(6 * scale):
      f, g = _growth_sample(rng), _growth_sample(rng)
      wrong += bool((derivative(f * g) - product_rule(f, g)).terms)
      m, k = f.terms[0]
      if m.c == 0:
        f = f * (1 / k)
        wrong += bool((exp(log(f)) - f).terms)
      p = growth(a=Fraction(int(rng.integers(1, 7)), 2)) * _coefficient(rng) + X * _coefficient(rng)
      wrong += bool((derivative(exp(p)) - derivative(p) * exp(p)).terms)
      if wrong:
        break
    return float(wrong)

  return measure


def _scale(larger: Callable[[Series, Series], bool]) -> Check:
  """Whether any step fails of e^x ≻ x^n ≻ (log x)^m ≻ log log x ≻ 1 ≻ 1/log x for n, m = 1 .. 50."""

  def measure(key, scale):
    del key, scale
    steps = [(exp(X), growth(a=n)) for n in range(1, 51)]
    steps += [(growth(a=n), growth(b=m)) for n in range(1, 51) for m in range(1, 51)]
    steps += [(growth(b=m), LOG_LOG_X) for m in range(1, 51)]
    steps += [(LOG_LOG_X, transseries_growth.number(1)), (transseries_growth.number(1), 1 / LOG_X)]
    return float(any(not larger(f, g) for f, g in steps))

  return measure


def _larger_at_100(f: Series, g: Series) -> bool:
  return log_eval(f - g, math.log(100)).sign > 0


def _undecidable(forget_tail: bool) -> Check:
  """Cases in which two series that agree up to a tail are compared without complaint."""

  def measure(key, scale):
    rng, silent = _rng(key), 0
    for _ in range(20 * scale):
      f = inverse(1 + EPSILON * _normal_form(rng, nested=False) * omega(-7))
      f = Series(f.one, f.terms, f.tail or EPSILON.terms[0][0])
      g = f + Series(f.one, (), f.tail)
      if forget_tail:
        f, g = (dataclasses.replace(s, tail=None) for s in (f, g))
      try:
        compare(f, g)
        silent += 1
      except Undecidable:
        pass
    return float(silent)

  return measure


CLAIMS = (
  claim(
    "surreal.ordered_field",
    "normal forms Σ r ω^y are an ordered field; εω = 1, n < ω and 0 < ε < 2^-n for all n",
    _field(lambda a, b: a + b),
    0.0,
    _field(lambda a, b: Fraction(float(a) + float(b))),
    refs=("Conway, 2001, On Numbers and Games, ch. 3",),
  ),
  claim(
    "surreal.truncated_inverse",
    "f·(1/f) - 1 = O(tail): what is cut off is carried along",
    _truncated_inverse(False),
    0.0,
    _truncated_inverse(True),
  ),
  claim(
    "surreal.numeric_order",
    "f < g as transseries is f(x) < g(x) at x = e^1000 and e^100000",
    _numeric_order(compare),
    0.0,
    _numeric_order(_reversed_order),
  ),
  claim(
    "surreal.differential_field",
    "(fg)' = f'g + fg', exp(log f) = f, (e^P)' = P'e^P up to the tail; (fg)' = f'g' fails",
    _differential(lambda f, g: derivative(f) * g + f * derivative(g)),
    0.0,
    _differential(lambda f, g: derivative(f) * derivative(g)),
  ),
  claim(
    "surreal.growth_scale",
    "e^x ≻ x^n ≻ (log x)^m ≻ log log x ≻ 1 ≻ 1/log x for n, m <= 50; values at x = 100 say otherwise",
    _scale(dominates),
    0.0,
    _scale(_larger_at_100),
  ),
  claim(
    "surreal.undecidable",
    "series that agree up to a tail are not compared: `Undecidable` is raised",
    _undecidable(False),
    0.0,
    _undecidable(True),
  ),
)
