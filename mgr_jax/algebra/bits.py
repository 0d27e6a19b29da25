"""Exact accounting of bits on the host: asymmetric numeral systems (Duda, 2013, arXiv 1311.2540).

A tape is a stack of bits per lane. Pushing a symbol of probability f/2²⁴ multiplies the tape, read as a number, by
2²⁴/f; popping undoes it exactly. So pushing costs -log₂ q bits, and popping what was never pushed draws from q.

State x of a lane in [2³², 2⁶⁴), words of 32 bits: push moves a word out while x >= f·2⁴⁰, then
x <- (x ÷ f)·2²⁴ + x mod f + start.
"""

import numpy as np

PRECISION = 24
TOTAL = 1 << PRECISION
_EMPTY = np.uint64(1 << 32)
_U = np.uint64


class Tape:
  """Stacks of bits, one per lane, stored as words below a 64-bit state.

  Attributes:
    state: uint64 [lanes].
    words: uint32 [lanes, capacity]; lane i holds its first `count[i]`.
    count: int64 [lanes].
  """

  def __init__(self, lanes: int):
    self.state = np.full(lanes, _EMPTY)
    self.words = np.zeros((lanes, 16), np.uint32)
    self.count = np.zeros(lanes, np.int64)

  @classmethod
  def random(cls, lanes: int, n_words: int, rng: np.random.Generator) -> "Tape":
    """A reservoir of fair bits: `n_words` words per lane and a random state."""
    tape = cls(lanes)
    tape.words = rng.integers(0, 1 << 32, (lanes, n_words), np.uint32)
    tape.state = rng.integers(1 << 32, 1 << 63, lanes, np.uint64)
    tape.count[:] = n_words
    return tape

  def copy(self) -> "Tape":
    other = Tape(0)
    other.state, other.words, other.count = self.state.copy(), self.words.copy(), self.count.copy()
    return other

  def same_as(self, other: "Tape") -> bool:
    """Whether both hold the same bits; what lies above the stacks does not matter."""
    if not (np.array_equal(self.state, other.state) and np.array_equal(self.count, other.count)):
      return False
    return all(np.array_equal(a[:n], b[:n]) for a, b, n in zip(self.words, other.words, self.count, strict=True))

  def bits(self) -> np.ndarray:
    """Information per lane, 32·words + log₂ state - 32: zero when empty; float64 [lanes]."""
    return 32.0 * self.count + np.log2(self.state.astype(np.float64)) - 32.0

  def push(self, start, frequency, lanes=None) -> None:
    """Puts a symbol that owns `start .. start + frequency - 1` of 2²⁴ on every lane (or on the lanes listed once)."""
    lanes = np.arange(len(self.state)) if lanes is None else lanes
    start, frequency = np.asarray(start).astype(_U), np.asarray(frequency).astype(_U)
    x = self.state[lanes]
    full = (x >> _U(64 - PRECISION)) >= frequency
    out = lanes[full]
    if out.size:
      if self.count[out].max() == self.words.shape[1]:
        self.words = np.concatenate([self.words, np.zeros_like(self.words)], 1)
      self.words[out, self.count[out]] = (x[full] & _U(0xFFFFFFFF)).astype(np.uint32)
      self.count[out] += 1
      x = np.where(full, x >> _U(32), x)
    self.state[lanes] = ((x // frequency) << _U(PRECISION)) + x % frequency + start

  def pop(self, counts: np.ndarray, lanes=None) -> np.ndarray:
    """Takes a symbol off every lane.

    Args:
      counts: from `quantize`: [V], or one row per lane [n, V].

    Raises:
      ValueError: a lane has no more words: the tape is truncated, or more is popped than was pushed.
    """
    lanes = np.arange(len(self.state)) if lanes is None else lanes
    slot = self.state[lanes] & _U(TOTAL - 1)
    ends = np.cumsum(counts, -1)
    if ends.ndim == 1:
      symbol = np.searchsorted(ends, slot, side="right")
    else:
      symbol = np.sum(ends <= slot[:, None].astype(np.int64), -1)
    self._drop(*intervals(counts, symbol), slot, lanes)
    return symbol

  def _drop(self, start, frequency, slot, lanes) -> None:
    x = frequency.astype(_U) * (self.state[lanes] >> _U(PRECISION)) + slot - start.astype(_U)
    low = x < _EMPTY
    out = lanes[low]
    if out.size:
      if self.count[out].min() == 0:
        raise ValueError(
          f"the tape ran out of bits in lane {out[np.argmin(self.count[out])]}: truncated, or not pushed"
        )
      self.count[out] -= 1
      x[low] = (x[low] << _U(32)) | self.words[out, self.count[out]].astype(_U)
    self.state[lanes] = x

  def push_uniform(self, values, n: int, lanes=None) -> None:
    """Pushes integers below n <= 2¹⁶ at log₂ n bits each, up to a relative 2⁻⁸."""
    self.push(*_uniform(np.asarray(values).astype(np.int64), n), lanes)

  def pop_uniform(self, n: int, lanes=None) -> np.ndarray:
    """The inverse of `push_uniform`."""
    lanes = np.arange(len(self.state)) if lanes is None else lanes
    slot = self.state[lanes] & _U(TOTAL - 1)
    value = ((slot.astype(np.int64) + 1) * n - 1) // TOTAL
    self._drop(*_uniform(value, n), slot, lanes)
    return value

  def expect_empty(self) -> None:
    """Raises `ValueError` unless every lane is back at its empty state; after decoding to garbage it is not."""
    if np.any(self.count) or np.any(self.state != _EMPTY):
      raise ValueError("bits are left on the tape, or missing: it was written under another model, or damaged")


def _uniform(value, n):
  if not 0 < n <= 1 << 16:
    raise ValueError(f"n={n} is not between 1 and 2^16")
  start = value * TOTAL // n
  return start, (value + 1) * TOTAL // n - start


def quantize(pmf: np.ndarray) -> np.ndarray:
  """Integer frequencies [..., V] that sum to 2²⁴, each at least one; the same bits in, the same integers out.

  Every symbol gets one, the rest is shared in proportion to the pmf and rounded by largest remainders. Costs at most
  V/2²⁴ in relative probability.

  Raises:
    ValueError: negative, infinite or all-zero probabilities, or more than 2²³ symbols.

  >>> int(quantize([0.9, 0.1, 0.0]).sum()) == TOTAL, int(quantize([0.9, 0.1, 0.0])[2])
  (True, 1)
  """
  pmf = np.asarray(pmf, np.float64)
  total, V = pmf.sum(-1, keepdims=True), pmf.shape[-1]
  if not (np.all(np.isfinite(pmf)) and np.all(pmf >= 0) and np.all(total > 0)):
    raise ValueError("probabilities must be finite, not negative, and not all zero")
  if V > TOTAL // 2:
    raise ValueError(f"{V} symbols do not fit into 2^{PRECISION} frequencies with room to tell them apart")
  share = pmf / total * (TOTAL - V)
  whole = np.floor(share).astype(np.int64)
  left = TOTAL - V - whole.sum(-1, keepdims=True)
  rank = np.argsort(np.argsort(whole - share, axis=-1, kind="stable"), axis=-1, kind="stable")
  return whole + 1 + (rank < left)


def intervals(counts: np.ndarray, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(start, frequency) of each symbol; `counts` [V], or one row per symbol [n, V]."""
  ends = np.cumsum(counts, -1)
  pick = lambda table: table[symbols] if table.ndim == 1 else np.take_along_axis(table, symbols[:, None], -1)[:, 0]
  frequency = pick(np.asarray(counts))
  return pick(ends) - frequency, frequency


def information(counts: np.ndarray, symbols: np.ndarray) -> np.ndarray:
  """-log₂ q of each symbol under the quantised pmf.

  >>> information(quantize([0.5, 0.25, 0.25]), np.array([0, 1])).round(3).tolist()
  [1.0, 2.0]
  """
  return PRECISION - np.log2(intervals(counts, symbols)[1])


def encode(symbols: np.ndarray, counts: np.ndarray) -> Tape:
  """A tape of symbols [lanes, n] under one table [V]; the last goes in first, so that the first comes out first."""
  tape = Tape(len(symbols))
  start, frequency = intervals(counts, symbols)
  for i in reversed(range(symbols.shape[1])):
    tape.push(start[:, i], frequency[:, i])
  return tape


def decode(tape: Tape, counts: np.ndarray, n: int) -> np.ndarray:
  """Takes n symbols per lane off the tape, [lanes, n].

  >>> counts, symbols = quantize([0.7, 0.2, 0.1]), np.array([[0, 2, 0, 1]])
  >>> decode(encode(symbols, counts), counts, 4).tolist()
  [[0, 2, 0, 1]]
  """
  out = np.empty((len(tape.state), n), np.int64)
  for i in range(n):
    out[:, i] = tape.pop(counts)
  return out
