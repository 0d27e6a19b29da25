"""From activations to addresses, values and the scalars that shape the sums, in the layout [B, K, R, T, ...]."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_routing import address, digits, router_specs
from mgr_jax.attention.fractal_table import Sides
from mgr_jax.attention.mechanism import group_heads, project_qkv
from mgr_jax.params import ParamSpec

MIN_BETA = 0.1
INITIAL_GATE = 2.0
# The mass of "nothing stored here" stays above e^-60: a denominator is never zero, and smaller weights count nothing.
NULL_RANGE = (-60.0, 20.0)


def inverse_softplus(y: float) -> float:
  """x with softplus(x) = y."""
  return math.log(math.expm1(y))


def extra_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """Router, null value [H, D], and as the options need them: null_logit [H], slope [H] or [K], alpha_raw [K, depth+1],
  beta_raw [H], write gate [C, K] and its bias."""
  C, H, K, D = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim
  specs = router_specs(cfg, opts)
  specs["v_null"] = ParamSpec((H, D), ("heads", "head_dim"), role="scalar", init="zeros")
  if opts.rule == "sum":
    start = max(-opts.depth * math.log(opts.m), NULL_RANGE[0] / 2)
    specs["null_logit"] = ParamSpec((H,), ("heads",), role="scalar", init="constant", std=start)
  if opts.decays:
    n, axis = (H, "heads") if opts.mode == "attend" else (K, "kv_heads")
    specs["slope"] = ParamSpec((n,), (axis,), role="scalar", init=_initial_slopes)
  if opts.kernel == "prefix":
    specs["alpha_raw"] = ParamSpec((K, opts.depth + 1), ("kv_heads", None), role="scalar", init="zeros")
  if opts.beta == "learned":
    start = inverse_softplus(1.0 - MIN_BETA)
    specs["beta_raw"] = ParamSpec((H,), ("heads",), role="scalar", init="constant", std=start)
  if opts.rule == "overwrite" and opts.address == "soft":
    specs["w_gate"] = ParamSpec((C, K), ("embed", "kv_heads"), role="router")
    specs["b_gate"] = ParamSpec((K,), ("kv_heads",), role="scalar", init="constant", std=INITIAL_GATE)
  return specs


def _initial_slopes(key, shape):
  """softplus gives 2^{-8h/n}/4 for h = 1 .. n, a quarter of the slopes of Press et al., 2021, arXiv 2108.12409."""
  del key
  slopes = 0.25 * 2.0 ** (-8.0 * jnp.arange(1, shape[0] + 1) / shape[0])
  return jnp.log(jnp.expm1(slopes))


class Inputs(NamedTuple):
  """Branch probabilities q [B, K, R, T, depth·m] and k [B, K, T, depth·m], values [B, K, T, D]; where they apply write
  gates [B, K, T] and β [K, R]."""

  q_digits: jax.Array
  k_digits: jax.Array
  v: jax.Array
  gate_BKT: jax.Array | None
  beta_KR: jax.Array | None


def inputs(params, x_BTC, ctx, cfg, opts: Options) -> Inputs:
  """Routes queries and keys. Positions do not enter, except in the negative control `position=rope`."""
  q, k, v = project_qkv(params, x_BTC, ctx, rope=opts.position == "rope", qk_norm=True)
  K = cfg.n_kv_head
  gate = beta = None
  if "w_gate" in params:
    logits = (x_BTC @ params["w_gate"].astype(x_BTC.dtype)).astype(params["b_gate"].dtype) + params["b_gate"]
    gate = jax.nn.sigmoid(logits).swapaxes(1, 2)
  if opts.beta == "learned":
    beta = MIN_BETA + jax.nn.softplus(params["beta_raw"]).reshape(K, -1)
  return Inputs(
    digits(params, group_heads(q, K), opts), digits(params, k.swapaxes(1, 2), opts), v.swapaxes(1, 2), gate, beta
  )


def addresses(params, x: Inputs, opts: Options) -> Sides:
  """What overlaps and tables are made of."""
  slope = None
  if opts.decays:
    slope = jax.nn.softplus(params["slope"]).reshape(x.q_digits.shape[1], -1)
  return Sides(address(x.q_digits, opts), address(x.k_digits, opts), x.v, alpha(params, opts), slope, x.gate_BKT)


def alpha(params, opts: Options):
  """Weights of the prefix lengths 0 .. depth [K, depth+1], or `None` for the leaf kernel."""
  return jax.nn.softmax(params["alpha_raw"]) if opts.kernel == "prefix" else None


def null_mass(params, n_kv_head: int) -> jax.Array:
  """z₀ = exp(null_logit) [K, R, 1]."""
  return jnp.exp(jnp.clip(params["null_logit"], *NULL_RANGE)).reshape(n_kv_head, -1, 1)


def merge_null(params, out, mass, shape) -> jax.Array:
  """(Σ w v + z₀ v_∅) / (Σ w + z₀), [B, K, R, T, D]; `shape` begins [B, K, R]."""
  z = null_mass(params, shape[1])
  v_null = params["v_null"].reshape(*shape[1:3], 1, -1)
  return (out + z[..., None] * v_null) / (mass + z)[..., None]
