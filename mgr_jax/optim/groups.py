"""Parameter groups: which leaves an optimizer treats alike, and how fast each group learns."""

import math
from collections.abc import Iterable, Mapping

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


def role_rates(
  cfg, *, lr_scale: float, matrix_lr: float, embed_lr: float, head_lr: float, scalar_lr: float
) -> dict[str, float]:
  """The learning rate of each role; those of the embedding and the head are multiplied by sqrt(768 / n_embd).

  Directions learn like matrices, and their sizes (`log_scale`, `gate`) like scalars.
  """
  width = math.sqrt(REFERENCE_WIDTH / max(cfg.n_embd, 1))  # a width below 1 is the model's to report
  rates = {"matrix": matrix_lr, "embedding": embed_lr * width, "head": head_lr * width, "scalar": scalar_lr}
  rates |= {"direction": matrix_lr, "log_scale": scalar_lr, "gate": scalar_lr}
  return {role: lr_scale * rate for role, rate in rates.items()}


def rate_problems(**rates: float) -> list[Problem]:
  """A problem for each learning rate, or scale of learning rates, that is not a positive number."""
  return [
    Problem(f"--{name}={value} is not a positive number", f"use e.g. --{name}={1.0 if name == 'lr_scale' else 0.003}")
    for name, value in rates.items()
    if not 0 < value < math.inf
  ]


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
