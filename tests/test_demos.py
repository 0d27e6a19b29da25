import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from demos import __main__ as front_end
from demos import braid as braid_demo
from demos import demo as demo_lib
from demos import parallel
from demos.demo import Demo
from mgr_jax.algebra.braid_claims import CLAIMS
from mgr_jax.attention import attention_names
from mgr_jax.claims import claim
from mgr_jax.problems import UserError
from train import cli


def program(*args):
  """Runs the program in this process; returns its exit code."""
  return cli.execute(front_end.main, ["demos", *args], front_end.FLAGS, max_args=1000)


def planted(name="planted.law", residual=0.0, broken=1.0, tolerance=1e-6):
  return claim(
    name, f"{name} is at most {tolerance}", lambda k, s: residual, tolerance, lambda k, s: broken, ("Me 2020",)
  )


def crashing(key, scale):
  raise ZeroDivisionError("the check itself is wrong")


@pytest.fixture
def demos(monkeypatch):
  """Replaces all demos by those in the returned dict."""
  shown = {}

  def get(name):
    if name not in shown:
      raise UserError(demo_lib.Problem(f"no demo named {name!r}", "python -m demos list shows all"))
    return shown[name]

  monkeypatch.setattr(demo_lib, "names", lambda: tuple(shown))
  monkeypatch.setattr(demo_lib, "get", get)
  shown["planted"] = Demo("planted", "a law for tests", lambda key: "Once upon a time.", (planted(),))
  return shown


def with_claims(demos, *claims):
  demos["planted"] = dataclasses.replace(demos["planted"], claims=claims)


class TestVerdicts:
  def test_law_holds_and_control_is_caught(self, demos, capsys):
    assert program("run", "planted") == 0
    out = capsys.readouterr().out
    assert "Once upon a time." in out
    assert "holds     caught" in out

  def test_failing_claim(self, demos, capsys):
    with_claims(demos, planted(), planted("planted.failing", residual=0.5))
    for command in (("run", "planted"), ("run-all",), ("check",), ("check", "planted")):
      assert program(*command) == 1
      out = capsys.readouterr().out
      assert "violated" in out
      assert "residual 0.5 exceeds tolerance 1e-06" in out
      assert "replay: python -m demos run planted --seed=0 --scale=1" in out

  def test_control_that_passes(self, demos, capsys):
    with_claims(demos, planted(broken=0.0))
    assert program("check") == 1
    out = capsys.readouterr().out
    assert "vacuous   not caught" in out
    assert "the negative control passed the check" in out

  def test_law_and_control_that_are_both_nan(self, demos, capsys):
    with_claims(demos, planted(residual=float("nan"), broken=float("nan")))
    assert program("check") == 1
    assert "violated  caught" in capsys.readouterr().out

  def test_broken_check_is_an_error_and_the_others_still_run(self, demos, capsys):
    broken = dataclasses.replace(planted("planted.crash"), check=crashing)
    with_claims(demos, broken, planted())
    assert program("check") == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError: the check itself is wrong" in out
    assert "1 holds, 1 error" in out
    assert "Traceback" not in out
    assert program("check", "--verbose") == 1
    assert "Traceback" in capsys.readouterr().out

  def test_a_story_or_a_plot_that_breaks_is_told_and_the_claims_still_run(self, demos, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    broken = lambda key: 1 / 0
    demos["planted"] = dataclasses.replace(demos["planted"], story=broken)
    assert program("run", "planted") == 1
    out = capsys.readouterr().out
    assert "error: story: ZeroDivisionError" in out and "1 holds, broken: story of planted" in out
    demos["planted"] = dataclasses.replace(demos["planted"], story=lambda key: "", plots=(broken,))
    assert program("run", "planted", f"--plots={tmp_path}") == 1
    assert "broken: <lambda> of planted" in capsys.readouterr().out

  def test_seed_and_scale_reach_the_check(self, demos):
    seen = []
    law = dataclasses.replace(planted(), check=lambda key, scale: float(seen.append((key, scale)) or 0))
    with_claims(demos, law)
    for seed in (0, 0, 5):
      assert program("check", f"--seed={seed}", "--scale=3") == 0
    keys = [tuple(jax.random.key_data(key).tolist()) for key, _ in seen]
    assert keys[0] == keys[1] != keys[2]
    assert {scale for _, scale in seen} == {3}


class TestOutput:
  def test_table_is_aligned_and_fits_a_hundred_columns(self, demos, capsys):
    names = ("planted.a", "planted.a_law_with_a_rather_long_name_in_it")
    with_claims(demos, *(planted(name, residual=r) for name, r in zip(names, (0.0, 1.2e-9), strict=True)))
    assert program("run", "planted", "--verbose") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line for line in lines if line.endswith("  caught") or line.startswith("claim ")]
    assert len(rows) == 3
    for column in ("verdict", "negative"):
      at = rows[0].index(column)
      assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)
    assert any("Me 2020" in line for line in lines)

  def test_colour_on_a_terminal_only(self, demos, capsys, monkeypatch):
    assert program("check") == 0
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert program("check") == 0
    assert "\033[32mholds" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert program("check") == 0
    assert "\033" not in capsys.readouterr().out

  @pytest.mark.parametrize("flag", ["json", "export_json"])
  def test_results_are_strict_json(self, demos, flag, tmp_path):
    nan = planted("planted.nan", residual=float("nan"))
    with_claims(demos, planted(), nan, planted("planted.vacuous", broken=0.0, tolerance=float("inf")))
    path = tmp_path / "deep" / "claims.json"
    assert program("check", f"--{flag}={path}", "--seed=7") == 1

    def refuse(constant):
      raise AssertionError(constant)

    document = json.loads(path.read_text(), parse_constant=refuse)
    assert document["counts"] == {"holds": 1, "violated": 1, "vacuous": 1, "error": 0}
    assert document["seed"] == 7
    held, violated, vacuous = document["demos"][0]["claims"]
    assert (held["measured"], held["verdict"], held["negative_control"]) == (0.0, "holds", "caught")
    assert violated["measured"] is None
    assert (vacuous["tolerance"], vacuous["negative_control"]) == (None, "not caught")

  def test_check_prints_one_line_for_each_claim(self, demos, capsys):
    with_claims(demos, planted("planted.a"), planted("planted.b"))
    assert program("check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["planted.a", "planted.b", "2"]


class TestMistakes:
  def _refused(self, capsys, *args):
    assert program(*args) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err

  def test_unknown_name_suggests_the_nearest(self, capsys):
    err = self._refused(capsys, "run", "brade")
    assert err.splitlines() == [
      "error: no demo named 'brade'",
      "  fix: did you mean braid? python -m demos list shows all",
    ]

  def test_command_line(self, demos, capsys):
    assert "no command" in self._refused(capsys)
    assert "did you mean check?" in self._refused(capsys, "chekc")
    assert "run takes one name, got 2" in self._refused(capsys, "run", "planted", "planted")
    assert "run-all takes no name" in self._refused(capsys, "run-all", "planted")
    assert "--scale=0" in self._refused(capsys, "check", "--scale=0")

  def test_all_mistakes_are_reported_together(self, demos, capsys):
    err = self._refused(capsys, "check", "nope", "nada", "--plots=x")
    assert err.count("error:") == 3

  def test_flag_without_effect(self, demos, capsys):
    assert "--seed has no effect on list" in self._refused(capsys, "list", "--seed=3")
    err = self._refused(capsys, "check", "--plots=x")
    assert "leave it out, or use it with run or run-all" in err
    assert "planted draws none" in self._refused(capsys, "run", "planted", "--plots=x")

  def test_plots_without_matplotlib(self, demos, capsys, monkeypatch, tmp_path):
    demos["planted"] = dataclasses.replace(demos["planted"], plots=(braid_demo.closure,))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    err = self._refused(capsys, "run", "planted", f"--plots={tmp_path / 'plots'}")
    assert "fix: pip install -e '.[plot]'" in err
    assert not (tmp_path / "plots").exists()

  def test_places_that_cannot_be_written(self, demos, capsys, tmp_path):
    demos["planted"] = dataclasses.replace(demos["planted"], plots=(braid_demo.closure,))
    (tmp_path / "file").write_text("")
    err = self._refused(
      capsys, "run", "planted", f"--plots={tmp_path / 'file'}", f"--export_json={tmp_path / 'file' / 'x.json'}"
    )
    assert err.count("error:") == 2


class TestCollection:
  def test_demos_in_processes_of_their_own(self, demos, capsys, monkeypatch, tmp_path):
    """Texts come whole and in order, records are joined, and a process that dies is no success."""
    demos["second"] = dataclasses.replace(demos["planted"], name="second")

    def child(words, **settings):
      assert settings["check"] is False
      name, report = words[4], next(w for w in words if w.startswith("--export_json=")).partition("=")[2]
      if name != "dies":
        claim = {"claim": f"{name}.law", "verdict": "holds"}
        pathlib.Path(report).write_text(
          json.dumps({"demos": [{"name": name, "seconds": 2.0, "plots": [], "claims": [claim]}]})
        )
      return subprocess.CompletedProcess(words, 0, f"story of {name}\n1 holds in 0 s\nwrote {report}\n")

    monkeypatch.setattr(parallel.subprocess, "run", child)
    assert program("run-all", "--jobs=2", f"--export_json={tmp_path / 'all.json'}") == 0
    out = capsys.readouterr().out
    assert out.index("story of planted") < out.index("story of second")
    assert out.count("holds in") == 1 and "2 holds in" in out
    assert "second     1 of   1 hold  0 plots     2 s\n" in out
    written = json.loads((tmp_path / "all.json").read_text())
    assert [d["name"] for d in written["demos"]] == ["planted", "second"] and written["counts"]["holds"] == 2
    demos["dies"] = dataclasses.replace(demos["planted"], name="dies")
    assert program("run-all", "--jobs=2") == 1
    assert "died: dies" in capsys.readouterr().out

  def test_a_demo_inside_another_is_told_first_and_runs_once(self, demos, capsys, monkeypatch):
    demos["inner"] = dataclasses.replace(demos["planted"], name="inner")
    demos["outer"] = dataclasses.replace(demos["planted"], name="outer")
    monkeypatch.setattr(demo_lib, "INSIDE", {"outer": ("inner",)})
    assert program("run", "outer") == 0
    out = capsys.readouterr().out
    assert out.index("inner: ") < out.index("outer: ") and "2 holds" in out
    started = []

    def child(words, **settings):
      started.append(words[4])
      return subprocess.CompletedProcess(words, 1, "no report")

    monkeypatch.setattr(parallel.subprocess, "run", child)
    assert program("run-all", "--jobs=2") == 1
    assert sorted(started) == ["outer", "planted"]

  def test_run_all_draws_without_being_asked(self, demos, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    demos["planted"] = dataclasses.replace(demos["planted"], plots=(braid_demo.closure,))
    assert program("run-all", "--plots=") == 0
    assert not (tmp_path / "artifacts").exists()
    assert program("run-all") == 0
    assert (tmp_path / "artifacts" / "demos" / "planted_closure.png").exists()

  def test_double_precision(self, demos):
    seen = []
    law = dataclasses.replace(planted(), check=lambda key, scale: float(seen.append(jnp.ones(()).dtype) or 0))
    with_claims(demos, law)
    try:
      assert program("check", "--x64") == 0
    finally:
      jax.config.update("jax_enable_x64", False)
    assert program("check") == 0
    assert seen == [jnp.float64, jnp.float32]

  def test_other_names_of_the_frameworks(self, capsys):
    assert program("info", "knot-braid") == 0
    assert capsys.readouterr().out.startswith("braid: ")
    assert program("info", "knot-brad") == 2
    assert "did you mean knot-braid?" in capsys.readouterr().err

  def test_every_mechanism_has_a_demo(self, capsys):
    assert program("list") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert listed == sorted({*attention_names(), "braid"} | set(listed))

  def test_loading_demos_touches_no_device(self):
    """XLA reads its flags when the first device is touched; the fast compiler is one of them."""
    load = "from demos import demo; [demo.get(name).claims for name in demo.names()]; import os, jax;"
    late = "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'; print(jax.device_count())"
    devices = lambda code: (
      subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert devices(load + late) == "3\n"
    assert devices("import os, jax; jax.devices();" + late) == "1\n", "the negative control"

  def test_info_runs_nothing(self, demos, capsys):
    with_claims(demos, dataclasses.replace(planted(), check=crashing))
    assert program("info", "planted") == 0
    out = capsys.readouterr().out
    assert "planted.law is at most 1e-06" in out

  def test_info_shows_the_options_of_a_mechanism(self, capsys):
    assert program("info", "standard") == 0
    out = capsys.readouterr().out
    assert "standard(window=0" in out
    assert "impl" in out

  def test_claims_of_the_mechanism_join_once(self, monkeypatch):
    options = dataclasses.make_dataclass("Options", [], bases=(demo_lib.REGISTRY["braid"].options,), frozen=True)
    changed = {"options": options, "claims": (*CLAIMS, planted("braid.more")), "refs": ("Her 2021",)}
    record = dataclasses.replace(demo_lib.REGISTRY["braid"], **changed)
    monkeypatch.setitem(demo_lib.REGISTRY, "braid", record)
    demo = demo_lib.get("braid")
    names = [c.name for c in demo.claims]
    own = [*(c.name for c in CLAIMS), "braid.more"]
    assert names[: len(own)] == own
    assert len(set(names)) == len(names)
    assert "braid.causal_values" in names, "what every mechanism must satisfy is shown too"
    assert demo.refs[-1] == "Her 2021"
    assert demo.options is options

  def test_module_entry_point(self):
    done = subprocess.run([sys.executable, "-m", "demos", "info", "brai"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "did you mean braid?" in done.stderr

  def test_plots(self, demos, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    demos["braid"] = Demo("braid", "plots only", plots=(braid_demo.closure,))
    assert program("run", "braid", f"--plots={tmp_path}") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["braid_closure.pdf", "braid_closure.png"]
    assert (tmp_path / "braid_closure.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out
