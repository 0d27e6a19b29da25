"""The training program as its users meet it: artifacts, resuming, stopping, breaking down, and mistakes."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mgr_jax.claims import claim
from mgr_jax.config import GPTConfig
from mgr_jax.data import parquet
from mgr_jax.data import tokenizer as tokenizer_lib
from mgr_jax.problems import Problem, UserError
from train import certify, cli, dry_run, loop, main
from train.flags import FIELDS, Settings, flagfile, setting_problems
from train.metrics import read_records
from train.plan import make_plan

CACHE = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.05}
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.cfg"))
WORDS = ["tropical", "braid", "quaternion", "octonion", "simplex", "fractal", "surreal", "gauge", "ordinal", "padic"]
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16, "batch_size": 4, "log_every": 1, "certify": "off"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(WORDS, 30)) + f" {i}." for i in range(80)]
  parquet.write_shard(directory / "shard_00000.parquet", texts[:64], 8)
  parquet.write_shard(directory / "shard_00001.parquet", texts[64:], 8)
  return directory


@pytest.fixture
def settings(data, tmp_path):
  """Nine tiny steps, logged one by one, in a directory of their own; no validation, no samples."""
  quiet = {"val_every": -1, "sample_every": -1}
  where = {"data": str(data), "tokenizer": "bytes", "workdir": str(tmp_path / "runs"), "run_id": "a"}
  return Settings(**TINY, **quiet, **where, max_steps=9)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
  """The runs of this file compile the same few programs again and again."""
  before = {name: getattr(jax.config, name) for name in CACHE}
  for name, value in CACHE.items():
    jax.config.update(name, value if value is not None else str(tmp_path_factory.mktemp("compiled")))
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def command_line(*arguments: str) -> int:
  return cli.execute(main.main, ["train.main", *arguments], main.FLAGS)


def records(settings: Settings) -> list[dict]:
  return read_records(Path(settings.workdir) / settings.run_id / "metrics.jsonl")


def losses(settings: Settings) -> dict[int, float]:
  """Loss by step; fails when a step is logged twice."""
  rows = [(r["step"], r["loss"]) for r in records(settings) if "loss" in r]
  assert len({s for s, _ in rows}) == len(rows)
  return dict(rows)


@contextlib.contextmanager
def after_step(monkeypatch, number: int, action):
  """Calls `action` when step `number` has been dispatched."""
  advance = loop.Trainer._advance

  def advance_and_act(self):
    advance(self)
    if self.step == number:
      action()

  with monkeypatch.context() as m:
    m.setattr(loop.Trainer, "_advance", advance_and_act)
    yield


def test_a_run_from_start_to_end(settings, capsys):
  settings = dataclasses.replace(
    settings,
    max_steps=40,
    matrix_lr=0.01,
    ckpt_every=25,
    certify="auto",
    val_every=0,
    val_tokens=256,
    sample_every=0,
    sample_prompt=("tropical ",),
  )
  result = loop.run(settings)
  out = capsys.readouterr().out
  assert (result.status, result.exit_code) == ("finished", 0)
  directory = Path(settings.workdir) / "a"
  assert result.directory == directory
  names = {p.name for p in directory.iterdir()}
  assert names == {
    "summary.json",
    "run.md",
    "metrics.jsonl",
    "config.cfg",
    "checkpoints",
    "samples.txt",
    "tokenizer.json",
  }

  logged = losses(settings)
  assert list(logged) == list(range(1, 41))
  assert logged[1] == pytest.approx(math.log(265), abs=1e-4)
  assert np.mean([logged[s] for s in range(36, 41)]) < logged[1] - 1
  for record in records(settings):
    if "loss" in record:
      assert {"step", "loss", "bpb", "lr", "grad_norm", "tokens_per_s", "data_wait_ms"} <= set(record)
      assert record["loss"] == float(np.float32(record["loss"]))
  assert records(settings)[1]["lr"] == 0.01

  summary = json.loads((directory / "summary.json").read_text(), parse_constant=pytest.fail)
  assert summary["schema_version"] == "mgr_jax.run.v1" and summary["status"] == "finished"
  assert [v["step"] for v in summary["results"]["val"]] == [0, 40]
  start, end = (v["val_bpb"] for v in summary["results"]["val"])
  assert start == pytest.approx(math.log2(265), abs=1e-4)
  assert summary["results"]["unigram_bpb"] < start and end < start
  assert summary["results"]["best"]["step"] == 40 and summary["results"]["steps_done"] == 40
  assert summary["data"]["tokens_seen"] == 40 * 64 and summary["data"]["bytes_per_token"] == 1
  assert len(summary["claims"]) == 2 and all(c["pass"] for c in summary["claims"])
  assert summary["meta"]["packages"]["jax"] == jax.__version__
  assert (directory / "samples.txt").read_text().startswith("--- step 40, prompt 'tropical '\ntropical ")
  assert "## Claims" in (directory / "run.md").read_text()
  assert sorted(p.name for p in (directory / "checkpoints").iterdir() if p.name.isdigit()) == ["25", "40"]
  for part in ("265 ids", "step 40/40 | loss", "unigram baseline", "sample: tropical ", f"--ckpt={directory}"):
    assert part in out

  assert loop.run(settings).summary == summary
  assert "nothing to do" in capsys.readouterr().out
  assert list(losses(settings)) == list(range(1, 41))

  # The stored flagfile is the same run again, under another name.
  arguments = [
    f"--flagfile={directory / 'config.cfg'}",
    f"--workdir={settings.workdir}",
    "--run_id=b",
    "--progress=none",
  ]
  assert command_line(*arguments) == 0
  again = dataclasses.replace(settings, run_id="b")
  assert losses(again) == logged
  assert "step 40/40" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("number", "step"), [(signal.SIGINT, 5), (signal.SIGTERM, 4)], ids=["between", "where all is due"]
)
def test_a_signal_saves_and_the_same_command_goes_on_bitwise(settings, number, step, monkeypatch, capsys):
  often = {"val_every": 4, "val_tokens": 256, "sample_every": 4, "ckpt_every": 4}
  whole = dataclasses.replace(settings, run_id="whole", **often)
  assert loop.run(whole).exit_code == 0
  cut = dataclasses.replace(whole, run_id="cut")
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with after_step(monkeypatch, step, lambda: os.kill(os.getpid(), number)):
    result = loop.run(cut)
  assert (result.status, result.exit_code) == ("interrupted", 130)
  assert result.summary["results"]["steps_done"] == step and list(losses(cut)) == list(range(1, step + 1))
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers

  result = loop.run(cut)
  assert result.exit_code == 0 and f"resumes at step {step}" in capsys.readouterr().out
  assert losses(cut) == losses(whole)
  validations = [[(r["step"], r["val_bpb"]) for r in records(s) if "val_bpb" in r] for s in (cut, whole)]
  assert validations[0] == validations[1] and [s for s, _ in validations[0]] == [0, 4, 8, 9]
  samples, saved = (
    [[r for r in records(s) if r.get("event") == e] for s in (cut, whole)] for e in ("sample", "checkpoint")
  )
  assert samples[0] == samples[1] and {r["step"] for r in samples[0]} == {4, 8, 9}
  assert [r["step"] for r in saved[0]] == sorted({4, step, 8, 9}) and [r["step"] for r in saved[1]] == [4, 8, 9]
  assert result.summary["results"]["loss_first"] == losses(whole)[1]
  assert result.summary["results"]["unigram_bpb"] is not None


@pytest.fixture
def interruptible():
  """Python's own SIGINT handler: a shell that starts the suite in the background has the signal ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_second_signal_stops_at_once(settings, monkeypatch, capsys, interruptible):
  def twice():
    # To this thread: two signals to the process may arrive as one.
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

  with after_step(monkeypatch, 2, twice), pytest.raises(KeyboardInterrupt):
    loop.run(settings)
  summary = json.loads((Path(settings.workdir) / "a" / "summary.json").read_text())
  assert summary["status"] == "interrupted" and not (Path(settings.workdir) / "a" / "checkpoints").exists()
  loop.run(settings)
  assert "it starts anew" in capsys.readouterr().out and list(losses(settings)) == list(range(1, 10))


def test_a_time_limit_saves_and_ends_well(settings, capsys):
  result = loop.run(dataclasses.replace(settings, max_seconds=1e-3))
  assert (result.status, result.exit_code) == ("stopped_time", 0)
  assert list(losses(settings)) == [1]
  assert "resume:" in capsys.readouterr().out
  assert loop.run(settings).status == "finished"
  assert list(losses(settings)) == list(range(1, 10))


def test_a_new_run_from_a_step_of_another_and_another_seed(settings):
  loop.run(dataclasses.replace(settings, ckpt_every=4))
  fork = dataclasses.replace(settings, run_id="fork", resume="a@4")
  assert loop.run(fork).exit_code == 0
  assert losses(fork) == {s: v for s, v in losses(settings).items() if s > 4}
  summary = json.loads((Path(settings.workdir) / "fork" / "summary.json").read_text())
  assert summary["meta"]["lineage"] == ["a"]
  assert loop.run(fork).status == "finished"
  reseeded = dataclasses.replace(fork, run_id="reseeded", seed=1, resume_strict=False)
  loop.run(reseeded)
  assert losses(reseeded)[9] != losses(fork)[9]
  with pytest.raises(UserError, match="is at step 9, but the run is planned for 9"):
    loop.run(dataclasses.replace(fork, run_id="late", resume="a@9"))


def test_one_transfer_per_log_line_after_the_next_step_is_on_its_way(settings, monkeypatch):
  fetched_at = []
  device_get = jax.device_get
  trainers = []
  compile_ = loop.Trainer.compile
  monkeypatch.setattr(loop.Trainer, "compile", lambda self: (trainers.append(self), compile_(self))[1])

  def counting(x):
    fetched_at.append(trainers[-1].step)
    return device_get(x)

  monkeypatch.setattr(loop.jax, "device_get", counting)
  quiet = dataclasses.replace(settings, log_every=4)
  monkeypatch.setattr(loop.Trainer, "_save", lambda self: None)
  loop.run(quiet)
  assert fetched_at == [2, 5, 9, 9]
  assert list(losses(quiet)) == [1, 4, 8, 9]


@pytest.mark.filterwarnings("ignore:overflow")
def test_breakdown_is_explained_and_the_batch_kept(settings, capsys):
  result = loop.run(dataclasses.replace(settings, lr_scale=1e39, log_every=10))
  assert (result.status, result.exit_code) == ("failed", 1)
  out = capsys.readouterr().out
  assert "step 1: loss and gradient of the batch are finite with these parameters" in out and "parameter/embed" in out
  assert "error: loss, gradient or update of step 1 is not finite\n  fix: " in out
  assert [r["step"] for r in records(settings) if r.get("event") == "nonfinite"] == [1]
  directory = Path(settings.workdir) / "a"
  found = json.loads((directory / "nonfinite.json").read_text(), parse_constant=pytest.fail)
  assert found["step"] == 1 and not any(row["nan"] or row["inf"] for row in found["arrays"])
  with np.load(directory / "nonfinite_batch.npz") as batch:
    assert batch["tokens"].shape == (4, 16)
  summary = json.loads((directory / "summary.json").read_text(), parse_constant=pytest.fail)
  assert summary["status"] == "failed" and "step 1" in summary["error"]


@pytest.mark.filterwarnings("ignore:overflow")
def test_skipped_updates_are_recorded_until_too_many_in_a_row(settings):
  result = loop.run(dataclasses.replace(settings, lr_scale=1e39, on_nonfinite="skip:3", log_every=7))
  assert result.exit_code == 1 and "step 3" in result.summary["error"]
  skips = [(r["step"], r["in_a_row"]) for r in records(settings) if r.get("event") == "skip"]
  assert skips == [(1, 1), (2, 2)] and result.summary["results"]["skipped_steps"] == 2


def test_a_disk_that_cannot_be_written_does_not_stop_training(settings, monkeypatch, capsys):
  full = Problem("a checkpoint could not be written: no space left", "free space on that disk")
  monkeypatch.setattr(loop.Checkpoints, "save", lambda self, *args: self.failures.append(full))
  result = loop.run(dataclasses.replace(settings, ckpt_every=4))
  assert (result.status, result.exit_code) == ("finished", 1)
  assert list(losses(settings)) == list(range(1, 10))
  assert sum(r.get("event") == "checkpoint_failed" for r in records(settings)) == 3
  assert not list(Path(settings.workdir).glob("*/checkpoints/*"))
  assert "could not be written" in capsys.readouterr().out.splitlines()[-2]
  assert "could not be written" in result.summary["error"]


def test_a_failed_claim_stops_the_run(settings, monkeypatch, capsys):
  wrong = claim("one.equals_zero", "1 = 0", lambda key, scale: 1.0, 0.0, lambda key, scale: 2.0)
  monkeypatch.setattr(certify, "claims_for", lambda cfg, level: (wrong,))
  result = loop.run(settings)
  assert (result.status, result.exit_code) == ("failed", 1) and not losses(settings)
  out = capsys.readouterr().out
  assert "one.equals_zero" in out and "error: a claim does not hold" in out
  stored = result.summary["claims"][0]
  assert not stored["pass"] and stored["control_caught"] and "residual 1 exceeds" in stored["message"]


def test_full_certification_adds_the_claims_of_the_mechanisms():
  cfg = GPTConfig(vocab_size=50, n_embd=16, n_head=2, n_kv_head=2, n_layer=2)
  levels = [[c.name for c in certify.claims_for(cfg, level)] for level in ("off", "auto", "full")]
  assert not levels[0] and set(levels[1]) < set(levels[2])


def test_accumulated_and_masked_training_runs(settings):
  hybrid = dataclasses.replace(settings, n_layer=2, attention="standard,standard(window=4)")
  result = loop.run(dataclasses.replace(hybrid, grad_accum=2, doc_mask=True))
  assert result.exit_code == 0 and losses(settings)[1] == pytest.approx(math.log(265), abs=1e-4)


# What a user can get wrong. Each case: arguments, and what the two lines must say.
MISTAKES = {
  "unknown attention": (["--attention=standrd"], ["'standrd'", "did you mean standard?"]),
  "head sizes": (["--n_embd=130", "--n_head=4"], ["--n_embd=130", "--n_embd=128 or 136"]),
  "key/value heads": (["--n_head=4", "--n_embd=32", "--n_kv_head=3"], ["--n_kv_head=3", "1, 2, 4"]),
  "unknown option": (["--attention=standard(widow=3)"], ["widow", "window"]),
  "grad_accum": (["--batch_size=6", "--grad_accum=4"], ["--grad_accum=4", "--grad_accum=3 or --batch_size=8"]),
  "two horizons": (["--max_steps=7", "--target_tokens=9"], ["--max_steps=7", "--max_steps=0"]),
  "no horizon": (["--max_steps=0"], ["--max_steps=0", "--target_tokens"]),
  "useless warmdown": (["--schedule=constant", "--warmdown_frac=0.5"], ["--warmdown_frac=0.5", "no effect"]),
  "useless val_tokens": (["--val_tokens=99"], ["--val_tokens has no effect", "--val_every=0"]),
  "unknown schedule": (["--schedule=cosin"], ["cosin", "cosine"]),
  "unknown optimizer": (["--optimizer=adam"], ["--optimizer=adam", "adamw"]),
  "on_nonfinite": (["--on_nonfinite=skip"], ["--on_nonfinite=skip", "skip:K"]),
  "missing directory": (["--data=nowhere"], ["nowhere", "train.prepare"]),
  "no tokenizer": (["--tokenizer=auto"], ["no tokenizer found", "--tokenizer=bytes"]),
  "text column": (["--text_column=body"], ["'body'", "--text_column=text"]),
  "too little data": (["--batch_size=4096"], ["4096 x 16", "--batch_size="]),
  "long prompt": (["--sample_every=0", f"--sample_prompt={'a' * 40}"], ["41 tokens", "shorter prompt"]),
  "run name": (["--run_id=../b"], ["'../b'", "--run_id=b"]),
  "workdir is a file": (["--workdir=FILE"], ["not a directory", "--workdir=DIRECTORY"]),
  "unknown flag": (["--n_layers=3"], ["--n_layers", "--n_layer"]),
  "not a number": (["--n_layer=two"], ["n_layer", "two"]),
  "no such run": (["--resume=elsewhere"], ["'elsewhere'", "neither a run id"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_with_a_fix(case, settings, tmp_path, capsys):
  arguments, parts = MISTAKES[case]
  (tmp_path / "file").write_text("")
  base = flagfile(settings).splitlines()[1:]
  arguments = [a.replace("FILE", str(tmp_path / "file" / "runs")) for a in arguments]
  assert command_line(*base, f"--workdir={tmp_path / 'runs'}", *arguments) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and "\n  fix: " in err and "Traceback" not in err
  for part in parts:
    assert part in err
  assert not (tmp_path / "runs").exists()


def test_all_mistakes_are_reported_together(settings, capsys):
  arguments = [
    a for name in ("unknown attention", "head sizes", "two horizons", "missing directory") for a in MISTAKES[name][0]
  ]
  assert command_line(*arguments, "--schedule=constant", "--warmdown_frac=0.1", "--adam_b1=2") == 2
  err = capsys.readouterr().err
  assert err.count("error: ") == err.count("  fix: ") == 6
  for part in ("standrd", "130", "--target_tokens", "nowhere", "--warmdown_frac", "--adam_b1"):
    assert part in err


def test_an_unwritable_workdir(settings, monkeypatch):
  assert not setting_problems(settings)
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  assert "is not writable" in setting_problems(settings)[0].error


def test_tensorboard_without_its_extra(settings, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  problem = setting_problems(dataclasses.replace(settings, tensorboard=True))[0]
  assert "mgr_jax[tensorboard]" in problem.fix


def test_resuming_with_something_else_lists_the_differences(settings, data, tmp_path, capsys):
  loop.run(dataclasses.replace(settings, max_seconds=1e-3))
  arguments = [*flagfile(settings).splitlines()[1:], f"--workdir={settings.workdir}", "--run_id=a"]
  assert command_line(*arguments, "--n_layer=2", "--matrix_lr=0.5") == 2
  err = capsys.readouterr().err
  assert "n_layer: 1 -> 2" in err and "matrix_lr: 0.0 -> 0.5" in err and "--resume_strict=false" in err

  assert command_line(*arguments, "--n_layer=2", "--resume_strict=false") == 2
  assert "does not fit this model" in capsys.readouterr().err

  tok = tokenizer_lib.train_bpe(["tropical braid " * 20], 270)
  tokenizer_lib.save(tok, tmp_path / "tokenizer.json")
  assert command_line(*arguments, f"--tokenizer={tmp_path / 'tokenizer.json'}") == 2
  err = capsys.readouterr().err
  assert "tokenizer" in err and tok.sha256 in err

  assert command_line(*arguments, "--resume=none") == 2
  assert "already holds a run" in capsys.readouterr().err
  assert command_line(*arguments, "--matrix_lr=0.5", "--resume_strict=false") == 0
  assert list(losses(settings)) == list(range(1, 10))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_presets_are_valid_and_can_be_planned(config, data, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(dry_run, "CPU_FLOPS_LIMIT", 0)  # compiling full-size models is what a dry run is for, not a test
  where = [f"--data={data}", "--tokenizer=bytes", f"--workdir={tmp_path / 'runs'}"]
  assert command_line(f"--flagfile={config}", *where, "--dry_run") == 0
  out = capsys.readouterr().out
  assert "planned steps" in out and "not compiled and not timed: " in out
  assert not (tmp_path / "runs").exists()


def test_a_dry_run_compiles_times_and_writes_nothing(settings, monkeypatch, capsys):
  result = loop.run(dataclasses.replace(settings, dry_run=True, grad_accum=2))
  assert (result.status, result.exit_code) == ("dry_run", 0) and not Path(settings.workdir).exists()
  out = capsys.readouterr().out
  assert "embedding" in out and ": fits in" in out and "ms per step" in out and "micro-batch       2;" in out

  monkeypatch.setattr(dry_run, "memory_limit", lambda: (600_000, "a small device"))
  loop.run(dataclasses.replace(settings, dry_run=True))
  out = capsys.readouterr().out
  assert "does not fit in the" in out and "ms per step" not in out
  monkeypatch.setattr(dry_run, "memory_limit", lambda: (1000, "a tiny device"))
  loop.run(dataclasses.replace(settings, dry_run=True))
  assert "the training state alone" in capsys.readouterr().out


def test_the_largest_micro_batch_really_fits(settings):
  plan = make_plan(settings)
  limit = 3_000_000
  largest = dry_run.largest_micro_batch(plan, limit)
  peak = lambda rows: dry_run.peak_bytes(dry_run._compile(plan, 1, rows))
  assert peak(int(0.9 * largest)) <= limit < peak(math.ceil(1.1 * largest))


def test_every_setting_has_a_flag_with_its_default():
  main.FLAGS.unparse_flags()
  main.FLAGS(["train.main"])
  for name, field in FIELDS.items():
    value = main.FLAGS[name].value
    assert (tuple(value) if isinstance(value, list) else value) == field.default
