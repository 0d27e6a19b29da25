"""Discrete gates over quantised key scores: prefix sums over score levels in a Fenwick tree (Fenwick, 1994).

Level c stands for the score -M + (c + 1/2)·2M/bins. A query selects the levels above its threshold, a prefix in
descending order; both reading a prefix and adding a token touch log2(bins) + 1 nodes of the table [bins, D+1].
"""

import jax
import jax.numpy as jnp

from mgr_jax.attention.braid_chebyshev import with_ones


def levels(bins: int, bound: float, dtype=jnp.float32) -> jax.Array:
  """The scores of all levels, ascending."""
  return (-bound + (jnp.arange(bins) + 0.5) * (2 * bound / bins)).astype(dtype)


def level_of(b: jax.Array, bins: int, bound: float) -> jax.Array:
  """int32 number of the level whose cell contains b."""
  return jnp.clip(jnp.floor((b + bound) * (bins / (2 * bound))), 0, bins - 1).astype(jnp.int32)


def quantise(b: jax.Array, bins: int, bound: float) -> jax.Array:
  """The level's score, with the derivative of the identity."""
  return levels(bins, bound, b.dtype)[level_of(b, bins, bound)] + (b - jax.lax.stop_gradient(b))


def read_table(a_BTH: jax.Array, table_BKLE: jax.Array, bound: float, tau: float) -> tuple[jax.Array, jax.Array]:
  """Σ v [B, T, H, D] and number [B, T, H] of the table's tokens with a_i + level - τ > 0."""
  B, T, H = a_BTH.shape
  K, bins = table_BKLE.shape[1:3]
  shifted = levels(bins, bound, a_BTH.dtype) - tau
  selected = bins - jnp.searchsorted(shifted, -a_BTH, side="right")
  node = selected.reshape(B, T, K, H // K).transpose(0, 2, 1, 3).reshape(B, K, -1)
  total = jnp.zeros((B, K, node.shape[2], table_BKLE.shape[3]), table_BKLE.dtype)
  for _ in range(bins.bit_length()):
    row = jnp.take_along_axis(table_BKLE, jnp.maximum(node - 1, 0)[..., None], axis=2)
    total += jnp.where(node[..., None] > 0, row, 0.0)
    node = node & (node - 1)
  total = total.reshape(B, K, T, H // K, -1).transpose(0, 2, 1, 3, 4).reshape(B, T, H, -1)
  return total[..., :-1], total[..., -1]


def write_table(table_BKLE: jax.Array, b_BTK: jax.Array, v_BTKD: jax.Array, bound: float, valid_BT=None) -> jax.Array:
  """Adds the tokens to the table; padding leaves it as it was."""
  B, K, bins, _ = table_BKLE.shape
  node = bins - level_of(b_BTK, bins, bound)
  if valid_BT is not None:
    node = jnp.where(valid_BT[..., None], node, bins + 1)
  rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, None, :]
  values = with_ones(v_BTKD)
  for _ in range(bins.bit_length()):
    table_BKLE = table_BKLE.at[rows, heads, node - 1].add(values, mode="drop")
    node = node + (node & -node)
  return table_BKLE
