"""Claims about ultrametric attention as a layer, each with a broken twin; sums and digits have their own files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.mechanism import Context, Mechanism, rope_tables
from mgr_jax.claims import Check, Claim, claim, largest_difference, worst_of
from mgr_jax.config import GPTConfig


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _layer(rng, record: Mechanism, **options):
  """A tiny configuration, options, and parameters in which no path is switched off."""
  cfg = GPTConfig(vocab_size=2, seq_len=64, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
  opts = record.options(**{"p": 3, "K": 2, **options})
  draw = lambda spec: np.asarray(spec.draw(jax.random.key(0))) if spec.role == "scalar" else None
  noise = lambda spec: rng.normal(size=spec.shape, scale=0.25).astype(np.float32)
  specs = record.param_specs(cfg, opts)
  return cfg, opts, {name: noise(s) + (0 if s.role == "matrix" else draw(s)) for name, s in specs.items()}


def _context(positions_BT, cfg):
  return Context(positions_BT, shared={"rope": rope_tables(positions_BT, cfg.head_dim, cfg.rope_base)})


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(record, params, x_BTC, cfg, opts):
  return record.apply(params, x_BTC, _context(jnp.arange(x_BTC.shape[1])[None], cfg), cfg, opts)[0]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _step(record, params, x_BtC, state_and_start, cfg, opts):
  state, start = state_and_start
  positions = start + jnp.arange(x_BtC.shape[1])[None]
  return record.step(params, x_BtC, state, _context(positions, cfg), cfg, opts)


DECODERS = (
  {"decay": "learned"},
  {"digits": "soft", "decay": "learned"},
  {"digits": "hard", "decode": "cache"},
)


def _decode(record: Mechanism, frozen_clock: bool) -> Check:
  """Largest difference of `step` in pieces of 1 and 5 tokens from `apply`; a frozen clock ages no untouched node."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for options in DECODERS[:1] if frozen_clock else DECODERS:
      cfg, opts, params = _layer(rng, record, **options)
      x = rng.standard_normal((2 * scale, 16, cfg.n_embd), np.float32)
      whole, state, at, found = _apply(record, params, x, cfg, opts), None, 0, []
      state = record.init_state(cfg, opts, len(x), 16)
      for piece in (1, 5, 1, 1, 5, 1, 1, 1):
        start = np.int32(0 if frozen_clock else at)
        y, state = _step(record, params, x[:, at : at + piece], (state, start), cfg, opts)
        found.append(y)
        at += piece
      worst = worst_of(worst, largest_difference(np.concatenate(found, 1), whole))
    return worst

  return measure


def _coarsening(record: Mechanism, used: int) -> Check:
  """Difference between a layer that uses `used` of 4 digits and one that was built with only the first two."""

  def measure(key, scale):
    rng = _rng(key)
    cfg, fine, params = _layer(rng, record, p=3, K=4, digits_k=used)
    coarse = record.options(p=3, K=2, alpha_init=fine.alpha_mean)
    short = params | {name: params[name][:, :, :2] for name in ("dq", "dk")}
    x = rng.standard_normal((2 * scale, 24, cfg.n_embd), np.float32)
    return largest_difference(_apply(record, params, x, cfg, fine), _apply(record, short, x, cfg, coarse))

  return measure


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _energy_gradient(record, params, x_BTC, cfg, opts):
  def energy(params):
    return jnp.sum(jnp.square(record.apply(params, x_BTC, _context(jnp.arange(24)[None], cfg), cfg, opts)[0]))

  return jax.grad(energy)(params)


def _routing(record: Mechanism, *modes: dict) -> Check:
  """1 when some routing parameter receives no gradient from the output, else 0."""

  def measure(key, scale):
    del scale
    rng = _rng(key)
    for options in modes:
      cfg, opts, params = _layer(rng, record, **options)
      gradient = _energy_gradient(record, params, rng.standard_normal((1, 24, 16), np.float32), cfg, opts)
      if any(np.all(np.asarray(gradient[name]) == 0) for name in ("dq", "dk", "wq", "wk")):
        return 1.0
    return 0.0

  return measure


def mechanism_claims(record: Mechanism) -> tuple[Claim, ...]:
  """What `record` promises besides the algebra. Checks run the record they are given, so mutants can be tested."""
  return (
    claim(
      "ultrametric.decode",
      "step in pieces equals apply, for tables of hard and soft digits with decay and for the cache",
      _decode(record, False),
      1e-5,
      _decode(record, True),
    ),
    claim(
      "ultrametric.coarsening",
      "using two of four digits is, bit for bit, the layer with two digits: a coarser ball, no approximation",
      _coarsening(record, 2),
      0.0,
      _coarsening(record, 3),
    ),
    claim(
      "ultrametric.routing_gradient",
      "queries, keys and digit tables receive gradient from st and soft digits; from hard digits exactly none",
      _routing(record, {}, {"digits": "soft"}, {"ste": "local"}),
      0.0,
      _routing(record, {"digits": "hard"}),
    ),
  )
