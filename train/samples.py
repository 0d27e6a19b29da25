"""Text that a model under training writes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mgr_jax.config import GPTConfig
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.model.generate import generate
from mgr_jax.problems import Problem
from train.metrics import Record

MAX_TOKENS = 128


class Sample(NamedTuple):
  """A prompt, empty for a new document, and how the model continues it."""

  prompt: str
  text: str


def prompt_problems(prompts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> list[Problem]:
  """Prompts that leave no room for a token."""
  lengths = {prompt: len(tokenizer.encode(prompt)) for prompt in prompts}
  return [
    Problem(f"--sample_prompt={p[:40]!r} has {n} tokens, the context is {seq_len}", "give a shorter prompt")
    for p, n in lengths.items()
    if n >= seq_len
  ]


def draw_samples(params, prompts: Sequence[str], tokenizer: Tokenizer, cfg: GPTConfig, key: jax.Array) -> list[Sample]:
  """Continues each prompt, or an empty one when there are none, by at most `MAX_TOKENS` tokens within the context.

  A sample ends where the model begins a new document. Drawn at temperature 0.8 from the 50 most probable tokens.
  """
  prompts = list(prompts) or [""]
  ids = [tokenizer.encode(prompt) for prompt in prompts]
  lengths = np.array([len(row) for row in ids])
  room = min(MAX_TOKENS, cfg.seq_len - int(lengths.max()))
  if room < 1:
    return []
  padded = np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in ids])
  drawn = generate(params, padded, cfg, key, room, lengths=lengths, stop_tokens=(tokenizer.bos_id,))
  return [Sample(prompt, tokenizer.decode(row)) for prompt, row in zip(prompts, np.asarray(drawn), strict=True)]


def samples_text(records: Sequence[Record]) -> str:
  """`samples.txt` from the sample events of `metrics.jsonl`."""
  blocks = [
    f"--- step {r['step']}, prompt {r['prompt']!r}\n{r['prompt']}{r['text']}\n"
    for r in records
    if r.get("event") == "sample"
  ]
  return "\n".join(blocks)
