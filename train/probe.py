"""Diagnostics of a model under training: what its mechanisms report of themselves, and gradient norms by array."""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.params import leaf_names

ROWS = 2


def probe(params, batch, cfg: GPTConfig, annealed) -> dict[str, jax.Array]:
  """Diagnostics on the first `ROWS` rows of a batch; changes nothing.

  Returns:
    `<mechanism>/<diagnostic>`, leading axis over that mechanism's layers, and `grad_norm/<array>`: the norm of the
    gradient of the rows' loss, per layer for stacked arrays. A diagnostic that was not measured is absent.
  """
  return _probe(params, {name: x[:ROWS] for name, x in batch.items()}, cfg, annealed)


@functools.partial(jax.jit, static_argnames="cfg")
def _probe(params, batch, cfg, annealed):
  segment_ids = batch["segment_ids"] if cfg.doc_mask else None
  _, aux = gpt.hidden(gpt.cast(params, cfg), batch["tokens"], cfg, segment_ids, annealed, probe=True)
  grads = jax.grad(lambda p: gpt.loss(p, batch, cfg, annealed=annealed)[0])(params)

  def norm(name, g):
    axes = tuple(range(1, g.ndim)) if name.startswith("runs/") else None
    return jnp.sqrt(jnp.sum(jnp.square(g), axis=axes))

  named = zip(leaf_names(grads), jax.tree.leaves(grads), strict=True)
  return aux | {f"grad_norm/{name}": norm(name, g) for name, g in named}
