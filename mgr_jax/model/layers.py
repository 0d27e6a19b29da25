"""The parts of a transformer block that are not attention."""

import jax
import jax.numpy as jnp

from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec


def mlp_specs(cfg) -> dict[str, ParamSpec]:
  """Tables of the two-layer MLP: w_in [C, M] and w_out [M, C] (zero, so a layer starts as the identity)."""
  C, M = cfg.n_embd, cfg.mlp_dim
  return {
    "w_in": ParamSpec((C, M), ("embed", "mlp")),
    "w_out": ParamSpec((M, C), ("mlp", "embed"), init="zeros"),
  }


def mlp(params, x_BTC: jax.Array) -> jax.Array:
  """relu(x W_in)² W_out (So et al., 2021, arXiv 2109.08668)."""
  return relu_squared(x_BTC @ params["w_in"].astype(x_BTC.dtype)) @ params["w_out"].astype(x_BTC.dtype)


@jax.custom_jvp
def relu_squared(z: jax.Array) -> jax.Array:
  """max(z, 0)², whose derivative 2·max(z, 0) needs z alone."""
  return jnp.square(jnp.maximum(z, 0))


@relu_squared.defjvp
def _relu_squared_jvp(primals, tangents):
  (z,), (dz,) = primals, tangents
  return relu_squared(z), 2 * jnp.maximum(z, 0) * dz


def mlp_cost(cfg) -> Cost:
  """4·C·M matrix FLOPs and 2·M elementwise per token."""
  return Cost(matmul=4.0 * cfg.n_embd * cfg.mlp_dim, vector=2.0 * cfg.mlp_dim)
