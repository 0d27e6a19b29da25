"""Claims about exact accounting of bits: coder, reversible multiplication, valve."""

import numpy as np

from mgr_jax.algebra import bits, bits_valve
from mgr_jax.algebra.reversible_claims import generator
from mgr_jax.claims import Check, claim, worst_of

LANES = 50


def _tables(rng):
  """Three distributions: flat, of many sizes, and nearly certain."""
  return [bits.quantize(p) for p in (np.ones(7), rng.dirichlet(np.full(300, 0.3)), np.array([1.0, 1e-9, 0.0]))]


def _drawn(rng, counts, n):
  return rng.choice(len(counts), p=counts / counts.sum(), size=(LANES, n))


def _nudged(counts):
  """The table with one unit of 2^-24 moved from its largest entry to the first other."""
  counts = counts.copy()
  counts[np.argmax(counts)] -= 1
  counts[0 if np.argmax(counts) else 1] += 1
  return counts


def _round_trip(perturbed: bool) -> Check:
  def measure(key, scale):
    rng, n, wrong = generator(key), 2000 * scale, 0
    for counts in _tables(rng):
      symbols = _drawn(rng, counts, n)
      table = _nudged(counts) if perturbed else counts
      try:
        wrong += np.sum(bits.decode(bits.encode(symbols, counts), table, n) != symbols)
      except ValueError:
        wrong += symbols.size
    return float(wrong)

  return measure


def _length(padding_words: int) -> Check:
  """How far stored bits per lane lie outside [-1, 64 + 2^-16 n] above the information content; 0 inside."""

  def measure(key, scale):
    rng, n, excess = generator(key), 2000 * scale, 0.0
    for counts in _tables(rng):
      symbols = _drawn(rng, counts, n)
      stored = 64 + 32 * (bits.encode(symbols, counts).count + padding_words)
      above = stored - bits.information(counts, symbols.reshape(-1)).reshape(symbols.shape).sum(1)
      excess = worst_of(excess, float(np.max(above - 64 - 2.0**-16 * n)), float(np.max(-1 - above)))
    return excess

  return measure


def _product(loses: bool) -> Check:
  """Excess cost over log2(d/n) per element, infinite unless values and tape come back; `loses` drops the tape."""

  def measure(key, scale):
    rng, tape = generator(key), bits.Tape(LANES)
    values = rng.integers(-(2**31), 2**31, (LANES, 400 * scale))
    small = bits_valve.multiply(values, 9, 10, tape)
    cost = abs(tape.bits().mean() / values.shape[1] - np.log2(10 / 9))
    if loses:
      tape = bits.Tape.random(LANES, 400 * scale, rng)
    back = bits_valve.unmultiply(small, 9, 10, tape)
    return cost if np.array_equal(back, values) and np.max(np.abs(small - 0.9 * values)) < 10 else np.inf

  return measure


def valve_state(rng: np.random.Generator, lanes: int, width: int):
  """Streams a and b with b logistic around a at scale 2^22, and the conditional of its 12 high bits."""
  a = (rng.normal(size=(lanes, width)) * 2**24).astype(np.int32)
  b = (a + rng.logistic(size=a.shape) * 2**22).astype(np.int32)
  return a, b, lambda column: bits_valve.discretized_logistic(column, 2.0**22, 20)


def _valve(truncated: bool) -> Check:
  """Largest difference of ledger and tape lengths in bits per lane; infinite unless everything comes back."""

  def measure(key, scale):
    rng = generator(key)
    a, b, q = valve_state(rng, 4, 24 * scale)
    tape, reservoir = bits.Tape(4), bits.Tape.random(4, 64 * scale, rng)
    before = reservoir.copy()
    new, ledger = bits_valve.valve(a, b, q, 20, tape, reservoir)
    written = np.max(np.abs(tape.bits() - ledger.written))
    consumed = np.max(np.abs(before.bits() - reservoir.bits() - ledger.consumed))
    if truncated:
      tape.count[0] -= 1
    try:
      old = bits_valve.unvalve(a, new, q, 20, tape, reservoir, ledger)
    except ValueError:
      return np.inf
    restored = np.array_equal(old, b) and tape.same_as(bits.Tape(4)) and reservoir.same_as(before)
    return worst_of(written, consumed) if restored and not np.array_equal(new, b) else np.nan

  return measure


CLAIMS = (
  claim(
    "bits.coder_round_trip",
    "decode(encode(s)) = s under flat, uneven and nearly certain tables: symbols that differ",
    _round_trip(False),
    0.0,
    _round_trip(True),
    refs=("Duda, 2013, arXiv 1311.2540",),
  ),
  claim(
    "bits.coder_length",
    "stored bits exceed -Σ log2 q by -1 to 64 + 2^-16 n per lane: distance from that range",
    _length(0),
    0.0,
    _length(3),
    refs=("Duda, 2013, arXiv 1311.2540",),
  ),
  claim(
    "bits.multiplication",
    "c -> about 9c/10 with its remainders on a tape is undone exactly and costs log2(10/9) bits each",
    _product(False),
    1e-3,
    _product(True),
    refs=("Maclaurin et al., 2015, arXiv 1502.03492",),
  ),
  claim(
    "bits.valve",
    "state, tape and reservoir come back bit for bit, and the ledger equals the tape lengths, in bits per lane",
    _valve(False),
    1.0,
    _valve(True),
    refs=("Townsend et al., 2019, arXiv 1901.04866",),
  ),
)
