"""The registry of optimizers. A new one is its own file and one line in `OPTIMIZERS`."""

import inspect
from typing import NamedTuple

import jax
import optax

from mgr_jax.config import nearest
from mgr_jax.optim.adamw import adamw
from mgr_jax.optim.groups import freeze, select
from mgr_jax.optim.hoss import hoss, hoss_cost, hoss_hidden
from mgr_jax.optim.muon import MUON, muon, muon_labels
from mgr_jax.optim.muon_layout import newton_schulz_flops
from mgr_jax.optim.reset import reset_moments
from mgr_jax.optim.sgd import sgd
from mgr_jax.params import is_spec
from mgr_jax.problems import Problem, UserError, raise_if_any

OPTIMIZERS = {"adamw": adamw, "muon": muon, "hoss": hoss, "hoss_hidden": hoss_hidden, "sgd": sgd}

# The values of flags that mean "the optimizer's own default".
_OWN_DEFAULT = {"matrix_lr": 0, "weight_decay": -1}


class Curvature(NamedTuple):
  """Which products an optimizer asks for as `hvp_fn`: a kind of `model.curvature.CURVATURES`, a share of the batch."""

  kind: str
  fraction: float


def make_optimizer(
  name: str, specs, cfg, *, owners: jax.sharding.Sharding | None = None, **settings
) -> optax.GradientTransformationExtraArgs:
  """Builds an optimizer over the whole parameter tree.

  `update(grads, state, params, scale=multiplier)` returns the updates to add to the parameters; `scale` is the
  schedule's multiplier, a float32 scalar that may be traced.

  Args:
    name: one of `OPTIMIZERS`.
    specs: tree of `ParamSpec`, from `gpt.specs(cfg)`; roles decide groups.
    cfg: the model's `GPTConfig`.
    owners: devices that share whole matrices where an optimizer works on those (Muon); None does all on each.
    settings: keyword arguments of the optimizer, see `optimizer_settings`. `matrix_lr=0` and `weight_decay=-1` stand
      for its own defaults.

  Raises:
    UserError: unknown name (with the nearest one), a setting this optimizer does not have, values out of range.
  """
  defaults = optimizer_settings(name)
  raise_if_any(
    Problem(
      f"--{key}={value} has no effect with --optimizer={name}",
      f"leave it out; {nearest(key, list(defaults))}settings of {name}: " + ", ".join(f"--{k}" for k in defaults),
    )
    for key, value in settings.items()
    if key not in defaults
  )
  chosen = {k: v for k, v in settings.items() if k not in _OWN_DEFAULT or v != _OWN_DEFAULT[k]}
  frozen = jax.tree.map(lambda spec: spec.frozen, specs, is_leaf=is_spec)
  shared = {"owners": owners} if name == "muon" else {}
  return freeze(OPTIMIZERS[name](specs, cfg, **chosen, **shared), frozen)


def curvature(name: str, **settings) -> Curvature | None:
  """What `make_optimizer(name, ..., **settings)` needs `hvp_fn` to be, None when it needs none."""
  chosen = optimizer_settings(name) | settings
  return Curvature(chosen["hoss_curvature"], chosen["hoss_hvp_frac"]) if "hoss_curvature" in chosen else None


def flops(name: str, specs, gradient_flops: float, **settings) -> float:
  """Matrix products of one step beside the gradient, in FLOPs.

  Args:
    gradient_flops: FLOPs of the gradient of the whole batch, the unit that curvature products are counted in.
    settings: as for `make_optimizer`; those that do not matter here may be left out.
  """
  chosen = optimizer_settings(name) | settings
  if name == "muon":
    return newton_schulz_flops(select(specs, muon_labels(specs), MUON), chosen["muon_ns_steps"])
  if name in ("hoss", "hoss_hidden"):
    given = {key: chosen[f"hoss_{key}"] for key in ("rank", "curvature", "hvp_frac", "noise")}
    return (hoss_cost(0, **given).gradients - 1) * gradient_flops
  return 0.0


def optimizer_settings(name: str) -> dict[str, float]:
  """The settings of an optimizer and their defaults.

  Raises:
    UserError: unknown name, with the nearest one.
  """
  if name not in OPTIMIZERS:
    hint = f"{nearest(name, list(OPTIMIZERS))}known optimizers: {', '.join(OPTIMIZERS)}"
    raise UserError(Problem(f"unknown --optimizer={name}", hint))
  parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "owners"}


__all__ = ["OPTIMIZERS", "Curvature", "curvature", "flops", "make_optimizer", "optimizer_settings", "reset_moments"]
