"""What broke when a loss or a gradient is not finite: every array's figures, and the first layer that went wrong."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.config import GPTConfig, layer_items
from mgr_jax.model import gpt, stack
from mgr_jax.params import leaf_names
from train.console import table
from train.metrics import dumps

FILES = ("nonfinite.json", "nonfinite_batch.npz")


class NonFinite(Exception):
  """Training broke down at update `step` on `batch`."""

  def __init__(self, step: int, batch: dict[str, np.ndarray]):
    super().__init__(f"loss, gradient or update of step {step} is not finite")
    self.step = step
    self.batch = batch


class Figures(NamedTuple):
  """One array: minimum, maximum and mean of its finite entries (None without any), and how many are not finite."""

  path: str
  shape: tuple[int, ...]
  dtype: str
  min: float | None
  max: float | None
  mean: float | None
  nan: int
  inf: int


def figures(tree, prefix: str) -> list[Figures]:
  """The figures of every leaf of a PyTree of arrays."""
  rows = []
  for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
    a = np.asarray(leaf)
    good = a[np.isfinite(a)].astype(np.float64)
    stats = (float(f(good)) for f in (np.min, np.max, np.mean)) if good.size else (None, None, None)
    counts = int(np.isnan(a).sum()), int(np.isinf(a).sum())
    rows.append(Figures(f"{prefix}/{name}" if name else prefix, a.shape, str(a.dtype), *stats, *counts))
  return rows


def diagnose(params, batch: dict[str, np.ndarray], cfg: GPTConfig) -> dict[str, Any]:
  """Runs the batch once more, whole and layer by layer.

  Returns `where` (one sentence), `loss`, and `arrays`, the figures of the activations after the first bad layer, of the
  parameters and of the gradients. Compiles one program per layer: for post-mortems only.
  """
  where, activations = _first_bad_layer(params, batch, cfg)
  loss, grads = jax.jit(jax.value_and_grad(lambda p: gpt.loss(p, batch, cfg)[0]))(params)
  if where is None:
    bad = [row.path for row in figures(grads, "gradient") if row.nan or row.inf]
    last = _last_bad_gradient_layer(grads, cfg)
    if not np.isfinite(loss):
      where = "all layers are finite, the loss is not"
    elif last is not None:
      where = f"the forward pass is finite; going backward, the gradient breaks at layer {last}"
    elif bad:
      where = f"the forward pass is finite; not finite are {', '.join(bad)}"
    else:
      where = (
        "loss and gradient of the batch are finite with these parameters: the optimizer's update is not, or"
        " micro-batches or another compilation made the difference"
      )
  rows = [*activations, *figures(params, "parameter"), *figures(grads, "gradient")]
  return {"where": where, "loss": float(loss), "arrays": [row._asdict() for row in rows]}


def _first_bad_layer(params, batch, cfg: GPTConfig) -> tuple[str | None, list[Figures]]:
  """Runs ever longer prefixes of the stack until the activations are not all finite."""
  embedded = jnp.asarray(params["embed"])[batch["tokens"]]
  if not np.isfinite(embedded).all():
    return "the embedding of this batch is not finite", figures(embedded, "embedding")
  segment_ids = batch["segment_ids"] if cfg.doc_mask else None
  for n_layer in range(1, cfg.n_layer + 1):
    prefix = dataclasses.replace(cfg, n_layer=n_layer, attention=_prefix(cfg, n_layer))
    runs = tuple(
      jax.tree.map(lambda a, n=n_layer - run.first: a[:n], stacked)
      for run, stacked in zip(stack.runs(cfg), params["runs"], strict=True)
      if run.first < n_layer
    )
    x = jax.jit(lambda p, cfg=prefix: gpt.hidden(p, batch["tokens"], cfg, segment_ids)[0])({**params, "runs": runs})
    if not np.isfinite(np.asarray(x, np.float32)).all():
      item = layer_items(cfg.attention, cfg.n_layer)[n_layer - 1]
      return f"layer {n_layer - 1} ({item}) is the first whose output is not finite", figures(x, f"layer {n_layer - 1}")
  return None, []


def _prefix(cfg: GPTConfig, n_layer: int) -> str:
  """The attention grammar of the first `n_layer` layers."""
  return ",".join(str(item) for item in layer_items(cfg.attention, cfg.n_layer)[:n_layer])


def _last_bad_gradient_layer(grads, cfg: GPTConfig) -> int | None:
  """The layer nearest to the loss whose gradient is not finite; the leaves of a run are stacked over its layers."""
  bad = [
    run.first + int(layer)
    for run, stacked in zip(stack.runs(cfg), grads["runs"], strict=True)
    for leaf in jax.tree.leaves(stacked)
    for layer in np.flatnonzero(~np.isfinite(np.asarray(leaf)).reshape(leaf.shape[0], -1).all(1))
  ]
  return max(bad, default=None)


def report(error: NonFinite, params, cfg: GPTConfig, directory: Path) -> str:
  """Writes `nonfinite.json` and the batch beside it (`FILES`); returns the text to show."""
  found = {"step": error.step, **diagnose(params, error.batch, cfg)}
  (directory / FILES[0]).write_text(dumps(found, indent=2) + "\n", "utf-8")
  np.savez(directory / FILES[1], **error.batch)
  short = lambda v: f"{v:.3g}" if isinstance(v, float) else v
  rows = [[short(v) for v in row.values()] for row in found["arrays"]]
  where = f"step {error.step}: {found['where']}\nthe batch and these figures are in {directory}/nonfinite*"
  return f"{table(Figures._fields, rows)}\n\n{where}"
