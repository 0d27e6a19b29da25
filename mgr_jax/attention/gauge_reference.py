"""The obvious form: serial products of matrices, dense scores, powers of a dense matrix of hops; all by autodiff."""

import math

import jax
import jax.numpy as jnp

from mgr_jax.algebra import lie
from mgr_jax.attention.gauge_connection import base_coordinates
from mgr_jax.attention.gauge_fibres import blocks, fibre, merged
from mgr_jax.attention.gauge_options import Options
from mgr_jax.attention.gauge_poisson import rate, shifted
from mgr_jax.attention.mechanism import group_heads, rotate, ungroup_heads
from mgr_jax.attention.standard import dense_attention
from mgr_jax.attention.tiles import segment_axes, visible


def transports(a, cfg, opts: Options, segment_ids_BT=None) -> jax.Array:
  """T [B, T, K or 1, D/b, b, b] from capped coordinates, one product per token; documents begin at the identity."""
  U = lie.exp_so(fibre(opts.b).coordinates(a).swapaxes(-1, -2), opts.b, opts.theta_max)
  if opts.rope == "base":
    base = jnp.asarray(base_coordinates(cfg, opts.b)).T
    U = lie.matmul(lie.exp_so(base, opts.b, math.sqrt(opts.b / 2)), U)
  start = jnp.broadcast_to(jnp.eye(opts.b, dtype=U.dtype), U[:, 0].shape)
  same = jnp.ones(U.shape[:2], bool) if segment_ids_BT is None else segment_ids_BT == shifted(segment_ids_BT, 1, 1)

  def token(T, xs):
    U, same = xs
    T = lie.matmul(U, jnp.where(same[:, None, None, None, None], T, start))
    return T, T

  _, T = jax.lax.scan(token, start, (jnp.moveaxis(U, 1, 0), same.T))
  return jnp.moveaxis(T, 0, 1)


def turned(M, w_BTHD, b: int) -> jax.Array:
  """M w for every head and block; heads of one frame are consecutive."""
  M = jnp.repeat(M, w_BTHD.shape[2] // M.shape[2], axis=2)
  return merged(jnp.einsum("bthnij,bthjn->bthin", M, blocks(w_BTHD, b), precision="highest"), w_BTHD)


def reference(params, q, k, v, a, ctx, cfg, opts: Options) -> jax.Array:
  """[B, T, H, D] from projected q, k, v: O(T²) memory."""
  T = transports(a, cfg, opts, ctx.segment_ids_BT)
  back = T.swapaxes(-1, -2)
  q, k = turned(back, q, opts.b), turned(back, k, opts.b)
  if opts.values == "transport":
    v = turned(back, v, opts.b)
  if opts.rope == "outer":
    q, k = rotate(q, ctx.shared["rope"]), rotate(k, ctx.shared["rope"])
  q, k, v = group_heads(q, cfg.n_kv_head), k.swapaxes(1, 2), v.swapaxes(1, 2)
  if opts.mixer == "poisson":
    out = _dense_hops(params, q, k, v, ctx.segment_ids_BT, cfg, opts)
  else:
    out, _ = dense_attention(q, k, v, ctx.segment_ids_BT)
  out = ungroup_heads(out)
  return turned(T, out, opts.b) if opts.values == "transport" else out


def hop_matrix(params, q, k, segment_ids_BT, cfg, opts: Options) -> jax.Array:
  """P [B, K, R, T, T] of the Poisson mixer."""
  K, R, T, D = q.shape[1:]
  lag = jnp.arange(T)[:, None] - jnp.arange(T)
  bias = params["off_bias"].reshape(K, R, -1)
  score = D**-0.5 * jnp.einsum("bkrtd,bksd->bkrts", q, k, preferred_element_type=jnp.float32)
  logits = jnp.where(lag == 0, bias[:, :, :1, None], -jnp.inf)
  for j in range(opts.hops(cfg)):
    logits = jnp.where(lag == 2**j, score + bias[:, :, j + 1, None, None], logits)
  row = jnp.arange(T)
  same = visible(row[:, None], row[None, :], 0, *segment_axes(segment_ids_BT, segment_ids_BT))
  return jax.nn.softmax(jnp.where(same, logits, -jnp.inf), -1)


def _dense_hops(params, q, k, v, segment_ids_BT, cfg, opts):
  P = hop_matrix(params, q, k, segment_ids_BT, cfg, opts)
  m = rate(params, q.shape[1], opts)[:, :, None, None]
  z = jnp.broadcast_to(v[:, :, None], q.shape).astype(jnp.float32)
  weight = mass = jnp.ones_like(m)
  total = z

  def power(carry, n):
    z, weight, total, mass = carry
    z, weight = jnp.einsum("bkrts,bkrsd->bkrtd", P, z), weight * m / n
    return (z, weight, total + weight * z, mass + weight), None

  carry, _ = jax.lax.scan(power, (z, weight, total, mass), jnp.arange(1, opts.n_terms + 1, dtype=jnp.float32))
  return (carry[2] / carry[3]).astype(q.dtype)
