"""The benchmarks of scale at toy size: whole steps of every mechanism, and what a run adds to its steps."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mgr_jax.attention import attention_names
from mgr_jax.step import model_flops
from train import bench, cli
from train.journal import Journal
from train.races import overhead, program, throughput
from train.signals import StopSignals

SMALL = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=128", "--tokens=64", "--rounds=2")
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16, "batch_size": 2, "tokenizer": "bytes"}


def command(name: str, *args: str) -> int:
  main, flags = program.program(name)
  return cli.execute(main, ["bench", name, *args], flags, max_args=1)


def test_whole_steps_are_timed_beside_the_baseline(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(throughput, "peak_flops", lambda kind, dtype: {"bfloat16": 1e9}[dtype])
  path = tmp_path / "rows.json"
  assert command("throughput", *SMALL, "--attention=braid", "--seq_len=16", f"--json={path}") == 0
  found = json.loads(path.read_text())
  rows = {(row["attention"], row["seq_len"]): row for row in found["rows"]}
  assert list(rows) == [("standard", 16), ("braid", 16)]
  for (name, T), row in rows.items():
    assert (row["ratio"] == 1.0) == (name == "standard")
    assert row["tokens_per_s"] == pytest.approx(64e3 / row["step_ms"])
    fields = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "vocab_size": 128, "compute_dtype": "bfloat16"}
    (cfg,) = bench.checked([name], **fields, seq_len=T).values()
    assert row["mfu"] == pytest.approx(model_flops(cfg) * row["tokens_per_s"] / 1e9)
    assert row["peak_bytes"] > 12 * row["parameters"], "parameters and two moments, at least"
  out = capsys.readouterr().out
  assert "goals met" in out and "standard at T=16 uses at least 35%" in str(found["goals"])


def test_every_mechanism_is_timed_unless_some_are_named(monkeypatch):
  timed = []
  monkeypatch.setattr(throughput, "_program", lambda cfg, *_: timed.append(cfg.attention) or True)
  monkeypatch.setattr(throughput, "_times", lambda *_: {"mfu": None})
  fields = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 128, "compute_dtype": "float32"}
  throughput.run((), (16,), 64, 1, "adamw", say=lambda text: None, **fields)
  assert sorted(timed) == sorted(attention_names())


def test_what_does_not_fit_is_told_and_the_rest_is_measured(monkeypatch, capsys):
  stepping, asked = bench.stepping, []

  def short_of_memory(step, state, batch, compile_step):
    asked.append(state)
    if len(asked) == 2:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
    return stepping(step, state, batch, compile_step)

  monkeypatch.setattr(bench, "stepping", short_of_memory)
  arms = ("--attention=braid", "--attention=standard(window=4)", "--seq_len=16", "--compute_dtype=float32")
  assert command("throughput", *SMALL, *arms) == 0
  out = capsys.readouterr().out
  assert "braid                       16  out of memory" in out
  assert "missed: braid at T=16 takes at most 2 times" in out and "standard(window=4)" in out


def test_goals():
  def row(name, T, ratio=1.0, mfu=None):
    return {"attention": name, "seq_len": T, "ratio": ratio, "mfu": mfu}

  rows = [row("standard", 1024, mfu=0.3), row("braid", 1024, 2.1), row("gauge", 1024, 1.9), row("tropical", 8192, 1.2)]
  assert [met for _, met in throughput.goals(rows)] == [False, False, True, False]
  better = [row("standard", 1024, mfu=0.4), row("tropical", 8192, 0.9)]
  assert [met for _, met in throughput.goals(better)] == [True, True]
  assert throughput.goals([row("standard", 1024)]) == [], "a device without known peak is not judged"
  assert [met for _, met in throughput.goals([{"attention": "braid", "seq_len": 16, "error": "out of memory"}])] == [
    False
  ]


@pytest.mark.parametrize(
  ("args", "error", "fix"),
  [
    ((), "would take minutes on a CPU", "on an accelerator"),
    ((*SMALL, "--seq_len=48"), "no whole sequences of --seq_len=48", "--tokens=48"),
    ((*SMALL, "--seq_len=16", "--attention=standart"), "standart", "did you mean standard"),
    ((*SMALL, "--seq_len=16", "--n_embd=17"), "not divisible", "--n_embd="),
    ((*SMALL, "--seq_len=16", "--compute_dtype=float8"), "float8", "bfloat16"),
    ((*SMALL, "--seq_len=16", "--optimizer=adam"), "adam", "adamw"),
  ],
)
def test_mistakes_get_an_error_and_a_fix(args, error, fix, capsys):
  assert command("throughput", *args) == 2
  err = capsys.readouterr().err
  assert error in err and fix in err.split("fix:", 1)[1]


def test_the_benchmark_needs_no_data_libraries():
  """It runs on machines that have jax, flax and optax alone."""
  missing = ("grain", "orbax", "tokenizers", "pyarrow", "huggingface_hub", "tqdm", "matplotlib")
  code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import train.bench, train.races.throughput"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_overhead_of_a_slow_journal_is_seen(monkeypatch, capsys):
  monkeypatch.setattr(overhead, "LOG_EVERY", 2)
  monkeypatch.setattr(overhead, "SAVE_EVERY", 4)
  monkeypatch.setattr(overhead, "ARMS", {name: overhead.ARMS[name] for name in ("all off", "all on", "data")})
  log_step = Journal.log_step
  monkeypatch.setattr(Journal, "log_step", lambda *args: (time.sleep(0.2), log_step(*args)))
  result = overhead.run(4, 2, say=print, **TINY)
  by_arm = {row["arm"]: row["overhead"] for row in result["rows"]}
  assert list(by_arm) == ["all off", "all on", "data"] and by_arm["all off"] == 0
  assert by_arm["all on"] > max(1, 2 * by_arm["data"])
  assert "data" in overhead.report(result) and "round 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("mean", "half", "word"),
  [(0.01, 0.02, "supported"), (0.2, 0.1, "not supported"), (0.04, 0.02, "inconclusive"), (0.0, np.inf, "inconclusive")],
)
def test_the_interval_decides(mean, half, word):
  assert overhead.verdict({"overhead": mean, "half": half}) == word


def test_switching_off_does_what_it_says(tmp_path, monkeypatch):
  for name in ("checkpoints", "data"):
    arm = overhead.ARMS[name]
    monkeypatch.setattr(overhead, "SAVE_EVERY", 2)
    trainer, batches = overhead._trainer(tmp_path, name, arm, 3, 1, TINY)
    trainer.take_steps(StopSignals(), until=3)
    trainer.checkpoints.close()
    assert bool(trainer.checkpoints.steps()) == arm.checkpoints
    assert (trainer.batches is batches) == arm.data
    first, second = next(trainer.batches), next(trainer.batches)
    assert (first["tokens"] == second["tokens"]).all() == (not arm.data)
    assert trainer.plan.settings.log_every == (overhead.LOG_EVERY if arm.logging else overhead.NEVER)
    trainer.journal.close()
    batches.close()
