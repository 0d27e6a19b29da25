"""Digits of queries and keys, level weights and recency: everything of `ultrametric` that has parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax import homotopy
from mgr_jax.algebra import padic_kernel
from mgr_jax.attention.ultrametric_chunks import wide
from mgr_jax.attention.ultrametric_options import MAX_LOG2_MASS, Options
from mgr_jax.params import ParamSpec

DIGIT_STD = 1.5  # Of a digit logit on unit-RMS inputs: the mean digit entropy then starts near 0.7·log p.


def _inverse_softplus(x):
  return x + np.log(-np.expm1(-x))


def initial_alpha(n_head: int, opts: Options) -> np.ndarray:
  """α_h = 1 + (α_mean - 1)·2^u, u evenly spaced in [-1, 1] over the heads (0 for a single head); always above 1."""
  u = np.linspace(-1, 1, n_head) if n_head > 1 else np.zeros(1)
  return 1 + (opts.alpha_mean - 1) * 2.0**u


def slopes(n_kv_head: int) -> np.ndarray:
  """-log λ of the key/value heads, 2^(-8j/n) for j = 1 .. n (Press et al., 2021, arXiv 2108.12409)."""
  return 2.0 ** (-8.0 * np.arange(1, n_kv_head + 1) / n_kv_head)


def specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """Digit tables dq [H, D, K, p] and dk [K', D, K, p], rho [H] or level [H, K], and decay_rate of the key/value heads.

  Raises:
    ValueError: α^K·T leaves the range of float32.
  """
  H, G, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
  alpha = initial_alpha(H, opts)
  log2_mass = opts.depth * math.log2(alpha.max()) + math.log2(cfg.seq_len)
  if log2_mass > MAX_LOG2_MASS:
    largest = 2 ** ((MAX_LOG2_MASS - math.log2(cfg.seq_len)) / opts.depth)
    raise ValueError(
      f"ultrametric option alpha_init={opts.alpha_mean:g} with {opts.depth} digits: the largest head reaches "
      f"alpha^K*T = 2^{log2_mass:.0f} at T={cfg.seq_len}, beyond 2^{MAX_LOG2_MASS}; use alpha_init of at most "
      f"{1 + (largest - 1) / 2:.3g}, or fewer digits"
    )

  def table(heads, axis):
    shape, axes = (heads, D, opts.K, opts.p), (axis, "head_dim", None, None)
    return ParamSpec(shape, axes, role="scalar", std=DIGIT_STD / math.sqrt(D))

  def constant(values, axes, frozen=False):
    draw = lambda key, shape: jnp.asarray(values, jnp.float32)
    return ParamSpec(np.shape(values), axes, role="scalar", init=draw, frozen=frozen)

  found = {"dk": table(G, "kv_heads")}
  if not opts.tie_digits:
    found["dq"] = table(H, "heads")
  if opts.level_weights == "free":
    power = alpha[:, None] ** np.arange(opts.K + 1)
    found["level"] = constant(_inverse_softplus(np.diff(power)), ("heads", None))
  elif opts.alpha_learn:
    found["rho"] = constant(_inverse_softplus(alpha - 1), ("heads",))
  if opts.decay == "alibi":
    odd = np.arange(G) % 2
    found["decay_rate"] = constant(odd * slopes(G), ("kv_heads",), frozen=True)
  elif opts.decay == "learned":
    found["decay_rate"] = constant(_inverse_softplus(slopes(G)), ("kv_heads",))
  return found


def alphas(params, n_head: int, opts: Options) -> jax.Array:
  """α per query head, [H]; not for free level weights."""
  if opts.alpha_learn:
    return 1 + jax.nn.softplus(params["rho"])
  return jnp.asarray(initial_alpha(n_head, opts), jnp.float32)


def weights(params, n_head: int, n_kv_head: int, opts: Options) -> jax.Array:
  """Level weights c [G, R, depth + 1]."""
  if opts.level_weights == "free":
    free = jax.nn.softplus(params["level"][:, : opts.depth])
    c = jnp.concatenate([jnp.ones_like(free[:, :1]), free], -1)
  else:
    c = padic_kernel.level_weights(alphas(params, n_head, opts), opts.depth)
  return c.reshape(n_kv_head, n_head // n_kv_head, opts.depth + 1)


def log_decay(params, opts: Options) -> jax.Array | None:
  """log λ <= 0 of the key/value heads; `alibi` slopes are a table that is not trained."""
  if opts.decay == "none":
    return None
  if opts.decay == "alibi":
    return -jax.lax.stop_gradient(jnp.maximum(params["decay_rate"], 0))
  return -jax.nn.softplus(params["decay_rate"])


def temperature(ctx, opts: Options):
  """θ now; without a schedule its first value. No gradient flows to it."""
  theta = ctx.annealed.get("theta", homotopy.parse(opts.theta).start)
  return jax.lax.stop_gradient(theta)


def probabilities(q_BTHD, k_BTGD, params, ctx, opts: Options):
  """softmax over the classes of q·dq/θ and k·dk/θ, float32 [B, G, R, depth, p, T] and [B, G, depth, p, T]."""
  B, T, G, D = k_BTGD.shape
  used = jnp.arange(opts.depth) < opts.freeze_levels
  frozen = lambda table: jnp.where(used[:, None], jax.lax.stop_gradient(table), table)
  dk = frozen(params["dk"][:, :, : opts.depth])
  if opts.tie_digits:
    dq = jnp.broadcast_to(dk[:, None], (G, q_BTHD.shape[2] // G, *dk.shape[1:]))
  else:
    dq = frozen(params["dq"][:, :, : opts.depth])
    dq = dq.reshape(G, -1, *dq.shape[1:])
  theta = temperature(ctx, opts)
  q, k = wide(q_BTHD).reshape(B, T, G, -1, D), wide(k_BTGD)
  a = jnp.einsum("btgrd,grdkp->bgrkpt", q, dq)
  b = jnp.einsum("btgd,gdkp->bgkpt", k, dk)
  return jax.nn.softmax(a / theta, -2), jax.nn.softmax(b / theta, -2)


def class_of(probability: jax.Array) -> jax.Array:
  """The most likely class of each digit, int32 [..., K, T]; ties go to the lowest."""
  return jnp.argmax(probability, -2).astype(jnp.int32)


def one_hot(probability: jax.Array) -> jax.Array:
  """`class_of` as indicator vectors, [..., K, p, T]; without gradient."""
  classes = jax.lax.stop_gradient(class_of(probability))
  p = probability.shape[-2]
  return (classes[..., None, :] == jnp.arange(p)[:, None]).astype(probability.dtype)


def digits(probability: jax.Array, opts: Options) -> jax.Array:
  """What enters the kernel: probabilities, or exactly one-hot digits with or without straight-through gradient."""
  if opts.digits == "soft":
    return probability
  hard = one_hot(probability)
  return hard if opts.digits == "hard" else hard + (probability - jax.lax.stop_gradient(probability))


def balance_loss(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean over rows, heads and levels of KL(mean use of the classes || uniform), queries and keys averaged; in nats.

  The mean use is taken within a row, so that splitting a batch changes nothing.
  """

  def divergence(probability):
    use = jnp.mean(probability, -1)
    return jnp.mean(jnp.sum(use * jnp.log(use * use.shape[-1] + 1e-20), -1))

  return 0.5 * (divergence(a) + divergence(b))
