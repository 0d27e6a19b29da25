"""Tropical (max-plus) attention: a linear-time scan, its smooth finite-β family, and scores that do not factor.

y_td = max_{s<=t} (a_ts + v_sd) with a_ts = max_r (q_tr + k_sr) - λ(t-s), minus the largest score max_s a_ts.
The maxima exchange, so a D×D state replaces the past (`tropical_scan`). The price is capacity: for a fixed prefix at
most D keys can ever have the largest score, whatever the query. Grouped and Hilbert scores lift that in quadratic time
(`tropical_tiles`). With finite β maxima become log Σ exp(β·)/β, and the layer is linear attention with feature map
e^{βx} in log-values (`tropical_matrix`, `tropical_streaming`): it never equals softmax attention.
"""

import math

import jax
import jax.numpy as jnp

from mgr_jax.algebra.tropical_claims import CLAIMS as ALGEBRA_CLAIMS
from mgr_jax.attention import (
  tropical_beta_claims,
  tropical_claims,
  tropical_margin_claims,
  tropical_pallas,
  tropical_scan,
  tropical_streaming,
  tropical_tiles_pallas,
)
from mgr_jax.attention.mechanism import (
  Mechanism,
  append,
  group_heads,
  init_cache,
  merge_heads,
  project_qkv,
  projection_cost,
  qkv_specs,
  ungroup_heads,
)
from mgr_jax.attention.tiles import MAX_SPANS, visible
from mgr_jax.attention.tropical_heads import Heads, batch_first, clock_of, finish, prepare, scored, slopes, time_first
from mgr_jax.attention.tropical_matrix import CHUNK, matrix_attention
from mgr_jax.attention.tropical_options import TAU, Options, check_head, implementation, snapped
from mgr_jax.attention.tropical_probe import diagnostics
from mgr_jax.attention.tropical_scan import Plan, maxplus_attention
from mgr_jax.attention.tropical_tiles import reference_attention, tile_output, tiled_attention
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec


def param_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """Projections, log τ per key/value head, and λ: the fixed slopes, or the logarithm of a learned one from 1/2 to 2^-8.

  Fixed slopes are a table that receives no gradient, so that a layer whose heads are repeated or sharded keeps them.
  """
  check_head(opts, cfg.head_dim)
  K = cfg.n_kv_head

  def per_head(init, **settings):
    return ParamSpec((K,), ("kv_heads",), role="scalar", init=init, **settings)

  specs = qkv_specs(cfg) | {"log_tau": per_head("constant", std=math.log(TAU))}
  if opts.decay == "learned":
    specs["log_decay"] = per_head(lambda key, shape: -jnp.log(2.0) * jnp.linspace(1.0, 8.0, K))
  if opts.decay == "alibi":
    specs["slopes"] = per_head(lambda key, shape: jnp.asarray(slopes(K), jnp.float32), frozen=True)
  return specs


def _beta(ctx, opts):
  course = opts.course
  return None if course is None else jnp.asarray(ctx.annealed.get("beta", course.start), jnp.float32)


def _plan(opts: Options, T: int) -> Plan:
  # On CPU one token at a time is fastest; accelerators want many chunks that advance together, and kernels have them.
  serial = jax.default_backend() == "cpu" and opts.impl != "pallas"
  chunk = opts.chunk or (T if serial else 64)
  # A chunk longer than the rebasing period would not give the same bits, unless it is the only one.
  return Plan(chunk if chunk >= T else min(chunk, opts.rebase), opts.rebase, opts.deterministic)


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`."""
  qkv = project_qkv(params, x_BTC, ctx, rope=opts.rope, qk_norm=opts.qk_norm == "rms")
  heads, beta = prepare(params, *qkv, opts), _beta(ctx, opts)
  y = _mixed(heads, beta, ctx, cfg, opts)
  aux = diagnostics(heads, y, beta, params, ctx, opts) if opts.margins or ctx.probe else {}
  return merge_heads(finish(y, opts).astype(x_BTC.dtype), params["wo"]), aux


def _mixed(heads: Heads, beta, ctx, cfg, opts: Options):
  """y [B, T, H, E] by the implementation that serves."""
  B, T = heads.q.shape[:2]
  impl = implementation(opts, cfg.head_dim)
  clock = clock_of(ctx, B)
  if impl == "scan":
    return batch_first(maxplus_attention(*time_first(heads), clock, _plan(opts, T)))
  if impl == "pallas" and opts.factors:
    return batch_first(tropical_pallas.maxplus_attention(*time_first(heads), clock, _plan(opts, T)))
  if impl == "streaming":
    return batch_first(tropical_streaming.streaming_attention(*time_first(heads), beta, clock, opts.rebase))
  q, k, v = group_heads(heads.q, cfg.n_kv_head), heads.k.swapaxes(1, 2), heads.v.swapaxes(1, 2)
  if impl == "matrix":
    return ungroup_heads(matrix_attention(q, k, v, heads.decay, beta, clock.starts.T, opts.chunk))
  if impl == "pallas":
    return ungroup_heads(tropical_tiles_pallas.tiled_attention(q, k, v, heads.decay, clock.starts.T, opts))
  if impl == "tiled":
    return ungroup_heads(tiled_attention(q, k, v, heads.decay, clock.position.T, ctx.segment_ids_BT, opts))
  return ungroup_heads(reference_attention(q, k, v, heads.decay, clock.position.T, ctx.segment_ids_BT, opts, beta))


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """The D×E state U (with finite β a pair), or a cache of `max_len` tokens where the score does not factor."""
  if not opts.factors:
    return init_cache(cfg, batch, max_len)
  shape = batch, cfg.n_kv_head, cfg.head_dim, cfg.head_dim + scored(opts)
  return tropical_scan.empty_state(*shape) if opts.course is None else tropical_streaming.empty(*shape)


def step(params, x_BtC, state, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`. O(D²) per token where the score factors, else O(max_len·D)."""
  q, k, v = project_qkv(params, x_BtC, ctx, rope=opts.rope, qk_norm=opts.qk_norm == "rms")
  if opts.factors:
    y, state = _step_state(prepare(params, q, k, v, opts), state, ctx, opts)
  else:
    state = append(state, k, v, ctx)
    y = _step_cache(prepare(params, q, state.k_BSKD, state.v_BSKD, opts), ctx, cfg, opts)
  return merge_heads(finish(y, opts).astype(x_BtC.dtype), params["wo"]), state


def _step_state(heads: Heads, state, ctx, opts):
  q, k, v, decay = time_first(heads)
  clock, beta = clock_of(ctx, heads.q.shape[0]), _beta(ctx, opts)
  q, k, v, loss = tropical_scan.shifted(q, k, v, decay, clock, opts.rebase)
  if ctx.valid_BT is not None:
    live = ctx.valid_BT.T[:, :, None, None]
    k, v, loss = jnp.where(live, k, -jnp.inf), jnp.where(live, v, 0.0), jnp.where(live[..., None], loss, 0.0)
  if beta is None:
    y, _, state = tropical_scan.run(q, k, v, loss, state, _plan(opts, q.shape[0]).chunk, track=False)
  else:
    y, state = tropical_streaming.run(q, k, v, loss, state, beta)
  return batch_first(y), state


def _step_cache(heads: Heads, ctx, cfg, opts):
  B, S = heads.k.shape[:2]
  index = jnp.arange(S)
  mask = visible(ctx.positions_BT[:, None, None, :, None], index)
  q_position = jnp.broadcast_to(ctx.positions_BT, (B, heads.q.shape[1]))
  k_position = jnp.broadcast_to(index, (B, S))
  q, k, v = group_heads(heads.q, cfg.n_kv_head), heads.k.swapaxes(1, 2), heads.v.swapaxes(1, 2)
  return ungroup_heads(tile_output(q, k, v, heads.decay, q_position, k_position, mask, opts))


def cost(cfg, opts: Options, T: int) -> Cost:
  """Projections and the work of the implementation that runs, per token.

  A pair (one addition, one maximum) counts as two vector operations. Hard scan: D·E pairs to insert and D·E per query
  head to read. Tiles: (D + E) pairs per visible key, causal halves as the spans cut them; in a kernel exact halves and
  no matrix products. Matrix: every product of a chunk of c tokens, c·(D + E) + D·E per query head and D·E per key head,
  two FLOPs each. Streaming: the pairs of the scan and an exponential for each.
  """
  H, K, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
  E = D + scored(opts)
  impl = implementation(opts, D)
  state = 4.0 * K * D * E * (1 if opts.course is None else 2)
  common = projection_cost(cfg)
  if impl == "matrix":
    c = min(opts.chunk or CHUNK, T)
    products = H * (c * (D + E) + D * E) + K * D * E
    exponentials = (H + K) * 2 * D + H * c + K * E
    return common + Cost(matmul=2.0 * products, vector=6.0 * H * c, exp=float(exponentials), bytes=state)
  if impl in ("scan", "streaming") or (impl == "pallas" and opts.factors):
    pairs = (H + K) * D * E
    return common + Cost(vector=2.0 * pairs, exp=float(pairs) if impl == "streaming" else 0.0, bytes=state)
  keys = {"reference": T, "pallas": (T + 1) / 2}.get(impl, T * (1 + 1 / MAX_SPANS) / 2)
  cache = 2.0 * K * D * T / 2 * jnp.dtype(cfg.compute_dtype).itemsize
  bytes_read = state if opts.factors else cache
  if opts.score == "dot" and impl != "pallas":
    return common + Cost(matmul=2.0 * H * D * keys, vector=2.0 * H * E * keys, bytes=bytes_read)
  smooth = H * keys * (D + E) if opts.course else 0.0
  terms = (2 * D if opts.score == "hilbert" else D) + (0 if opts.agg == "route" else E)
  return common + Cost(vector=2.0 * H * keys * terms, exp=float(smooth), bytes=bytes_read)


def annealed(opts: Options):
  """`beta` when it follows a schedule."""
  course = opts.course
  return {} if course is None or course.is_constant else {"beta": course}


VARIANTS = (
  "tropical",
  "tropical(decay=learned,chunk=16,rebase=16,deterministic=true,center_v=true)",
  "tropical(rope=true,center_k=true,center_v=true,out_norm=center_max,decay=none,margins=true)",
  "tropical(score=hilbert)",
  "tropical(score_groups=4,center_score=false,center_q=true,qk_norm=none,out_norm=none)",
  "tropical(score=dot,agg=route,center_q=true,decay=learned)",
  "tropical(beta=0.5,chunk=32)",
  "tropical(beta=coverage:2:16:0.5,final=snap,margins=true,rebase=16)",
)

MECHANISM = Mechanism(
  name="tropical",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=init_state,
  step=step,
  cost=cost,
  annealed=annealed,
  snapped=snapped,
  claims=(*ALGEBRA_CLAIMS, *tropical_claims.CLAIMS, *tropical_beta_claims.CLAIMS, *tropical_margin_claims.CLAIMS),
  refs=(
    "Hashemi, Pasque, Teska, Yoshida, 2025, arXiv 2505.17190 (Hilbert score; not its network)",
    "Develin, Santos, Sturmfels, 2005, arXiv math/0312114 (Barvinok rank, which bounds what one score can select)",
    "Katharopoulos et al., 2020, arXiv 2006.16236 (linear attention; here with feature map e^{βx} in log-values)",
    "Press, Smith, Lewis, 2022, arXiv 2108.12409 (linear recency penalty; other slopes)",
  ),
  variants=VARIANTS,
)
