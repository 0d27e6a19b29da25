"""Token arrays cut into windows that overlap by one token, so that every transition is trained exactly once."""

import collections

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class PackStream(grain.IterDataset):
  """Concatenates the int32 token arrays of the parent and cuts windows, int32[seq_len + 1].

  A window starts at the last token of the one before, so that every transition between neighbouring tokens is in
  exactly one window. At the end of a finite parent a tail shorter than a window is left out. The state is the parent's
  state before the array in which the next window starts, and the offset in it: O(1), and restored at the cost of
  reading one array.
  """

  def __init__(self, parent: grain.IterDataset, seq_len: int):
    super().__init__(parent)
    self._seq_len = seq_len

  def __iter__(self) -> grain.DatasetIterator:
    return _PackIterator(iter(self._parent), self._seq_len)

  def __str__(self) -> str:
    return f"PackStream(seq_len={self._seq_len})"


class _PackIterator(grain.DatasetIterator):
  def __init__(self, parent: grain.DatasetIterator, seq_len: int):
    super().__init__(parent)
    self._seq_len = seq_len
    self._arrays: collections.deque[tuple[dict, np.ndarray]] = collections.deque()  # (parent state before it, tokens)
    self._offset = 0

  def __next__(self) -> np.ndarray:
    unread = sum(len(tokens) for _, tokens in self._arrays) - self._offset
    while unread < self._seq_len + 1:
      state = self._parent.get_state()
      tokens = next(self._parent)
      if len(tokens):
        self._arrays.append((state, tokens))
      unread += len(tokens)
    window = np.empty(self._seq_len + 1, np.int32)
    filled, offset = 0, self._offset
    for _, tokens in self._arrays:
      part = tokens[offset : offset + len(window) - filled]
      window[filled : filled + len(part)] = part
      filled, offset = filled + len(part), 0
    self._offset += self._seq_len
    while self._offset >= len(self._arrays[0][1]):
      self._offset -= len(self._arrays.popleft()[1])
    return window

  def get_state(self) -> dict:
    return {"parent": self._arrays[0][0] if self._arrays else self._parent.get_state(), "offset": self._offset}

  def set_state(self, state: dict) -> None:
    self._parent.set_state(state["parent"])
    self._arrays.clear()
    self._offset = state["offset"]

  def __str__(self) -> str:
    return f"PackIterator(seq_len={self._seq_len})"


def window_batch(windows: np.ndarray, bos_id: int, present: np.ndarray | None = None) -> Batch:
  """The batch of windows int32[B, T + 1]. A document starts at each bos; the first column continues or starts one."""
  tokens, targets = windows[:, :-1], windows[:, 1:]
  if present is None:
    present = np.ones(targets.shape, bool)
  starts = tokens == bos_id
  starts[:, 0] = True
  place = np.arange(tokens.shape[1], dtype=np.int32)
  return {
    "tokens": tokens,
    "targets": targets,
    "segment_ids": np.where(present, np.cumsum(starts, axis=1, dtype=np.int32), 0),
    "positions": place - np.maximum.accumulate(np.where(starts, place, 0), axis=1),
    "weights": present.astype(np.float32),
  }
