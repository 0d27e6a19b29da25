"""The table of runs: groups, intervals, what is left out, and what a user can get wrong."""

import json
import math

import pytest

from train import cli, table
from train.flags import FIELDS


def write_run(workdir, run_id, bpb, status="finished", **settings):
  flags = {name: f.default for name, f in FIELDS.items()} | {"run_id": run_id} | settings
  summary = {
    "status": status,
    "config": {"flags": flags},
    "model": {"parameters": 1000},
    "results": {
      "val": [{"step": 0, "val_bpb": 9.0}, {"step": 5, "val_bpb": bpb}] if bpb else [],
      "tokens_per_s": 100.0 * bpb if bpb else None,
      "peak_bytes": 2**20,
    },
  }
  (workdir / run_id / "checkpoints").mkdir(parents=True)
  (workdir / run_id / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def workdir(tmp_path):
  for seed, (a, b) in enumerate([(2.0, 3.0), (2.2, 3.1), (2.4, 3.2)]):
    write_run(tmp_path, f"braid-{seed}", b, attention="braid", seed=seed, log_every=seed + 1)
    write_run(tmp_path, f"standard-{seed}", a, seed=seed)
  return tmp_path


@pytest.fixture
def run(workdir, capsys):
  def run(*arguments):
    code = cli.execute(table.main, ["table", f"--workdir={workdir}", *arguments], table.FLAGS, max_args=1000)
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return run


def test_seeds_are_averaged_and_the_best_comes_first(run):
  code, out, _ = run()
  assert code == 0
  header, _, best, worst = out.splitlines()
  assert header.startswith("| attention | seeds | val bits/byte |")
  # t(0.975, 2) = 4.302653
  assert best.startswith(f"| `standard` | 3 | 2.2000 | ±{4.302653 * 0.2 / math.sqrt(3):.4f} | 220 | 1 | 1000 |")
  assert worst.startswith("| `braid` | 3 | 3.1000 |")


def test_one_seed_has_no_interval(run):
  _, out, _ = run("standard-0", "braid-1")
  assert out.count("one seed") == 2


def test_other_settings_make_other_groups(run, workdir):
  write_run(workdir, "longer", 1.5, max_steps=400)
  _, out, _ = run()
  assert out.splitlines()[0].startswith("| attention | max_steps |")
  assert out.splitlines()[2].startswith("| `standard` | `400` | 1 | 1.5000 |")


def test_what_did_not_finish_is_named_and_not_averaged(run, workdir):
  write_run(workdir, "dead", 1.0, status="failed")
  write_run(workdir, "unmeasured", None)
  _, out, _ = run()
  assert "2.2000" in out and "1.0000" not in out
  assert out.splitlines()[-1] == "left out: dead (failed), unmeasured (finished)"
  _, out, _ = run("dead")
  assert out.startswith("no finished run")


def test_mistakes_get_a_fix(run, workdir):
  code, _, err = run("standart-0")
  assert code == 2 and "standard-0" in err
  (workdir / "standard-0" / "summary.json").write_text("{")
  code, _, err = run("standard-0")
  assert code == 2 and "no readable summary.json" in err
  code, _, err = run(f"--workdir={workdir / 'nowhere'}")
  assert code == 2 and "train one first" in err
