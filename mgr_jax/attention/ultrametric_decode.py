"""Decode states of `ultrametric`: sums per leaf (soft digits), sums per node (hard digits), or a cache of all tokens.

Tables are read for all new tokens at once, the new tokens see each other directly, and then the table takes them up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra import padic_kernel
from mgr_jax.attention import ultrametric_balls as balls
from mgr_jax.attention import ultrametric_features, ultrametric_sort
from mgr_jax.attention.mechanism import write_rows
from mgr_jax.attention.ultrametric_chunks import with_ones
from mgr_jax.attention.ultrametric_dense import lcp_weights, sums
from mgr_jax.attention.ultrametric_digits import class_of
from mgr_jax.attention.ultrametric_options import Options

DIRECT = 64  # Up to so many new tokens are compared pair by pair; more go through the training implementation.


class Cache(NamedTuple):
  """Digits and values of all tokens: classes int8 [B, S, G, K], or probabilities [B, S, G, K, p] of soft digits."""

  digits_BSGK: jax.Array
  v_BSGD: jax.Array


class LeafSums(NamedTuple):
  """Σ λ^(now - t) Φ(b_t) [v_t, 1] as of the last consumed token, [B, G, p^K, D + 1]."""

  sums: jax.Array


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """4·nodes·(D + 1) bytes per key/value head for a table of hard digits, p^K rows for soft ones, or a token cache."""
  G, D = cfg.n_kv_head, cfg.head_dim
  if opts.decoder == "cache":
    kind = ((opts.depth, opts.p), jnp.float32) if opts.digits == "soft" else ((opts.depth,), jnp.int8)
    digits = jnp.zeros((batch, max_len, G, *kind[0]), kind[1])
    return Cache(digits, jnp.zeros((batch, max_len, G, D), cfg.compute_dtype))
  if opts.digits == "soft":
    return LeafSums(jnp.zeros((batch, G, opts.leaves, D + 1), jnp.float32))
  return balls.empty(batch * G, opts.nodes, D + 1, opts.decay != "none")


def step(state, a, b, c_GR, v_BtGD, log_decay_G, ctx, opts: Options):
  """o [B, G, R, t, D] of t new tokens with digits a [B, G, R, K, p, t] and b [B, G, K, p, t], and the new state.

  A table of hard digits costs O(K·D) per token and head, of soft ones O(p^K·D), a cache O(S·(K·p + D)).
  """
  if isinstance(state, Cache):
    return _cache_step(state, a, b, c_GR, v_BtGD, log_decay_G, ctx, opts)
  valid = ctx.valid_BT
  valid = jnp.ones(v_BtGD.shape[:2], bool) if valid is None else valid
  valid = jnp.broadcast_to(valid, v_BtGD.shape[:2])
  v = with_ones(v_BtGD).swapaxes(1, 2)
  if isinstance(state, LeafSums):
    past, state = _leaf_step(state, a, b, c_GR, v, log_decay_G, valid)
  else:
    past, state = _node_step(state, a, b, c_GR, v, log_decay_G, valid, ctx.positions_BT, opts)
  out, mass = _among_new(a, b, c_GR, v_BtGD, log_decay_G, opts)
  return (past[..., :-1] + out) / (past[..., -1:] + mass), state


def _among_new(a, b, c, v, log_decay, opts):
  t = v.shape[1]
  if t <= DIRECT:
    lag = jnp.arange(t)[:, None] - jnp.arange(t)
    return sums(lcp_weights(a, b, c, log_decay, lag >= 0, lag), v)
  leaves_fit = opts.nodes <= opts.f_max
  forward = ultrametric_features.forward if leaves_fit or opts.digits == "soft" else ultrametric_sort.forward
  y, mass, *_ = forward(a, b, c, v, log_decay, None, opts.chunk)
  return y * mass, mass


def _cache_step(cache, a, b, c, v, log_decay, ctx, opts):
  new = jnp.moveaxis(b, -1, 1) if opts.digits == "soft" else jnp.moveaxis(class_of(b), -1, 1).astype(jnp.int8)
  put = lambda buffer, rows: write_rows(buffer, rows, ctx.positions_BT, ctx.valid_BT)
  cache = Cache(put(cache.digits_BSGK, new), put(cache.v_BSGD, v))
  keys = jnp.moveaxis(cache.digits_BSGK, 1, 3 if opts.digits != "soft" else 4)
  if opts.digits != "soft":
    keys = (keys[..., None, :] == jnp.arange(opts.p, dtype=jnp.int8)[:, None]).astype(a.dtype)
  lag = ctx.positions_BT[:, None, None, :, None] - jnp.arange(cache.v_BSGD.shape[1])
  out, mass = sums(lcp_weights(a, keys, c, log_decay, lag >= 0, lag), cache.v_BSGD)
  return out / mass, cache


def _leaf_step(state, a, b, c, v, log_decay, valid):
  t = v.shape[2]
  psi = padic_kernel.query_features(a, c)
  phi = padic_kernel.key_features(b) * valid[:, None, None, :]
  n_new = jnp.sum(valid, -1)[:, None, None]
  kept = state.sums
  if log_decay is not None:
    rate, token = log_decay[:, None], jnp.arange(t)
    psi = psi * jnp.exp(rate * (token + 1))[:, None, None]
    phi = phi * jnp.exp(rate * jnp.maximum(n_new - 1 - token, 0))[:, :, None]
    kept = kept * jnp.exp(rate * n_new)[..., None]
  past = jnp.einsum("bgrft,bgfd->bgrtd", psi, state.sums)
  return past, LeafSums(kept + jnp.einsum("bgft,bgtd->bgfd", phi, v))


def _node_step(table, a, b, c, v, log_decay, valid, positions, opts):
  B, G, R, K, _, t = a.shape
  rows = lambda x: jnp.repeat(x, G, axis=0)
  position = rows(jnp.broadcast_to(positions, (B, t)))
  rate = None if log_decay is None else jnp.tile(log_decay, B)
  query = nodes_of_path(class_of(a), opts.p).reshape(B * G, R, t, K + 1)
  found = balls.read(table, query, jnp.broadcast_to(position[:, None, :, None], query.shape), rate)
  past = jnp.einsum("bgrtkd,grk->bgrtd", found.reshape(B, G, R, t, K + 1, -1), c)
  key = nodes_of_path(class_of(b), opts.p).reshape(B * G, t, K + 1)
  key = jnp.where(rows(valid)[:, :, None], key, opts.nodes).reshape(B * G, -1)
  each = lambda x: jnp.repeat(x, K + 1, axis=1)
  end = jnp.max(jnp.where(rows(valid), position, 0), -1)
  values = each(v.reshape(B * G, t, -1))
  return past, balls.write(table, key, values, each(position), end, rate)


def nodes_of_path(classes: jax.Array, p: int) -> jax.Array:
  """Node numbers of all prefixes: classes [..., K, t] -> [..., t, K + 1]; depth d starts at (p^d - 1)/(p - 1)."""
  K = classes.shape[-2]
  code, offset, found = jnp.zeros_like(classes[..., 0, :]), 0, []
  for d in range(K + 1):
    found.append(offset + code)
    if d < K:
      code, offset = code * p + classes[..., d, :], offset * p + 1
  return jnp.stack(found, -1)
