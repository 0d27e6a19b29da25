"""Checksums of parameter trees: storage formats notice a missing file, not a flipped bit."""

import jax
import jax.numpy as jnp

from mgr_jax.params import leaf_names


def table(tree) -> dict[str, str]:
  """Leaf name -> `dtype[shape]`."""
  shapes = [f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(tree)]
  return dict(zip(leaf_names(tree), shapes, strict=True))


def fingerprints(tree) -> list[int]:
  """One 32-bit checksum per leaf, computed where the leaf lives. Storage formats check less than every bit."""
  return [int(mark) for mark in jax.device_get([_fingerprint(x) for x in jax.tree.leaves(tree)])]


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
  """Σ_i mix(bits_i XOR mix(i)) mod 2^32: a sum, so that it does not depend on how the array is sharded."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
  place = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  return jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
  """A bijection of 32-bit words in which every input bit moves half of the output bits (the MurmurHash3 finalizer)."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
