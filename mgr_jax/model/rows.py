"""Layers on a mesh of devices: each device computes its own rows of the batch, and no row travels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp")  # of the mesh, see `train.parallel`; rows are split over both


def by_rows(f: Callable, params, x_BTC: jax.Array, ctx=(), reduce: Callable = jnp.mean):
  """`f(params, x_BTC, ctx) -> (y_BTC, aux)`, on every device of the mesh for its rows alone.

  Left to the compiler, an array whose rows lie under another axis than the first, or are merged with it, is gathered
  and computed on every device: tropical scans, fractal tables, gauge frames and chunks of logits were. Here nothing is
  sent but parameters that `fsdp` has split, and the sum of their gradients.

  Without `jax.set_mesh` on a mesh of these axes, or where it does not divide the rows, this is `f` itself.

  Args:
    f: treats rows alike and apart.
    ctx: PyTree; arrays with as many rows as x are split like it.
    reduce: of `aux` over devices, `jnp.mean` or `jnp.sum`.

  Returns:
    What `f` returns.
  """
  mesh = jax.sharding.get_abstract_mesh()
  manual = jax.sharding.AxisType.Manual in getattr(mesh, "axis_types", ())
  if tuple(mesh.axis_names) != AXES or mesh.size == 1 or manual or x_BTC.shape[0] % mesh.size:
    return f(params, x_BTC, ctx)
  rows, whole = PartitionSpec(AXES), PartitionSpec()
  split = lambda leaf: rows if leaf.shape[:1] == x_BTC.shape[:1] else whole

  def local(params, x_BTC, ctx):
    y, aux = f(params, x_BTC, ctx)
    return y, jax.tree.map(lambda a: a[None], aux)

  in_specs = (whole, rows, jax.tree.map(split, ctx))
  y, aux = jax.shard_map(local, in_specs=in_specs, out_specs=(rows, rows), check_vma=False)(params, x_BTC, ctx)
  return y, jax.tree.map(lambda a: reduce(a, 0), aux)
