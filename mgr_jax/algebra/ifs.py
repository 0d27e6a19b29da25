"""Iterated function systems: m affine contractions f_i(x) = A_i x + t_i of R^d, their attractor and its dimension.

The Hutchinson operator F(S) = ∪ f_i(S) contracts the Hausdorff distance of compact sets by s = max |A_i|, so exactly
one compact set A = F(A) exists and every set is drawn to it (Hutchinson, 1981, Fractals and self-similarity).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Maps(NamedTuple):
  """Affine maps: `linear` [m, d, d] and `offset` [m, d]."""

  linear: jax.Array
  offset: jax.Array


def similarities(ratios, offsets) -> Maps:
  """f_i(x) = s_i x + t_i from ratios [m] and offsets [m, d]."""
  offsets = jnp.asarray(offsets)
  return Maps(jnp.asarray(ratios)[:, None, None] * jnp.eye(offsets.shape[-1]), offsets)


def sierpinski() -> Maps:
  """The Sierpinski triangle: three halvings towards the corners of a triangle; dimension log 3 / log 2."""
  corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
  return similarities(np.full(3, 0.5), corners / 2)


FERN_PROBABILITIES = (0.01, 0.85, 0.07, 0.07)


def barnsley_fern() -> Maps:
  """The fern of Barnsley, 1988, Fractals Everywhere; draw its maps with `FERN_PROBABILITIES`."""
  rows = [
    [0, 0, 0, 0.16, 0, 0],
    [0.85, 0.04, -0.04, 0.85, 0, 1.6],
    [0.2, -0.26, 0.23, 0.22, 0, 1.6],
    [-0.15, 0.28, 0.26, 0.24, 0, 0.44],
  ]
  table = np.array(rows)
  return Maps(jnp.asarray(table[:, :4].reshape(4, 2, 2)), jnp.asarray(table[:, 4:]))


def lipschitz(maps: Maps) -> jax.Array:
  """Largest singular value of each map [m]; all below 1 is what the theorems need."""
  return jnp.linalg.norm(maps.linear, 2, axis=(-2, -1))


def compose(maps: Maps, word: jax.Array) -> tuple[jax.Array, jax.Array]:
  """f_w = f_{i_1} ∘ ... ∘ f_{i_k} as (A [d, d], t [d]); i_1 is outermost. `word`: int [k]."""
  d = maps.offset.shape[-1]

  def prepend(total, i):
    A, t = total
    return (maps.linear[i] @ A, maps.linear[i] @ t + maps.offset[i]), None

  start = jnp.eye(d, dtype=maps.offset.dtype), jnp.zeros(d, maps.offset.dtype)
  return jax.lax.scan(prepend, start, word, reverse=True)[0]


def fixed_point(A: jax.Array, t: jax.Array) -> jax.Array:
  """x = A x + t."""
  return jnp.linalg.solve(jnp.eye(len(t), dtype=t.dtype) - A, t)


def hutchinson(maps: Maps, points: jax.Array) -> jax.Array:
  """F(S): the images of all points [n, d] under all maps, [m·n, d].

  >>> hutchinson(similarities([0.5, 0.5], [[0.0], [0.5]]), jnp.array([[0.0], [1.0]])).ravel().tolist()
  [0.0, 0.5, 0.5, 1.0]
  """
  images = jnp.einsum("mde,ne->mnd", maps.linear, points, precision="highest") + maps.offset[:, None]
  return images.reshape(-1, points.shape[-1])


def hausdorff(a: jax.Array, b: jax.Array) -> jax.Array:
  """max over both sets of the distance to the nearest point of the other (Euclidean); O(n·m) memory."""
  distance = jnp.linalg.norm(a[:, None] - b[None], axis=-1)
  return jnp.maximum(jnp.max(jnp.min(distance, 1)), jnp.max(jnp.min(distance, 0)))


def chaos_game(key: jax.Array, maps: Maps, chains: int, steps: int, probabilities=None, burn_in: int = 32) -> jax.Array:
  """Points of the attractor [chains·steps, d]: random maps applied one after another (Barnsley and Demko, 1985)."""
  m, d = maps.offset.shape
  weights = jnp.ones(m) / m if probabilities is None else jnp.asarray(probabilities)
  draws = jax.random.categorical(key, jnp.log(weights), shape=(burn_in + steps, chains))

  def step(x, i):
    x = jnp.einsum("cde,ce->cd", maps.linear[i], x, precision="highest") + maps.offset[i]
    return x, x

  _, path = jax.lax.scan(step, jnp.zeros((chains, d), maps.offset.dtype), draws)
  return path[burn_in:].reshape(-1, d)


def similarity_dimension(ratios) -> float:
  """D with Σ s_i^D = 1 (Moran, 1946), by bisection; equal ratios give log m / log(1/s).

  Raises:
    ValueError: a ratio outside (0, 1).

  >>> round(similarity_dimension([1 / 3, 1 / 3]), 4)  # The Cantor set: log 2 / log 3.
  0.6309
  """
  ratios = np.asarray(ratios, np.float64)
  if not np.all((ratios > 0) & (ratios < 1)):
    raise ValueError(f"ratios {ratios.tolist()} are not all inside (0, 1)")
  low, high = 0.0, np.log(len(ratios)) / -np.log(ratios.max()) + 1e-12
  for _ in range(100):
    middle = (low + high) / 2
    low, high = (middle, high) if np.sum(ratios**middle) > 1 else (low, middle)
  return float((low + high) / 2)


def box_counting_dimension(points, sizes) -> float:
  """Slope of log(occupied boxes) over log(1/size), by least squares over the given box sizes.

  >>> round(box_counting_dimension(np.linspace(0, 0.999, 1000)[:, None] * [1, 2], [1 / 4, 1 / 8, 1 / 16]), 6)
  1.0
  """
  points = np.asarray(points, np.float64)
  points = points - points.min(0)
  counts = []
  for size in sizes:
    box = np.floor(points / size).astype(np.int64)
    counts.append(len(np.unique(np.ravel_multi_index(box.T, box.max(0) + 1))))
  return float(np.polyfit(-np.log(np.asarray(sizes)), np.log(counts), 1)[0])
