"""The training batches of one process, which reads one or several shards of the data."""

from collections.abc import Iterator, Sequence

import numpy as np

from mgr_jax.data.pack import Batch
from mgr_jax.data.stream import TrainIterator


class ShardedBatches:
  """Batches whose rows come, in equal parts and in order, from several `TrainIterator`s.

  What the shards hold does not depend on which process reads them, so the batches of all processes together depend on
  the number of shards alone: another number of processes continues exactly.
  """

  def __init__(self, shards: Sequence[TrainIterator]):
    self._shards = list(shards)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    parts = [next(shard) for shard in self._shards]
    return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

  def get_state(self) -> list[dict]:
    """The states of this process's shards."""
    return [shard.get_state() for shard in self._shards]

  def set_state(self, states: Sequence[dict], strict: bool = True) -> int:
    """Continues from the states of all shards, see `TrainIterator.set_state`; returns the tokens left out."""
    return max(shard.set_state(states, strict) for shard in self._shards)

  @property
  def epoch(self) -> float:
    """Passes over the training data so far."""
    return float(np.mean([shard.epoch for shard in self._shards]))

  def close(self) -> None:
    for shard in self._shards:
      shard.close()

  def __enter__(self) -> "ShardedBatches":
    return self

  def __exit__(self, *exc) -> None:
    self.close()
