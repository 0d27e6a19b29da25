"""Clearing an optimizer's memory of past gradients inside a compiled step."""

import jax
import optax

from mgr_jax.optim.hoss import HossState
from mgr_jax.optim.muon import MuonState

# What remembers gradients, with the counters that debias it: moments of zero beside a large counter would make the
# first step (1-b1)/sqrt(1-b2) times too long. Step lengths that an optimizer has learned and diagnostics are not here.
_MOMENTS = {
  optax.ScaleByAdamState: ("count", "mu", "nu"),
  optax.TraceState: ("trace",),
  MuonState: ("count", "mu"),
  HossState: ("count", "nu"),
}


def reset_moments(optimizer: optax.GradientTransformation, opt_state, params, flag: jax.Array):
  """`opt_state` with all moments and their counters as `optimizer.init` makes them, where `flag` is True.

  Args:
    flag: bool scalar, may be traced. Where it is False nothing is computed (except under `vmap`).

  Raises:
    ValueError: the state holds a class of which it is not known what its moments are.
  """
  _check(opt_state)
  return jax.lax.cond(flag, lambda old: _merge(optimizer.init(params), old), lambda old: old, opt_state)


def _is_known(state) -> bool:
  return type(state) in _MOMENTS


def _check(state) -> None:
  """Every array of the state belongs to a known class."""
  for leaf in jax.tree.leaves(state, is_leaf=_is_known):
    if not _is_known(leaf):
      raise ValueError(f"an optimizer state holds {type(leaf).__name__} outside of {[c.__name__ for c in _MOMENTS]}")


def _merge(fresh, old):
  take = lambda new, state: state._replace(**{name: getattr(new, name) for name in _MOMENTS[type(state)]})
  return jax.tree.map(take, fresh, old, is_leaf=_is_known)
