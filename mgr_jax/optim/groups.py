"""Parameter groups: which leaves an optimizer treats alike, how fast each learns, and what none of them may do."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mgr_jax.params import is_spec, leaf_names
from mgr_jax.problems import Problem

REFERENCE_WIDTH = 768


def group_labels(specs, groups: Mapping[str, Iterable[str]]):
  """The group of every leaf, as a tree of strings with the structure of the parameters.

  Args:
    specs: tree of `ParamSpec`.
    groups: the role table, group name -> roles of its leaves.

  Raises:
    ValueError: naming every leaf whose role is in no group, or in more than one.
  """
  owners: dict[str, list[str]] = {}
  for group, roles in groups.items():
    for role in roles:
      owners.setdefault(role, []).append(group)
  leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  found = [owners.get(spec.role, []) for spec in leaves]
  wrong = [
    f"{name} (role {spec.role}) is in {' and '.join(groups) or 'no group'}"
    for name, spec, groups in zip(leaf_names(specs), leaves, found, strict=True)
    if len(groups) != 1
  ]
  if wrong:
    raise ValueError("every parameter belongs to exactly one optimizer group, but " + "; ".join(wrong))
  return jax.tree.unflatten(treedef, [groups[0] for groups in found])


def select(tree, labels, group: str) -> dict[str, Any]:
  """The leaves of one group, by name."""
  leaves, treedef = jax.tree.flatten(labels)
  found = zip(leaf_names(labels), leaves, treedef.flatten_up_to(tree), strict=True)
  return {name: leaf for name, label, leaf in found if label == group}


def by_group(labels, transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
  """Runs one transformation per group, each on a dict of its own leaves, and puts the results together.

  Extra arguments go to all of them. `hvp_fn` is restricted: vectors are zero outside the group, and of the product only
  the group's part is returned, so that each sees its own diagonal block of the matrix.

  Args:
    labels: tree of group names with the structure of the parameters, from `group_labels`.
    transforms: the transformation of every group.

  Raises:
    ValueError: a group without leaves or without transformation; nothing is said of an empty tree.
  """
  groups, names, treedef = jax.tree.leaves(labels), leaf_names(labels), jax.tree.structure(labels)
  if groups and set(groups) != set(transforms):
    raise ValueError(
      f"the groups with parameters are {sorted(set(groups))}, those with an optimizer {sorted(transforms)}"
    )
  transforms = {group: optax.with_extra_args_support(t) for group, t in transforms.items()}

  def split(tree) -> dict[str, dict[str, Any]]:
    return {group: select(tree, labels, group) for group in transforms}

  def merge(parts):
    return jax.tree.unflatten(treedef, [parts[group][name] for group, name in zip(groups, names, strict=True)])

  def restricted(product: Callable, group: str, params) -> Callable:
    outside = split(jax.tree.map(jnp.zeros_like, params))
    return lambda v: split(product(merge(outside | {group: v})))[group]

  def init(params):
    parts = split(params)
    return {group: t.init(parts[group]) for group, t in transforms.items()}

  def update(updates, state, params=None, *, hvp_fn=None, **extra_args):
    grads, new, states = split(updates), {}, {}
    parts = dict.fromkeys(transforms) if params is None else split(params)
    for group, t in transforms.items():
      own = None if hvp_fn is None else restricted(hvp_fn, group, params)
      new[group], states[group] = t.update(grads[group], state[group], parts[group], hvp_fn=own, **extra_args)
    return merge(new), states

  return optax.GradientTransformationExtraArgs(init, update)


def freeze(optimizer: optax.GradientTransformationExtraArgs, frozen) -> optax.GradientTransformationExtraArgs:
  """`optimizer`, without any update (weight decay and noise included) of the leaves where the tree `frozen` is True."""

  def update(grads, state, params=None, **extra):
    updates, state = optimizer.update(grads, state, params, **extra)
    return jax.tree.map(lambda fixed, u: jnp.zeros_like(u) if fixed else u, frozen, updates), state

  return optax.GradientTransformationExtraArgs(optimizer.init, update)


def role_rates(
  cfg, *, lr_scale: float, matrix_lr: float, embed_lr: float, head_lr: float, scalar_lr: float
) -> dict[str, float]:
  """The learning rate of each role; those of the embedding and the head are multiplied by sqrt(768 / n_embd).

  Routers and directions learn like matrices, the sizes of directions (`log_scale`, `gate`) like scalars.
  """
  width = math.sqrt(REFERENCE_WIDTH / max(cfg.n_embd, 1))  # a width below 1 is the model's to report
  rates = {"matrix": matrix_lr, "embedding": embed_lr * width, "head": head_lr * width, "scalar": scalar_lr}
  rates |= {"router": matrix_lr, "direction": matrix_lr, "log_scale": scalar_lr, "gate": scalar_lr}
  return {role: lr_scale * rate for role, rate in rates.items()}


def rate_problems(**rates: float) -> list[Problem]:
  """A problem for each learning rate, or scale of learning rates, that is not a positive number."""
  return [
    Problem(f"--{name}={value} is not a positive number", f"use e.g. --{name}={1.0 if name == 'lr_scale' else 0.003}")
    for name, value in rates.items()
    if not 0 < value < math.inf
  ]


def adam_problems(adam_b1: float, adam_b2: float, adam_eps: float) -> list[Problem]:
  """A problem for each setting of Adam's moments that is out of range."""
  found = []
  for name, value, default in (("adam_b1", adam_b1, 0.9), ("adam_b2", adam_b2, 0.95)):
    if not 0 <= value < 1:
      found.append(Problem(f"--{name}={value} is outside [0, 1)", f"use e.g. --{name}={default}"))
  if not 0 < adam_eps < math.inf:
    found.append(Problem(f"--adam_eps={adam_eps} is not a positive number", "use e.g. --adam_eps=1e-8"))
  return found


def momentum_problems(momentum: float) -> list[Problem]:
  """The problem of a momentum outside [0, 1)."""
  if 0 <= momentum < 1:
    return []
  return [Problem(f"--momentum={momentum} is outside [0, 1)", "use e.g. --momentum=0.95")]


def decay_problems(weight_decay: float) -> list[Problem]:
  """The problem of a weight decay that is negative or not finite."""
  if 0 <= weight_decay < math.inf:
    return []
  return [Problem(f"--weight_decay={weight_decay} is not 0 or a positive number", "use 0 for no decay, or e.g. 0.1")]


def scale_by_group(labels, rates: Mapping[str, float]) -> optax.GradientTransformationExtraArgs:
  """u <- -scale · rate[group] · u; `scale`, the schedule's multiplier, is an extra argument of `update` (default 1)."""

  def update(updates, state, params=None, *, scale=1.0, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda label, u: (-rates[label] * scale) * u, labels, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def stay_on_spheres(specs) -> optax.GradientTransformationExtraArgs:
  """Turns the final update u of every direction v into one along its sphere; the last link of an optimizer's chain.

      u <- u - v <v, u>/|v|²                    the tangent part, over the leaf's `unit_axes`
      u <- radius · (v + u)/|v + u| - v         with `renorm`: the parameter that results has the leaf's norm again

  Without `renorm` the norm can only grow, |v + u|² = |v|² + |u|². Leaves of other roles pass unchanged. Sums are taken
  in float32; `update` needs `params`. Cost: three passes over the directions.
  """

  def along_sphere(spec, u, v):
    if spec.role != "direction":
      return u
    along = lambda x, y: jnp.sum(x * y, axis=spec.unit_dims, keepdims=True)
    # A vanishing v has no tangent space: its update is left whole.
    u = u - v * (along(v, u) / jnp.maximum(along(v, v), 1e-30))
    if not spec.renorm:
      return u
    moved = v + u
    return moved * (spec.radius / jnp.maximum(jnp.sqrt(along(moved, moved)), 1e-30)) - v

  def update(updates, state, params=None, **extra_args):
    del extra_args
    return jax.tree.map(along_sphere, specs, updates, params, is_leaf=is_spec), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
