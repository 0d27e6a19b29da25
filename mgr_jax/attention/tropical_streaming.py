"""Finite-β attention as a streaming log-sum-exp on the D×D state of the max-plus scan.

y_td = ⊕_{s<=t} ⊕_r (q_tr + k_sr + v_sd) with x ⊕ z = log(e^{βx} + e^{βz})/β. The state (M, S) holds
Σ_s e^{β(k_sr+v_sd)} as S·e^{βM} with M the running maximum: no exponent is positive, and any range of inputs is exact.

Arrays have time in front, as in `tropical_scan`, whose shifts and rebasing hold here too. T·D·E exponentials for the
state and as many for each query head.
"""

import jax
import jax.numpy as jnp

from mgr_jax.attention.tropical_scan import Clock, decay_gradient, empty_state, outer_sum, read, shifted


def empty(batch: int, n_kv_head: int, head_dim: int, columns: int, dtype=jnp.float32):
  """(M, S) before any token."""
  M = empty_state(batch, n_kv_head, head_dim, columns, dtype)
  return M, jnp.zeros_like(M)


def _insert(state, k, v, loss, beta):
  M, S = state
  M, x = M - loss, outer_sum(k, v)
  # One exponential: the larger of the two terms is the new reference. A masked token (-inf) leaves all as it was.
  ratio = jnp.exp(-beta * jnp.where(x > -jnp.inf, jnp.abs(M - x), jnp.inf))
  new = x > M
  return jnp.where(new, x, M), jnp.where(new, S * ratio + 1, S + ratio)


def _read(q, state, beta):
  M, S = state
  top, _ = read(q, M)
  terms = (
    S[..., None, r, :] * jnp.exp(beta * (q[..., r, None] + M[..., None, r, :] - top)) for r in range(q.shape[-1])
  )
  return top + jnp.log(sum(terms)) / beta


def run(q, k, v, loss, state, beta):
  """Outputs [T, B, K, R, E] of shifted inputs, and the last state."""

  def token(state, xs):
    q, k, v, loss = xs
    state = _insert(state, k, v, loss, beta)
    return state, _read(q, state, beta)

  state, y = jax.lax.scan(token, state, (q, k, v, loss))
  return y, state


def streaming_attention(q, k, v, decay_K, beta, clock: Clock, rebase: int) -> jax.Array:
  """The finite-β output, [T, B, K, R, E]; `beta` may be traced and receives no gradient."""
  return _streaming(q, k, v, decay_K, jax.lax.stop_gradient(beta), clock, rebase)


def _forward(q, k, v, decay_K, beta, clock, rebase):
  q, k, v, loss = shifted(q, k, v, decay_K, clock, rebase)
  return run(q, k, v, loss, empty(*k.shape[1:], v.shape[-1], k.dtype), beta)[0]


_streaming = jax.custom_vjp(_forward, nondiff_argnums=(6,))


def _fwd_rule(q, k, v, decay_K, beta, clock, rebase):
  y = _forward(q, k, v, decay_K, beta, clock, rebase)
  return y, (q, k, v, decay_K, beta, clock, y)


def _bwd_rule(rebase, saved, g):
  """With p = e^{β(q_tr + k_sr + v_sd - y_td)} <= 1, Σ_{s,r} p = 1: dv_sd = Σ_{t,r} p·g_td, dk_sr and dq_tr alike.

  Queries need the state as it was, so it runs forwards once more. Keys and values need Σ_{t>=s} g_td e^{β(q_tr-y_td)},
  which runs backwards and is kept as a signed sum times e^{β·reference}.
  """
  q, k, v, decay_K, beta, clock, y = saved
  xs = shifted(q, k, v, decay_K, clock, rebase)

  def forwards(state, xs):
    (q, k, v, loss), y, g = xs
    state = _insert(state, k, v, loss, beta)
    M, S = (a[..., None, :, :] for a in state)
    share = S * jnp.exp(beta * (q[..., :, None] + M - y[..., None, :]))
    return state, jnp.sum(share * g[..., None, :], -1)

  def backwards(state, xs):
    reference, total = state
    (q, k, v, loss), y, g = xs
    z = q[..., :, None] - y[..., None, :]
    top = jnp.maximum(reference, jnp.max(z, 2))
    total = total * jnp.exp(beta * (reference - top))
    total += jnp.sum(g[..., None, :] * jnp.exp(beta * (z - top[:, :, None])), 2)
    share = total * jnp.exp(beta * (outer_sum(k, v) + top))
    return (top - loss, total), (jnp.sum(share, -1), jnp.sum(share, -2))

  start = empty(*k.shape[1:], v.shape[-1], k.dtype)
  dq = jax.lax.scan(forwards, start, (xs, y, g))[1]
  dk, dv = jax.lax.scan(backwards, start, (xs, y, g), reverse=True)[1]
  return dq, dk, dv, decay_gradient(dq, dk, clock.position), jnp.zeros_like(beta), None


_streaming.defvjp(_fwd_rule, _bwd_rule)
