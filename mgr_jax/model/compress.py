"""Lossless compression of tokens by a language model: -Σ log₂ p(token | past) bits, plus at most 64 bits per lane.

Compression, likelihood and sampling are one mechanism: what decodes an archive back to its text decodes random bits to
a sample. Both directions call the same compiled one-token step on the same shapes. A batched forward pass would round
differently, and one unit in the last place of one probability is enough to derail a decoder.
"""

import functools
import struct
import zlib

import jax
import numpy as np

from mgr_jax.algebra.bits import Tape, intervals, quantize
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.problems import Problem, UserError

ROWS_PER_LANE = 16  # a lane costs up to 64 bits, and lanes are what NumPy works on at once
_MAGIC = b"mgrc1"
_HEADER = struct.Struct("<5sQIIII")


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def _next_logits(params, tokens_B, state, cfg):
  logits, state = gpt.decode(params, tokens_B[:, None], state, cfg)
  return logits[:, 0], state


class _Reader:
  """The model reading all rows token by token, as integer frequencies of the next token."""

  def __init__(self, params, n: int, cfg: GPTConfig, start: int):
    self.shape = _rows(n, cfg), cfg.seq_len
    self.params, self.cfg = params, cfg
    self.state = gpt.init_state(cfg, self.shape[0], cfg.seq_len)
    self.tokens = np.full(self.shape[0], start, np.int32)
    self.lengths = np.clip(n - np.arange(self.shape[0]) * cfg.seq_len, 0, cfg.seq_len)

  def counts(self) -> np.ndarray:
    """Frequencies [rows, V] after the tokens so far."""
    logits, self.state = _next_logits(self.params, self.tokens, self.state, self.cfg)
    logits = np.asarray(logits, np.float64)
    return quantize(np.exp(logits - logits.max(-1, keepdims=True)))

  def groups(self, t: int) -> list[np.ndarray]:
    """Rows that have a token t, in groups that put at most one on each lane."""
    n_lanes, live = _lanes(self.shape[0]), np.flatnonzero(self.lengths > t)
    return [live[i : i + n_lanes] for i in range(0, len(live), n_lanes)]


def _rows(n: int, cfg: GPTConfig) -> int:
  return max(1, -(-n // cfg.seq_len))


def _lanes(rows: int) -> int:
  return -(-rows // ROWS_PER_LANE)


def encode_tokens(params, tokens: np.ndarray, cfg: GPTConfig, start: int) -> Tape:
  """Tokens [n] as bits under the model. Rows of `cfg.seq_len` tokens are coded independently, side by side.

  Args:
    start: the token that stands before each row, as in training (beginning of sequence).

  Returns:
    A tape of ceil(rows/16) lanes. Costs seq_len decode steps of all rows.
  """
  reader = _Reader(params, len(tokens), cfg, start)
  text = np.zeros(reader.shape, np.int32)
  text.reshape(-1)[: len(tokens)] = tokens
  steps = []
  for t in range(min(len(tokens), cfg.seq_len)):
    steps.append(intervals(reader.counts(), text[:, t]))
    reader.tokens = text[:, t]
  tape = Tape(_lanes(reader.shape[0]))
  for t in reversed(range(len(steps))):
    first, frequency = steps[t]
    for rows in reversed(reader.groups(t)):
      tape.push(first[rows], frequency[rows], rows % len(tape.state))
  return tape


def decode_tokens(params, tape: Tape, n: int, cfg: GPTConfig, start: int) -> np.ndarray:
  """Takes n tokens off the tape, int32 [n]: the inverse of `encode_tokens`, or a sample when the bits are random.

  Raises:
    ValueError: the tape ran out of bits.
  """
  reader = _Reader(params, n, cfg, start)
  text = np.zeros(reader.shape, np.int32)
  for t in range(min(n, cfg.seq_len)):
    counts = reader.counts()
    for rows in reader.groups(t):
      text[rows, t] = tape.pop(counts[rows], rows % len(tape.state))
    reader.tokens = text[:, t]
  return text.reshape(-1)[:n]


def compress(params, tokens: np.ndarray, cfg: GPTConfig, start: int) -> bytes:
  """An archive of tokens [n] that `decompress` with the same model, machine and versions restores exactly.

  29 bytes of header, 12 bytes per lane, then the words.
  """
  tokens = np.asarray(tokens, np.int32)
  tape = encode_tokens(params, tokens, cfg, start)
  parts = [tape.state.astype("<u8"), tape.count.astype("<u4")]
  parts += [row[:count].astype("<u4") for row, count in zip(tape.words, tape.count, strict=True)]
  body = b"".join(part.tobytes() for part in parts)
  sums = zlib.crc32(body), zlib.crc32(tokens.tobytes())
  return _HEADER.pack(_MAGIC, len(tokens), cfg.seq_len, len(tape.state), *sums) + body


def decompress(params, archive: bytes, cfg: GPTConfig, start: int) -> np.ndarray:
  """The tokens of an archive, int32 [n].

  Raises:
    UserError: not an archive, damaged, or written by another model.
  """
  n, lanes, body, token_sum = _open(archive, cfg)
  tape = Tape(lanes)
  tape.state = np.frombuffer(body, "<u8", lanes).astype(np.uint64)
  tape.count = np.frombuffer(body, "<u4", lanes, 8 * lanes).astype(np.int64)
  tape.words = np.zeros((lanes, max(1, tape.count.max())), np.uint32)
  words = np.frombuffer(body, "<u4", offset=12 * lanes)
  for row, count, end in zip(tape.words, tape.count, np.cumsum(tape.count), strict=True):
    row[:count] = words[end - count : end]
  try:
    tokens = decode_tokens(params, tape, n, cfg, start)
    tape.expect_empty()
  except ValueError as e:
    raise _other_model() from e
  if zlib.crc32(tokens.tobytes()) != token_sum:
    raise _other_model()
  return tokens


def _open(archive: bytes, cfg: GPTConfig):
  if len(archive) < _HEADER.size or not archive.startswith(_MAGIC):
    raise UserError(Problem("these bytes are not an archive", "pass what compress() returned"))
  _, n, seq_len, lanes, body_sum, token_sum = _HEADER.unpack_from(archive)
  body = archive[_HEADER.size :]
  if zlib.crc32(body) != body_sum:
    raise UserError(Problem("the archive is damaged or cut short", "copy it again from its source"))
  if seq_len != cfg.seq_len:
    fix = f"use the model that wrote it, or seq_len={seq_len}"
    raise UserError(Problem(f"the archive was written in rows of {seq_len} tokens, not {cfg.seq_len}", fix))
  return n, lanes, body, token_sum


def _other_model() -> UserError:
  fix = "use the parameters, the machine and the library versions that wrote the archive"
  return UserError(Problem("the archive does not decode under this model: its probabilities differ", fix))
