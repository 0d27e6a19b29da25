"""What a run writes: strict JSON, metrics with each step once, times, reports, and bits per byte."""

import errno
import io
import json
import math
import subprocess

import jax
import numpy as np
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.data import parquet
from mgr_jax.data.corpus import load_corpus
from mgr_jax.data.stream import validation_batches
from mgr_jax.data.tokenizer import bytes_tokenizer, train_bpe
from mgr_jax.model import gpt
from train import artifacts, metrics, nonfinite, summary, validate
from train.console import compact, duration
from train.metrics import Meter, MetricsLog, dumps, read_records

TEXTS = [f"document {i}: the quick brown fox jumps over {i % 7} lazy dogs, naïve café №{i}" for i in range(120)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  directory = tmp_path_factory.mktemp("corpus")
  parquet.write_shard(directory / "shard_00000.parquet", TEXTS[:90], 16)
  parquet.write_shard(directory / "shard_00001.parquet", TEXTS[90:], 16)
  return load_corpus(directory)


def test_strict_json_keeps_float32_bits_and_spells_out_what_json_cannot_hold():
  values = np.random.default_rng(0).normal(size=50).astype(np.float32)
  back = np.array(json.loads(dumps([np.asarray(v) for v in values])), np.float32)
  assert values.tobytes() == back.tobytes()
  text = dumps({"a": np.float32("nan"), "b": [math.inf, -math.inf], "c": np.int64(3), "d": (True, None)})
  assert json.loads(text, parse_constant=pytest.fail) == {
    "a": "nan",
    "b": ["inf", "-inf"],
    "c": 3,
    "d": [True, None],
  }


def test_metrics_log_drops_later_steps_and_a_torn_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  log = MetricsLog(path)
  for step in range(1, 6):
    log.write({"step": step, "loss": 1 / step})
  log.write({"step": 5, "text": "line separator \u2028 and next line \x85 are no line ends"})
  log.close()
  with path.open("a") as f:
    f.write('{"step": 6, "lo')
  assert [r["step"] for r in read_records(path)] == [1, 2, 3, 4, 5, 5]

  log = MetricsLog(path, keep_to=5)
  assert log.records[-1]["text"].startswith("line separator")
  log.close()
  log = MetricsLog(path, keep_to=3)
  log.write({"step": 4, "loss": 0.5})
  log.close()
  assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 0.5)]
  assert MetricsLog(path).records == [] and path.read_text() == ""


def test_records_survive_a_full_disk(tmp_path, monkeypatch):
  path = tmp_path / "metrics.jsonl"
  log = MetricsLog(path)
  log.write({"step": 1})

  class Full(io.FileIO):
    def write(self, data):
      super().write(data[:10])
      raise OSError(errno.ENOSPC, "No space left on device")

  def no_room(path, text):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(metrics.io, "FileIO", Full)
  log = MetricsLog(path, keep_to=1)
  monkeypatch.setattr(metrics.files, "write_text", no_room)
  for step in (2, 3):
    with pytest.raises(OSError, match="No space"):
      log.write({"step": step, "loss": 0.5})
  assert [r["step"] for r in read_records(path)] == [1]
  monkeypatch.undo()
  log.write({"step": 4})
  log.write({"step": 5})
  assert [r["step"] for r in read_records(path)] == [1, 2, 3, 4, 5]


def test_meter_leaves_pauses_out_and_the_first_lap_of_the_totals(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  meter = Meter(tokens_per_step=100)

  def advance(seconds):
    now[0] += seconds

  meter.resume()
  advance(9)
  meter.lap(1)
  advance(2)
  meter.wait(0.5)
  meter.pause()
  advance(100)
  meter.resume()
  advance(2)
  assert meter.lap(4) == {"tokens_per_s": 100, "step_ms": 1000, "data_wait_ms": 125}
  assert meter.totals() == {"tokens_per_s": 100, "step_ms": {"p50": 1000, "p95": 1000}, "data_wait_frac": 0.125}


def test_empty_meter_has_no_figures():
  assert Meter(1).totals() == {"tokens_per_s": None, "step_ms": None, "data_wait_frac": None}


def test_numbers_for_people():
  assert [compact(x) for x in (0.5, 41234, 3.3e6, 2e15)] == ["0.5", "41.2k", "3.3M", "2P"]
  assert [duration(x) for x in (5, 130, 3723)] == ["00:05", "02:10", "1:02:03"]
  assert summary.sparkline([3.0, 2.0, 1.0]) == "█▅▁" and summary.sparkline([1.0]) == "▁"
  assert summary.sparkline([1.0, math.nan, 2.0]) == "▁ █" and summary.sparkline([]) == ""
  assert len(summary.sparkline(list(range(1000)))) == 60


def test_git_state_tells_clean_from_changed(tmp_path, monkeypatch):
  (tmp_path / "train").mkdir()
  source = tmp_path / "train" / "artifacts.py"
  source.write_text("x = 1\n")
  monkeypatch.setattr(artifacts, "__file__", str(source))
  assert artifacts.git_state() == dict.fromkeys(("commit", "branch", "dirty", "diff_sha256"))
  assert artifacts.tainted(artifacts.git_state())

  def git(*arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

  git("init", "-b", "trunk")
  assert artifacts.git_state()["commit"] is None and artifacts.tainted(artifacts.git_state())
  git("add", ".")
  git("commit", "-m", "first")
  clean = artifacts.git_state()
  assert clean["branch"] == "trunk" and len(clean["commit"]) == 40
  assert not clean["dirty"] and clean["diff_sha256"] is None and not artifacts.tainted(clean)
  source.write_text("x = 2\n")
  changed = artifacts.git_state()
  assert changed["dirty"] and changed["diff_sha256"] and artifacts.tainted(changed)


def batches_of(corpus, tok, batch_size=2, seq_len=32, val_tokens=10**6):
  return validation_batches(corpus, tok, seq_len=seq_len, batch_size=batch_size, val_tokens=val_tokens)


def test_uniform_over_the_bytes_is_eight_bits_per_byte(corpus):
  tok = bytes_tokenizer()
  counts = np.where(tok.token_bytes > 0, 10**12, 0)
  score = validate.unigram_score(counts, batches_of(corpus, tok), tok)
  assert score.bits_per_byte == pytest.approx(8, abs=1e-6)
  # The first token of the split is no target; every other byte is scored, and no bos.
  assert score.bytes == score.tokens == sum(len(t.encode()) for t in TEXTS[90:])
  counts[:] = 1
  assert validate.unigram_score(counts, batches_of(corpus, tok), tok).bits_per_byte > 8.04


def test_two_tokenizers_with_equal_nats_have_equal_bits_per_byte(corpus):
  nats = 1234.5
  scores = []
  for tok in (bytes_tokenizer(), train_bpe(TEXTS, 300)):
    score = validate.unigram_score(np.zeros(tok.vocab_size, np.int64), batches_of(corpus, tok), tok)
    scores.append(score._replace(nats=nats))
  assert scores[0].tokens > 1.1 * scores[1].tokens
  assert scores[0].bits_per_byte == scores[1].bits_per_byte
  assert scores[0].nats_per_token != scores[1].nats_per_token


def test_unigram_counts_are_those_of_the_training_split_and_bounded(corpus):
  tok = bytes_tokenizer()
  counts = validate.unigram_counts(corpus, tok, seed=0)
  expected = np.bincount(np.concatenate(tok.encode_batch(TEXTS[:90])), minlength=tok.vocab_size)
  assert np.array_equal(counts, expected)
  assert 500 <= validate.unigram_counts(corpus, tok, seed=0, max_tokens=500).sum() < counts.sum()
  informed = validate.unigram_score(counts, batches_of(corpus, tok), tok).bits_per_byte
  ignorant = validate.unigram_score(np.zeros_like(counts), batches_of(corpus, tok), tok).bits_per_byte
  assert informed < 0.75 * ignorant


def test_validation_does_not_depend_on_the_batch_size_and_repeats_exactly(corpus):
  tok = bytes_tokenizer()
  cfg = GPTConfig(vocab_size=tok.vocab_size, seq_len=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
  params = jax.tree.map(
    lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), gpt.init(jax.random.key(0), cfg)
  )
  scores = [validate.score(params, batches_of(corpus, tok, b), tok, cfg) for b in (2, 8, 8)]
  assert scores[1] == scores[2]
  assert scores[0][1:] == scores[1][1:]
  assert scores[0].bits_per_byte == pytest.approx(scores[1].bits_per_byte, rel=1e-5)
  other = validate.score(params, batches_of(corpus, tok, 8, val_tokens=500), tok, cfg)
  assert other.bits_per_byte != pytest.approx(scores[1].bits_per_byte, rel=1e-5)


@pytest.fixture(scope="module")
def healthy():
  cfg = GPTConfig(
    vocab_size=50, seq_len=8, n_layer=3, n_head=2, n_kv_head=2, n_embd=8, attention="standard,standard(window=2)*2"
  )
  params = jax.tree.map(lambda p: p + 0.1, gpt.init(jax.random.key(0), cfg))
  tokens = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
  return cfg, params, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def test_diagnosis_names_the_first_bad_layer(healthy):
  cfg, params, batch = healthy
  run = params["runs"][1]
  broken = {**run, "mlp": {**run["mlp"], "w_in": run["mlp"]["w_in"].at[1].mul(np.nan)}}
  found = nonfinite.diagnose({**params, "runs": (params["runs"][0], broken)}, batch, cfg)
  assert found["where"].startswith("layer 2 (standard(window=2))")
  rows = {row["path"]: row for row in found["arrays"]}
  bad = rows["parameter/runs/1/mlp/w_in"]
  assert bad["nan"] == bad["shape"][1] * bad["shape"][2] and bad["inf"] == 0 and bad["mean"] is not None
  assert rows["parameter/runs/0/mlp/w_in"]["nan"] == 0
  assert rows["layer 2"]["nan"] > 0


def test_diagnosis_of_a_bad_embedding_and_of_healthy_parameters(healthy):
  cfg, params, batch = healthy
  bad = {**params, "embed": params["embed"].at[int(batch["tokens"][0, 0])].set(np.inf)}
  assert "embedding" in nonfinite.diagnose(bad, batch, cfg)["where"]
  assert nonfinite.diagnose(params, batch, cfg)["where"].startswith("loss and gradient of the batch are finite")
