"""Whole training steps of every mechanism at the size of a real run: tokens per second, utilisation, memory.

The defaults are the model of `configs/base_124m.cfg` and an update that fits one accelerator. Every mechanism takes its
steps in turns with `standard`, so that drift of the machine cancels in the ratio. Memory is the compiled step's own
account of one device: state, batch and temporaries. Model FLOPs utilisation counts the matrix products of a gradient
with nothing recomputed, and no optimizer; it is left out where the peak of the device is not known.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax import optim, params, schedules
from mgr_jax.attention import attention_names
from mgr_jax.config import GPTConfig
from mgr_jax.flops import peak_flops
from mgr_jax.model import gpt
from mgr_jax.problems import Problem, UserError
from mgr_jax.step import gradient_flops, init_train_state, make_train_step, model_flops
from train import bench
from train.parallel import Placement, make_placement

BASELINE, LIBRARY = "standard", "standard(impl=cudnn)"
CPU_LIMIT = 1e12  # FLOPs of a step above which a CPU would take minutes for the steps of one mechanism
# What the project sets itself on one H100: (attention, T) -> at least this utilisation; T -> at most this ratio.
GOAL_UTILISATION, GOAL_RATIO, LONG, AHEAD_WHEN_LONG = 0.35, 2.0, 8192, ("tropical", "ultrametric")


def run(
  attention: Sequence[str],
  seq_len: Sequence[int],
  tokens: int,
  rounds: int,
  optimizer: str,
  say: Callable[[str], Any] = print,
  **fields,
) -> dict[str, Any]:
  """One row per attention and context length, with `error` in place of measurements where a step does not run.

  Args:
    attention: patterns; none for every mechanism, with cuDNN's attention beside them on a GPU.
    seq_len: context lengths; an update has `tokens` tokens at each of them.
    fields: of `GPTConfig`; as many key/value heads as query heads.

  Raises:
    UserError: a model that cannot be built, an update that cannot be cut into sequences, or one too large for a CPU.
  """
  library = [LIBRARY] if jax.default_backend() == "gpu" and fields["compute_dtype"] == "bfloat16" else []
  patterns = list(dict.fromkeys([BASELINE, *(attention or [*library, *attention_names()])]))
  for T in seq_len:
    if T < 1 or tokens % T:
      what = f"--tokens={tokens} are no whole sequences of --seq_len={T}"
      raise UserError(Problem(what, f"use --tokens={max(1, tokens // max(1, T)) * max(1, T)}"))
  fields["n_kv_head"] = fields["n_head"]
  configs = {T: bench.checked(patterns, **fields, seq_len=T) for T in dict.fromkeys(seq_len)}
  _refuse_on_cpu([cfg for group in configs.values() for cfg in group.values()], tokens)
  rows = []
  for T, group in configs.items():
    placement = make_placement("auto", "", tokens // T)
    baseline = _program(group[BASELINE], tokens, optimizer, placement)
    if baseline is None:
      what = f"{BASELINE} at T={T} does not fit the device's memory"
      raise UserError(Problem(what, f"use --tokens={max(T, tokens // 2)} or fewer"))
    for name, cfg in group.items():
      say(f"{name}, T={T}")
      row = {"attention": name, "seq_len": T, "parameters": params.count(gpt.specs(cfg))}
      program = baseline if name == BASELINE else _program(cfg, tokens, optimizer, placement)
      fits = program is not None
      rows.append(row | (_times(cfg, program, baseline, tokens, rounds) if fits else {"error": "out of memory"}))
  return {"devices": jax.device_count(), "rows": rows, "goals": goals(rows)}


def _refuse_on_cpu(configs: Sequence[GPTConfig], tokens: int) -> None:
  flops = max(gradient_flops(cfg, tokens // cfg.seq_len) for cfg in configs)
  if jax.default_backend() == "cpu" and flops > CPU_LIMIT:
    fix = "run this on an accelerator, or try e.g. --n_layer=2 --n_head=2 --n_embd=64 --seq_len=128 --tokens=1024"
    raise UserError(Problem(f"a step of {flops:.1e} FLOPs would take minutes on a CPU", fix))


def _program(cfg: GPTConfig, tokens: int, optimizer: str, placement: Placement) -> bench.Program | None:
  """A step that has run once; None where it runs out of memory."""
  rows, specs = tokens // cfg.seq_len, gpt.specs(cfg)
  products = optim.curvature(optimizer)
  transform = optim.make_optimizer(optimizer, specs, cfg, owners=placement.owners)
  schedule = schedules.make_schedule("constant", 1000)
  clip, axis = 0.0 if products else 1.0, placement.axis_name
  step = make_train_step(cfg, transform, schedule, grad_clip=clip, products=products, axis_name=axis)

  def init():
    state = init_train_state(cfg, transform, schedule, 0)
    # Away from the zero initialisation: exact zeros are cheaper than numbers.
    return state.replace(params=jax.tree.map(lambda p: p + 0.02, state.params))

  drawn = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, cfg.seq_len + 1)).astype(np.int32)
  inputs = dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((rows, cfg.seq_len), jnp.int32))
  try:
    state = placement.init(init, specs)
    batch = placement.put({"tokens": drawn[:, :-1], "targets": drawn[:, 1:]})
    return bench.stepping(step, state, batch, lambda step, state: placement.compile(step, state, inputs, specs))
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return None


def _times(cfg: GPTConfig, program: bench.Program, baseline: bench.Program, tokens: int, rounds: int) -> dict[str, Any]:
  seconds = bench.interleaved({BASELINE: baseline, cfg.attention: program}, rounds)
  median = statistics.median(seconds[cfg.attention])
  peak = peak_flops(jax.devices()[0].device_kind, cfg.compute_dtype)
  return {
    "step_ms": 1e3 * median,
    "ratio": float(np.median(seconds[cfg.attention] / seconds[BASELINE])),
    "tokens_per_s": tokens / median,
    "mfu": model_flops(cfg) * tokens / (median * jax.device_count() * peak) if peak else None,
    "peak_bytes": program.peak_bytes,
    "compile_s": program.compile_s,
  }


def goals(rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
  """Each goal that the rows can judge, and whether it is met."""
  found = []
  for row in rows:
    name, T = row["attention"], row["seq_len"]
    if name == BASELINE and row.get("mfu"):
      what = f"{name} at T={T} uses at least {100 * GOAL_UTILISATION:.0f}% of the device"
      found.append((what, row["mfu"] >= GOAL_UTILISATION))
    elif T >= LONG and name in AHEAD_WHEN_LONG:
      found.append((f"{name} at T={T} is ahead of {BASELINE}", row.get("ratio", np.inf) < 1))
    elif name != BASELINE:
      what = f"{name} at T={T} takes at most {GOAL_RATIO:g} times the step of {BASELINE}"
      found.append((what, row.get("ratio", np.inf) <= GOAL_RATIO))
  return found


def report(result: dict[str, Any]) -> str:
  """A table, and a line for every goal that is missed."""
  titles = f"{'step ms':>10}{'ratio':>7}{'tok/s':>10}{'MFU':>7}{'peak GiB':>10}{'compile s':>11}"
  lines = [f"{'attention':<24}{'T':>6}{titles}"]
  for row in result["rows"]:
    start = f"{row['attention']:<24}{row['seq_len']:>6}"
    if "error" in row:
      lines.append(f"{start}  {row['error']}")
      continue
    mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    speed = f"{row['step_ms']:>10.1f}{row['ratio']:>7.2f}{row['tokens_per_s']:>10.0f}{mfu:>7}"
    lines.append(f"{start}{speed}{row['peak_bytes'] / 2**30:>10.2f}{row['compile_s']:>11.1f}")
  met = sum(ok for _, ok in result["goals"])
  lines += ["", f"{met} of {len(result['goals'])} goals met"]
  return "\n".join(lines + [f"missed: {what}" for what, ok in result["goals"] if not ok])
