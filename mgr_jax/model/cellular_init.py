"""Initial weights from a cellular automaton: part of the variance of every random matrix comes from its cells."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mgr_jax.algebra import cellular
from mgr_jax.params import ParamSpec, fold_in_name, is_spec, key_names, leaf_names
from mgr_jax.problems import Problem

MAX_MONOTONY = 0.95


def cellular_specs(specs, rule: int, alpha: float):
  """`specs` whose random matrices are drawn as w = std·(sqrt(alpha)·cells + sqrt(1 - alpha)·normal).

  The cells have mean 0 and variance 1, so w has the variance of the ordinary draw. Changed are leaves of role `matrix`
  that are drawn from the normal distribution; those that start at zero, the embedding and the head stay as they are.
  The normal part is the ordinary draw of the same key.

  Args:
    rule: of the automaton, 0 to 255; its first row is random, one automaton per layer and matrix.
    alpha: share of the variance, 0 to 1.
  """

  def with_cells(spec: ParamSpec) -> ParamSpec:
    if not _is_changed(spec):
      return spec
    ordinary = spec.one_layer

    def draw(key, shape):
      cells = ordinary.normal_std * cellular.pattern(fold_in_name(key, "cells"), rule, shape)
      return jnp.sqrt(alpha) * cells + jnp.sqrt(1 - alpha) * ordinary.draw(key)

    return dataclasses.replace(spec, init=draw)

  return jax.tree.map(with_cells, specs, is_leaf=is_spec)


def cellular_problems(key: jax.Array, specs, rule: int, seed: int) -> list[Problem]:
  """Why `init_params(key, cellular_specs(specs, rule, ...))` would be of no use: at most one problem.

  Runs the very automata that the initial weights will be made of; `seed`, from which `key` was made, is for the text.
  """
  leaves = jax.tree.leaves(specs, is_leaf=is_spec)
  named = zip(leaf_names(specs), key_names(specs), leaves, strict=True)
  chosen = [(name, key_name, spec) for name, key_name, spec in named if _is_changed(spec)]
  flags = f"--ca_rule={rule}"
  if not chosen:
    error = f"{flags} has no effect: this model has no matrix that starts at random"
    return [Problem(error, "leave it out, or use another --mlp or --attention")]

  @jax.jit
  def monotonies(key):
    def of(key_name, spec):
      key_leaf = fold_in_name(key, key_name)
      keys = key_leaf[None] if spec.one_layer is spec else jax.random.split(key_leaf, spec.shape[0])
      n = math.prod(spec.one_layer.shape)
      return jnp.max(jax.vmap(lambda k: cellular.monotony(fold_in_name(k, "cells"), rule, n))(keys))

    return jnp.stack([of(key_name, spec) for _, key_name, spec in chosen])

  found = monotonies(key)
  worst = int(jnp.argmax(found))
  share, name = float(found[worst]), chosen[worst][0]
  if share <= MAX_MONOTONY:
    return []
  error = f"{flags} with --seed={seed} is degenerate: {share:.1%} of the cells of {name} agree or repeat rows above"
  fix = f"use a rule that does not come to rest, e.g. --ca_rule=30; at most {MAX_MONOTONY:.0%} may"
  return [Problem(error, fix)]


def _is_changed(spec: ParamSpec) -> bool:
  return spec.role == "matrix" and spec.init == "normal"
