"""Batches of dyadic numbers num/2^k in int32 arrays, with a flag where a result left the range."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MOST = 2**31 - 1


class DyadicArray(NamedTuple):
  """num/2^k in lowest terms, int32 [...] each; `overflow` marks entries whose exact value did not fit.

  An overflow is data and spreads through every operation, so that code under `jit` needs no exception: look at it once
  at the end.
  """

  num: jax.Array
  k: jax.Array
  overflow: jax.Array


def dyadic_array(num, k) -> DyadicArray:
  """num/2^k, reduced: |num| < 2^31, k >= 0; other entries are marked as overflow."""
  num, k = jnp.broadcast_arrays(jnp.asarray(num, jnp.int32), jnp.asarray(k, jnp.int32))
  return _reduced(num, k, (k < 0) | (num == -_MOST - 1))


def _reduced(num, k, overflow) -> DyadicArray:
  twos = jnp.where(num == 0, k, jax.lax.population_count((num & -num) - 1))
  shift = jnp.clip(twos, 0, jnp.maximum(k, 0))
  # A shift by the width of the type is undefined; 0 stays 0 under any smaller one.
  return DyadicArray(num >> jnp.minimum(shift, 31), k - shift, overflow)


def _raised(num, shift):
  """num·2^shift and whether that leaves the range, shift >= 0."""
  safe = jnp.minimum(shift, 30)
  lost = (num != 0) & ((shift > 30) | (jnp.abs(num) > (_MOST >> safe)))
  return jnp.where(lost, 0, num << safe), lost


def add(a: DyadicArray, b: DyadicArray) -> DyadicArray:
  """a + b, elementwise."""
  k = jnp.maximum(a.k, b.k)
  x, lost_x = _raised(a.num, k - a.k)
  y, lost_y = _raised(b.num, k - b.k)
  lost = jnp.where(y >= 0, x > _MOST - y, x < -_MOST - y)
  return _reduced(x + y, k, a.overflow | b.overflow | lost_x | lost_y | lost)


def negative(a: DyadicArray) -> DyadicArray:
  """-a."""
  return a._replace(num=-a.num)


def multiply(a: DyadicArray, b: DyadicArray) -> DyadicArray:
  """a·b, elementwise."""
  lost = jnp.abs(a.num) > _MOST // jnp.maximum(jnp.abs(b.num), 1)
  return _reduced(a.num * b.num, a.k + b.k, a.overflow | b.overflow | lost)


def compare(a: DyadicArray, b: DyadicArray) -> tuple[jax.Array, jax.Array]:
  """The sign of a - b in {-1, 0, 1}, int32, and the flag of entries for which a or b, or a - b, left the range."""
  difference = add(a, negative(b))
  return jnp.sign(difference.num), difference.overflow
