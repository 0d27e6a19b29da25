"""The obvious form of LCP attention: all pairs. It is the reference, and mixes the few new tokens of a decode step."""

import jax
import jax.numpy as jnp

from mgr_jax.algebra.padic_kernel import horner, kernel_tile
from mgr_jax.attention.ultrametric_chunks import wide


def lcp_weights(a, b, c_GR, log_decay_G, seen, lag, local: bool = False):
  """κ_ts·λ^(t-s) on seen pairs, else 0: digits [B, G, R, K, p, t], [B, G, K, p, S] -> [B, G, R, t, S].

  Args:
    seen, lag: which pairs count, and t - s; broadcast to [B, G, R, t, S].
    local: the digits' gradient is that of the local estimator.
  """
  kernel = _local_kernel(a, b[:, :, None], c_GR) if local else kernel_tile(a, b[:, :, None], c_GR)
  if log_decay_G is not None:
    kernel *= jnp.exp(log_decay_G[:, None, None, None] * jnp.maximum(lag, 0))
  return jnp.where(seen, kernel, 0.0)


def _local_kernel(a, b, c):
  """The kernel of one-hot digits, whose derivative by m_j is c_j·1[digits before j agree]."""
  K = a.shape[-3]
  stop = jax.lax.stop_gradient
  weight = [c[..., d, None, None] for d in range(K + 1)]
  matches = [jnp.einsum("...it,...is->...ts", a[..., j, :, :], b[..., j, :, :]) for j in range(K)]
  kernel, agree = horner(weight, [stop(m) for m in matches]), 1.0
  for d, match in enumerate(matches, start=1):
    kernel += weight[d] * stop(agree) * (match - stop(match))
    agree = agree * stop(match)
  return kernel


def sums(weight, v_BSGD):
  """Numerator [B, G, R, t, D] and normaliser [B, G, R, t, 1] in float32."""
  out = jnp.einsum("bgrts,bsgd->bgrtd", weight, wide(v_BSGD))
  return out, jnp.sum(weight, -1, keepdims=True)


def dense_attention(a, b, c_GR, v_BTGD, log_decay_G, segment_ids_BT, local: bool = False):
  """y [B, G, R, T, D] of a whole sequence in O(T²(K·p + D)) time and O(T²) memory."""
  lag = jnp.arange(v_BTGD.shape[1])
  lag = lag[:, None] - lag
  seen = lag >= 0
  if segment_ids_BT is not None:
    seen = seen & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None, None]
  out, mass = sums(lcp_weights(a, b, c_GR, log_decay_G, seen, lag, local), v_BTGD)
  return out / mass
