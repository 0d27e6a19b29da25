"""Weights as size times direction, W = e^s·v/|v|: weight normalisation with a logarithmic size, from a matched start.

The norm is taken over one output column, or over all columns of a head, then of mean square 1 (Salimans and Kingma,
2016, arXiv 1602.07868). With dW the gradient of W and v̂ = v/|v|: ds = <dW, W> and dv = (e^s/|v|)·(dW - v̂<v̂, dW>),
hence <v, dv> = 0: the size of v is no parameter, and it shrinks the steps of its direction by 1/|v|² if it may grow.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mgr_jax.attention.mechanism import qkv_specs
from mgr_jax.attention.surreal_options import Options
from mgr_jax.params import ParamSpec

MAX_TEMPERATURE = 100.0


def linear_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """Directions `wq`, `wk`, `wv`, `wo`; raw log-sizes `w?_scale`; the signed sizes `wo_gate`, zero; `tau` per head.

  All start where `standard` starts from the same key: a direction and its size are parts of the same draw. A size with
  a sign can be zero, as a logarithm cannot, and so the output projection starts at zero as well.
  """
  standard = qkv_specs(cfg)
  specs = {}
  for name in ("wq", "wk", "wv"):
    by_column = name in opts.scaled and opts.granularity == "column"
    specs[name] = _direction(standard[name], ("embed",) if by_column else ("embed", "head_dim"), opts)
    if name in opts.scaled:
      specs[f"{name}_scale"] = _log_size(name, standard[name], specs[name], opts)
  by_column = opts.granularity == "column"
  wo = dataclasses.replace(standard["wo"], init="normal")
  specs["wo"] = _direction(wo, ("heads", "head_dim") if by_column else ("heads", "head_dim", "embed"), opts)
  shape, axes = ((cfg.n_embd,), ("embed",)) if by_column else ((1,), (None,))
  specs["wo_gate"] = ParamSpec(shape, axes, role="gate", init="zeros")
  if opts.qk == "direction":
    start = -math.log(cfg.head_dim**-0.5 - 1 / MAX_TEMPERATURE)
    specs["tau"] = ParamSpec((cfg.n_head,), ("heads",), role="log_scale", init="constant", std=start)
  return specs


def _direction(standard: ParamSpec, unit_axes: tuple[str, ...], opts: Options) -> ParamSpec:
  spec = dataclasses.replace(standard, role="direction", unit_axes=unit_axes, renorm=opts.renorm)

  def draw(key, shape):
    del shape
    w = standard.draw(key)
    return w * (spec.radius / norms(w, spec))

  return dataclasses.replace(spec, init=draw)


def _log_size(name: str, standard: ParamSpec, direction: ParamSpec, opts: Options) -> ParamSpec:
  n_head, width = standard.shape[1:]
  by_column = "head_dim" not in direction.unit_axes
  shape, axes = ((n_head, width), standard.axes[1:]) if by_column else ((n_head, 1), (standard.axes[1], None))

  def draw(key, shape):
    s = jnp.log(norms(standard.draw(key), direction) / direction.radius).reshape(shape)
    return opts.s_max * jnp.arctanh(jnp.clip(s / opts.s_max, -0.99, 0.99))

  return ParamSpec(shape, axes, role="log_scale", init=draw, drawn_with=name)


def norms(v: jax.Array, spec: ParamSpec) -> jax.Array:
  """|v| over the unit axes, kept as axes of length 1; at least float32, and no smaller than 1e-15."""
  squares = jnp.square(v.astype(jnp.promote_types(v.dtype, jnp.float32)))
  return jnp.sqrt(jnp.maximum(jnp.sum(squares, axis=spec.unit_dims, keepdims=True), 1e-30))


def log_size(raw: jax.Array, opts: Options) -> jax.Array:
  """s = s_max·tanh(raw/s_max)."""
  return opts.s_max * jnp.tanh(raw / opts.s_max)


def multiplier(v: jax.Array, spec: ParamSpec, size: jax.Array | float = 1.0) -> jax.Array:
  """size·radius/|v| over the output axes: what multiplies x·v so that it is x·W."""
  m = norms(v, spec)
  return spec.radius / m.reshape(m.shape[spec.fan_in :]) * size


def sizes(params, opts: Options) -> dict[str, jax.Array | float]:
  """The size of each projection, broadcastable over its output axes."""
  found = {n: jnp.exp(log_size(params[f"{n}_scale"], opts)) if n in opts.scaled else 1.0 for n in ("wq", "wk", "wv")}
  return found | {"wo": params["wo_gate"]}


def multipliers(params, cfg, opts: Options, names=("wq", "wk", "wv", "wo")) -> dict[str, jax.Array]:
  """`multiplier` of the projections `names`, float32."""
  specs, of = linear_specs(cfg, opts), sizes(params, opts)
  return {name: multiplier(params[name], specs[name], of[name]) for name in names}


def weights(params, cfg, opts: Options) -> dict[str, jax.Array]:
  """The four projections as ordinary matrices, float32."""
  found = multipliers(params, cfg, opts)
  return {name: m.reshape((1,) * (params[name].ndim - m.ndim) + m.shape) * params[name] for name, m in found.items()}


def query_gain(params, cfg, opts: Options) -> jax.Array | None:
  """e^τ/√D per query head, where e^τ = 1/(e^-tau + 1/100) multiplies the cosine; 1 at the start. None with qk=full.

  The bound of 100 is soft: a head at the bound still has a gradient that leads away from it.
  """
  if opts.qk == "full":
    return None
  return cfg.head_dim**-0.5 / (jnp.exp(-params["tau"]) + 1 / MAX_TEMPERATURE)
