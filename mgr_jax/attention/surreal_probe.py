"""Diagnostics of `surreal`."""

import jax
import jax.numpy as jnp

from mgr_jax.attention.mechanism import group_heads
from mgr_jax.attention.surreal_linear import linear_specs, log_size, norms, query_gain
from mgr_jax.attention.surreal_options import Options
from mgr_jax.attention.surreal_values import leading
from mgr_jax.attention.tiles import TILE, pad_to, padded_length, segment_axes, visible

DOMINANT = 0.99


def diagnostics(params, q, k, l, mixed, ctx, cfg, opts: Options) -> dict[str, jax.Array]:
  """Float32 scalars, and one value per head for `tau`.

  `<matrix>_s_mean`, `_s_std`, `_s_min`, `_s_max`: log-sizes; `<matrix>_sat_frac`: share of them in the flat part of
  their range; `<matrix>_v_norm`: mean norm of its directions over their radius, 1 while the optimizer keeps it; `gate`:
  mean size of the output's signed sizes; `tau`: log-temperature of the cosine. Floating values: `lambda_mean`, `_p01`,
  `_p99` of Λ; `dominance_frac`: share of queries of which one token has more than 0.99 of the weight.
  """
  aux = {"gate": jnp.mean(jnp.abs(params["wo_gate"]))}
  for name, spec in linear_specs(cfg, opts).items():
    if spec.role == "direction":
      aux[f"{name}_v_norm"] = jnp.mean(norms(params[name], spec)) / spec.radius
  for name in opts.scaled:
    raw = params[f"{name}_scale"]
    s = log_size(raw, opts)
    aux |= {f"{name}_s_{f.__name__}": f(s) for f in (jnp.mean, jnp.std, jnp.min, jnp.max)}
    aux[f"{name}_sat_frac"] = jnp.mean(jnp.abs(raw) > opts.s_max)
  gain = query_gain(params, cfg, opts)
  if gain is not None:
    aux["tau"] = jnp.log(gain * cfg.head_dim**0.5)
  if l is not None:
    log_growth = leading(mixed)[1]
    low, high = jnp.percentile(log_growth, jnp.array([1.0, 99.0]))
    aux |= {"lambda_mean": jnp.mean(log_growth), "lambda_p01": low, "lambda_p99": high}
    aux["dominance_frac"] = jnp.mean(top_weights(q, k, l, ctx.segment_ids_BT) > DOMINANT)
  return {name: jax.lax.stop_gradient(x).astype(jnp.float32) for name, x in aux.items()}


def top_weights(q_BTHD, k_BTKD, l_BTK, segment_ids_BT=None) -> jax.Array:
  """max_s softmax_s(a_ts + ℓ_s), [B, K, R, T], one tile of queries at a time."""
  T = q_BTHD.shape[1]
  q, k, l = group_heads(q_BTHD, k_BTKD.shape[2]), k_BTKD.swapaxes(1, 2), l_BTK.swapaxes(1, 2)
  q = pad_to(q, padded_length(T), 3)
  segments = None if segment_ids_BT is None else pad_to(segment_ids_BT, padded_length(T), 1, value=-1)

  def tile(start):
    rows = jax.lax.dynamic_slice_in_dim(q, start, TILE, axis=3)
    scores = jnp.einsum("bkrtd,bksd->bkrts", rows, k, preferred_element_type=jnp.float32)
    scores = q.shape[-1] ** -0.5 * scores + l[:, :, None, None]
    own = None if segments is None else jax.lax.dynamic_slice_in_dim(segments, start, TILE, axis=1)
    mask = visible((start + jnp.arange(TILE))[:, None], jnp.arange(T), 0, *segment_axes(own, segment_ids_BT))
    scores = jnp.where(mask, scores, -jnp.inf)
    # Padding may see nothing at all.
    return jnp.exp(jnp.max(scores, -1) - jax.nn.logsumexp(jnp.where(mask.any(-1, keepdims=True), scores, 0.0), -1))

  tops = jax.lax.map(tile, jnp.arange(0, padded_length(T), TILE))
  return jnp.moveaxis(tops, 0, 3).reshape(*q.shape[:3], -1)[..., :T]
