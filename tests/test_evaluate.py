"""train.evaluate: bits per byte against sums written out by hand, and the program on a tiny saved run."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mgr_jax.config import GPTConfig
from mgr_jax.conformance import noisy_params
from mgr_jax.data import parquet, stream
from mgr_jax.data import tokenizer as tokenizers
from mgr_jax.data.corpus import load_corpus
from mgr_jax.model import gpt
from mgr_jax.params import ParamSpec
from mgr_jax.problems import UserError
from train import checkpoint, cli, evaluate, identity, validate

TOKENIZER = tokenizers.bytes_tokenizer()
CFG = GPTConfig(vocab_size=TOKENIZER.vocab_size, seq_len=12, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
VAL_TOKENS = 140


@struct.dataclass
class Saved:
  step: jax.Array
  params: dict


def write_corpus(directory, n_val=9):
  directory.mkdir()
  texts = [f"document {n} says é{n * n}" for n in range(30)]
  parquet.write_shard(directory / "shard_00000.parquet", texts[:-n_val])
  parquet.write_shard(directory / "shard_00001.parquet", texts[-n_val:])
  return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def corpus(data):
  return load_corpus(data)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, noisy_params(jax.random.key(1), CFG))


def batches(corpus, cfg=CFG, batch_size=4):
  return stream.validation_batches(corpus, TOKENIZER, seq_len=cfg.seq_len, batch_size=batch_size, val_tokens=VAL_TOKENS)


@pytest.fixture(scope="module")
def result(params, corpus):
  return evaluate.evaluate(params, batches(corpus), TOKENIZER, CFG)


@functools.partial(jax.jit, static_argnums=2)
def log_probabilities(params, tokens, cfg, documents):
  return jax.nn.log_softmax(gpt.forward(params, tokens, cfg, documents)[0][0])


def by_hand(params, corpus, cfg=CFG):
  """(tokens seen, nats, bytes) of every scored target, window by window through the full forward pass."""
  tokens = batches(corpus).tokens
  rows = []
  for start in range(0, len(tokens) - 1, cfg.seq_len):
    window = tokens[start : start + cfg.seq_len + 1]
    padded = np.pad(window, (0, cfg.seq_len + 1 - len(window)))
    documents = np.cumsum(padded[:-1] == TOKENIZER.bos_id)[None] if cfg.doc_mask else None
    log_p = np.asarray(log_probabilities(params, padded[None, :-1], cfg, documents))
    seen = 0
    for i, target in enumerate(window[1:]):
      seen = 1 if cfg.doc_mask and window[i] == TOKENIZER.bos_id else seen + 1
      if target != TOKENIZER.bos_id:
        rows.append((seen, -float(log_p[i, target]), 1))
  return np.array(rows)


@pytest.mark.parametrize("doc_mask", [False, True])
def test_every_bucket_equals_the_sum_written_out(params, corpus, doc_mask):
  cfg = dataclasses.replace(CFG, doc_mask=doc_mask)
  result = evaluate.evaluate(params, batches(corpus), TOKENIZER, cfg)
  expected = by_hand(params, corpus, cfg)
  assert result["tokens"] == result["bytes"] == len(expected)
  assert result["nats_per_token"] == pytest.approx(expected[:, 1].mean(), rel=1e-5)
  assert [(r["seen_from"], r["seen_to"]) for r in result["by_position"]] == [(1, 1), (2, 3), (4, 7), (8, 12)]
  for row in result["by_position"]:
    inside = expected[(expected[:, 0] >= row["seen_from"]) & (expected[:, 0] <= row["seen_to"])]
    assert row["tokens"] == len(inside)
    assert row["bits_per_byte"] == pytest.approx(inside[:, 1].sum() / math.log(2) / len(inside), rel=1e-5)
  shifted = expected[(expected[:, 0] >= 3) & (expected[:, 0] <= 6)]
  assert result["by_position"][2]["nats_per_token"] != pytest.approx(shifted[:, 1].mean(), rel=1e-5)


def test_the_total_is_what_validation_reports(params, corpus, result):
  score = validate.score(params, batches(corpus), TOKENIZER, CFG)
  assert result["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
  assert (result["tokens"], result["bytes"]) == (score.tokens, score.bytes)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing(params, corpus, result, batch_size):
  other = evaluate.evaluate(params, batches(corpus, batch_size=batch_size), TOKENIZER, CFG)
  assert other["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
  assert [r["tokens"] for r in other["by_position"]] == [r["tokens"] for r in result["by_position"]]


def test_a_uniform_model_needs_the_bits_of_its_vocabulary(params, corpus):
  """265 equally probable ids of one byte each: log2 265 bits per byte."""
  uniform = {**params, "head": jnp.zeros_like(params["head"])}
  result = evaluate.evaluate(uniform, batches(corpus), TOKENIZER, CFG)
  assert result["bits_per_byte"] == pytest.approx(math.log2(265), abs=1e-5)


def test_tokens_of_several_bytes_count_their_bytes(corpus):
  texts = [text for unit in range(len(corpus.units("train"))) for text in corpus.units("train")[unit]]
  tokenizer = tokenizers.train_bpe(texts, 300)
  cfg = dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size)
  params = gpt.init(jax.random.key(0), cfg)
  windows = stream.validation_batches(corpus, tokenizer, seq_len=12, batch_size=4, val_tokens=10_000)
  result = evaluate.evaluate(params, windows, tokenizer, cfg)
  val = [text for unit in range(len(corpus.units("val"))) for text in corpus.units("val")[unit]]
  assert result["bytes"] == sum(len(text.encode()) for text in val) > result["tokens"]
  nats = result["tokens"] * math.log(tokenizer.vocab_size)
  assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-5)


def test_longer_contexts_score_the_same_tokens(params, corpus, result):
  found = evaluate.evaluate_contexts(params, CFG, corpus, TOKENIZER, (1, 2, 4), VAL_TOKENS, 4)
  assert [c["context"] for c in found] == [12, 24, 48]
  assert {c["tokens"] for c in found} == {result["tokens"]}
  assert found[0] == result
  long = dataclasses.replace(CFG, seq_len=48)
  assert found[2]["bits_per_byte"] == pytest.approx(by_hand(params, corpus, long)[:, 1].mean() / math.log(2), rel=1e-5)
  assert found[2]["bits_per_byte"] != pytest.approx(result["bits_per_byte"], rel=1e-4)


def test_a_model_with_one_context_is_refused(monkeypatch):
  monkeypatch.setattr(gpt, "specs", lambda cfg: {"table": ParamSpec((cfg.seq_len, 4), ("positions", "embed"))})
  with pytest.raises(UserError, match="depend on the context"):
    evaluate.longer(CFG, 2)

  def picky(cfg):
    raise ValueError("depth 3 needs seq_len=12")

  monkeypatch.setattr(gpt, "specs", picky)
  with pytest.raises(UserError, match="depth 3 needs seq_len=12"):
    evaluate.longer(CFG, 2)


@pytest.fixture(scope="module")
def workdir(params, data, tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs")
  flags = {"data": str(data), "text_column": "text", "val_from_train": 0.0}
  sha256 = load_corpus(data).sha256
  meta = identity.make_meta(CFG, flags, tokenizer_sha256=TOKENIZER.sha256, data_sha256=sha256, run_id="tiny")
  checkpoints = checkpoint.Checkpoints(directory / "tiny" / checkpoint.SUBDIRECTORY)
  checkpoints.save(5, Saved(jnp.int32(5), params), {}, meta)
  checkpoints.close()
  tokenizers.save(TOKENIZER, directory / "tiny" / tokenizers.FILE_NAME)
  return directory


@pytest.fixture
def run(workdir, capsys):
  """Runs the program; returns (exit code, stdout, stderr)."""

  def run(*arguments, ckpt="tiny"):
    argv = ["evaluate", f"--workdir={workdir}", *([f"--ckpt={ckpt}"] if ckpt else []), *arguments]
    code = cli.execute(evaluate.main, argv, evaluate.FLAGS)
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return run


def test_the_program_measures_on_the_data_of_the_run_and_keeps_the_result(run, workdir, result, tmp_path):
  code, out, err = run("--evals=bpb,length", f"--val_tokens={VAL_TOKENS}", "--batch_size=4", f"--json={tmp_path / 'r'}")
  assert code == 0, err
  saved = json.loads((tmp_path / "r").read_text("utf-8"))
  assert saved in [json.loads(f.read_text("utf-8")) for f in (workdir / "tiny").glob("evaluation-5-*.json")]
  assert saved["contexts"][0] == result
  assert (saved["run_id"], saved["step"], saved["data"]["trained_on_it"]) == ("tiny", 5, True)
  assert f"{result['bits_per_byte']:.4f}" in out and "bpb at 48" in out and "8-15" in out


def test_any_data_can_be_given(run, workdir, tmp_path):
  other = write_corpus(tmp_path / "other", n_val=20)
  code, _, err = run(f"--data={other}", "--val_tokens=60", f"--json={tmp_path / 'r'}")
  assert code == 0, err
  saved = json.loads((tmp_path / "r").read_text("utf-8"))
  assert saved["data"]["trained_on_it"] is False
  assert saved["data"]["sha256"] == load_corpus(other).sha256
  assert saved["contexts"][0]["tokens"] <= 60


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--evals=bbp"], "--evals=bbp is unknown"),
    (["--evals="], "use one or more of bpb,length"),
    (["--val_tokens=0"], "--val_tokens=0 is not positive"),
    (["--batch_size=0"], "--batch_size=0 is not positive"),
    (["--val_from_train=0.1"], "--val_from_train has no effect on the data of the run"),
    (["--json=/nowhere/at/all.json"], "a directory that does not exist"),
    (["--data=/nowhere"], "/nowhere"),
    (["--ckpt=tinny"], "'tinny'"),
    (["--ckpt="], "no --ckpt"),
  ],
)
def test_mistakes_name_a_way_out(run, arguments, named):
  code, out, err = run(*arguments)
  assert (code, out) == (2, "")
  assert named in err and "error: " in err and "fix: " in err and "Traceback" not in err
