"""Several demos at once, each in a process of its own; their output appears whole, in order."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


def default_jobs() -> int:
  """One per core, at most 4, which bounds memory to about 6 GB; 1 on an accelerator, which one process holds."""
  return min(4, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1


def run(
  command: str, wanted: Sequence[tuple[str, Sequence[str]]], jobs: int
) -> Iterator[tuple[str, dict[str, Any] | None]]:
  """Runs `python -m demos COMMAND NAME FLAGS...` for every (name, flags), `jobs` at a time.

  Yields texts and results in order.

  The results are None when the process died without writing any; its messages are then part of the text.
  """
  with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
    yield from pool.map(lambda w: _one(command, *w, pathlib.Path(folder) / f"{w[0]}.json"), wanted)


def _one(command: str, name: str, arguments: Sequence[str], report: pathlib.Path) -> tuple[str, dict[str, Any] | None]:
  words = [sys.executable, "-m", "demos", command, name, *arguments, f"--export_json={report}"]
  done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
  # The last two lines are the tally of this one demo and the name of its report.
  lines = done.stdout.splitlines()
  if not report.exists():
    return done.stdout, None
  return "\n".join(lines[:-2]), json.loads(report.read_text())
