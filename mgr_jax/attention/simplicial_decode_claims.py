"""The claim that decoding in pieces equals the whole sequence, for the modes of a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.mechanism import Context, Mechanism, rope_tables
from mgr_jax.attention.simplicial_form_claims import largest, rng_of
from mgr_jax.claims import Check, Claim, claim, worst_of
from mgr_jax.config import GPTConfig

# Options, and the sizes of the pieces; every size is a program of its own.
DECODE_CASES = (
  ({"w1": 4, "w2": 2}, (6, 6)),
  ({"mode": "two_hop"}, (3, 3, 3)),
  ({"mode": "resolvent"}, (3, 3, 3)),
  ({"mode": "linear2", "order": "increasing", "decay": "alibi"}, (3, 3, 3)),
)


def draw_layer(rng, record: Mechanism, **options):
  """A tiny configuration with two grouped heads, options, and parameters in which no path is switched off."""
  cfg = GPTConfig(vocab_size=2, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, seq_len=32)
  opts = record.options(**options)
  specs = record.param_specs(cfg, opts)
  draw = lambda s: rng.standard_normal(s.shape, np.float32) * np.float32(0.25 if s.role == "matrix" else 0.5)
  return cfg, opts, {name: draw(spec) for name, spec in specs.items()}


def _context(positions, rope_positions, cfg) -> Context:
  return Context(positions, shared={"rope": rope_tables(rope_positions, cfg.head_dim, cfg.rope_base)})


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _whole(record, cfg, opts, params, x):
  positions = jnp.arange(x.shape[1])[None]
  return record.apply(params, x, _context(positions, positions, cfg), cfg, opts)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _piece(record, cfg, opts, params, x, state, start, rotated):
  positions = start + jnp.arange(x.shape[1])[None]
  rope_positions = jnp.where(rotated, positions, 0)
  return record.step(params, x, state, _context(positions, rope_positions, cfg), cfg, opts)


def pieces_error(rng, record: Mechanism, options, sizes, rotated: bool = True) -> float:
  """Largest difference between the whole sequence and pieces of those sizes, one after the other."""
  cfg, opts, params = draw_layer(rng, record, **options)
  x = rng.standard_normal((2, sum(sizes), cfg.n_embd), np.float32)
  state, outputs, start = record.init_state(cfg, opts, 2, 32), [], 0
  for size in sizes:
    y, state = _piece(record, cfg, opts, params, x[:, start : start + size], state, np.int32(start), rotated)
    outputs.append(np.asarray(y))
    start += size
  return largest(np.concatenate(outputs, 1) - np.asarray(_whole(record, cfg, opts, params, x)))


def _decoding(record: Mechanism, cases, rotated: bool = True) -> Check:
  def measure(key, scale):
    del scale
    rng = rng_of(key)
    return worst_of(pieces_error(rng, record, options, sizes, rotated) for options, sizes in cases)

  return measure


def layer_claims(record: Mechanism) -> tuple[Claim, ...]:
  """Claims that run the whole layer."""
  return (
    claim(
      "simplicial.decoding",
      "ring buffers, caches and states give the outputs of the whole sequence, in pieces and token by token",
      _decoding(record, DECODE_CASES),
      1e-5,
      _decoding(record, DECODE_CASES[:1], rotated=False),
    ),
  )
