"""Stick-breaking sums: A_ij = β_ij Π_{j<m≤i} (1 - β_im) with β = σ(logit), o_i = Σ_{j≤i} A_ij v_j.

Query i moves left past its keys; each crossing takes the share β of what is left. The remainder Π(1 - β) = 1 - Σ_j A_ij
never reaches a key. (Tan et al., 2024, arXiv 2410.17980; Csordás et al., 2021, arXiv 2110.07732.)

Tiles of keys are processed from the diagonal leftwards and carry L = Σ log(1 - β) per query. A query whose remainder
has fallen below e^-20 takes nothing more, and a tile of queries stops when that is true of all of them, so a sharp
sweep costs O(T) and a flat one T²·D FLOPs per head; memory is O(T). Layout as in `braid_gates`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mgr_jax.attention.braid_gates import Score, pad_inputs, wide
from mgr_jax.attention.tiles import TILE, join_tiles, pad_to, segment_axes, visible


def spent(dtype) -> float:
  """The log-remainder at which a sweep ends, eps^1.25: e^-20 = 2e-9 of the mass in float32."""
  return 1.25 * math.log(jnp.finfo(dtype).eps)


def log_not(logit: jax.Array) -> jax.Array:
  """log(1 - σ(logit)) = -softplus(logit), without overflow or cancellation."""
  return -(jnp.maximum(logit, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logit))))


def dense_weights(logit: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A [..., T, S] and the remainder [..., T] from logits and a visibility mask; the obvious form."""
  passed = jnp.where(mask, log_not(logit), 0.0)
  after = jnp.flip(jnp.cumsum(jnp.flip(passed, -1), -1), -1)
  weights = jnp.where(mask, jnp.exp(logit + after), 0.0)
  return weights, jnp.exp(jnp.sum(passed, -1))


def dense_sweep(score: Score, q, k, v, mask):
  """All weights at once. Returns (o_BKRTD, remainder_BKRT); memory O(T·S)."""
  weights, rest = dense_weights(score.logit(q, k), mask)
  return mix(weights, v.astype(wide(v.dtype))), rest


def mix(weights_BKRTS: jax.Array, v_BKSD: jax.Array) -> jax.Array:
  """Σ_j A_ij v_j; weights that do not depend on the content have a batch axis of 1."""
  accumulate = functools.partial(jnp.einsum, preferred_element_type=wide(v_BKSD.dtype))
  if weights_BKRTS.shape[0] == 1:
    return accumulate("krts,bksd->bkrtd", weights_BKRTS[0].astype(v_BKSD.dtype), v_BKSD)
  return accumulate("bkrts,bksd->bkrtd", weights_BKRTS.astype(v_BKSD.dtype), v_BKSD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sweep(score: Score, q, k, v, segment_ids_BT):
  """`dense_sweep` under the causal mask in tiles, with its own gradient; equal to 2e-9 of the values."""
  return _forward(score, q, k, v, segment_ids_BT)


def _forward(score, q, k, v, segment_ids):
  T = v.shape[2]
  q, k, v, segment_ids = pad_inputs(q, k, v, segment_ids)

  def query_tile(_, i):
    q_tile = _slice(q, i)
    left = _start(q_tile, i, T, segment_ids)
    out = jnp.zeros((v.shape[0], *left.shape[1:], v.shape[3]), wide(v.dtype))

    def key_tile(carry):
      j, _, left, out = carry
      _, _, weight, behind = _cross(score, q_tile, _slice(k, j), i, j, left, segment_ids)
      return j - 1, _goes_on(i, j, behind, segment_ids), behind, out + mix(weight, _slice(v, j, axis=2))

    _, _, left, out = jax.lax.while_loop(_unfinished, key_tile, (i, True, left, out))
    return None, (out, jnp.exp(left))

  _, (out, rest) = jax.lax.scan(query_tile, None, jnp.arange(v.shape[2] // TILE))
  out, rest = join_tiles(out, 3)[:, :, :, :T], join_tiles(rest, 3)[..., :T]
  return out, jnp.broadcast_to(rest, out.shape[:4])


def _fwd_rule(score, q, k, v, segment_ids):
  out, rest = _forward(score, q, k, v, segment_ids)
  return (out, rest), (q, k, v, segment_ids, out, rest)


def _bwd_rule(score, saved, cotangents):
  """With g_ij = <dO_i, v_j>: dlogit_im = A_im g_im (1 - β_im) - β_im (Σ_{j<m} A_ij g_ij + rest_i drest_i).

  The bracket is <dO_i, o_i> + rest_i drest_i minus what the sweep has already passed, so it needs no second sweep.
  """
  q, k, v, segment_ids, out, rest = saved
  T, dtype = v.shape[2], v.dtype
  d_out, d_rest = cotangents
  ahead = jnp.sum(d_out * out, -1) + rest * d_rest
  like_q, like_k = q, k
  q, k, v, segment_ids = pad_inputs(q, k, v, segment_ids)
  d_out, ahead = pad_to(d_out.astype(dtype), v.shape[2], 3), pad_to(ahead, v.shape[2], 3)
  earlier = jnp.triu(jnp.ones((TILE, TILE), ahead.dtype), 1)
  zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, wide(a.dtype)))

  def query_tile(d_keys, i):
    q_tile, d_tile = _slice(q, i), _slice(d_out, i)

    def key_tile(carry):
      j, _, left, ahead, dq, (dk, dv) = carry
      k_tile, v_tile = _slice(k, j), _slice(v, j, axis=2)
      logit, active, weight, behind = _cross(score, q_tile, k_tile, i, j, left, segment_ids)
      gain = weight * jnp.einsum("bkrtd,bksd->bkrts", d_tile, v_tile, preferred_element_type=wide(dtype))
      ahead = ahead - jnp.sum(gain, -1)
      beta = jax.nn.sigmoid(logit)
      later = jnp.matmul(gain, earlier, precision="highest") + ahead[..., None]
      d_logit = jnp.where(active, (1 - beta) * gain - beta * later, 0.0)
      if logit.shape[0] == 1:
        d_logit = jnp.sum(d_logit, 0, keepdims=True)
      dq_new, dk_new = score.pull(q_tile, k_tile, d_logit)
      weight = jnp.broadcast_to(weight, gain.shape).astype(dtype)
      dv_new = jnp.einsum("bkrts,bkrtd->bksd", weight, d_tile, preferred_element_type=wide(dtype))
      d_keys = _add_at(dk, dk_new, j), _add_at(dv, dv_new, j, axis=2)
      return j - 1, _goes_on(i, j, behind, segment_ids), behind, ahead, jax.tree.map(jnp.add, dq, dq_new), d_keys

    start = (i, True, _start(q_tile, i, T, segment_ids), _slice(ahead, i), zeros(q_tile), d_keys)
    *_, dq, d_keys = jax.lax.while_loop(_unfinished, key_tile, start)
    return d_keys, dq

  (dk, dv), dq = jax.lax.scan(query_tile, zeros((k, v)), jnp.arange(v.shape[2] // TILE))
  crop = lambda like, d: d[:, :, :, :T].astype(like.dtype)
  dq = jax.tree.map(lambda like, d: crop(like, join_tiles(d, 3)), like_q, dq)
  return dq, jax.tree.map(crop, like_k, dk), dv[:, :, :T].astype(dtype), None


sweep.defvjp(_fwd_rule, _bwd_rule)


def _cross(score, q_tile, k_tile, i, j, left, segment_ids):
  """One query tile meets one key tile: logits, which pairs count, weights A, and log-remainder behind the tile."""
  logit = score.logit(q_tile, k_tile)
  position = jnp.arange(TILE)
  mask = visible((i - j) * TILE + position[:, None] - int(score.strict), position)
  if segment_ids is not None:
    q_segment, k_segment = _slice(segment_ids, i, axis=1), _slice(segment_ids, j, axis=1)
    mask = mask & jnp.equal(*segment_axes(q_segment, k_segment))
  going = left > spent(left.dtype)
  passed = jnp.where(mask, log_not(logit), 0.0)
  # Inclusive suffix sums over the tile's keys as a product with a triangle.
  crossed = jnp.matmul(passed, jnp.tril(jnp.ones((TILE, TILE), passed.dtype)), precision="highest")
  active = mask & going[..., None]
  weight = jnp.where(active, jnp.exp(logit + crossed + left[..., None]), 0.0)
  return logit, active, weight, jnp.where(going, left + crossed[..., 0], left)


def _start(q_tile, i, T, segment_ids):
  """log 1 for every query; padding, which would keep a tile busy, is spent from the start."""
  leaf = jax.tree.leaves(q_tile)[0]
  batch = leaf.shape[0] if segment_ids is None else segment_ids.shape[0]
  row = jnp.where(i * TILE + jnp.arange(TILE) < T, 0.0, -jnp.inf).astype(wide(leaf.dtype))
  return jnp.broadcast_to(row, (batch, *leaf.shape[1:3], TILE))


def _unfinished(carry):
  j, goes_on, *_ = carry
  return (j >= 0) & goes_on


def _goes_on(i, j, left, segment_ids):
  """Whether any query of tile i still has something left, and a key of its document before key tile j."""
  going = left > spent(left.dtype)
  if segment_ids is not None:
    before = jax.lax.dynamic_slice_in_dim(segment_ids, j * TILE - 1, 1, axis=1)
    going &= (_slice(segment_ids, i, axis=1) == before)[:, None, None, :]
  return jnp.any(going)


def _slice(tree, number, axis: int = 3):
  return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, number * TILE, TILE, axis), tree)


def _add_at(tree, new, number, axis: int = 3):
  put = lambda a, d: jax.lax.dynamic_update_slice_in_dim(a, d, number * TILE, axis)
  return jax.tree.map(lambda a, old, d: put(a, old + d), tree, _slice(tree, number, axis), new)
