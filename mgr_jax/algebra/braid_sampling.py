"""Random words, states and equal words for claims about braids, and the residual that a claim reports."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import braid
from mgr_jax.claims import Check

Sample = Callable[[np.random.Generator, int], tuple]


@functools.cache
def _compiled(residual: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  return jax.jit(jax.vmap(residual))


def _host() -> jax.Device | None:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    return None


def worst(sample: Sample, residual: Callable[..., jax.Array], count: int = 64, double: bool = True) -> Check:
  """The largest residual over count·scale cases. Cases are drawn by numpy from the key: nothing to compile for them.

  A law and its broken twin that differ only in what `sample` returns share one compiled residual. Runs on the host's
  CPU where there is one: not every accelerator has double precision, and the cases are tiny.
  """

  def measure(key: jax.Array, scale: int) -> float:
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    with jax.enable_x64(double), jax.default_device(_host()):
      return float(jnp.max(_compiled(residual)(*sample(rng, count * scale))))

  return measure


def distance(x, y) -> jax.Array:
  """Largest absolute difference of two PyTrees."""
  return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(lambda p, q: jnp.max(jnp.abs(p - q)) * 1.0, x, y))))


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
  """Floats that hold small integers, so that sums of them are exact."""
  return rng.integers(-99, 100, shape).astype(float)


def letters(rng: np.random.Generator, count: int, length: int, n: int) -> np.ndarray:
  """Random words [count, length] on n strands."""
  shape = count, length
  return (rng.integers(1, n, shape) * rng.choice((-1, 1), shape)).astype(np.int32)


def additive(rng: np.random.Generator, count: int, n: int) -> tuple[braid.Strands]:
  """A 1-tuple with the states [count, n, 3] of n strands."""
  return (braid.Strands(rng.normal(size=(count, n, 3)), rng.normal(size=(count, n, 3))),)


def exact_additive(rng: np.random.Generator, count: int, n: int = 3) -> tuple[braid.Strands]:
  """As `additive`, with integer values."""
  return (braid.Strands(integers(rng, count, n, 3), integers(rng, count, n, 3)),)


@functools.partial(jax.jit, static_argnums=2)
def _rewritten(key: jax.Array, words: jax.Array, n: int) -> jax.Array:
  return jax.vmap(lambda k, w: braid.rewrite(k, w, n, 40))(jax.random.split(key, len(words)), words)


def equal_words(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Words on four strands and other words for the same braids, [count, 14] each."""
  words = np.pad(letters(rng, count, 10, 4), ((0, 0), (0, 4)))
  return words, np.asarray(_rewritten(jax.random.key(rng.integers(2**31)), words, 4))
