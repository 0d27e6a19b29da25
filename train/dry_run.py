"""What a run would need, found out without training: parameters, FLOPs, memory, time, the largest batch that fits."""

import os
import time

import jax
import jax.numpy as jnp

from mgr_jax.model import gpt
from mgr_jax.step import init_train_state
from train.console import compact, duration, table
from train.plan import Plan, make_optimizer, make_schedule, make_step

CPU_FLOPS_LIMIT = 1e12  # FLOPs of a step above which a CPU would not finish the timed ones within a minute or so
TIMED_STEPS = 3
GIB = 2**30


def report(plan: Plan) -> str:
  """Parameters by role, budget, and measured memory and time where the step can be compiled and run here.

  Nothing is allocated before it is known to fit. Three compilations: the step, and the gradient of two micro-batch
  sizes, from which the largest that fits is extrapolated.
  """
  settings = plan.settings
  step, state = _abstract_step(plan, settings.grad_accum)
  state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if not _is_key(leaf))
  flops = plan.flops_per_token * plan.tokens_per_step + plan.optimizer_flops
  limit, limit_name = memory_limit()
  roles = plan.parameters
  lines = [
    table(("parameters", "number"), [*roles.items(), ("all", sum(roles.values()))]),
    "",
    f"tokens per step   {plan.tokens_per_step} ({settings.batch_size} x {settings.seq_len})",
    f"FLOPs             {compact(plan.flops_per_token)} per token, {compact(flops)} per step,"
    f" {compact(flops * plan.steps)} in all (analytic)",
    f"planned steps     {plan.steps}, {compact(plan.steps * plan.tokens_per_step)} tokens",
    f"training state    {state_bytes / GIB:.3f} GiB (parameters, optimizer, schedule)",
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
  compiled = step.lower(state, _abstract_batch(plan, settings.batch_size)).compile()
  lines.append(f"compile time      {time.perf_counter() - start:.1f} s")
  peak = peak_bytes(compiled)
  micro = settings.batch_size // settings.grad_accum
  largest = largest_micro_batch(plan, limit)
  verdict = "fits" if peak <= limit else "does not fit"
  lines.append(f"peak memory       {peak / GIB:.3f} GiB: {verdict} in the {limit / GIB:.1f} GiB of {limit_name}")
  lines.append(f"micro-batch       {micro}; about {largest} is the largest that fits")
  if peak <= limit and largest >= 1:
    seconds = _time_step(plan, compiled)
    lines.append(
      f"time              {1e3 * seconds:.0f} ms per step, {compact(plan.tokens_per_step / seconds)} tok/s,"
      f" {duration(seconds * plan.steps)} for the steps"
    )
  return "\n".join(lines)


def peak_bytes(compiled) -> int:
  """Arguments, results and temporaries of a compiled program; what is donated counts once."""
  m = compiled.memory_analysis()
  return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def memory_limit() -> tuple[int, str]:
  """Bytes the first device can hold, and what to call it: the accelerator's own limit, or the memory of the machine."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"], device.device_kind
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def largest_micro_batch(plan: Plan, limit: int) -> int:
  """The largest micro-batch whose compiled step stays within `limit`, taking memory as linear in the batch."""
  micro = plan.settings.batch_size // plan.settings.grad_accum
  small, big = (max(1, micro // 2), micro) if micro > 1 else (1, 2)
  step, state = _abstract_step(plan, 1)
  used = [peak_bytes(step.lower(state, _abstract_batch(plan, b)).compile()) for b in (small, big)]
  per_row = max(1.0, (used[1] - used[0]) / (big - small))
  return max(0, int(small + (limit - used[0]) // per_row))


def _abstract_step(plan: Plan, grad_accum: int):
  settings = plan.settings
  optimizer = make_optimizer(settings, gpt.specs(plan.cfg), plan.cfg)
  schedule = make_schedule(settings, plan.steps)
  step = make_step(settings, plan.cfg, optimizer, schedule, plan.steps, grad_accum)
  return step, jax.eval_shape(lambda: init_train_state(plan.cfg, optimizer, schedule, settings.seed))


def _abstract_batch(plan: Plan, rows: int):
  shape = jax.ShapeDtypeStruct((rows, plan.cfg.seq_len), jnp.int32)
  names = ("tokens", "targets", "segment_ids") if plan.cfg.doc_mask else ("tokens", "targets")
  return dict.fromkeys(names, shape)


def _is_key(leaf) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _time_step(plan: Plan, compiled) -> float:
  """Mean seconds of `TIMED_STEPS` steps on dummy data, after one that is not counted."""
  settings = plan.settings
  optimizer = make_optimizer(settings, gpt.specs(plan.cfg), plan.cfg)
  schedule = make_schedule(settings, plan.steps)
  state = jax.jit(lambda: init_train_state(plan.cfg, optimizer, schedule, settings.seed))()
  batch = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), _abstract_batch(plan, settings.batch_size))
  state, _ = compiled(state, batch)
  jax.block_until_ready(state)
  start = time.perf_counter()
  for _ in range(TIMED_STEPS):
    state, _ = compiled(state, batch)
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / TIMED_STEPS
