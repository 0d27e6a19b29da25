"""Shows each framework's mathematics: its story, its claims with their negative controls, its plots.

  python -m demos list                  what there is
  python -m demos info NAME             claims, options, papers; runs nothing
  python -m demos run NAME              story, claims, plots with --plots=DIR
  python -m demos run-all               the same for every demo, one per core at a time; plots in artifacts/demos
  python -m demos check [NAME ...]      claims only, one line each

Exit code 0 when every claim holds and every negative control is caught, 1 otherwise, 2 for a mistake in the command.
"""

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import pathlib
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from absl import flags

from demos import demo as demo_lib
from demos import parallel
from mgr_jax.claims import Claim, ClaimResult, number_text, run_claims
from mgr_jax.config import nearest
from mgr_jax.params import fold_in_name
from mgr_jax.problems import Problem, UserError
from train import cli
from train.quick_compile import compile_quickly

FLAGS = flags.FlagValues()
flags.DEFINE_integer("seed", 0, "Seed of every sampled case.", flag_values=FLAGS)
flags.DEFINE_integer("scale", 1, "Multiplies the number of sampled cases.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_boolean("x64", False, "Compute in double precision where a claim does not choose.", flag_values=FLAGS)
flags.DEFINE_string(
  "plots",
  None,
  "Write the plots into this folder, as png and pdf; empty for none. run-all has artifacts/demos.",
  flag_values=FLAGS,
)
flags.DEFINE_string("export_json", None, "Write the results to this file.", flag_values=FLAGS)
flags.DEFINE_alias("json", "export_json", flag_values=FLAGS)
flags.DEFINE_integer(
  "jobs",
  0,
  "Demos at once, each in a process of its own; 0 = one per core, at most 4, and 1 on an accelerator.",
  lower_bound=0,
  flag_values=FLAGS,
)
flags.DEFINE_integer("name_width", 0, "Least width of the column of claims.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_boolean(
  "fast_compile", True, "Compile without back-end optimisation; stories then time such programs.", flag_values=FLAGS
)
flags.DEFINE_boolean("verbose", False, "Also print each claim's statement, seconds and papers.", flag_values=FLAGS)

_PLOTS = "artifacts/demos"  # of run-all
_RUNS = ("seed", "scale", "x64", "export_json", "json", "verbose", "fast_compile", "name_width")
_COMMANDS = {
  "list": (),
  "info": (),
  "run": (*_RUNS, "plots"),
  "run-all": (*_RUNS, "plots", "jobs"),
  "check": (*_RUNS, "jobs"),
}
_USAGE = "python -m demos list | info NAME | run NAME | run-all | check [NAME ...]"
_VERDICTS = ("holds", "violated", "vacuous", "error")
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Row:
  """A claim's outcome. `crash` is the exception of a check that broke instead of answering."""

  result: ClaimResult
  crash: str = ""

  @property
  def verdict(self) -> str:
    return "error" if self.crash else self.result.verdict

  @property
  def control(self) -> str:
    if self.crash:
      return "not run"
    return "caught" if self.result.control_caught else "not caught"


def run_claim(claim: Claim, key: jax.Array, scale: int) -> Row:
  """Runs one claim; a check that breaks becomes a row of its own, so the others still run."""
  start = time.perf_counter()
  try:
    return Row(run_claims([claim], key, scale)[0])
  except Exception as e:
    message = f"{claim.name}: {_first_line(e)}"
    seconds = time.perf_counter() - start
    result = ClaimResult(claim.name, claim.statement, None, claim.tolerance, False, False, seconds, message)
    return Row(result, traceback.format_exc())


def main(argv: list[str]) -> int:
  quick = FLAGS.fast_compile and compile_quickly()  # before a demo is imported, lest one of them touches a device
  command, demos = _parse(argv[1:])
  if command == "list":
    return _list(demos)
  if command == "info":
    return _info(demos[0])
  plots, report = _destinations(command, demos)
  started = time.perf_counter()
  jax.config.update("jax_enable_x64", FLAGS.x64 or jax.config.jax_enable_x64)
  inside = {part for demo in demos for part in demo_lib.INSIDE.get(demo.name, ())}
  told = [demo for demo in demos if demo.name not in inside]
  jobs = min(len(told), FLAGS.jobs or parallel.default_jobs())
  if jobs > 1:
    records = _run_in_parallel(command, told, plots, jobs)
  else:
    width = max(FLAGS.name_width, _name_width(demos))
    records = [_run(demo, width, quiet=command == "check", plots=plots) for demo in demos]
  counts = Counter(claim["verdict"] for demo in records for claim in demo["claims"])
  died = [demo["name"] for demo in records if demo.get("died")]
  broken = [f"{part} of {demo['name']}" for demo in records for part in demo.get("broken", ())]
  if command == "run-all":
    _summary(records)
  tally = ", ".join(f"{counts[v]} {_painted(v, v)}" for v in _VERDICTS if counts[v]) or "no claims"
  tally += f", {_painted('died', 'error')}: {', '.join(died)}" if died else ""
  tally += f", {_painted('broken', 'error')}: {', '.join(broken)}" if broken else ""
  print(f"{'' if command == 'check' else chr(10)}{tally} in {time.perf_counter() - started:.0f} s")
  if quick and command != "check":
    print("times in the stories are of programs without back-end optimisation; --nofast_compile optimises")
  if report is not None:
    report.write_text(json.dumps(_document(command, records, counts), indent=2, allow_nan=False) + "\n")
    print(f"wrote {report}")
  return 1 if died or broken or sum(counts.values()) > counts["holds"] else 0


def _run_in_parallel(command: str, demos: Sequence[demo_lib.Demo], plots: pathlib.Path | None, jobs: int) -> list[dict]:
  """Prints every demo as its process ends, in order; returns their records, and those of demos inside of them."""
  switch = lambda name: f"--{name}={str(FLAGS[name].value).lower()}"
  common = [f"--{name}={FLAGS[name].value}" for name in ("seed", "scale")] + [
    *map(switch, ("x64", "verbose", "fast_compile")),
    f"--name_width={_name_width(demos) if command == 'check' else 0}",
  ]
  plotting = lambda demo: [f"--plots={plots}"] if plots is not None and demo.plots else []
  wanted = [(demo.name, [*common, *plotting(demo)]) for demo in demos]
  records = []
  results = parallel.run("check" if command == "check" else "run", wanted, jobs)
  for demo, (text, found) in zip(demos, results, strict=True):
    print(text, flush=True)
    records += found["demos"] if found else [{"name": demo.name, "seconds": 0, "plots": [], "claims": [], "died": True}]
  return records


def _name_width(demos: Sequence[demo_lib.Demo]) -> int:
  return max([len(claim.name) for demo in demos for claim in demo.claims], default=0)


def _summary(records: Sequence[dict]) -> None:
  """One line for each demo: claims that hold, plots, seconds."""
  width = max((len(record["name"]) for record in records), default=0)
  print()
  for record in records:
    held, all_of = sum(c["verdict"] == "holds" for c in record["claims"]), len(record["claims"])
    verdict = _painted(f"{held:3d} of {all_of:3d} hold", "holds" if held == all_of else "violated")
    pictures = f"{len(record['plots']) // 2} plot{'s' * (len(record['plots']) != 2)}"
    print(f"{record['name']:<{width}}  {verdict}  {pictures:>7}  {record['seconds']:4.0f} s".rstrip())


def _parse(words: Sequence[str]) -> tuple[str, list[demo_lib.Demo]]:
  """The command and its demos. Raises one `UserError` with every mistake in the command line."""
  if not words:
    raise UserError(Problem("no command", _USAGE))
  command, *wanted = words
  if command not in _COMMANDS:
    raise UserError(Problem(f"unknown command {command!r}", f"{nearest(command, tuple(_COMMANDS))}{_USAGE}"))
  problems = [
    Problem(f"--{name} has no effect on {command}", f"leave it out, or use it with {_users(name)}")
    for name in ("plots", *_RUNS)
    if not FLAGS[name].using_default_value and name not in _COMMANDS[command] and name != "json"
  ]
  if command in ("info", "run") and len(wanted) != 1:
    problems.append(Problem(f"{command} takes one name, got {len(wanted)}", f"python -m demos {command} braid"))
  if command in ("list", "run-all") and wanted:
    problems.append(Problem(f"{command} takes no name, got {' '.join(wanted)}", f"python -m demos {command}"))
  demos, names = [], wanted if command in ("info", "run", "check") and wanted else demo_lib.names()
  names = [demo_lib.ALIASES.get(name, name) for name in names]
  if command not in ("list", "info"):
    names = [part for name in names for part in (*demo_lib.INSIDE.get(name, ()), name)]
  for name in dict.fromkeys(names):
    try:
      demos.append(demo_lib.get(name))
    except UserError as e:
      problems += e.problems
  if problems:
    raise UserError(*problems)
  return command, demos


def _users(flag: str) -> str:
  return " or ".join(command for command, accepted in _COMMANDS.items() if flag in accepted)


def _destinations(command: str, demos: Sequence[demo_lib.Demo]) -> tuple[pathlib.Path | None, pathlib.Path | None]:
  """Where plots and results go, checked before anything runs; run-all draws unless it cannot or is told not to."""
  problems, plots, report = [], None, None
  draws = importlib.util.find_spec("matplotlib") is not None
  if FLAGS.plots:
    plots = pathlib.Path(FLAGS.plots)
    if not draws:
      problems.append(Problem("--plots needs matplotlib, which is not installed", "pip install -e '.[plot]'"))
    if not any(demo.plots for demo in demos):
      who = ", ".join(demo.name for demo in demos)
      problems.append(Problem(f"--plots has no effect: {who} draws none", "leave it out"))
  elif command == "run-all" and FLAGS.plots is None and any(demo.plots for demo in demos):
    plots = pathlib.Path(_PLOTS) if draws else None
    if not draws:
      print("no plots: they need matplotlib, pip install -e '.[plot]'")
  if plots is not None and not problems and not _makes_folder(plots):
    problems.append(Problem(f"--plots={plots} cannot be made a folder", "--plots=plots"))
  if FLAGS.export_json is not None:
    report = pathlib.Path(FLAGS.export_json)
    if report.is_dir() or not _makes_folder(report.parent):
      problems.append(Problem(f"cannot write results to {report}", "--export_json=claims.json"))
  if problems:
    raise UserError(*problems)
  return plots, report


def _makes_folder(path: pathlib.Path) -> bool:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError:
    return False
  return os.access(path, os.W_OK)


def _list(demos: Sequence[demo_lib.Demo]) -> int:
  width = max(len(demo.name) for demo in demos)
  for demo in demos:
    plots = f"{len(demo.plots)} plot{'s' * (len(demo.plots) != 1)}"
    line = f"{demo.name:<{width}}  {len(demo.claims):3d} claims  {plots:<7}  {demo.summary}"
    print(line if len(line) <= _WIDTH else line[: _WIDTH - 4] + " ...")
  told_first = "".join(f"; {name} begins with {' and '.join(parts)}" for name, parts in demo_lib.INSIDE.items())
  print("also known as: " + ", ".join(f"{alias} = {name}" for alias, name in demo_lib.ALIASES.items()) + told_first)
  return 0


def _info(demo: demo_lib.Demo) -> int:
  print(_wrapped(f"{demo.name}: {demo.summary}", ""))
  if demo.options is not None:
    fields = (f"{f.name}={f.default}" for f in dataclasses.fields(demo.options))
    _paragraph("defaults", f"{demo.name}({', '.join(fields)})")
    print("\n" + textwrap.indent(inspect.getdoc(demo.options) or "", "  "))
  print("\nclaims" if demo.claims else "\nno claims")
  for claim in demo.claims:
    print(f"  {claim.name}  (tolerance {number_text(claim.tolerance)})")
    print(_wrapped(claim.statement, "      "))
  _paragraph("plots", ", ".join(plot.__name__ for plot in demo.plots))
  _paragraph("papers", "; ".join(demo.refs))
  if demo.not_shown:
    print("\nnot shown")
    for what, why in demo.not_shown:
      print(_wrapped(f"{what}: {why}", "  ", "      "))
  return 0


def _run(demo: demo_lib.Demo, width: int, quiet: bool, plots: pathlib.Path | None) -> dict:
  """Prints one demo as it runs, claim names padded to `width`; returns its record."""
  key, started, broken = jax.random.key(FLAGS.seed), time.perf_counter(), []

  def attempt(part: str, make):
    """`make(key)`; what breaks is told, and the rest still runs."""
    try:
      return make(fold_in_name(key, demo.name if part == "story" else part))
    except Exception as e:
      broken.append(part)
      print(_wrapped(f"{_painted('error', 'error')}: {part}: {_first_line(e)}", "", "  "))
      if FLAGS.verbose:
        print(textwrap.indent(traceback.format_exc().rstrip(), "    "))
      return None

  rows = []

  def tell():
    title = _wrapped(f"{demo.name}: {demo.summary}", "")
    print(f"\n{_painted(demo.name, 'title')}{title.removeprefix(demo.name)}\n")
    story = attempt("story", demo.story)
    if story:
      print(story.strip("\n") + "\n")
    if demo.claims:
      print(f"{'claim':<{width}}  {'measured':>9}  {'tolerance':>9}  verdict   negative control")

  if not quiet and demo.timed:
    tell()
  # Most of a demo is compilation, which releases Python's lock: claims run beside the story.
  beside = ThreadPoolExecutor(1)
  try:
    found = [beside.submit(run_claim, claim, key, FLAGS.scale) for claim in demo.claims]
    if not quiet and not demo.timed:
      tell()
    for claim, row in zip(demo.claims, found, strict=True):
      rows.append(row.result())
      _print_row(rows[-1], claim, width)
  finally:
    beside.shutdown(cancel_futures=True)  # an interrupt waits for one claim, not for all
  for row in rows:
    if row.verdict != "holds":
      replay = f"python -m demos run {demo.name} --seed={FLAGS.seed} --scale={FLAGS.scale} --verbose"
      print(_wrapped(f"{row.verdict}: {row.result.message}", "", "  "))
      print(f"  replay: {replay}")
  written = []
  for plot in demo.plots if plots is not None else ():
    figure = attempt(plot.__name__, plot)
    if figure is None:
      continue
    for suffix in ("png", "pdf"):
      path = plots / f"{demo.name}_{plot.__name__}.{suffix}"
      figure.savefig(path, dpi=200)
      written.append(str(path))
    print(f"wrote {written[-2]} and .pdf")
  seconds = round(time.perf_counter() - started, 1)
  claims = [_record(row) for row in rows]
  return {"name": demo.name, "seconds": seconds, "plots": written, "claims": claims, "broken": broken}


def _first_line(e: Exception) -> str:
  return f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"


def _print_row(row: Row, claim: Claim, width: int) -> None:
  result = row.result
  numbers = f"{number_text(result.residual):>9}  {number_text(result.tolerance):>9}"
  verdict = _painted(f"{row.verdict:<8}", row.verdict)
  control = _painted(row.control, "holds" if row.control == "caught" else "violated")
  print(f"{result.name:<{width}}  {numbers}  {verdict}  {control}", flush=True)
  if FLAGS.verbose:
    print(_wrapped(result.statement, "    "))
    print(_wrapped("; ".join((f"{result.seconds:.1f} s", *claim.refs)), "    "))
    if row.crash:
      print(textwrap.indent(row.crash.rstrip(), "    "))


def _document(command: str, records: Sequence[dict], counts: Counter) -> dict:
  """The results as strict JSON; a residual that was not measured, or is not finite, is null."""
  return {
    "command": command,
    "seed": FLAGS.seed,
    "scale": FLAGS.scale,
    "jax": jax.__version__,
    "backend": jax.default_backend(),
    "counts": {verdict: counts[verdict] for verdict in _VERDICTS},
    "demos": list(records),
  }


def _record(row: Row) -> dict:
  result = row.result
  finite = result.residual is not None and math.isfinite(result.residual)
  return {
    "claim": result.name,
    "statement": result.statement,
    "measured": result.residual if finite else None,
    "tolerance": result.tolerance if math.isfinite(result.tolerance) else None,
    "verdict": row.verdict,
    "negative_control": row.control,
    "seconds": round(result.seconds, 3),
    "message": result.message,
  }


def _paragraph(title: str, text: str) -> None:
  if text:
    print(f"\n{title}\n{_wrapped(text, '  ')}")


def _wrapped(text: str, first: str, rest: str | None = None) -> str:
  return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=first if rest is None else rest)


def _painted(text: str, role: str) -> str:
  """Colour on a terminal only: green for what holds, red for the rest, bold for titles."""
  if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
    return text
  code = {"holds": "32", "title": "1"}.get(role, "31")
  return f"\033[{code}m{text}\033[0m"


if __name__ == "__main__":
  cli.run(main, FLAGS, max_args=1000)
