"""What reversible stacks promise: exact reconstruction, the gradient of autodiff, memory that depth does not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.claims import Check, Claim, claim, relative_difference
from mgr_jax.config import GPTConfig
from mgr_jax.conformance import VOCAB, noisy_params, tokens_of
from mgr_jax.model import gpt, stack
from mgr_jax.model.reconstruction import missed

SMALL = GPTConfig(vocab_size=VOCAB, seq_len=16, n_layer=8, n_head=2, n_kv_head=2, n_embd=16, mlp_ratio=2.0)


def _differing_words(cfg: GPTConfig, batch: int = 2) -> Check:
  def measure(key, scale):
    del scale
    return missed(noisy_params(key, cfg), tokens_of(key, batch, cfg.seq_len) % cfg.vocab_size, cfg).words

  return measure


# A stack whose float32 streams come back wrong, because rounding inside F differs by then.
DRIFTING = dataclasses.replace(
  SMALL, attention="reversible(state=float32, mix=givens)", n_layer=32, compute_dtype="bfloat16"
)


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


@functools.partial(jax.jit, static_argnums=2)
def _gradient(params, tokens, cfg):
  batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1)}
  return jax.grad(lambda p: gpt.loss(p, batch, cfg)[0])(params)


def _gradient_error(attention: str, options: str, **fields) -> Check:
  def measure(key, scale):
    del scale
    cfg = dataclasses.replace(SMALL, attention=f"reversible({attention}, {options})", **fields)
    plain = dataclasses.replace(cfg, attention=f"reversible({attention}, {options}, backward=autodiff)")
    params, tokens = noisy_params(key, cfg), tokens_of(key, 2, cfg.seq_len)
    return relative_difference(_gradient(params, tokens, cfg), _gradient(params, tokens, plain))

  return measure


def temporary_bytes(cfg: GPTConfig, batch: int = 2) -> int:
  """Compiled temporary memory of the gradient of the blocks alone, where parameter gradients are outputs."""
  abstract = lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
  params = jax.tree.map(abstract, gpt.specs(cfg)["runs"], is_leaf=gpt.is_spec)
  x = jax.ShapeDtypeStruct((batch, cfg.seq_len, cfg.n_embd), jnp.float32)

  def objective(params, x):
    ctx = gpt.context(jnp.arange(cfg.seq_len)[None, :], cfg)
    return jnp.sum(jnp.sin(stack.forward(params, x, ctx, cfg)[0]))

  compiled = jax.jit(jax.grad(objective, (0, 1))).lower(params, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def memory_slope(cfg: GPTConfig, depths: tuple[int, ...] = (8, 64), batch: int = 2) -> float:
  """Temporary memory per layer in units of one float32 tensor B·T·C, by least squares over `depths`."""
  size = [temporary_bytes(dataclasses.replace(cfg, n_layer=depth), batch) for depth in depths]
  return float(np.polyfit(depths, size, 1)[0]) / (4 * batch * cfg.seq_len * cfg.n_embd)


def _memory(attention: str) -> Check:
  cfg = GPTConfig(vocab_size=VOCAB, seq_len=64, n_layer=8, n_head=4, n_kv_head=4, n_embd=64, attention=attention)
  return lambda key, scale: memory_slope(cfg)


CLAIMS = (
  claim(
    "reversible.reconstruction",
    "with bfloat16 inside F and G, the backward pass recovers every word of the fixed-point streams",
    _differing_words(dataclasses.replace(SMALL, attention="reversible(mix=givens)", compute_dtype="bfloat16")),
    0.0,
    _differing_words(DRIFTING),
    refs=("MacKay et al., 2018, arXiv 1810.10999",),
  ),
  claim(
    "reversible.gradient",
    "reconstruction gives the gradient that differentiating the stored forward pass gives",
    _gradient_error("standard", "state=float32"),
    1e-5,
    _gradient_error("standard", "state=float32, mix=givens", n_layer=32, compute_dtype="bfloat16"),
    refs=("Gomez et al., 2017, arXiv 1707.04585",),
  ),
  claim(
    "reversible.memory",
    "temporary memory of the gradient grows by at most 0.05 tensors B·T·C per layer, from 8 to 64 layers",
    _memory("reversible"),
    0.05,
    _memory("reversible(backward=autodiff)"),
  ),
)
