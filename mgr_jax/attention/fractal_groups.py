"""Work on a few rows and heads at a time, so that what exists per pair or per leaf stays a small part of the memory."""

import jax
import jax.numpy as jnp


def budget() -> int:
  """Numbers per array of a step that keep a device busy: on CPU more only overflows the cache."""
  return 2**17 if jax.default_backend() == "cpu" else 2**25


def group_shape(B: int, K: int, cells: int, limit: int) -> tuple[int, int]:
  """Largest (rows, heads) per step with rows·heads·cells within `limit`: whole rows, else some heads of one row."""
  fits = lambda n, other: n == 1 or n * other * cells <= limit
  rows = max(n for n in range(1, B + 1) if B % n == 0 and fits(n, K))
  heads = K if rows > 1 else max(n for n in range(1, K + 1) if K % n == 0 and fits(n, 1))
  return rows, heads


def map_groups(f, cells: int, per_cell, per_head=None, per_row=None):
  """`f(per_cell, per_head, per_row)` over groups of rows and heads, one after the other.

  Args:
    f: returns (tree of [b, h, ...], tree of [h, ...]); the first is put together, the second summed over rows.
    cells: numbers per row and head in the largest array that `f` makes.
    per_cell: tree of [B, K, ...].
    per_head: tree of [K, ...].
    per_row: tree of [B, ...].
  """
  B, K = jax.tree.leaves(per_cell)[0].shape[:2]
  b, h = group_shape(B, K, cells, budget())
  if (b, h) == (B, K):
    return f(per_cell, per_head, per_row)
  grid = B // b, K // h

  def of_head(x):
    x = jnp.broadcast_to(x.reshape(1, grid[1], h, *x.shape[1:]), (*grid, h, *x.shape[1:]))
    return x.reshape(-1, *x.shape[2:])

  def of_row(x):
    x = jnp.broadcast_to(x.reshape(grid[0], 1, b, *x.shape[1:]), (*grid, b, *x.shape[1:]))
    return x.reshape(-1, *x.shape[2:])

  of_cell = lambda x: x.reshape(-1, b, h, *x.shape[2:])
  groups = jax.tree.map(of_cell, per_cell), jax.tree.map(of_head, per_head), jax.tree.map(of_row, per_row)
  cell, head = jax.lax.map(lambda group: f(*group), groups)
  return (
    jax.tree.map(lambda x: x.reshape(B, K, *x.shape[3:]), cell),
    jax.tree.map(lambda x: jnp.sum(x.reshape(*grid, *x.shape[1:]), 0).reshape(K, *x.shape[2:]), head),
  )
