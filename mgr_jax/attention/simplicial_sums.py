"""Mode `linear2`: all pairs of earlier tokens, with weights that factorise over r = D positive features.

y_t = Σ_ij W_tij v_i∘(1 + v'_j) / Σ_ij W_tij,   W_tij = Σ_r φ_r(τ q_t) φ_r(k_i) φ_r(k'_j)

over i, j <= t, or i < j <= t. Queries and keys have unit RMS, so features of keys stay within e^{±√D}; exponential
features of a query are divided by their largest, which cancels. No position enters but through `order` and `decay`,
whose rates start as in Press et al., 2022, arXiv 2108.12409. Linear attention as in Katharopoulos et al., 2020, arXiv
2006.16236, with pairs in place of tokens.
"""

import math

import jax
import jax.numpy as jnp

from mgr_jax.attention.mechanism import group_heads, project_heads, ungroup_heads
from mgr_jax.attention.simplicial_inputs import (
  heated,
  key_side,
  normalised,
  second_edge_cost,
  second_edge_specs,
  temperature_spec,
)
from mgr_jax.attention.simplicial_linear import (
  BLOCK,
  CHUNK,
  Features,
  State,
  Times,
  chunked_pair_sums,
  dense_pair_sums,
  empty_state,
)
from mgr_jax.attention.simplicial_options import Options
from mgr_jax.attention.simplicial_scan import scan_pair_sums
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec


def specs(cfg, opts: Options):
  """wk2, wv2 [C, K, D], log τ [H], and with decay the log of its rate [K], which starts at -8·ln 2·(h+1)/K."""
  found = second_edge_specs(cfg) | temperature_spec(cfg)
  if opts.decay == "alibi":
    slopes = lambda key, shape: -8 * math.log(2) / shape[0] * jnp.arange(1, shape[0] + 1)
    found["log_decay"] = ParamSpec((cfg.n_kv_head,), ("kv_heads",), role="scalar", init=slopes)
  return found


def implementation(opts: Options) -> str:
  """What `auto` stands for: token after token on CPU, where small matrix products cost more than they compute."""
  if opts.impl != "auto":
    return opts.impl
  return "scan" if jax.default_backend() == "cpu" else "chunked"


def _rates(params) -> jax.Array | None:
  """Decay m >= 0 per token of each key/value head, γ = e^{-m}; `None` without decay."""
  return jnp.exp(params["log_decay"]) if "log_decay" in params else None


def pair_sums(f: Features, rate_K, times: Times, state: State, impl: str):
  """(y [B, K, R, T, E], state) by one of the implementations; `reference` starts empty and returns no state.

  Args:
    rate_K, times.segment: `None` where nothing fades, and where rows hold one document each.
  """
  if impl == "scan":
    return scan_pair_sums(f, rate_K, times, state)
  rate = jnp.zeros(f.g.shape[1]) if rate_K is None else rate_K
  segment = jnp.zeros_like(times.clock) if times.segment is None else times.segment
  times = times._replace(segment=segment)
  if impl == "chunked":
    return chunked_pair_sums(f, rate, times, state)
  return dense_pair_sums(f, rate, times, state.ordered is not None), None


def paired_values(mix: str, v: jax.Array, v2: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(a, b) [..., E] whose products a∘b carry the pair's value, and 1 in the last column, for the total weight.

  E = D + 1; a sum v + v' takes two products, v·1 and 1·v', and E = 2D + 1.
  """
  one = jnp.ones((*v.shape[:-1], 1), v.dtype)
  ones = jnp.ones_like(v)
  a, b = {"gated": ((v,), (1 + v2,)), "product": ((v,), (v2,)), "sum": ((v, ones), (ones, v2))}[mix]
  return jnp.concatenate([*a, one], -1), jnp.concatenate([*b, one], -1)


def normalise(sums: jax.Array, mix: str) -> jax.Array:
  """The weighted mean; 0 where no pair has weight."""
  values, total = sums[..., :-1], sums[..., -1:]
  if mix == "sum":
    values = sum(jnp.split(values, 2, -1))
  return values / jnp.where(total > 0, total, 1.0)


def _feature(x: jax.Array, opts: Options) -> jax.Array:
  return jax.nn.softplus(x) if opts.feature == "softplus" else jnp.exp(x)


def features(params, x_BTC, ctx, cfg, opts: Options) -> Features:
  """Features and values in float32; padding gets zero key features."""
  q, k, k2 = (normalised(params, x_BTC, name).astype(jnp.float32) for name in ("wq", "wk", "wk2"))
  q = heated(q, params, 1.0)
  if opts.feature == "exp":
    f = jnp.exp(q - jax.lax.stop_gradient(jnp.max(q, -1, keepdims=True)))
  else:
    f = _feature(q, opts)
  g, h = _feature(k, opts), _feature(k2, opts)
  if ctx.valid_BT is not None:
    g, h = (jnp.where(ctx.valid_BT[:, :, None, None], x, 0.0) for x in (g, h))
  v, v2 = (project_heads(x_BTC, params[name]).astype(jnp.float32) for name in ("wv", "wv2"))
  return Features(group_heads(f, cfg.n_kv_head), *map(key_side, (g, h, *paired_values(opts.value_mix, v, v2))))


def _empty(cfg, opts: Options, batch: int, width: int) -> State:
  return empty_state(batch, cfg.n_kv_head, cfg.head_dim, width, opts.order == "increasing")


def _width(cfg, opts: Options) -> int:
  return cfg.head_dim * (2 if opts.value_mix == "sum" else 1) + 1


def mix(params, x_BTC, ctx, cfg, opts: Options):
  """Outputs [B, T, H, D] of a whole sequence, and diagnostics."""
  B, T, _ = x_BTC.shape
  f = features(params, x_BTC, ctx, cfg, opts)
  times = Times(jnp.arange(1, T + 1)[None], ctx.segment_ids_BT)
  sums, state = pair_sums(f, _rates(params), times, _empty(cfg, opts, B, _width(cfg, opts)), implementation(opts))
  aux = _diagnostics(params, sums, state) if ctx.probe else {}
  return ungroup_heads(normalise(sums, opts.value_mix)).astype(x_BTC.dtype), aux


def _diagnostics(params, sums, state: State | None):
  """Smallest total weight of a row that has any, share of rows without a pair, size of the last states, τ."""
  total = sums[..., -1]
  aux = {
    "min_normaliser": jnp.min(jnp.where(total > 0, total, jnp.inf), initial=3e38),
    "empty_rows": jnp.mean(total <= 0),
    "tau": jnp.exp(params["log_tau"]),
  }
  if state is not None:
    norm = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))
    aux["state_rms"] = jnp.stack([norm(x) for x in (state.first, state.second, state.ordered) if x is not None])
  return aux


def init_state(cfg, opts: Options, batch: int, max_len: int) -> State:
  """M and M' or S [B, K, D, E] in float32: constant in `max_len`."""
  del max_len
  return _empty(cfg, opts, batch, _width(cfg, opts))


def step(params, x_BtC, state: State, ctx, cfg, opts: Options):
  """t new tokens; 7·D·E vector operations per token and head."""
  B, t, _ = x_BtC.shape
  f = features(params, x_BtC, ctx, cfg, opts)
  real = jnp.ones((B, t), jnp.int32) if ctx.valid_BT is None else ctx.valid_BT.astype(jnp.int32)
  times = Times(jnp.cumsum(real, -1), None)
  impl = "chunked" if implementation(opts) == "chunked" and t > 1 else "scan"
  sums, state = pair_sums(f, _rates(params), times, state, impl)
  # The clock counts from the state, so it restarts with every call.
  state = state._replace(at=state.at._replace(clock=jnp.zeros_like(state.at.clock)))
  return ungroup_heads(normalise(sums, opts.value_mix)).astype(x_BtC.dtype), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """wk2, wv2 and the sums: in chunks of c tokens (N of them in a block) per token and head about r·E·(2 + 4c) FLOPs of
  products, and per key/value head r·E·(4 + 4(N + 1)²/(Nc)); token after token 7·r·E vector operations instead."""
  H, K, r, E = cfg.n_head, cfg.n_kv_head, cfg.head_dim, _width(cfg, opts)
  ordered = opts.order == "increasing"
  bytes_read = 4.0 * 2 * K * r * E
  exp = (H + 2 * K) * r
  if implementation(opts) != "chunked":
    vector = r * E * (K * (4.0 + 3 * ordered) + H * 3.0)
    return second_edge_cost(cfg) + Cost(vector=vector, exp=exp, bytes=bytes_read)
  c = min(CHUNK, T)
  N = min(BLOCK, -(-T // c) * c) // c
  padding = -(-T // (N * c)) * N * c / T
  per_query = r * E * (2.0 + 2 * c * (1 if ordered else 2)) + 2 * c * c * (r + E) + 2 * c * E
  per_key = r * E * (4.0 + 4 * (N + 1) ** 2 / (N * c))
  return second_edge_cost(cfg) + Cost(
    matmul=padding * (H * per_query + K * per_key), vector=c * (2.0 * r + 3 * E) * H, exp=exp, bytes=bytes_read
  )
