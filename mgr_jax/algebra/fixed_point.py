"""Fixed-point numbers in int32: the integer Z stands for Z·2^-f, with addition that wraps around.

Adding any function of one integer array to another, Z1 <- Z1 + round(2^f F(Z2·2^-f)), is a bijection of Z/2³²
whatever F is, overflow included, and subtraction undoes it bit for bit (MacKay et al., 2018, arXiv 1810.10999).
"""

import jax
import jax.numpy as jnp

LIMIT = 2.0**31


def to_fixed(x: jax.Array, frac_bits: int) -> jax.Array:
  """round(x·2^f) to int32, half to even. Values beyond ±2^(31-f) saturate, NaN gives 0: the same on every machine.

  >>> to_fixed(jnp.array([0.5, -0.25, 1e9]), 2).tolist()
  [2, -1, 2147483647]
  """
  scaled = jnp.round(x.astype(_real(x)) * 2.0**frac_bits)
  inside = jnp.abs(scaled) < LIMIT
  whole = jnp.where(inside, scaled, 0).astype(jnp.int32)
  edge = jnp.where(scaled > 0, jnp.int32(2**31 - 1), jnp.int32(-(2**31)))
  return jnp.where(inside | jnp.isnan(scaled), whole, edge)


def from_fixed(z: jax.Array, frac_bits: int, dtype=jnp.float32) -> jax.Array:
  """Z·2^-f, rounded to the nearest number of `dtype`: float32 drops up to 8 low bits of a large Z."""
  return z.astype(dtype) * jnp.asarray(2.0**-frac_bits, dtype)


def add(a: jax.Array, b: jax.Array) -> jax.Array:
  """a + b in Z/2³²; both int32.

  Raises:
    TypeError: another dtype, which would saturate, round or widen.

  >>> largest, one = jnp.int32(2**31 - 1), jnp.int32(1)
  >>> add(largest, one).item(), subtract(add(largest, one), one).item()
  (-2147483648, 2147483647)
  """
  _check(a, b)
  return jax.lax.add(a, b)


def subtract(a: jax.Array, b: jax.Array) -> jax.Array:
  """a - b in Z/2³², the inverse of `add`. Raises `TypeError` unless both are int32."""
  _check(a, b)
  return jax.lax.sub(a, b)


def _check(a, b):
  if a.dtype != jnp.int32 or b.dtype != jnp.int32:
    raise TypeError(f"fixed-point addition wraps around in int32, not in {a.dtype} and {b.dtype}")


@jax.custom_jvp
def with_gradient_of(value: jax.Array, carrier: jax.Array) -> jax.Array:
  """`value`, bit for bit, with the derivative of `carrier`: the straight-through estimator.

  Both have one shape and dtype. `x + stop_gradient(value - x)` would round.
  """
  del carrier
  return value


@with_gradient_of.defjvp
def _straight_through(primals, tangents):
  return with_gradient_of(*primals), tangents[1]


def quantize(x: jax.Array, frac_bits: int) -> jax.Array:
  """x rounded to the grid 2^-f, with the gradient of the identity.

  >>> quantize(jnp.float32(0.3), 2).item(), jax.grad(quantize)(0.3, 2).item()
  (0.25, 1.0)
  """
  return with_gradient_of(from_fixed(to_fixed(x, frac_bits), frac_bits, x.dtype), x)


def _real(x):
  return jnp.promote_types(x.dtype, jnp.float32)
