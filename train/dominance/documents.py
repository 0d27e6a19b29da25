"""Held-out documents, one window each, so that resampling documents is resampling independent texts."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.config import GPTConfig
from mgr_jax.data.corpus import Corpus
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.model import gpt
from mgr_jax.problems import Problem, UserError

FEWEST = 200
MARGIN = 1.2  # more documents are held out than asked for, because a hash decides which


class Documents(NamedTuple):
  """Windows from the middle of documents: tokens and targets int32 [N, T], weights float32 [N, T], 0 at padding."""

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray

  @property
  def lengths(self) -> np.ndarray:
    """Scored tokens of each document, [N]."""
    return self.weights.sum(-1)


def holding_out(corpus: Corpus, wanted: int) -> Corpus:
  """`corpus` with enough validation documents: its own, or else a hash-chosen share of the training documents.

  Raises:
    UserError: fewer than `FEWEST` wanted, or more than a third of all documents would be needed.
  """
  if wanted < FEWEST:
    what = f"--eval_documents={wanted} is fewer than {FEWEST}: their mean would be too uncertain to judge differences"
    raise UserError(Problem(what, f"use --eval_documents={FEWEST} or more"))
  if _count(corpus, "val") >= wanted:
    return corpus
  total = _count(corpus, "train")
  share = MARGIN * wanted / max(total, 1)
  if share > 0.5:
    most = int(total / (2 * MARGIN))
    fix = f"use --eval_documents={most} or fewer" if most >= FEWEST else "give data with more documents"
    raise UserError(Problem(f"{corpus.directory} has {total} documents, too few to hold out {wanted}", fix))
  return dataclasses.replace(corpus, val=corpus.train, val_from_train=share)


def _count(corpus: Corpus, split: str) -> int:
  units = corpus.units(split)
  return sum(len(units[i]) for i in range(len(units)))


def read(corpus: Corpus, tokenizer: Tokenizer, count: int, seq_len: int) -> Documents:
  """The first `count` validation documents of two tokens and more, shorter ones padded."""
  units, windows = corpus.units("val"), []
  for unit in range(len(units)):
    if len(windows) >= count:
      break
    encoded = tokenizer.encode_batch(units[unit])
    windows += [ids[max(0, (len(ids) - seq_len - 1) // 2) :][: seq_len + 1] for ids in encoded if len(ids) > 1]
  windows = windows[:count]
  ids, weights = np.zeros((len(windows), seq_len + 1), np.int32), np.zeros((len(windows), seq_len), np.float32)
  for i, window in enumerate(windows):
    ids[i, : len(window)] = window
    weights[i, : len(window) - 1] = 1
  return Documents(ids[:, :-1], ids[:, 1:], weights)


def padded(documents: Documents, rows: int) -> Documents:
  """With empty documents at the end, to a multiple of `rows`."""
  return Documents(*(np.pad(x, [(0, -len(x) % rows), (0, 0)]) for x in documents))


def nats(params, annealed, documents: Documents, cfg: GPTConfig, rows: int) -> jax.Array:
  """Summed negative log-likelihood of each document, float32 [N]; one forward pass, `rows` documents at a time.

  `rows` divides N, see `padded`; every row is one document, whatever `cfg.doc_mask` says.
  """
  cfg = dataclasses.replace(cfg, doc_mask=False)

  def of(part):
    tokens, targets, weights = part
    return jnp.sum(gpt.nll(params, {"tokens": tokens, "targets": targets}, cfg, annealed) * weights, -1)

  return jax.lax.map(of, tuple(x.reshape(-1, rows, *x.shape[1:]) for x in documents)).reshape(-1)
