"""Message passing between the levels of a simplicial complex that conserves mass and commutes with orientation flips.

Each simplex holds signed features h and a mass m >= 0. Features move along boundaries and coboundaries; mass moves to
faces and cofaces in shares that depend on h² only, so reversing an orientation changes the sign of one row of h and
nothing else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra.simplicial import Boundary


class Levels(NamedTuple):
  """State of the mixer: per dimension k features [n_k, d] and masses [n_k]."""

  features: tuple[jax.Array, ...]
  masses: tuple[jax.Array, ...]


class Mixer(NamedTuple):
  """Parameters of n layers on K levels, stacked: `gate` [n, K, d, 3]; `own`, `down`, `up` [n, K, d, d]."""

  gate: jax.Array
  own: jax.Array
  down: jax.Array
  up: jax.Array


def init_mixer(key: jax.Array, n_layer: int, n_level: int, width: int) -> Mixer:
  """Normal parameters of variance 1/width; the gates start flatter."""
  keys = jax.random.split(key, 4)
  shapes = [(n_layer, n_level, width, 3)] + 3 * [(n_layer, n_level, width, width)]
  return Mixer(*(jax.random.normal(k, shape) * width**-0.5 for k, shape in zip(keys, shapes, strict=True)))


def shares(features: jax.Array, gate: jax.Array) -> jax.Array:
  """softmax over {stay, down, up} of h² W: [n, d], [d, 3] -> [n, 3]. Even in h."""
  return jax.nn.softmax(jnp.square(features) @ gate, axis=-1)


def transfer(boundaries: tuple[Boundary, ...], masses, gates) -> tuple[jax.Array, ...]:
  """Moves mass: a share goes in equal parts to the k+1 faces, another in equal parts to the cofaces, the rest stays.

  Σ_k Σ_σ m is conserved. A share with nowhere to go stays.

  Args:
    boundaries: D_0 .. D_K, as `simplicial.boundaries` gives them.
    masses: per level [n_k].
    gates: per level [n_k, 3], shares of (stay, down, up), rows summing to one.
  """
  moved = list(masses)
  for D, low in zip(boundaries[1:-1], range(len(masses) - 1), strict=True):
    high, (n, width) = low + 1, D.faces.shape
    cofaces = jax.ops.segment_sum(jnp.ones((n * width,), masses[low].dtype), D.faces.reshape(-1), D.n_faces)
    falls = masses[high] * gates[high][:, 1]
    rises = jnp.where(cofaces > 0, masses[low] * gates[low][:, 2], 0)
    spread = jnp.broadcast_to(falls[:, None] / width, (n, width)).reshape(-1)
    moved[high] += jnp.sum((rises / jnp.maximum(cofaces, 1))[D.faces], axis=1) - falls
    moved[low] += jax.ops.segment_sum(spread, D.faces.reshape(-1), D.n_faces) - rises
  return tuple(moved)


def increments(boundaries: tuple[Boundary, ...], features, down: jax.Array, up: jax.Array):
  """What each level receives from above, D_{k+1} h_{k+1} W_{k+1}, and from below, D_kᵀ h_{k-1} U_{k-1}.

  Each alone is closed: D_k kills the first and D_{k+1}ᵀ the second. Their sum is in neither image.

  Returns:
    (from_above, from_below), tuples over levels of [n_k, d]; zero where there is no such level.
  """
  zeros = [jnp.zeros_like(h) for h in features]
  top = len(features) - 1
  above = [boundaries[k + 1].apply(features[k + 1] @ down[k + 1]) if k < top else zeros[k] for k in range(top + 1)]
  below = [boundaries[k].transpose(features[k - 1] @ up[k - 1]) if k else zeros[k] for k in range(top + 1)]
  return tuple(above), tuple(below)


def mix(params: Mixer, state: Levels, boundaries: tuple[Boundary, ...]) -> Levels:
  """Runs all layers, h_k <- h_k + tanh(h_k W0 + D_{k+1} h_{k+1} W + D_kᵀ h_{k-1} U) with mass moving beside.

  Odd in h, and equivariant: relabelled or reoriented complex and state give the relabelled or reoriented result.

  Args:
    boundaries: D_0 .. D_{dim+1}; closed over or passed, their shapes are static.
  """

  def layer(state: Levels, p: Mixer):
    gates = [shares(h, gate) for h, gate in zip(state.features, p.gate, strict=True)]
    above, below = increments(boundaries, state.features, p.down, p.up)
    parts = zip(state.features, p.own, above, below, strict=True)
    features = tuple(h + jnp.tanh(h @ own + a + b) for h, own, a, b in parts)
    return Levels(features, transfer(boundaries, state.masses, gates)), None

  return jax.lax.scan(layer, state, params)[0]


def linear_readout(features, weights) -> jax.Array:
  """Σ_k Σ_σ c_σ·(h_σ w_k) with fixed coefficients c: odd in h, so it can only learn labels that are odd.

  Args:
    weights: per level (coefficients [n_k], w [d]).
  """
  return sum(c @ (h @ w) for h, (c, w) in zip(features, weights, strict=True))


def even_readout(features, weights) -> jax.Array:
  """Σ_k Σ_σ |h_σ W_k|² per output channel: [d_out], even in h and blind to orientation."""
  return sum(jnp.sum(jnp.square(h @ w), axis=0) for h, w in zip(features, weights, strict=True))
