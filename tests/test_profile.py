"""Profiler traces of chosen updates, and where compiled programs are kept."""

import dataclasses
from pathlib import Path

import jax
import pytest

from mgr_jax.model import gpt
from mgr_jax.problems import UserError
from tests.kill_resume import write_corpus
from train import loop, main, plan
from train.flags import Settings, profiled_steps
from train.metrics import read_records

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16, "batch_size": 4, "tokenizer": "bytes"}
QUIET = {"val_every": -1, "sample_every": -1, "certify": "off", "progress": "none"}


@pytest.fixture
def settings(tmp_path):
  write_corpus(tmp_path / "corpus")
  where = {"data": str(tmp_path / "corpus"), "workdir": str(tmp_path), "run_id": "a"}
  return lambda **more: Settings(**TINY, **QUIET, **where, max_steps=5, **more)


def test_chosen_updates_are_traced(settings, monkeypatch):
  traced, advance = [], loop.Trainer._advance
  monkeypatch.setattr(loop.Trainer, "_advance", lambda self: (advance(self), traced.append(self.tracing))[0])
  result = loop.run(settings(profile_steps="2:4"))
  assert traced == [False, True, True, False, False], "it begins with update 2 and ends after update 4"
  assert len([p for p in (result.directory / "profile").rglob("*") if p.name.endswith(".xplane.pb")]) == 1
  (event,) = [r for r in read_records(result.directory / "metrics.jsonl") if r.get("event") == "profile"]
  assert event["step"] == 4


def test_utilisation_is_logged_where_the_peak_is_known(settings, monkeypatch, capsys):
  assert plan.make_plan(settings()).utilisation(1.0) is None, "a CPU is not in the table"
  monkeypatch.setattr(plan, "peak_flops", lambda kind, dtype: 1e9)
  result = loop.run(dataclasses.replace(settings(), log_every=1, progress="plain"))
  cfg = plan.make_plan(settings()).cfg
  logged = [r for r in read_records(result.directory / "metrics.jsonl") if "loss" in r]
  assert len(logged) == 5
  for record in logged:
    assert record["mfu"] == pytest.approx(3 * gpt.cost(cfg).matmul * record["tokens_per_s"] / 1e9)
  assert "model FLOPs utilisation" in capsys.readouterr().out and result.summary["results"]["mfu"] > 0


def test_what_cannot_be_traced_is_refused(settings):
  assert profiled_steps(Settings()) == range(0) and profiled_steps(Settings(profile_steps="3:3")) == range(3, 4)
  for text, error in (
    ("3:2", "is not FIRST:LAST"),
    ("0:2", "is not FIRST:LAST"),
    ("7:9", "begins after the last of 5"),
  ):
    with pytest.raises(UserError, match=error):
      loop.run(settings(profile_steps=text))


def test_where_compiled_programs_go(tmp_path, monkeypatch):
  changed = {}
  monkeypatch.setattr(jax.config, "update", changed.__setitem__)
  monkeypatch.setattr(main, "cache_dir", lambda: tmp_path)
  main.cache_compiled_programs(str(tmp_path / "mine"))
  assert changed["jax_compilation_cache_dir"] == str(tmp_path / "mine") and (tmp_path / "mine").is_dir()
  changed.clear()
  main.cache_compiled_programs("none")
  assert changed == {"jax_enable_compilation_cache": False}
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"--compile_cache=.*file"):
    main.cache_compiled_programs(str(tmp_path / "file"))
  monkeypatch.setattr(main, "cache_dir", lambda: Path(tmp_path / "file"))
  changed.clear()
  main.cache_compiled_programs("auto")
  assert "jax_compilation_cache_dir" not in changed, "a home that cannot be written is no reason to stop"
