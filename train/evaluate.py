"""Measures a trained model in bits per byte, in all and by the number of tokens it could see.

  python -m train.evaluate --ckpt=RUN
  python -m train.evaluate --ckpt=RUN@1000 --data=corpus --evals=bpb,length --json=result.json

Evaluations: `bpb` at the context of the training; `length` at twice and four times that context, on the same tokens.
The text is the validation split, cut into the same windows every time. The result also goes into the run's directory.
"""

import dataclasses
import datetime
import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mgr_jax.config import GPTConfig
from mgr_jax.data import files, stream
from mgr_jax.data.builtin import builtin_corpus
from mgr_jax.data.corpus import Corpus, load_corpus
from mgr_jax.data.pack import Batch
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.model import gpt
from mgr_jax.params import is_spec
from mgr_jax.problems import Problem, UserError, raise_if_any
from train import cli
from train.console import table
from train.metrics import dumps
from train.validate import Score, scored_targets

SCHEMA = "mgr_jax.evaluation.v1"
EVALS = ("bpb", "length")
LENGTH_FACTORS = (2, 4)
FLAGS = flags.FlagValues()


def _define(kind: str, name: str, default, help_text: str) -> None:
  getattr(flags, f"DEFINE_{kind}")(name, default, help_text, flag_values=FLAGS)


_define("string", "ckpt", "", "Run id in --workdir, or path of a run; @STEP picks a checkpoint. Required.")
_define("string", "workdir", "artifacts", "Directory that holds the runs.")
_define("list", "evals", ["bpb"], f"What to measure: {', '.join(EVALS)}.")
_define("string", "data", "", "builtin, or a directory of parquet shards; empty = the data of the run.")
_define("string", "text_column", "text", "Column of the shards in --data that holds the text.")
_define("float", "val_from_train", 0.0, "Share of documents of --data held out when it has no validation split.")
_define("integer", "val_tokens", 131072, "Tokens to score; always the first ones of the validation split.")
_define("integer", "batch_size", 8, "Windows at once; the result does not depend on it.")
_define("string", "json", "", "Also write the result to this file.")


@functools.partial(jax.jit, static_argnames="cfg")
def _nll(params, batch, cfg: GPTConfig):
  return gpt.nll(params, batch, cfg)


def evaluate(params, batches: Iterable[Batch], tokenizer: Tokenizer, cfg: GPTConfig) -> dict[str, Any]:
  """The score of `params` on all of `batches`, and by position.

  Returns `{context, tokens, bytes, bits_per_byte, nats_per_token, by_position}`; each element of `by_position` holds
  the same sums for targets predicted from `seen_from` to `seen_to` tokens, in powers of two. Sums are in float64, so
  the batch size changes the result by less than 1e-6. Costs one forward pass.
  """
  buckets = cfg.seq_len.bit_length()
  nats, tokens, bytes_ = np.zeros(buckets), np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)
  for batch in batches:
    inputs = {name: batch[name] for name in ("tokens", "targets", "segment_ids")}
    nll = np.asarray(_nll(params, inputs, cfg), np.float64)
    scored = scored_targets(batch, tokenizer.token_bytes) > 0
    place = batch["positions"] if cfg.doc_mask else np.broadcast_to(np.arange(cfg.seq_len), scored.shape)
    bucket = np.frexp(place[scored] + 1)[1] - 1  # floor(log2) of the tokens seen
    nats += np.bincount(bucket, nll[scored], buckets)
    tokens += np.bincount(bucket, minlength=buckets)
    bytes_ += np.bincount(bucket, tokenizer.token_bytes[batch["targets"][scored]], buckets).astype(np.int64)
  scores = [Score(*sums) for sums in zip(nats, tokens.tolist(), bytes_.tolist(), strict=True)]
  rows = [
    {"seen_from": 1 << i, "seen_to": min((2 << i) - 1, cfg.seq_len), **_sums(score)}
    for i, score in enumerate(scores)
    if score.tokens
  ]
  total = Score(nats.sum(), int(tokens.sum()), int(bytes_.sum()))
  return {"context": cfg.seq_len, **_sums(total), "by_position": rows}


def _sums(score: Score) -> dict[str, Any]:
  return {
    "tokens": score.tokens,
    "bytes": score.bytes,
    "bits_per_byte": float(score.bits_per_byte),
    "nats_per_token": float(score.nats_per_token),
  }


def longer(cfg: GPTConfig, factor: int) -> GPTConfig:
  """The same model at `factor` times the context.

  Raises:
    UserError: a mechanism whose parameters or options are made for one context.
  """
  fix = "use --evals=bpb: this model has only the context it was trained with"
  try:
    long = dataclasses.replace(cfg, seq_len=factor * cfg.seq_len)
    shapes = [[s.shape for s in jax.tree.leaves(gpt.specs(c), is_leaf=is_spec)] for c in (cfg, long)]
  except ValueError as e:
    why = e.problems[0].error if isinstance(e, UserError) else str(e)
    raise UserError(Problem(f"--evals=length at context {factor * cfg.seq_len}: {why}", fix)) from e
  if shapes[0] != shapes[1]:
    raise UserError(Problem(f"--evals=length: parameters of {cfg.attention} depend on the context", fix))
  return long


def evaluate_contexts(
  params, cfg: GPTConfig, corpus: Corpus, tokenizer: Tokenizer, factors: Iterable[int], val_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
  """`evaluate` at each multiple of the context, on the same tokens; a batch keeps about the same size in tokens.

  Raises:
    UserError: an empty validation split, or a model that has only one context.
  """
  configs = [cfg if factor == 1 else longer(cfg, factor) for factor in factors]
  results = []
  for config in configs:
    rows = max(1, batch_size * cfg.seq_len // config.seq_len)
    batches = stream.validation_batches(
      corpus, tokenizer, seq_len=config.seq_len, batch_size=rows, val_tokens=val_tokens
    )
    results.append(evaluate(params, batches, tokenizer, config))
  return results


def flag_problems() -> list[Problem]:
  """Every problem that can be seen without the model."""
  found = []
  if not FLAGS.ckpt:
    found.append(Problem("no --ckpt", "use --ckpt=RUN with the run id that train.main printed, or the path of a run"))
  unknown = [name for name in FLAGS.evals if name not in EVALS]
  if unknown or not FLAGS.evals:
    found.append(Problem(f"--evals={','.join(FLAGS.evals)} is unknown", f"use one or more of {','.join(EVALS)}"))
  for name in ("val_tokens", "batch_size"):
    if FLAGS[name].value < 1:
      found.append(Problem(f"--{name}={FLAGS[name].value} is not positive", f"use --{name}={FLAGS[name].default}"))
  for name in ("text_column", "val_from_train"):
    if FLAGS[name].value != FLAGS[name].default and FLAGS.data in ("", "builtin"):
      where = "the data of the run" if not FLAGS.data else "--data=builtin"
      found.append(Problem(f"--{name} has no effect on {where}", "leave it out, or use --data=DIRECTORY"))
  if FLAGS.json and not Path(FLAGS.json).expanduser().absolute().parent.is_dir():
    found.append(Problem(f"--json={FLAGS.json} is in a directory that does not exist", "use --json=result.json"))
  return found


def chosen_corpus(trained_with: dict[str, Any]) -> Corpus:
  """The corpus of --data, by default the one of the run, whose flags are `trained_with`. Raises `UserError`."""
  data = FLAGS.data or trained_with["data"]
  if data == "builtin":
    return load_corpus(builtin_corpus())
  source = FLAGS.flag_values_dict() if FLAGS.data else trained_with
  return load_corpus(data, source["text_column"], source["val_from_train"])


def report(contexts: list[dict[str, Any]]) -> str:
  """The tables that the program prints."""
  number = lambda x: f"{x:.4f}"
  measures = [(c["tokens"], c["bytes"], number(c["bits_per_byte"]), number(c["nats_per_token"])) for c in contexts]
  rows = [(c["context"], *m) for c, m in zip(contexts, measures, strict=True)]
  lines = [table(("context", "tokens", "bytes", "bits per byte", "nats per token"), rows), ""]
  buckets = [{row["seen_from"]: row for row in c["by_position"]} for c in contexts]
  rows = []
  for first in sorted(set().union(*buckets)):
    last = max(bucket[first]["seen_to"] for bucket in buckets if first in bucket)
    cells = [number(bucket[first]["bits_per_byte"]) if first in bucket else "" for bucket in buckets]
    rows.append((f"{first}-{last}" if last > first else f"{first}", *cells))
  lines.append(table(("tokens seen", *(f"bpb at {c['context']}" for c in contexts)), rows))
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  raise_if_any(flag_problems())
  from train import runs  # slow to import, and not needed to explain a wrong flag

  run = runs.load_run(FLAGS.ckpt, FLAGS.workdir)
  directory, _ = runs.find_run(FLAGS.ckpt, FLAGS.workdir)
  corpus = chosen_corpus(run.meta["flags"])
  factors = (1, *LENGTH_FACTORS) if "length" in FLAGS.evals else (1,)
  contexts = evaluate_contexts(run.params, run.cfg, corpus, run.tokenizer, factors, FLAGS.val_tokens, FLAGS.batch_size)
  now = datetime.datetime.now(datetime.UTC)
  result = {
    "schema_version": SCHEMA,
    "run_id": run.meta["lineage"][-1],
    "step": run.step,
    "time": now.isoformat(timespec="seconds"),
    "argv": [*argv[:1], *FLAGS.flags_into_string().splitlines()],
    "attention": run.cfg.attention,
    "tokenizer_sha256": run.tokenizer.sha256,
    "data": {
      "directory": str(corpus.directory),
      "sha256": corpus.sha256,
      "trained_on_it": corpus.sha256 == run.meta["data_sha256"],
      "val_tokens": FLAGS.val_tokens,
    },
    "contexts": contexts,
  }
  print(f"{directory} step {run.step} on {corpus.directory}\n\n{report(contexts)}\n")
  text = dumps(result, indent=2) + "\n"
  paths = [directory / f"evaluation-{run.step}-{now:%Y%m%d-%H%M%S-%f}.json"]
  for path in paths + ([Path(FLAGS.json).expanduser()] if FLAGS.json else []):
    try:
      files.write_text(path, text)
      print(path)
    except OSError as e:  # the run may belong to somebody else; the result has been shown
      print(f"not written: {path}: {e.strerror}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main, FLAGS)
