"""Sums over balls of a digit tree in order of time: which keys share a node, and tables with one row per node.

Node numbers are compact: a (document, prefix) order is refined one digit at a time by sorting, and equal neighbours get
one number below the number of events. So trees of any size need int32 only. Numbers are names: which number a ball gets
may depend on the future, what is summed under it, and in which order, does not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def ball_numbers(digits_ZEK: jax.Array, document_ZE: jax.Array, p: int) -> jax.Array:
  """Numbers n [K + 1, Z, E] with n_d[z, e] = n_d[z, f] exactly when e and f share document and first d digits.

  Each n_d lies in 0 .. E - 1. K + 1 sorts of E integers below E·p.
  """

  def refine(number, digit):
    value = number * p + digit
    order = jnp.argsort(value, axis=-1)
    ordered = jnp.take_along_axis(value, order, -1)
    border = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)))
    rank = jnp.cumsum(border, -1, dtype=jnp.int32)
    number = jnp.put_along_axis(jnp.zeros_like(rank), order, rank, -1, inplace=False)
    return number, number

  first = jnp.zeros(document_ZE.shape, jnp.int32)
  _, documents = refine(first, document_ZE)
  _, rest = jax.lax.scan(refine, documents, jnp.moveaxis(digits_ZEK, -1, 0))
  return jnp.concatenate([documents[None], rest])


def children(parent_ZE: jax.Array, digit_ZE: jax.Array, child_ZE: jax.Array, p: int) -> jax.Array:
  """Table [Z, E·p]: the number of the ball below ball n with next digit i at n·p + i; E where no event lies there."""
  Z, E = parent_ZE.shape
  table = jnp.full((Z, E * p), E, jnp.int32)
  return table.at[jnp.arange(Z)[:, None], parent_ZE * p + digit_ZE].set(child_ZE)


class Table(NamedTuple):
  """Σ λ^(time - t_s) v_s per node [Z, nodes, D + 1], and each node's `time`, int32 [Z, nodes], of its last change.

  Decay is applied when a node is touched, so that a step costs nothing for the others. `time` is `None` without decay.
  """

  sums: jax.Array
  time: jax.Array | None


def empty(Z: int, nodes: int, width: int, decays: bool, dtype=jnp.float32) -> Table:
  """No keys yet."""
  return Table(jnp.zeros((Z, nodes, width), dtype), jnp.zeros((Z, nodes), jnp.int32) if decays else None)


def _decay(log_decay_Z, steps):
  """λ^steps; `steps` [Z, ...] is never negative where it matters."""
  rate = log_decay_Z.reshape(-1, *[1] * (steps.ndim - 1))
  return jnp.exp(rate * jnp.maximum(steps, 0))


def read(table: Table, nodes: jax.Array, now: jax.Array, log_decay_Z) -> jax.Array:
  """Sums of `nodes` [Z, ...] as of the times `now` [Z, ...], [Z, ..., D + 1]; numbers out of range read zero."""
  Z = nodes.shape[0]
  row = jnp.arange(Z).reshape(Z, *[1] * (nodes.ndim - 1))
  found = table.sums.at[row, nodes].get(mode="fill", fill_value=0)
  if table.time is None:
    return found
  age = now - table.time.at[row, nodes].get(mode="fill", fill_value=0)
  return found * _decay(log_decay_Z, age)[..., None]


def write(table: Table, nodes_ZM, values_ZMD, times_ZM, end_Z, log_decay_Z) -> Table:
  """Adds `values` to `nodes` at `times`; touched nodes then stand at the time `end`. Nodes out of range are dropped."""
  row = jnp.arange(nodes_ZM.shape[0])[:, None]
  if table.time is None:
    return Table(table.sums.at[row, nodes_ZM].add(values_ZMD, mode="drop"), None)
  age = end_Z[:, None] - table.time.at[row, nodes_ZM].get(mode="fill", fill_value=0)
  kept = table.sums.at[row, nodes_ZM].get(mode="fill", fill_value=0) * _decay(log_decay_Z, age)[..., None]
  fresh = values_ZMD * _decay(log_decay_Z, end_Z[:, None] - times_ZM)[..., None]
  # Several keys of one piece may touch a node: all set it to the same aged sum, then each adds its own.
  aged = table.sums.at[row, nodes_ZM].set(kept, mode="drop")
  end = jnp.broadcast_to(end_Z[:, None], nodes_ZM.shape).astype(table.time.dtype)
  time = table.time.at[row, nodes_ZM].set(end, mode="drop")
  return Table(aged.at[row, nodes_ZM].add(fresh, mode="drop"), time)
