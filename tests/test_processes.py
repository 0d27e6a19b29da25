"""Several real processes on this machine train one model: the same losses as one process, also after `kill -9`."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgr_jax.problems import Problem, UserError
from tests.kill_resume import ROOT, last_step, write_corpus
from train import cli, distributed, main
from train.metrics import read_records

# Four shards of data, so that one, two and four processes see the same batches.
MODEL = (
  "--n_layer=1",
  "--n_head=2",
  "--n_embd=16",
  "--seq_len=16",
  "--batch_size=8",
  "--tokenizer=bytes",
  "--data_shards=4",
)
OFTEN = ("--log_every=1", "--val_every=5", "--val_tokens=256", "--ckpt_every=4", "--sample_every=-1", "--certify=off")
STEPS = 40


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


class Launch:
  """`count` processes of one run; output goes to `<folder>/<run_id>-<number>.txt`, flags in `last` to the last one."""

  def __init__(self, folder: Path, run_id: str, count: int, *flags: str, last: tuple[str, ...] = ()):
    where = (f"--data={folder / 'corpus'}", f"--workdir={folder}", f"--run_id={run_id}", f"--max_steps={STEPS}")
    common = [sys.executable, "-m", "train.main", *MODEL, *OFTEN, *where, "--progress=none", *flags]
    environment = os.environ | {"MGR_BASE_DIR": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    if count > 1:
      common += [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    self.logs = [folder / f"{run_id}-{number}.txt" for number in range(count)]
    self.processes = []
    for number, log in enumerate(self.logs):
      own = [f"--process_id={number}", *(last if number == count - 1 else ())] if count > 1 else []
      with log.open("a") as file:
        started = subprocess.Popen([*common, *own], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
      self.processes.append(started)

  def wait(self) -> list[int]:
    return [p.wait(300) for p in self.processes]

  def text(self) -> str:
    return "\n".join(log.read_text() for log in self.logs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  write_corpus(folder / "corpus")
  return folder


@pytest.fixture(scope="module")
def alone(folder):
  """What one process does."""
  launch = Launch(folder, "one", 1)
  assert launch.wait() == [0], launch.text()
  return values(folder, "one")


def values(folder: Path, run_id: str) -> dict[str, list[float]]:
  """Losses and validations by step, each exactly once."""
  records = read_records(folder / run_id / "metrics.jsonl")
  losses = {r["step"]: r["loss"] for r in records if "loss" in r}
  assert sorted(losses) == [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
  return {"loss": list(losses.values()), "bpb": [r["val_bpb"] for r in records if "val_bpb" in r]}


def wait(launch: Launch, done: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 200
  while not done() and time.monotonic() < deadline:
    assert all(p.poll() is None for p in launch.processes), launch.text()
    time.sleep(0.02)


def kill_one(launch: Launch) -> None:
  launch.processes[-1].send_signal(signal.SIGKILL)
  time.sleep(0.5)
  for process in launch.processes:  # the others would wait for it until the heartbeat fails
    process.kill()
  launch.wait()


def test_killed_resumed_stopped_and_continued_by_one(folder, alone):
  """Two processes, one of them killed; both again, until a signal to one stops both; a single one does the rest."""
  launch = Launch(folder, "moved", 2)
  wait(launch, lambda: last_step(folder / "moved") >= 12)
  kill_one(launch)
  assert last_step(folder / "moved") < STEPS
  again = Launch(folder, "moved", 2)
  wait(again, lambda: "resumes at step" in again.logs[0].read_text())
  start = int(again.logs[0].read_text().split("resumes at step")[1].split()[0])
  wait(again, lambda: last_step(folder / "moved") > start)
  again.processes[1].send_signal(signal.SIGTERM)
  assert again.wait() == [130, 130], again.text()
  assert start < last_step(folder / "moved") < STEPS
  assert not any("step" in log.read_text() for log in again.logs[1:]), "process 0 alone writes"
  rest = Launch(folder, "moved", 1)
  assert rest.wait() == [0], rest.text()
  for name, found in values(folder, "moved").items():
    assert found == pytest.approx(alone[name], rel=1e-5), name


@pytest.mark.parametrize(("count", "flags"), [(2, ("--mesh=fsdp=2",)), (4, ("--mesh=data=2,fsdp=2",))])
def test_a_killed_process_and_a_resume_of_all(folder, alone, count, flags):
  run_id = f"killed-{count}"
  launch = Launch(folder, run_id, count, *flags)
  wait(launch, lambda: last_step(folder / run_id) >= 10)
  kill_one(launch)
  assert last_step(folder / run_id) < STEPS
  again = Launch(folder, run_id, count, *flags)
  assert again.wait() == [0] * count, again.text()
  assert "resumes at step" in again.logs[0].read_text()
  for name, found in values(folder, run_id).items():
    assert found == pytest.approx(alone[name], rel=1e-5), name


def test_another_number_of_data_shards_is_refused_with_a_way_out(folder, alone):
  launch = Launch(folder, "one", 1, "--data_shards=2", "--max_steps=50")
  assert launch.wait() == [2]
  assert "trained from 4 data shards, now there are 2" in launch.text()
  assert "--data_shards=4" in launch.text()


@pytest.mark.parametrize(
  ("last", "said"),
  [
    ("--workdir=elsewhere", "process 1 does not see what process 0 writes to --workdir"),
    ("--batch_size=16", "process 1: not as in process 0: --batch_size is 16 instead of 8"),
    ("--data=nowhere", "process 1: there is no directory"),
  ],
)
def test_processes_that_do_not_fit_together_all_stop(folder, last, said):
  flag, value = last.split("=")
  launch = Launch(folder, "apart", 2, last=(f"{flag}={folder / value}" if value.isalpha() else last,))
  assert launch.wait() == [2, 2], launch.text()
  assert all(said in log.read_text() for log in launch.logs)
  assert not (folder / "apart").exists() and not list(folder.glob(".seen*"))


def test_all_start_or_none(monkeypatch):
  """What other processes say is given here; real ones are slow to start."""
  others = []
  monkeypatch.setattr(distributed, "gather_json", lambda own: [own, *others])
  together = lambda step: distributed.together(lambda: step, lambda step: {"the step": step})
  others[:] = [[[], {"the step": 3}]]
  assert together(3) == 3
  others[:] = [[[], {"the step": 4}], [[], {"the step": 3}]]
  with pytest.raises(UserError, match=r"process 1: not as in process 0: the step is 4 instead of 3\n.*--workdir"):
    together(3)
  others[:] = [[[["it is broken", "mend it"]], {}]]
  with pytest.raises(UserError, match=r"process 1: it is broken\n  fix: mend it"):
    together(3)

  def broken():
    raise UserError(Problem("it is broken", "mend it"))

  with pytest.raises(UserError, match=r"^error: it is broken"):
    distributed.together(broken, lambda _: {})


def test_mistakes(monkeypatch, capsys):
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    monkeypatch.delenv(name, raising=False)
  assert cli.execute(main.main, ["train.main", "--num_processes=2"], main.FLAGS) == 2
  assert "--coordinator and --process_id of this process is not given" in capsys.readouterr().err
  with pytest.raises(UserError, match="number them from 0"):
    distributed.start("localhost:1", 2, 2)
  distributed.start("", 0, -1)
  assert distributed.leads() and distributed.largest(3) == 3 and distributed.gather_json({"a": 1}) == [{"a": 1}]
