"""Claims about the order and the arithmetic of ordinals below ε₀, each with a broken twin.

Residuals count violations among random normal forms of height at most 2.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.ordinal import OMEGA, ONE, ZERO, Ord, natural_product, natural_sum, omega
from mgr_jax.algebra.ordinal_games import substitute
from mgr_jax.algebra.ordinal_rank import from_rank, lex_cmp, to_rank
from mgr_jax.algebra.ordinal_sampling import draw, draw_below, rng_of, tuples
from mgr_jax.claims import Check, claim

CASES = 400


def _violations(law, size: int, cases: int = CASES) -> Check:
  """How many random tuples violate at least one of the statements that `law` yields."""

  def measure(key, scale):
    return float(sum(not all(law(*case)) for case in tuples(key, cases * scale, size)))

  return measure


def _order(less) -> Check:
  """Against trichotomy, transitivity, and the order of the integers that arise with 4 in place of ω."""

  def law(a, b, c):
    yield less(a, b) + less(b, a) + (a == b) == 1
    yield not (less(a, b) and less(b, c)) or less(a, c)
    yield less(a, b) == (substitute(a, 4) < substitute(b, 4))

  return _violations(law, 3)


def _smallest_term_first(a: Ord, b: Ord) -> bool:
  return a.terms[::-1] < b.terms[::-1]


_compared = jax.jit(lex_cmp)


def _packed(a, b):
  radix = jnp.asarray([10**6, 10**3, 1])
  return jnp.sign(jnp.sum(a * radix, -1) - jnp.sum(b * radix, -1))


def _device_order(compare) -> Check:
  """Pairs of ranks that compare differently from their ordinals, or are not recovered from them."""

  def measure(key, scale):
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    a, b = rng.integers(0, 4, (2, CASES * scale, 3))
    a[::2, 2] *= 3200
    b[::3, 0] = a[::3, 0]
    found = np.asarray(compare(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32)))
    wrong = 0
    for x, y, sign in zip(a, b, found, strict=True):
      alpha, beta = from_rank(x), from_rank(y)
      wrong += sign != (alpha > beta) - (alpha < beta)
      wrong += not np.array_equal(to_rank(alpha, 3), x)
    return float(wrong)

  return measure


def _sum(add) -> Check:
  def law(a, b, c):
    low, high = sorted((b, c))
    yield add(add(a, b), c) == add(a, add(b, c))
    yield add(a, ZERO) == a == add(ZERO, a)
    yield add(a, low) < add(a, high) or low == high
    yield add(low, a) <= add(high, a)

  return _violations(law, 3)


def _product(multiply) -> Check:
  def law(a, b, c):
    low, high = sorted((b, c))
    yield multiply(multiply(a, b), c) == multiply(a, multiply(b, c))
    yield multiply(a, b + c) == multiply(a, b) + multiply(a, c)
    yield multiply(a, ONE) == a == multiply(ONE, a)
    yield multiply(a, low) < multiply(a, high) or low == high or a.is_zero
    yield multiply(low, a) <= multiply(high, a)

  return _violations(law, 3)


_KNOWN_POWERS = (
  (2, OMEGA, "w"),
  (OMEGA + 1, 2, "w^2 + w + 1"),
  (3, OMEGA**2, "w^w"),
  (2, OMEGA**OMEGA, "w^(w^w)"),
  (5, OMEGA + 2, "w*25"),
  (OMEGA * 2 + 1, OMEGA, "w^w"),
  (0, 0, "1"),
  (0, OMEGA, "0"),
  (1, OMEGA, "1"),
)


def _power(power) -> Check:
  """Violations of the laws of powers, plus wrong values among nine known ones."""

  def law(a, b, c):
    low, high = sorted((b, c))
    yield power(a, b + c) == power(a, b) * power(a, c)
    yield power(a, b * c) == power(power(a, b), c)
    yield a <= 1 or low == high or power(a, low) < power(a, high)

  def measure(key, scale):
    wrong = sum(power(Ord.of(a), Ord.of(b)) != Ord.parse(value) for a, b, value in _KNOWN_POWERS)
    return _violations(law, 3, CASES // 2)(key, scale) + wrong

  return measure


def _unshifted_power(a: Ord, b: Ord) -> Ord:
  """n^{ω^e} = ω^{ω^e} for finite n, without the shift of the exponent."""
  if not a.is_finite or a <= 1 or b.is_finite:
    return a**b
  return omega(b.limit_part) * int(a) ** b.finite_part


def _natural(add, multiply) -> Check:
  def law(a, b, c):
    low, high = sorted((b, c))
    yield add(a, b) == add(b, a)
    yield add(add(a, b), c) == add(a, add(b, c))
    yield add(a, low) < add(a, high) or low == high
    yield a + b <= add(a, b)
    yield multiply(a, b) == multiply(b, a)
    yield multiply(multiply(a, b), c) == multiply(a, multiply(b, c))
    yield multiply(a, low) < multiply(a, high) or low == high or a.is_zero
    yield multiply(a, add(b, c)) == add(multiply(a, b), multiply(a, c))
    yield a * b <= multiply(a, b)

  return _violations(law, 3)


def _division(add, multiply) -> Check:
  """Of differences and quotients, with `add` and `multiply` in the identities that define them."""

  def law(a, b, c):
    low, high = sorted((a, b))
    yield add(low, high - low) == high
    yield (a + b) - a == b
    for divisor in (b, c):
      if not divisor.is_zero:
        q, r = divmod(a, divisor)
        yield add(multiply(divisor, q), r) == a and r < divisor
        yield divmod(divisor * c + r, divisor) == (c, r)

  return _violations(law, 3)


def _text(write) -> Check:
  """Ordinals that are not recovered from their text, or whose hash differs from that of an equal one."""

  def measure(key, scale):
    rng, wrong = rng_of(key), 0
    for _ in range(CASES * scale):
      a = draw(rng, height=3)
      other = Ord.parse(write(a))
      rebuilt = draw_below(rng, a) if not a.is_zero else a
      rebuilt = rebuilt + (a - rebuilt)
      wrong += other != a or hash(rebuilt) != hash(a) or eval(repr(a), {"Ord": Ord}) != a
      wrong += a.is_finite and hash(a) != hash(int(a))
    return float(wrong)

  return measure


def _without_parentheses(a: Ord) -> str:
  return str(a).replace("(", "").replace(")", "")


CLAIMS = (
  claim(
    "ordinal.order",
    "exactly one of α < β, α = β, β < α; transitive; smallest term first is another order",
    _order(operator.lt),
    0.0,
    _order(_smallest_term_first),
    refs=("Cantor 1897",),
  ),
  claim(
    "ordinal.lex_cmp",
    "int32[3] ranks compare on the device as the ordinals ω²a + ωb + c; packed with radix 1000 they do not",
    _device_order(_compared),
    0.0,
    _device_order(_packed),
  ),
  claim(
    "ordinal.sum",
    "+ is associative, strictly increasing on the right and weakly on the left; β + α in its place is not",
    _sum(operator.add),
    0.0,
    _sum(lambda a, b: b + a),
    refs=("Cantor 1897",),
  ),
  claim(
    "ordinal.product",
    "α(βγ) = (αβ)γ and α(β + γ) = αβ + αγ, strictly increasing on the right; from the right it is not distributive",
    _product(operator.mul),
    0.0,
    _product(lambda a, b: b * a),
    refs=("Cantor 1897",),
  ),
  claim(
    "ordinal.power",
    "α^(β+γ) = α^β α^γ and α^(βγ) = (α^β)^γ; 2^ω = ω, (ω+1)² = ω² + ω + 1, 3^ω² = ω^ω, 2^ω^ω = ω^ω^ω",
    _power(operator.pow),
    0.0,
    _power(_unshifted_power),
    refs=("Sierpiński 1958, ch. XIV",),
  ),
  claim(
    "ordinal.natural",
    "⊕ and ⊗ commute, associate, distribute, strictly increase on both sides, and bound + and ·; + is no ⊕",
    _natural(natural_sum, natural_product),
    0.0,
    _natural(operator.add, operator.mul),
    refs=("Hessenberg 1906",),
  ),
  claim(
    "ordinal.division",
    "β + (α - β) = α for β <= α; α = βq + r with r < β, and only so; in the other order the identities fail",
    _division(operator.add, operator.mul),
    0.0,
    _division(lambda a, b: b + a, lambda a, b: b * a),
  ),
  claim(
    "ordinal.text",
    "parse(str(α)) = α and equal ordinals have equal hashes; without parentheses the text names another ordinal",
    _text(str),
    0.0,
    _text(_without_parentheses),
  ),
)
