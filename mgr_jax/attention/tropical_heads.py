"""What tropical attention combines: scaled, centred float32 heads, their layouts, and the norm of what comes out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra.tropical_matmul import largest
from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_scan import Clock


class Heads(NamedTuple):
  """What is combined, in float32: q [B, T, H, D], k [B, T, K, D], v [B, T, K, E], decay [K].

  Max-plus loses order in bfloat16, where near ties become ties. With score centring E = D + 1: a column of zeros, whose
  output is the largest score.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  decay: jax.Array


def slopes(n_kv_head: int) -> list[float]:
  """Recency slopes λ of `alibi`: 0 for even heads, 2^(-8j/n) for the n odd ones; 2^-6 for a single head."""
  n = n_kv_head // 2
  if n_kv_head == 1:
    return [2.0**-6]
  return [2.0 ** (-8 * (i // 2 + 1) / n) if i % 2 else 0.0 for i in range(n_kv_head)]


def prepare(params, q, k, v, opts: Options) -> Heads:
  """Scales queries and keys by τ, centres as asked, appends the score column, and reads λ."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  tau = jnp.exp(params["log_tau"])
  q, k = jnp.repeat(tau, q.shape[2] // k.shape[2])[:, None] * q, tau[:, None] * k
  q, k = _centred(q) if opts.center_q else q, _centred(k) if opts.center_k else k
  v = _centred(v) if opts.center_v else v
  if scored(opts):
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, 1)])
  if opts.decay == "learned":
    decay = jnp.exp(params["log_decay"])
  elif opts.decay == "alibi":
    decay = jax.lax.stop_gradient(params["slopes"])
  else:
    decay = jnp.zeros(k.shape[2], jnp.float32)
  return Heads(q, k, v, decay)


def _centred(x, axis=-1):
  return x - largest(x, axis)


def scored(opts: Options) -> bool:
  """Whether values carry the column whose output is the largest score."""
  return opts.center_score and opts.agg == "maxplus"


def finish(y_BTHE, opts: Options):
  """Subtracts the largest score and normalises each head, [B, T, H, D]."""
  if scored(opts):
    y_BTHE = y_BTHE[..., :-1] - y_BTHE[..., -1:]
  if opts.out_norm == "rms":
    return rms_norm(y_BTHE)
  return _centred(y_BTHE) if opts.out_norm == "center_max" else y_BTHE


def time_first(heads: Heads):
  """q [T, B, K, R, D], k [T, B, K, D], v [T, B, K, E], decay."""
  B, T, H, D = heads.q.shape
  K = heads.k.shape[2]
  return (heads.q.reshape(B, T, K, H // K, D).swapaxes(0, 1), *(x.swapaxes(0, 1) for x in heads[1:3]), heads.decay)


def batch_first(y):
  """[T, B, K, R, E] -> [B, T, H, E]."""
  T, B, K, R, E = y.shape
  return y.swapaxes(0, 1).reshape(B, T, K * R, E)


def clock_of(ctx, batch: int) -> Clock:
  """Positions and document starts of a call, [T, B]."""
  position = jnp.broadcast_to(ctx.positions_BT, (batch, ctx.positions_BT.shape[1]))
  starts = position == 0
  if ctx.segment_ids_BT is not None:
    border = ctx.segment_ids_BT[:, 1:] != ctx.segment_ids_BT[:, :-1]
    starts |= jnp.pad(border, ((0, 0), (1, 0)))
  return Clock(position.T, starts.T)
