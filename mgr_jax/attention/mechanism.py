"""The `Mechanism` record, the context every mechanism receives, and the helper for query/key/value mechanisms."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mgr_jax.claims import Claim
from mgr_jax.flops import Cost
from mgr_jax.homotopy import Homotopy
from mgr_jax.params import ParamSpec


@struct.dataclass
class Context:
  """What a mechanism may know besides its input.

  Attributes:
    positions_BT: int32 position of each token inside its document; the leading axis is 1 when all rows agree.
    segment_ids_BT: int32 document number of each token, or `None` when every row is one document. Tokens of different
      documents must not see each other, and prefix states restart at a border.
    valid_BT: for `step` only: `False` at padding, always a suffix of the row; padding leaves the state as it was.
      `None` means that all tokens are real.
    annealed: traced scalars that a schedule drives; a mechanism finds those of its own options, by option.
    shared: arrays that the model computed once for all layers: `rope` = (cos, sin), each float32 [B or 1, T, D/2].
    probe: static; diagnostics go into `aux` only when it is set.
  """

  positions_BT: jax.Array
  segment_ids_BT: jax.Array | None = None
  valid_BT: jax.Array | None = None
  annealed: dict[str, jax.Array] = struct.field(default_factory=dict)
  shared: dict[str, Any] = struct.field(default_factory=dict)
  probe: bool = struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """Everything the system knows of one way to mix tokens.

  Args:
    name: the word used in the attention grammar.
    options: frozen dataclass of static options, every field with a default; its `__post_init__` raises `ValueError`
      naming option, value and range. It has a field `impl` whose values include `auto` and `reference`.
    param_specs: `(cfg, opts) -> dict[str, ParamSpec]`; raises `ValueError` when `opts` do not fit `cfg`.
    apply: `(params, x_BTC, ctx, cfg, opts) -> (y_BTC, aux)`: pure and exactly causal, same dtype as x. `aux` maps names
      to small float32 arrays; `aux["aux_loss"]` is added to the objective.
    init_state: `(cfg, opts, batch, max_len) -> state`, a PyTree of fixed shapes for at most `max_len` tokens.
    step: `(params, x_BtC, state, ctx, cfg, opts) -> (y_BtC, state)` for t >= 1 new tokens; equal to `apply` on the
      whole prefix. `ctx.positions_BT` tells where the new tokens stand.
    cost: `(cfg, opts, T) -> Cost`, forward, per token.
    claims: the mathematics this mechanism promises.
    refs: papers, and what is not taken from them.
    variants: grammar strings that together exercise every mode; the conformance suite runs each.
    annealed: `opts -> {option: Homotopy}` of the options that change during training; their values reach `apply` and
      `step` as `ctx.annealed[option]`, and without one they stand at their first value.
    snapped: `opts -> options` for the last 5% of training, with the same parameters; equal to `opts` without a change.
    wrapper: the name takes an item of the grammar and changes the stack around it; `options` are those of the stack,
      and `attention.reversible.check` says what fits.
  """

  name: str
  options: type
  param_specs: Callable[..., dict[str, ParamSpec]]
  apply: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  init_state: Callable[..., Any]
  step: Callable[..., tuple[jax.Array, Any]]
  cost: Callable[..., Cost]
  claims: tuple[Claim, ...] = ()
  refs: tuple[str, ...] = ()
  variants: tuple[str, ...] = ()
  annealed: Callable[[Any], dict[str, Homotopy]] = lambda opts: {}
  snapped: Callable[[Any], Any] = lambda opts: opts
  wrapper: bool = False


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(mean(x²) + eps) over the last axis, without gain; computed in float32, returned in x's dtype."""
  x32 = x.astype(jnp.float32)
  return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype)


def rope_tables(positions_BT: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
  """cos and sin of position · base^(-2i/D), float32 [B, T, D/2] (Su et al., 2021, arXiv 2104.09864)."""
  inverse = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions_BT.astype(jnp.float32)[..., None] * inverse
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHD: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pair (x_i, x_{i+D/2}) by the position's angle; relative under dot products."""
  cos, sin = (t[:, :, None, :] for t in rope)
  a, b = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHD.dtype)


def qkv_specs(cfg) -> dict[str, ParamSpec]:
  """Projection tables wq [C, H, D], wk and wv [C, K, D], wo [H, D, C] (zero, so a layer starts as the identity)."""
  C, H, K, D = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim
  return {
    "wq": ParamSpec((C, H, D), ("embed", "heads", "head_dim")),
    "wk": ParamSpec((C, K, D), ("embed", "kv_heads", "head_dim")),
    "wv": ParamSpec((C, K, D), ("embed", "kv_heads", "head_dim")),
    "wo": ParamSpec((H, D, C), ("heads", "head_dim", "embed"), init="zeros", fan_in=2),
  }


def project_heads(x_BTC: jax.Array, w_CHD: jax.Array) -> jax.Array:
  """x_BTC · w_CHD -> [B, T, H, D], as one matrix product."""
  C, H, D = w_CHD.shape
  return (x_BTC @ w_CHD.reshape(C, H * D).astype(x_BTC.dtype)).reshape(*x_BTC.shape[:-1], H, D)


def merge_heads(o_BTHD: jax.Array, w_HDC: jax.Array) -> jax.Array:
  """o_BTHD · w_HDC -> [B, T, C], as one matrix product."""
  H, D, C = w_HDC.shape
  return o_BTHD.reshape(*o_BTHD.shape[:-2], H * D) @ w_HDC.reshape(H * D, C).astype(o_BTHD.dtype)


def group_heads(x_BTH: jax.Array, n_kv_head: int) -> jax.Array:
  """[B, T, H, ...] -> [B, K, R, T, ...]: the R = H/K query heads of one key/value head get an axis of their own."""
  B, T, H = x_BTH.shape[:3]
  return jnp.moveaxis(x_BTH.reshape(B, T, n_kv_head, H // n_kv_head, *x_BTH.shape[3:]), 1, 3)


def ungroup_heads(x_BKRT: jax.Array) -> jax.Array:
  """Inverse of `group_heads`."""
  B, K, R, T = x_BKRT.shape[:4]
  return jnp.moveaxis(x_BKRT, 3, 1).reshape(B, T, K * R, *x_BKRT.shape[4:])


def project_qkv(params, x_BTC: jax.Array, ctx: Context, *, rope: bool, qk_norm: bool):
  """Queries [B, T, H, D], keys and values [B, T, K, D], the first two normalised and rotated as asked."""
  q, k, v = (project_heads(x_BTC, params[w]) for w in ("wq", "wk", "wv"))
  if qk_norm:
    q, k = rms_norm(q), rms_norm(k)
  if rope:
    q, k = rotate(q, ctx.shared["rope"]), rotate(k, ctx.shared["rope"])
  return q, k, v


class KVCache(NamedTuple):
  """Keys and values of all tokens so far, in the compute dtype; row b holds its tokens at 0 .. length_b - 1."""

  k_BSKD: jax.Array
  v_BSKD: jax.Array


def init_cache(cfg, batch: int, max_len: int) -> KVCache:
  """An empty cache for `max_len` tokens: 2 · B · max_len · K · D numbers."""
  zeros = jnp.zeros((batch, max_len, cfg.n_kv_head, cfg.head_dim), cfg.compute_dtype)
  return KVCache(zeros, zeros)


def write_rows(buffer_BS: jax.Array, new_Bt: jax.Array, positions_Bt: jax.Array, valid_Bt=None) -> jax.Array:
  """Writes `new[b, i]` to `buffer[b, positions[b, i]]`; padding and positions beyond the buffer are dropped."""
  B, S = buffer_BS.shape[:2]
  index = jnp.broadcast_to(positions_Bt, new_Bt.shape[:2])
  if valid_Bt is not None:
    index = jnp.where(valid_Bt, index, S)
  rows = jnp.arange(B)[:, None]
  return buffer_BS.at[rows, index].set(new_Bt.astype(buffer_BS.dtype), mode="drop")


def append(cache: KVCache, k_BtKD: jax.Array, v_BtKD: jax.Array, ctx: Context) -> KVCache:
  """Writes the new keys and values at `ctx.positions_BT`."""
  put = lambda buffer, new: write_rows(buffer, new, ctx.positions_BT, ctx.valid_BT)
  return KVCache(put(cache.k_BSKD, k_BtKD), put(cache.v_BSKD, v_BtKD))


def qkv_mechanism(
  *,
  name: str,
  options: type,
  mix: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  mix_cached: Callable[..., jax.Array],
  mix_cost: Callable[..., Cost],
  extra_specs: Callable[..., dict[str, ParamSpec]] | None = None,
  rope: bool | Callable[[Any], bool] = True,
  qk_norm: bool | Callable[[Any], bool] = True,
  **record,
) -> Mechanism:
  """Builds a `Mechanism` from the way it combines queries, keys and values.

  The helper owns projections, QK-norm, RoPE, grouped heads and the cache; query head h reads key/value head h // (H/K),
  and repeated keys are never materialised.

  Args:
    mix: `(q_BTHD, k_BTKD, v_BTKD, params, ctx, cfg, opts) -> (o_BTHD, aux)` over a whole sequence.
    mix_cached: `(q_BtHD, k_BSKD, v_BSKD, params, ctx, cfg, opts) -> o_BtHD`: the query at `ctx.positions_BT[b, i]` sees
      cache rows 0 .. position; rows beyond hold garbage.
    mix_cost: `(cfg, opts, T) -> Cost` of `mix` alone; projections are added here.
    extra_specs: further parameters of the mechanism, `(cfg, opts) -> dict`.
    rope, qk_norm: a constant or a function of the options.
    **record: the remaining fields of `Mechanism`.
  """
  chosen = lambda rule, opts: rule(opts) if callable(rule) else rule

  def param_specs(cfg, opts):
    return qkv_specs(cfg) | (extra_specs(cfg, opts) if extra_specs else {})

  def project(params, x_BTC, ctx, opts):
    return project_qkv(params, x_BTC, ctx, rope=chosen(rope, opts), qk_norm=chosen(qk_norm, opts))

  def apply(params, x_BTC, ctx, cfg, opts):
    out_BTHD, aux = mix(*project(params, x_BTC, ctx, opts), params, ctx, cfg, opts)
    return merge_heads(out_BTHD, params["wo"]), aux

  def init_state(cfg, opts, batch, max_len):
    del opts
    return init_cache(cfg, batch, max_len)

  def step(params, x_BtC, state, ctx, cfg, opts):
    q, k, v = project(params, x_BtC, ctx, opts)
    state = append(state, k, v, ctx)
    out = mix_cached(q, state.k_BSKD, state.v_BSKD, params, ctx, cfg, opts)
    return merge_heads(out, params["wo"]), state

  def cost(cfg, opts, T):
    return projection_cost(cfg) + mix_cost(cfg, opts, T)

  return Mechanism(
    name=name,
    options=options,
    param_specs=param_specs,
    apply=apply,
    init_state=init_state,
    step=step,
    cost=cost,
    **record,
  )


def projection_cost(cfg) -> Cost:
  """Cost per token of wq, wk, wv and wo: 2C(2HD + 2KD) FLOPs."""
  return Cost(matmul=4.0 * cfg.n_embd * cfg.head_dim * (cfg.n_head + cfg.n_kv_head))
