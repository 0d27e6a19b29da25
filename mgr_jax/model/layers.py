"""The parts of a transformer block that are not attention: one record per kind of MLP.

Every kind ends in a product that starts at zero, so that a layer starts as the identity. `swiglu` has three matrices
and takes two thirds of the hidden width, so that it has the parameters of the kinds with two.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.flops import Cost
from mgr_jax.model import tropical_mlp
from mgr_jax.model.rows import by_rows
from mgr_jax.params import ParamSpec


class MLP(NamedTuple):
  """One kind: `specs(cfg)` -> parameter table, `apply(params, x_BTC, cfg)` -> y_BTC, `cost(cfg)` per token."""

  specs: Callable[..., dict[str, ParamSpec]]
  apply: Callable[..., jax.Array]
  cost: Callable[..., Cost]


@jax.custom_jvp
def relu_squared(z: jax.Array) -> jax.Array:
  """max(z, 0)², whose derivative 2·max(z, 0) needs z alone."""
  return jnp.square(jnp.maximum(z, 0))


@relu_squared.defjvp
def _relu_squared_jvp(primals, tangents):
  (z,), (dz,) = primals, tangents
  return relu_squared(z), 2 * jnp.maximum(z, 0) * dz


def _two_matrices(activation: Callable, transcendental: float) -> MLP:
  """activation(x W_in) W_out with W_in [C, M], W_out [M, C]."""

  def specs(cfg):
    C, M = cfg.n_embd, cfg.mlp_dim
    return {
      "w_in": ParamSpec((C, M), ("embed", "mlp")),
      "w_out": ParamSpec((M, C), ("mlp", "embed"), init="zeros"),
    }

  def apply(params, x, cfg):
    del cfg
    return activation(x @ params["w_in"].astype(x.dtype)) @ params["w_out"].astype(x.dtype)

  def cost(cfg):
    M = cfg.mlp_dim
    return Cost(matmul=4.0 * cfg.n_embd * M, vector=2.0 * M, exp=transcendental * M)

  return MLP(specs, apply, cost)


def _gated_width(cfg) -> int:
  """Two thirds of the hidden width, to the nearest multiple of 8."""
  return max(8, round(2 * cfg.mlp_dim / 24) * 8)


def _swiglu_specs(cfg):
  C, M = cfg.n_embd, _gated_width(cfg)
  return {
    "w_gate": ParamSpec((C, M), ("embed", "mlp")),
    "w_in": ParamSpec((C, M), ("embed", "mlp")),
    "w_out": ParamSpec((M, C), ("mlp", "embed"), init="zeros"),
  }


def _swiglu(params, x, cfg):
  del cfg
  gate, value, out = (params[name].astype(x.dtype) for name in ("w_gate", "w_in", "w_out"))
  return (jax.nn.silu(x @ gate) * (x @ value)) @ out


def _swiglu_cost(cfg) -> Cost:
  M = _gated_width(cfg)
  return Cost(matmul=6.0 * cfg.n_embd * M, vector=2.0 * M, exp=M)


def _tropical(rational: bool) -> MLP:
  return MLP(
    functools.partial(tropical_mlp.specs, rational=rational),
    functools.partial(tropical_mlp.apply, rational=rational),
    functools.partial(tropical_mlp.cost, rational=rational),
  )


KINDS: dict[str, MLP] = {
  "relu2": _two_matrices(relu_squared, 0.0),  # So et al., 2021, arXiv 2109.08668
  "gelu": _two_matrices(jax.nn.gelu, 1.0),  # Hendrycks and Gimpel, 2016, arXiv 1606.08415, tanh form
  "swiglu": MLP(_swiglu_specs, _swiglu, _swiglu_cost),  # Shazeer, 2020, arXiv 2002.05202
  "none": MLP(lambda cfg: {}, lambda params, x, cfg: jnp.zeros_like(x), lambda cfg: Cost()),
  "tropical": _tropical(rational=False),
  "tropical_rational": _tropical(rational=True),
}


def mlp_specs(cfg) -> dict[str, ParamSpec]:
  """The parameter table of the configuration's kind of MLP."""
  return KINDS[cfg.mlp].specs(cfg)


def mlp(params, x_BTC: jax.Array, cfg) -> jax.Array:
  """The MLP of the configuration's kind."""
  return by_rows(lambda params, x, _: (KINDS[cfg.mlp].apply(params, x, cfg), ()), params, x_BTC)[0]


def mlp_cost(cfg) -> Cost:
  """Forward cost per token."""
  return KINDS[cfg.mlp].cost(cfg)
