"""A memory addressed by leaves of an iterated function system, and the law of what it retains.

A value v is stored at leaf w as the translation u_w = (1 - s^k) v - c_w and read as (c_w + u_w) / (1 - s^k) = v: the
geometry cancels, and the store is an array indexed by w. What survives is decided by addressing alone: a value is
intact until the next write to its leaf. Geometry remains in unwritten leaves: u_w = 0 reads as the fixed point of f_w.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.ifs_address import translation, word_of


class Store(NamedTuple):
  """Payload u [m^depth, d] and the scheme (offsets [m, d], ratio s) it was encoded with."""

  payload: jax.Array
  offsets: jax.Array
  s: jax.Array


def empty_store(offsets: jax.Array, s: float, depth: int) -> Store:
  """A store in which nothing is written."""
  m, d = offsets.shape
  return Store(jnp.zeros((m**depth, d), offsets.dtype), offsets, jnp.asarray(s, offsets.dtype))


def depth_of(store: Store) -> int:
  """k with m^k leaves."""
  return round(float(np.log(len(store.payload)) / np.log(len(store.offsets))))


def _translations(store, leaf):
  return translation(word_of(leaf, len(store.offsets), depth_of(store)), store.offsets, store.s)


def write(store: Store, leaf: jax.Array, values: jax.Array) -> Store:
  """Stores values [n, d] at leaves [n]; of several writes to one leaf the last wins, on every backend."""
  newest = jnp.full(len(store.payload), -1).at[leaf].max(jnp.arange(len(leaf)))
  payload = (1 - store.s ** depth_of(store)) * values - _translations(store, leaf)
  return store._replace(payload=jnp.where(newest[:, None] >= 0, payload[newest], store.payload))


def read(store: Store, leaf: jax.Array) -> jax.Array:
  """The values at leaves [n], or their fixed points where nothing was written.

  >>> store = empty_store(jnp.array([[0.0], [0.5]]), 0.5, depth=2)
  >>> store = jax.jit(write)(store, np.array([1, 1]), np.array([[7.0], [8.0]], np.float32))
  >>> jax.jit(read)(store, np.array([1, 3])).ravel().tolist()
  [8.0, 1.0]
  """
  return (_translations(store, leaf) + store.payload[leaf]) / (1 - store.s ** depth_of(store))


def recode(store: Store, offsets: jax.Array, s) -> Store:
  """The same values under another scheme; changing `s` or `offsets` alone would corrupt every one of them."""
  leaves = jnp.arange(len(store.payload))
  return write(Store(store.payload, offsets, jnp.asarray(s, store.payload.dtype)), leaves, read(store, leaves))


def deepen(store: Store) -> Store:
  """One more level: every leaf hands its value to its m children, so reads at any child return the parent's."""
  m = len(store.offsets)
  values = jnp.repeat(read(store, jnp.arange(len(store.payload))), m, axis=0)
  deeper = store._replace(payload=jnp.repeat(store.payload, m, axis=0))
  return write(deeper, jnp.arange(len(deeper.payload)), values)


def intact_fraction(writes: int, probabilities) -> float:
  """Expected share of N writes that no later write replaced: (1/N) Σ_w (1 - (1 - ρ_w)^N).

  >>> round(intact_fraction(256, np.full(256, 1 / 256)), 3)  # As many writes as leaves: about 1 - 1/e.
  0.633
  """
  rho = np.asarray(probabilities, np.float64)
  return float(np.sum(-np.expm1(writes * np.log1p(-rho))) / writes)


def utilisation(writes: int, leaves: int) -> float:
  """Expected share of uniformly addressed leaves in use: 1 - (1 - 1/L)^N.

  >>> round(utilisation(256, 256), 3)
  0.633
  """
  return float(-np.expm1(writes * np.log1p(-1 / leaves)))


def no_collision(writes: int, leaves: int) -> float:
  """Probability that N uniform writes hit N different leaves: Π (1 - i/L), about exp(-N²/2L).

  >>> round(no_collision(23, 365), 3)  # Birthdays.
  0.493
  """
  return float(np.exp(np.sum(np.log1p(-np.arange(min(writes, leaves)) / leaves)))) if writes <= leaves else 0.0
