"""Fragility: how much worse a trained model becomes when half of its layers, or of its heads and hidden units, go.

This measures dependence of a model that was never trained without them. It is not the benefit of having twice as many,
and gives no verdict.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt, stack
from mgr_jax.params import is_spec
from mgr_jax.problems import Problem
from train.dominance import documents as documents_lib
from train.dominance.documents import Documents

MASKABLE_MLPS = ("relu2", "gelu", "swiglu", "none")
HEAD_AXES = ("heads", "head_dim", "embed")
TOGETHER = 4  # variants evaluated at once


class Masks(NamedTuple):
  """Factors of branch outputs: layers [L], query heads [H], hidden units [M]; the same heads and units in all layers.

  1 keeps, 0 removes, and another number rescales what is kept.
  """

  layer: jax.Array
  head: jax.Array
  hidden: jax.Array


def hidden_units(cfg: GPTConfig) -> int:
  """Rows of the MLP's output matrix; 0 without an MLP."""
  specs = gpt.specs(cfg)["runs"][0]["mlp"]
  return specs["w_out"].shape[1] if specs else 0


def problems(cfg: GPTConfig) -> list[Problem]:
  """Why the model cannot be masked; empty when it can."""
  found = []
  if cfg.mlp not in MASKABLE_MLPS:
    what = f"--mlp={cfg.mlp} is not linear in its hidden units, so none can be removed by a factor"
    found.append(Problem(what, f"use a model with one of --mlp={', '.join(MASKABLE_MLPS)}"))
  for run, tree in zip(stack.runs(cfg), gpt.specs(cfg)["runs"], strict=True):
    if set(tree) > {"attention", "mlp"}:
      parts = ", ".join(sorted(set(tree) - {"attention", "mlp"}))
      found.append(Problem(f"layers of {cfg.attention} also have {parts}, which no mask removes", "use --kind=ladder"))
    spec = run.mechanism.param_specs(cfg, run.options).get("wo")
    # A direction is divided by its norm, so that scaling it would do nothing.
    if not is_spec(spec) or spec.axes != HEAD_AXES or spec.role != "matrix":
      what = f"{run.mechanism.name} has no plain matrix wo [heads, head_dim, embed] whose heads can be removed"
      found.append(Problem(what, "use --kind=ladder, which needs no masks"))
  if cfg.n_layer < 2 or (cfg.n_head // cfg.n_kv_head < 2 and cfg.n_kv_head < 2):
    found.append(
      Problem(f"{cfg.n_layer} layers of {cfg.n_head} heads have no half", "use 2 layers and 2 heads or more")
    )
  return found


def masked(params, masks: Masks, cfg: GPTConfig):
  """The parameters of the same model with factors on its branch outputs.

  Branch outputs are linear in the rows of wo and of the MLP's output matrix, so that scaling rows is exactly masking
  heads, hidden units and whole layers; residual channels, and with them every norm, stay as they are.
  """
  runs = []
  for run, tree in zip(stack.runs(cfg), params["runs"], strict=True):
    layer = masks.layer[run.first : run.first + run.n_layer]
    wo = tree["attention"]["wo"] * layer[:, None, None, None] * masks.head[:, None, None]
    mlp = tree["mlp"]
    if mlp:
      mlp = mlp | {"w_out": mlp["w_out"] * layer[:, None, None] * masks.hidden[:, None]}
    runs.append(tree | {"attention": tree["attention"] | {"wo": wo}, "mlp": mlp})
  return params | {"runs": tuple(runs)}


def half_masks(cfg: GPTConfig, rng: np.random.Generator, count: int) -> dict[str, Masks]:
  """Stacked masks [count, ...] that remove half of the layers, or half of heads and hidden units, at random.

  Heads go from every group of a key/value head, or by whole groups where a group is a single head. The names ending in
  `rescaled` divide what is kept by its share.
  """
  L, H, K, M = cfg.n_layer, cfg.n_head, cfg.n_kv_head, hidden_units(cfg)

  def half(n: int) -> np.ndarray:
    kept = np.zeros((count, n), np.float32)
    for row in kept:
      row[rng.permutation(n)[: n - n // 2]] = 1
    return kept

  ones = lambda n: np.ones((count, n), np.float32)
  if H == K:
    heads = half(H)
  else:
    heads = np.concatenate([half(H // K) for _ in range(K)], 1)
  raw = {"depth": Masks(half(L), ones(H), ones(M)), "width": Masks(ones(L), heads, half(M))}
  rescale = lambda x: x / np.maximum(x.mean(-1, keepdims=True), 1e-6) if x.size else x
  return raw | {f"{name} rescaled": Masks(*map(rescale, m)) for name, m in raw.items()}


@functools.partial(jax.jit, static_argnames=("cfg", "rows"))
def _variants(params, annealed, masks: Masks, documents: Documents, cfg: GPTConfig, rows: int):
  of = lambda m: documents_lib.nats(masked(params, m, cfg), annealed, documents, cfg, rows)
  return jax.lax.map(of, masks, batch_size=TOGETHER)


def losses(params, annealed, masks: Masks, documents: Documents, cfg: GPTConfig, rows: int = 16) -> np.ndarray:
  """Nats per token of each variant of stacked masks, by one compiled program for all masks of one number."""
  padded = documents_lib.padded(documents, rows)
  found = np.asarray(_variants(params, annealed, masks, padded, cfg, rows), np.float64)
  return found.sum(-1) / documents.lengths.sum()


class Fragility(NamedTuple):
  """Mean loss added by removing half of an axis, its spread over random halves, and both with branches rescaled."""

  raw: float
  raw_spread: float
  rescaled: float
  rescaled_spread: float


def fragility(
  params, annealed, documents: Documents, cfg: GPTConfig, count: int, seed: int = 0
) -> dict[str, Fragility]:
  """Of depth and width, over `count` random halves each. Costs 4·count + 1 forward passes over the documents."""
  sets = half_masks(cfg, np.random.default_rng(0), count)
  whole = Masks(np.ones((1, cfg.n_layer)), np.ones((1, cfg.n_head)), np.ones((1, hidden_units(cfg))))
  stacked = jax.tree.map(lambda *x: jnp.concatenate([jnp.asarray(a, jnp.float32) for a in x]), whole, *sets.values())
  found = losses(params, annealed, stacked, documents, cfg)
  damage = dict(zip(sets, (found[1:] - found[0]).reshape(len(sets), count), strict=True))
  both = lambda name: (float(np.mean(damage[name])), float(np.std(damage[name])))
  return {axis: Fragility(*both(axis), *both(f"{axis} rescaled")) for axis in ("depth", "width")}
