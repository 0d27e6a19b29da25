"""Associative recall: tokens that each hold a key and a value, then keys alone, whose values are the targets.

After the multi-query recall of Arora et al. (2023, arXiv 2312.04927), where a pair takes two tokens. One token
per pair leaves out the step that first brings the two together: at the size of a laptop that step decides the result,
and it is not what a capacity experiment asks about.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from train.experiments.records import Generator


def vocabulary(keys: int, values: int) -> int:
  """One token for an empty slot, one for each pair, one for each key."""
  return 1 + keys * values + keys


def recall(pairs: int, room: int, queries: int, keys: int, values: int) -> Generator:
  """Rows of `room` slots for a pair, the last `pairs` of them filled, then `queries` of the row's keys, repetition
  allowed. Keys within a row are distinct, values are uniform. The target of a query is its value, weight 1 there."""

  def generate(key, rows, data):
    del data
    return _rows(key, jnp.full((rows,), pairs), room, queries, keys, values)

  return generate


def mixed_recall(choices: tuple[int, ...], room: int, queries: int, keys: int, values: int) -> Generator:
  """As `recall`, with the number of pairs of each row drawn uniformly from `choices`."""

  def generate(key, rows, data):
    del data
    pairs = jax.random.choice(jax.random.fold_in(key, 1), jnp.array(choices), (rows,))
    return _rows(key, pairs, room, queries, keys, values)

  return generate


def _rows(key, pairs, room, queries, keys, values):
  draw_keys, draw_values, draw_queries = jax.random.split(key, 3)
  rows = len(pairs)
  # The places of the largest of some noise are a random subset in random order.
  key_ids = jax.lax.top_k(jax.random.uniform(draw_keys, (rows, keys)), room)[1]
  value_ids = jax.random.randint(draw_values, (rows, room), 0, values)
  filled = jnp.arange(room) >= room - pairs[:, None]
  stored = jnp.where(filled, 1 + key_ids * values + value_ids, 0)
  slots = room - 1 - jnp.floor(jax.random.uniform(draw_queries, (rows, queries)) * pairs[:, None]).astype(jnp.int32)
  asked = 1 + keys * values + jnp.take_along_axis(key_ids, slots, axis=1)
  answers = jnp.take_along_axis(value_ids, slots, axis=1)
  pad = lambda x: jnp.pad(x, ((0, 0), (room, 0)))
  return {
    "tokens": jnp.concatenate([stored, asked], axis=1).astype(jnp.int32),
    "targets": pad(answers).astype(jnp.int32),
    "weights": pad(jnp.ones((rows, queries), jnp.float32)),
  }


def same_chance(tests, chance: float) -> Callable:
  """The same chance for every test, whatever the data."""
  return lambda data: dict.fromkeys(tests, chance)
