"""The registry of optimizers. A new one is its own file and one line in `OPTIMIZERS`."""

import inspect

import optax

from mgr_jax.config import nearest
from mgr_jax.optim.adamw import adamw
from mgr_jax.problems import Problem, UserError, raise_if_any

OPTIMIZERS = {"adamw": adamw}

# The values of flags that mean "the optimizer's own default".
_OWN_DEFAULT = {"matrix_lr": 0, "weight_decay": -1}


def make_optimizer(name: str, specs, cfg, **settings) -> optax.GradientTransformationExtraArgs:
  """Builds an optimizer over the whole parameter tree.

  `update(grads, state, params, scale=multiplier)` returns the updates to add to the parameters; `scale` is the
  schedule's multiplier, a float32 scalar that may be traced.

  Args:
    name: one of `OPTIMIZERS`.
    specs: tree of `ParamSpec`, from `gpt.specs(cfg)`; roles decide groups.
    cfg: the model's `GPTConfig`.
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
  return OPTIMIZERS[name](specs, cfg, **chosen)


def optimizer_settings(name: str) -> dict[str, float]:
  """The settings of an optimizer and their defaults.

  Raises:
    UserError: unknown name, with the nearest one.
  """
  if name not in OPTIMIZERS:
    hint = f"{nearest(name, list(OPTIMIZERS))}known optimizers: {', '.join(OPTIMIZERS)}"
    raise UserError(Problem(f"unknown --optimizer={name}", hint))
  parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


__all__ = ["OPTIMIZERS", "make_optimizer", "optimizer_settings"]
