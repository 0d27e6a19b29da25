"""Do ultrametric digits learn to route? Byte-level language modelling on the builtin corpus."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.data.builtin import builtin_corpus
from mgr_jax.data.corpus import load_corpus
from mgr_jax.data.order import EpochOrder
from mgr_jax.data.tokenizer import bytes_tokenizer
from train.experiments.records import Arm, Experiment, Generator, Prediction, Task

T, TRAIN_TOKENS, VALIDATION_TOKENS = 128, 2**21, 2**18
TEST = "validation"


class Text(NamedTuple):
  """Token streams int32 [n] of both splits."""

  train: jax.Array
  validation: jax.Array


def load() -> Text:
  """The first documents of both splits, in shuffled order, as bytes; builds the corpus in the cache on first use."""
  corpus, tokenizer = load_corpus(builtin_corpus()), bytes_tokenizer()

  def stream(split: str, tokens: int) -> np.ndarray:
    units, parts, have = corpus.units(split), [], 0
    order = EpochOrder(units, 0)
    for i in range(len(units)):
      if have > tokens:
        break
      parts += list(tokenizer.encode_batch(order[i]))
      have += sum(map(len, parts[-len(order[i]) :]))
    return np.concatenate(parts)[:tokens].astype(np.int32)

  return Text(jnp.asarray(stream("train", TRAIN_TOKENS)), jnp.asarray(stream("val", VALIDATION_TOKENS)))


def windows(split: str) -> Generator:
  """Windows at uniform places of a split; every target counts."""

  def generate(key, rows, data):
    stream = getattr(data, split)
    start = jax.random.randint(key, (rows, 1), 0, len(stream) - T)
    window = stream[start + jnp.arange(T + 1)]
    return {"tokens": window[:, :-1], "targets": window[:, 1:], "weights": jnp.ones((rows, T), jnp.float32)}

  return generate


def unigram_loss(data: Text) -> dict[str, float]:
  """Nats per byte of the training frequencies, add-one smoothed, on the validation stream."""
  counts = np.bincount(np.asarray(data.train), minlength=bytes_tokenizer().vocab_size) + 1.0
  return {TEST: float(-np.mean(np.log(counts / counts.sum())[np.asarray(data.validation)]))}


EXPERIMENT = Experiment(
  name="ultrametric_routing",
  question="do learned digits route better than random ones, and random ones better than a mean over the prefix?",
  model={"n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 64},
  tasks=(
    Task(
      name="bytes of the builtin corpus",
      vocab_size=bytes_tokenizer().vocab_size,
      seq_len=T,
      train=windows("train"),
      tests={TEST: windows("validation")},
      chance=unigram_loss,
      data=load,
    ),
  ),
  arms=(
    Arm("frozen random", "ultrametric(digits=hard)", frozen=("dq", "dk")),
    Arm("straight-through", "ultrametric"),
    Arm("soft", "ultrametric(digits=soft)"),
    # Weights alpha^(common digits) with alpha = 1.0001 are equal to 3e-4: the mean over the prefix.
    Arm("prefix mean", "ultrametric(alpha_init=1.0001,alpha_learn=false)"),
  ),
  predictions=(
    Prediction(
      "straight-through digits save 1% of the loss of frozen random ones",
      "straight-through",
      "frozen random",
      TEST,
      at_least=0.01,
    ),
    Prediction(
      "frozen random digits are within 0.5% of the prefix mean: they carry nothing",
      "frozen random",
      "prefix mean",
      TEST,
      within=0.005,
    ),
  ),
  steps=600,
  batch_size=8,
  test_rows=512,
  metric="loss",
  limits="one small model and a short run on Python text; softmax attention is not an arm of this comparison",
)
