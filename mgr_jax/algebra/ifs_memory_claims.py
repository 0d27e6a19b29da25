"""Claims about the memory built on leaf addresses: it is an array, forgets by collision only, can be re-encoded."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import ifs_address, ifs_memory
from mgr_jax.algebra.ifs_map_claims import generator
from mgr_jax.claims import Check, claim, worst_of


@jax.jit
def _run_store(store, leaves, values, queries):
  def batch(store, xs):
    leaf, value, query = xs
    store = ifs_memory.write(store, leaf, value)
    return store, ifs_memory.read(store, query)

  return jax.lax.scan(batch, store, (leaves, values, queries))[1]


@jax.jit
def _corner_store():
  """Four maps of ratio 0.4 in three dimensions, 64 leaves."""
  offsets = ifs_address.corner_offsets(4, 3, jnp.float32(0.4)).astype(jnp.float32)
  return ifs_memory.empty_store(offsets, 0.4, 3)


_read = jax.jit(ifs_memory.read)


def _plain_dictionary(first_wins: bool) -> Check:
  """Largest difference from a dictionary after 10,000 random writes in batches with collisions, read after each."""

  def measure(key, scale):
    rng = generator(key)
    n, L = 100 * scale, 64
    leaves, queries = rng.integers(0, L, (2, n, 100))
    values = rng.uniform(-1, 1, (n, 100, 3)).astype(np.float32)
    found = np.asarray(_run_store(_corner_store(), leaves, values, queries))
    table = dict(enumerate(np.asarray(_read(_corner_store(), np.arange(L)))))
    worst = 0.0
    for batch in range(n):
      writes = list(zip(leaves[batch].tolist(), values[batch], strict=True))
      table |= dict(writes[::-1] if first_wins else writes)
      worst = worst_of(
        worst, float(np.max(np.abs(found[batch] - np.stack([table[leaf] for leaf in queries[batch].tolist()]))))
      )
    return worst

  return measure


@functools.partial(jax.jit, static_argnums=1)
def _intact(leaves_SN, L):
  """Share of writes that are still there at the end, per seed, measured by writing and reading."""
  values = jnp.arange(1, leaves_SN.shape[1] + 1, dtype=jnp.float32)[:, None]

  def one(leaves):
    store = ifs_memory.write(ifs_memory.empty_store(jnp.array([[0.0], [0.6]]), 0.4, L.bit_length() - 1), leaves, values)
    return jnp.mean((jnp.abs(ifs_memory.read(store, leaves) - values) < 0.4).astype(jnp.float32))

  return jax.vmap(one)(leaves_SN)


def _retention(uniform_law: bool) -> Check:
  """Distance of the measured retention from the law in standard errors, N = 256 and 1024 writes to 1024 leaves.

  Half of the cases address leaves with unequal probabilities; `uniform_law` predicts them as if they were equal.
  """

  def measure(key, scale):
    rng, worst, L = generator(key), 0.0, 1024
    even = np.full(L, 1 / L)
    skewed = rng.dirichlet(np.full(L, 0.3))
    for rho, writes in itertools.product((even, skewed), (256, 1024)):
      measured = np.asarray(_intact(rng.choice(L, (200 * scale, writes), p=rho).astype(np.int32), L), np.float64)
      predicted = ifs_memory.intact_fraction(writes, even if uniform_law else rho)
      worst = worst_of(worst, abs(measured.mean() - predicted) / (measured.std() / np.sqrt(len(measured))))
    return worst

  return measure


@jax.jit
def _reencoded(values, leaves, s, encode):
  store = ifs_memory.write(_corner_store(), leaves, values)
  deeper = ifs_memory.deepen(store)
  child = leaves * 4 + leaves % 3
  other = ifs_address.corner_offsets(4, 3, s)
  changed = ifs_memory.recode(store, other, s)
  careless = store._replace(offsets=other, s=s)
  moved = jnp.where(encode, ifs_memory.read(changed, leaves), ifs_memory.read(careless, leaves))
  error = lambda got: jnp.max(jnp.abs(got - ifs_memory.read(store, leaves)))
  return jnp.maximum(error(ifs_memory.read(deeper, child)), error(moved))


def _reencoding(encode: bool) -> Check:
  def measure(key, scale):
    rng = generator(key)
    leaves = rng.permutation(64).astype(np.int32)
    return float(_reencoded(rng.uniform(-1, 1, (64, 3)).astype(np.float32), leaves, jnp.float32(0.36), encode))

  return measure


CLAIMS = (
  claim(
    "fractal.store_is_an_array",
    "read(write(v)) = v: the store equals a plain dictionary under 10,000 writes with collisions, last write wins",
    _plain_dictionary(False),
    1e-6,
    _plain_dictionary(True),
  ),
  claim(
    "fractal.retention",
    "share of N writes still intact = (1/N) Σ_w (1 - (1-ρ_w)^N), in standard errors over 200 seeds",
    _retention(False),
    3.5,
    _retention(True),
  ),
  claim(
    "fractal.reencoding",
    "one more level, or another ratio with re-encoded payloads, changes no read; another ratio alone does",
    _reencoding(True),
    2e-6,
    _reencoding(False),
  ),
)
