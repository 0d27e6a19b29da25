"""One interface to rotations of a head's channels: angles (b = 2), unit quaternions (3, 4), matrices (6, 8).

A head of D channels is n = D/b blocks; block i holds the channels i, n + i, 2n + i, ..., so that a vector [..., D] is
[..., b, n] with the blocks innermost.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra import lie
from mgr_jax.algebra.lie_prefix import prefix_product
from mgr_jax.attention import gauge_quaternions as quaternions
from mgr_jax.attention.gauge_chain import Chain, Setting
from mgr_jax.attention.gauge_documents import restarted


class Fibre(NamedTuple):
  """One representation of SO(b)^n. Rotations are trees of arrays, a frame holds one per block.

  Attributes:
    frames: `(a, chain, setting) -> F`, T_t = U_t ··· U_0 · start with U = base · exp(a), a [B, T, K, b(b-1)/2, n] with
      blocks no longer than theta_max.
    pull: `(F, vectors) -> vectors` with T_tᵀ w for every array w [B, T, K, R, D] of the tuple.
    push: the same with T_t w.
    rotation: `F -> rotations` [B, T, K], what a start is made of.
    base: coordinates above the diagonal [b(b-1)/2, n] -> rotation.
    identity: `(batch, heads, n) -> rotations` [B, K].
    matrix: `rotations -> [..., n, b, b]`.
    coordinates: `a` in terms of the entries above the diagonal, row by row: an orthogonal change.
  """

  frames: Callable
  pull: Callable
  push: Callable
  rotation: Callable
  base: Callable
  identity: Callable
  matrix: Callable
  coordinates: Callable = lambda a: a


def fibre(b: int) -> Fibre:
  """The representation for blocks of b channels."""
  if b == 2:
    return ANGLES
  return _quaternions(b) if b in (3, 4) else _matrices(b)


def blocks(w: jax.Array, b: int) -> jax.Array:
  """[..., D] -> [..., b, n], in float32 or better."""
  return w.astype(jnp.promote_types(w.dtype, jnp.float32)).reshape(*w.shape[:-1], b, -1)


def merged(x: jax.Array, like: jax.Array) -> jax.Array:
  """Inverse of `blocks`, in the dtype of `like`."""
  return x.reshape(like.shape).astype(like.dtype)


def _masked(U, valid_BT, one):
  return U if valid_BT is None else jnp.where(valid_BT.reshape(*valid_BT.shape, *[1] * (U.ndim - 2)), U, one)


def _angle_sums(a, chain: Chain, setting: Setting):
  """b = 2: a rotation is its angle, exp [[0, a], [-a, 0]] = [[cos a, sin a], [-sin a, cos a]]; products are sums."""
  del setting
  U = a[..., 0, :] if chain.base is None else a[..., 0, :] + chain.base
  T = jnp.cumsum(_masked(U, chain.valid_BT, 0), axis=1)
  if chain.start is not None:
    T += chain.start[:, None]
  if chain.segment_ids_BT is not None:
    T = restarted(T, chain.segment_ids_BT, jnp.add, jnp.negative)
  return T


def _turned(angle, vectors):
  cos, sin = jnp.cos(angle)[:, :, :, None], jnp.sin(angle)[:, :, :, None]

  def one(w):
    x, y = (blocks(w, 2)[..., i, :] for i in range(2))
    return merged(jnp.concatenate([cos * x + sin * y, cos * y - sin * x], -1), w)

  return tuple(map(one, vectors))


ANGLES = Fibre(
  frames=_angle_sums,
  pull=lambda T, vectors: _turned(-T, vectors),
  push=_turned,
  rotation=lambda T: T,
  base=lambda a: a[0],
  identity=lambda batch, heads, n: jnp.zeros((batch, heads, n)),
  matrix=lambda U: lie.exp_so2(U[..., None]),
)


def _quaternions(b: int) -> Fibre:
  return Fibre(
    frames=quaternions.frames,
    pull=functools.partial(quaternions.pull, b=b),
    push=functools.partial(quaternions.push, b=b),
    rotation=lambda F: F.rotation,
    base=quaternions.base_rotation,
    identity=functools.partial(quaternions.start_rotation, b),
    matrix=functools.partial(quaternions.matrices, b=b),
    coordinates=quaternions.matrix_coordinates,
  )


def _matrices(b: int) -> Fibre:
  one = lambda *shape: jnp.broadcast_to(jnp.eye(b), (*shape, b, b))

  def frames(a, chain: Chain, setting: Setting):
    U = lie.exp_so(jnp.swapaxes(a, -1, -2), b, setting.theta_max)
    if chain.base is not None:
      U = lie.matmul(chain.base, U)
    U = _masked(U, chain.valid_BT, jnp.eye(b, dtype=U.dtype))
    T = prefix_product(U, chain.start, setting.scan, axis=1, reorthogonal=setting.reorthogonal)
    if chain.segment_ids_BT is not None:
      T = restarted(T, chain.segment_ids_BT, lie.matmul, lambda U: jnp.swapaxes(U, -1, -2))
    return T

  def turn(T, vectors, transpose):
    M = jnp.swapaxes(T, -1, -2) if transpose else T

    def one(w):
      x = jnp.swapaxes(blocks(w, b), -1, -2)
      return merged(jnp.swapaxes(jnp.einsum("btknij,btkrnj->btkrni", M, x, precision="highest"), -1, -2), w)

    return tuple(map(one, vectors))

  return Fibre(
    frames=frames,
    pull=functools.partial(turn, transpose=True),
    push=functools.partial(turn, transpose=False),
    rotation=lambda T: T,
    base=lambda a: lie.exp_so(a.T, b, math.sqrt(b / 2)),
    identity=one,
    matrix=lambda U: U,
  )
