"""Kills a training run with SIGKILL again and again, and compares what is left with a run nobody disturbed.

  python -m tests.kill_resume --kills=20
  python -m tests.kill_resume --kills=2 --attention=tropical --optimizer=muon

Flags it does not know go to both training runs. Every other kill waits for a checkpoint that is being written, the
others for a moment without one. Afterwards the losses of both runs must be equal bit for bit, and each step must stand
in `metrics.jsonl` exactly once.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mgr_jax.data import parquet
from train.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent
STEPS_PER_KILL = 12


def write_corpus(directory: Path) -> None:
  """Two shards of generated sentences; the second is the validation split."""
  rng = random.Random(0)
  words = ["tropical", "braid", "octonion", "simplex", "fractal", "surreal", "gauge", "ordinal"]
  texts = [f"{i}: " + " ".join(rng.choices(words, k=30)) for i in range(200)]
  directory.mkdir()
  parquet.write_shard(directory / "shard_00000.parquet", texts[:180], 8)
  parquet.write_shard(directory / "shard_00001.parquet", texts[180:], 8)


def command(directory: Path, run_id: str, steps: int, flags: Sequence[str]) -> list[str]:
  """The training command of a tiny model that validates and saves every few steps."""
  model = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--seq_len=16",
    "--batch_size=4",
    "--tokenizer=bytes",
  ]
  often = ["--log_every=1", "--val_every=5", "--val_tokens=256", "--ckpt_every=4", "--sample_every=-1", "--certify=off"]
  where = [f"--data={directory / 'corpus'}", f"--workdir={directory}", f"--run_id={run_id}", f"--max_steps={steps}"]
  return [sys.executable, "-m", "train.main", *model, *often, *where, "--progress=none", *flags]


def start(arguments: list[str], directory: Path) -> subprocess.Popen:
  """Starts a run whose output goes to a log file and whose compiled programs are kept in `directory`."""
  environment = os.environ | {"MGR_BASE_DIR": str(directory / "cache")}
  with (directory / "log.txt").open("a") as log:
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def last_step(run: Path) -> int:
  return max((r["step"] for r in read_records(run / "metrics.jsonl")), default=0)


def is_saving(run: Path) -> bool:
  """A checkpoint directory that does not have its final name yet."""
  checkpoints = run / "checkpoints"
  return checkpoints.is_dir() and any(p.name.endswith(".orbax-checkpoint-tmp") for p in checkpoints.iterdir())


def kill_once(arguments: list[str], directory: Path, run: Path, rng: random.Random, while_saving: bool) -> str:
  """Starts the run and kills it some steps further on; returns what it was doing. Empty when it ended before."""
  process = start(arguments, directory)
  target = last_step(run) + rng.randint(6, STEPS_PER_KILL)
  try:
    while process.poll() is None:
      saving = is_saving(run)
      if last_step(run) >= target and saving == while_saving:
        time.sleep(rng.uniform(0, 0.02))
        saving = is_saving(run)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return f"step {last_step(run)}, {'writing a checkpoint' if saving else 'no checkpoint being written'}"
      time.sleep(0.002)
  finally:
    process.kill()
    process.wait()
  return ""


def differences(whole: list[dict], killed: list[dict]) -> list[str]:
  """What differs between the records of two runs: steps that are missing or double, losses and scores that differ."""
  found = []
  for field in ("loss", "val_bpb"):
    tables = []
    for name, records in (("undisturbed", whole), ("killed", killed)):
      rows = [(r["step"], r[field]) for r in records if field in r]
      double = [step for step, n in Counter(step for step, _ in rows).items() if n > 1]
      found += [f"{name}: {field} of step {step} stands there more than once" for step in double]
      tables.append(dict(rows))
    for step in sorted(tables[0].keys() | tables[1].keys()):
      a, b = (t.get(step, "missing") for t in tables)
      if a != b:
        found.append(f"{field} of step {step}: undisturbed {a!r}, killed {b!r}")
  return found


def experiment(directory: Path, kills: int, seed: int, flags: Sequence[str] = (), say=print) -> list[str]:
  """Runs everything in `directory`; returns the differences. Raises `RuntimeError` when a run fails by itself."""
  rng = random.Random(seed)
  steps = (kills + 1) * 2 * STEPS_PER_KILL
  write_corpus(directory / "corpus")
  undisturbed = start(command(directory, "whole", steps, flags), directory)
  arguments, run = command(directory, "killed", steps, flags), directory / "killed"
  for n in range(kills):
    killed_at = kill_once(arguments, directory, run, rng, while_saving=n % 2 == 1)
    if not killed_at:
      break
    say(f"kill {n + 1}: {killed_at}")
  else:
    n = kills
  codes = [undisturbed.wait(), start(arguments, directory).wait()]
  if codes != [0, 0] or n < kills:
    log = (directory / "log.txt").read_text()[-3000:]
    raise RuntimeError(f"{n} of {kills} kills, exit codes {codes}, end of the log:\n{log}")
  records = [read_records(directory / name / "metrics.jsonl") for name in ("whole", "killed")]
  say(f"{sum('loss' in r for r in records[1])} steps, {sum(r.get('event') == 'resume' for r in records[1])} resumed")
  return differences(*records)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  options, flags = parser.parse_known_args()
  with tempfile.TemporaryDirectory() as directory:
    found = experiment(Path(directory), options.kills, options.seed, flags)
  print("\n".join(found) or f"{' '.join(flags)}: {options.kills} kills, losses bitwise equal, each step once")
  return int(bool(found))


if __name__ == "__main__":
  sys.exit(main())
