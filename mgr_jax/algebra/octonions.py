"""Octonions by Cayley-Dickson doubling, and the operators by which keys and values act on queries.

An octonion is a sequence of eight equally shaped arrays, its components along e_0 = 1, e_1, ..., e_7, so that products
are elementwise and run on NumPy and JAX arrays alike. Components 0 to 3 alone are the quaternions (w, x, y, z).
Sources: Baez, 2002, The octonions; Conway and Smith, 2003, On quaternions and octonions.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Octonion = Sequence
PAIRS = tuple(itertools.combinations(range(8), 2))
"""The 28 pairs a < b of components; those with a = 0 come first."""


def sign_table(doublings: int) -> np.ndarray:
  """Signs s of e_a e_b = s[a, b]·e_{a xor b} after some doublings of the reals, int8 [2^n, 2^n].

  (a, b)(c, d) = (ac - d̄b, da + bc̄): 1 gives the complex numbers, 2 quaternions, 3 octonions, 4 sedenions.

  >>> sign_table(1).tolist()  # i² = -1
  [[1, 1], [1, -1]]
  """
  signs = np.ones((1, 1), np.int8)
  for _ in range(doublings):
    conjugation = np.where(np.arange(len(signs)) == 0, 1, -1).astype(np.int8)
    signs = np.block([[signs, signs.T], [signs * conjugation, -signs.T * conjugation]])
  return signs


SIGNS = sign_table(3)


def signed_sum(terms):
  """Σ ±x of pairs (sign, x), without multiplications; at least one term."""
  (sign, total), *rest = terms
  total = total if sign > 0 else -total
  for sign, x in rest:
    total = total + x if sign > 0 else total - x
  return total


def multiply(a: Octonion, b: Octonion, signs: np.ndarray = SIGNS) -> list:
  """ab, component c being Σ_i s[i, i xor c]·a_i·b_{i xor c}; 64 multiplications. Other signs give other algebras.

  >>> e = np.eye(8, dtype=int)
  >>> np.array(multiply(multiply(e[1], e[2]), e[4])).tolist()
  [0, 0, 0, 0, 0, 0, 0, 1]
  >>> np.array(multiply(e[1], multiply(e[2], e[4]))).tolist()  # the brackets matter
  [0, 0, 0, 0, 0, 0, 0, -1]
  """
  n = len(signs)
  return [signed_sum([(signs[i, i ^ c], a[i] * b[i ^ c]) for i in range(n)]) for c in range(n)]


def conjugate(a: Octonion) -> list:
  """ā = a_0 - a_1 e_1 - ... - a_7 e_7."""
  return [a[0], *(-x for x in a[1:])]


def inner(a: Octonion, b: Octonion):
  """⟨a, b⟩ = Re(a b̄)."""
  return signed_sum([(1, x * y) for x, y in zip(a, b, strict=True)])


def associator(a: Octonion, b: Octonion, c: Octonion) -> list:
  """[a, b, c] = (ab)c - a(bc): alternating, imaginary, zero when a, b, c generate an associative algebra.

  >>> e = np.eye(8, dtype=int)
  >>> np.any(associator(e[1], e[2], e[3])).item(), associator(e[1], e[2], e[4])[7].item()
  (False, 2)
  """
  return [x - y for x, y in zip(multiply(multiply(a, b), c), multiply(a, multiply(b, c)), strict=True)]


def product(x: jax.Array, y: jax.Array, axis: int = -1) -> jax.Array:
  """The product of arrays of octonions whose components lie along `axis`, of size 8."""
  return jnp.stack(multiply(*(jnp.unstack(z, axis=axis) for z in (x, y))), axis)


def unit(x: jax.Array, axis: int = -1, floor: float = 1e-12) -> jax.Array:
  """x/|x|, and 1 where |x|² <= floor, for octonions along `axis`; the gradient is finite everywhere."""
  size = jnp.sum(x * x, axis, keepdims=True)
  sound = size > floor
  one = jnp.expand_dims(jnp.arange(8) == 0, [i for i in range(x.ndim) if i != axis % x.ndim])
  # The inner choice keeps the infinite slope of 1/√0 out of the gradient, which 0·∞ would turn into NaN.
  return jnp.where(sound, x * jax.lax.rsqrt(jnp.where(sound, size, 1)), one.astype(x.dtype))


def wedge(x: Octonion, y: Octonion) -> list:
  """⟨x, y⟩ and the 28 numbers x_a y_b - x_b y_a of `PAIRS`; 64 multiplications."""
  return [inner(x, y), *(x[a] * y[b] - x[b] * y[a] for a, b in PAIRS)]


def block(o: int, q: int) -> list[tuple[int, int]]:
  """(sign, index into `PAIRS`) of the four pairs that make up the entry M_{oq} of `operator`, for o != q.

  They are the a < b with a xor b = o xor q. e_q times the conjugate of e_a, times e_b, is ±e_o; the order (b, a) of the
  same two gives the opposite sign.
  """
  pairs = [(a, a ^ o ^ q) for a in range(8) if a < a ^ o ^ q]
  sign = lambda a, b: (1 if a == 0 else -1) * int(SIGNS[q, a]) * int(SIGNS[q ^ a, b])
  return [(sign(a, b), PAIRS.index((a, b))) for a, b in pairs]


BLOCKS = tuple(tuple(block(o, q)) for o, q in PAIRS)
TRANSPOSED_BLOCKS = tuple(
  tuple(({j: s for s, j in terms}[i], entry) for entry, terms in enumerate(BLOCKS) if i in [j for _, j in terms])
  for i in range(len(PAIRS))
)


def operator(wedges: Sequence, transposed: bool = False) -> list:
  """Turns `wedge(k, v)` into the operator M: q -> (q k̄)v, as M_00 and the 28 entries M_{oq} of `PAIRS`.

  M is ⟨k, v⟩·Id plus a skew matrix: R_v R_k̄ + R_k R_v̄ = 2⟨k, v⟩·Id, which is R_x R_x̄ = |x|²·Id polarised. The skew part
  depends on k ∧ v alone, in seven blocks of 4x4 signs whose rows are orthogonal (Hadamard matrices). 29 numbers are
  needed: the operators of all (k, v) span 1 + 28 dimensions. Linear, so the operator of a weighted sum is the weighted
  sum of operators. `transposed` applies the transpose of this linear map instead.

  >>> q, k, v = np.arange(24).reshape(3, 8)
  >>> pairwise = multiply(multiply(q, conjugate(k)), v)
  >>> [int(x) for x in act(operator(wedge(k, v)), q)] == [int(x) for x in pairwise]
  True
  """
  blocks = TRANSPOSED_BLOCKS if transposed else BLOCKS
  return [wedges[0], *(signed_sum([(sign, wedges[1 + i]) for sign, i in terms]) for terms in blocks)]


def act(matrix: Sequence, x: Octonion, transposed: bool = False) -> list:
  """The matrix M_00·Id + skew, or its transpose, times x; 64 multiplications.

  `act` and `wedge` are each other's derivatives: with y = act(M, x) and a cotangent g of y, those of M and x are
  wedge(g, x) and act(M, g, transposed=True).
  """
  entry = dict(zip(PAIRS, matrix[1:], strict=True))

  def term(o, i):
    if o == i:
      return 1, matrix[0] * x[o]
    return (1 if (o < i) != transposed else -1), entry[min(o, i), max(o, i)] * x[i]

  return [signed_sum([term(o, i) for i in range(8)]) for o in range(8)]


def column(matrix: Sequence) -> list:
  """M·1, which for the operator of (k, v) is k̄v: the numbers of the other bracketing are among the 29.

  >>> k, v = np.arange(16).reshape(2, 8)
  >>> bool(np.all(np.array(column(operator(wedge(k, v)))) == multiply(conjugate(k), v)))
  True
  """
  return [matrix[0], *(-x for x in matrix[1:8])]
