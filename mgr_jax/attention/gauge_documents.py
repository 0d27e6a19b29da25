"""Packed documents: where a running product restarts, and where a sum over later tokens ends."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def first_tokens(segment_ids_BT: jax.Array) -> jax.Array:
  """True where a document begins after another one."""
  return jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))


def restarted(T, segment_ids_BT: jax.Array, multiply: Callable, inverse: Callable):
  """T_t T⁻¹ of the last token before the document of t, for a tree of arrays [B, T, ...]."""
  start = jax.lax.cummax(jnp.where(first_tokens(segment_ids_BT), jnp.arange(segment_ids_BT.shape[1]), 0), axis=1)
  rows, last = jnp.arange(start.shape[0])[:, None], jnp.maximum(start - 1, 0)
  since = multiply(T, inverse(jax.tree.map(lambda x: x[rows, last], T)))
  begun = lambda x: (start > 0).reshape(*start.shape, *[1] * (x.ndim - 2))
  return jax.tree.map(lambda x, y: jnp.where(begun(x), x, y), since, T)


def sum_from(x, segment_ids_BT: jax.Array | None):
  """Σ x_t over t >= s in the document of s, for a tree of arrays [B, T, ...]."""
  sums = jax.tree.map(lambda x: jax.lax.cumsum(x, 1, reverse=True), x)
  if segment_ids_BT is None:
    return sums
  B, length = segment_ids_BT.shape
  begins = jnp.where(first_tokens(segment_ids_BT), jnp.arange(length), length)[:, 1:]
  following = jax.lax.cummin(jnp.pad(begins, ((0, 0), (0, 1)), constant_values=length), axis=1, reverse=True)
  rows = jnp.arange(B)[:, None]
  return jax.tree.map(lambda s: s - s.at[rows, following].get(mode="fill", fill_value=0), sums)
