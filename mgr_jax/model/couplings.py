"""The two halves of a reversible layer: a mechanism and an MLP, or the kicks of a symplectic integrator."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mgr_jax.attention import Context
from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.attention.reversible import Options, inner_config
from mgr_jax.flops import Cost
from mgr_jax.model import layers, symplectic
from mgr_jax.model.reversible import Coupling, mix_specs
from mgr_jax.model.rows import by_rows

Narrow = Callable[[Context], Context]


def layer_specs(cfg, mechanism, options, wrap: Options) -> dict[str, Any]:
  """The parameter tree of one layer: `attention`, `mlp` and `mix`."""
  cfg = inner_config(cfg, wrap)
  if wrap.mode == "symplectic":
    tree = symplectic.kick_specs(cfg)
  else:
    tree = {"attention": mechanism.param_specs(cfg, options), "mlp": layers.mlp_specs(cfg)}
  return tree | {"mix": mix_specs(cfg.n_embd, wrap)}


def couplings(cfg, mechanism, options, wrap: Options, narrow: Narrow) -> tuple[Coupling, ...]:
  """The couplings of one layer; `narrow` gives a context the layer's own annealed values."""
  cfg = inner_config(cfg, wrap)
  if wrap.mode == "symplectic":
    return _kicks(cfg, options.impl, wrap)
  return _additive(cfg, mechanism, options, narrow)


def _additive(cfg, mechanism, options, narrow: Narrow) -> tuple[Coupling, ...]:
  def normed(x):
    return rms_norm(x).astype(cfg.compute_dtype)

  def mix(params, x, ctx):
    return mechanism.apply(params, x, ctx, cfg, options)

  def attend(params, x, ctx):
    y, aux = by_rows(mix, params["attention"], normed(x), narrow(ctx))
    return y.astype(x.dtype), {name if name == "aux_loss" else f"{mechanism.name}/{name}": a for name, a in aux.items()}

  def attend_step(params, x, state, ctx):
    y, state = mechanism.step(params["attention"], normed(x), state, narrow(ctx), cfg, options)
    return y.astype(x.dtype), state

  def feed_forward(params, x):
    return layers.mlp(params["mlp"], normed(x), cfg).astype(x.dtype)

  return (
    Coupling(0, attend, lambda batch, max_len: mechanism.init_state(cfg, options, batch, max_len), attend_step),
    pointwise(1, feed_forward),
  )


def pointwise(target: int, f: Callable) -> Coupling:
  """A coupling whose f, `(layer_params, x) -> y`, looks at one token at a time."""
  return Coupling(
    target,
    apply=lambda params, x, ctx: (f(params, x), {}),
    init_state=lambda batch, max_len: (),
    step=lambda params, x, state, ctx: (f(params, x), state),
  )


def _kicks(cfg, impl: str, wrap: Options) -> tuple[Coupling, ...]:
  """p <- p - h∇V(q), q <- q + h∇T(p) with (p, q) = (x1, x2); leapfrog kicks by h/2 before and after the drift.

  The signs differ, so that a function close to T + V is conserved where no token moves another (with equal signs it
  would be T - V, which bounds nothing).
  """
  least = wrap.lambda_min

  def kick(h: float) -> Coupling:
    def of_rows(params, x, ctx):
      y = -h * symplectic.grad_V(params, x, ctx, cfg, lambda_min=least, impl=impl)
      return y, (_energy(params, x, ctx) if ctx.probe else {})

    def apply(params, x, ctx):
      return by_rows(of_rows, params["attention"], x, ctx)

    def step(params, x, state, ctx):
      g, state = symplectic.grad_V_step(params["attention"], x, state, ctx, cfg, lambda_min=least)
      return -h * g, state

    return Coupling(0, apply, lambda batch, max_len: symplectic.init_state(cfg, batch, max_len), step)

  def _energy(params, x, ctx):
    """V at the first token, which no other moves, and on average."""
    energy = symplectic.potential(params, jax.lax.stop_gradient(x), ctx, cfg, lambda_min=least, impl=impl)
    return {"reversible/potential_first": jnp.mean(energy[:, 0]), "reversible/potential_mean": jnp.mean(energy)}

  drift = pointwise(
    1, lambda params, x: wrap.h * symplectic.grad_T(params["mlp"], x, cfg, lambda_min=least).astype(x.dtype)
  )
  if wrap.integrator == "euler":
    return (kick(wrap.h), drift)
  return (kick(wrap.h / 2), drift, kick(wrap.h / 2))


def cost(cfg, mechanism, options, wrap: Options, T: int) -> Cost:
  """Forward cost per token of one layer, the channel map included."""
  cfg = inner_config(cfg, wrap)
  if wrap.mode == "symplectic":
    kicks = 2 if wrap.integrator == "leapfrog" else 1
    total = kicks * symplectic.potential_cost(cfg, T) + symplectic.kinetic_cost(cfg)
  else:
    total = mechanism.cost(cfg, options, T) + layers.mlp_cost(cfg)
  if wrap.mix == "givens":
    total += Cost(vector=2 * 9.0 * cfg.n_embd / 2)
  if wrap.mix == "cayley":
    total += Cost(matmul=2 * 8.0 * cfg.n_embd * wrap.mix_rank)
  return total
