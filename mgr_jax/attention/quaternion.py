"""Quaternion attention: values travel from key to query through the unit quaternion q̂_i k̂_j*.

y_i = Σ_{j≤i} softmax_j(⟨q_i, k_j⟩/√D) · (q̂_i k̂_j*) v_j, in blocks of four components. The score is the real part of
q_i k_j*, summed over blocks. Products are associative, so q̂_i leaves the sum: transport the values by k̂_j*, attend
as usual, turn the result by q̂_i. Every term keeps its length; a weighted sum of turned vectors does not.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra import hypercomplex_claims
from mgr_jax.attention import quaternion_claims, quaternion_probe, standard
from mgr_jax.attention.mechanism import (
  Context,
  Mechanism,
  append,
  group_heads,
  init_cache,
  merge_heads,
  project_qkv,
  projection_cost,
  qkv_specs,
  rotate,
  ungroup_heads,
)
from mgr_jax.attention.quaternion_options import Options
from mgr_jax.attention.quaternion_transport import pairwise, rotate_by_position, strengthen, turn
from mgr_jax.attention.tiles import segment_axes, visible
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec

INITIAL_LOGIT = -2.944438979166440  # sigmoid of it is 0.05
PRODUCT, UNIT, PLACE = 28.0, 12.0, 12.0  # FLOPs per block of a product, a normalisation, a rotation by position


class Inputs(NamedTuple):
  """Queries [B, T, H, D], keys and values [B, T, K, D] for the scores, and what rotors are made of."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  q_rotor: jax.Array
  k_rotor: jax.Array


def param_specs(cfg, opts: Options):
  """Projections, and with learned strength `lam_raw` [K]."""
  opts.check_head_size(cfg.head_dim)
  specs = qkv_specs(cfg)
  if opts.rotor_strength == "learned":
    specs["lam_raw"] = ParamSpec((cfg.n_kv_head,), ("kv_heads",), role="scalar", init="constant", std=INITIAL_LOGIT)
  return specs


def inputs(params, x_BTC: jax.Array, ctx: Context, opts: Options) -> Inputs:
  """Projects, normalises to RMS 1, and places queries and keys."""
  q, k, v = project_qkv(params, x_BTC, ctx, rope=False, qk_norm=True)
  place = rotate_by_position if opts.rope_mode == "right_rotor" else rotate
  placed = [place(x, ctx.shared["rope"]) for x in (q, k)]
  rotors = (q, k) if opts.rope_mode == "score_only" else placed
  if opts.rotor_strength == "learned":
    strength_K = jax.nn.sigmoid(params["lam_raw"])
    strength_H = jnp.repeat(strength_K, q.shape[2] // k.shape[2])
    rotors = strengthen(rotors[0], strength_H), strengthen(rotors[1], strength_K)
  return Inputs(*placed, v, *rotors)


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence: the cost of softmax attention and 4 products per block; see `Mechanism`."""
  del cfg
  given = inputs(params, x_BTC, ctx, opts)
  out = ungroup_heads(_mix(given, ctx, opts))
  aux = quaternion_probe.diagnostics(params, given, out, ctx, opts) if ctx.probe else {}
  return merge_heads(out, params["wo"]), aux


def _mix(given: Inputs, ctx, opts):
  """[B, K, R, T, D]."""
  n_kv = given.k.shape[2]
  q, q_rotor = (group_heads(x, n_kv) for x in (given.q, given.q_rotor))
  k, v, k_rotor = (x.swapaxes(1, 2) for x in (given.k, given.v, given.k_rotor))
  turns = opts.rotor_action != "none"
  if opts.impl == "reference" and turns:
    return _reference(q, k, v, q_rotor, k_rotor, ctx.segment_ids_BT, opts.rotor_action)
  values = turn(k_rotor, v, opts.rotor_action, True) if turns else v
  if opts.impl == "reference":
    out, _ = standard.dense_attention(q, k, values, ctx.segment_ids_BT)
  else:
    out, _ = standard.tiled_attention(q, k, values, ctx.segment_ids_BT, 0, True)
  return turn(q_rotor, out, opts.rotor_action, False) if turns else out


def _reference(q, k, v, q_rotor, k_rotor, segment_ids_BT, action):
  B, K, R, T, D = q.shape
  scores = jnp.einsum("bkrtd,bksd->bkrts", q, k, preferred_element_type=jnp.float32) * D**-0.5
  place = jnp.arange(T)
  mask = visible(place[:, None], place, 0, *segment_axes(segment_ids_BT, segment_ids_BT))
  weight = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
  repeat = lambda x: jnp.repeat(x, R, axis=1)
  heads = lambda x: x.reshape(B, K * R, *x.shape[3:])
  out = pairwise(heads(weight), heads(q_rotor), repeat(k_rotor), repeat(v), action)
  return out.reshape(q.shape)


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """Placed keys and transported values: the bytes of a plain key/value cache."""
  del opts
  return init_cache(cfg, batch, max_len)


def step(params, x_BtC, state, ctx, cfg, opts: Options):
  """Plain attention over the cache of transported values, then one turn by q̂; `reference` and `tiled` share it."""
  given = inputs(params, x_BtC, ctx, opts)
  turns = opts.rotor_action != "none"
  values = turn(given.k_rotor, given.v, opts.rotor_action, True) if turns else given.v
  state = append(state, given.k, values, ctx)
  out = standard.mix_cached(given.q, state.k_BSKD, state.v_BSKD, params, ctx, cfg, standard.Options())
  if turns:
    out = turn(given.q_rotor, out, opts.rotor_action, False)
  return merge_heads(out, params["wo"]), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """Softmax attention and, per block of four: 28 FLOPs a product, 12 a normalisation, 12 a rotation by position.

  The powers of learned strength take about 30 FLOPs and 4 transcendental calls more. The reference's T²·D form is not
  counted.
  """
  per_block = Cost(vector=PLACE)
  if opts.rotor_action != "none":
    per_block += Cost(vector=UNIT + PRODUCT * (1 if opts.rotor_action == "left" else 2), exp=1.0)
  if opts.rotor_strength == "learned":
    per_block += Cost(vector=UNIT + 30.0, exp=4.0)
  attention = standard.mix_cost(cfg, standard.Options(), T)
  return projection_cost(cfg) + attention + (cfg.n_head + cfg.n_kv_head) * (cfg.head_dim // 4) * per_block


_RECORD = Mechanism(
  name="quaternion",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=init_state,
  step=step,
  cost=cost,
  refs=(
    "Su et al., 2021, arXiv 2104.09864 (relative rotation; here on the right, so that rotors are relative too)",
    "Dao et al., 2022, arXiv 2205.14135 (tiling)",
    "Miyato et al., 2023, arXiv 2310.10375 (values transported between frames; there given by geometry, here by q, k)",
    "Parcollet et al., 2018, arXiv 1806.04418; Tay et al., 2019, arXiv 1906.04393 (quaternion weights; not used)",
    "Brehmer et al., 2023, arXiv 2305.18415 (Clifford generalisation; not used)",
  ),
  variants=(
    "quaternion",
    "quaternion(rotor_action=sandwich,rope_mode=score_only,rotor_strength=learned)",
    "quaternion(rotor_action=none,impl=tiled)",
    "quaternion(rope_mode=standard,rotor_strength=learned,impl=reference)",
  ),
)

MECHANISM = dataclasses.replace(_RECORD, claims=hypercomplex_claims.CLAIMS + quaternion_claims.layer_claims(_RECORD))
