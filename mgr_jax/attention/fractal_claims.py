"""All claims about path-overlap attention and leaf memory; geometry is in `algebra.ifs_claims`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.ifs_map_claims import generator
from mgr_jax.attention import fractal_kernel_claims, fractal_memory_claims
from mgr_jax.attention.mechanism import Context, Mechanism, rope_tables
from mgr_jax.claims import Check, Claim, claim, worst_of
from mgr_jax.config import GPTConfig


def _layer(rng, record: Mechanism, **options):
  """A tiny configuration, options, and parameters in which no path is switched off."""
  cfg = GPTConfig(vocab_size=2, n_layer=1, n_head=2, n_kv_head=1, n_embd=8)
  opts = record.options(**options)
  specs = record.param_specs(cfg, opts)
  return cfg, opts, {name: 0.5 * rng.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(record, params, x_BTC, cfg, opts, shift):
  positions = shift + jnp.arange(x_BTC.shape[1])[None]
  ctx = Context(positions, shared={"rope": rope_tables(positions, cfg.head_dim, cfg.rope_base)})
  return record.apply(params, x_BTC, ctx, cfg, opts)[0]


def _shifted(record: Mechanism, *positions: str) -> Check:
  """Largest change of the output when all positions move by 1000."""

  def measure(key, scale):
    del scale
    rng, worst = generator(key), 0.0
    for position in positions:
      cfg, opts, params = _layer(rng, record, position=position)
      x = rng.standard_normal((1, 20, 8), np.float32)
      moved = _apply(record, params, x, cfg, opts, 1000) - _apply(record, params, x, cfg, opts, 0)
      worst = worst_of(worst, float(jnp.max(jnp.abs(moved))))
    return worst

  return measure


def mechanism_claims(record: Mechanism) -> tuple[Claim, ...]:
  """All claims that need the layer or its parts."""
  shift = claim(
    "fractal.shift_covariance",
    "addresses do not depend on positions: moving all of them changes no output, exactly",
    _shifted(record, "alibi", "none"),
    0.0,
    _shifted(record, "rope"),
  )
  return (*fractal_kernel_claims.CLAIMS, *fractal_memory_claims.CLAIMS, shift)
