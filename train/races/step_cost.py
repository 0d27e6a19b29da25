"""What a training step costs with each optimizer, against AdamW, and against what was counted beforehand.

Steps run interleaved in one process: within a round every optimizer makes one, so drift of the machine cancels. Counted
are matrix products alone: a gradient is three times the forward pass, on top come Newton-Schulz iterations or curvature
products. A measured ratio far above the counted one is work that the count leaves out, e.g. passes over memory; that
of `hoss_hidden` lies below, because its products are counted as if they went through the embedding and the head.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mgr_jax import optim, params, schedules
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.step import gradient_flops, init_train_state, make_train_step, optimizer_flops
from train import bench

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
  "adamw": ("adamw", {}),
  "sgd": ("sgd", {}),
  "muon": ("muon", {}),
  "muon, ns5": ("muon", {"muon_ns": "ns5"}),
  "hoss": ("hoss", {}),
  "hoss, rank 4": ("hoss", {"hoss_rank": 4}),
  "hoss, 1/8 of the batch": ("hoss", {"hoss_hvp_frac": 1 / 8}),
  "hoss, hessian": ("hoss", {"hoss_curvature": "hessian"}),
  "hoss_hidden": ("hoss_hidden", {}),
}
BASELINE = "adamw"


def run(batch_size: int, rounds: int, say: Callable[[str], Any] = print, **fields) -> dict[str, Any]:
  """One row per arm: median milliseconds, measured and counted ratio to the baseline.

  Args:
    fields: of `GPTConfig`; as many key/value heads as query heads.

  Raises:
    UserError: a model that cannot be built.
  """
  cfg = GPTConfig(**fields, n_kv_head=fields["n_head"])
  tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch_size, cfg.seq_len + 1)).astype(np.int32)
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  schedule = schedules.make_schedule("constant", rounds + 10)
  programs = {}
  for arm, (name, settings) in ARMS.items():
    optimizer = optim.make_optimizer(name, gpt.specs(cfg), cfg, **settings)
    products = optim.curvature(name, **settings)
    step = make_train_step(cfg, optimizer, schedule, grad_clip=0.0 if products else 1.0, products=products)
    # A head away from zero, where most gradients would vanish and curvature with them.
    init = lambda optimizer=optimizer: init_train_state(cfg, optimizer, schedule, 0)
    state = jax.jit(init)()
    state = state.replace(params=jax.tree.map(lambda p: p + 0.02, state.params))
    say(f"compiling {arm}")
    programs[arm] = bench.stepping(step, state, batch)
  seconds = bench.interleaved(programs, rounds)
  rows = []
  for arm, (name, settings) in ARMS.items():
    gradient = gradient_flops(cfg, batch_size)
    counted = 1 + optimizer_flops(name, cfg, batch_size, **settings) / gradient
    measured = float(np.median(seconds[arm] / seconds[BASELINE]))
    ms = 1e3 * float(np.median(seconds[arm]))
    row = {"optimizer": arm, "ms": ms, "ratio": measured, "counted": counted}
    rows.append(row | {"measured/counted": measured / counted})
  return {"parameters": params.count(gpt.specs(cfg)), "rows": rows}


def report(result: dict[str, Any]) -> str:
  lines = [f"{'optimizer':<26}{'ms per step':>12}{'ratio':>8}{'counted':>9}{'measured/counted':>18}"]
  for row in result["rows"]:
    cells = f"{row['ms']:>12.1f}{row['ratio']:>8.3f}{row['counted']:>9.3f}{row['measured/counted']:>18.2f}"
    lines.append(f"{row['optimizer']:<26}{cells}")
  return "\n".join(lines)
