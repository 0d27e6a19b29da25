"""Coder, tapes, valve, and compression by a language model."""

import jax
import numpy as np
import pytest

from mgr_jax.algebra import bits, bits_claims, bits_valve
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.model import compress, gpt
from mgr_jax.problems import UserError

CFG = GPTConfig(vocab_size=40, seq_len=12, n_layer=1, n_head=2, n_kv_head=1, n_embd=8)


@pytest.mark.parametrize("claim", bits_claims.CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


def test_quantized_frequencies_are_positive_and_sum_to_the_total():
  rng = np.random.default_rng(0)
  pmf = rng.dirichlet(np.full(50, 0.05), size=(3, 4))
  counts = bits.quantize(pmf)
  np.testing.assert_array_equal(counts.sum(-1), bits.TOTAL)
  assert counts.min() >= 1
  assert np.max(np.abs(counts / bits.TOTAL - pmf)) < 51 / bits.TOTAL
  np.testing.assert_array_equal(bits.quantize(pmf * 2.0), counts)
  np.testing.assert_array_equal(bits.quantize(np.ones(3)), [bits.TOTAL // 3 + 1, bits.TOTAL // 3, bits.TOTAL // 3])


@pytest.mark.parametrize("pmf", ([0.5, np.nan], [1.0, -0.1], [0.0, 0.0], [np.inf, 1.0]))
def test_what_is_no_distribution_is_refused(pmf):
  with pytest.raises(ValueError, match="finite, not negative, and not all zero"):
    bits.quantize(np.array(pmf))


def test_tables_may_differ_by_lane_and_lanes_may_rest():
  rng = np.random.default_rng(1)
  tables = bits.quantize(rng.dirichlet(np.ones(9), size=6))
  symbols = rng.integers(0, 9, (40, 6))
  tape, lanes = bits.Tape(6), np.array([4, 0, 2])
  for row in symbols:
    tape.push(*bits.intervals(tables, row))
    tape.push(*bits.intervals(tables[lanes], row[lanes]), lanes)
  for row in symbols[::-1]:
    np.testing.assert_array_equal(tape.pop(tables[lanes], lanes), row[lanes])
    np.testing.assert_array_equal(tape.pop(tables), row)
  tape.expect_empty()


@pytest.mark.parametrize("n", (1, 2, 3, 1000, 65535, 65536))
def test_uniform_digits_at_their_price(n):
  rng = np.random.default_rng(n)
  digits = np.concatenate([np.zeros((1, 4), int), np.full((1, 4), n - 1), rng.integers(0, n, (30, 4))])
  tape = bits.Tape(4)
  for row in digits:
    tape.push_uniform(row, n)
  assert np.max(np.abs(tape.bits() / len(digits) - np.log2(n))) < 2e-3
  for row in digits[::-1]:
    np.testing.assert_array_equal(tape.pop_uniform(n), row)
  tape.expect_empty()


def test_an_empty_tape_gives_no_bits_and_garbage_does_not_end_empty():
  counts = bits.quantize(np.ones(256))
  with pytest.raises(ValueError, match="ran out of bits in lane 0"):
    bits.Tape(2).pop(counts)
  symbols = np.random.default_rng(0).integers(0, 256, (2, 50))
  tape = bits.encode(symbols, counts)
  tape.words[1, 3] ^= 1
  bits.decode(tape, counts, 49)
  with pytest.raises(ValueError, match="left on the tape, or missing"):
    tape.expect_empty()


def test_random_bits_decode_to_the_distribution():
  pmf = np.array([0.5, 0.25, 0.125, 0.125])
  tape = bits.Tape.random(200, 40, np.random.default_rng(0))
  drawn = bits.decode(tape, bits.quantize(pmf), 400)
  np.testing.assert_allclose(np.bincount(drawn.reshape(-1)) / drawn.size, pmf, atol=0.01)


def test_multiplication_contracts_and_says_so():
  tape = bits.Tape(1)
  with pytest.raises(ValueError, match="10/9 is not between 0 and 1"):
    bits_valve.multiply(np.ones((1, 3), np.int64), 10, 9, tape)
  values = np.array([[0, 1, -1, 9, -10, 2**31 - 1, -(2**31)]])
  small = bits_valve.multiply(values, 1, 2, tape)
  np.testing.assert_allclose(small, values / 2, atol=1)
  np.testing.assert_array_equal(bits_valve.unmultiply(small, 1, 2, tape), values)
  tape.expect_empty()


def test_a_valve_under_the_true_conditional_costs_nothing_on_average():
  rng = np.random.default_rng(0)
  a, b, q = bits_claims.valve_state(rng, 8, 60)
  tape, reservoir = bits.Tape(8), bits.Tape.random(8, 120, rng)
  new, ledger = bits_valve.valve(a, b, q, 20, tape, reservoir)
  assert np.mean(new != b) > 0.99
  spread = np.std(ledger.net) / np.sqrt(8)
  assert abs(np.mean(ledger.net)) < 4 * spread
  wide = lambda column: bits_valve.discretized_logistic(column, 2.0**25, 20)
  tape, reservoir = bits.Tape(8), bits.Tape.random(8, 120, rng)
  _, ledger = bits_valve.valve(a, b, wide, 20, tape, reservoir)
  assert np.mean(ledger.net) < -30  # a conditional that is too wide draws more bits than it writes
  with pytest.raises(ValueError, match="low_bits=8 is not between 16 and 24"):
    bits_valve.valve(a, b, q, 8, tape, reservoir)


@pytest.fixture(scope="module")
def params():
  params = gpt.init(jax.random.key(0), CFG)
  head = np.random.default_rng(0).normal(size=params["head"].shape).astype(np.float32)
  return {**params, "head": params["head"] + head}


@pytest.mark.parametrize("n", (0, 1, 11, 12, 13, 12 * 20 + 5))
def test_archives_restore_every_token(params, n):
  tokens = np.random.default_rng(n).integers(0, 40, n)
  restored = compress.decompress(params, compress.compress(params, tokens, CFG, start=0), CFG, start=0)
  assert restored.dtype == np.int32
  np.testing.assert_array_equal(restored, tokens)


def test_archives_are_as_long_as_the_likelihood_says(params):
  rng = np.random.default_rng(0)
  # A sample of the model itself is what the model compresses best.
  tokens = compress.decode_tokens(params, bits.Tape.random(1, 200, rng), 12 * 12, CFG, start=0)
  rows = tokens.reshape(12, 12)
  before = np.concatenate([np.zeros((12, 1), np.int32), rows[:, :-1]], 1)
  nll = gpt.nll(params, {"tokens": before, "targets": rows}, CFG)
  likelihood = float(np.sum(nll)) / np.log(2)
  stored = 8 * (len(compress.compress(params, tokens, CFG, start=0)) - 29 - 12) + 64
  assert 0 < stored - likelihood < 65
  noise = rng.integers(0, 40, 12 * 12)
  assert 8 * len(compress.compress(params, noise, CFG, start=0)) > stored + 100


def test_a_changed_model_or_archive_is_noticed(params):
  tokens = np.random.default_rng(0).integers(0, 40, 60)
  archive = compress.compress(params, tokens, CFG, start=0)
  other = {**params, "head": params["head"] * 1.001}
  with pytest.raises(UserError, match="does not decode under this model"):
    compress.decompress(other, archive, CFG, start=0)
  with pytest.raises(UserError, match="damaged or cut short"):
    compress.decompress(params, archive[:-4], CFG, start=0)
  with pytest.raises(UserError, match="not an archive"):
    compress.decompress(params, b"text", CFG, start=0)
  longer = GPTConfig(**{**vars(CFG), "seq_len": 24})
  with pytest.raises(UserError, match="rows of 12 tokens, not 24"):
    compress.decompress(params, archive, longer, start=0)
