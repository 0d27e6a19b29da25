"""Parameters and per-token arrays that the modes of `simplicial` share."""

import jax
import jax.numpy as jnp

from mgr_jax.attention.mechanism import project_heads, qkv_specs, rms_norm
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec


def temperature_spec(cfg) -> dict[str, ParamSpec]:
  """log τ per query head, zero at the start."""
  return {"log_tau": ParamSpec((cfg.n_head,), ("heads",), role="scalar", init="zeros")}


def second_edge_specs(cfg) -> dict[str, ParamSpec]:
  """Key and value projections wk2, wv2 [C, K, D] of the second token of a pair; the value starts at half size."""
  wk, wv = (qkv_specs(cfg)[name] for name in ("wk", "wv"))
  halved = ParamSpec(wv.shape, wv.axes, std=0.5 * wv.normal_std)
  return {"wk2": wk, "wv2": halved}


def second_edge_cost(cfg) -> Cost:
  """FLOPs per token of wk2 and wv2."""
  return Cost(matmul=4.0 * cfg.n_embd * cfg.n_kv_head * cfg.head_dim)


def normalised(params, x_BTC, name: str) -> jax.Array:
  """Projected heads with unit RMS, [B, T, H or K, D]."""
  return rms_norm(project_heads(x_BTC, params[name]))


def heated(q_BTHD, params, scale: float) -> jax.Array:
  """τ_h · scale · q in q's dtype."""
  factor = scale * jnp.exp(params["log_tau"])[:, None]
  return (q_BTHD.astype(factor.dtype) * factor).astype(q_BTHD.dtype)


def key_side(x_BTKD: jax.Array) -> jax.Array:
  """[B, T, K, ...] -> [B, K, T, ...]."""
  return x_BTKD.swapaxes(1, 2)


def segments_or_one(ctx, T: int) -> jax.Array:
  """Document numbers [B or 1, T]."""
  return jnp.zeros((1, T), jnp.int32) if ctx.segment_ids_BT is None else ctx.segment_ids_BT
