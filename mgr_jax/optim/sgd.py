"""Stochastic gradient descent with momentum on every parameter: the control arm."""

import jax
import optax

from mgr_jax.optim.adamw import DECAYED
from mgr_jax.optim.groups import (
  decay_problems,
  group_labels,
  momentum_problems,
  rate_problems,
  role_rates,
  scale_by_group,
  stay_on_spheres,
)
from mgr_jax.params import ROLES
from mgr_jax.problems import raise_if_any


def sgd(
  specs,
  cfg,
  *,
  lr_scale: float = 1.0,
  matrix_lr: float = 0.1,
  embed_lr: float = 0.2,
  head_lr: float = 0.004,
  scalar_lr: float = 3e-3,
  weight_decay: float = 0.0,
  momentum: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
  """Heavy-ball momentum (Polyak, 1964) with decoupled weight decay.

      m <- momentum·m + g,  Δp = -scale · lr[role] · (m + wd[role]·p)

  The step is proportional to the gradient: nothing normalises it, so a steady gradient moves a parameter by
  lr / (1 - momentum) times its size per step.

  Args:
    specs: tree of `ParamSpec` of the model.
    cfg: `n_embd` is read; the rates of embedding and head are multiplied by sqrt(768 / n_embd).
    lr_scale: multiplies every learning rate.
    matrix_lr, embed_lr, head_lr, scalar_lr: learning rate of each role, as in `adamw`.
    weight_decay: wd of matrices and routers, per step and unit of learning rate.
    momentum: share of m that is kept, in [0, 1).

  Returns:
    A transformation whose `update` needs `params` and takes the schedule's multiplier as `scale`. State: one float32
    copy of the parameters.

  Raises:
    UserError: with every setting that is out of range.
  """
  rates = {"matrix_lr": matrix_lr, "embed_lr": embed_lr, "head_lr": head_lr, "scalar_lr": scalar_lr}
  found = rate_problems(lr_scale=lr_scale, **rates)
  raise_if_any(found + momentum_problems(momentum) + decay_problems(weight_decay))
  roles = group_labels(specs, {role: (role,) for role in ROLES})
  return optax.chain(
    optax.trace(momentum),
    optax.add_decayed_weights(weight_decay, mask=jax.tree.map(lambda role: role in DECAYED, roles)),
    scale_by_group(roles, role_rates(cfg, lr_scale=lr_scale, **rates)),
    stay_on_spheres(specs),
  )
