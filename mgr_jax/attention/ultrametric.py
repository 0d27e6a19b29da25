"""Ultrametric attention: a key counts by the number of leading digits that its place in a p-ary tree shares.

    y_t = Σ_{s<=t} κ_ts·λ^(t-s)·v_s / Σ_{s<=t} κ_ts·λ^(t-s),    κ_ts = α^lcp(digits of q_t, digits of k_s)

d = p^-lcp is an ultrametric: balls of the tree are nested or disjoint. The kernel has p^K features, so a causal layer
is exact in time linear in T and decodes with constant state; there is no softmax over keys. Digits are categorical
distributions; soft digits use the mean kernel E[α^lcp]. With α below p coarse balls carry most of the mass, above p
deep ones do. A token always sees itself. No rotary embedding by default: a ball holds contents, not positions.
"""

import dataclasses

import jax.numpy as jnp

from mgr_jax import homotopy
from mgr_jax.algebra import padic_claims, padic_tree_claims
from mgr_jax.attention import ultrametric_claims, ultrametric_decode, ultrametric_digits, ultrametric_sum_claims
from mgr_jax.attention.mechanism import Mechanism, merge_heads, project_qkv, projection_cost, qkv_specs
from mgr_jax.attention.ultrametric_dense import dense_attention
from mgr_jax.attention.ultrametric_features import tree_attention
from mgr_jax.attention.ultrametric_options import Options
from mgr_jax.attention.ultrametric_probe import diagnostics
from mgr_jax.attention.ultrametric_sort import ball_attention
from mgr_jax.flops import Cost


def param_specs(cfg, opts: Options):
  """Projections, digit tables, and the parameters of level weights and recency."""
  return qkv_specs(cfg) | ultrametric_digits.specs(cfg, opts)


def _prepare(params, x_BTC, ctx, cfg, opts):
  q, k, v = project_qkv(params, x_BTC, ctx, rope=opts.digit_rope, qk_norm=True)
  soft = ultrametric_digits.probabilities(q, k, params, ctx, opts)
  hard_or_soft = tuple(ultrametric_digits.digits(x, opts) for x in soft)
  c = ultrametric_digits.weights(params, cfg.n_head, cfg.n_kv_head, opts)
  return soft, hard_or_soft, c, v, ultrametric_digits.log_decay(params, opts)


def _merge(out_BGRTD, params, dtype):
  B, G, R, T, D = out_BGRTD.shape
  return merge_heads(jnp.moveaxis(out_BGRTD, 3, 1).reshape(B, T, G * R, D).astype(dtype), params["wo"])


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`. `aux_loss` is the balance term."""
  soft, (a, b), c, v, log_decay = _prepare(params, x_BTC, ctx, cfg, opts)
  inputs = (a, b, c, v, log_decay, ctx.segment_ids_BT)
  if opts.implementation == "features":
    out = tree_attention(*inputs, opts.chunk)
  elif opts.implementation == "sort":
    out = ball_attention(*inputs, opts.chunk)
  else:
    out = dense_attention(*inputs, local=opts.digits == "st" and opts.ste == "local")
  aux = {}
  if opts.balance and opts.digits != "hard":
    aux["aux_loss"] = opts.balance * ultrametric_digits.balance_loss(*soft)
  if ctx.probe:
    alpha = None if opts.level_weights == "free" else ultrametric_digits.alphas(params, cfg.n_head, opts)
    aux |= diagnostics(soft, *inputs, alpha, opts)
  return _merge(out, params, x_BTC.dtype), aux


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """A table of constant size, or a cache; see `ultrametric_decode`."""
  return ultrametric_decode.init_state(cfg, opts, batch, max_len)


def step(params, x_BtC, state, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`."""
  _, (a, b), c, v, log_decay = _prepare(params, x_BtC, ctx, cfg, opts)
  out, state = ultrametric_decode.step(state, a, b, c, v, log_decay, ctx, opts)
  return _merge(out, params, x_BtC.dtype), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """Projections, digit logits, and per query head (H) and key/value head (G), with D + 1 columns per value:

  pairs of a chunk (all of them, masked or not) 2·c·(D+1) matrix and 2·c·K·p vector FLOPs per H; `features` adds reading
  and writing p^K leaves, 2·p^K·(D+1) per H and per G; `sort` repeats the chunk's pairs per level; `reference` has T
  pairs. Bytes: the K + 1 rows, the leaves, or half the cache that a decoded token reads.
  """
  H, G, D, K, p = cfg.n_head, cfg.n_kv_head, cfg.head_dim, opts.depth, opts.p
  total = projection_cost(cfg) + Cost(
    matmul=2.0 * D * K * p * (H + G), vector=4.0 * K * p * (H + G), exp=K * p * (H + G)
  )
  pair = Cost(matmul=2.0 * (D + 1), vector=2.0 * K * p)
  impl = opts.implementation
  if impl == "reference":
    total += H * T * pair
  elif impl == "features":
    total += H * opts.chunk * pair
    if opts.chunk < T:
      total += Cost(matmul=2.0 * opts.leaves * (D + 1) * (H + G), vector=2.0 * opts.leaves * (H + G))
  else:
    total += H * (K + 1) * Cost(matmul=2.0 * opts.chunk * (D + 1), vector=3.0 * opts.chunk + 4.0 * (D + 1))
  return total + Cost(bytes=_bytes_read(cfg, opts, T))


def _bytes_read(cfg, opts, T):
  G, D = cfg.n_kv_head, cfg.head_dim
  if opts.decoder == "cache":
    digits = 4 * opts.depth * opts.p if opts.digits == "soft" else opts.depth
    return G * T / 2 * (digits + D * jnp.dtype(cfg.compute_dtype).itemsize)
  rows = G * opts.leaves if opts.digits == "soft" else cfg.n_head * (opts.depth + 1)
  return 4.0 * rows * (D + 1)


def annealed(opts: Options) -> dict[str, homotopy.Homotopy]:
  """The digit temperature, when it is scheduled."""
  theta = homotopy.parse(opts.theta)
  return {} if theta.is_constant or opts.digits == "hard" else {"theta": theta}


VARIANTS = (
  "ultrametric",
  "ultrametric(digits=soft,p=2,K=4,decay=learned,level_weights=free,theta=0.7)",
  "ultrametric(digits=hard,p=3,K=2,decay=none,alpha_learn=false,chunk=8)",
  "ultrametric(impl=sort,ste=local,p=5,K=3,chunk=16)",
  "ultrametric(p=16,K=6,ste=local,tie_digits=true,alpha_init=6,balance=0)",
  "ultrametric(digits=soft,decode=cache,digits_k=2,digit_rope=true,freeze_levels=1,chunk=16)",
  "ultrametric(impl=reference,ste=local,decay=learned)",
  "ultrametric(p=2,K=8,decode=table)",
)

_RECORD = Mechanism(
  name="ultrametric",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=init_state,
  step=step,
  cost=cost,
  annealed=annealed,
  refs=(
    "Robert, 2000, A Course in p-adic Analysis",
    "Katharopoulos et al., 2020, arXiv 2006.16236 (linear attention state; not its feature map)",
    "Bengio et al., 2013, arXiv 1308.3432 (straight-through gradient)",
    "Press et al., 2021, arXiv 2108.12409 (decay slopes; not its additive bias)",
  ),
  variants=VARIANTS,
)

MECHANISM = dataclasses.replace(
  _RECORD,
  claims=(
    *padic_claims.CLAIMS,
    *padic_tree_claims.CLAIMS,
    *ultrametric_sum_claims.CLAIMS,
    *ultrametric_claims.mechanism_claims(_RECORD),
  ),
)
