"""Gated sums without a softmax: o_i = Σ_{j≤i} w_ij v_j and mass_i = Σ_{j≤i} w_ij with w = σ(logit) or step(logit).

A sigmoid needs no row maximum and no rescaling, so one pass over tiles is enough, and its gradient needs the weights
alone: ∂w/∂logit = w(1-w). Nothing of size T×T exists beyond a tile.

Layout: every array carries time on axis 3. Query side [B, K, R, T] or [B, K, R, T, D] with R = H/K query heads per
key/value head; key side [B, K, 1 or R, S] or [B, K, 1, S, D]; values v_BKSD.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.tiles import (
  join_tiles,
  pad_to,
  padded_length,
  segment_axes,
  spans,
  split_tiles,
  tile_mask,
  tile_numbers,
  visible,
)

LOGIT_FLOOR = -80.0  # exp(80) is finite in float32, and σ(-80) = 2e-35 is zero for every purpose.


class Score(NamedTuple):
  """How a query tile and a range of keys give logits; a static, hashable strategy.

  Args:
    logit: `(q, k) -> [B, K, R, T, S]` float32.
    pull: `(q, k, d_logit) -> (dq, dk)`, the transpose of `logit`'s derivative.
    strict: keys must lie before the query; otherwise a query also sees itself.
    product_odds: `(q, k) -> exp(-logit)` where something cheaper than one exponential per pair gives it, else `None`.
  """

  logit: Callable[[Any, Any], jax.Array]
  pull: Callable[[Any, Any, jax.Array], tuple[Any, Any]]
  strict: bool = False
  product_odds: Callable[[Any, Any], jax.Array] | None = None

  def odds(self, q, k) -> jax.Array:
    """exp(-logit), finite."""
    if self.product_odds:
      return self.product_odds(q, k)
    return jnp.exp(-jnp.maximum(self.logit(q, k), LOGIT_FLOOR))


def wide(dtype) -> jnp.dtype:
  """The accumulation type: float32, or float64 for float64 inputs."""
  return jnp.promote_types(dtype, jnp.float32)


@jax.custom_jvp
def hard_gate(logit: jax.Array) -> jax.Array:
  """1 where logit > 0, else 0 (a tie is not selected), with the derivative of σ(logit): straight through.

  Without it a hard gate gives its scorer no gradient at all (Bengio et al., 2013, arXiv 1308.3432).
  """
  return (logit > 0).astype(logit.dtype)


@hard_gate.defjvp
def _hard_gate_jvp(primals, tangents):
  (logit,), (d_logit,) = primals, tangents
  gate = jax.nn.sigmoid(logit)
  return hard_gate(logit), gate * (1 - gate) * d_logit


def causal_mask(T: int, segment_ids_BT=None, strict: bool = False):
  """Dense [T, S] (or [B, 1, 1, T, S]) mask of the keys each query sees."""
  position = jnp.arange(T)
  return visible(position[:, None] - int(strict), position[None, :], 0, *segment_axes(segment_ids_BT, segment_ids_BT))


def dense_gates(score: Score, hard: bool, q, k, mask) -> jax.Array:
  """w [B, K, R, T, S] = σ(logit), or step(logit) where `hard`; zero where masked."""
  logit = score.logit(q, k)
  return jnp.where(mask, hard_gate(logit) if hard else jax.nn.sigmoid(logit), 0.0)


def dense_gated_sum(score: Score, hard: bool, q, k, v, mask):
  """The obvious form: all gates at once. Returns (o_BKRTD, mass_BKRT) in float32; memory O(T·S)."""
  gate = dense_gates(score, hard, q, k, mask)
  out = jnp.einsum("bkrts,bksd->bkrtd", gate, v.astype(gate.dtype))
  return out, jnp.sum(gate, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated_sum(score: Score, hard: bool, q, k, v, segment_ids_BT):
  """`dense_gated_sum` under the causal mask, one query tile at a time, with its own gradient.

  Cost T²·D FLOPs per head, memory O(T).
  """
  return _forward(score, hard, q, k, v, segment_ids_BT)


def _forward(score, hard, q, k, v, segment_ids):
  T = v.shape[2]
  q, k, v, segment_ids = pad_inputs(q, k, v, segment_ids)
  outs, masses = [], []
  for span in spans(v.shape[2]):
    keys, values = _keys(span, k, v)

    def tile(_, xs, span=span, keys=keys, values=values):
      i, q_tile = xs
      mask = tile_mask(span, i, segment_ids, strict=score.strict)
      if hard:
        gate = jnp.where(mask, hard_gate(score.logit(q_tile, keys)), 0.0)
      else:
        gate = jnp.where(mask, 1 / (1 + score.odds(q_tile, keys)), 0.0)
      out = jnp.einsum("bkrts,bksd->bkrtd", gate.astype(values.dtype), values, preferred_element_type=wide(v.dtype))
      return None, (out, jnp.sum(gate, -1))

    _, (out, mass) = jax.lax.scan(tile, None, (tile_numbers(span, v), _split(q, span)))
    outs.append(join_tiles(out, 3))
    masses.append(join_tiles(mass, 3))
  return jnp.concatenate(outs, 3)[:, :, :, :T], jnp.concatenate(masses, 3)[..., :T]


def _fwd_rule(score, hard, q, k, v, segment_ids):
  return _forward(score, hard, q, k, v, segment_ids), (q, k, v, segment_ids)


def _bwd_rule(score, hard, saved, cotangents):
  """dV = wᵀ dO and dlogit = w(1-w)(dO Vᵀ + dmass); with odds p = exp(-logit), w = 1/(1+p) and 1-w = p·w."""
  q, k, v, segment_ids = saved
  T, dtype = v.shape[2], v.dtype
  q, k, v, segment_ids = pad_inputs(q, k, v, segment_ids)
  d_out, d_mass = (pad_to(d, v.shape[2], 3) for d in cotangents)
  dk, dv = jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a.dtype)), (k, v))
  dqs = []
  for span in spans(v.shape[2]):
    keys, values = _keys(span, k, v)

    def tile(carry, xs, span=span, keys=keys, values=values):
      i, q_tile, d_tile, d_mass_tile = xs
      mask = tile_mask(span, i, segment_ids, strict=score.strict)
      odds = score.odds(q_tile, keys)
      soft = jnp.where(mask, 1 / (1 + odds), 0.0)
      gate = jnp.where(mask, hard_gate(score.logit(q_tile, keys)), 0.0) if hard else soft
      d_tile = d_tile.astype(dtype)
      d_gate = jnp.einsum("bkrtd,bksd->bkrts", d_tile, values, preferred_element_type=wide(v.dtype))
      d_logit = (d_gate + d_mass_tile[..., None]) * (soft * soft * odds)
      dq, dk_tile = score.pull(q_tile, keys, d_logit)
      dv_tile = jnp.einsum("bkrts,bkrtd->bksd", gate.astype(dtype), d_tile, preferred_element_type=wide(v.dtype))
      return jax.tree.map(jnp.add, carry, (dk_tile, dv_tile)), dq

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a.dtype)), (keys, values))
    tiles = (tile_numbers(span, v), _split(q, span), *_split((d_out, d_mass), span))
    (dk_seen, dv_seen), dq = jax.lax.scan(tile, zeros, tiles)
    dk = jax.tree.map(lambda a, d, span=span: a.at[:, :, :, : span.stop].add(d), dk, dk_seen)
    dv = dv.at[:, :, : span.stop].add(dv_seen)
    dqs.append(jax.tree.map(lambda a: join_tiles(a, 3), dq))
  dq = jax.tree.map(lambda like, *parts: jnp.concatenate(parts, 3)[:, :, :, :T].astype(like.dtype), q, *dqs)
  dk = jax.tree.map(lambda like, d: d[:, :, :, :T].astype(like.dtype), k, dk)
  return dq, dk, dv[:, :, :T].astype(dtype), None


gated_sum.defvjp(_fwd_rule, _bwd_rule)


def pad_inputs(q, k, v, segment_ids):
  """Everything padded to whole tiles; padding belongs to a document of its own."""
  length = padded_length(v.shape[2])
  if segment_ids is not None:
    segment_ids = pad_to(segment_ids, length, 1, value=-1)
  q, k = jax.tree.map(lambda a: pad_to(a, length, 3), (q, k))
  return q, k, pad_to(v, length, 2), segment_ids


def _keys(span, k, v):
  return jax.tree.map(lambda a: a[:, :, :, : span.stop], k), v[:, :, : span.stop]


def _split(tree, span):
  return jax.tree.map(lambda a: split_tiles(a, span, 3), tree)
