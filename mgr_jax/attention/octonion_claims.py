"""Claims about octonion attention as a layer; the algebra has its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import octonion_claims, octonion_mixing_claims
from mgr_jax.algebra.octonion_claims import generator
from mgr_jax.attention.mechanism import Context, Mechanism, rope_tables
from mgr_jax.claims import Check, Claim, claim, worst_of
from mgr_jax.config import GPTConfig

T = 20


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(record, params, x_BTC, cfg, opts, shift):
  positions = shift + jnp.arange(x_BTC.shape[1])[None]
  ctx = Context(positions, shared={"rope": rope_tables(positions, cfg.head_dim, cfg.rope_base)})
  return record.apply(params, x_BTC, ctx, cfg, opts)[0]


def _layer(rng, record: Mechanism, **options):
  """A layer of one key/value head and two query heads whose output is what its heads return, [B, T, 2·D]."""
  cfg = GPTConfig(vocab_size=2, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
  opts = record.options(**options)
  specs = record.param_specs(cfg, opts)
  params = {name: 0.3 * rng.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}
  return cfg, opts, params | {"wo": np.eye(32, dtype=np.float32).reshape(2, 16, 32)}


def _shifted(record: Mechanism, rope_mode: str) -> Check:
  """Largest change of the output when all positions move."""

  def measure(key, scale):
    del scale
    rng = generator(key)
    cfg, opts, params = _layer(rng, record, rope_mode=rope_mode)
    x = rng.standard_normal((2, T, 32), np.float32)
    still = _apply(record, params, x, cfg, opts, 0)
    moved = [_apply(record, params, x, cfg, opts, shift) - still for shift in (1, 17, 1000)]
    return worst_of(np.max(np.abs(m)) for m in moved)

  return measure


def _transported(record: Mechanism, factor: float) -> Check:
  """How far octonions of the output exceed the largest value so far, and differ in size from the value of token 0
  there; relative. `factor` scales the values that are compared."""

  def measure(key, scale):
    del scale
    rng, worst = generator(key), 0.0
    for bracketing in ("early", "late"):
      cfg, opts, params = _layer(rng, record, bracketing=bracketing)
      x = rng.standard_normal((2, T, 32), np.float32)
      size = lambda y: np.linalg.norm(np.asarray(y).reshape(*y.shape[:2], -1, 8, 2), axis=3)
      out = size(_apply(record, params, x, cfg, opts, 0))
      value = factor * size(np.einsum("btc,cd->btd", x, params["wv"][:, 0]))
      excess = out / np.maximum.accumulate(value, 1) - 1
      worst = worst_of(worst, float(excess.max()), float(np.abs(out[:, 0] / value[:, 0] - 1).max()))
    return worst

  return measure


def mechanism_claims(record: Mechanism) -> tuple[Claim, ...]:
  """All claims of the mechanism."""
  return (
    *octonion_claims.CLAIMS,
    *octonion_mixing_claims.CLAIMS,
    claim(
      "octonion.shift_invariance",
      "adding one number to all positions changes no output; with rotated octonions it does",
      _shifted(record, "score_only"),
      1e-4,
      _shifted(record, "standard"),
    ),
    claim(
      "octonion.transport_is_isometric",
      "an output octonion is no longer than the longest value before it, and at the first token as long as the value",
      _transported(record, 1.0),
      1e-5,
      _transported(record, 1.01),
    ),
  )
