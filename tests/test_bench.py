"""The speed benchmark at toy size: every row, every column, strict JSON."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mgr_jax.attention import attention_names
from train import bench, cli

SMALL = ["--batch_size=1", "--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=128", "--rounds=2"]


def run(*args):
  return cli.execute(bench.main, ["bench", *args], bench.FLAGS, max_args=1)


def test_every_mechanism_is_timed_unless_some_are_named():
  bench.FLAGS.unparse_flags()
  bench.FLAGS["attention"].value = None
  bench.FLAGS(["bench", *SMALL])
  assert list(bench.configurations(16)) == [*attention_names(), "plain"]
  assert "plain" not in bench.configurations(4096)


def test_speed_prints_a_table_and_writes_json(tmp_path, capsys):
  path = tmp_path / "speed.json"
  assert run("speed", *SMALL, "--attention=standard", "--seq_len=16", "--seq_len=32", f"--json={path}") == 0
  report = json.loads(path.read_text())
  names = {row["attention"] for row in report["rows"]}
  assert names == {"standard", "plain"}
  assert {row["seq_len"] for row in report["rows"]} == {16, 32}
  assert set(report["slopes"]) == names
  for row in report["rows"]:
    assert row["fwd_ms"] > 0
    assert row["fwd_bwd_ratio"] > 0
    assert row["temp_bytes"] > 0
    assert ("decode_ratio" in row) == (row["attention"] != "plain")
    if row["attention"] == "standard":
      assert row["fwd_ratio"] == row["fwd_bwd_ratio"] == row["decode_ratio"] == 1.0
  out = capsys.readouterr().out.splitlines()
  header, *rows = out[: 1 + len(report["rows"])]
  assert {len(line) for line in (header, *rows)} == {len(header)}, "columns are aligned"


@pytest.mark.parametrize(
  ("args", "part"),
  [
    (["sped"], "unknown benchmark 'sped'"),
    ([], "no benchmark named"),
    (["speed", "--n_embd=130"], "not divisible"),
    (["speed", "--attention=standart"], "did you mean standard"),
    (["speed", "--json=/nowhere/at/all.json"], "does not exist"),
    (["speed", "--batch_size=0"], "not positive"),
  ],
)
def test_mistakes_get_an_error_and_a_fix(args, part, capsys):
  assert run(*args) == 2
  err = capsys.readouterr().err
  assert part in err
  assert "fix:" in err


def test_slopes_recover_a_planted_power():
  rows = [{"attention": "a", "seq_len": T, "fwd_bwd_ms": 3.0 * T**1.5} for T in (64, 128, 512)]
  assert bench.slopes(rows) == {"a": 1.5}
  assert bench.slopes(rows[:1]) == {}


def test_interleaved_runs_every_program_in_every_round():
  order = []
  programs = {n: bench.Program(lambda n=n: order.append(n) or np.zeros(1), 0.0, 0, 0) for n in "ab"}
  seconds = bench.interleaved(programs, 3)
  assert order == ["a", "b"] * 3
  assert seconds["a"].shape == (3,)


def test_the_benchmark_needs_no_data_libraries():
  code = "import sys; sys.modules['grain'] = None; sys.modules['pyarrow'] = None; import train.bench"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
