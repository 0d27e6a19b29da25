"""In which order units and documents are read: a pure function of seed and epoch, for any number of readers."""

import functools
import operator
import sys
from typing import SupportsIndex

import numpy as np

from mgr_jax.data.parquet import ParquetUnits

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class EpochOrder:
  """The endless training stream of units; item k of process p out of P is unit k*P + p of the global stream.

  Each epoch visits every unit once: row groups in random order, the units of a row group one after another in random
  order (so that a decoded row group is used up before it is dropped), the documents of a unit in random order.
  Processes read disjoint units and stay in step, because the global stream runs on over the end of an epoch. Cost of an
  item: one unit.
  """

  def __init__(self, units: ParquetUnits, seed: int, process_index: int = 0, process_count: int = 1):
    self._units = units
    self._seed = seed
    self._process_index = process_index
    self._process_count = process_count
    self._epoch_order = functools.lru_cache(maxsize=2)(self._order)

  def __len__(self) -> int:
    return sys.maxsize // self._process_count if len(self._units) else 0

  def __getitem__(self, index: SupportsIndex) -> list[str]:
    epoch, place = divmod(operator.index(index) * self._process_count + self._process_index, len(self._units))
    unit = int(self._epoch_order(epoch)[place])
    texts = self._units[unit]
    return [texts[i] for i in np.argsort(random_words(len(texts), self._seed, epoch, 2 + unit), kind="stable")]

  def __repr__(self) -> str:
    return f"EpochOrder({self._units}, process {self._process_index} of {self._process_count})"

  def _order(self, epoch: int) -> np.ndarray:
    groups = self._units.group_of
    of_group = random_words(int(groups[-1]) + 1, self._seed, epoch, 0)
    return np.lexsort((random_words(len(groups), self._seed, epoch, 1), of_group[groups]))


def random_words(n: int, *seeds: int) -> np.ndarray:
  """uint64[n] that look random and depend on `seeds` alone, on every machine and in every version of NumPy.

  SplitMix64 (Steele, Lea and Flood, 2014), a counter hashed by two multiply-xorshift rounds, with the state folded from
  `seeds`.
  """
  state = 0
  for seed in seeds:
    state = int(_mix(np.array([(state + _GOLDEN + seed) & _WORD], np.uint64))[0])
  return _mix(np.uint64(state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def _mix(z: np.ndarray) -> np.ndarray:
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))
