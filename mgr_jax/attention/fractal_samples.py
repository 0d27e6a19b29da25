"""Random addresses and tokens on which the claims are measured."""

import numpy as np

from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_table import Sides

T, M, DEPTH = 150, 3, 3  # Neither a multiple of the tile nor of the chunk; 27 leaves.


def random_paths(rng, *shape, m=M, depth=DEPTH) -> np.ndarray:
  """Random distributions at every level, [*shape, depth·m]."""
  return rng.dirichlet(np.full(m, 0.5), (*shape, depth)).reshape(*shape, -1)


def random_sides(rng, options: Options, slopes: bool = True) -> Sides:
  """Random addresses and values, B = 1, K = 1, R = 2, D = 2."""
  alpha = rng.dirichlet(np.ones(DEPTH + 1), 1) if options.kernel == "prefix" else None
  slope = rng.uniform(0.01, 0.1, (1, 2)) if slopes else None
  q, k = random_paths(rng, 1, 1, 2, T), random_paths(rng, 1, 1, T)
  return Sides(q, k, rng.normal(size=(1, 1, T, 2)), alpha, slope, rng.uniform(size=(1, 1, T)))
