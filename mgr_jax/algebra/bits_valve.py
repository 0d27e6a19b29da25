"""Reversible steps that lose no bit: multiplication of an integer by a fraction, and a valve that renews half a state.

What a contraction forgets goes onto a tape of known length, and comes back from it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mgr_jax.algebra.bits import Tape, information, intervals, quantize


def multiply(values: np.ndarray, numerator: int, denominator: int, tape: Tape) -> np.ndarray:
  """About values·n/d, with the remainders on the tape (Maclaurin et al., 2015, arXiv 1502.03492).

  c ÷ d, its remainder pushed; then times n, plus a digit below n popped from the same tape. Costs log₂(d/n) bits each.

  Args:
    values: integers of either sign, [lanes, m].
    numerator, denominator: n < d <= 2¹⁶.

  Raises:
    ValueError: fractions that do not contract.

  >>> values, tape = np.array([[1000, -7]]), Tape(1)
  >>> small = multiply(values, 9, 10, tape)
  >>> small.tolist(), unmultiply(small, 9, 10, tape).tolist()
  ([[900, -6]], [[1000, -7]])
  """
  if not 0 < numerator < denominator:
    raise ValueError(f"{numerator}/{denominator} is not between 0 and 1")
  return _rescale(values, denominator, numerator, tape)


def unmultiply(values: np.ndarray, numerator: int, denominator: int, tape: Tape) -> np.ndarray:
  """The exact inverse of `multiply`, which leaves the tape as it was before."""
  return _rescale(values[:, ::-1], numerator, denominator, tape)[:, ::-1]


def _rescale(values, pushed, popped, tape):
  out = np.empty_like(values)
  for i, column in enumerate(values.T):
    tape.push_uniform(column % pushed, pushed)
    out[:, i] = column // pushed * popped + tape.pop_uniform(popped)
  return out


class Ledger(NamedTuple):
  """Bits per lane: `written` to the tape for the old symbols, `consumed` from the reservoir for the new ones, [lanes].

  `tape_words` is how long the tape was afterwards.
  """

  written: np.ndarray
  consumed: np.ndarray
  tape_words: np.ndarray

  @property
  def net(self) -> np.ndarray:
    """Bits gained by tape and reservoir together."""
    return self.written - self.consumed


Conditional = Callable[[np.ndarray], np.ndarray]


def valve(a: np.ndarray, b: np.ndarray, q: Conditional, low_bits: int, tape: Tape, reservoir: Tape):
  """Replaces b by a draw from q(·|a): old b goes to the tape, new b comes from the reservoir.

  The 32 - low_bits high bits of an entry are one symbol under q; the low bits go raw. A bijection of (b, tape,
  reservoir) for any q; if b was distributed as q(·|a), tape and reservoir together keep their length on average.

  Args:
    a, b: int32 [lanes, m].
    q: column of a [lanes] -> pmf [lanes, 2^(32-low_bits)] of the high bits, in the order of signed integers.
    low_bits: 16 to 24.

  Returns:
    (new b, Ledger). Discarding the tape loses exactly `written` bits.
  """
  new = np.empty_like(b)
  written, consumed = np.zeros((2, len(b)))
  for i in range(b.shape[1]):
    counts = quantize(q(a[:, i]))
    written += _push(b[:, i], counts, low_bits, tape)
    new[:, i], cost = _pop(counts, low_bits, reservoir)
    consumed += cost
  return new, Ledger(written, consumed, tape.count.copy())


def unvalve(a: np.ndarray, b: np.ndarray, q: Conditional, low_bits: int, tape: Tape, reservoir: Tape, ledger: Ledger):
  """The exact inverse of `valve`: returns the old b, and puts tape and reservoir back.

  Raises:
    ValueError: the tape is not as long as the ledger says.
  """
  if not np.array_equal(tape.count, ledger.tape_words):
    raise ValueError(f"the tape holds {tape.count.sum()} words, the ledger says {ledger.tape_words.sum()}")
  old = np.empty_like(b)
  for i in reversed(range(b.shape[1])):
    counts = quantize(q(a[:, i]))
    _push(b[:, i], counts, low_bits, reservoir)
    old[:, i], _ = _pop(counts, low_bits, tape)
  return old


def _push(values, counts, low_bits, tape):
  """High bits last, so that they come off first; returns the bits written per lane."""
  high, low = _split(values, low_bits)
  tape.push_uniform(low & 0xFF, 1 << 8)
  tape.push_uniform(low >> 8, 1 << (low_bits - 8))
  tape.push(*intervals(counts, high))
  return information(counts, high) + low_bits


def _pop(counts, low_bits, tape):
  high = tape.pop(counts)
  low = tape.pop_uniform(1 << (low_bits - 8)) << 8
  low |= tape.pop_uniform(1 << 8)
  values = ((high - (1 << (31 - low_bits))) << low_bits) + low
  return values.astype(np.int32), information(counts, high) + low_bits


def _split(values, low_bits):
  if not 16 <= low_bits <= 24:
    raise ValueError(f"low_bits={low_bits} is not between 16 and 24")
  values = values.astype(np.int64)
  return (values >> low_bits) + (1 << (31 - low_bits)), values & ((1 << low_bits) - 1)


def discretized_logistic(center: np.ndarray, scale: float, low_bits: int) -> np.ndarray:
  """P(high bits) of a logistic variable with mean `center` [lanes] and scale `scale`, both in units of the integer."""
  edges = np.arange(-(1 << (31 - low_bits)) + 1, 1 << (31 - low_bits)) * float(1 << low_bits)
  inner = 0.5 * (1 + np.tanh((edges - center[:, None].astype(np.float64)) / (2 * scale)))
  below = np.concatenate([np.zeros((len(center), 1)), inner, np.ones((len(center), 1))], 1)
  return np.diff(below, axis=1)
