"""Max-plus MLPs: two stages of max_i (W_ij + x_i) + b_j, and the difference of two such stacks.

    h_j = max_i (W1_ij + x_i) + b1_j,   y_c = max_j (W2_jc + h_j) + b2_c,   output = gain_c · y_c

One stack is 1-Lipschitz in the sup norm and equals a single stage with W_ic = max_j (W1_ij + b1_j + W2_jc). The
rational form gain·(y⁺ - y⁻) is 2-Lipschitz before the gain and reaches every continuous piecewise-linear map (Zhang,
Naitzat, Lim, 2018, arXiv 1805.07091). Gains start at zero, so that a block starts as the identity, as blocks with a
zero output matrix do.

A finite β replaces each maximum by log Σ e^{β·}/β, which is a product of positive matrices in the middle of logarithms.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from mgr_jax.algebra.tropical_matmul import tmm
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec

STD = 0.02
TINY = 1e-36


@functools.cache
def expected_maximum(n: int) -> float:
  """E[max of n standard normals] = ∫ (1 - Φ(x)^n) - Φ(-x)^n over x > 0; √(2 ln n) would be about 0.5 too large."""
  with jax.ensure_compile_time_eval():
    x = (jnp.arange(4000) + 0.5) * (12 / 4000)
    up = ndtr(x)
    return float(jnp.sum((1 - up**n) - ndtr(-x) ** n) * (12 / 4000))


def specs(cfg, rational: bool) -> dict[str, ParamSpec]:
  """Per branch w_in [C, M], b_in [M], w_out [M, C], b_out [C]; M = mlp_dim, half of it per branch when rational.

  All have the role `scalar`: entries of max-plus matrices are offsets, which neither decay nor orthogonalise.
  """
  C, M = cfg.n_embd, _width(cfg, rational)
  lead, axes = ((2,), (None,)) if rational else ((), ())

  def table(shape, names, **init):
    return ParamSpec((*lead, *shape), (*axes, *names), role="scalar", **init)

  return {
    "w_in": table((C, M), ("embed", "mlp"), std=STD),
    "b_in": table((M,), ("mlp",), init="constant", std=-expected_maximum(C)),
    "w_out": table((M, C), ("mlp", "embed"), std=STD),
    "b_out": table((C,), ("embed",), init="zeros"),
    "gain": ParamSpec((C,), ("embed",), role="scalar", init="zeros"),
  }


def _width(cfg, rational):
  width = cfg.mlp_dim // (2 if rational else 1)
  if width < 1:
    raise ValueError(f"mlp_dim={cfg.mlp_dim} leaves no hidden unit per branch; use 2 or more")
  return width


def apply(params, x_BTC: jax.Array, cfg, rational: bool) -> jax.Array:
  """The MLP in float32, returned in x's dtype. 2·C·M pairs per token in all; no [B, T, M, C] buffer."""
  product = functools.partial(soft_product, beta=cfg.mlp_beta) if cfg.mlp_beta else tmm
  x = x_BTC.astype(jnp.float32).reshape(-1, x_BTC.shape[-1])

  def stack(branch):
    p = {name: params[name] if branch is None else params[name][branch] for name in ("w_in", "b_in", "w_out", "b_out")}
    return product(product(x, p["w_in"]) + p["b_in"], p["w_out"]) + p["b_out"]

  y = stack(0) - stack(1) if rational else stack(None)
  return (params["gain"] * y).reshape(x_BTC.shape).astype(x_BTC.dtype)


def soft_product(x_NC: jax.Array, w_CM: jax.Array, beta: float) -> jax.Array:
  """log Σ_i e^{β(x_ni + w_im)}/β as one matrix product, relative to the largest x of the row and w of the column.

  Exact while β·(range of x + range of w) <= 80; beyond that a term saturates 80/β below the references.
  """
  x_top = jax.lax.stop_gradient(jnp.max(x_NC, -1, keepdims=True))
  w_top = jax.lax.stop_gradient(jnp.max(w_CM, 0, keepdims=True))
  total = jnp.exp(beta * (x_NC - x_top)) @ jnp.exp(beta * (w_CM - w_top))
  return x_top + w_top + jnp.log(jnp.maximum(total, TINY)) / beta


def cost(cfg, rational: bool) -> Cost:
  """Per token: 2·C·M pairs of an addition and a maximum, M hidden units in all; with β a product's two FLOPs each."""
  C, M = cfg.n_embd, _width(cfg, rational) * (2 if rational else 1)
  if cfg.mlp_beta:
    branches = 2 if rational else 1
    return Cost(matmul=4.0 * C * M, vector=4.0 * (C + M), exp=2.0 * (branches * C + M))
  return Cost(vector=4.0 * C * M + M + 2.0 * C)
