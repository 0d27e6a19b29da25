"""Gauge attention: every token rotates the channels of a head, and vectors are compared after parallel transport.

With a rotation U_t ∈ SO(b)^(D/b) per token and key/value head, the transport from s to t is R_(t←s) = U_t ··· U_(s+1),

    y_t = Σ_(s<=t) softmax_s(⟨q_t, R_(t←s) k_s⟩ / √D) R_(t←s) v_s.

Transport factorises, R_(t←s) = T_t T_sᵀ with T_t = U_t ··· U_0, so this is one running product and ordinary attention
over T_tᵀ q_t, T_sᵀ k_s, T_sᵀ v_s, whose output T_t turns back. A sequence has one path between two tokens, hence no
curvature; what b >= 3 adds to rotary positions is that the rotations depend on content and do not commute. Rotating the
fibre of every token by its own S_t, U_t → S_t U_t S_(t-1)ᵀ, changes no score: the core is covariant. The layer as a
whole is not, since its projections are fixed matrices.
"""

import dataclasses

from mgr_jax.attention import gauge_claims, gauge_decode, gauge_probe
from mgr_jax.attention.gauge_connection import capped, connect, extra_specs, pull, push, raw_generators
from mgr_jax.attention.gauge_cost import cost
from mgr_jax.attention.gauge_options import Options
from mgr_jax.attention.gauge_poisson import mix_hops, poisson_specs
from mgr_jax.attention.gauge_reference import reference
from mgr_jax.attention.mechanism import (
  Mechanism,
  group_heads,
  merge_heads,
  project_qkv,
  qkv_specs,
  rotate,
  ungroup_heads,
)
from mgr_jax.attention.standard import tiled_attention


def param_specs(cfg, opts: Options):
  """Projections, generator, and the biases and rates of the Poisson mixer."""
  opts.check_sizes(cfg)
  specs = qkv_specs(cfg) | extra_specs(cfg, opts)
  return specs | poisson_specs(cfg, opts) if opts.mixer == "poisson" else specs


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`."""
  q, k, v = project_qkv(params, x_BTC, ctx, rope=False, qk_norm=True)
  r = raw_generators(params, x_BTC, opts, segment_ids_BT=ctx.segment_ids_BT)
  a = capped(r, opts.theta_max)
  if opts.impl == "reference":
    out = reference(params, q, k, v, a, ctx, cfg, opts)
    return merge_heads(out, params["wo"]), {}
  F = connect(a, cfg, opts, segment_ids_BT=ctx.segment_ids_BT)
  out = _mix(params, *in_common_frame(F, q, k, v, ctx, cfg, opts), ctx, cfg, opts)
  if opts.values == "transport":
    out = push(F, out, cfg, opts)
  aux = gauge_probe.diagnostics(params, r, F, cfg, opts) if ctx.probe else {}
  return merge_heads(out, params["wo"]), aux


def in_common_frame(F, q, k, v, ctx, cfg, opts: Options):
  """Pulled-back queries, keys and values, the first two with rotary positions where these are outside."""
  if opts.values == "transport":
    q, k, v = pull(F, (q, k, v), cfg, opts)
  else:
    q, k = pull(F, (q, k), cfg, opts)
  if opts.rope == "outer":
    q, k = rotate(q, ctx.shared["rope"]), rotate(k, ctx.shared["rope"])
  return q, k, v


def _mix(params, q, k, v, ctx, cfg, opts: Options):
  q, k, v = group_heads(q, cfg.n_kv_head), k.swapaxes(1, 2), v.swapaxes(1, 2)
  if opts.mixer == "poisson":
    return ungroup_heads(mix_hops(params, q, k, v, ctx.segment_ids_BT, cfg, opts))
  return ungroup_heads(tiled_attention(q, k, v, ctx.segment_ids_BT, 0, True)[0])


def step(params, x_BtC, state, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`."""
  return gauge_decode.step(params, x_BtC, state, ctx, cfg, opts, in_common_frame)


VARIANTS = (
  "gauge",
  "gauge(b=2,rank=0,context=edge,values=plain,rope=none)",
  "gauge(b=8,rope=base,theta_max=6,share=layer,scan=assoc)",
  "gauge(mixer=poisson,m_max=2,scan=chunk:4,rope=base)",
  "gauge(impl=reference,mixer=poisson,terms=5,reach=2,scan=serial,reorth=off)",
)

_RECORD = Mechanism(
  name="gauge",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=gauge_decode.init_state,
  step=step,
  cost=cost,
  refs=(
    "Su et al., 2021, arXiv 2104.09864 (rotary positions: the constant, commuting connection)",
    "Ostmeier et al., 2024, arXiv 2406.10322 (LieRE: rotations of positions; here they depend on content)",
    "Yang et al., 2025, arXiv 2505.16381 (PaTH: Householder transports and their blockwise algorithm; not taken, since "
    "rotations factorise)",
    "Siems et al., 2025, arXiv 2502.10297 (DeltaProduct: products of Householder maps as state transitions)",
    "Lezcano-Casado and Martinez-Rubio, 2019, arXiv 1901.08428 (exponential parametrisation of orthogonal matrices)",
    "Merrill et al., 2024, arXiv 2404.08819 (what fixed depth cannot track: word problems of non-solvable groups)",
    "Jensen, 1953, Markoff chains as an aid in the study of Markoff processes (uniformization)",
  ),
  variants=VARIANTS,
)

MECHANISM = dataclasses.replace(_RECORD, claims=gauge_claims.mechanism_claims(_RECORD))
