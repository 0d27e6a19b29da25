"""Training steps on several placements of forced host devices; prints what was measured as JSON.

`python -m tests.parallel_program '[["losses", {"optimizer": "adamw", "kind": "pmap", "mesh": "data=4"}], ...]'`
"""

import contextlib
import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax import optim, schedules
from mgr_jax.config import GPTConfig, parse_attention
from mgr_jax.fitting import windows
from mgr_jax.model import gpt
from mgr_jax.step import init_train_state, make_train_step
from train import parallel
from train.quick_compile import compile_quickly

STEPS, ROWS = 20, 8
CFG = GPTConfig(vocab_size=97, seq_len=16, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, loss_chunk=16)
# Twenty steps at larger rates multiply a difference in the last bit by hundreds, on one device too.
SETTINGS = {"lr_scale": 0.1}
HOSS = {"hoss_hvp_frac": 0.5, "hoss_rank": 2, "hoss_noise": "krylov", "hoss_temperature": 1e-6}
SENDS = re.compile(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def configuration(attention: str) -> GPTConfig:
  return dataclasses.replace(CFG, attention=attention, n_layer=len(parse_attention(attention)))


def compiled(cfg, optimizer, placement, axis):
  """The compiled step and its initial state."""
  settings = SETTINGS | (HOSS if optimizer.startswith("hoss") else {})
  products, specs = optim.curvature(optimizer, **settings), gpt.specs(cfg)
  transform = optim.make_optimizer(optimizer, specs, cfg, owners=placement.owners, **settings)
  schedule = schedules.make_schedule("ordinal", STEPS, ord_patience=2)
  step = make_train_step(cfg, transform, schedule, total_steps=STEPS, products=products, axis_name=axis)
  state = placement.init(lambda: init_train_state(cfg, transform, schedule, 0), specs)
  shape = jax.ShapeDtypeStruct((ROWS, cfg.seq_len), jnp.int32)
  return placement.compile(step, state, {"tokens": shape, "targets": shape}, specs), state


def losses(optimizer="adamw", kind="single", mesh="", broken=False, attention="standard", steps=STEPS) -> list[float]:
  """The loss of every step, and Σ|p| of the parameters at the end; `broken` leaves out the sums over devices."""
  fraction = HOSS["hoss_hvp_frac"] if optimizer.startswith("hoss") else None
  placement = parallel.make_placement(kind, mesh, ROWS, curvature_fraction=fraction)
  step, state = compiled(configuration(attention), optimizer, placement, None if broken else placement.axis_name)
  sharded = [p for p in jax.tree.leaves(state.params) if not p.is_fully_replicated]
  assert bool(sharded) == ("fsdp" in mesh), "parameters are split over fsdp, and only there"
  found = []
  for _, batch in zip(range(steps), windows(np.arange(400) ** 2 % 97, ROWS, CFG.seq_len), strict=False):
    state, metrics = step(state, placement.put(batch))
    found.append(metrics["loss"])
  return [*map(float, found), float(sum(jnp.sum(jnp.abs(p)) for p in jax.tree.leaves(state.params)))]


def sends(attention: str, by_rows: bool = True) -> int:
  """Collectives of a data-parallel step that are no sums; `by_rows=False` leaves all to the compiler."""
  if not by_rows:
    jax.set_mesh = lambda mesh: contextlib.nullcontext()
  placement = parallel.make_placement("jit", "data=4", ROWS)
  return len(SENDS.findall(compiled(configuration(attention), "adamw", placement, None)[0].as_text()))


if __name__ == "__main__":
  compile_quickly()
  parallel.MIN_SHARDED = 128
  print(json.dumps([{"losses": losses, "sends": sends}[what](**case) for what, case in json.loads(sys.argv[1])]))
