"""A random order of all documents, and their exact duplicates, in memory that hardly grows with the corpus.

Every document gets a keyed hash of its text. Sorting by it is a random permutation that depends on the seed and the
documents alone, not on the order they came in, and puts equal texts side by side. Documents go to temporary files by
the first bits of the hash; the index of each file is then sorted by itself.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

_BUCKETS = 64
_BUFFER = 1 << 14
_ROW = struct.Struct("<16s8sQIQ")
_INDEX = np.dtype(
  [("high", "<u8"), ("low", "<u8"), ("split", "<u8"), ("start", "<u8"), ("length", "<u4"), ("number", "<u8")]
)


class Split(NamedTuple):
  """Documents whose split hash lies below `border` are for validation; how many these and the others are."""

  border: int
  val: int
  train: int


class Spool:
  """Documents on disk: fill it with `add`, call `finish`, then read them with `texts` in shuffled order.

  Disk: the text once and 44 bytes per document. Memory: one byte per document, and one of 64 index files.
  """

  def __init__(self, directory: str | os.PathLike, seed: int, distinct: bool):
    """`distinct` keeps one of several documents with equal texts, the one added first."""
    self._key = (seed % 2**64).to_bytes(8, "little")
    self._distinct = distinct
    self._paths = [Path(directory) / f"bucket_{i:02d}" for i in range(_BUCKETS)]
    self._texts = [open(p.with_suffix(".text"), "wb", _BUFFER) for p in self._paths]  # noqa: SIM115 (see `close`)
    self._rows = [open(p.with_suffix(".index"), "wb", _BUFFER) for p in self._paths]  # noqa: SIM115
    self._left_out = np.zeros(0, bool)
    self.documents = 0
    self.exact_copies = 0
    self.near_copies = 0

  def add(self, text: str, group: str = "") -> None:
    """Documents of one `group`, and without a group equal texts, fall into the same split."""
    data = text.encode("utf-8")
    salt = b"" if self._distinct else self.documents.to_bytes(8, "little")
    order = hashlib.blake2b(salt + data, digest_size=16, key=self._key, person=b"order").digest()
    split = hashlib.blake2b(group.encode("utf-8") or data, digest_size=8, key=self._key, person=b"split").digest()
    bucket = order[7] * _BUCKETS // 256  # the first bits of `high`, so that buckets follow each other in sorted order
    self._rows[bucket].write(_ROW.pack(order, split, self._texts[bucket].tell(), len(data), self.documents))
    self._texts[bucket].write(data)
    self.documents += 1

  def close(self) -> None:
    for f in (*self._texts, *self._rows):
      f.close()

  def finish(self, near_copies: np.ndarray | None = None) -> None:
    """Ends the filling and counts copies. `near_copies` is bool[documents in the order added], True for those to
    leave out."""
    self.close()
    distinct = np.zeros(self.documents, bool)
    for bucket in range(_BUCKETS):
      distinct[self._sorted(bucket)["number"]] = True
    self.exact_copies = int(self.documents - distinct.sum())
    if near_copies is not None:
      self.near_copies = int((near_copies & distinct).sum())
      self._left_out = near_copies

  def split(self, val_frac: float) -> Split:
    """About `val_frac` of the documents or groups as validation, at least one, and never all when there are two or
    more."""
    hashes_below = int(val_frac * 2.0**64)
    val, train = self._count(hashes_below)
    if val_frac and not (val and train):
      hashes_below = min((int(rows["split"].min()) for rows in self._buckets() if len(rows)), default=-1) + 1
      val, train = self._count(hashes_below)
    return Split(hashes_below, val, train)

  def texts(self, border: int, validation: bool) -> Iterator[str]:
    """The documents of one side of the border, shuffled."""
    for path, rows in zip(self._paths, self._buckets(), strict=True):
      with open(path.with_suffix(".text"), "rb") as f:
        for row in rows[(rows["split"] < np.uint64(border)) == validation]:
          f.seek(row["start"])
          yield f.read(row["length"]).decode("utf-8")

  def _count(self, border: int) -> tuple[int, int]:
    below = total = 0
    for rows in self._buckets():
      below += int((rows["split"] < np.uint64(border)).sum())
      total += len(rows)
    return below, total - below

  def _buckets(self) -> Iterator[np.ndarray]:
    for bucket in range(_BUCKETS):
      rows = self._sorted(bucket)
      yield rows[~self._left_out[rows["number"]]] if len(self._left_out) else rows

  def _sorted(self, bucket: int) -> np.ndarray:
    rows = np.fromfile(self._paths[bucket].with_suffix(".index"), _INDEX)
    rows = rows[np.lexsort((rows["number"], rows["low"], rows["high"]))]
    if not self._distinct or not len(rows):
      return rows
    first = np.r_[True, (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])]
    return rows[first]
