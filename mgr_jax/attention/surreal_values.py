"""Floating values: every token gives a direction u_s and a log-magnitude ℓ_s, mixed by leading order.

With scores a_ts: direction ū_t = Σ_s softmax_s(a_ts + ℓ_s) u_s, log-magnitude Λ_t = log Σ_s softmax_s(a_ts) e^ℓ_s. So
e^Λ ū = Σ_s softmax(a)_s e^ℓ_s u_s, and where one ℓ stands out ū is the direction of that token. Both come from one
ordinary attention over the values [e^ℓ u, e^ℓ] of width D + 1, in float32: |ℓ| <= 20 keeps them between 2e-9 and 5e8.
"""

import jax
import jax.numpy as jnp

from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.attention.tiles import segment_axes, visible
from mgr_jax.params import ParamSpec

MAX_LOG_MAGNITUDE = 20.0
MAX_GROWTH = 4.0


def value_specs(cfg) -> dict[str, ParamSpec]:
  """`wl` [C, K] gives log-magnitudes, `b` [H, D] carries Λ into the output; both start at zero."""
  K, H, D = cfg.n_kv_head, cfg.n_head, cfg.head_dim
  return {
    "wl": ParamSpec((cfg.n_embd, K), ("embed", "kv_heads"), role="scalar", init="zeros"),
    "b": ParamSpec((H, D), ("heads", "head_dim"), role="scalar", init="zeros"),
  }


def log_magnitudes(params, x_BTC: jax.Array) -> jax.Array:
  """ℓ [B, T, K] = x·wl cut off at ±20, float32."""
  z = x_BTC.astype(jnp.float32) @ params["wl"]
  return jnp.clip(z, -MAX_LOG_MAGNITUDE, MAX_LOG_MAGNITUDE)


def channels(v_BTKD: jax.Array, l_BTK: jax.Array) -> jax.Array:
  """[e^ℓ u, e^ℓ] with u = v/rms(v): float32 [B, T, K, D + 1]."""
  size = jnp.exp(l_BTK)[..., None]
  return jnp.concatenate([size * rms_norm(v_BTKD.astype(jnp.float32)), size], -1)


def leading(mixed: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(e^Λ ū, Λ) from attention over `channels`; the guard is far below e^-20 and only seen by queries of padding."""
  return mixed[..., :-1], jnp.log(jnp.maximum(mixed[..., -1], 1e-30))


def written(mixed_BTHD: jax.Array, b_HD: jax.Array) -> jax.Array:
  """e^clip(Λ, ±4) ū + Λ·b: up to a factor e^±4 the size is that of the mixture, beyond it only its logarithm grows."""
  mean, log_size = leading(mixed_BTHD)
  cut = jnp.clip(log_size, -MAX_GROWTH, MAX_GROWTH) - log_size
  return mean * jnp.exp(cut)[..., None] + log_size[..., None] * b_HD


def dense_channels(q, k, v, l, segment_ids_BT=None) -> jax.Array:
  """What attention over `channels` gives, from the definitions of ū and Λ and dense scores: [e^Λ ū, e^Λ].

  Shapes: q [B, K, R, T, D], k and v [B, K, S, D], l [B, K, S].
  """
  position = jnp.arange(q.shape[3])
  mask = visible(position[:, None], position[None, :], 0, *segment_axes(segment_ids_BT, segment_ids_BT))
  scores = q.shape[-1] ** -0.5 * jnp.einsum("bkrtd,bksd->bkrts", q, k, preferred_element_type=jnp.float32)
  direction, log_size = by_definition(jnp.where(mask, scores, -jnp.inf), rms_norm(v.astype(jnp.float32)), l)
  size = jnp.exp(log_size)[..., None]
  return jnp.concatenate([size * direction, size], -1)


def by_definition(scores, u, l) -> tuple[jax.Array, jax.Array]:
  """(ū, Λ) for scores [B, K, R, T, S], directions u [B, K, S, D] and log-magnitudes l [B, K, S], any |ℓ|."""
  tilted = scores + l[:, :, None, None, :]
  direction = jnp.einsum("bkrts,bksd->bkrtd", jax.nn.softmax(tilted, -1), u)
  return direction, jax.nn.logsumexp(tilted, -1) - jax.nn.logsumexp(scores, -1)
