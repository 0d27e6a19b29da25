"""Claims about Levi-Civita numbers as an ordered field, infinitesimals and standard parts; each has a broken twin."""

import jax
import numpy as np

from mgr_jax.algebra.hyperreal import EXACT, LC, eps, is_infinite, is_limited, omega, real, series, st
from mgr_jax.algebra.hyperreal_calculus_claims import CASES, K
from mgr_jax.algebra.hyperreal_calculus_claims import CLAIMS as CALCULUS
from mgr_jax.claims import Check, claim, worst_of


def draw(rng: np.random.Generator, scale: int, low: int = -3, high: int = 3, *, terms: int = 3) -> LC:
  """Random exact numbers: exponents from `low` to `high`, `terms` integer coefficients in [-4, 4], some of them 0."""
  coef = np.zeros((CASES * scale, K))
  coef[:, :terms] = rng.integers(-4, 5, (CASES * scale, terms))
  return series(coef, rng.integers(low, high + 1, CASES * scale))


def exponents(x: LC) -> np.ndarray:
  """Valuations, 0 for the number 0."""
  return np.where(np.asarray(x.val) < EXACT, x.val, 0)


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _size(x: LC) -> float:
  """The largest coefficient that is known; NaN where one is undefined."""
  return float(np.max(np.abs(x.coef)))


def _ring_laws(forget_what_is_lost: bool) -> Check:
  """Largest known coefficient of the difference of both sides of associativity, commutativity, distributivity.

  `forget_what_is_lost` takes truncated sums for exact.
  """
  keep = (lambda x: LC(x.val, x.coef, np.full(x.shape, EXACT, np.int32))) if forget_what_is_lost else (lambda x: x)
  plus, times = lambda x, y: keep(x + y), lambda x, y: keep(x * y)

  def measure(key, scale):
    with jax.enable_x64(True):
      rng = _rng(key)
      x, y, z = (draw(rng, scale, terms=K) for _ in range(3))
      # Leading terms that cancel are where truncation shows.
      y = series(np.where(np.arange(CASES * scale)[:, None] % 2, y.coef, -np.asarray(x.coef)), exponents(x))
      differences = (
        plus(plus(x, y), z) - plus(x, plus(y, z)),
        times(times(x, y), z) - times(x, times(y, z)),
        times(x, y) - times(y, x),
        times(x, plus(y, z)) - plus(times(x, y), times(x, z)),
      )
      return worst_of(map(_size, differences))

  return measure


def _inverses(dual: bool) -> Check:
  """Largest known coefficient of x·(1/x) - 1, also at x = ε and 1/ε; `dual` computes with a + bε, ε² = 0."""

  def measure(key, scale):
    with jax.enable_x64(True):
      if dual:
        value, slope = jax.jvp(lambda x: x * (1 / x), (0.0,), (1.0,))
        return float(np.max(np.abs([value - 1, slope])))
      x = draw(_rng(key), scale)
      coef, val = np.where(np.asarray(x.coef) == 0, 1, x.coef), exponents(x)
      coef[:2], val[:2] = np.eye(K)[0], (1, -1)
      x = series(coef, val)
      product = x * (1 / x)
      known = min(int(np.min(product.order)), K)
      return _size(product - 1) if known == K else float("nan")

  return measure


def _cancellation(keep_leading: bool) -> Check:
  """Cases in which (a + b) - a is not b, for b infinitely smaller than a; and (ε + ε²) - ε.

  `keep_leading` keeps a real part and one infinitesimal term of each number.
  """

  def kept(x: LC) -> LC:
    return LC(x.val, np.asarray(x.coef) * np.eye(1, K)[0], x.order) if keep_leading else x

  def measure(key, scale):
    with jax.enable_x64(True):
      rng = _rng(key)
      a = draw(rng, scale, terms=2)
      b = draw(rng, scale, terms=2)
      b = series(b.coef, exponents(a) + 2)
      found = kept(kept(a + b) - a) - b
      wrong = np.sum((np.asarray(found.coef)[:, 0] != 0) | np.asarray(found.lost))
      e = eps(K)
      return float(wrong + (not bool(kept(kept(e + e * e) - e) == e * e)))

  return measure


def _order_laws(size_decides: bool) -> Check:
  """Violations of trichotomy, transitivity, and compatibility with + and with products of positive numbers.

  `size_decides` takes the sign of the largest coefficient for that of the number.
  """

  def positive(x: LC):
    coef = np.asarray(x.coef)
    place = np.argmax(np.abs(coef), -1) if size_decides else np.zeros(len(coef), int)
    return np.take_along_axis(coef, place[:, None], -1)[:, 0] > 0

  def measure(key, scale):
    with jax.enable_x64(True):
      rng = _rng(key)
      # From ε⁻² to ε³ sums and products are exact: what truncation hides is no violation.
      x, y, z = (draw(rng, scale, -2, 1) for _ in range(3))
      less = lambda a, b: positive(b - a)
      below, above, equal = less(x, y), less(y, x), np.asarray(x == y)
      wrong = np.sum(below.astype(int) + above + equal != 1)
      wrong += np.sum(below & ~less(x + z, y + z))
      wrong += np.sum(below & less(y, z) & ~less(x, z))
      wrong += np.sum(positive(x) & positive(y) & ~(positive(x * y) & positive(x + y)))
      return float(wrong)

  return measure


def _below_every_fraction(make) -> Check:
  """How many of `CASES` natural n up to 10^16 have not n·ε < 1 and 1/ε > n, with `make()` in the place of ε."""

  def measure(key, scale):
    del key, scale
    with jax.enable_x64(True):
      e = make()
      n = real(np.round(np.logspace(0, 16, CASES)), K)
      return float(np.sum(~np.asarray((n * e < 1) & (1 / e > n))))

  return measure


def _standard_parts(part) -> Check:
  """Largest error of st(x + y) = st(x) + st(y), st(xy) = st(x)·st(y); infinity if an infinite number has a real one."""

  def measure(key, scale):
    with jax.enable_x64(True):
      rng = _rng(key)
      x, y = (draw(rng, scale, low=0) for _ in range(2))
      part_of = lambda x: np.asarray(part(x))
      errors = part_of(x + y) - part_of(x) - part_of(y), part_of(x * y) - part_of(x) * part_of(y)
      infinite = draw(rng, scale, low=-3)
      real_one = np.asarray(is_limited(infinite)) | ~np.isnan(part_of(infinite))
      return float(np.max(np.abs(errors))) + (np.inf if np.any(np.asarray(is_infinite(infinite)) & real_one) else 0.0)

  return measure


def _continuity(x, y) -> Check:
  """|st(x² - y²)| for infinitely close x and y."""

  def measure(key, scale):
    del key, scale
    with jax.enable_x64(True):
      a, b = x(), y()
      return abs(float(st(a * a - b * b)))

  return measure


CLAIMS = (
  claim(
    "hyperreal.ring",
    "(x+y)+z = x+(y+z), (xy)z = x(yz), xy = yx, x(y+z) = xy + xz in every known term, exactly",
    _ring_laws(False),
    0.0,
    _ring_laws(True),
    ("Shamseddine, Berz 2010",),
  ),
  claim(
    "hyperreal.inverse",
    f"x·(1/x) = 1 modulo ε^{K} for every x ≠ 0, infinitesimal and infinite ones too; dual numbers have no 1/ε",
    _inverses(False),
    1e-12,
    _inverses(True),
  ),
  claim(
    "hyperreal.no_cancellation",
    "(a + b) - a = b exactly for b infinitely smaller than a; number of failures",
    _cancellation(False),
    0.0,
    _cancellation(True),
  ),
  claim(
    "hyperreal.order",
    "< is a total order with x < y ⇒ x+z < y+z and x, y > 0 ⇒ xy, x+y > 0; number of violations",
    _order_laws(False),
    0.0,
    _order_laws(True),
  ),
  claim(
    "hyperreal.non_archimedean",
    "n·ε < 1 and 1/ε > n for natural n up to 10^16; number of violations. A real 10^-15 fails",
    _below_every_fraction(lambda: eps(K)),
    0.0,
    _below_every_fraction(lambda: real(1e-15, K)),
  ),
  claim(
    "hyperreal.standard_part",
    "st(x+y) = st x + st y and st(xy) = st x · st y for limited numbers; infinite ones have none",
    _standard_parts(st),
    0.0,
    _standard_parts(lambda x: x.coef[:, 0]),
  ),
  claim(
    "hyperreal.continuity",
    "x ≈ y ⇒ x² ≈ y² at limited x; not at x = 1/ε, y = 1/ε + ε, so x² is not uniformly continuous",
    _continuity(lambda: real(3.0, K), lambda: 3 + eps(K)),
    0.0,
    _continuity(lambda: omega(K), lambda: omega(K) + eps(K)),
    ("Keisler 1976",),
  ),
  *CALCULUS,
)
