"""What reversible stacks promise: exact reconstruction, the gradient of autodiff, memory that depth does not change."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.claims import Check, Claim, claim, relative_difference
from mgr_jax.config import GPTConfig
from mgr_jax.conformance import VOCAB, noisy_params, tokens_of
from mgr_jax.model import gpt, layers, reversible, stack
from mgr_jax.model.reconstruction import missed

SMALL = GPTConfig(vocab_size=VOCAB, seq_len=16, n_layer=8, n_head=2, n_kv_head=2, n_embd=16, mlp_ratio=2.0)


def _differing_words(cfg: GPTConfig, batch: int = 2) -> Check:
  def measure(key, scale):
    del scale
    return missed(noisy_params(key, cfg), tokens_of(key, batch, cfg.seq_len) % cfg.vocab_size, cfg).words

  return measure


DENSE = "standard(impl=reference)"


def _arm(options: str, **fields) -> GPTConfig:
  return dataclasses.replace(SMALL, attention=f"reversible({DENSE}, {options})", **fields)


EXACT = _arm("mix=givens", compute_dtype="bfloat16")
FLOAT = _arm("state=float32, mix=givens")
# A stack whose float32 streams come back wrong, because rounding inside F differs by then.
DRIFTING = _arm("state=float32, mix=givens", n_layer=32, compute_dtype="bfloat16")


def reconstruction_claim(cfg: GPTConfig) -> Claim:
  """Of a configuration as it trains, in its own depth, width and length, one sequence.

  A compiler may round F differently in the forward and the backward program; then train with `backward=remat`, or look
  at `--xla_gpu_deterministic_ops=true`.
  """
  return claim(
    f"{cfg.attention}.reconstruction",
    "the backward pass recovers every word of the input of the stack; otherwise use backward=remat",
    _differing_words(dataclasses.replace(cfg, loss_chunk=0), batch=1),
    0.0,
    _differing_words(DRIFTING),
  )


def reconstructs_exactly(cfg: GPTConfig) -> bool:
  """Whether every reversible stack of `cfg`, and there is one, promises bit-exact reconstruction."""
  wraps = {run.wrap for run in stack.runs(cfg)} - {None}
  return bool(wraps) and all(w.state == "fixed32" and w.backward == "reconstruct" for w in wraps)


def run_stack(params, x_BTC, witness, cfg: GPTConfig):
  """The output of the reversible stack that `cfg` is, one layer per iteration so that it compiles fast."""
  members = stack.runs(cfg)
  ctx = gpt.context(jnp.arange(x_BTC.shape[1])[None, :], cfg)
  ctx = ctx.replace(shared=ctx.shared | {"witness": witness})
  runs = gpt.cast(params, cfg)["runs"]
  return reversible.forward(stack.stages_of(cfg, members), runs, x_BTC, ctx, members[0].wrap)[0]


@functools.partial(jax.jit, static_argnums=2)
def stack_gradient(params, x_BTC, cfg: GPTConfig):
  """Gradient of a smooth function of the stack's output, in the parameters, the input, and the witness.

  The last is what the backward pass failed to reconstruct: words that differ, and their largest deviation.
  """
  objective = lambda params, x, witness: jnp.sum(jnp.sin(run_stack(params, x, witness, cfg)))
  return jax.grad(objective, (0, 1, 2))(params, x_BTC, jnp.zeros(2))


def stack_case(key: jax.Array, cfg: GPTConfig, batch: int = 2):
  """Parameters of a model, none zero, and an input of its stack."""
  x = np.random.default_rng(np.asarray(jax.random.key_data(key))).standard_normal((batch, cfg.seq_len, cfg.n_embd))
  return noisy_params(key, cfg), x.astype(np.float32)


def _unrecovered(cfg: GPTConfig) -> Check:
  return lambda key, scale: float(stack_gradient(*stack_case(key, cfg, 2 * scale), cfg)[2][0])


def stored(cfg: GPTConfig) -> GPTConfig:
  """The same stack, differentiated by storing every layer."""
  return dataclasses.replace(cfg, attention=f"{cfg.attention[:-1]}, backward=autodiff)")


def gradient_error(cfg: GPTConfig) -> Check:
  """Relative difference of the gradients, in parameters and input, of a stack that reconstructs and one that stores."""

  def measure(key, scale):
    case = stack_case(key, cfg, 2 * scale)
    return relative_difference(stack_gradient(*case, cfg)[:2], stack_gradient(*case, stored(cfg))[:2])

  return measure


def temporary_bytes(cfg: GPTConfig, batch: int = 2, run=None) -> int:
  """Compiled temporary memory of the gradient of the blocks alone, where parameter gradients are outputs.

  Args:
    run: `(params, x, ctx) -> y` in place of the stack as it trains.
  """
  run = run or (lambda params, x, ctx: stack.forward(params, x, ctx, cfg)[0])
  abstract = lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
  params = jax.tree.map(abstract, stack.specs(cfg), is_leaf=gpt.is_spec)
  x = jax.ShapeDtypeStruct((batch, cfg.seq_len, cfg.n_embd), jnp.float32)

  def objective(params, x):
    return jnp.sum(jnp.sin(run(params, x, gpt.context(jnp.arange(cfg.seq_len)[None, :], cfg))))

  compiled = jax.jit(jax.grad(objective, (0, 1))).lower(params, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def memory_slope(cfg: GPTConfig, depths: tuple[int, ...] = (8, 64), batch: int = 2) -> float:
  """Temporary memory per layer in units of one float32 tensor B·T·C, by least squares over `depths`."""
  size = [temporary_bytes(dataclasses.replace(cfg, n_layer=depth), batch) for depth in depths]
  return float(np.polyfit(depths, size, 1)[0]) / (4 * batch * cfg.seq_len * cfg.n_embd)


# Wide batches, so that one layer's weights are small beside one tensor B·T·C; nothing is allocated for them.
BLOCKS = GPTConfig(vocab_size=VOCAB, seq_len=64, n_layer=4, n_head=2, n_kv_head=2, n_embd=32)
BATCH, DEPTHS = 32, (4, 16, 64)
PLANS = ("plain", "remat", "√L remat", "reversible")


@functools.cache
def depth_bytes(plan: str, depth: int) -> int:
  """`temporary_bytes` of a stack of `depth` layers, one per iteration of a scan, under one of `PLANS`.

  The layers are those of dense softmax attention. `plain` stores what differentiation needs, `remat` the input of every
  layer, `√L remat` (a square depth) that of every group of √L layers and of the layers of one group at a time.
  """
  attention = f"reversible({DENSE})" if plan == "reversible" else DENSE
  cfg = dataclasses.replace(BLOCKS, n_layer=depth, attention=attention)
  runs = {"plain": _plain, "remat": _remat, "√L remat": _group_remat, "reversible": _reversible}
  return temporary_bytes(cfg, BATCH, functools.partial(runs[plan], cfg))


def _reversible(cfg, params, x, ctx):
  members = stack.runs(cfg)
  return reversible.forward(stack.stages_of(cfg, members), params, x, ctx, members[0].wrap)[0]


def _block(cfg, ctx):
  """One layer of an ordinary stack as the body of a scan."""
  (run,) = stack.runs(cfg)

  def block(x, params):
    x = x + run.mechanism.apply(params["attention"], rms_norm(x), ctx, cfg, run.options)[0]
    return x + layers.mlp(params["mlp"], rms_norm(x), cfg), None

  return block


def _plain(cfg, params, x, ctx):
  return jax.lax.scan(_block(cfg, ctx), x, params[0])[0]


def _remat(cfg, params, x, ctx):
  return jax.lax.scan(jax.checkpoint(_block(cfg, ctx), prevent_cse=False), x, params[0])[0]


def _group_remat(cfg, params, x, ctx):
  size = math.isqrt(cfg.n_layer)
  groups = jax.tree.map(lambda p: p.reshape(-1, size, *p.shape[1:]), params[0])
  group = lambda x, params: (_remat(cfg, (params,), x, ctx), None)
  return jax.lax.scan(jax.checkpoint(group, prevent_cse=False), x, groups)[0]


def depth_slope(plan: str) -> float:
  """Bytes per layer from the shallowest to the deepest of `DEPTHS`, in units of one float32 tensor B·T·C."""
  shallow, deep = DEPTHS[0], DEPTHS[-1]
  unit = 4 * BATCH * BLOCKS.seq_len * BLOCKS.n_embd
  return (depth_bytes(plan, deep) - depth_bytes(plan, shallow)) / (deep - shallow) / unit


CLAIMS = (
  claim(
    "reversible.reconstruction",
    "with bfloat16 inside F and G, the backward pass recovers every word of the fixed-point streams",
    _unrecovered(EXACT),
    0.0,
    _unrecovered(DRIFTING),
    refs=("MacKay et al., 2018, arXiv 1810.10999",),
  ),
  claim(
    "reversible.gradient",
    "reconstruction gives the gradient that differentiating the stored forward pass gives",
    gradient_error(FLOAT),
    1e-5,
    gradient_error(DRIFTING),
    refs=("Gomez et al., 2017, arXiv 1707.04585",),
  ),
  claim(
    "reversible.memory",
    "temporary memory of the gradient grows by at most 0.05 tensors B·T·C per layer, from 4 to 64 layers; that of an\
ordinary stack grows",
    lambda key, scale: depth_slope("reversible"),
    0.05,
    lambda key, scale: depth_slope("plain"),
  ),
)
