"""Claims about octonions as an algebra, measured in double precision."""

import jax
import numpy as np

from mgr_jax.algebra.octonions import SIGNS, associator, conjugate, inner, multiply, sign_table
from mgr_jax.claims import Check, claim, worst_of

CASES = 2000


def generator(key: jax.Array) -> np.random.Generator:
  """NumPy's generator of a JAX key."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def largest(x) -> float:
  """Largest absolute entry."""
  return float(np.max(np.abs(np.asarray(x))))


def _flipped() -> np.ndarray:
  """The table with one wrong sign."""
  signs = SIGNS.copy()
  signs[3, 5] *= -1
  return signs


def _doubled(x: list, y: list) -> list:
  """The product by (a, b)(c, d) = (ac - d̄b, da + bc̄), recursively from numbers."""
  if len(x) == 1:
    return [x[0] * y[0]]
  half = len(x) // 2
  a, b, c, d = x[:half], x[half:], y[:half], y[half:]
  add = lambda x, y, sign: [p + sign * q for p, q in zip(x, y, strict=True)]
  first = add(_doubled(a, c), _doubled(conjugate(d), b), -1)
  return first + add(_doubled(d, a), _doubled(b, conjugate(c)), 1)


def _table(signs: np.ndarray) -> Check:
  """Basis products that differ from the recursion, or do not lie along e_{a xor b}."""

  def measure(key, scale):
    del key, scale
    basis = np.eye(8, dtype=int).tolist()
    expected = lambda a, b: [int(signs[a, b]) * (c == a ^ b) for c in range(8)]
    return float(sum(_doubled(basis[a], basis[b]) != expected(a, b) for a in range(8) for b in range(8)))

  return measure


def _composition(signs: np.ndarray) -> Check:
  """||xy|² - |x|²|y|²| relative to the larger side."""

  def measure(key, scale):
    x, y = generator(key).standard_normal((2, len(signs), CASES * scale))
    product = inner(*[multiply(x, y, signs)] * 2)
    return largest(product / (inner(x, x) * inner(y, y)) - 1)

  return measure


def _units(key, scale, n: int):
  x = generator(key).standard_normal((n, 8, CASES * scale))
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def _identities(signs: np.ndarray) -> Check:
  """Residual of the alternative, flexible and Moufang laws, of (xy)ȳ = x, and of conjugation reversing products."""

  def measure(key, scale):
    x, y, z = _units(key, scale, 3)
    m = lambda a, b: np.stack(multiply(a, b, signs))
    bar = lambda a: np.stack(conjugate(a))
    sides = (
      (m(x, m(x, y)), m(m(x, x), y)),
      (m(m(y, x), x), m(y, m(x, x))),
      (m(m(x, y), x), m(x, m(y, x))),
      (m(z, m(x, m(z, y))), m(m(m(z, x), z), y)),
      (m(m(m(x, z), y), z), m(x, m(z, m(y, z)))),
      (m(m(z, x), m(y, z)), m(m(z, m(x, y)), z)),
      (m(m(x, y), bar(y)), x),
      (bar(m(x, y)), m(bar(y), bar(x))),
    )
    return worst_of(largest(a - b) for a, b in sides)

  return measure


def _associator_size(factor: float) -> Check:
  """Standard errors between the mean of |[x, y, z]|² over uniform units and `factor`·21/16."""

  def measure(key, scale):
    size = np.sum(np.square(associator(*_units(key, scale, 3))), 0)
    return float(abs(np.mean(size) - factor * 21 / 16) / (np.std(size) / np.sqrt(len(size))))

  return measure


def _alternating(generic: bool) -> Check:
  """Symmetry defects of the associator, and its size where it must vanish: with a real argument, or on 1, a, b, ab.

  `generic` takes the third argument from outside the subalgebra of the first two.
  """

  def measure(key, scale):
    x, y, z, w = _units(key, scale, 4)
    value = np.stack(associator(x, y, z))
    swaps = [value + associator(*args) for args in ((y, x, z), (x, z, y), (z, y, x))]
    real = np.eye(8)[0][:, None] * np.ones_like(x)
    vanishing = [associator(*args) for args in ((real, x, y), (x, real, y), (x, y, real))]
    spanned = 0.3 * real + 0.5 * x - y + 0.7 * np.stack(multiply(x, y))
    vanishing.append(associator(x, y, w if generic else spanned))
    return worst_of(largest(v) for v in (*swaps, *vanishing, value[0]))

  return measure


def _real_parts(wrong: bool) -> Check:
  """Re((xy)z) - Re(x(yz)) and Re(x ȳ) - ⟨x, y⟩; `wrong` compares the whole of the first two."""

  def measure(key, scale):
    x, y, z = _units(key, scale, 3)
    gap = np.stack(associator(x, y, z))
    return worst_of(largest(gap if wrong else gap[0]), largest(multiply(x, conjugate(y))[0] - inner(x, y)))

  return measure


CLAIMS = (
  claim(
    "octonion.table",
    "e_a e_b = ±e_{a xor b}, with the signs of (a, b)(c, d) = (ac - d̄b, da + bc̄) applied three times",
    _table(SIGNS),
    0.0,
    _table(_flipped()),
    refs=("Baez, 2002, arXiv math/0105155",),
  ),
  claim(
    "octonion.composition",
    "|xy| = |x||y|; one more doubling, the sedenions, loses it",
    _composition(SIGNS),
    1e-12,
    _composition(sign_table(4)),
  ),
  claim(
    "octonion.moufang",
    "alternative, flexible and Moufang laws, (xy)y⁻¹ = x, and conjugation reverses products",
    _identities(SIGNS),
    1e-12,
    _identities(_flipped()),
  ),
  claim(
    "octonion.not_associative",
    "E|[x, y, z]|² = 21/16 (in standard errors)",
    _associator_size(1),
    4.0,
    _associator_size(1.1),
  ),
  claim(
    "octonion.associator",
    "[x, y, z] is alternating and imaginary, zero with a real argument and in the span of 1, x, y, xy",
    _alternating(generic=False),
    1e-12,
    _alternating(generic=True),
  ),
  claim(
    "octonion.real_part",
    "Re((xy)z) = Re(x(yz)), and Re(x ȳ) = ⟨x, y⟩: scores do not depend on brackets",
    _real_parts(wrong=False),
    1e-12,
    _real_parts(wrong=True),
  ),
)
