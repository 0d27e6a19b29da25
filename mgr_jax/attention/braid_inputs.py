"""From activations to gate scores: the parameters of each score and the per-token arrays it needs, all in float32."""

import math

import jax
import jax.numpy as jnp

from mgr_jax.attention.braid_bins import quantise
from mgr_jax.attention.braid_options import Options
from mgr_jax.attention.mechanism import project_heads
from mgr_jax.params import ParamSpec

RAPIDITY_TABLE = 64  # Learned rapidity increments per head; later positions repeat the last one.
INITIAL_LAMBDA = 0.01
INITIAL_INCREMENT = 0.1


def inverse_softplus(y: float) -> float:
  """x with softplus(x) = y."""
  return math.log(math.expm1(y))


def score_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """Tables of the score besides wq and wk. Scores have unit variance at the start."""
  H, K, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
  per_head = lambda start: ParamSpec((H,), ("heads",), role="scalar", init="constant", std=start)
  if opts.scoring == "rapidity":
    shape, axes = (H, RAPIDITY_TABLE), ("heads", None)
    start = inverse_softplus(INITIAL_INCREMENT)
    return {
      "eta": per_head(inverse_softplus(1.0)),
      "increments": ParamSpec(shape, axes, role="scalar", init="constant", std=start),
    }
  specs = {}
  if opts.scoring == "additive":
    specs["w_a"] = ParamSpec((H, D), ("heads", "head_dim"), role="scalar", std=1.0)
    specs["w_b"] = ParamSpec((K, D), ("kv_heads", "head_dim"), role="scalar", std=1.0)
  if opts.scoring == "additive" or opts.mode != "monodromy":
    specs["beta"] = per_head(0.0)
  if opts.recency:
    specs["recency"] = per_head(inverse_softplus(INITIAL_LAMBDA))
  return specs


def query_scores(params, x_BTC, opts: Options) -> jax.Array:
  """a_i = M·tanh((<w_a, q̂_i>/√D + β)/M) [B, T, H] with q̂ the RMS-normalised query; |a_i| < M."""
  return _bounded(_normalised_dot(project_heads(x_BTC, params["wq"]), params["w_a"]) + params["beta"], opts.bound_M)


def key_scores(params, x_BTC, opts: Options) -> jax.Array:
  """b_j = M·tanh(<w_b, k̂_j>/(M√D)) [B, T, K], one per key/value head; with `bins`, rounded to the nearest level."""
  b = _bounded(_normalised_dot(project_heads(x_BTC, params["wk"]), params["w_b"]), opts.bound_M)
  return quantise(b, opts.bins, opts.bound_M) if opts.bins else b


def _normalised_dot(x_BTHD, w_HD, eps: float = 1e-6):
  """<w, x / rms(x)> / √D, without writing the normalised x."""
  x = x_BTHD.astype(jnp.float32)
  dot = jnp.sum(x * w_HD, -1)
  return dot * jax.lax.rsqrt(jnp.mean(x * x, -1) + eps) * x.shape[-1] ** -0.5


def _bounded(score, bound):
  return bound * jnp.tanh(score / bound)


def shifted(params, a_BTH, b_BSK, q_positions_BT, k_positions_BS, opts: Options):
  """The pair whose sum is the gate logit, a_i + b_j - τ - λ(i - j), still additive.

  With recency the key side differs per query head, [B, S, H]; otherwise it stays [B, S, K].
  """
  if opts.recency:
    slope = jax.nn.softplus(params["recency"])
    at = lambda positions: slope * positions[..., None].astype(jnp.float32)
    a_BTH = a_BTH - at(q_positions_BT)
    repeats = len(slope) // b_BSK.shape[2]
    b_BSK = jnp.repeat(b_BSK, repeats, axis=2) + at(k_positions_BS)
  return a_BTH, b_BSK - opts.tau


def rapidity_side(params, positions_BT) -> tuple[dict, dict]:
  """Query and key side of log sinh(u_i - u_j) - log sinh η, arrays [B, T, H].

  u_p = η Σ_{m≤p} softplus(increment_m): a learned monotone table, continued with the last increment. The table part and
  the number of steps beyond it stay apart, so that differences are exact at any position.
  """
  eta = jax.nn.softplus(params["eta"])
  steps = eta[:, None] * jax.nn.softplus(params["increments"])
  table = jnp.pad(jnp.cumsum(steps, -1), ((0, 0), (1, 0))).T
  inside = jnp.minimum(positions_BT, RAPIDITY_TABLE)
  per_head = lambda x: jnp.broadcast_to(x, (*positions_BT.shape, len(eta)))
  tail = per_head((positions_BT - inside).astype(eta.dtype)[..., None])
  keys = {"table": table[inside], "tail": tail}
  log_sinh_eta = eta + jnp.log(-jnp.expm1(-2 * eta)) - math.log(2.0)
  return keys | {"increment": per_head(steps[:, -1]), "log_sinh_eta": per_head(log_sinh_eta)}, keys
