"""Hard additive gates in O(T log T · D): Σ_{j≤i, a_i+b_j>0} v_j is a two-dimensional dominance sum.

Bottom-up over blocks of doubling size (Bentley, 1980, multidimensional divide and conquer): a query in the right half
of a block selects a prefix of the left half's keys sorted by b, so a binary search in the sorted keys and one gather
from the prefix sums give its share. Inside base blocks the gates are dense. Sorted halves are merged on the way up.
"""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.attention.braid_chebyshev import with_ones
from mgr_jax.attention.tiles import pad_to, visible

BASE = 64
PREFIX_BLOCK = 32


def dominance_sum(a_NRT: jax.Array, b_NT: jax.Array, v_NTD: jax.Array, segment_ids_NT=None) -> jax.Array:
  """Σ over j <= i with a_i + b_j > 0 and equal segment of v_j, as [N, R, T, D].

  Ties at the threshold are not selected; segments must be contiguous. Bandwidth-bound: log2(T/256) passes over T·D.
  """
  T = b_NT.shape[1]
  length = BASE
  while length < T:
    length *= 2
  # -b is sorted upwards: a_i + b_j > 0 exactly when -b_j < a_i, without rounding. Padding is never selected.
  a, descent, v = pad_to(a_NRT, length, 2), pad_to(-b_NT, length, 1, jnp.inf), pad_to(v_NTD, length, 1)
  segments = None if segment_ids_NT is None else pad_to(segment_ids_NT, length, 1, -1)
  out = _base_blocks(a, descent, v, segments)
  if length > BASE:
    blocks = descent.reshape(-1, length // BASE, BASE)
    order = jnp.argsort(blocks, axis=-1, stable=True)
    descent = jnp.take_along_axis(blocks, order, -1)
    while descent.shape[-1] < length:
      out = out + _from_left_halves(a, descent[:, ::2], order[:, ::2], v, segments)
      descent, order = _merge(descent, order)
  return out[:, :, :T]


def _base_blocks(a, descent, v, segments):
  """Dense gates inside blocks of `BASE`."""
  N, R, length = a.shape
  n = length // BASE
  a, descent = a.reshape(N, R, n, BASE, 1), descent.reshape(N, 1, n, 1, BASE)
  position = jnp.arange(BASE)
  gate = (descent < a) & visible(position[:, None], position)
  if segments is not None:
    segments = segments.reshape(N, 1, n, BASE)
    gate &= segments[..., :, None] == segments[..., None, :]
  out = jnp.einsum("nrcts,ncsd->nrctd", gate.astype(v.dtype), v.reshape(N, n, BASE, -1))
  return out.reshape(N, R, length, -1)


def _from_left_halves(a, descent, order, v, segments):
  """What the queries in right halves select from the sorted left halves `descent`, `order` [N, n, size]."""
  N, R, length = a.shape
  n, size = descent.shape[1:]
  halves = lambda x, axis: x.reshape(*x.shape[:axis], n, 2, size, *x.shape[axis + 1 :])
  left = halves(v, 1)[:, :, 0]
  if segments is not None:
    segments = halves(segments, 1)
    # Only the document that crosses the middle joins the two halves.
    crossing = segments[:, :, 1, :1]
    left = jnp.where((segments[:, :, 0] == crossing)[..., None], left, 0)
  prefix = _exclusive_prefix_sums(jnp.take_along_axis(left, order[..., None], 2))
  queries = halves(a, 2)[:, :, :, 1].swapaxes(1, 2).reshape(N, n, R * size)
  rank = jax.vmap(jax.vmap(functools.partial(jnp.searchsorted, side="left")))(descent, queries)
  share = jnp.take_along_axis(prefix, rank[..., None], 2).reshape(N, n, R, size, -1)
  if segments is not None:
    share = jnp.where((segments[:, :, 1] == crossing)[:, :, None, :, None], share, 0)
  share = jnp.stack([jnp.zeros_like(share), share], 3)
  return share.transpose(0, 2, 1, 3, 4, 5).reshape(N, R, length, -1)


def _exclusive_prefix_sums(x):
  """[..., size, D] -> [..., size + 1, D], by triangular products of 32 rows: much faster than cumsum on CPU."""
  *lead, size, D = x.shape
  x = x.reshape(*lead, size // PREFIX_BLOCK, PREFIX_BLOCK, D)
  lower = jnp.tril(jnp.ones((PREFIX_BLOCK, PREFIX_BLOCK), x.dtype))
  inside = jnp.einsum("ij,...jd->...id", lower, x, precision="highest")
  total = inside[..., -1:, :]
  inside = inside + (jnp.cumsum(total, -3) - total)
  return jnp.concatenate([jnp.zeros_like(x[..., 0, :1, :]), inside.reshape(*lead, size, D)], -2)


def _merge(descent, order):
  """Sorted neighbours [N, 2n, size] -> [N, n, 2·size]; equal scores keep the order of time."""
  size = descent.shape[-1]
  left, right = descent[:, ::2], descent[:, 1::2]
  find = lambda table, x, side: jax.vmap(jax.vmap(functools.partial(jnp.searchsorted, side=side)))(table, x)
  own = jnp.arange(size)
  place = jnp.concatenate([own + find(right, left, "left"), own + find(left, right, "right")], -1)
  scatter = jax.vmap(jax.vmap(lambda place, x: jnp.zeros_like(x).at[place].set(x, unique_indices=True)))
  order = jnp.concatenate([order[:, ::2], order[:, 1::2] + size], -1)
  return scatter(place, jnp.concatenate([left, right], -1)), scatter(place, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sorted_gated_sum(soft, a_BTH, b_BTG, v_BTKD, segment_ids_BT):
  """Σ_{j≤i, a_i+b_j>0} v_j [B, T, H, D] and the number of selected keys [B, T, H], float32.

  Args:
    soft: `(a, b, v, segment_ids) -> (sum, mass)` with the gates σ(a_i + b_j): the straight-through gradient of a and b
      is the gradient of this function. The gradient of v is exact.
    b_BTG: key scores per key/value head (G = K) or, where they differ, per query head (G = H).
  """
  return _sorted_forward(a_BTH, b_BTG, v_BTKD, segment_ids_BT)


def _sorted_forward(a, b, v, segments):
  B, T, H = a.shape
  G, K = b.shape[2], v.shape[2]
  # Sorting per query head has to gather the values per query head too.
  v = jnp.broadcast_to(with_ones(v)[:, :, :, None], (B, T, K, G // K, v.shape[3] + 1)).reshape(B, T, G, -1)
  out = dominance_sum(_rows(a).reshape(B * G, H // G, T), _rows(b), _rows(v), _row_segments(segments, G))
  out = out.reshape(B, H, T, -1).swapaxes(1, 2)
  return out[..., :-1], out[..., -1]


def _sorted_fwd_rule(soft, a, b, v, segments):
  return _sorted_forward(a, b, v, segments), (a, b, v, segments)


def _sorted_bwd_rule(soft, saved, cotangents):
  a, b, v, segments = saved
  da, db = jax.vjp(lambda a, b: soft(a, b, v, segments), a, b)[1](cotangents)
  return da, db, _value_gradient(soft, a, b, v, cotangents[0], segments).astype(v.dtype), None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value_gradient(soft, a, b, v, d_out, segments):
  """dv_j = Σ_{i≥j, b_j+a_i>0} dy_i: the same sum with time reversed and the roles of a and b exchanged."""
  del soft
  B, T, H, D = d_out.shape
  K = v.shape[2]
  back = lambda x: _rows(jnp.repeat(x, H // x.shape[2], axis=2)[:, ::-1])
  segments = None if segments is None else segments[:, ::-1]
  dv = dominance_sum(back(b)[:, None], back(a), back(d_out), _row_segments(segments, H))
  return jnp.sum(dv.reshape(B, K, H // K, T, D), 2)[:, :, ::-1].swapaxes(1, 2)


@_value_gradient.defjvp
def _value_gradient_jvp(soft, primals, tangents):
  """Second derivatives, too, are those of the soft gates, so that Hessians stay symmetric."""
  a, b, v, d_out, segments = primals
  da, db, _, d_d_out, _ = tangents

  def soft_value_gradient(a, b):
    return jax.vjp(lambda v: soft(a, b, v, segments)[0], v)[1](d_out)[0]

  primal = _value_gradient(soft, a, b, v, d_out, segments)
  by_gate = jax.jvp(soft_value_gradient, (a, b), (da, db))[1]
  return primal, by_gate.astype(primal.dtype) + _value_gradient(soft, a, b, v, d_d_out, segments)


sorted_gated_sum.defvjp(_sorted_fwd_rule, _sorted_bwd_rule)


def _rows(x_BTH):
  """[B, T, H, ...] -> [B·H, T, ...]."""
  x = jnp.moveaxis(x_BTH, 2, 1)
  return x.reshape(-1, *x.shape[2:])


def _row_segments(segments_BT, heads):
  return None if segments_BT is None else jnp.repeat(segments_BT, heads, axis=0)
