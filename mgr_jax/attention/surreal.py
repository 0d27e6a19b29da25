"""Surreal attention: softmax attention whose weights, and if asked whose values, are a leading order times a direction.

Every projection is a size (an exponent) times a unit direction, which changes how it is optimised and not what it can
express: from the same key the layer starts as the function of `standard` and `fold` turns it back into ordinary
matrices. With `values=float` the values themselves are magnitudes times directions, and the largest magnitude leads.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention import standard, surreal_claims, surreal_probe
from mgr_jax.attention.mechanism import (
  KVCache,
  Mechanism,
  append,
  group_heads,
  init_cache,
  merge_heads,
  project_heads,
  projection_cost,
  rms_norm,
  rotate,
  ungroup_heads,
)
from mgr_jax.attention.surreal_linear import linear_specs, multipliers, query_gain, weights
from mgr_jax.attention.surreal_options import Options
from mgr_jax.attention.surreal_values import channels, dense_channels, log_magnitudes, value_specs, written
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec


def param_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """Directions and sizes of the projections; with floating values also the log-magnitudes' weights."""
  opts.check_heads(cfg)
  return linear_specs(cfg, opts) | (value_specs(cfg) if opts.values == "float" else {})


class Folded(NamedTuple):
  """`params` of a `standard` layer; its queries, after their norm, are to be multiplied by `query_gain_H` (1 at init).

  QK-norm takes away every constant that a matrix could give to the scores, so a learned temperature stays apart.
  """

  params: dict[str, jax.Array]
  query_gain_H: jax.Array


@functools.partial(jax.jit, static_argnums=(1, 2))
def fold(params, cfg, opts: Options) -> Folded:
  """The same layer with ordinary weights, float32: nothing of the factors is left to compute.

  Raises:
    ValueError: floating values, which no ordinary layer has.
  """
  if opts.values == "float":
    raise ValueError("surreal option values=float cannot be folded: standard attention has no log-magnitudes")
  gain = query_gain(params, cfg, opts)
  return Folded(weights(params, cfg, opts), jnp.ones(cfg.n_head) if gain is None else gain)


def _inputs(params, x_BTC, ctx, cfg, opts: Options):
  """q, k, v, and ℓ or None. The reference forms the weights; the fast form scales what the directions gave, where no
  norm per head follows that would take the scale away."""
  if opts.impl == "reference":
    matrices = weights(params, cfg, opts)
    q, k, v = (project_heads(x_BTC, matrices[name]) for name in ("wq", "wk", "wv"))
  else:
    projected = {name: project_heads(x_BTC, params[name]) for name in ("wq", "wk", "wv")}
    by = multipliers(params, cfg, opts, opts.scaled)
    q, k, v = (y if name not in by else (y * by[name]).astype(y.dtype) for name, y in projected.items())
  q, k = rms_norm(q), rms_norm(k)
  gain = query_gain(params, cfg, opts)
  if gain is not None:
    q = (q * gain[:, None]).astype(x_BTC.dtype)
  q, k = rotate(q, ctx.shared["rope"]), rotate(k, ctx.shared["rope"])
  return q, k, v, log_magnitudes(params, x_BTC) if opts.values == "float" else None


def _output(params, out_BTHD, dtype, cfg, opts: Options):
  """Floating values written out, and the output projection."""
  if opts.values == "float":
    out_BTHD = written(out_BTHD, params["b"])
  out_BTHD = out_BTHD.astype(dtype)
  if opts.impl == "reference":
    return merge_heads(out_BTHD, weights(params, cfg, opts)["wo"])
  return (merge_heads(out_BTHD, params["wo"]) * multipliers(params, cfg, opts, ("wo",))["wo"]).astype(dtype)


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`."""
  q, k, v, l = _inputs(params, x_BTC, ctx, cfg, opts)
  q_BKRTD = group_heads(q, cfg.n_kv_head)
  k_BKSD, v_BKSD = k.swapaxes(1, 2), v.swapaxes(1, 2)
  if opts.impl == "reference" and l is not None:
    out = dense_channels(q_BKRTD, k_BKSD, v_BKSD, l.swapaxes(1, 2), ctx.segment_ids_BT)
  else:
    if l is not None:
      v_BKSD = channels(v, l).swapaxes(1, 2)
    if opts.impl == "reference":
      out, _ = standard.dense_attention(q_BKRTD, k_BKSD, v_BKSD, ctx.segment_ids_BT)
    else:
      # A learned temperature goes up to 100, where e^100 would overflow without a running maximum.
      bounded = opts.qk == "full"
      out, _ = standard.tiled_attention(q_BKRTD, k_BKSD, v_BKSD, ctx.segment_ids_BT, 0, bounded)
  out = ungroup_heads(out)
  aux = surreal_probe.diagnostics(params, q, k, l, out, ctx, cfg, opts) if ctx.probe else {}
  return _output(params, out, x_BTC.dtype, cfg, opts), aux


def init_state(cfg, opts: Options, batch: int, max_len: int) -> KVCache:
  """A cache of keys and values; floating values are kept as their float32 channels, D + 1 wide."""
  cache = init_cache(cfg, batch, max_len)
  if opts.values == "plain":
    return cache
  return KVCache(cache.k_BSKD, jnp.zeros((batch, max_len, cfg.n_kv_head, cfg.head_dim + 1), jnp.float32))


def step(params, x_BtC, state: KVCache, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`. O(max_len) per token."""
  q, k, v, l = _inputs(params, x_BtC, ctx, cfg, opts)
  state = append(state, k, v if l is None else channels(v, l), ctx)
  # The output has the type of the queries, and channels need float32.
  out = standard.mix_cached(
    q.astype(state.v_BSKD.dtype), state.k_BSKD, state.v_BSKD, params, ctx, cfg, standard.Options()
  )
  return _output(params, out, x_BtC.dtype, cfg, opts), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """Per token: `standard`, a multiplication for every output that is scaled, and for every entry of its direction two
  vector operations per sequence (its norm). Floating values: one more value channel for each of T/2 keys, 2·C·K
  FLOPs for log-magnitudes, and float32 values in the cache."""
  C, H, K, D = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim
  outputs = D * sum(H if name == "wq" else K for name in opts.scaled)
  total = projection_cost(cfg) + standard.mix_cost(cfg, standard.Options(), T)
  total += Cost(vector=outputs + C + 2.0 * C * (outputs + H * D) / T)
  if opts.values == "plain":
    return total
  wider = T / 2 * K * (4.0 * (D + 1) - D * jnp.dtype(cfg.compute_dtype).itemsize)
  return total + Cost(matmul=T * H + 2.0 * C * K, vector=4.0 * D * (H + K), exp=2.0 * H + K, bytes=wider)


VARIANTS = (
  "surreal",
  "surreal(qk=full,s_max=2,renorm=false)",
  "surreal(values=float)",
  "surreal(granularity=matrix)",
  "surreal(impl=reference,values=float,qk=full)",
)

_RECORD = Mechanism(
  name="surreal",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=init_state,
  step=step,
  cost=cost,
  refs=(
    "Salimans and Kingma, 2016, arXiv 1602.07868 (weight normalisation; here with a logarithmic size)",
    "Henry et al., 2020, arXiv 2010.04245 (QK-norm with a learned temperature)",
    "Conway, 1976, On Numbers and Games (leading exponent before coefficient: the thought, not the arithmetic)",
  ),
  variants=VARIANTS,
)

MECHANISM = dataclasses.replace(_RECORD, claims=surreal_claims.claims(_RECORD, fold))
