"""Mode `monodromy`: query i crosses its keys from right to left, each crossing takes the share β_ij = σ(logit_ij) of
what is left, and the remainder goes to a learned null value: y_i = Σ_j A_ij v_j + (1 - Σ_j A_ij) v_∅.

Σ_j A_ij + remainder = 1 is an identity of stick-breaking, true for any β. With `score=rapidity` β = b/(b+c) of the
six-vertex R-matrix at u_i - u_j: content-independent, no queries or keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention import braid_inputs
from mgr_jax.attention.braid_gates import causal_mask
from mgr_jax.attention.braid_options import Options
from mgr_jax.attention.braid_scores import ADDITIVE, BILINEAR, RAPIDITY
from mgr_jax.attention.braid_sweep import dense_sweep, sweep
from mgr_jax.attention.mechanism import group_heads, project_heads, rms_norm, ungroup_heads, write_rows
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec

SCORES = {"additive": ADDITIVE, "bilinear": BILINEAR, "rapidity": RAPIDITY}


class SweepCache(NamedTuple):
  """Values of all tokens so far, and what their logits need: keys, key scores, or nothing (rapidity)."""

  keys_BS: jax.Array | None
  v_BSKD: jax.Array


def null_value(cfg) -> ParamSpec:
  """v_∅ [H, D], zero at the start."""
  return ParamSpec((cfg.n_head, cfg.head_dim), ("heads", "head_dim"), role="scalar", init="zeros")


def mix(params, x_BTC, v_BTKD, ctx, cfg, opts: Options):
  """The sweep of a whole sequence [B, T, H, D], and diagnostics."""
  del cfg
  positions, score = ctx.positions_BT, SCORES[opts.scoring]
  q, k = _sides(params, _queries(params, x_BTC, opts), _keys(params, x_BTC, opts), positions, positions, opts)
  q, k = _group((q, k), v_BTKD.shape[2])
  v, segments = v_BTKD.swapaxes(1, 2), ctx.segment_ids_BT

  def run(v):
    if opts.impl == "reference":
      return dense_sweep(score, q, k, v, causal_mask(v.shape[2], segments, score.strict))
    return sweep(score, q, k, v, segments)

  out, rest = run(v)
  aux = {"leftover": jnp.mean(rest), "mean_lag": _mean_lag(run, v)} if ctx.probe else {}
  return _with_null(out, rest, params["v_null"]), aux


def _mean_lag(run, v):
  """Mean of Σ_j A_ij (i - j) / Σ_j A_ij over queries that take anything."""
  index = jnp.arange(v.shape[2], dtype=jnp.float32)
  moments = jnp.broadcast_to(jnp.stack([jnp.ones_like(index), index], -1), (*v.shape[:3], 2))
  mass, first = jnp.moveaxis(run(moments)[0], -1, 0)
  return jnp.mean(jnp.where(mass > 1e-6, index - first / jnp.maximum(mass, 1e-6), 0.0))


def _with_null(out_BKRTD, rest_BKRT, null_HD):
  return ungroup_heads(out_BKRTD) + ungroup_heads(rest_BKRT)[..., None] * null_HD


def _group(tree, n_kv_head):
  return jax.tree.map(lambda x: group_heads(x, n_kv_head), tree)


def _queries(params, x, opts):
  if opts.scoring == "bilinear":
    return rms_norm(project_heads(x, params["wq"]))
  return braid_inputs.query_scores(params, x, opts) if opts.scoring == "additive" else None


def _keys(params, x, opts):
  if opts.scoring == "bilinear":
    return rms_norm(project_heads(x, params["wk"]))
  return braid_inputs.key_scores(params, x, opts) if opts.scoring == "additive" else None


def _sides(params, queries, keys, q_positions, k_positions, opts):
  """Query and key side of the logits, trees of [B, T, H or K, ...]."""
  if opts.scoring == "bilinear":
    return {"q": queries, "bias": jnp.zeros(queries.shape[:3], jnp.float32)}, keys
  if opts.scoring == "additive":
    return braid_inputs.shifted(params, queries, keys, q_positions, k_positions, opts)
  return braid_inputs.rapidity_side(params, q_positions)[0], braid_inputs.rapidity_side(params, k_positions)[1]


def init_state(cfg, opts: Options, batch: int, max_len: int) -> SweepCache:
  """An empty cache for `max_len` tokens."""
  K, D = cfg.n_kv_head, cfg.head_dim
  values = jnp.zeros((batch, max_len, K, D), cfg.compute_dtype)
  keys = {"bilinear": values, "additive": jnp.zeros((batch, max_len, K), jnp.float32), "rapidity": None}
  return SweepCache(keys[opts.scoring], values)


def step(params, x_BtC, v_BtKD, state: SweepCache, ctx, cfg, opts: Options):
  """The sweeps of t new tokens over the cache, O(S) each, and the new cache."""
  del cfg
  score = SCORES[opts.scoring]
  put = lambda buffer, new: write_rows(buffer, new, ctx.positions_BT, ctx.valid_BT)
  state = SweepCache(jax.tree.map(put, state.keys_BS, _keys(params, x_BtC, opts)), put(state.v_BSKD, v_BtKD))
  index = jnp.arange(state.v_BSKD.shape[1])[None, :]
  q, k = _sides(params, _queries(params, x_BtC, opts), state.keys_BS, ctx.positions_BT, index, opts)
  q, k = _group((q, k), v_BtKD.shape[2])
  mask = ctx.positions_BT[:, None, None, :, None] - int(score.strict) >= index[0]
  out, rest = dense_sweep(score, q, k, state.v_BSKD.swapaxes(1, 2), mask)
  return _with_null(out, rest, params["v_null"]), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """Per token and head T/2 keys, each 2·D FLOPs for the value (2·D more for bilinear logits), 3 exp, 8 vector steps.

  The early stop of sharp sweeps and the triangular products that replace cumulative sums are not counted.
  """
  H, K, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
  bilinear = opts.scoring == "bilinear"
  item = jnp.dtype(cfg.compute_dtype).itemsize
  key_bytes = {"bilinear": D * item, "additive": 4, "rapidity": 0}[opts.scoring]
  gates = H * T / 2 * Cost(matmul=(4.0 if bilinear else 2.0) * D, vector=8.0, exp=3.0)
  return gates + Cost(bytes=K * T / 2 * (D * item + key_bytes))
