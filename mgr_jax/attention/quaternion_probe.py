"""Diagnostics of `quaternion`."""

import jax
import jax.numpy as jnp

from mgr_jax.attention.mechanism import group_heads
from mgr_jax.attention.quaternion_transport import blocks
from mgr_jax.attention.tiles import segment_axes, visible

SAMPLED = 64  # queries at the end of the first row whose weights are formed
QUANTILES = (0.1, 0.5, 0.9)


def diagnostics(params, given, out_BTHD, ctx, opts) -> dict[str, jax.Array]:
  """Float32 scalars and small arrays.

  Over the last 64 queries of the first row, weighted by attention: `alignment`, the mean of Re q̂ k̂*; `angle`, the
  quantiles 0.1, 0.5, 0.9 of arccos Re q̂ k̂*, radians, the angle by which `left` turns a block; `coherence`, the mean
  of |y| / Σ p |v| (1 when all turned values agree, about 1/√n when n of them do not); `entropy` of the weights, nats.
  Of the whole batch: `degenerate`, the share of blocks without a direction; `real_share` of the energy of values;
  `strength` λ per key/value head; `output_rms`.
  """
  weight, seen = _weights(given, ctx)
  v = blocks(given.v.astype(jnp.float32))
  energy = jnp.mean(v * v, (0, 1, 2, 4))
  out = out_BTHD.astype(jnp.float32)
  aux = {
    "entropy": -jnp.mean(jnp.sum(jnp.where(seen, weight * jnp.log(jnp.maximum(weight, 1e-30)), 0.0), -1)),
    "real_share": energy[0] / jnp.maximum(jnp.sum(energy), 1e-30),
    "output_rms": jnp.sqrt(jnp.mean(out * out)),
  }
  if opts.rotor_action != "none":
    aux |= _rotors(given, out, weight)
  if opts.rotor_strength == "learned":
    aux["strength"] = jax.nn.sigmoid(params["lam_raw"])
  return jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(jnp.float32), aux)


def _sample(x_BTHD, n_kv_head: int):
  """The last queries of the first row, [K, R, t, D], float32."""
  return group_heads(x_BTHD[:1, -SAMPLED:], n_kv_head)[0].astype(jnp.float32)


def _weights(given, ctx):
  """Attention weights of the sampled queries and the mask, [K, R, t, S]."""
  T = given.k.shape[1]
  q, k = _sample(given.q, given.k.shape[2]), given.k[0].astype(jnp.float32)
  place = jnp.arange(T)
  segments = (None, None)
  if ctx.segment_ids_BT is not None:
    segments = tuple(x[0] for x in segment_axes(ctx.segment_ids_BT[:1, -SAMPLED:], ctx.segment_ids_BT[:1]))
  mask = visible(place[-SAMPLED:, None], place, 0, *segments)
  scores = jnp.einsum("krtd,skd->krts", q, k, precision="highest") * q.shape[-1] ** -0.5
  weight = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
  return weight, jnp.broadcast_to(mask, weight.shape)


def _rotors(given, out_BTHD, weight):
  K = given.k.shape[2]
  length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), -2))
  q, k = blocks(_sample(given.q_rotor, K)), blocks(given.k_rotor[0].astype(jnp.float32))
  unit = lambda x: x / jnp.maximum(length(x), 1e-6)[..., None, :]
  real = jnp.clip(jnp.einsum("krtcn,skcn->krtsn", unit(q), unit(k), precision="highest"), -1, 1)
  share = jnp.broadcast_to(weight[..., None] / weight[..., :1, 0].size, real.shape) / real.shape[-1]
  angle, mass = jax.lax.sort((jnp.arccos(real).reshape(-1), share.reshape(-1)), num_keys=1)
  below = jnp.cumsum(mass)
  at = jnp.searchsorted(below / below[-1], jnp.array(QUANTILES))
  v_length = length(blocks(given.v[0].astype(jnp.float32)))
  bound = jnp.einsum("krts,skn->krtn", weight, v_length)
  coherence = length(blocks(_sample(out_BTHD, K))) / jnp.maximum(bound, 1e-30)
  no_direction = jnp.concatenate(
    [length(blocks(x.astype(jnp.float32))).reshape(-1) for x in (given.q_rotor, given.k_rotor)]
  )
  return {
    "alignment": jnp.sum(real * share) / below[-1],
    "angle": angle[jnp.minimum(at, angle.size - 1)],
    "coherence": jnp.mean(coherence),
    "degenerate": jnp.mean((no_direction**2 <= 1e-12).astype(jnp.float32)),
  }
