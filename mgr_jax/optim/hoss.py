"""HOSS over a model's parameters: every leaf, or hidden matrices with AdamW on the rest; and what a step costs."""

import math
from typing import NamedTuple

import jax
import optax

from mgr_jax.optim.adamw import DECAYED
from mgr_jax.optim.groups import (
  adam_problems,
  by_group,
  decay_problems,
  group_labels,
  rate_problems,
  role_rates,
  scale_by_group,
  select,
  stay_on_spheres,
)
from mgr_jax.optim.hoss_noise import PROBES
from mgr_jax.optim.hoss_spectrum import NEGATIVE
from mgr_jax.optim.hoss_step import METRICS, NOISES, TRACE_EVERY, HossDiag, HossState, scale_by_hoss
from mgr_jax.params import ROLES, count, is_spec
from mgr_jax.problems import Problem, raise_if_any

HOSS, ADAMW, FROZEN = "hoss", "adamw", "frozen"
HIDDEN_ROLES = ("matrix", "direction")
# AdamW's own rate for routers, which learn like matrices.
ADAMW_MATRIX_LR = 3e-3
# In gradients of the batch that curvature is taken of: one product, and what precedes all of them. Per weight, a
# gradient multiplies three times; a linearised gradient six times, after one gradient; a Gauss-Newton product twice
# forward with tangents and twice back, after one forward pass.
PRODUCT_COST = {"ggn": (4 / 3, 1 / 3), "hessian": (2.0, 1.0)}


def hoss(
  specs,
  cfg,
  *,
  lr_scale: float = 1.0,
  matrix_lr: float = 1.0,
  weight_decay: float = 0.0,
  hoss_rank: int = 8,
  hoss_curvature: str = "ggn",
  hoss_metric: str = "none",
  hoss_neg: str = "abs",
  hoss_noise: str = "none",
  hoss_temperature: float = 0.0,
  hoss_trust_radius: float = 0.0,
  hoss_hvp_frac: float = 0.25,
) -> optax.GradientTransformationExtraArgs:
  """HOSS on every parameter: one Krylov space and one macro time for the whole model. See `scale_by_hoss`.

  Args:
    specs: tree of `ParamSpec` of the model; frozen leaves are outside of the Krylov space.
    cfg: not read.
    lr_scale, matrix_lr: their product is the macro time δ of a step, of inverse units of curvature.
    weight_decay: λ of matrices and routers, in gradient and curvature: decay per unit of time.
    hoss_rank: products per step.
    hoss_curvature, hoss_hvp_frac: matrix (`ggn` or `hessian`) and share of the batch that the training step makes the
      products of; see `optim.curvature`.
    hoss_metric, hoss_neg, hoss_noise, hoss_temperature, hoss_trust_radius: as in `scale_by_hoss`.

  Returns:
    A transformation whose `update` needs `hvp_fn` and `params`, and `key` with noise.

  Raises:
    UserError: with every setting that is out of range.
  """
  del cfg
  settings = _settings(locals())
  found = rate_problems(lr_scale=lr_scale, matrix_lr=matrix_lr) + decay_problems(weight_decay)
  labels = _labels(specs, ROLES)
  raise_if_any(found + _problems(settings, select(specs, labels, HOSS)))
  return _chain(specs, labels, lr_scale * matrix_lr, weight_decay, settings, {})


def hoss_hidden(
  specs,
  cfg,
  *,
  lr_scale: float = 1.0,
  matrix_lr: float = 0.1,
  embed_lr: float = 0.2,
  head_lr: float = 0.004,
  scalar_lr: float = 3e-3,
  weight_decay: float = 0.0,
  adam_b1: float = 0.9,
  adam_b2: float = 0.95,
  adam_eps: float = 1e-8,
  hoss_rank: int = 8,
  hoss_curvature: str = "ggn",
  hoss_metric: str = "none",
  hoss_neg: str = "abs",
  hoss_noise: str = "none",
  hoss_temperature: float = 0.0,
  hoss_trust_radius: float = 0.0,
  hoss_hvp_frac: float = 0.25,
) -> optax.GradientTransformationExtraArgs:
  """HOSS on hidden matrices and directions, with their own block of the curvature; AdamW on everything else.

  Routers learn by AdamW at its rate for matrices, 0.003. Decayed are matrices and routers.

  Args:
    specs: tree of `ParamSpec` of the model.
    cfg: `n_embd` is read; the rates of embedding and head are multiplied by sqrt(768 / n_embd).
    lr_scale: multiplies the macro time and every learning rate.
    matrix_lr: macro time of HOSS.
    embed_lr, head_lr, scalar_lr, adam_b1, adam_b2, adam_eps: of AdamW, see `adamw`.
    weight_decay: of matrices per unit of macro time, of routers per unit of learning rate.
    hoss_rank, ...: as in `hoss`.

  Returns:
    A transformation whose `update` needs `hvp_fn` and `params`, and `key` with noise.

  Raises:
    UserError: with every setting that is out of range.
    ValueError: parameters, but no matrix or direction among them.
  """
  settings = _settings(locals())
  rates = {"matrix_lr": matrix_lr, "embed_lr": embed_lr, "head_lr": head_lr, "scalar_lr": scalar_lr}
  found = rate_problems(lr_scale=lr_scale, **rates) + decay_problems(weight_decay)
  found += adam_problems(adam_b1, adam_b2, adam_eps)
  labels = _labels(specs, HIDDEN_ROLES)
  hidden = select(specs, labels, HOSS)
  raise_if_any(found + _problems(settings, hidden))
  if jax.tree.leaves(labels) and not hidden:
    raise ValueError("HOSS has nothing to do: no parameter is a matrix or a direction")

  role_of = jax.tree.map(lambda spec: spec.role, select(specs, labels, ADAMW), is_leaf=is_spec)
  adamw = optax.chain(
    optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
    optax.add_decayed_weights(weight_decay, mask={name: role in DECAYED for name, role in role_of.items()}),
    scale_by_group(role_of, role_rates(cfg, lr_scale=lr_scale, **rates | {"matrix_lr": ADAMW_MATRIX_LR})),
  )
  return _chain(specs, labels, lr_scale * matrix_lr, weight_decay, settings, {ADAMW: adamw})


class HossCost(NamedTuple):
  """`gradients`: matrix products of a step, in gradients of its batch. `bytes`: memory traffic of the Krylov basis."""

  gradients: float
  bytes: float


def hoss_cost(
  n_params: int, *, rank: int = 8, curvature: str = "ggn", hvp_frac: float = 0.25, noise: str = "none", reorth: int = 2
) -> HossCost:
  """Cost of one step, counted: 1 + κ·(start + products·cost), of which the 1 is the gradient itself.

  κ = `hvp_frac`; cost and start of a product are 4/3 and 1/3 gradients for `ggn`, 2 and 1 for `hessian`. There are
  `rank` products, twice as many with `full` noise; `minibatch` noise adds `rank` forward derivatives of 2/3 each. Every
  product is followed by `reorth` passes that read the basis twice (float32).
  """
  product, start = PRODUCT_COST[curvature]
  products = rank * (2 if noise == "full" else 1) + (PROBES / TRACE_EVERY if noise == "krylov+tail" else 0)
  forward = rank * 2 / 3 if noise == "minibatch" else 0
  runs = 2 if noise == "full" else 1
  vectors = runs * rank * (2 * max(reorth, 1) * rank + 1)
  return HossCost(1 + hvp_frac * (start + products * product + forward), 4.0 * n_params * vectors)


def _settings(arguments) -> dict:
  """The arguments named hoss_*, without that prefix."""
  return {name.removeprefix("hoss_"): value for name, value in arguments.items() if name.startswith("hoss_")}


def _problems(settings, leaves) -> list[Problem]:
  """Everything wrong with the hoss_* settings for a HOSS group of these specifications."""
  # Per-example derivatives are for callers who can supply them.
  noises = tuple(n for n in NOISES if n != "minibatch")
  choices = {"curvature": tuple(PRODUCT_COST), "metric": METRICS, "neg": NEGATIVE, "noise": noises}
  found = [
    Problem(f"--hoss_{name}={settings[name]} is unknown", f"use one of {', '.join(known)}")
    for name, known in choices.items()
    if settings[name] not in known
  ]
  rank, noise, temperature = settings["rank"], settings["noise"], settings["temperature"]
  radius, fraction, size = settings["trust_radius"], settings["hvp_frac"], count(leaves)
  if rank < 1:
    found.append(Problem(f"--hoss_rank={rank} is not positive", "use e.g. --hoss_rank=8"))
  if leaves and rank > size:
    found.append(Problem(f"--hoss_rank={rank} exceeds the {size} scalars it acts on", f"use --hoss_rank={size}"))
  if not 0 <= radius < math.inf:
    found.append(Problem(f"--hoss_trust_radius={radius} is not 0 or a positive number", "use 0 for none, or e.g. 1.0"))
  if not 0 < fraction <= 1:
    found.append(Problem(f"--hoss_hvp_frac={fraction} is outside (0, 1]", "use e.g. --hoss_hvp_frac=0.25"))
  if not 0 <= temperature < math.inf:
    found.append(Problem(f"--hoss_temperature={temperature} is not 0 or a positive number", "use e.g. 1e-4 with noise"))
  elif noise != "none" and temperature == 0:
    fix = "add e.g. --hoss_temperature=1e-4, or leave the noise out"
    found.append(Problem(f"--hoss_noise={noise} has no effect at --hoss_temperature=0", fix))
  elif noise == "none" and temperature:
    fix = "add e.g. --hoss_noise=full, or leave the temperature out"
    found.append(Problem(f"--hoss_temperature={temperature} has no effect with --hoss_noise=none", fix))
  return found


def _labels(specs, roles):
  """The tree of groups: `frozen`, `hoss` for leaves of `roles`, `adamw` for all others."""
  groups = {HOSS: roles, ADAMW: tuple(role for role in ROLES if role not in roles)}
  choose = lambda label, spec: FROZEN if spec.frozen else label
  return jax.tree.map(choose, group_labels(specs, groups), specs)


def _chain(specs, labels, delta: float, weight_decay: float, settings, others):
  """HOSS on its group, `others` on theirs, nothing on frozen leaves; directions stay on their spheres."""
  decayed = {name: spec.role in DECAYED for name, spec in select(specs, labels, HOSS).items()}
  own = {name: settings[name] for name in ("rank", "metric", "neg", "noise", "temperature", "trust_radius")}
  step = scale_by_hoss(delta, weight_decay=weight_decay, decay_mask=decayed, **own)
  transforms = {HOSS: step, FROZEN: optax.set_to_zero(), **others}
  used = set(jax.tree.leaves(labels))
  return optax.chain(by_group(labels, {g: t for g, t in transforms.items() if g in used}), stay_on_spheres(specs))


__all__ = ["HossCost", "HossDiag", "HossState", "hoss", "hoss_cost", "hoss_hidden", "scale_by_hoss"]
