"""Optimizers on text: steps and seconds to one validation loss, each with its own tuned learning rate.

Every arm tries the same six factors of its rates, half a decade apart, on a seed of its own, and keeps the one with the
least validation loss at the end; then it runs on all seeds, whose data and initial weights the arms share. The target
is what the tuned baseline reaches, on average, after half of its steps, so that it exists whatever the size. Seconds
are steps times the time of a step, which is measured interleaved with the others after the runs.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax import optim, schedules
from mgr_jax.config import GPTConfig, nearest
from mgr_jax.data import tokenizer as tokenizer_lib
from mgr_jax.data.builtin import builtin_corpus
from mgr_jax.data.corpus import load_corpus
from mgr_jax.data.stream import train_iterator, validation_batches
from mgr_jax.model import gpt
from mgr_jax.problems import Problem, raise_if_any
from mgr_jax.step import init_train_state, make_train_step
from train import bench
from train.experiments.training import scaled
from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED, interval

BASELINE = "adamw"
TUNING_SEED = 1_000_003
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Arm:
  """An optimizer with settings; tuning multiplies its learning rates, or its macro time, by each of `FACTORS`."""

  optimizer: str
  settings: tuple[tuple[str, Any], ...] = ()


ARMS = {
  "adamw": Arm("adamw"),
  "muon": Arm("muon"),
  "muon-ns5": Arm("muon", (("muon_ns", "ns5"),)),
  "hoss": Arm("hoss"),
  "hoss-adam": Arm("hoss", (("hoss_metric", "adam"), ("matrix_lr", 0.01))),
  "hoss_hidden": Arm("hoss_hidden"),
  "sgd": Arm("sgd"),
}


@dataclasses.dataclass(frozen=True)
class Size:
  """Model, batch and length of every run; `every`: steps between validations; `val_tokens`: of each."""

  cfg: GPTConfig
  batch_size: int
  steps: int
  every: int
  val_tokens: int


def default_size(steps: int) -> Size:
  """Two layers, 64 wide, 128 bytes of context."""
  vocab = tokenizer_lib.resolve("bytes", None).vocab_size
  cfg = GPTConfig(vocab_size=vocab, seq_len=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
  return Size(cfg, batch_size=8, steps=steps, every=max(1, steps // 30), val_tokens=8192)


def batches(size: Size, seed: int) -> np.ndarray:
  """The training windows of one seed, int32 [steps, B, T + 1]."""
  corpus, tok = load_corpus(builtin_corpus()), tokenizer_lib.resolve("bytes", None)
  shape = {"seq_len": size.cfg.seq_len, "batch_size": size.batch_size}
  with train_iterator(corpus, tok, seed=seed, threads=0, **shape) as stream:
    found = [next(stream) for _ in range(size.steps)]
  return np.stack([np.concatenate([b["tokens"], b["targets"][:, -1:]], axis=1) for b in found])


def held_out(size: Size) -> dict[str, np.ndarray]:
  """Validation windows, stacked: tokens, targets int32 [n, B, T] and weights float32."""
  corpus, tok = load_corpus(builtin_corpus()), tokenizer_lib.resolve("bytes", None)
  found = validation_batches(corpus, tok, seq_len=size.cfg.seq_len, batch_size=64, val_tokens=size.val_tokens)
  return {name: np.stack([b[name] for b in found]) for name in ("tokens", "targets", "weights")}


def training(arm: Arm, size: Size, schedule):
  """`init(seed) -> state` and the jitted `step(state, batch)` of an arm; gradients are clipped at 1 but for HOSS."""
  cfg, settings = size.cfg, dict(arm.settings)
  optimizer = optim.make_optimizer(arm.optimizer, gpt.specs(cfg), cfg, **settings)
  products = optim.curvature(arm.optimizer, **settings)
  clip = 0.0 if products else 1.0
  step = make_train_step(cfg, optimizer, schedule, total_steps=size.steps, grad_clip=clip, products=products)
  return lambda seed: init_train_state(cfg, optimizer, schedule, seed), step


def make_run(arm: Arm, size: Size):
  """`run(seed, factor, windows, val) -> validation loss [steps / every]`, nats per byte, to be jitted."""

  def validate(params, val):
    nll = lambda b: (jnp.sum(gpt.nll(params, b, size.cfg) * b["weights"]), jnp.sum(b["weights"]))
    nats, weight = jax.lax.map(nll, val)
    return jnp.sum(nats) / jnp.sum(weight)

  def run(seed, factor, windows, val):
    init, step = training(arm, size, scaled(schedules.make_schedule("wsd", size.steps), factor))

    def body(state, window):
      state, _ = step(state, {"tokens": window[:, :-1], "targets": window[:, 1:]})
      return state, None

    def stretch(state, some):
      state, _ = jax.lax.scan(body, state, some)
      return state, validate(state.params, val)

    grouped = windows[: size.steps // size.every * size.every].reshape(-1, size.every, *windows.shape[1:])
    return jax.lax.scan(stretch, init(seed), grouped)[1]

  return run


def run(seeds: int, steps: int, arms: Sequence[str] = (), say: Callable[[str], Any] = print) -> dict[str, Any]:
  """Tunes and races every arm, then times the steps of all. An arm that diverges has infinite losses.

  Args:
    arms: names in `ARMS`, empty for all; the baseline always runs.

  Raises:
    UserError: an arm that does not exist.
  """
  unknown = [name for name in arms if name not in ARMS]
  raise_if_any(
    Problem(f"--arms: unknown arm {name!r}", f"{nearest(name, tuple(ARMS))}arms: {', '.join(ARMS)}") for name in unknown
  )
  arms = [name for name in ARMS if name == BASELINE or not arms or name in arms]
  size = default_size(steps)
  val = jax.device_put(held_out(size))
  data = {seed: jax.device_put(batches(size, seed)) for seed in (TUNING_SEED, *range(seeds))}
  found, programs = {}, {}
  for name in arms:
    began = time.perf_counter()
    arm = ARMS[name]
    program = jax.jit(make_run(arm, size)).lower(jnp.int32(0), jnp.float32(1), data[0], val).compile()
    curve = lambda seed, factor, program=program: np.nan_to_num(
      np.float64(program(jnp.int32(seed), jnp.float32(factor), data[seed], val)), nan=math.inf
    )
    tuning = {factor: float(curve(TUNING_SEED, factor)[-1]) for factor in FACTORS}
    best = min(tuning, key=tuning.get)
    curves = [curve(seed, best).tolist() for seed in range(seeds)]
    border = best in (min(tuning), max(tuning))
    found[name] = {"tuning": tuning, "factor": best, "at the border": border, "curves": curves}
    programs[name] = _one_step(arm, size, data[0][0])
    final = ", ".join(f"{c[-1]:.3f}" for c in curves)
    say(f"{name:<20} factor {best:g}, final {final} nats per byte ({time.perf_counter() - began:.0f} s)")
  seconds = bench.interleaved(programs, 15)
  for name in arms:
    found[name]["step_ms"] = 1e3 * float(np.median(seconds[name]))
    found[name]["step_ratio"] = float(np.median(seconds[name] / seconds[BASELINE]))
  return {"steps": size.steps, "every": size.every, "arms": found} | judged(found, size)


def _one_step(arm: Arm, size: Size, window) -> bench.Program:
  """One compiled step, repeated on one batch from the initial state."""
  init, step = training(arm, size, schedules.make_schedule("constant", size.steps))
  return bench.stepping(step, jax.jit(init, static_argnums=0)(0), {"tokens": window[:, :-1], "targets": window[:, 1:]})


def judged(found: dict[str, Any], size: Size) -> dict[str, Any]:
  """The target, the steps to it, and verdicts for every arm: is it there before the baseline, in steps and in seconds,
  and is its loss lower at the end?

  Supported or not supported when the 95% interval over paired seeds of log2(arm / baseline) lies below or above 0;
  an arm that never arrives on some seed is not there before.
  """
  curves = {name: np.asarray(row["curves"]) for name, row in found.items()}
  middle = size.steps // size.every // 2 - 1
  target = float(curves[BASELINE][:, middle].mean())
  steps = {name: _steps_to(c, target, size.every) for name, c in curves.items()}
  verdicts = []
  for name in found:
    if name == BASELINE:
      continue
    a, b = np.asarray(steps[name]), np.asarray(steps[BASELINE])
    compared = {
      f"{name} needs fewer steps than {BASELINE}": a / b,
      f"{name} needs fewer seconds than {BASELINE}": found[name]["step_ratio"] * a / b,
      f"{name} ends at a lower loss than {BASELINE}": curves[name][:, -1] / curves[BASELINE][:, -1],
    }
    verdicts += [{"claim": claim} | _verdict(np.log2(ratios)) for claim, ratios in compared.items()]
  return {"target": target, "steps_to_target": steps, "verdicts": verdicts}


def _steps_to(curves, target: float, every: int) -> list[float]:
  """The first validation at or below the target, in steps, per seed; infinite if there is none."""
  reached = curves <= target
  return [float(every * (np.argmax(row) + 1)) if row.any() else math.inf for row in reached]


def _verdict(log_ratios) -> dict[str, Any]:
  if not np.all(np.isfinite(log_ratios)):
    return {"word": REFUTED, "why": "not on every seed", "ratio": math.inf}
  found = interval(log_ratios)
  word = SUPPORTED if found.high < 0 else REFUTED if found.low > 0 else INCONCLUSIVE
  ratio, low, high = (2**x for x in (found.mean, found.low, found.high))
  return {"word": word, "why": f"ratio {ratio:.2f} [{low:.2f}, {high:.2f}]", "ratio": ratio}


def report(result: dict[str, Any]) -> str:
  """One row per arm, then the verdicts."""
  titles = f"{'arm':<20}{'factor':>8}{'final loss':>12}{'steps to target':>24}{'ms/step':>9}{'ratio':>7}{'seconds':>10}"
  half = f"tuned {BASELINE} after half of {result['steps']} steps, mean over seeds"
  lines = [f"target {result['target']:.3f} nats per byte: {half}", titles]
  for name, row in result["arms"].items():
    steps = result["steps_to_target"][name]
    shown = " ".join("never" if math.isinf(s) else f"{s:.0f}" for s in steps)
    mean = np.mean(steps)
    seconds = "never" if math.isinf(mean) else f"{mean * row['step_ms'] / 1e3:.2f}"
    final = np.mean([c[-1] for c in row["curves"]])
    border = "*" if row["at the border"] else " "
    head = f"{name:<20}{row['factor']:>7g}{border}{final:>12.3f}{shown:>24}"
    lines.append(f"{head}{row['step_ms']:>9.1f}{row['step_ratio']:>7.2f}{seconds:>10}")
  lines.append("* the best factor is the least or the largest that was tried")
  for v in result["verdicts"]:
    lines.append(f"{v['word']:<14} {v['claim']} ({v['why']})")
  return "\n".join(lines)
