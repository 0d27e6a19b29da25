"""Claims about quaternion attention, each with a broken twin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.attention.mechanism import Context, Mechanism, rope_tables
from mgr_jax.attention.quaternion_transport import blocks, pairwise, turn
from mgr_jax.claims import Check, Claim, claim, largest_difference, worst_of
from mgr_jax.config import GPTConfig

ACTIONS = ("left", "sandwich")


def _weights(rng, *shape) -> np.ndarray:
  """Random causal attention weights [*shape, T, T]."""
  logits = rng.standard_normal((*shape, shape[-1]))
  weight = np.where(np.tri(shape[-1], dtype=bool), np.exp(logits), 0)
  return weight / weight.sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _factorised(weight, q, k, v, action, inverse=True):
  moved = turn(k, v, action, inverse)
  return turn(q, jnp.einsum("bhts,bhsd->bhtd", weight, moved, precision="highest"), action, False)


_pairwise = jax.jit(pairwise, static_argnums=4)
_turned = jax.jit(turn, static_argnums=(2, 3))


def _factorisation(inverse: bool) -> Check:
  """Largest difference of both forms, T = 33, D = 16, as a multiple of 1e-12 in float64 and of 2e-5 in float32."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    weight, qkv = _weights(rng, 2 * scale, 4, 33), rng.standard_normal((3, 2 * scale, 4, 33, 16))
    difference = lambda action, *args: largest_difference(_factorised(*args, action, inverse), _pairwise(*args, action))
    for action in ACTIONS:
      single = difference(action, *(x.astype(np.float32) for x in (weight, *qkv)))
      with jax.enable_x64(True):
        double = difference(action, weight, *qkv)
      worst = worst_of(worst, single / 2e-5, double / 1e-12)
    return worst

  return measure


def _bound(stretch: float) -> Check:
  """Largest relative excess of a block's length over the weighted mean of its values' lengths."""

  def measure(key, scale):
    rng, worst = generator(key), -np.inf
    weight, (q, k, v) = _weights(rng, scale, 2, 33), rng.standard_normal((3, scale, 2, 33, 16)).astype(np.float32)
    length = lambda x: np.linalg.norm(blocks(np.asarray(x)), axis=-2)
    bound = np.einsum("bhts,bhsn->bhtn", weight, length(v))
    for action in ACTIONS:
      out = _factorised(weight.astype(np.float32), q, k, stretch * v, action)
      worst = worst_of(worst, float(np.max(length(out) / bound - 1)))
    return worst

  return measure


def _signs(action: str) -> Check:
  """Largest change of the output of `action` when rotors of random blocks change their sign."""

  def measure(key, scale):
    rng = generator(key)
    q, k, v = rng.standard_normal((3, scale, 2, 33, 16)).astype(np.float32)
    sign = np.tile(rng.choice([-1.0, 1.0], (scale, 2, 33, 4)), (1, 1, 1, 4)).astype(np.float32)
    weight = _weights(rng, scale, 2, 33).astype(np.float32)
    flipped = np.asarray(_factorised(weight, sign * q, k, v, action))
    if action == "left":
      flipped = sign * flipped
    return largest_difference(flipped, _factorised(weight, q, k, v, action))

  return measure


def _left_is_blind(key, scale) -> float:
  """How far `left` is from ignoring the sign of a rotor."""
  q, v = generator(key).standard_normal((2, scale, 1, 8, 16)).astype(np.float32)
  return largest_difference(_turned(-q, v, "left", False), _turned(q, v, "left", False))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(record, params, x_BTC, cfg, opts, shift):
  positions = shift + jnp.arange(x_BTC.shape[1])[None]
  ctx = Context(positions, shared={"rope": rope_tables(positions, cfg.head_dim, cfg.rope_base)})
  return record.apply(params, x_BTC, ctx, cfg, opts)[0]


def _layer(record, rng, **options):
  """A tiny configuration, its options, parameters in which no path is switched off, and an input."""
  cfg = GPTConfig(vocab_size=2, n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
  opts = record.options(**options)
  params = {n: s.shape[0] ** -0.5 * rng.standard_normal(s.shape) for n, s in record.param_specs(cfg, opts).items()}
  params = jax.tree.map(np.float32, params)
  return cfg, opts, params, rng.standard_normal((1, 33, 32), np.float32)


def _shifted(record: Mechanism, *modes: str) -> Check:
  """Largest change of the output when all positions move by 1, 17 and 1000."""

  def measure(key, scale):
    del scale
    worst = 0.0
    for mode in modes:
      cfg, opts, params, x = _layer(record, generator(key), rope_mode=mode)
      out = lambda shift, cfg=cfg, opts=opts, params=params, x=x: _apply(record, params, x, cfg, opts, shift)
      worst = worst_of(worst, *(largest_difference(out(c), out(0)) for c in (1, 17, 1000)))
    return worst

  return measure


def _no_strength(record: Mechanism, logit: float) -> Check:
  """Largest difference of learned strength sigmoid(logit) from attention without rotors, same scores."""

  def measure(key, scale):
    del scale
    cfg, opts, params, x = _layer(record, generator(key), rotor_strength="learned")
    params["lam_raw"] = np.full(cfg.n_kv_head, logit, np.float32)
    plain = dataclasses.replace(opts, rotor_strength="fixed", rotor_action="none")
    without = {name: p for name, p in params.items() if name != "lam_raw"}
    return largest_difference(_apply(record, params, x, cfg, opts, 0), _apply(record, without, x, cfg, plain, 0))

  return measure


def layer_claims(record: Mechanism) -> tuple[Claim, ...]:
  """The claims that need the layer or its parts."""
  return (
    claim(
      "quaternion.factorisation",
      "û_i Σ_j p_ij ŵ_j* v_j = Σ_j p_ij (û_i ŵ_j*) v_j, and the same for the two-sided action",
      _factorisation(inverse=True),
      1.0,
      _factorisation(inverse=False),
    ),
    claim(
      "quaternion.length_bound",
      "a block of the output is at most as long as the weighted mean of its values: |y_i| <= Σ_j p_ij |v_j|",
      _bound(1.0),
      1e-6,
      _bound(1.01),
    ),
    claim(
      "quaternion.sign",
      "the two-sided action ignores the sign of a rotor; the one-sided action flips with it",
      lambda key, scale: worst_of(_signs(action)(key, scale) for action in ACTIONS),
      1e-6,
      _left_is_blind,
    ),
    claim(
      "quaternion.shift",
      "adding one number to all positions changes no output, though rotors come from placed queries and keys",
      _shifted(record, "right_rotor", "score_only"),
      1e-4,
      _shifted(record, "standard"),
      refs=("Su et al., 2021, arXiv 2104.09864",),
    ),
    claim(
      "quaternion.no_strength",
      "at strength 0 the layer is softmax attention",
      _no_strength(record, -1e9),
      1e-6,
      _no_strength(record, -3.0),
    ),
  )
