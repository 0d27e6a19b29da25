"""Muon: momentum whose every matrix is replaced by its polar factor, for hidden matrices; AdamW for all else."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgr_jax.optim.adamw import DECAYED
from mgr_jax.optim.groups import (
  adam_problems,
  by_group,
  decay_problems,
  group_labels,
  momentum_problems,
  rate_problems,
  role_rates,
  scale_by_group,
  select,
  stay_on_spheres,
)
from mgr_jax.optim.muon_layout import SHAPE_SCALES, is_matrix, layout, map_matrices, shape_classes, shape_factor
from mgr_jax.optim.newton_schulz import METHODS, orthogonalise
from mgr_jax.params import ROLES, is_spec, leaf_names
from mgr_jax.problems import Problem, raise_if_any

MUON, ADAMW = "muon", "adamw"
MUON_ROLES = ("matrix", "direction")
GROUPS = {MUON: MUON_ROLES, ADAMW: tuple(role for role in ROLES if role not in MUON_ROLES)}
# AdamW's own rate for matrices, for the leaves that act like one but are not orthogonalised.
ADAMW_MATRIX_LR = 3e-3

BIAS_CORRECTIONS = ("none", "optax")
WARMUP_START = 0.85


class MuonState(NamedTuple):
  """count: updates so far, int32; mu: the momentum, float32, a tree like the parameters."""

  count: jax.Array
  mu: Any


def scale_by_muon(
  specs,
  *,
  momentum: float = 0.95,
  nesterov: bool = True,
  ns_fn: Callable[[jax.Array], jax.Array] = orthogonalise,
  shape_scale: str = "jordan",
  bias_correction: str = "none",
  momentum_warmup: int = 300,
  per_head: bool = False,
  sharding: jax.sharding.Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum, orthogonalised: steepest ascent under the spectral norm.

      B <- mu·B + (1-mu)·G,   M = mu·B + (1-mu)·G  (B itself without `nesterov`),   u = shape_factor · ns_fn(M)

  Matrices of one shape, transposed or not and from any number of leaves, are orthogonalised as one batch
  (Jordan et al., 2024; Bernstein, Newhouse, 2024, arXiv 2409.20325).

  Args:
    specs: tree of `ParamSpec`; all its leaves are matrices, see `muon_layout.layout`.
    momentum: mu; it rises linearly from 0.85 over the first `momentum_warmup` updates (0 for none).
    ns_fn: the orthogonaliser, [K, m, n] -> [K, m, n] with m <= n.
    shape_scale: see `muon_layout.shape_factor`.
    bias_correction: `optax` divides B by 1 - mu^(t+1) and G by 1 - mu^t for t = 1, 2, ..., as optax.contrib.muon does:
      without `nesterov` the same direction, with it another one until mu^t is small.
    per_head: orthogonalise every head by itself.
    sharding: of [K, m, n] over its first axis. Every device then orthogonalises whole matrices, K/devices of them, and
      the results are sent to where the parameters live. Without it every device repeats the work.

  Returns:
    A transformation; state: one float32 copy of the parameters and a counter. It does not read the parameters.

  Raises:
    ValueError: a leaf that is not a matrix, by name; a setting out of range.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum={momentum} is outside [0, 1)")
  if shape_scale not in SHAPE_SCALES:
    raise ValueError(f"shape_scale={shape_scale!r} is not one of {SHAPE_SCALES}")
  if bias_correction not in BIAS_CORRECTIONS:
    raise ValueError(f"bias_correction={bias_correction!r} is not one of {BIAS_CORRECTIONS}")
  if momentum_warmup < 0:
    raise ValueError(f"momentum_warmup={momentum_warmup} is negative")
  if momentum_warmup and bias_correction == "optax":
    raise ValueError("bias_correction='optax' is for a constant momentum: it needs momentum_warmup=0")
  leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  layouts = [layout(spec, per_head) for spec in leaves]
  for name, spec, form in zip(leaf_names(specs), leaves, layouts, strict=True):
    if form.shape_class[0] < 2:
      raise ValueError(f"{name} of shape {spec.shape} holds {form.n_in} by {form.n_out} matrices, which are vectors")

  def mu_of(count: jax.Array):
    if not momentum_warmup:
      return momentum
    start = min(WARMUP_START, momentum)
    return start + (momentum - start) * jnp.minimum(count.astype(jnp.float32) / momentum_warmup, 1.0)

  def init(params):
    return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    mu, count = mu_of(state.count), optax.safe_increment(state.count)
    average = jax.tree.map(lambda b, g: mu * b + (1 - mu) * g.astype(jnp.float32), state.mu, updates)
    fix_b = fix_g = 1.0
    if bias_correction == "optax":
      fix_b, fix_g = 1 / (1 - mu ** (count + nesterov)), 1 / (1 - mu**count)
    ahead = lambda b, g: mu * fix_b * b + (1 - mu) * fix_g * g.astype(jnp.float32) if nesterov else fix_b * b
    matrices = treedef.flatten_up_to(jax.tree.map(ahead, average, updates))
    polar = map_matrices(ns_fn, matrices, layouts, sharding)
    sized = [shape_factor(form.n_in, form.n_out, shape_scale) * x for form, x in zip(layouts, polar, strict=True)]
    found = jax.tree.map(lambda x, g: x.astype(g.dtype), jax.tree.unflatten(treedef, sized), updates)
    return found, MuonState(count, average)

  return optax.GradientTransformationExtraArgs(init, update)


def muon_labels(specs):
  """The tree of groups: `muon` for matrices and directions, `adamw` for everything else, vectors included."""
  choose = lambda label, spec: ADAMW if label == MUON and not is_matrix(spec) else label
  return jax.tree.map(choose, group_labels(specs, GROUPS), specs)


def muon(
  specs,
  cfg,
  *,
  lr_scale: float = 1.0,
  matrix_lr: float = 0.02,
  embed_lr: float = 0.2,
  head_lr: float = 0.004,
  scalar_lr: float = 3e-3,
  weight_decay: float = 0.0,
  momentum: float = 0.95,
  muon_ns: str = "polar_express",
  muon_ns_steps: int = 5,
  muon_scale: str = "jordan",
  adam_b1: float = 0.9,
  adam_b2: float = 0.95,
  adam_eps: float = 1e-8,
  owners: jax.sharding.Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Muon on hidden matrices and directions, AdamW on everything else.

      matrices, directions:  Δp = -scale · lr · (u + wd·p)  with u of `scale_by_muon`
      all others:            as in `adamw`

  Leaves of role `router`, and matrices with a single row or column, learn by AdamW at its own rate for matrices, 0.003.
  Decayed are matrices and routers.

  Args:
    specs: tree of `ParamSpec` of the model.
    cfg: `n_embd` is read; the rates of embedding and head are multiplied by sqrt(768 / n_embd).
    lr_scale: multiplies every learning rate.
    matrix_lr: of the orthogonalised leaves; the spectral norm of a step, up to the factor of the shape.
    embed_lr, head_lr, scalar_lr: learning rates of AdamW by role.
    weight_decay: wd, per step and unit of learning rate.
    momentum: mu of Muon, after 300 updates of warm-up.
    muon_ns, muon_ns_steps: orthogonaliser and its iterations, see `newton_schulz.orthogonalise`.
    muon_scale: see `muon_layout.shape_factor`.
    adam_b1, adam_b2, adam_eps: of AdamW.
    owners: divides the matrices of a shape over devices, see `muon_layout.map_matrices`.

  Returns:
    A transformation whose `update` needs `params` and takes the schedule's multiplier as `scale`.

  Raises:
    UserError: with every setting that is out of range.
    ValueError: parameters, but no matrix among them.
  """
  rates = {"matrix_lr": matrix_lr, "embed_lr": embed_lr, "head_lr": head_lr, "scalar_lr": scalar_lr}
  found = rate_problems(lr_scale=lr_scale, **rates) + decay_problems(weight_decay) + momentum_problems(momentum)
  for flag, value, choices in (("muon_ns", muon_ns, METHODS), ("muon_scale", muon_scale, SHAPE_SCALES)):
    if value not in choices:
      found.append(Problem(f"--{flag}={value} is unknown", f"use one of {', '.join(choices)}"))
  if muon_ns_steps < 1:
    found.append(Problem(f"--muon_ns_steps={muon_ns_steps} is not positive", "use e.g. --muon_ns_steps=5"))
  raise_if_any(found + adam_problems(adam_b1, adam_b2, adam_eps))

  labels = muon_labels(specs)
  groups = set(jax.tree.leaves(labels))
  if groups and MUON not in groups:
    raise ValueError("Muon has nothing to do: no parameter is a matrix or a direction with two rows and columns")
  roles = jax.tree.map(lambda spec: spec.role, specs, is_leaf=is_spec)
  ns_fn = functools.partial(orthogonalise, ns=muon_ns, steps=muon_ns_steps)
  first = {
    MUON: scale_by_muon(
      select(specs, labels, MUON), momentum=momentum, ns_fn=ns_fn, shape_scale=muon_scale, sharding=owners
    ),
    ADAMW: optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
  }
  matrix_lrs = {MUON: matrix_lr, ADAMW: ADAMW_MATRIX_LR}

  def decayed_and_scaled(group: str) -> optax.GradientTransformationExtraArgs:
    role_of = select(roles, labels, group)
    decay = optax.add_decayed_weights(weight_decay, mask={name: role in DECAYED for name, role in role_of.items()})
    group_rates = role_rates(cfg, lr_scale=lr_scale, **rates | {"matrix_lr": matrix_lrs[group]})
    return optax.chain(first[group], decay, scale_by_group(role_of, group_rates))

  return optax.chain(by_group(labels, {group: decayed_and_scaled(group) for group in groups}), stay_on_spheres(specs))


def muon_diagnostics(
  specs, momentum, ns_fn: Callable[[jax.Array], jax.Array] = orthogonalise, per_head: bool = False
) -> dict[str, jax.Array]:
  """What the orthogonaliser does to the first matrix M of each shape class, float32 scalars named `<m>x<n>/<what>`.

  With X = ns_fn(M): `sigma_min`, `sigma_median`, `sigma_max` of X; `orthogonality_defect`, |X Xᵀ - I|_F / sqrt(m);
  `stable_rank` of M, |M|_F² / |M|², 0 for a zero matrix; `small_mass`, the share in the sum of all singular values of M
  of those below 1e-3 |M|_F, which are too small to come out near 1.

  Args:
    specs: tree of `ParamSpec`, all matrices; `momentum` has its structure.
    ns_fn, per_head: as for `scale_by_muon`.

  Cost: two singular value decompositions per shape class.
  """
  layouts = [layout(spec, per_head) for spec in jax.tree.leaves(specs, is_leaf=is_spec)]
  arrays = jax.tree.structure(specs, is_leaf=is_spec).flatten_up_to(momentum)
  found = {}
  for (m, n), members in shape_classes(layouts).items():
    M = layouts[members[0]].pack(arrays[members[0]])[:1].astype(jnp.float32)
    X = ns_fn(M)[0]
    before, after = (jnp.linalg.svd(x, compute_uv=False) for x in (M[0], X))
    frobenius = jnp.linalg.norm(before)
    small = jnp.sum(jnp.where(before < 1e-3 * frobenius, before, 0.0))
    defect = jnp.matmul(X, X.T, precision="highest") - jnp.eye(m)
    values = {
      "sigma_min": after[-1],
      "sigma_median": jnp.median(after),
      "sigma_max": after[0],
      "orthogonality_defect": jnp.linalg.norm(defect) / m**0.5,
      "stable_rank": (frobenius / jnp.maximum(before[0], 1e-30)) ** 2,
      "small_mass": small / jnp.maximum(jnp.sum(before), 1e-30),
    }
    found |= {f"{m}x{n}/{name}": value for name, value in values.items()}
  return found
