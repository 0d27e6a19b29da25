"""Random cases for claims about tropical attention, and the same attention computed in other ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.tropical_claims import distance
from mgr_jax.attention.tropical_matrix import matrix_attention
from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_scan import Clock, Plan, maxplus_attention
from mgr_jax.attention.tropical_streaming import streaming_attention
from mgr_jax.attention.tropical_tiles import reference_attention, tiled_attention

REBASE = 16
DEFAULT = Options()


def draw(rng, T: int = 24, D: int = 8, B: int = 1, K: int = 2, R: int = 1, integers: bool = False):
  """q [T, B, K, R, D], k [T, B, K, D], v [T, B, K, D] in float64 (callers narrow), small integers if asked for."""
  shapes = (T, B, K, R, D), (T, B, K, D), (T, B, K, D)
  if integers:
    return tuple(rng.integers(-3, 4, s).astype(float) for s in shapes)
  return tuple(rng.normal(size=s) for s in shapes)


def clock(T: int, B: int = 1, cut: int = 0) -> Clock:
  """One document, or two that meet at `cut`."""
  position = np.arange(T)
  position = np.where(position < cut, position, position - cut) if cut else position
  position = np.broadcast_to(position[:, None], (T, B)).astype(np.int32)
  return Clock(position, position == 0)


def with_score(v):
  """Values with a column of zeros, whose output is the largest score."""
  return jnp.concatenate([v, jnp.zeros_like(v[..., :1])], -1)


def centred(y):
  """Outputs minus the largest score."""
  return y[..., :-1] - y[..., -1:]


@functools.partial(jax.jit, static_argnums=5)
def by_scan(q, k, v, decay, clock, chunk=10**6):
  return maxplus_attention(q, k, v, decay, clock, Plan(chunk, REBASE))


@jax.jit
def by_streaming(q, k, v, decay, clock, beta):
  return streaming_attention(q, k, v, decay, beta, clock, REBASE)


def _batch_first(q, k, v):
  """The layout of tiles: q [B, K, R, T, D], k and v [B, K, T, D]."""
  return jnp.moveaxis(q, 0, 3), jnp.moveaxis(k, 0, 2), jnp.moveaxis(v, 0, 2)


def _segments(clock):
  return jnp.cumsum(clock.starts.T, 1)


@functools.partial(jax.jit, static_argnums=6)
def by_matrix(q, k, v, decay, clock, beta, chunk=16):
  y = matrix_attention(*_batch_first(q, k, v), decay, jnp.asarray(beta, q.dtype), clock.starts.T, chunk)
  return jnp.moveaxis(y, 3, 0)


@functools.partial(jax.jit, static_argnums=5)
def by_tiles(q, k, v, decay, clock, opts=DEFAULT):
  y = tiled_attention(*_batch_first(q, k, v), decay, clock.position.T, _segments(clock), opts)
  return jnp.moveaxis(y, 3, 0)


@functools.partial(jax.jit, static_argnums=6)
def by_definition(q, k, v, decay, clock, beta=None, opts=DEFAULT):
  y = reference_attention(*_batch_first(q, k, v), decay, clock.position.T, _segments(clock), opts, beta)
  return jnp.moveaxis(y, 3, 0)


@jax.jit
def unmasked(q, k, v):
  """The bracket q ⊗ (⊕_s k_s ⊗ v_s) over all tokens: not causal."""
  U = jnp.max(k[..., :, None] + v[..., None, :], 0)
  return jnp.max(q[..., :, None] + U[..., None, :, :], -2)


def pulled_back(f, args, cotangent):
  """Value and gradient of <f, cotangent>."""
  value, pull = jax.vjp(f, *args)
  return value, pull(cotangent)


def leaf_distance(x, y) -> float:
  """Largest absolute difference of two equally shaped trees."""
  return max(jax.tree.leaves(jax.tree.map(distance, x, y)))
