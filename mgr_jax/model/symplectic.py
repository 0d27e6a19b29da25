"""Kicks of a causal symplectic layer: gradients of potentials in closed form.

A layer moves (q, p) of every token by p <- p - h∇V(q; past q), q <- q + h∇T(p). With x̂ = rms_norm(x),

    V_t(q) = Σ_j a_j log cosh(w_j·q̂ + c_j) - Σ_h (γ_h/β_h) log(1 + Σ_{s<t} exp(β_h ⟨ρ_t W_q,h q̂, ρ_s k_s⟩)) + λ|q|²/2
    T(p)   = Σ_j a_j log cosh(w_j·p̂ + c_j) + λ|p|²/2

with ρ the rotary embedding and k_s = rms_norm(W_k q̂_s) of strictly earlier tokens. The gradient of the second term is
softmax attention whose values are its keys, whose output matrix is W_qᵀ, and which has one more key, zero, that all may
see (Hoover et al., 2023, arXiv 2302.07253, without causality). The others are multilayer perceptrons with tied weights
(Jin et al., 2020, arXiv 2001.03750).

Given the past the map of one token's (q, p) is symplectic. The map of all tokens is not, and cannot be: the derivative
of a joint symplectic kick is symmetric in the tokens, that of a causal one triangular, so nothing but the diagonal
would remain.

Through the norm ∇V grows as 1/|q| towards zero: the order of an integrator shows only on orbits that stay away from it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.mechanism import Context, group_heads, merge_heads, project_heads, ungroup_heads, write_rows
from mgr_jax.attention.standard import tiled_attention
from mgr_jax.attention.tiles import segment_axes, visible
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec

EPSILON = 1e-6
SOFTPLUS_START = 0.05  # of the confinement above its minimum


def hidden_width(cfg) -> int:
  """Hidden width of both perceptrons, such that a layer has the parameters of a standard one: 5C at ratio 4, K = H."""
  return cfg.mlp_dim + (cfg.n_embd + cfg.n_kv_head * cfg.head_dim) // 2


def kick_specs(cfg) -> dict[str, dict[str, ParamSpec]]:
  """Parameters of one layer: `attention` holds those of V, `mlp` those of T.

  wq [C, H, D], wk [C, K, D], w [C, M]; amplitude, bias [M]; beta, gate [H]; confinement []. Amplitudes and gates start
  at zero, so that the stack starts as confined free motion.

  Raises:
    ValueError: a kind of MLP other than the default, which would have no effect.
  """
  if cfg.mlp != "relu2":
    raise ValueError(f"mode=symplectic brings its own MLP, so mlp={cfg.mlp} has no effect; use mlp=relu2")
  C, H, K, D = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim
  heads = lambda **init: ParamSpec((H,), ("heads",), role="scalar", **init)
  attention = {
    "wq": ParamSpec((C, H, D), ("embed", "heads", "head_dim")),
    "wk": ParamSpec((C, K, D), ("embed", "kv_heads", "head_dim")),
    "beta": heads(init="constant", std=D**-0.5),
    "gate": heads(init="zeros"),
  }
  return {"attention": attention | _pointwise_specs(cfg), "mlp": _pointwise_specs(cfg)}


def _pointwise_specs(cfg) -> dict[str, ParamSpec]:
  C, M = cfg.n_embd, hidden_width(cfg)
  hidden = ParamSpec((M,), ("mlp",), role="scalar", init="zeros")
  start = math.log(math.expm1(SOFTPLUS_START))
  return {
    "w": ParamSpec((C, M), ("embed", "mlp")),
    "amplitude": hidden,
    "bias": hidden,
    "confinement": ParamSpec((), (), role="scalar", init="constant", std=start),
  }


def confinement(params, lambda_min: float) -> jax.Array:
  """λ = λ_min + softplus(raw), a positive scalar."""
  return lambda_min + jax.nn.softplus(params["confinement"])


def normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x̂ = x/r and 1/r with r = √(mean x² + ε), in float32 or wider."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  inverse = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON)
  return x * inverse, inverse


def through_norm(g: jax.Array, x_hat: jax.Array, inverse: jax.Array) -> jax.Array:
  """The gradient in x of a function with gradient g in x̂: (g - x̂⟨x̂, g⟩/w)/r, exact with ε."""
  return (g - x_hat * jnp.mean(x_hat * g, -1, keepdims=True)) * inverse


def grad_T(params, p_BTC: jax.Array, cfg, *, lambda_min: float) -> jax.Array:
  """∇T(p), token by token; same shape and dtype as p. `params` = the `mlp` part, matrices in the compute dtype."""
  del cfg
  p_hat, inverse = normalize(p_BTC)
  return _assemble(_pointwise(params, p_hat), p_hat, inverse, params, p_BTC, lambda_min)


def grad_V(params, q_BTC: jax.Array, ctx: Context, cfg, *, lambda_min: float, impl: str = "auto") -> jax.Array:
  """∇_{q_t} V_t(q_t; q_s, s < t) at every t: strictly causal in the past and a gradient in the present.

  Args:
    params: the `attention` part of a layer, matrices in the compute dtype.
    q_BTC: any float dtype; products are taken in the dtype of the matrices, the rest in float32 or wider.
    ctx: `shared["rope"]`, and `segment_ids_BT` for packed documents, which do not see each other.
    impl: `auto` (query tiles, memory O(T)), or `reference` (dense scores, in the dtype of the input).
  """
  q_hat, inverse = normalize(q_BTC)
  out, _ = _attend(params, q_hat, ctx, cfg, impl)
  g = _pointwise(params, q_hat) + _pull_back(params, out, ctx)
  return _assemble(g, q_hat, inverse, params, q_BTC, lambda_min)


def _assemble(g, x_hat, inverse, params, x, lambda_min):
  full = through_norm(g, x_hat, inverse) + confinement(params, lambda_min) * x.astype(x_hat.dtype)
  return full.astype(x.dtype)


def _pointwise(params, x_hat):
  """Wᵀ(a ∘ tanh(W x̂ + c))."""
  w = params["w"]
  hidden = jnp.tanh((x_hat.astype(w.dtype) @ w).astype(x_hat.dtype) + params["bias"])
  return ((params["amplitude"] * hidden).astype(w.dtype) @ w.T).astype(x_hat.dtype)


def _rotate(x_BTHD, rope, sign: int = 1):
  """Rotary embedding, or with sign -1 its transpose, in float32 or wider."""
  cos, sin = (t[:, :, None, :].astype(x_BTHD.dtype) for t in rope)
  a, b = jnp.split(x_BTHD, 2, axis=-1)
  return jnp.concatenate([a * cos - sign * b * sin, b * cos + sign * a * sin], -1)


def _queries(params, x_hat, ctx):
  """β ρ_t W_q x̂ times √D, which the attention functions divide by."""
  q = project_heads(x_hat.astype(params["wq"].dtype), params["wq"]).astype(x_hat.dtype)
  scale = params["beta"] * q.shape[-1] ** 0.5
  return (_rotate(q, ctx.shared["rope"]) * scale[:, None]).astype(params["wq"].dtype)


def _keys(params, x_hat, ctx):
  """ρ_s k_s [B, T, K, D]."""
  k, _ = normalize(project_heads(x_hat.astype(params["wk"].dtype), params["wk"]).astype(x_hat.dtype))
  return _rotate(k, ctx.shared["rope"]).astype(params["wk"].dtype)


def _pull_back(params, out_BTHD, ctx):
  """-Σ_h γ_h W_qᵀ ρ_tᵀ o_h, the attention kick in x̂."""
  wide = jnp.promote_types(out_BTHD.dtype, jnp.float32)
  turned = _rotate(out_BTHD.astype(wide), ctx.shared["rope"], -1) * -params["gate"][:, None]
  return merge_heads(turned.astype(out_BTHD.dtype), jnp.moveaxis(params["wq"], 0, -1)).astype(wide)


def _attend(params, x_hat, ctx, cfg, impl):
  """Attention over the null key and strictly earlier keys: (o_BTHD, logsumexp_BHT).

  Moving the keys one place up makes "strictly earlier" the usual causal mask, and the place that gets free at the start
  of every document takes the null key, whose key and value are zero.
  """
  q, k = _queries(params, x_hat, ctx), _keys(params, x_hat, ctx)
  first = jnp.arange(k.shape[1])[None, :] == 0
  if ctx.segment_ids_BT is not None:
    first = first | (ctx.segment_ids_BT != jnp.roll(ctx.segment_ids_BT, 1, axis=1))
  k = jnp.where(first[:, :, None, None], 0, jnp.roll(k, 1, axis=1)).swapaxes(1, 2)
  q = group_heads(q, cfg.n_kv_head)
  if impl == "reference":
    out, mass = _dense(q, k, ctx.segment_ids_BT)
  else:
    out, mass = tiled_attention(q, k, k, ctx.segment_ids_BT, 0, False)
  return ungroup_heads(out), mass.reshape(mass.shape[0], -1, mass.shape[-1])


def _dense(q_BKRTD, k_BKSD, segment_ids_BT):
  """`tiled_attention` with values = keys, scores [B, K, R, T, S], in the dtype of the input."""
  position = jnp.arange(q_BKRTD.shape[3])
  mask = visible(position[:, None], position[None, :], 0, *segment_axes(segment_ids_BT, segment_ids_BT))
  scores = jnp.einsum("bkrtd,bksd->bkrts", q_BKRTD, k_BKSD) * q_BKRTD.shape[-1] ** -0.5
  scores = jnp.where(mask, scores, -jnp.inf)
  out = jnp.einsum("bkrts,bksd->bkrtd", jax.nn.softmax(scores, -1), k_BKSD)
  return out, jax.nn.logsumexp(scores, -1)


class KickState(NamedTuple):
  """Rotated keys of all tokens so far, in the compute dtype: half of what attention with values of its own stores."""

  k_BSKD: jax.Array


def init_state(cfg, batch: int, max_len: int) -> KickState:
  """An empty state for `max_len` tokens."""
  return KickState(jnp.zeros((batch, max_len, cfg.n_kv_head, cfg.head_dim), cfg.compute_dtype))


def grad_V_step(params, q_BtC: jax.Array, state: KickState, ctx: Context, cfg, *, lambda_min: float):
  """`grad_V` at t >= 1 new tokens, at `ctx.positions_BT` of rows with `ctx.valid_BT`: (gradient, state)."""
  q_hat, inverse = normalize(q_BtC)
  state = KickState(write_rows(state.k_BSKD, _keys(params, q_hat, ctx), ctx.positions_BT, ctx.valid_BT))
  q, k = group_heads(_queries(params, q_hat, ctx), cfg.n_kv_head), state.k_BSKD.swapaxes(1, 2)
  scores = jnp.einsum("bkrtd,bksd->bkrts", q, k, preferred_element_type=q_hat.dtype) * q.shape[-1] ** -0.5
  before = ctx.positions_BT[:, None, None, :, None] - 1
  scores = jnp.where(visible(before, jnp.arange(k.shape[2])), scores, -jnp.inf)
  scores = jnp.concatenate([jnp.zeros_like(scores[..., :1]), scores], -1)
  weight = jax.nn.softmax(scores, -1)[..., 1:].astype(k.dtype)
  out = ungroup_heads(jnp.einsum("bkrts,bksd->bkrtd", weight, k, preferred_element_type=q_hat.dtype)).astype(k.dtype)
  g = _pointwise(params, q_hat) + _pull_back(params, out, ctx)
  return _assemble(g, q_hat, inverse, params, q_BtC, lambda_min), state


def potential(params, q_BTC: jax.Array, ctx: Context, cfg, *, lambda_min: float, impl: str = "auto") -> jax.Array:
  """V_t(q_t; past) [B, T], a diagnostic: only `impl=reference` is differentiable, in q_t with the past frozen."""
  q_hat, _ = normalize(q_BTC)
  _, mass_BHT = _attend(params, q_hat, ctx, cfg, impl)
  wells = jnp.einsum("h,bht->bt", params["gate"] / params["beta"], mass_BHT)
  return _pointwise_energy(params, q_BTC, q_hat, lambda_min) - wells


def kinetic(params, p_BTC: jax.Array, cfg, *, lambda_min: float) -> jax.Array:
  """T(p_t) [B, T]."""
  del cfg
  return _pointwise_energy(params, p_BTC, normalize(p_BTC)[0], lambda_min)


def _pointwise_energy(params, x, x_hat, lambda_min):
  z = (x_hat.astype(params["w"].dtype) @ params["w"]).astype(x_hat.dtype) + params["bias"]
  log_cosh = jnp.abs(z) + jnp.log1p(jnp.exp(-2 * jnp.abs(z))) - math.log(2)
  quadratic = confinement(params, lambda_min) / 2 * jnp.sum(jnp.square(x.astype(x_hat.dtype)), -1)
  return log_cosh @ params["amplitude"].astype(x_hat.dtype) + quadratic


def potential_cost(cfg, T: int) -> Cost:
  """Forward cost per token of `grad_V` at context T; causal scores at T/2 keys."""
  C, H, K, D = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim
  attention = Cost(
    matmul=2.0 * C * D * (2 * H + K) + 2.0 * T * H * D,
    vector=1.5 * T * H,
    exp=T / 2 * H,
    bytes=T / 2 * K * D * jnp.dtype(cfg.compute_dtype).itemsize,
  )
  return attention + kinetic_cost(cfg)


def kinetic_cost(cfg) -> Cost:
  """Forward cost per token of `grad_T`."""
  M = hidden_width(cfg)
  return Cost(matmul=4.0 * cfg.n_embd * M, vector=2.0 * M + 8.0 * cfg.n_embd, exp=M)
