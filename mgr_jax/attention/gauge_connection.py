"""The connection: from activations to one rotation per step, U_t = exp(A_t), and to frames T_t = U_t ··· U_0.

Generators are capped smoothly, a = θ r / sqrt(θ² + |r|²) for every block, so no angle of a step exceeds θ = theta_max.
All of it is float32 whatever the compute dtype: in bfloat16 a product of a few hundred rotations is noise.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.lie import dimension
from mgr_jax.attention.gauge_chain import Chain, Setting
from mgr_jax.attention.gauge_documents import first_tokens
from mgr_jax.attention.gauge_fibres import fibre
from mgr_jax.attention.gauge_options import Options
from mgr_jax.params import ParamSpec

# Running products on a CPU are cheapest one step at a time; where every step is a kernel launch, in chunks.
AUTO_SCAN = {"cpu": "serial"}
AUTO_CHUNK = "chunk:32"


def extra_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """gen_in [C, r] and gen_out [r, K, b(b-1)/2, D/b], or gen_full [C, ...] at rank 0; twice C with context=edge.

  What ends in generators starts at zero, so that every rotation is the identity, and is not decayed: decay would pull
  towards transports that commute.
  """
  C, n = cfg.n_embd * (2 if opts.context == "edge" else 1), cfg.head_dim // opts.b
  heads, axis = (cfg.n_kv_head, "kv_heads") if opts.share == "kv" else (1, None)
  shape, axes = (heads, dimension(opts.b), n), (axis, None, None)
  if not opts.rank:
    return {"gen_full": ParamSpec((C, *shape), ("embed", *axes), role="scalar", init="zeros")}
  rank = min(opts.rank, cfg.n_embd)
  return {
    "gen_in": ParamSpec((C, rank), ("embed", None), std=C**-0.5),
    "gen_out": ParamSpec((rank, *shape), (None, *axes), role="scalar", init="zeros"),
  }


def raw_generators(params, x_BTC: jax.Array, opts: Options, last_BC=None, segment_ids_BT=None) -> jax.Array:
  """r [B, T, K or 1, b(b-1)/2, D/b]. The input before the first token is `last_BC`, or 0; before a document it is 0."""
  if opts.context == "edge":
    first = jnp.zeros_like(x_BTC[:, :1]) if last_BC is None else last_BC[:, None].astype(x_BTC.dtype)
    before = jnp.concatenate([first, x_BTC[:, :-1]], 1)
    if segment_ids_BT is not None:
      before = jnp.where(first_tokens(segment_ids_BT)[..., None], 0, before)
    x_BTC = jnp.concatenate([x_BTC, before], -1)
  out = params["gen_out" if opts.rank else "gen_full"]
  if opts.rank:
    x_BTC = jnp.einsum("btc,cr->btr", x_BTC, params["gen_in"].astype(x_BTC.dtype), preferred_element_type=jnp.float32)
  r = x_BTC.astype(jnp.float32) @ out.reshape(out.shape[0], -1).astype(jnp.float32)
  return r.reshape(*r.shape[:2], *out.shape[1:])


def capped(r: jax.Array, theta_max: float) -> jax.Array:
  """θ r / sqrt(θ² + |r|²) with the length over the coordinates of one block: shorter than θ, and r near zero."""
  return r * (theta_max * jax.lax.rsqrt(theta_max**2 + jnp.sum(r * r, -2, keepdims=True)))


def base_coordinates(cfg, b: int) -> np.ndarray:
  """Coordinates [b(b-1)/2, D/b] of the rotation that RoPE adds per position, laid out inside the blocks.

  RoPE turns the channels j and j + D/2, which are the entries c and c + b/2 of one block, by base^(-2j/D).
  """
  D, n = cfg.head_dim, cfg.head_dim // b
  a = np.zeros((dimension(b), n), np.float32)
  rows, columns = np.triu_indices(b, 1)
  for c in range(b // 2):
    (at,) = np.flatnonzero((rows == c) & (columns == c + b // 2))
    a[at] = cfg.rope_base ** (-2.0 * (c * n + np.arange(n)) / D)
  return a


def connect(a: jax.Array, cfg, opts: Options, start=None, valid_BT=None, segment_ids_BT=None):
  """Frames T_t = U_t ··· U_0 · start of every token, restarting with every document.

  Without rotary positions a restart would change no score, because R_(t←s) = T_t T_sᵀ does not see what came before s.
  Positions outside act between the two factors, so there the frame itself matters.
  """
  base = fibre(opts.b).base(jnp.asarray(base_coordinates(cfg, opts.b))) if opts.rope == "base" else None
  scan = opts.scan if opts.scan != "auto" else AUTO_SCAN.get(jax.default_backend(), AUTO_CHUNK)
  setting = Setting(opts.theta_max, scan, opts.reorth == "auto")
  return fibre(opts.b).frames(a, Chain(base, start, valid_BT, segment_ids_BT), setting)


def by_frame(w_BTHD: jax.Array, opts: Options, n_kv_head: int) -> jax.Array:
  """[B, T, H, D] -> [B, T, K or 1, R, D]: all vectors that one frame turns get an axis of their own."""
  B, T, H, D = w_BTHD.shape
  heads = n_kv_head if opts.share == "kv" else 1
  return w_BTHD.reshape(B, T, heads, H // heads, D)


def pull(F, vectors, cfg, opts: Options) -> list[jax.Array]:
  """T_tᵀ w for arrays w [B, T, H or K, D]: vectors of all tokens in one common frame."""
  pulled = fibre(opts.b).pull(F, tuple(by_frame(w, opts, cfg.n_kv_head) for w in vectors))
  return [w.reshape(v.shape) for w, v in zip(pulled, vectors, strict=True)]


def push(F, w_BTHD, cfg, opts: Options) -> jax.Array:
  """T_t w: from the common frame back to that of every token."""
  (pushed,) = fibre(opts.b).push(F, (by_frame(w_BTHD, opts, cfg.n_kv_head),))
  return pushed.reshape(w_BTHD.shape)
