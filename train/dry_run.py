"""What a run would need, found out without training: parameters, FLOPs, memory, time, the largest batch that fits."""

import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.model import gpt
from mgr_jax.step import init_train_state
from train.console import compact, duration, table
from train.parallel import peak_bytes
from train.plan import Plan, make_optimizer, make_schedule, make_step

CPU_FLOPS_LIMIT = 1e12  # FLOPs of a step above which a CPU would not finish the timed ones within a minute or so
TIMED_STEPS = 3
GIB = 2**30


def report(plan: Plan) -> str:
  """Parameters by role, budget, and measured memory and time where the step can be compiled and run here.

  Nothing is allocated before it is known to fit. Three compilations: the step, and the gradient of two micro-batch
  sizes, from which the largest that fits is extrapolated.
  """
  settings, n = plan.settings, plan.placement.n_devices
  state_bytes = _state_bytes(plan)
  flops = plan.flops_per_token * plan.tokens_per_step + plan.optimizer_flops
  limit, limit_name = memory_limit()
  roles = plan.parameters
  each = " on each device" if n > 1 else ""
  lines = [
    table(("parameters", "number"), [*roles.items(), ("all", sum(roles.values()))]),
    "",
    f"tokens per step   {plan.tokens_per_step} ({settings.batch_size} x {settings.seq_len})",
    f"FLOPs             {compact(plan.flops_per_token)} per token, {compact(flops)} per step,"
    f" {compact(flops * plan.steps)} in all (analytic)",
    f"planned steps     {plan.steps}, {compact(plan.steps * plan.tokens_per_step)} tokens",
    f"devices           {n}{f' ({plan.placement})' if n > 1 else ''}",
    f"training state    {state_bytes / GIB:.3f} GiB{each} (parameters, optimizer, schedule)",
  ]
  if state_bytes > limit:
    lines.append(f"does not fit: the training state alone exceeds the {limit / GIB:.1f} GiB of {limit_name}")
    return "\n".join(lines)
  if jax.default_backend() == "cpu" and flops > CPU_FLOPS_LIMIT:
    why = (
      f"one step is {compact(flops)} FLOPs, more than the {compact(CPU_FLOPS_LIMIT)} that a CPU does in reasonable time"
    )
    lines.append(f"not compiled and not timed: {why}; run this on the accelerator")
    return "\n".join(lines)

  start = time.perf_counter()
  compiled = _compile(plan, settings.grad_accum, settings.batch_size)
  lines.append(f"compile time      {time.perf_counter() - start:.1f} s")
  peak = peak_bytes(compiled)
  micro = settings.batch_size // settings.grad_accum
  largest = largest_micro_batch(plan, limit)
  verdict = "fits" if peak <= limit else "does not fit"
  lines.append(f"peak memory       {peak / GIB:.3f} GiB{each}: {verdict} in the {limit / GIB:.1f} GiB of {limit_name}")
  lines.append(f"micro-batch       {micro}; about {largest} is the largest that fits")
  if peak <= limit and largest >= 1:
    seconds = _time_step(plan, compiled)
    share = plan.utilisation(seconds)
    used = f" {100 * share:.1f}% model FLOPs utilisation," if share else ""
    lines.append(
      f"time              {1e3 * seconds:.0f} ms per step, {compact(plan.tokens_per_step / seconds)} tok/s,{used}"
      f" {duration(seconds * plan.steps)} for the steps"
    )
  return "\n".join(lines)


def memory_limit() -> tuple[int, str]:
  """Bytes one device can hold, and what to call it: an accelerator's own limit, or its share of a machine's memory."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"], device.device_kind
  of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  n = jax.local_device_count()
  return of_machine // n, "this machine" if n == 1 else f"this machine, shared by {n} devices"


def largest_micro_batch(plan: Plan, limit: int) -> int:
  """The largest micro-batch whose compiled step stays within `limit` bytes a device, taking memory as linear in it."""
  n = plan.placement.n_devices
  micro = plan.settings.batch_size // plan.settings.grad_accum // n
  small, big = (max(1, micro // 2), micro) if micro > 1 else (1, 2)
  used = [peak_bytes(_compile(plan, 1, n * rows)) for rows in (small, big)]
  per_row = max(1.0, (used[1] - used[0]) / (big - small))
  return n * max(0, int(small + (limit - used[0]) // per_row))


def _step_and_init(plan: Plan, grad_accum: int):
  settings = plan.settings
  optimizer = make_optimizer(settings, gpt.specs(plan.cfg), plan.cfg, plan.placement)
  schedule = make_schedule(settings, plan.steps)
  step = make_step(settings, plan.cfg, optimizer, schedule, plan.steps, grad_accum, plan.placement)
  return step, lambda: init_train_state(plan.cfg, optimizer, schedule, settings.seed)


def _compile(plan: Plan, grad_accum: int, rows: int):
  """The step for an update of `rows` sequences, from shapes alone."""
  step, init = _step_and_init(plan, grad_accum)
  specs, shape = gpt.specs(plan.cfg), jax.ShapeDtypeStruct((rows, plan.cfg.seq_len), jnp.int32)
  inputs = dict.fromkeys(plan.inputs, shape)
  return plan.placement.compile(step, plan.placement.abstract(init, specs), inputs, specs)


def _state_bytes(plan: Plan) -> int:
  """Of the training state on one device."""
  _, init = _step_and_init(plan, 1)
  total = 0
  for leaf in jax.tree.leaves(plan.placement.abstract(init, gpt.specs(plan.cfg))):
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      total += math.prod(shape) * leaf.dtype.itemsize
  return total


def _time_step(plan: Plan, compiled) -> float:
  """Mean seconds of `TIMED_STEPS` steps on dummy data, after one that is not counted."""
  _, init = _step_and_init(plan, plan.settings.grad_accum)
  state = plan.placement.init(init, gpt.specs(plan.cfg))
  shape = plan.settings.batch_size // jax.process_count(), plan.cfg.seq_len
  batch = plan.placement.put(dict.fromkeys(plan.inputs, np.ones(shape, np.int32)))
  state, _ = compiled(state, batch)
  jax.block_until_ready(state)
  start = time.perf_counter()
  for _ in range(TIMED_STEPS):
    state, _ = compiled(state, batch)
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / TIMED_STEPS
