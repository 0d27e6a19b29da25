"""Which axis to double next: depth, width or data. `python -m train.bench dominance`.

  --kind=ladder  trains the full system, halves, quarters and pairs of halves, alike and on the same data, and predicts
                 the benefit of the next doubling of each axis per doubling of compute, with a verdict
  --kind=ablate  removes random halves of a trained model's layers, or of its heads and hidden units, and reports how
                 fragile it is; this is another quantity and gives no verdict

Data halves are branches of the full run that warm down at half of the tokens. All systems are judged on the same
held-out documents; intervals come from resampling documents and seeds in pairs.
"""

import json
import os
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags

from mgr_jax.attention import model_problems
from mgr_jax.config import GPTConfig
from mgr_jax.problems import Problem, UserError, raise_if_any
from train import bench
from train.dominance.systems import AXES, Recipe, divisibility_problems, recipes

FLAGS = flags.FlagValues()


def _define(kind: str, name: str, default, help_text: str) -> None:
  getattr(flags, f"DEFINE_{kind}")(name, default, help_text, flag_values=FLAGS)


flags.DEFINE_enum("kind", "ladder", ["ladder", "ablate"], "How to look.", flag_values=FLAGS)
_define("list", "axes", list(AXES), "Axes to compare, of depth, width, data.")
_define("boolean", "quarters", True, "Also train quarters; without them benefits are intervals.")
_define("list", "seeds", ["0", "1", "2"], "Seeds of weights and data order; each trains every system.")
_define("integer", "bootstrap", 1000, "Resamples of documents and seeds.")
_define("integer", "masks", 8, "Random halves per axis, of ablate.")
_define("string", "ckpt", "", "Trained run to ablate, as for train.evaluate; empty trains the full system first.")
_define("string", "workdir", "artifacts", "Directory that holds the runs of --ckpt.")
_define("string", "attention", "standard", "Mechanism of each layer.")
_define("integer", "n_layer", 4, "Layers of the full system.")
_define("integer", "n_head", 4, "Query heads.")
_define("integer", "n_kv_head", 0, "Key/value heads; 0 means n_head.")
_define("integer", "n_embd", 64, "Width.")
_define("integer", "seq_len", 128, "Context.")
_define("integer", "batch_size", 8, "Sequences per update.")
_define("integer", "max_steps", 400, "Updates of a full run.")
_define("float", "warmdown_frac", 0.2, "Share of each run, and of each branch, in which the learning rate falls to 0.")
_define("string", "data", "builtin", "builtin, or a directory of parquet shards.")
_define("string", "tokenizer", "bytes", "auto = the one beside the data; bytes; or the path of a tokenizer.json.")
_define("integer", "eval_documents", 256, "Held-out documents, one window of each.")
_define("string", "json", "", "Write everything that was measured to this file.")

_LADDER_ONLY = ("axes", "quarters", "bootstrap")
_ABLATE_ONLY = ("masks", "ckpt", "workdir")
_MODEL = ("attention", "n_layer", "n_head", "n_kv_head", "n_embd", "seq_len", "batch_size", "max_steps", "seeds")
_OF_RUN = (*_MODEL, "warmdown_frac", "data", "tokenizer")


def fields() -> dict[str, Any]:
  """The fields of the full system's configuration, before the vocabulary is known."""
  names = ("attention", "n_layer", "n_head", "n_embd", "seq_len")
  return {name: getattr(FLAGS, name) for name in names} | {"n_kv_head": FLAGS.n_kv_head or FLAGS.n_head}


def flag_problems() -> list[Problem]:
  """Everything that is wrong before data is looked at."""
  found = []
  idle = {"ladder": _ABLATE_ONLY, "ablate": _LADDER_ONLY + (_OF_RUN if FLAGS.ckpt else ("workdir",))}[FLAGS.kind]
  where = f"--kind={FLAGS.kind}" + (" with --ckpt" if FLAGS.ckpt and FLAGS.kind == "ablate" else "")
  for name in idle:
    if not FLAGS[name].using_default_value:
      found.append(Problem(f"--{name} has no effect with {where}", "leave it out"))
  for name, least in (("bootstrap", 100), ("masks", 1), ("batch_size", 1), ("max_steps", 20)):
    if FLAGS[name].value < least:
      found.append(Problem(f"--{name}={FLAGS[name].value} is less than {least}", f"use --{name}={FLAGS[name].default}"))
  if not 0 < FLAGS.warmdown_frac <= 0.5:
    found.append(Problem(f"--warmdown_frac={FLAGS.warmdown_frac} is outside (0, 0.5]", "use --warmdown_frac=0.2"))
  unknown = [axis for axis in FLAGS.axes if axis not in AXES]
  if unknown or len(set(FLAGS.axes)) < 2:
    found.append(Problem(f"--axes={','.join(FLAGS.axes)} does not name two axes", f"use --axes={','.join(AXES)}"))
  if not FLAGS.seeds or not all(s.isdecimal() for s in FLAGS.seeds) or len(set(FLAGS.seeds)) < len(FLAGS.seeds):
    found.append(Problem(f"--seeds={','.join(FLAGS.seeds)} is no list of distinct numbers", "use --seeds=0,1,2"))
  if FLAGS.json and not os.path.isdir(os.path.dirname(os.path.abspath(FLAGS.json))):
    found.append(Problem(f"--json={FLAGS.json}: its folder does not exist", "create the folder first"))
  return found


def main(argv: list[str]) -> int:
  """Checks, measures, prints, and writes `--json`."""
  if argv[1:] != ["dominance"]:
    raise UserError(Problem(f"unknown benchmark {' '.join(argv[1:])!r}", "python -m train.bench dominance"))
  problems, asked = flag_problems(), fields() | {"vocab_size": 256}
  if not FLAGS.ckpt:
    defaults = {name: field.default for name, field in GPTConfig.__dataclass_fields__.items()}
    wrong = model_problems(SimpleNamespace(**(defaults | asked)))
    if FLAGS.kind == "ladder" and not wrong:
      wrong = divisibility_problems(asked, FLAGS.axes, FLAGS.quarters)
      wrong = wrong or recipes(asked, FLAGS.axes, FLAGS.quarters)[1]
    problems += wrong
  raise_if_any(problems)
  start = time.perf_counter()
  found = _ladder() if FLAGS.kind == "ladder" else _ablate()
  print(f"\n{time.perf_counter() - start:.0f} s in all")
  if FLAGS.json:
    names = ("kind", *_OF_RUN, "eval_documents", *(_LADDER_ONLY if FLAGS.kind == "ladder" else _ABLATE_ONLY))
    settings = {name: FLAGS[name].value for name in names}
    report = {"kind": FLAGS.kind, "machine": bench.machine(), "settings": settings, **found}
    with open(FLAGS.json, "w", encoding="utf-8") as f:
      json.dump(report, f, indent=2, allow_nan=False)
  return 0


def _setting():
  """Corpus, tokenizer and held-out documents of the flags."""
  from mgr_jax.data import tokenizer as tokenizers
  from mgr_jax.data.builtin import builtin_corpus
  from mgr_jax.data.corpus import load_corpus
  from train.dominance import documents as documents_lib
  from train.dominance.training import Setting

  corpus = load_corpus(builtin_corpus() if FLAGS.data == "builtin" else FLAGS.data, need_val=False)
  tokenizer = tokenizers.resolve(FLAGS.tokenizer, corpus.directory)
  corpus = documents_lib.holding_out(corpus, FLAGS.eval_documents)
  documents = documents_lib.read(corpus, tokenizer, FLAGS.eval_documents, FLAGS.seq_len)
  setting = Setting(corpus, tokenizer, FLAGS.max_steps, FLAGS.batch_size, FLAGS.warmdown_frac)
  return setting, documents


def _ladder() -> dict[str, Any]:
  from train.dominance import ladder

  setting, documents = _setting()
  axes = [axis for axis in AXES if axis in FLAGS.axes]
  chosen, problems = recipes(fields() | {"vocab_size": setting.tokenizer.vocab_size}, axes, FLAGS.quarters)
  raise_if_any(problems)
  print(f"loss of {len(documents.tokens)} held-out documents, nats per token, {len(FLAGS.seeds)} seeds", flush=True)
  say = lambda text: print(f"  {text}", flush=True)
  found = ladder.climb(chosen, setting, documents, axes, [int(s) for s in FLAGS.seeds], FLAGS.bootstrap, say)
  print(f"\n{_axes_table(found)}\n")
  for pair, value in found.interactions.items():
    print(f"interaction of {pair.replace(' ', ' and ')}: {value:+.4f}")
  word = f"{found.verdict.word}: {found.verdict.axis}" if found.verdict.axis else found.verdict.word
  print(f"\nverdict: {word} ({found.verdict.reason})")
  every = sum(found.multipliers.values())
  print(f"cost: {found.cost:.2f} full runs; training every doubled system would cost {every:.2f}")
  print(f"learning rates: {ladder.LEARNING_RATES}")
  if found.skipped:
    print(f"warning: {found.skipped} updates were dropped because they were not finite")
  return ladder.as_json(found, documents)


def _axes_table(found) -> str:
  head = ("axis", "last doubling", "next doubling", "2 SE", "alpha", "floor", "cost x", "score", "P(best)")
  lines = ["{:<6} {:>13} {:>15} {:>7} {:>6} {:>6} {:>7} {:>15} {:>7}".format(*head)]
  number = lambda x, form: "-" if np.isnan(x) else format(float(x), form)
  span = lambda low, high: f"{low:.4f}" if low == high else f"{low:.4f}..{high:.4f}"
  for axis, p in found.point.items():
    error = 2 * float(np.std(found.samples[axis].high))
    lines.append(
      f"{axis:<6} {p.g:>13.4f} {span(float(p.low), float(p.high)):>15} {error:>7.4f} {number(p.alpha, '.2f'):>6}"
      f" {number(p.floor, '.3f'):>6} {found.multipliers[axis]:>7.2f}"
      f" {span(float(p.score_low), float(p.score_high)):>15} {found.verdict.p_best[axis]:>7.2f}"
    )
  unfitted = [axis for axis, p in found.point.items() if not p.fitted]
  if unfitted:
    lines.append(f"not fitted: {', '.join(unfitted)}")
  return "\n".join(lines)


def _ablate() -> dict[str, Any]:
  from train.dominance import ablate
  from train.dominance.training import Trainer

  if FLAGS.ckpt:
    cfg, trained, documents = _loaded()
  else:
    asked = fields()
    raise_if_any(ablate.problems(GPTConfig(vocab_size=256, **asked)))
    setting, documents = _setting()
    cfg = GPTConfig(vocab_size=setting.tokenizer.vocab_size, **asked)
    trainer = Trainer(Recipe(cfg, {"full": 1.0}), setting, documents)
    trained = [(t.params, t.annealed) for t in (trainer.run(int(s)) for s in FLAGS.seeds)]
  print(f"loss added on {len(documents.tokens)} held-out documents when half is removed, {FLAGS.masks} random halves")
  print(f"{'axis':<6} {'model':>5} {'raw':>16} {'rescaled by 1/keep':>20}")
  result: dict[str, list[dict[str, float]]] = {"depth": [], "width": []}
  for i, (params, annealed) in enumerate(trained):
    for axis, f in ablate.fragility(params, annealed, documents, cfg, FLAGS.masks).items():
      result[axis].append(f._asdict())
      print(f"{axis:<6} {i:>5} {f.raw:>8.4f} ±{f.raw_spread:<6.4f} {f.rescaled:>12.4f} ±{f.rescaled_spread:<6.4f}")
  print("\nno verdict: dependence of a trained model on its parts is not the benefit of more of them")
  return {f"fragility_{axis}": values for axis, values in result.items()} | {"documents": len(documents.tokens)}


def _loaded():
  """Configuration, parameters and held-out documents of --ckpt, on the validation split of its own data."""
  from mgr_jax.data.builtin import builtin_corpus
  from mgr_jax.data.corpus import load_corpus
  from train import runs
  from train.dominance import ablate
  from train.dominance import documents as documents_lib

  run = runs.load_run(FLAGS.ckpt, FLAGS.workdir)
  raise_if_any(ablate.problems(run.cfg))
  given = run.meta["flags"]
  if given["data"] == "builtin":
    corpus = load_corpus(builtin_corpus())
  else:
    corpus = load_corpus(given["data"], given["text_column"], given["val_from_train"])
  documents = documents_lib.read(corpus, run.tokenizer, FLAGS.eval_documents, run.cfg.seq_len)
  return run.cfg, [(run.params, {})], documents
