"""Loops inside loops that are differentiated."""

import jax
import jax.numpy as jnp


def tied(numbers, data: jax.Array) -> jax.Array:
  """`numbers`, int32, as if they depended on `data`: plus the sum of none of its entries, which costs nothing.

  Differentiating a scan over layers moves out of it, and out of the loops inside, what depends on no layer. Masks and
  indices made from plain numbers would then be in memory for all turns of a loop at once, T×T for every head.
  """
  none = jax.lax.slice(data, (0,) * data.ndim, (0,) * data.ndim)
  return numbers + jnp.sum(none).astype(jnp.int32)
