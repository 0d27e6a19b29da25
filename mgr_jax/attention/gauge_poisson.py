"""The Poisson mixer: values take a Poisson number of random hops to tokens 0, 1, 2, 4, 8, ... back.

P is row-stochastic and lower-triangular: row t is a softmax over t itself and the tokens t - 2^j that exist, so a
distance d takes as many hops as it has binary ones. With m the mean number of hops of a head,

    y = Σ_(k<=K) w_k P^k v / Σ_(k<=K) w_k,   w_k = e^-m m^k / k!,

the semigroup e^(λτ(P - I)) at m = λτ by uniformization (Jensen, 1953), cut at K. What is cut is at most the Poisson
tail times the range of the values, and K is static: nothing about it depends on other tokens. Linear in T. Dyadic hops
are another class of functions than softmax over all tokens, not an approximation of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra.uniformization import poisson_sum
from mgr_jax.attention.gauge_options import Options
from mgr_jax.attention.mechanism import write_rows
from mgr_jax.params import ParamSpec


def poisson_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """off_bias [H, 1 + hops], of staying and of each hop, and time [H] with m = m_max · sigmoid(time)."""
  return {
    "off_bias": ParamSpec((cfg.n_head, 1 + opts.hops(cfg)), ("heads", None), role="scalar", init="zeros"),
    "time": ParamSpec((cfg.n_head,), ("heads",), role="scalar", init="zeros"),
  }


def rate(params, n_kv_head: int, opts: Options) -> jax.Array:
  """m [K, R], the mean number of hops."""
  return opts.m_max * jax.nn.sigmoid(params["time"]).reshape(n_kv_head, -1)


def offsets(length: int, cfg, opts: Options) -> list[int]:
  """The hops that are not longer than a sequence of `length` tokens."""
  return [2**j for j in range(opts.hops(cfg)) if 2**j < length]


def shifted(x: jax.Array, d: int, axis: int, value=0) -> jax.Array:
  """x_(t-d) at t along `axis`, `value` where there is none."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (d, 0)
  return jax.lax.slice_in_dim(jnp.pad(x, widths, constant_values=value), 0, x.shape[axis], axis=axis)


def hop_weights(params, q, k, segment_ids_BT, taps: Sequence[int]) -> jax.Array:
  """P [B, K, R, T, 1 + taps]: probability to stay, and of each hop; exactly 0 where a hop leaves the document."""
  B, K, R, T, D = q.shape
  scale, position = D**-0.5, jnp.arange(T)
  bias = params["off_bias"].reshape(K, R, 1, -1)
  logits = [jnp.broadcast_to(bias[..., 0], (B, K, R, T))]
  for j, d in enumerate(taps, 1):
    score = scale * jnp.sum(q.astype(jnp.float32) * shifted(k, d, 2)[:, :, None].astype(jnp.float32), -1)
    seen = position >= d
    if segment_ids_BT is not None:
      seen = (seen & (segment_ids_BT == shifted(segment_ids_BT, d, 1, -1)))[:, None, None]
    logits.append(jnp.where(seen, score + bias[..., j], -jnp.inf))
  return jax.nn.softmax(jnp.stack(logits, -1), -1)


def hop(P, z, taps: Sequence[int]) -> jax.Array:
  """P z for z [B, K, R, T, D]."""
  out = P[..., :1] * z
  for j, d in enumerate(taps, 1):
    out += P[..., j : j + 1] * shifted(z, d, 3)
  return out


def mix_hops(params, q, k, v, segment_ids_BT, cfg, opts: Options) -> jax.Array:
  """[B, K, R, T, D] by Horner's rule, z ← v + (m/k) P z for k = K .. 1: K (taps + 1) multiply-adds per channel."""
  taps = offsets(q.shape[3], cfg, opts)
  P = hop_weights(params, q, k, segment_ids_BT, taps)
  m = rate(params, q.shape[1], opts)[:, :, None, None]
  values = jnp.broadcast_to(v[:, :, None], q.shape).astype(jnp.float32)
  return poisson_sum(lambda z: hop(P, z, taps), values, m, opts.n_terms).astype(q.dtype)


class Hops(NamedTuple):
  """P^n v of all tokens for n = 1 .. K - 1, in the compute dtype: K - 1 times what a value cache of all heads holds."""

  z_NBSHD: jax.Array


def init_hops(cfg, opts: Options, batch: int, max_len: int) -> Hops:
  """Nothing seen yet."""
  shape = (opts.n_terms - 1, batch, max_len, cfg.n_head, cfg.head_dim)
  return Hops(jnp.zeros(shape, cfg.compute_dtype))


def step_hops(params, q_BtHD, cache, hops: Hops, ctx, cfg, opts: Options) -> tuple[jax.Array, Hops]:
  """t new tokens, whose keys and values `cache` holds already: one power of P after the other, [B, t, H, D]."""
  B, t, H, D = q_BtHD.shape
  K, S = cfg.n_kv_head, cache.k_BSKD.shape[1]
  taps = jnp.array([2**j for j in range(opts.hops(cfg))])
  position = jnp.broadcast_to(ctx.positions_BT, (B, t))
  source = position[..., None] - taps
  rows = jnp.arange(B)[:, None, None]
  taken = lambda buffer: buffer[rows, jnp.clip(source, 0, S - 1)].astype(jnp.float32)  # [B, t, taps, ...]
  per_head = lambda x: jnp.repeat(x, H // K, axis=-2)
  score = D**-0.5 * jnp.sum(q_BtHD[:, :, None].astype(jnp.float32) * per_head(taken(cache.k_BSKD)), -1)
  bias = params["off_bias"]
  moves = jnp.where((source >= 0)[..., None], score + bias[:, 1:].T, -jnp.inf)
  stay = jnp.broadcast_to(bias[:, 0], (B, t, 1, H))
  P = jax.nn.softmax(jnp.concatenate([stay, moves], 2), 2)[..., None]
  move = lambda z, past: P[:, :, 0] * z + jnp.sum(P[:, :, 1:] * past, 2)

  m = rate(params, K, opts).reshape(H, 1)
  own = per_head(cache.v_BSKD[rows[..., 0], jnp.clip(position, 0, S - 1)].astype(jnp.float32))
  z = move(own, per_head(taken(cache.v_BSKD)))

  def power(carry, xs):
    z, weight, total, mass = carry
    past, n = xs
    past = write_rows(past, z, ctx.positions_BT, ctx.valid_BT)
    z, weight = move(z, taken(past)), weight * m / n
    return (z, weight, total + weight * z, mass + weight), past

  n = jnp.arange(2, opts.n_terms + 1, dtype=jnp.float32)
  (_, _, total, mass), z_NBSHD = jax.lax.scan(power, (z, m, own + m * z, 1 + m), (hops.z_NBSHD, n))
  return (total / mass).astype(q_BtHD.dtype), Hops(z_NBSHD)
