"""Benchmarks. `python -m train.bench speed` times every mechanism against softmax attention, interleaved in one run.

`python -m train.bench dominance` measures which of depth, width and data to double next (`train/dominance/program.py`);
`throughput`, `overhead`, `optimizers`, `step`, `stiff` and `regime` are races with verdicts (`train/races/program.py`).

Forward, forward+backward, decode and compile time, and compiled temporary memory, of the whole model. Ratios are
medians over rounds in which every candidate runs once, so drift of the machine cancels. Nothing is asserted about time.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mgr_jax.attention import attention_names, model_problems
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.problems import Problem, UserError, raise_if_any
from train import cli, plain
from train.parallel import peak_bytes
from train.races import program as races

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
  "attention", None, "Attention pattern to time; repeatable. Default: every registered mechanism.", flag_values=FLAGS
)
flags.DEFINE_multi_integer("seq_len", [256], "Context; repeatable: adds a log-log slope over T.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "Sequences.", flag_values=FLAGS)
flags.DEFINE_integer("n_layer", 4, "Layers.", flag_values=FLAGS)
flags.DEFINE_integer("n_head", 4, "Query heads.", flag_values=FLAGS)
flags.DEFINE_integer("n_kv_head", 0, "Key/value heads; 0 means n_head.", flag_values=FLAGS)
flags.DEFINE_integer("n_embd", 128, "Width.", flag_values=FLAGS)
flags.DEFINE_integer("vocab_size", 4096, "Vocabulary.", flag_values=FLAGS)
flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "Activation dtype.", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 20, "Timed rounds after warm-up.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("json", "", "Write the rows to this file.", flag_values=FLAGS)

BASELINE, PLAIN = "standard", "plain"
PLAIN_LIMIT = 2048  # its T×T scores of every layer would fill the memory


class Program(NamedTuple):
  """A compiled program with its arguments, how long it took to trace and compile, and what it needs on one device:
  temporaries alone, and all that is alive while it runs."""

  run: Callable[[], Any]
  compile_s: float
  temp_bytes: int
  peak_bytes: int


def compiled(f: Callable, *args) -> Program:
  """Traces and compiles `f` for `args`, and runs it once."""
  start = time.perf_counter()
  program = jax.jit(f).lower(*args).compile()
  seconds = time.perf_counter() - start
  jax.block_until_ready(program(*args))
  return Program(lambda: program(*args), seconds, program.memory_analysis().temp_size_in_bytes, peak_bytes(program))


def stepping(step: Callable, state, batch, compile_step: Callable | None = None) -> Program:
  """`step(state, batch) -> (state, metrics)` as a program that goes on from its own last state; states are donated.

  `compile_step(step, state)` compiles it for several devices.
  """
  start = time.perf_counter()
  compiled_step = compile_step(step, state) if compile_step else step.lower(state, batch).compile()
  seconds, held = time.perf_counter() - start, [state]

  def run():
    held[0], metrics = compiled_step(held[0], batch)
    return metrics["loss"], jax.tree.leaves(held[0].params)[0]

  jax.block_until_ready(run())
  return Program(run, seconds, compiled_step.memory_analysis().temp_size_in_bytes, peak_bytes(compiled_step))


def interleaved(programs: dict[str, Program], rounds: int) -> dict[str, np.ndarray]:
  """Seconds of each program in each round; within a round every program runs once."""
  seconds = {name: np.zeros(rounds) for name in programs}
  for i in range(rounds):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program.run())
      seconds[name][i] = time.perf_counter() - start
  return seconds


def programs_of(cfg: GPTConfig, batch_size: int, model: str = "gpt") -> dict[str, Program]:
  """The forward, forward+backward and decode programs of one configuration; `plain` has no decode."""
  key = jax.random.key(0)
  # Away from the zero initialisation, so that no subnormal or exactly zero arithmetic makes a candidate look fast.
  params = jax.tree.map(lambda p: p + 0.02, gpt.init(key, cfg))
  tokens = jax.random.randint(key, (batch_size, cfg.seq_len + 1), 0, cfg.vocab_size)
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  loss = (lambda p, b: plain.loss(p, b, cfg)) if model == PLAIN else (lambda p, b: gpt.loss(p, b, cfg)[0])
  programs = {"fwd": compiled(loss, params, batch), "fwd_bwd": compiled(jax.value_and_grad(loss), params, batch)}
  if model != PLAIN:
    state = gpt.init_state(cfg, batch_size, cfg.seq_len)
    state = state.replace(length_B=jnp.full_like(state.length_B, cfg.seq_len - 1))
    programs["decode"] = compiled(lambda p, t, s: gpt.decode(p, t, s, cfg), params, tokens[:, :1], state)
  return programs


def speed(candidates: dict[str, GPTConfig], batch_size: int, rounds: int) -> list[dict[str, Any]]:
  """Rows of the speed table; `candidates` maps names to configurations of one shape and contains `standard`."""
  rows = {name: {"attention": name, "seq_len": cfg.seq_len} for name, cfg in candidates.items()}
  programs = {name: programs_of(cfg, batch_size, model=name) for name, cfg in candidates.items()}
  for kind in ("fwd", "fwd_bwd", "decode"):
    group = {name: p[kind] for name, p in programs.items() if kind in p}
    seconds = interleaved(group, rounds)
    for name, values in seconds.items():
      rows[name][f"{kind}_ms"] = round(1e3 * statistics.median(values), 4)
      rows[name][f"{kind}_ratio"] = round(float(np.median(values / seconds[BASELINE])), 4)
  for name, p in programs.items():
    rows[name]["compile_s"] = round(sum(program.compile_s for program in p.values()), 2)
    rows[name]["temp_bytes"] = p["fwd_bwd"].temp_bytes
  return list(rows.values())


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
  """Least-squares slope of log fwd+bwd time over log T per candidate; 1 is linear."""
  found = {}
  for name in dict.fromkeys(row["attention"] for row in rows):
    points = [(np.log(r["seq_len"]), np.log(r["fwd_bwd_ms"])) for r in rows if r["attention"] == name]
    if len(points) > 1:
      found[name] = round(float(np.polyfit(*zip(*points, strict=True), 1)[0]), 3)
  return found


def machine() -> dict[str, Any]:
  """What the numbers were taken on."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "backend": device.platform,
    "cpus": os.cpu_count(),
    "platform": platform.platform(),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


COLUMNS = (
  ("attention", "attention", "{:<24}"),
  ("seq_len", "T", "{:>6}"),
  ("fwd_ms", "fwd ms", "{:>9.2f}"),
  ("fwd_ratio", "ratio", "{:>6.2f}"),
  ("fwd_bwd_ms", "fwd+bwd ms", "{:>10.2f}"),
  ("fwd_bwd_ratio", "ratio", "{:>6.2f}"),
  ("decode_ms", "decode ms", "{:>9.2f}"),
  ("decode_ratio", "ratio", "{:>6.2f}"),
  ("compile_s", "compile s", "{:>9.1f}"),
  ("temp_bytes", "temp MB", "{:>8.1f}"),
)


def table(rows: list[dict[str, Any]]) -> str:
  """Aligned text; a missing value is a dash."""

  def cell(form: str, key: str, row: dict[str, Any]) -> str:
    value = row.get(key)
    text_form = form.split(".")[0].rstrip("f}") + "}"
    return text_form.format("-") if value is None else form.format(value / 1e6 if key == "temp_bytes" else value)

  header = " ".join((form.split(".")[0].rstrip("f}") + "}").format(title) for _, title, form in COLUMNS)
  return "\n".join([header, *(" ".join(cell(form, key, row) for key, _, form in COLUMNS) for row in rows)])


def checked(patterns: Iterable[str], **fields) -> dict[str, GPTConfig]:
  """One configuration per attention pattern. Raises `UserError` with the problems of all of them."""
  defaults = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
  candidates = [SimpleNamespace(**(defaults | fields | {"attention": pattern})) for pattern in patterns]
  raise_if_any(dict.fromkeys(problem for c in candidates for problem in model_problems(c)))
  return {pattern: GPTConfig(**fields, attention=pattern) for pattern in patterns}


def configurations(seq_len: int) -> dict[str, GPTConfig]:
  """The configurations that the flags ask for, `standard` and `plain` first. Raises `UserError` with all problems."""
  patterns = dict.fromkeys([BASELINE, *(FLAGS.attention or attention_names())])
  fields = {name: getattr(FLAGS, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "compute_dtype")}
  fields |= {"n_kv_head": FLAGS.n_kv_head or FLAGS.n_head, "seq_len": seq_len}
  configs = checked(patterns, **fields)
  if seq_len <= PLAIN_LIMIT and FLAGS.compute_dtype == "float32" and fields["n_head"] == fields["n_kv_head"]:
    configs[PLAIN] = configs[BASELINE]
  return configs


def main(argv: list[str]) -> int:
  """The benchmark `speed`; the others have flags of their own, see `program`."""
  if argv[1:] != ["speed"]:
    what = f"unknown benchmark {argv[1]!r}" if len(argv) > 1 else "no benchmark named"
    others = ", ".join(["dominance", *races.RACES])
    raise UserError(Problem(what, f"python -m train.bench speed, or instead of speed one of {others}"))
  if FLAGS.batch_size < 1:
    raise UserError(Problem(f"--batch_size={FLAGS.batch_size} is not positive", "use --batch_size=8"))
  if FLAGS.json and not os.path.isdir(os.path.dirname(os.path.abspath(FLAGS.json))):
    raise UserError(Problem(f"--json={FLAGS.json}: its folder does not exist", "create the folder first"))
  lengths = sorted(set(FLAGS.seq_len))
  candidates = [configurations(T) for T in lengths]
  rows = [row for group in candidates for row in speed(group, FLAGS.batch_size, FLAGS.rounds)]
  scaling = slopes(rows)
  print(table(rows))
  for name, slope in scaling.items():
    print(f"{name:<24} fwd+bwd time grows as T^{slope:.2f}")
  if FLAGS.json:
    shape = {name: getattr(FLAGS, name) for name in ("batch_size", "n_layer", "n_head", "n_embd", "vocab_size")}
    with open(FLAGS.json, "w", encoding="utf-8") as f:
      json.dump({"machine": machine(), "shape": shape, "rows": rows, "slopes": scaling}, f, indent=2, allow_nan=False)
  return 0


def program(argv: list[str]) -> tuple[Callable[[list[str]], int], flags.FlagValues]:
  """The main function and the flags of the benchmark that a command line names."""
  for name in argv[1:]:
    if name in races.RACES:
      return races.program(name)
    if name == "dominance":
      from train.dominance import program as dominance

      return dominance.main, dominance.FLAGS
  return main, FLAGS


if __name__ == "__main__":
  cli.run(*program(sys.argv), max_args=1)
