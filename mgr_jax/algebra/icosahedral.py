"""The 60 rotations of the icosahedron, A₅: the smallest group with a word problem complete for NC¹ (Barrington, 1989).

A₅ is perfect, so its only homomorphism into a commutative group is trivial: no sum of angles says anything about a
product. As rotations its elements are at least 72° apart, so long products stay recognisable in floating point.
"""

import itertools

import numpy as np

from mgr_jax.algebra.hypercomplex import STRUCTURE

ORDER = 60


def icosians() -> np.ndarray:
  """Unit quaternions [60, 4], float64, one of each pair ±u of the binary icosahedral group; the first is 1.

  >>> u = icosians()
  >>> u.shape, u[0].tolist()
  ((60, 4), [1.0, 0.0, 0.0, 0.0])
  """
  golden = (1 + 5**0.5) / 2
  units = [*np.eye(4), *(np.array((1, *signs)) / 2 for signs in itertools.product((1, -1), repeat=3))]
  for order in itertools.permutations(range(4)):
    if np.linalg.det(np.eye(4)[list(order)]) > 0:
      for signs in itertools.product((1, -1), repeat=3):
        units.append(0.5 * np.array([0, *np.array(signs) * (1, 1 / golden, golden)])[list(order)])
  distinct = []
  for u in units:
    if all(abs(u @ v) < 0.99 for v in distinct):
      distinct.append(u)
  return np.stack(distinct)


def nearest(u: np.ndarray) -> np.ndarray:
  """Index of the rotation nearest to the unit quaternions u [..., 4], blind to their sign."""
  return np.argmax(np.abs(np.asarray(u, np.float64) @ icosians().T), -1)


def multiplication_table() -> np.ndarray:
  """[60, 60] with table[g, h] the index of g·h."""
  u = icosians()
  return nearest(np.einsum("cab,ga,hb->ghc", STRUCTURE, u, u))


def running_products(word: np.ndarray) -> np.ndarray:
  """Indices of g_t ··· g_0 for words [..., T] of indices, newest on the left.

  >>> running_products(np.array([1, 1, 0]))[:2].tolist()  # element 1 is i, and i² = -1 is no rotation
  [1, 0]
  """
  table, out = multiplication_table(), np.array(word)
  for t in range(1, out.shape[-1]):
    out[..., t] = table[out[..., t], out[..., t - 1]]
  return out
