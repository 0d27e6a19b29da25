"""Finite simplicial complexes: closure, cliques, oriented boundaries, relabelling, and a few triangulated spaces.

A k-simplex is an increasing tuple of k+1 vertices. Complexes are built on the host with exact integers; a `Boundary` is
a PyTree of index and sign arrays of static shape, applied to arrays on the device under `jit` and `vmap` without a
dense n² matrix.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Complex:
  """A simplicial complex.

  Args:
    simplices: per dimension k an int array [n_k, k+1] of increasing vertex rows in lexicographic order, without
      repetition. `build_complex` and `flag_complex` make them.

  Raises:
    ValueError: rows out of order or repeated, or a face that is missing.
  """

  simplices: tuple[np.ndarray, ...]

  def __post_init__(self):
    for k, rows in enumerate(self.simplices):
      if rows.ndim != 2 or rows.shape[1] != k + 1:
        raise ValueError(f"level {k} has shape {rows.shape}; a {k}-simplex has {k + 1} vertices")
      ordered = sorted({tuple(sorted(set(row))) for row in rows.tolist()})
      if [tuple(row) for row in rows.tolist()] != ordered:
        raise ValueError(f"level {k} is not a sorted list of distinct increasing rows; use build_complex")
    for k in range(1, len(self.simplices)):
      known = set(map(tuple, self.simplices[k - 1].tolist()))
      for row in self.simplices[k].tolist():
        missing = next((face for face in _faces(row) if face not in known), None)
        if missing is not None:
          raise ValueError(f"not closed: {missing}, a face of {tuple(row)}, is not in the complex")

  @property
  def dim(self) -> int:
    """Largest dimension that has a level; -1 for the empty complex."""
    return len(self.simplices) - 1

  @property
  def sizes(self) -> tuple[int, ...]:
    """Number of simplices in each dimension."""
    return tuple(len(rows) for rows in self.simplices)

  def size(self, k: int) -> int:
    """n_k, 0 beyond both ends."""
    return self.sizes[k] if 0 <= k <= self.dim else 0

  def check_level(self, k: int) -> None:
    """Raises `ValueError` unless 0 <= k <= dim."""
    if not 0 <= k <= self.dim:
      raise ValueError(f"k={k} is outside 0..{self.dim}, the dimensions of this complex")

  def index(self, k: int) -> dict[tuple[int, ...], int]:
    """Position of every k-simplex in its level."""
    self.check_level(k)
    return {tuple(row): i for i, row in enumerate(self.simplices[k].tolist())}


def build_complex(maximal: Iterable[Sequence[int]], max_dim: int | None = None) -> Complex:
  """The smallest complex that contains `maximal`, cut off above `max_dim`.

  Vertices may come in any order and repeated; (2, 0, 2) is the edge (0, 2).

  >>> build_complex([(2, 0, 1), (3, 1)]).sizes
  (4, 4, 1)
  """
  levels: list[set[tuple[int, ...]]] = []
  for given in maximal:
    vertices = sorted({int(v) for v in given})
    top = len(vertices) if max_dim is None else min(len(vertices), max_dim + 1)
    levels += [set() for _ in range(top - len(levels))]
    for size in range(1, top + 1):
      levels[size - 1].update(itertools.combinations(vertices, size))
  return _from_sets(levels)


def flag_complex(adjacency: np.ndarray, max_dim: int) -> Complex:
  """The clique complex of a graph: every set of up to `max_dim`+1 pairwise adjacent vertices is a simplex.

  Args:
    adjacency: [n, n], symmetric; the diagonal is ignored. Isolated vertices stay.

  Raises:
    ValueError: a matrix that is not square and symmetric, or `max_dim` < 0.

  >>> flag_complex(np.ones((4, 4)), 3).sizes
  (4, 6, 4, 1)
  """
  adjacency = np.asarray(adjacency).astype(bool)
  if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1] or not np.array_equal(adjacency, adjacency.T):
    raise ValueError(f"adjacency of shape {adjacency.shape} is not a symmetric square matrix")
  if max_dim < 0:
    raise ValueError(f"max_dim={max_dim} is negative")
  # Each clique is extended by common neighbours above its last vertex, so it is met once.
  later = [{w for w in np.flatnonzero(row).tolist() if w > v} for v, row in enumerate(adjacency)]
  level = [((v,), later[v]) for v in range(len(adjacency))]
  levels = []
  while level and len(levels) <= max_dim:
    levels.append({clique for clique, _ in level})
    level = [((*clique, w), common & later[w]) for clique, common in level for w in sorted(common)]
  return _from_sets(levels)


def _from_sets(levels: Sequence[set[tuple[int, ...]]]) -> Complex:
  rows = (np.array(sorted(level), np.int64).reshape(-1, k + 1) for k, level in enumerate(levels))
  return Complex(tuple(rows))


def _faces(row: Sequence[int]) -> list[tuple[int, ...]]:
  """The face that omits vertex m, for m = 0 .. k."""
  return [tuple(row[:m]) + tuple(row[m + 1 :]) for m in range(len(row))]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("faces", "signs"), meta_fields=("n_faces",))
@dataclasses.dataclass(frozen=True, eq=False)
class Boundary:
  """D_k: the column of simplex σ has `signs[σ, m]` in row `faces[σ, m]`, (-1)^m at the face without vertex m.

  Args:
    faces, signs: int32 [n_k, k+1]; for k = 0 they are [n_0, 0], so D_0 is the zero map to nothing.
    n_faces: n_{k-1}, static.
  """

  faces: jax.Array
  signs: jax.Array
  n_faces: int

  @property
  def shape(self) -> tuple[int, int]:
    return self.n_faces, self.faces.shape[0]

  def apply(self, x: jax.Array) -> jax.Array:
    """D_k x: [n_k, ...] -> [n_{k-1}, ...], in the dtype of x. Cost (k+1)·n_k additions per channel."""
    terms = _times(self.signs, jnp.broadcast_to(x[:, None], (*self.faces.shape, *x.shape[1:])))
    return jax.ops.segment_sum(terms.reshape(-1, *x.shape[1:]), self.faces.reshape(-1), self.n_faces)

  def transpose(self, y: jax.Array) -> jax.Array:
    """D_kᵀ y: [n_{k-1}, ...] -> [n_k, ...], a gather; the coboundary (gradient for k = 1, curl for k = 2)."""
    if not self.n_faces:
      return jnp.zeros((self.faces.shape[0], *y.shape[1:]), y.dtype)
    return jnp.sum(_times(self.signs, y[self.faces]), axis=1, dtype=y.dtype)

  def dense(self) -> np.ndarray:
    """The integer matrix [n_{k-1}, n_k], on the host."""
    matrix = np.zeros(self.shape, np.int64)
    np.add.at(matrix, (np.asarray(self.faces), np.arange(self.shape[1])[:, None]), np.asarray(self.signs))
    return matrix


def _times(signs: jax.Array, x: jax.Array) -> jax.Array:
  return x * signs.reshape(*signs.shape, *[1] * (x.ndim - signs.ndim)).astype(x.dtype)


def boundary(complex_: Complex, k: int) -> Boundary:
  """D_k of shape [n_{k-1}, n_k]; D_{k-1} D_k = 0. D_0 and D_{dim+1} exist and are empty.

  Raises:
    ValueError: k outside 0..dim+1.

  >>> triangle = build_complex([(0, 1, 2)])
  >>> boundary(triangle, 2).dense().T.tolist()
  [[1, -1, 1]]
  >>> (boundary(triangle, 1).dense() @ boundary(triangle, 2).dense()).any().item()
  False
  """
  if not 0 <= k <= complex_.dim + 1:
    raise ValueError(f"k={k} is outside 0..{complex_.dim + 1}, the boundaries of this complex")
  n, width = complex_.size(k), k + 1 if k else 0
  faces = np.zeros((n, width), np.int32)
  if n and k:
    index = complex_.index(k - 1)
    faces = np.array([[index[face] for face in _faces(row)] for row in complex_.simplices[k].tolist()], np.int32)
  signs = np.broadcast_to(np.where(np.arange(width) % 2, -1, 1), (n, width)).astype(np.int32)
  return Boundary(faces, signs, complex_.size(k - 1))


def boundaries(complex_: Complex) -> tuple[Boundary, ...]:
  """D_0 .. D_{dim+1}."""
  return tuple(boundary(complex_, k) for k in range(complex_.dim + 2))


def flip(D: Boundary, faces: np.ndarray, simplices: np.ndarray) -> Boundary:
  """S_{k-1} D_k S_k: orientations reversed where the ±1 vectors `faces` [n_{k-1}] and `simplices` [n_k] are -1."""
  signs = np.asarray(D.signs) * np.asarray(simplices)[:, None]
  if D.n_faces:
    signs = signs * np.asarray(faces)[np.asarray(D.faces)]
  return dataclasses.replace(D, signs=signs.astype(np.int32))


def relabel(complex_: Complex, new_labels: dict[int, int]) -> tuple[Complex, tuple[tuple[np.ndarray, np.ndarray], ...]]:
  """Renames vertices; a bijection whose image is the same complex is an automorphism.

  Returns:
    (complex, moves), where `moves[k] = (position, sign)`: simplex i of the old level k becomes simplex `position[i]` of
    the new one, with its orientation reversed where `sign[i]` is -1. With P_k e_i = sign_i e_{position_i} the new
    boundary is P_{k-1} D_k P_kᵀ.

  Raises:
    ValueError: two vertices with one new name.

  >>> _, moves = relabel(build_complex([(0, 1)]), {0: 1, 1: 0})
  >>> moves[1][1].tolist()
  [-1]
  """
  if len({new_labels[int(v)] for v in complex_.simplices[0].ravel()} if complex_.simplices else ()) < complex_.size(0):
    raise ValueError("two vertices get the same new name")
  images = [[tuple(new_labels[v] for v in row) for row in rows.tolist()] for rows in complex_.simplices]
  renamed = _from_sets([{tuple(sorted(row)) for row in level} for level in images])
  moves = []
  for k, level in enumerate(images):
    index = renamed.index(k)
    position = np.array([index[tuple(sorted(row))] for row in level], np.int32)
    moves.append((position, np.array([_parity(row) for row in level], np.int32)))
  return renamed, tuple(moves)


def _parity(row: Sequence[int]) -> int:
  """Sign of the permutation that sorts `row`."""
  inversions = sum(a > b for a, b in itertools.combinations(row, 2))
  return -1 if inversions % 2 else 1


def move(x: np.ndarray, position: np.ndarray, sign: np.ndarray) -> np.ndarray:
  """P x for one level of `relabel`: [n, ...] -> [n, ...]."""
  y = np.zeros_like(x)
  y[position] = x * sign.reshape(-1, *[1] * (x.ndim - 1))
  return y


def circle(n: int = 3) -> Complex:
  """The cycle of n >= 3 vertices. β = (1, 1)."""
  return build_complex([(i, (i + 1) % n) for i in range(n)])


def sphere(dim: int = 2) -> Complex:
  """The boundary of a simplex with dim+2 vertices. β_0 = β_dim = 1."""
  return build_complex(itertools.combinations(range(dim + 2), dim + 1))


def torus() -> Complex:
  """The torus on seven vertices, the fewest possible (Möbius, 1886). β = (1, 2, 1).

  >>> torus().sizes
  (7, 21, 14)
  """
  triangles = [((i + a) % 7, (i + b) % 7, (i + c) % 7) for i in range(7) for a, b, c in ((0, 1, 3), (0, 2, 3))]
  return build_complex(triangles)


def grid_torus(rows: int, columns: int) -> Complex:
  """A rows x columns grid (both >= 3) with opposite sides glued and each square cut; vertex r·columns + c."""
  at = lambda r, c: (r % rows) * columns + c % columns
  cells = itertools.product(range(rows), range(columns))
  triangles = [
    triangle
    for r, c in cells
    for triangle in (
      (at(r, c), at(r + 1, c), at(r + 1, c + 1)),
      (at(r, c), at(r, c + 1), at(r + 1, c + 1)),
    )
  ]
  return build_complex(triangles)


def projective_plane() -> Complex:
  """The real projective plane on six vertices: β = (1, 0, 0) over ℚ and (1, 1, 1) over 𝔽₂, and H_1(ℤ) = ℤ/2."""
  triangles = "012 023 034 045 051 124 235 341 452 513"
  return build_complex([tuple(map(int, triangle)) for triangle in triangles.split()])


def klein_bottle(rows: int = 4, columns: int = 4) -> Complex:
  """A rows x columns grid (both >= 4) glued with one twist: β = (1, 1, 0) over ℚ, (1, 2, 1) over 𝔽₂, torsion ℤ/2."""

  def at(r, c):
    return (r % rows) * columns + (c % columns if r // rows % 2 == 0 else -c % columns)

  triangles = []
  for r, c in itertools.product(range(rows), range(columns)):
    corners = at(r, c), at(r, c + 1), at(r + 1, c + 1), at(r + 1, c)
    triangles += [(corners[0], corners[1], corners[2]), (corners[0], corners[3], corners[2])]
  return build_complex(triangles)
