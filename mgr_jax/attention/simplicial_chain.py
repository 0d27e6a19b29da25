"""Modes `two_hop` and `resolvent`: mixtures of powers of one softmax attention matrix A (see `simplicial_hops`)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.mechanism import group_heads, project_heads, rotate, ungroup_heads, write_rows
from mgr_jax.attention.simplicial_hops import dense_hop_outputs, dense_resolvent, hop_outputs, resolvent
from mgr_jax.attention.simplicial_inputs import heated, key_side, normalised, temperature_spec
from mgr_jax.attention.simplicial_options import Options
from mgr_jax.attention.simplicial_sweep import attend, product, solve_resolvent, wide
from mgr_jax.attention.tiles import TILE, padded_length, spans
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec

MAX_RHO = 0.95
INITIAL_RHO = 0.25


def hop_specs(cfg, opts: Options):
  """log τ [H], and hop logits [H, N] that give each hop half the weight of the one before."""
  start = lambda key, shape: jnp.broadcast_to(-math.log(2.0) * jnp.arange(shape[-1]), shape)
  hop = ParamSpec((cfg.n_head, opts.hops), ("heads", None), role="scalar", init=start)
  return temperature_spec(cfg) | {"hop": hop}


def resolvent_specs(cfg, opts: Options):
  """log τ [H], and raw ρ [H] with ρ = 0.95·σ(raw)."""
  del opts
  share = INITIAL_RHO / MAX_RHO
  raw = ParamSpec((cfg.n_head,), ("heads",), role="scalar", init="constant", std=math.log(share / (1 - share)))
  return temperature_spec(cfg) | {"rho_raw": raw}


def _project(params, x_BTC, ctx, cfg):
  """q [B, K, R, T, D] scaled, k and v [B, K, T, D]."""
  q, k = (rotate(normalised(params, x_BTC, name), ctx.shared["rope"]) for name in ("wq", "wk"))
  q = group_heads(heated(q, params, q.shape[-1] ** -0.5), cfg.n_kv_head)
  return q, key_side(k), key_side(project_heads(x_BTC, params["wv"]))


def _hop_weights(params, cfg):
  """Softmax of the hop logits, [N, K, R, 1, 1]."""
  weights = jax.nn.softmax(params["hop"], -1).T
  return weights.reshape(weights.shape[0], cfg.n_kv_head, -1, 1, 1)


def _rho(params, cfg):
  """ρ [K, R]."""
  return MAX_RHO * jax.nn.sigmoid(params["rho_raw"]).reshape(cfg.n_kv_head, -1)


def _mixture(params, outputs, cfg):
  """Σ_n μ_n y_n of stacked outputs [N, B, K, R, T, D], as [B, T, H, D]."""
  mixed = jnp.sum(_hop_weights(params, cfg)[:, None] * wide(outputs), 0)
  return ungroup_heads(mixed.astype(outputs.dtype))


def mix_hops(params, x_BTC, ctx, cfg, opts: Options):
  """Σ_n μ_n A^n v of a whole sequence [B, T, H, D], and diagnostics."""
  run = dense_hop_outputs if opts.impl == "reference" else hop_outputs
  outputs, lse = run(*_project(params, x_BTC, ctx, cfg), ctx.segment_ids_BT, opts.hops)
  aux = {}
  if ctx.probe:
    weights = _hop_weights(params, cfg).reshape(opts.hops, -1)
    mean_hops = jnp.arange(1, opts.hops + 1) @ weights
    aux = {"hop_weights": weights.T, "effective_hops": mean_hops, **_common(params, lse)}
  return _mixture(params, outputs, cfg), aux


def mix_resolvent(params, x_BTC, ctx, cfg, opts: Options):
  """(1-ρ) A (I - ρA)⁻¹ v of a whole sequence [B, T, H, D], and diagnostics."""
  run = dense_resolvent if opts.impl == "reference" else resolvent
  rho = _rho(params, cfg)
  out, lse = run(*_project(params, x_BTC, ctx, cfg), rho, ctx.segment_ids_BT)
  aux = {}
  if ctx.probe:
    aux = {"rho": rho.reshape(-1), "effective_hops": 1 / (1 - rho.reshape(-1)), **_common(params, lse)}
  return ungroup_heads(out), aux


def _common(params, lse):
  return {"tau": jnp.exp(params["log_tau"]), "logsumexp": jnp.mean(lse)}


class HopState(NamedTuple):
  """Keys and values [B, S, K, D], and for every further hop the outputs of the one before [B, S, H, D]: H/K times the
  size of the values."""

  k: jax.Array
  values: tuple[jax.Array, ...]


def _buffers(cfg, batch, max_len, heads):
  return jnp.zeros((batch, max_len, heads, cfg.head_dim), cfg.compute_dtype)


def init_hops(cfg, opts: Options, batch: int, max_len: int) -> HopState:
  """Empty caches."""
  key, per_head = (_buffers(cfg, batch, max_len, heads) for heads in (cfg.n_kv_head, cfg.n_head))
  return HopState(key, (key, *[per_head] * (opts.hops - 1)))


def init_resolvent(cfg, opts: Options, batch: int, max_len: int) -> HopState:
  """Empty caches of keys [B, S, K, D] and of z [B, S, H, D]; values are not needed once used."""
  del opts
  return HopState(_buffers(cfg, batch, max_len, cfg.n_kv_head), (_buffers(cfg, batch, max_len, cfg.n_head),))


def _rows(q, k_new, cache_BSKD, start_B1):
  """The new rows of A: weights of the tokens in the cache [B, K, R, t, S] and of the new ones [B, K, R, t, t]."""
  old = product("bkrtd,bksd->bkrts", q, key_side(cache_BSKD))
  new = product("bkrtd,bksd->bkrts", q, k_new)
  S, t = old.shape[-1], new.shape[-1]
  old = jnp.where((jnp.arange(S) < start_B1)[:, None, None, None], old, -jnp.inf)
  new = jnp.where(np.tri(t, dtype=bool), new, -jnp.inf)
  weight = jax.nn.softmax(jnp.concatenate([old, new], -1), -1)
  return weight[..., :S], weight[..., S:]


def _start(ctx, batch):
  return jnp.broadcast_to(ctx.positions_BT[:, :1], (batch, 1))


def step_hops(params, x_BtC, state: HopState, ctx, cfg, opts: Options):
  """t new tokens: (1 + N)·S·D·2 FLOPs per token and query head."""
  del opts
  q, k, v = _project(params, x_BtC, ctx, cfg)
  old, new = _rows(q, k, state.k, _start(ctx, len(x_BtC)))
  put = lambda buffer, rows: write_rows(buffer, rows, ctx.positions_BT, ctx.valid_BT)
  rows, outputs, values = v, [], []
  for n, buffer in enumerate(state.values):
    cached = key_side(buffer) if n == 0 else group_heads(buffer, cfg.n_kv_head)
    values.append(put(buffer, key_side(rows) if n == 0 else ungroup_heads(rows)))
    rows = (attend(old, cached) + attend(new, rows)).astype(v.dtype)
    outputs.append(rows)
  state = HopState(put(state.k, key_side(k)), tuple(values))
  return _mixture(params, jnp.stack(outputs), cfg), state


def step_resolvent(params, x_BtC, state: HopState, ctx, cfg, opts: Options):
  """t new tokens: attention over past z, then a triangular system among the new tokens."""
  del opts
  q, k, v = _project(params, x_BtC, ctx, cfg)
  rho = _rho(params, cfg)[..., None, None]
  old, new = _rows(q, k, state.k, _start(ctx, len(x_BtC)))
  earlier = attend(old, group_heads(state.values[0], cfg.n_kv_head))
  z = solve_resolvent(rho, new, (1 - rho) * wide(v)[:, :, None] + rho * earlier)
  out = (earlier + attend(new, z)).astype(v.dtype)
  put = lambda buffer, rows: write_rows(buffer, rows, ctx.positions_BT, ctx.valid_BT)
  return ungroup_heads(out), HopState(put(state.k, key_side(k)), (put(state.values[0], ungroup_heads(z)),))


def _visited(T: int) -> float:
  """Keys per query in whole tiles."""
  return sum((span.stop - span.q_start) * span.stop for span in spans(padded_length(T))) / T


def hops_cost(cfg, opts: Options, T: int) -> Cost:
  """Per token and query head 2·(1 + N)·m·D FLOPs, where m counts the keys of whole tiles."""
  keys, width = _visited(T), cfg.head_dim
  size = jnp.dtype(cfg.compute_dtype).itemsize * width
  return Cost(
    matmul=2.0 * (1 + opts.hops) * keys * cfg.n_head * width,
    vector=4.0 * keys * cfg.n_head,
    exp=keys * cfg.n_head,
    bytes=size * T / 2 * (2 * cfg.n_kv_head + (opts.hops - 1) * cfg.n_head),
  )


def resolvent_cost(cfg, opts: Options, T: int) -> Cost:
  """Per token and query head 4·m·D FLOPs over m keys of whole tiles, and 10·TILE² + 14·TILE·D for the tile's system."""
  del opts
  keys, width = _visited(T), cfg.head_dim
  size = jnp.dtype(cfg.compute_dtype).itemsize * width
  padding = padded_length(T) / T
  doublings = (TILE - 1).bit_length()
  system = 2.0 * (doublings - 1) * TILE**2 + 2.0 * (doublings + 1) * TILE * width
  return Cost(
    matmul=cfg.n_head * (4.0 * keys * width + padding * system),
    vector=4.0 * keys * cfg.n_head,
    exp=keys * cfg.n_head,
    bytes=size * T / 2 * (cfg.n_kv_head + cfg.n_head),
  )
