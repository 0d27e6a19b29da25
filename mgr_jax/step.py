"""One optimizer update as a pure, jitted function of the training state."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mgr_jax import optim
from mgr_jax.model import annealing, curvature, gpt
from mgr_jax.optim import Curvature, reset_moments
from mgr_jax.optim.diagnostics import diagnostics, hoss_metrics
from mgr_jax.params import fold_in_name, init_params
from mgr_jax.problems import Problem, UserError, raise_if_any
from mgr_jax.schedules import ANNEAL, RESTART, Schedule


@struct.dataclass
class TrainState:
  """Everything that training changes.

  Args:
    step: int32, batches consumed, dropped ones included.
    params, opt_state, schedule_state: PyTrees; parameters are float32.
    key: typed key of the run. It never changes: whatever is random at a step folds the step in.
    tokens_seen: uint32[2], low and high word of the number of target tokens consumed.
    skipped: int32, updates dropped because something was not finite.
    nonfinite_streak: int32, updates dropped in a row up to now.
    annealed: live values of the options that change during training, float32 by key; see `model.annealing`.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  schedule_state: Any
  key: jax.Array
  tokens_seen: jax.Array
  skipped: jax.Array
  nonfinite_streak: jax.Array
  annealed: dict[str, jax.Array] = struct.field(default_factory=dict)


def init_key(seed: int) -> jax.Array:
  """The key that initial weights are drawn with."""
  return fold_in_name(jax.random.key(seed), "init")


def init_train_state(
  cfg, optimizer: optax.GradientTransformationExtraArgs, schedule: Schedule, seed: int, specs=None
) -> TrainState:
  """The state before the first step. Under `jax.eval_shape` it is the abstract target of a restore.

  `specs` replaces `gpt.specs(cfg)` where weights are to be drawn from other distributions.
  """
  key = jax.random.key(seed)
  params = gpt.init(init_key(seed), cfg) if specs is None else init_params(init_key(seed), specs)
  zero = functools.partial(jnp.zeros, (), jnp.int32)
  return TrainState(
    step=zero(),
    params=params,
    opt_state=optimizer.init(params),
    schedule_state=schedule.init(),
    key=fold_in_name(key, "train"),
    tokens_seen=jnp.zeros((2,), jnp.uint32),
    skipped=zero(),
    nonfinite_streak=zero(),
    annealed=annealing.init(cfg),
  )


def make_train_step(
  cfg,
  optimizer: optax.GradientTransformationExtraArgs,
  schedule: Schedule,
  *,
  total_steps: int = 1,
  grad_accum: int = 1,
  grad_clip: float = 1.0,
  on_nonfinite: str = "raise",
  products: Curvature | None = None,
  stats: bool = False,
  axis_name: str | None = None,
):
  """The jitted `step(state, batch) -> (state, metrics)`; `state` is donated.

  Args:
    cfg, optimizer, schedule: as given to `init_train_state`; `cfg` may also be its `annealing.snapped`.
    total_steps: planned updates, over which annealed options move.
    grad_accum: micro-batches per update; divides the batch. Activations of one micro-batch are alive at a time, and the
      result is that of the whole batch.
    grad_clip: largest global gradient norm, 0 for none.
    on_nonfinite: a step whose loss, gradient or update is not finite leaves parameters, optimizer and schedule as they
      were. After K such steps in a row with `skip:K`, or after the first with `raise`, every further step is dropped as
      well: the caller may look at the metrics as seldom as it likes and still finds the parameters that broke. A
      restored state that has this behind it goes on after `state.replace(nonfinite_streak=0)`.
    products: which curvature products the optimizer is given, see `optim.curvature`; None for none.
    stats: also return `diagnostics` of the update.
    axis_name: of a `pmap` whose devices each hold equally many rows of the batch and a copy of the state. Sums over the
      batch then run over it, so all copies stay equal. Losses of mechanisms that are no sums over rows are averaged.

  The loss goes to the schedule first. If that restarts, the optimizer's moments are cleared; then the optimizer gets
  the gradient, the loss as `value`, the multiplier as `scale`, and a key of this step.

  The batch holds `tokens` and `targets` int32 [B, T], optional `weights` float32 [B, T], and whatever `gpt.loss` reads.

  Metrics, device scalars: `loss` (Σ w·nll / Σ w, nats per token), `nll_sum`, `weight`, `aux_loss`, `grad_norm` (of
  the whole gradient, before clipping), `multiplier` and `event` of the schedule, `nonfinite` (the update was dropped),
  `annealed` (the values that this step used, by key), `schedule` (its state in numbers), `optimizer` (what HOSS saw,
  and with `stats` the diagnostics).

  Raises:
    UserError: settings out of range.
  """
  found = []
  if grad_accum < 1:
    found.append(Problem(f"--grad_accum={grad_accum} is not positive", "use --grad_accum=1"))
  if not grad_clip >= 0:
    found.append(Problem(f"--grad_clip={grad_clip} is negative", "use 0 for no clipping, or e.g. --grad_clip=1.0"))
  if not re.fullmatch(r"raise|skip:[1-9]\d*", on_nonfinite):
    found.append(Problem(f"--on_nonfinite={on_nonfinite} is unknown", "use raise, or skip:K with K of 1 or more"))
  raise_if_any(found)
  limit = 1 if on_nonfinite == "raise" else int(on_nonfinite.removeprefix("skip:"))
  everywhere = (lambda x: x) if axis_name is None else (lambda x: jax.lax.psum(x, axis_name))

  def step(state: TrainState, batch):
    used = {name: state.annealed[name] for name in annealing.courses(cfg)}
    metrics, grads = _gradient(state.params, batch, cfg, grad_accum, state.annealed, everywhere)
    readings = metrics.pop("readings")
    metrics["grad_norm"] = optax.tree.norm(grads)
    if grad_clip:
      factor = jnp.where(metrics["grad_norm"] > grad_clip, grad_clip / metrics["grad_norm"], 1.0)
      grads = jax.tree.map(lambda g: factor * g, grads)
    schedule_state, multiplier, event = schedule.update(state.schedule_state, metrics["loss"])
    limit_event = (event == ANNEAL) | (event == RESTART)
    annealed = annealing.update(state.annealed, cfg, state.step, total_steps, readings, limit_event)
    opt_state = state.opt_state
    if schedule.resets_moments:
      opt_state = reset_moments(optimizer, opt_state, state.params, event == RESTART)
    given = {"scale": multiplier, "value": metrics["loss"], "key": jax.random.fold_in(state.key, state.step)}
    if products is not None:
      part = curvature_part(products.fraction, batch)
      product = curvature.product(products.kind, state.params, part, cfg, state.annealed)
      share = _weight(part) / everywhere(_weight(part))
      given["hvp_fn"] = lambda v: everywhere(jax.tree.map(lambda u: share * u, product(v))) if axis_name else product(v)
    updates, opt_state = optimizer.update(grads, opt_state, state.params, **given)
    metrics["optimizer"] = hoss_metrics(opt_state)
    if stats:
      metrics["optimizer"] |= diagnostics(gpt.specs(cfg), grads, updates, state.params)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["aux_loss"]) & jnp.isfinite(metrics["grad_norm"])
    # Curvature can break down where loss and gradient are still finite.
    finite &= jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda u: jnp.all(jnp.isfinite(u)), updates))
    applied = finite & (state.nonfinite_streak < limit)
    new = params, opt_state, schedule_state, annealed
    old = state.params, state.opt_state, state.schedule_state, state.annealed
    params, opt_state, schedule_state, annealed = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      schedule_state=schedule_state,
      tokens_seen=_add(state.tokens_seen, everywhere(_n_targets(batch))),
      skipped=state.skipped + ~applied,
      nonfinite_streak=jnp.where(applied, 0, state.nonfinite_streak + 1),
      annealed=annealed,
    )
    metrics |= {"multiplier": multiplier, "event": event, "nonfinite": ~applied, "annealed": used}
    return state, metrics | {"schedule": schedule.metrics(schedule_state)}

  return jax.jit(step, donate_argnums=0)


def _gradient(params, batch, cfg, grad_accum: int, annealed, everywhere=lambda x: x):
  """Metrics and float32 gradient of Σ_i nll_i / W + Σ_i (w_i / W)·aux_i over micro-batches i of weight w_i, Σ w_i = W.

  Dividing each micro-batch by its own weight and averaging would count the tokens of light micro-batches more.
  """
  normalizer = jnp.maximum(everywhere(_weight(batch)), 1.0)

  def objective(params, part):
    loss, metrics = gpt.loss(params, part, cfg, normalizer, annealed)
    share, aux_loss = metrics["weight"] / normalizer, metrics["aux_loss"]
    readings = {key: share * value for key, value in metrics["readings"].items()}
    return loss + (share - 1) * aux_loss, metrics | {"aux_loss": share * aux_loss, "readings": readings}

  def part_gradient(part):
    (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params, part)
    return metrics, grads

  if grad_accum == 1:
    metrics, grads = part_gradient(batch)
  else:
    parts = split_batch(batch, grad_accum)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part_gradient, jax.tree.map(lambda x: x[0], parts)))
    add = lambda total, part: (jax.tree.map(jnp.add, total, part_gradient(part)), None)
    (metrics, grads), _ = jax.lax.scan(add, zeros, parts)
  metrics, grads = everywhere((metrics, grads))
  return {"loss": metrics["nll_sum"] / normalizer, **metrics}, grads


def split_batch(batch, grad_accum: int):
  """[B, ...] -> [grad_accum, B/grad_accum, ...]; micro-batch i holds rows i, i + grad_accum, ...

  Strided, so that a batch sharded over devices by rows is split without moving a row to another device.

  Raises:
    UserError: B is not divisible.
  """
  rows = batch["tokens"].shape[0]
  if rows % grad_accum:
    fix = f"use --batch_size={-(-rows // grad_accum) * grad_accum}, or a --grad_accum that divides it"
    raise UserError(Problem(f"--batch_size={rows} is not divisible by --grad_accum={grad_accum}", fix))
  return jax.tree.map(lambda x: x.reshape(rows // grad_accum, grad_accum, *x.shape[1:]).swapaxes(0, 1), batch)


def curvature_rows(fraction: float, rows: int) -> int:
  """How many rows of a batch curvature is taken of: `fraction` of them, at least one."""
  return max(1, round(fraction * rows))


def curvature_part(fraction: float, batch):
  """That share of the rows, every k-th one: rows of a shuffled batch are all alike, and devices hold equally many."""
  rows = batch["tokens"].shape[0]
  stride = rows // curvature_rows(fraction, rows)
  return jax.tree.map(lambda x: x[::stride][: curvature_rows(fraction, rows)], batch)


def gradient_flops(cfg, batch_size: int) -> float:
  """FLOPs of one gradient: forward once, backward twice, and forward once more when whole layers are recomputed."""
  return gpt.cost(cfg).flops * cfg.seq_len * batch_size * (3 if cfg.remat in ("none", "dots") else 4)


def model_flops(cfg) -> float:
  """Matrix products per token of a gradient, in FLOPs, with nothing recomputed: what model FLOPs utilisation counts."""
  return 3 * gpt.cost(cfg).matmul


def optimizer_flops(name: str, cfg, batch_size: int, **settings) -> float:
  """FLOPs of one update beside the gradient: matrix products of the optimizer, see `optim.flops`."""
  products = optim.curvature(name, **settings)
  if products:
    settings["hoss_hvp_frac"] = curvature_rows(products.fraction, batch_size) / batch_size
  return optim.flops(name, gpt.specs(cfg), gradient_flops(cfg, batch_size), **settings)


def _weight(batch) -> jax.Array:
  """Σ w of the batch, float32."""
  weights = batch.get("weights")
  return jnp.float32(batch["targets"].size) if weights is None else jnp.sum(weights, dtype=jnp.float32)


def _n_targets(batch) -> jax.Array:
  weights = batch.get("weights")
  return jnp.uint32(batch["targets"].size) if weights is None else jnp.count_nonzero(weights).astype(jnp.uint32)


def _add(words: jax.Array, n: jax.Array) -> jax.Array:
  """words + n for a 64-bit count held as uint32 [low, high]."""
  low = words[0] + n
  return jnp.stack([low, words[1] + (low < n)])
