"""How exactly a reversible stack recovers its inputs, measured inside the backward pass that training uses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt, stack


class Missed(NamedTuple):
  """Entries of the two input streams that came back different, and their largest deviation."""

  words: float
  deviation: float


def missed(params, tokens_BT: jax.Array, cfg: GPTConfig) -> Missed:
  """Runs forward and backward on `tokens_BT` and compares the reconstructed input of the stack with the true one.

  With several reversible stacks in one model the counts and deviations add up. Zero when nothing is reconstructed, so
  look at `backward` too.
  """
  witness = jax.jit(jax.grad(_objective), static_argnums=3)(jnp.zeros(2), params, tokens_BT, cfg)
  return Missed(*map(float, witness))


def _objective(witness, params, tokens_BT, cfg):
  params = gpt.cast(params, cfg)
  ctx = gpt.context(jnp.arange(tokens_BT.shape[1])[None, :], cfg)
  ctx = ctx.replace(shared=ctx.shared | {"witness": witness})
  x, _ = stack.forward(params["runs"], gpt.embed(params, tokens_BT, cfg), ctx, cfg)
  return jnp.sum(jnp.sin(x.astype(jnp.float32)))
