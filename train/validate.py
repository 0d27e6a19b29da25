"""Bits per byte on fixed windows, and the unigram baseline on the same windows.

Only targets that stand for text are scored: a special token such as the one that begins a document is 0 bytes long, so
its nats would have no bytes to be divided by. The result does not depend on the tokenizer's vocabulary.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.config import GPTConfig
from mgr_jax.data.corpus import Corpus
from mgr_jax.data.order import EpochOrder
from mgr_jax.data.stream import ValidationBatches
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.model import gpt
from train import distributed

BASELINE_TOKENS = 2**19


class Score(NamedTuple):
  """Sum of negative log-likelihoods in nats over `tokens` scored targets that stand for `bytes` bytes of UTF-8."""

  nats: float
  tokens: int
  bytes: int

  @property
  def bits_per_byte(self) -> float:
    """Σ nats / (ln 2 · Σ bytes)."""
    return self.nats / (math.log(2) * self.bytes)

  @property
  def nats_per_token(self) -> float:
    return self.nats / self.tokens


def scored_targets(batch: dict[str, np.ndarray], token_bytes_V: np.ndarray) -> np.ndarray:
  """float32 [B, T]: 1 where the target is real and at least one byte long, else 0."""
  return batch["weights"] * (token_bytes_V[batch["targets"]] > 0)


@functools.partial(jax.jit, static_argnames="cfg")
def _nats(params, batch, scored_BT, cfg: GPTConfig, annealed):
  return jnp.sum(gpt.nll(params, batch, cfg, annealed) * scored_BT)


def score(
  params, batches: ValidationBatches, tokenizer: Tokenizer, cfg: GPTConfig, annealed=None, spread=lambda batch: batch
) -> Score:
  """Scores `params`, with the live values of annealed options, on all of `batches`.

  The same windows in the same order every time, and sums over batches in float64: the result is the same on repeated
  calls, and within about 1e-6 for another batch size. `spread` puts the rows of this process on its devices, see
  `train.parallel`. Costs one forward pass over the batches and one host sync.
  """
  nats, tokens, bytes_ = [], 0, 0
  for batch in batches:
    scored = scored_targets(batch, tokenizer.token_bytes)
    tokens += int(scored.sum())
    bytes_ += int((tokenizer.token_bytes[batch["targets"]] * scored).sum())
    inputs = spread({**{name: batch[name] for name in ("tokens", "targets", "segment_ids")}, "scored": scored})
    nats.append(_nats(params, inputs, inputs.pop("scored"), cfg, annealed or {}))
  tokens, bytes_ = distributed.total(np.array([tokens, bytes_], np.float64)).astype(int).tolist()
  return Score(float(np.sum(jax.device_get(nats), dtype=np.float64)), tokens, bytes_)


def unigram_counts(corpus: Corpus, tokenizer: Tokenizer, seed: int, max_tokens: int = BASELINE_TOKENS) -> np.ndarray:
  """int64 [V]: how often each id occurs in the first `max_tokens` (or a little more) of the shuffled training split."""
  units = corpus.units("train")
  order = EpochOrder(units, seed)
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  for i in range(len(units)):
    for ids in tokenizer.encode_batch(order[i]):
      counts += np.bincount(ids, minlength=len(counts))
    if counts.sum() >= max_tokens:
      break
  return counts


def unigram_score(counts_V: np.ndarray, batches: ValidationBatches, tokenizer: Tokenizer) -> Score:
  """The score of p(v) = (n_v + 1) / (Σ n + V), add-one-smoothed frequencies: what a model that ignores context gets.

  A trained model that does not beat it has learnt nothing from context.
  """
  nats_V = math.log(counts_V.sum() + len(counts_V)) - np.log(counts_V + 1.0)
  targets_V = np.zeros(len(counts_V), np.float64)
  for batch in batches:
    scored = scored_targets(batch, tokenizer.token_bytes)
    targets_V += np.bincount(batch["targets"].reshape(-1), weights=scored.reshape(-1), minlength=len(counts_V))
  targets_V = distributed.total(targets_V)
  return Score(float(targets_V @ nats_V), int(targets_V.sum()), int(targets_V @ tokenizer.token_bytes))
