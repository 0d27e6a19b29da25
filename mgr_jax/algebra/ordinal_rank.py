"""Ordinals below ω^k on a device: int32[k] coefficients, most significant first, compared lexicographically.

Never one integer with fixed radices: with radix 1000 the smaller (0, 0, 9600) would exceed (0, 1, 0).
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.ordinal import Ord

_LARGEST = np.iinfo(np.int32).max


def to_rank(alpha: Ord | int, k: int) -> np.ndarray:
  """The coefficients of ω^{k-1}, ..., ω, 1 in α, int32[k].

  Raises:
    ValueError: α >= ω^k, or a coefficient beyond int32.

  >>> to_rank(Ord.parse("w^2*2 + 5"), 3).tolist()
  [2, 0, 5]
  """
  alpha = Ord.of(alpha)
  if not alpha.is_zero and not alpha.degree < k:
    raise ValueError(f"alpha={alpha} is not below w^{k}, the ordinals of {k} coefficients")
  rank = np.zeros(k, np.int32)
  for exponent, coefficient in alpha.terms:
    if coefficient > _LARGEST:
      raise ValueError(f"alpha={alpha}: coefficient {coefficient} exceeds {_LARGEST}, the largest int32")
    rank[k - 1 - int(exponent)] = coefficient
  return rank


def from_rank(rank) -> Ord:
  """The ordinal Σ ω^{k-1-i}·rank[i]; inverse of `to_rank`.

  Raises:
    ValueError: not one-dimensional, or a negative coefficient.
  """
  rank = np.asarray(rank)
  if rank.ndim != 1 or np.any(rank < 0):
    raise ValueError(f"rank={rank} is no vector of coefficients >= 0")
  powers = range(len(rank) - 1, -1, -1)
  return Ord(tuple((Ord.of(e), int(c)) for e, c in zip(powers, rank, strict=True) if c))


def lex_cmp(a: jax.Array, b: jax.Array) -> jax.Array:
  """-1, 0 or 1 as a is smaller than, equal to or larger than b; int32.

  The first non-zero of sign(a_i - b_i), without branches: O(k) selects.

  Args:
    a, b: int32[..., k] ranks that broadcast against each other.

  >>> int(lex_cmp(np.array([0, 1, 0]), np.array([0, 0, 9600])))
  1
  """
  sign = (a > b).astype(jnp.int32) - (a < b).astype(jnp.int32)
  found = jnp.zeros(sign.shape[:-1], jnp.int32)
  for i in reversed(range(sign.shape[-1])):
    found = jnp.where(sign[..., i] != 0, sign[..., i], found)
  return found
