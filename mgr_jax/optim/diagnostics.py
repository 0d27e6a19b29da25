"""What an update looks like beside its gradient and the parameters, by role; what HOSS saw."""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.optim.hoss import HossState
from mgr_jax.params import is_spec


def diagnostics(specs, grads, updates, params) -> dict[str, jax.Array]:
  """Float32 scalars by role: norms, the size of the update beside the parameters', its angle to the gradient.

      grad_norm/R, update_norm/R, param_norm/R      Euclidean norms over all leaves of role R
      update_to_param_rms/R                         update_norm / param_norm, 0 for zero parameters
      cosine/R                                      <Δ, -g> / (|Δ||g|): 1 for gradient descent, 0 for a zero update
      nonfinite_count                               entries of gradients and updates that are not finite

  Cost: one pass over gradients, updates and parameters.
  """
  roles = [spec.role for spec in jax.tree.leaves(specs, is_leaf=is_spec)]
  trees = {"grad": jax.tree.leaves(grads), "update": jax.tree.leaves(updates), "param": jax.tree.leaves(params)}
  dot = functools.partial(jnp.vdot, precision="highest")
  found = {}
  for role in sorted(set(roles)):
    own = {
      name: [x.astype(jnp.float32) for x, r in zip(xs, roles, strict=True) if r == role] for name, xs in trees.items()
    }
    inner = lambda a, b, own=own: sum(dot(x, y) for x, y in zip(own[a], own[b], strict=True))
    norm = {name: jnp.sqrt(inner(name, name)) for name in own}
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
    found |= {f"{name}_norm/{role}": value for name, value in norm.items()}
    found[f"update_to_param_rms/{role}"] = ratio(norm["update"], norm["param"])
    found[f"cosine/{role}"] = ratio(-inner("update", "grad"), norm["update"] * norm["grad"])
  count = sum(jnp.sum(~jnp.isfinite(x)) for x in trees["grad"] + trees["update"])
  return found | {"nonfinite_count": count.astype(jnp.float32)}


def hoss_metrics(opt_state) -> dict[str, jax.Array]:
  """The scalars of `HossDiag` of the last step as `hoss/*`, with the ends of its Ritz values; empty without HOSS."""
  is_hoss = lambda x: isinstance(x, HossState)
  found = [x.diag._asdict() for x in jax.tree.leaves(opt_state, is_leaf=is_hoss) if is_hoss(x)]
  if not found:
    return {}
  ritz = found[0].pop("ritz")
  found[0] |= {"ritz_min": jnp.min(ritz), "ritz_max": jnp.max(ritz)}
  return {f"hoss/{name}": value for name, value in found[0].items()}
