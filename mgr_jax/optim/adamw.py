"""AdamW on every parameter, with one learning rate per role and weight decay on matrices only."""

import jax
import optax

from mgr_jax.optim.groups import (
  adam_problems,
  decay_problems,
  group_labels,
  rate_problems,
  role_rates,
  scale_by_group,
  stay_on_spheres,
)
from mgr_jax.params import ROLES
from mgr_jax.problems import raise_if_any

DECAYED = ("matrix", "router")


def adamw(
  specs,
  cfg,
  *,
  lr_scale: float = 1.0,
  matrix_lr: float = 3e-3,
  embed_lr: float = 0.2,
  head_lr: float = 0.004,
  scalar_lr: float = 3e-3,
  weight_decay: float = 0.1,
  adam_b1: float = 0.9,
  adam_b2: float = 0.95,
  adam_eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
  """Adam with decoupled weight decay (Loshchilov & Hutter, 2017, arXiv 1711.05101).

      m <- b1·m + (1-b1)·g,  v <- b2·v + (1-b2)·g²,
      Δp = -scale · lr[role] · ( (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps) + wd[role]·p ),  t = 1, 2, ...

  Decayed are the leaves of roles `matrix` and `router`: the weights of attention and MLP. The embedding, the head and
  scalars (gains, biases, tables) are not. The decay is multiplied by the learning rate and the schedule, as the
  gradient step is. Directions learn at the rate of matrices, on their spheres (`groups.stay_on_spheres`); their sizes,
  `log_scale` and `gate`, at that of scalars.

  Args:
    specs: tree of `ParamSpec` of the model.
    cfg: `n_embd` is read; the rates of embedding and head are multiplied by sqrt(768 / n_embd).
    lr_scale: multiplies every learning rate.
    matrix_lr, embed_lr, head_lr, scalar_lr: learning rate of each role.
    weight_decay: wd of matrices, per step and unit of learning rate.
    adam_b1, adam_b2, adam_eps: decay of both moments; eps stands beside the bias-corrected root.

  Returns:
    A transformation whose `update` needs `params` and takes the schedule's multiplier as `scale`. State: two float32
    copies of the parameters and a counter.

  Raises:
    UserError: with every setting that is out of range.
  """
  rates = {"matrix_lr": matrix_lr, "embed_lr": embed_lr, "head_lr": head_lr, "scalar_lr": scalar_lr}
  found = rate_problems(lr_scale=lr_scale, **rates) + adam_problems(adam_b1, adam_b2, adam_eps)
  found += decay_problems(weight_decay)
  raise_if_any(found)

  roles = group_labels(specs, {role: (role,) for role in ROLES})
  return optax.chain(
    optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
    optax.add_decayed_weights(weight_decay, mask=jax.tree.map(lambda role: role in DECAYED, roles)),
    scale_by_group(roles, role_rates(cfg, lr_scale=lr_scale, **rates)),
    stay_on_spheres(specs),
  )
