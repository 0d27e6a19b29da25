"""The stack of blocks: homogeneous runs of layers share one stacked parameter tree and one `lax.scan`."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention import Context, Mechanism, resolve
from mgr_jax.attention import reversible as wrapper
from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.flops import Cost
from mgr_jax.model import couplings, layers, reversible
from mgr_jax.model.rows import by_rows
from mgr_jax.params import stack_specs

# Layers per iteration of a run's scan. Measured forward+backward on two CPU cores at 4 layers, 128 wide: 0.83x of one
# layer per iteration, because XLA no longer stacks residuals of every layer; deeper stacks keep the compile time flat.
UNROLL = 4


class Run(NamedTuple):
  """`n_layer` consecutive layers with the same mechanism and options, starting at layer `first`.

  `wrap` holds the options of the reversible stack they belong to, if any.
  """

  mechanism: Mechanism
  options: Any
  first: int
  n_layer: int
  wrap: wrapper.Options | None = None

  @property
  def n_param_layer(self) -> int:
    """Layers that the parameters are stacked over: one when all share them."""
    return 1 if self.wrap is not None and self.wrap.tied else self.n_layer


def runs(cfg) -> tuple[Run, ...]:
  """Groups the layers of `cfg` into runs."""
  found, first = [], 0
  for layer, group in itertools.groupby(resolve(cfg)):
    n = len(list(group))
    found.append(Run(layer.mechanism, layer.options, first, n, layer.wrap))
    first += n
  return tuple(found)


def segments(cfg) -> list[tuple[wrapper.Options | None, slice]]:
  """Which runs form one reversible stack: equal neighbours belong together, and every plain run stands alone."""
  found, first = [], 0
  key = lambda numbered: (numbered[1].wrap, numbered[0] if numbered[1].wrap is None else -1)
  for (wrap, _), group in itertools.groupby(enumerate(runs(cfg)), key):
    n = len(list(group))
    found.append((wrap, slice(first, first + n)))
    first += n
  return found


def layer_specs(cfg, run: Run) -> dict[str, Any]:
  """The tree `{"attention": ..., "mlp": ...}` of one layer of a run, with `mix` in a reversible stack."""
  if run.wrap is not None:
    return couplings.layer_specs(cfg, run.mechanism, run.options, run.wrap)
  return {"attention": run.mechanism.param_specs(cfg, run.options), "mlp": layers.mlp_specs(cfg)}


def specs(cfg) -> tuple[dict[str, Any], ...]:
  """One tree per run, every leaf stacked over the run's layers."""
  return tuple(stack_specs(layer_specs(cfg, run), run.n_param_layer) for run in runs(cfg))


def annealed_keys(run: Run) -> dict[str, str]:
  """The key in `ctx.annealed` of each annealed option of a run: layers that follow the same course share one value."""
  courses = run.mechanism.annealed(run.options)
  return {option: ":".join([f"{run.mechanism.name}.{option}", *map(str, course)]) for option, course in courses.items()}


def _context_of(run: Run, ctx: Context) -> Context:
  """`ctx` with the run's own annealed values, by option."""
  keys = annealed_keys(run)
  return ctx.replace(annealed={option: ctx.annealed[key] for option, key in keys.items() if key in ctx.annealed})


def stages_of(cfg, members: tuple[Run, ...]) -> tuple[reversible.Stage, ...]:
  """The runs of one reversible stack, as `model.reversible` takes them."""
  return tuple(
    reversible.Stage(
      couplings.couplings(cfg, run.mechanism, run.options, run.wrap, functools.partial(_context_of, run)),
      run.first,
      run.n_layer,
    )
    for run in members
  )


def forward(params, x_BTC: jax.Array, ctx: Context, cfg) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Applies all blocks, x + attention(norm(x)) then x + mlp(norm(x)), or those of reversible stacks.

  Returns the output and `aux`: `aux_loss` summed over layers, everything else as `<mechanism>/<name>` with a leading
  axis over that mechanism's layers.
  """
  members = runs(cfg)
  collected: dict[str, list[jax.Array]] = {}
  for wrap, span in segments(cfg):
    if wrap is None:
      x_BTC, aux = _plain(members[span.start], params[span.start], x_BTC, ctx, cfg)
      auxes = [aux]
    else:
      x_BTC, auxes = reversible.forward(stages_of(cfg, members[span]), params[span], x_BTC, ctx, wrap, UNROLL)
    for aux in auxes:
      for name, values in aux.items():
        collected.setdefault(name, []).append(values)
  merged = {name: jnp.concatenate(values) for name, values in collected.items()}
  return x_BTC, merged | {"aux_loss": jnp.sum(merged.get("aux_loss", jnp.zeros((1,), jnp.float32)))}


def _plain(run: Run, params, x_BTC, ctx: Context, cfg):
  """One run of ordinary blocks: (x, aux stacked over layers)."""
  ctx = _context_of(run, ctx)

  def attend(params, x, ctx):
    return run.mechanism.apply(params, x, ctx, cfg, run.options)

  def block(x, layer_params):
    y, aux = by_rows(attend, layer_params["attention"], rms_norm(x), ctx)
    x = x + y
    aux = {name if name == "aux_loss" else f"{run.mechanism.name}/{name}": value for name, value in aux.items()}
    return x + layers.mlp(layer_params["mlp"], rms_norm(x), cfg), aux

  return _scan_blocks(block, x_BTC, params, run.n_layer, cfg.remat)


def _scan_blocks(block, x_BTC, params, n_layer: int, remat: str):
  """`lax.scan` over layers that keeps for the backward pass what `GPTConfig.remat` says."""
  scan = lambda x, p: jax.lax.scan(block, x, p, unroll=min(UNROLL, jax.tree.leaves(p)[0].shape[0]))
  if remat == "none":
    return scan(x_BTC, params)
  if remat in ("full", "dots"):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    block = jax.checkpoint(block, prevent_cse=False, policy=policy)
    return scan(x_BTC, params)
  k = int(remat.removeprefix("every_"))
  group = jax.checkpoint(scan, prevent_cse=False)
  n_group = n_layer // k
  grouped = jax.tree.map(lambda a: a[: n_group * k].reshape(n_group, k, *a.shape[1:]), params)
  x_BTC, aux = jax.lax.scan(group, x_BTC, grouped)
  aux = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)
  if n_layer % k:
    x_BTC, rest = group(x_BTC, jax.tree.map(lambda a: a[n_group * k :], params))
    aux = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), aux, rest)
  return x_BTC, aux


def init_state(cfg, batch: int, max_len: int) -> tuple[Any, ...]:
  """One stacked decode state per run."""
  members, states = runs(cfg), []
  for wrap, span in segments(cfg):
    if wrap is None:
      run = members[span.start]
      one = run.mechanism.init_state(cfg, run.options, batch, max_len)
      states.append(jax.tree.map(lambda a, n=run.n_layer: jnp.broadcast_to(a, (n, *a.shape)), one))
    else:
      states += reversible.init_state(stages_of(cfg, members[span]), batch, max_len)
  return tuple(states)


def step(params, x_BtC: jax.Array, state, ctx: Context, cfg) -> tuple[jax.Array, tuple[Any, ...]]:
  """Applies all blocks to t new tokens."""
  members, new_state = runs(cfg), []
  for wrap, span in segments(cfg):
    if wrap is None:
      x_BtC, after = _plain_step(members[span.start], params[span.start], x_BtC, state[span.start], ctx, cfg)
      new_state.append(after)
    else:
      stages = stages_of(cfg, members[span])
      x_BtC, after = reversible.step(stages, params[span], x_BtC, state[span], ctx, wrap, UNROLL)
      new_state += after
  return x_BtC, tuple(new_state)


def _plain_step(run: Run, params, x_BtC, state, ctx: Context, cfg):
  def block(x, xs):
    layer_params, layer_state = xs
    y, layer_state = run.mechanism.step(layer_params["attention"], rms_norm(x), layer_state, ctx, cfg, run.options)
    x = x + y
    return x + layers.mlp(layer_params["mlp"], rms_norm(x), cfg), layer_state

  return jax.lax.scan(block, x_BtC, (params, state), unroll=min(UNROLL, run.n_layer))


def cost(cfg, T: int) -> Cost:
  """Forward cost per token of all blocks at context T."""

  def layer(run: Run) -> Cost:
    if run.wrap is not None:
      return couplings.cost(cfg, run.mechanism, run.options, run.wrap, T)
    return run.mechanism.cost(cfg, run.options, T) + layers.mlp_cost(cfg)

  return sum((run.n_layer * layer(run) for run in runs(cfg)), Cost())
