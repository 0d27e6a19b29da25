"""Homology by exact elimination: Betti numbers over ℚ and 𝔽₂, torsion, Euler characteristic, persistence.

Everything runs on the host with integers. β_k = n_k - rank D_k - rank D_{k+1}; fields differ where H_{k-1}(ℤ) or H_k(ℤ)
has torsion (Munkres, 1984, Elements of Algebraic Topology, §11).
"""

import itertools
from typing import NamedTuple

import numpy as np

from mgr_jax.algebra.simplicial import Complex, boundary

# The two largest primes below 2^31: products of residues fit in int64.
PRIMES = (2147483647, 2147483629)
MAX_POINTS = 64


def rank_modulo(matrix: np.ndarray, prime: int) -> int:
  """Rank over the field of `prime` < 2^31 elements, by elimination; O(rank · size) vector operations."""
  a = np.asarray(matrix, np.int64) % prime
  rank = 0
  for column in range(a.shape[1]):
    nonzero = np.flatnonzero(a[rank:, column])
    if not len(nonzero):
      continue
    pivot = rank + nonzero[0]
    a[[rank, pivot]] = a[[pivot, rank]]
    a[rank] = a[rank] * pow(int(a[rank, column]), -1, prime) % prime
    below = rank + 1 + np.flatnonzero(a[rank + 1 :, column])
    a[below] = (a[below] - a[below, column, None] * a[rank]) % prime
    rank += 1
    if rank == a.shape[0]:
      break
  return rank


def rank_rational(matrix: np.ndarray) -> int:
  """Rank over ℚ: the larger of the ranks modulo two primes near 2^31.

  Each is at most the rational rank, and less only if the prime divides an invariant factor of the matrix.
  """
  return max(rank_modulo(matrix, prime) for prime in PRIMES)


def betti(complex_: Complex, k: int, field: str = "Q") -> int:
  """β_k = dim H_k over the rationals (`field="Q"`) or the field of two elements (`"F2"`).

  Raises:
    ValueError: k outside 0..dim, or another field.
  """
  complex_.check_level(k)
  if field not in ("Q", "F2"):
    raise ValueError(f"field={field!r} is not 'Q' or 'F2'")
  rank = rank_rational if field == "Q" else lambda matrix: rank_modulo(matrix, 2)
  return complex_.size(k) - sum(rank(boundary(complex_, j).dense()) for j in (k, k + 1))


def betti_numbers(complex_: Complex, field: str = "Q") -> tuple[int, ...]:
  """(β_0, ..., β_dim).

  >>> from mgr_jax.algebra.simplicial import projective_plane, torus
  >>> betti_numbers(torus())
  (1, 2, 1)
  >>> betti_numbers(projective_plane()), betti_numbers(projective_plane(), "F2")
  ((1, 0, 0), (1, 1, 1))
  """
  return tuple(betti(complex_, k, field) for k in range(complex_.dim + 1))


def euler_characteristic(complex_: Complex) -> int:
  """χ = Σ (-1)^k n_k, which equals Σ (-1)^k β_k over any field.

  >>> from mgr_jax.algebra.simplicial import sphere
  >>> euler_characteristic(sphere(2))
  2
  """
  return sum((-1) ** k * n for k, n in enumerate(complex_.sizes))


def invariant_factors(matrix: np.ndarray) -> tuple[int, ...]:
  """The nonzero diagonal of the Smith normal form, each dividing the next; their number is the rank over ℚ.

  Python integers, so no entry overflows; meant for some hundred rows and columns.

  >>> invariant_factors([[2, 4], [6, 8]])
  (2, 4)
  """
  a = [[int(x) for x in row] for row in np.asarray(matrix)]
  factors = []
  while any(any(row) for row in a):
    # The smallest entry becomes the pivot; remainders below it are smaller still, so this ends.
    _, i, j = min((abs(x), i, j) for i, row in enumerate(a) for j, x in enumerate(row) if x)
    a[0], a[i] = a[i], a[0]
    for row in a:
      row[0], row[j] = row[j], row[0]
    pivot, top = a[0][0], a[0]
    for row in a[1:]:
      quotient = row[0] // pivot
      if quotient:
        row[:] = [x - quotient * y for x, y in zip(row, top, strict=True)]
    if any(row[0] for row in a[1:]):
      continue
    # The pivot column is clear, so column operations change the top row only.
    top[1:] = [x % pivot for x in top[1:]]
    if any(top[1:]):
      continue
    uneven = next((row for row in a[1:] if any(x % pivot for x in row)), None)
    if uneven is not None:
      a[0] = [x + y for x, y in zip(top, uneven, strict=True)]
      continue
    factors.append(abs(pivot))
    a = [row[1:] for row in a[1:]]
  return tuple(factors)


def torsion(complex_: Complex, k: int) -> tuple[int, ...]:
  """Orders of the cyclic torsion summands of H_k(ℤ): the invariant factors of D_{k+1} above 1.

  >>> from mgr_jax.algebra.simplicial import klein_bottle
  >>> torsion(klein_bottle(), 1)
  (2,)
  """
  complex_.check_level(k)
  return tuple(d for d in invariant_factors(boundary(complex_, k + 1).dense()) if d > 1)


class Bars(NamedTuple):
  """Birth and death of the classes of one dimension, float64 [n], by birth; the death of a class that stays is inf."""

  birth: np.ndarray
  death: np.ndarray


def persistence(distances: np.ndarray, max_dim: int = 1) -> tuple[Bars, ...]:
  """Persistent homology over 𝔽₂ of the Vietoris-Rips filtration: a simplex enters at its largest pairwise distance.

  Column reduction (Edelsbrunner, Letscher, Zomorodian, 2002). Bars of length zero are left out.

  Args:
    distances: [n, n], symmetric with zero diagonal, n <= 64.
    max_dim: 0 for components alone, 1 for loops as well.

  Raises:
    ValueError: another shape, too many points, or `max_dim` not 0 or 1.

  A square has one loop, alive from its side to its diagonal:

  >>> corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
  >>> _, loops = persistence(np.sqrt(((corners[:, None] - corners) ** 2).sum(-1)))
  >>> loops.birth.round(3).tolist(), loops.death.round(3).tolist()
  ([1.0], [1.414])
  """
  distances = np.asarray(distances, np.float64)
  n = len(distances)
  if distances.shape != (n, n) or not np.array_equal(distances, distances.T) or np.any(np.diag(distances)):
    raise ValueError(f"distances of shape {distances.shape} are not a symmetric matrix with zero diagonal")
  if n > MAX_POINTS:
    raise ValueError(f"{n} points are more than {MAX_POINTS}")
  if max_dim not in (0, 1):
    raise ValueError(f"max_dim={max_dim} is not 0 or 1")
  edges = sorted(itertools.combinations(range(n), 2), key=lambda e: distances[e])
  pairs = _reduce([(1 << i) | (1 << j) for i, j in edges])
  lengths = np.array([distances[e] for e in edges])
  deaths = lengths[sorted(pairs.values())]
  components = _bars(np.zeros(n), np.pad(deaths, (0, n - len(deaths)), constant_values=np.inf))
  if max_dim == 0:
    return (components,)
  loops = sorted(set(range(len(edges))) - set(pairs.values()))
  rank = {e: i for i, e in enumerate(edges)}
  sides = sorted(
    sorted((rank[i, j], rank[i, k], rank[j, k]), reverse=True) for i, j, k in itertools.combinations(range(n), 3)
  )
  filled = _reduce([sum(1 << s for s in side) for side in sides], stop=len(loops))
  death = np.array([lengths[sides[filled[e]][0]] if e in filled else np.inf for e in loops])
  return components, _bars(lengths[loops], death)


def _reduce(columns: list[int], stop: int | None = None) -> dict[int, int]:
  """Lowest row -> column of the reduced matrix; a column is a bit mask of its rows. Ends after `stop` pairs."""
  pivots, pairs = {}, {}
  for j, column in enumerate(columns):
    while column and (low := column.bit_length() - 1) in pivots:
      column ^= pivots[low]
    if column:
      pivots[low], pairs[low] = column, j
      if len(pairs) == stop:
        break
  return pairs


def _bars(birth: np.ndarray, death: np.ndarray) -> Bars:
  keep = death > birth
  order = np.lexsort((death[keep], birth[keep]))
  return Bars(birth[keep][order], death[keep][order])
