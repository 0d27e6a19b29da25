"""One table of several runs, grouped by the settings in which they differ; seeds of one group become mean and interval.

  python -m train.table                       # all finished runs of artifacts/
  python -m train.table standard-1 standard-2 braid-1 braid-2

The table is Markdown. Runs that did not finish are named below it, never averaged.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from mgr_jax.problems import Problem, UserError
from train import cli
from train.artifacts import RunDirectory
from train.experiments.verdict import interval
from train.identity import MAY_DIFFER
from train.runs import find_run

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "artifacts", "Directory that holds the runs.", flag_values=FLAGS)

# The horizon and the data decide the result, although a resumed run may change them.
DECIDING = ("max_steps", "target_tokens", "data", "tokenizer")


class Run(NamedTuple):
  """One run, from its `summary.json`: its id, how it ended, the settings that decide its result, and results."""

  run_id: str
  status: str
  settings: dict[str, Any]
  results: dict[str, Any]
  parameters: int


def read(path: Path) -> Run:
  """The run in a directory.

  Raises:
    UserError: it has no readable summary.
  """
  directory = RunDirectory(path.parent, path.name)
  summary = directory.read_summary()
  if not summary:
    raise UserError(Problem(f"{path} has no readable summary.json", "name runs that python -m train.main has made"))
  given = summary["config"]["flags"]
  settings = {name: value for name, value in given.items() if name not in MAY_DIFFER or name in DECIDING}
  return Run(path.name, summary["status"], settings, summary["results"], summary["model"]["parameters"])


def markdown(runs: Sequence[Run]) -> str:
  """The table of finished runs, best mean first."""
  finished = [run for run in runs if run.status == "finished" and run.results["val"]]
  names = [n for n in (finished[0].settings if finished else ()) if n != "seed" and _differs(finished, n)]
  groups: dict[tuple, list[Run]] = {}
  for run in finished:
    groups.setdefault(tuple(str(run.settings.get(n)) for n in names), []).append(run)
  header = [*names, "seeds", "val bits/byte", "95% interval", "tok/s", "step MiB", "parameters"]
  rows = sorted((_row(label, group) for label, group in groups.items()), key=lambda row: row[0])
  lines = [header, ["---"] * len(header), *(cells for _, cells in rows)]
  text = (
    "\n".join("| " + " | ".join(cells) + " |" for cells in lines) if groups else "no finished run with a validation"
  )
  left_out = [f"{run.run_id} ({run.status})" for run in runs if run not in finished]
  return text + ("\n\nleft out: " + ", ".join(left_out) if left_out else "")


def _differs(runs: Sequence[Run], name: str) -> bool:
  return len({str(run.settings.get(name)) for run in runs}) > 1


def _row(label: tuple[str, ...], group: Sequence[Run]) -> tuple[float, list[str]]:
  """Sort key and cells of one group; speed and memory are means."""
  last = interval([float(run.results["val"][-1]["val_bpb"]) for run in group])
  mean = lambda name: sum(float(run.results[name] or math.nan) for run in group) / len(group)
  half = f"±{last.half:.4f}" if math.isfinite(last.half) else "one seed"
  sizes = sorted({run.parameters for run in group})
  cells = [
    str(len(group)),
    f"{last.mean:.4f}",
    half,
    f"{mean('tokens_per_s'):.0f}",
    f"{mean('peak_bytes') / 2**20:.0f}",
  ]
  return last.mean, [*(f"`{part}`" for part in label), *cells, ", ".join(map(str, sizes))]


def main(argv: list[str]) -> int:
  """Prints the table of the named runs, or of all."""
  workdir = Path(FLAGS.workdir).expanduser()
  if argv[1:]:
    paths = [find_run(name, workdir)[0] for name in argv[1:]]
  else:
    paths = sorted(path.parent for path in workdir.glob("*/summary.json"))
  if not paths:
    raise UserError(Problem(f"there are no runs in {workdir.absolute()}", "train one first: python -m train.main"))
  print(markdown([read(path) for path in paths]))
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS, max_args=1000)
