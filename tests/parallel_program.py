"""Twenty steps of an optimizer on several placements of forced host devices; prints losses as JSON.

`python -m tests.parallel_program '[["adamw", "pmap", "data=4"], ...]'`
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax import optim, schedules
from mgr_jax.config import GPTConfig
from mgr_jax.fitting import windows
from mgr_jax.model import gpt
from mgr_jax.step import init_train_state, make_train_step
from train import parallel
from train.quick_compile import compile_quickly

STEPS, ROWS = 20, 8
CFG = GPTConfig(vocab_size=97, seq_len=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
# Twenty steps at larger rates multiply a difference in the last bit by hundreds, on one device too.
SETTINGS = {"lr_scale": 0.1}
HOSS = {"hoss_hvp_frac": 0.5, "hoss_rank": 2, "hoss_noise": "krylov", "hoss_temperature": 1e-6}


def losses(optimizer: str, kind: str, mesh: str, broken: str = "") -> list[float]:
  """The loss of every step, and Σ|p| of the parameters at the end; `broken` leaves out the sums over devices."""
  settings = SETTINGS | (HOSS if optimizer.startswith("hoss") else {})
  products = optim.curvature(optimizer, **settings)
  placement = parallel.make_placement(kind, mesh, ROWS, curvature_fraction=products and products.fraction)
  specs = gpt.specs(CFG)
  transform = optim.make_optimizer(optimizer, specs, CFG, owners=placement.owners, **settings)
  schedule = schedules.make_schedule("ordinal", STEPS, ord_patience=2)
  axis = None if broken else placement.axis_name
  step = make_train_step(CFG, transform, schedule, total_steps=STEPS, products=products, axis_name=axis)
  state = placement.init(lambda: init_train_state(CFG, transform, schedule, 0), specs)
  shape = jax.ShapeDtypeStruct((ROWS, CFG.seq_len), jnp.int32)
  compiled = placement.compile(step, state, {"tokens": shape, "targets": shape}, specs)
  sharded = [p for p in jax.tree.leaves(state.params) if not p.is_fully_replicated]
  assert bool(sharded) == ("fsdp" in mesh), "parameters are split over fsdp, and only there"
  found = []
  for _, batch in zip(range(STEPS), windows(np.arange(400) ** 2 % 97, ROWS, CFG.seq_len), strict=False):
    state, metrics = compiled(state, placement.put(batch))
    found.append(metrics["loss"])
  return [*map(float, found), float(sum(jnp.sum(jnp.abs(p)) for p in jax.tree.leaves(state.params)))]


if __name__ == "__main__":
  compile_quickly()
  parallel.MIN_SHARDED = 128
  print(json.dumps({" ".join(case).strip(): losses(*case) for case in json.loads(sys.argv[1])}))
