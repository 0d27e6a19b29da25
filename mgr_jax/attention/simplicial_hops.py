"""Several steps of one attention matrix: y_n = A y_{n-1} with y_0 = v (`hops`), and the infinite mixture (`resolvent`).

Both are built from pairs alone. Convex mixtures of powers of A keep constants and never enlarge the largest entry; the
resolvent is the geometric mixture (1-ρ) Σ_n ρ^n A^{n+1} v, that is, attention over its own past outputs: y = A z with
z = (1-ρ) v + ρ y.
"""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.attention.simplicial_sweep import (
  attend,
  attend_back,
  dense_weights,
  own_block,
  put_rows,
  rows_of,
  solve_resolvent,
  sweep,
  sweep_back,
  weight_back,
  wide,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def hop_outputs(q, k, v, segment_ids_BT, hops: int):
  """(y_1, ..., y_hops) stacked [N, B, K, R, T, D], and the logsumexp of the scores (without gradient).

  Every tile of A is computed once and serves all hops: (1 + N)·T²·D FLOPs per head causal, 3 + 2N of them backward.

  Args: q_BKRTD already scaled, k_BKSD, v_BKSD.
  """
  return _hops_forward(q, k, v, segment_ids_BT, hops)


def dense_hop_outputs(q, k, v, segment_ids_BT, hops: int):
  """`hop_outputs` with the whole matrix A."""
  weight, lse = dense_weights(q, k, segment_ids_BT)
  outputs = [wide(v)]
  for _ in range(hops):
    outputs.append(attend(weight, outputs[-1]))
  return jnp.stack(outputs[1:]).astype(v.dtype), lse


def _hops_forward(q, k, v, segment_ids, hops):
  def advance(weight, start, state):
    v, *outputs = state
    seen = weight.shape[-1]
    rows = [attend(weight, v[..., :seen, :])]
    for n, buffer in enumerate(outputs):
      outputs[n] = put_rows(buffer, rows[-1], start)
      rows.append(attend(weight, outputs[n][..., :seen, :]))
    return (v, *outputs), jnp.stack(rows).astype(v.dtype)

  buffers = [jnp.zeros(q.shape, v.dtype)] * (hops - 1)
  return sweep(q, k, segment_ids, (v, *buffers), advance)


def _hops_fwd_rule(q, k, v, segment_ids, hops):
  outputs, lse = _hops_forward(q, k, v, segment_ids, hops)
  return (outputs, lse), (q, k, v, segment_ids, outputs, lse)


def _hops_bwd_rule(hops, saved, cotangents):
  """g_n = dy_n + Aᵀ g_{n+1}, dv = Aᵀ g_1, dA = Σ_n g_n y_{n-1}ᵀ: a tile's g_n needs no earlier tile."""
  q, k, v, segment_ids, outputs, lse = saved

  def retreat(weight, start, state):
    v, outputs, cotangents, adjoints = state
    seen = weight.shape[-1]
    values = (v, *outputs[:-1])
    d_weight, adjoints = 0.0, list(adjoints)
    for n in range(hops - 1, -1, -1):
      g = wide(rows_of(cotangents[n], start))
      if n < hops - 1:
        g += rows_of(adjoints[n + 1], start)
      level = adjoints[n]
      adjoints[n] = level.at[..., :seen, :].add(attend_back(weight, g.astype(v.dtype), shared=level.ndim == 4))
      d_weight += weight_back(g, values[n][..., :seen, :])
      d_weight -= jnp.sum(g * wide(rows_of(outputs[n], start)), -1, keepdims=True)
    return (v, outputs, cotangents, adjoints), d_weight

  adjoints = [jnp.zeros_like(wide(v))] + [jnp.zeros_like(wide(q)) for _ in range(hops - 1)]
  state = (v, tuple(outputs), tuple(cotangents[0]), adjoints)
  dq, dk, (_, _, _, adjoints) = sweep_back(q, k, segment_ids, lse, state, retreat)
  return dq, dk, adjoints[0].astype(v.dtype), None


hop_outputs.defvjp(_hops_fwd_rule, _hops_bwd_rule)


@jax.custom_vjp
def resolvent(q, k, v, rho_KR, segment_ids_BT):
  """y = (1-ρ) A (I - ρA)⁻¹ v [B, K, R, T, D] for 0 <= ρ < 1, and the logsumexp of the scores (without gradient).

  Tile by tile: (I - ρA_bb) z_b = (1-ρ) v_b + ρ Σ_{c<b} A_bc z_c, a triangular system. FLOPs of softmax attention plus
  10·TILE² + 14·TILE·D per token; T/TILE sequential steps.
  """
  return _resolvent_forward(q, k, v, rho_KR, segment_ids_BT)


def dense_resolvent(q, k, v, rho_KR, segment_ids_BT):
  """`resolvent` with the whole matrix A and one triangular solve."""
  weight, lse = dense_weights(q, k, segment_ids_BT)
  rho = rho_KR[..., None, None].astype(weight.dtype)
  rhs = (1 - rho) * wide(v)[:, :, None]
  return attend(weight, solve_resolvent(rho, weight, rhs)).astype(v.dtype), lse


def _resolvent_forward(q, k, v, rho_KR, segment_ids):
  rho = rho_KR[..., None, None]

  def advance(weight, start, state):
    v, z = state
    earlier = attend(weight, z[..., : weight.shape[-1], :])
    own = own_block(weight, start)
    rhs = (1 - rho) * wide(rows_of(v, start))[:, :, None] + rho * earlier
    z_rows = solve_resolvent(rho, own, rhs)
    rows = earlier + attend(own, z_rows)
    return (v, put_rows(z, z_rows, start)), rows.astype(v.dtype)

  return sweep(q, k, segment_ids, (v, jnp.zeros(q.shape, v.dtype)), advance)


def _resolvent_fwd_rule(q, k, v, rho_KR, segment_ids):
  out, lse = _resolvent_forward(q, k, v, rho_KR, segment_ids)
  return (out, lse), (q, k, v, rho_KR, segment_ids, out, lse)


def _resolvent_bwd_rule(saved, cotangents):
  """With g the cotangent of y including its way through z: (I - ρA_bbᵀ) g_b = dy_b + ρ h_b, h = Σ_{c>b} A_cbᵀ g_c;
  then dz = Aᵀ g, dA = g zᵀ, dv = (1-ρ) dz, dρ = <dz, y - v>."""
  q, k, v, rho_KR, segment_ids, out, lse = saved
  rho = rho_KR[..., None, None]
  v_wide, out_wide = wide(v)[:, :, None], wide(out)
  z = ((1 - rho) * v_wide + rho * out_wide).astype(v.dtype)

  def retreat(weight, start, state):
    z, out, d_out, dz = state
    seen = weight.shape[-1]
    rhs = wide(rows_of(d_out, start)) + rho * rows_of(dz, start)
    g = solve_resolvent(rho, own_block(weight, start), rhs, transpose=True)
    dz = dz.at[..., :seen, :].add(attend_back(weight, g.astype(z.dtype), shared=False))
    d_weight = weight_back(g, z[..., :seen, :]) - jnp.sum(g * wide(rows_of(out, start)), -1, keepdims=True)
    return (z, out, d_out, dz), d_weight

  state = (z, out, cotangents[0], jnp.zeros_like(wide(q)))
  dq, dk, (_, _, _, dz) = sweep_back(q, k, segment_ids, lse, state, retreat)
  dv = jnp.sum((1 - rho) * dz, 2).astype(v.dtype)
  d_rho = jnp.sum(dz * (out_wide - v_wide), (0, 3, 4)).astype(rho_KR.dtype)
  return dq, dk, dv, d_rho, None


resolvent.defvjp(_resolvent_fwd_rule, _resolvent_bwd_rule)
