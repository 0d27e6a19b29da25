"""The stack of blocks: homogeneous runs of layers share one stacked parameter tree and one `lax.scan`."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention import Context, Mechanism, resolve
from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.flops import Cost
from mgr_jax.model import layers
from mgr_jax.params import stack_specs

# Layers per iteration of a run's scan. Measured forward+backward on two CPU cores at 4 layers, 128 wide: 0.83x of one
# layer per iteration, because XLA no longer stacks residuals of every layer; deeper stacks keep the compile time flat.
UNROLL = 4


class Run(NamedTuple):
  """`n_layer` consecutive layers with the same mechanism and options, starting at layer `first`."""

  mechanism: Mechanism
  options: Any
  first: int
  n_layer: int


def runs(cfg) -> tuple[Run, ...]:
  """Groups the layers of `cfg` into runs."""
  found, first = [], 0
  for layer, group in itertools.groupby(resolve(cfg)):
    n = len(list(group))
    found.append(Run(layer.mechanism, layer.options, first, n))
    first += n
  return tuple(found)


def layer_specs(cfg, run: Run) -> dict[str, Any]:
  """The tree `{"attention": ..., "mlp": ...}` of one layer of a run."""
  return {"attention": run.mechanism.param_specs(cfg, run.options), "mlp": layers.mlp_specs(cfg)}


def specs(cfg) -> tuple[dict[str, Any], ...]:
  """One tree per run, every leaf stacked over the run's layers."""
  return tuple(stack_specs(layer_specs(cfg, run), run.n_layer) for run in runs(cfg))


def annealed_keys(run: Run) -> dict[str, str]:
  """The key in `ctx.annealed` of each annealed option of a run: layers that follow the same course share one value."""
  courses = run.mechanism.annealed(run.options)
  return {option: ":".join([f"{run.mechanism.name}.{option}", *map(str, course)]) for option, course in courses.items()}


def _context_of(run: Run, ctx: Context) -> Context:
  """`ctx` with the run's own annealed values, by option."""
  keys = annealed_keys(run)
  return ctx.replace(annealed={option: ctx.annealed[key] for option, key in keys.items() if key in ctx.annealed})


def forward(params, x_BTC: jax.Array, ctx: Context, cfg) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Applies all blocks, x + attention(norm(x)) then x + mlp(norm(x)).

  Returns the output and `aux`: `aux_loss` summed over layers, everything else as `<mechanism>/<name>` with a leading
  axis over that mechanism's layers.
  """
  aux_all: dict[str, list[jax.Array]] = {}
  aux_loss = jnp.zeros((), jnp.float32)
  for run, run_params in zip(runs(cfg), params, strict=True):
    run_ctx = _context_of(run, ctx)

    def block(x, layer_params, run=run, ctx=run_ctx):
      y, aux = run.mechanism.apply(layer_params["attention"], rms_norm(x), ctx, cfg, run.options)
      x = x + y
      return x + layers.mlp(layer_params["mlp"], rms_norm(x), cfg), aux

    if cfg.remat == "full":
      block = jax.checkpoint(block, prevent_cse=False)
    x_BTC, aux = jax.lax.scan(block, x_BTC, run_params, unroll=min(UNROLL, run.n_layer))
    aux_loss += jnp.sum(aux.pop("aux_loss", 0.0))
    for name, values in aux.items():
      aux_all.setdefault(f"{run.mechanism.name}/{name}", []).append(values)
  return x_BTC, {"aux_loss": aux_loss} | {name: jnp.concatenate(v) for name, v in aux_all.items()}


def init_state(cfg, batch: int, max_len: int) -> tuple[Any, ...]:
  """One stacked decode state per run."""

  def stacked(run: Run):
    one = run.mechanism.init_state(cfg, run.options, batch, max_len)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (run.n_layer, *a.shape)), one)

  return tuple(stacked(run) for run in runs(cfg))


def step(params, x_BtC: jax.Array, state, ctx: Context, cfg) -> tuple[jax.Array, tuple[Any, ...]]:
  """Applies all blocks to t new tokens."""
  new_state = []
  for run, run_params, run_state in zip(runs(cfg), params, state, strict=True):

    def block(x, xs, run=run):
      layer_params, layer_state = xs
      y, layer_state = run.mechanism.step(layer_params["attention"], rms_norm(x), layer_state, ctx, cfg, run.options)
      x = x + y
      return x + layers.mlp(layer_params["mlp"], rms_norm(x), cfg), layer_state

    x_BtC, run_state = jax.lax.scan(block, x_BtC, (run_params, run_state), unroll=min(UNROLL, run.n_layer))
    new_state.append(run_state)
  return x_BtC, tuple(new_state)


def cost(cfg, T: int) -> Cost:
  """Forward cost per token of all blocks at context T."""
  return sum(
    (run.n_layer * (run.mechanism.cost(cfg, run.options, T) + layers.mlp_cost(cfg)) for run in runs(cfg)), Cost()
  )
