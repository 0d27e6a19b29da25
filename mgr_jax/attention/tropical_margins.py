"""Margins: by how much the winning key of an output leads the best other key, and what that certifies.

γ_td = top1 - top2 of l_sd = a_ts + v_sd over distinct keys s. In the sup norm the winner survives every change of q, k
and v below γ/6 (γ/2 when only one of them moves). Finite β inflates score maxima by at most log(D)/β, so γ > log(D)/β
certifies that the smoothed scores keep the hard winner.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.tropical_scan import Clock, outer_sum, shifted
from mgr_jax.loops import tied


class Winners(NamedTuple):
  """Per output [T, B, K, R, E]: the winning key, its lead γ (inf where there is no other key)."""

  key: jax.Array
  margin: jax.Array


def winners_and_margins(q, k, v, decay_K, clock: Clock, rebase: int) -> Winners:
  """One scan with the two best values of every state entry; exact. Arrays as in `tropical_scan`.

  The runner-up of an output is max_r(q_r + U'[r]) where U' is the second best of entry r if its best is the winner.
  """
  q, k, v, loss = shifted(q, k, v, decay_K, clock, rebase)
  shape = (*k.shape[1:], v.shape[-1])
  first = jnp.full(shape, -jnp.inf)

  def token(state, xs):
    best, owner, second = state
    t, q, k, v, loss = xs
    best, second, x = best - loss, second - loss, outer_sum(k, v)
    new = x > best
    second = jnp.where(new, best, jnp.maximum(second, x))
    best, owner = jnp.where(new, x, best), jnp.where(new, t, owner)
    z = q[..., :, None] + best[..., None, :, :]
    r = jnp.argmax(z, -2, keepdims=True)
    owners = jnp.broadcast_to(owner[..., None, :, :], z.shape)
    winner = jnp.take_along_axis(owners, r, -2)
    others = jnp.where(owners == winner, second[..., None, :, :], best[..., None, :, :])
    margin = jnp.max(z, -2) - jnp.max(q[..., :, None] + others, -2)
    return (best, owner, second), Winners(winner[..., 0, :], margin)

  start = first, jnp.zeros(shape, jnp.int32), first
  return jax.lax.scan(token, start, (tied(np.arange(k.shape[0], dtype=np.int32), k), q, k, v, loss))[1]


def coverage(margin, head_dim: int, position=None, beta=None):
  """Share of outputs whose winner is certified at β: γ > log(D)/β, or γ > 0 without β.

  Args:
    position: with it the threshold is (log D + log(position + 1))/β, which also covers the sum over keys.
  """
  if beta is None:
    return jnp.mean(margin > 0)
  slack = jnp.log(float(head_dim))
  if position is not None:
    slack = slack + jnp.log(position + 1.0)[:, :, None, None, None]
  return jnp.mean(margin > slack / beta)


def margin_statistics(found: Winners, clock: Clock, head_dim: int, beta) -> dict[str, jax.Array]:
  """Scalars: margin mean, minimum and 10 % point (where there are two keys), exact ties, conservative coverage."""
  measured = jnp.isfinite(found.margin)
  count = jnp.maximum(jnp.sum(measured), 1)
  ordered = jnp.sort(jnp.where(measured, found.margin, jnp.inf).reshape(-1))
  clip = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)
  return {
    "margin_mean": jnp.sum(jnp.where(measured, found.margin, 0.0)) / count,
    "margin_min": clip(ordered[0]),
    "margin_p10": clip(ordered[count // 10]),
    "ties": jnp.sum(found.margin == 0) / count,
    "coverage_conservative": coverage(found.margin, head_dim, clock.position, beta),
  }


def route_statistics(winner, scores, v, clock: Clock, head_dim: int) -> dict[str, jax.Array]:
  """Who wins, from the winning keys [T, B, K, R, D] and the largest scores [T, B, K, R].

  candidate_use: distinct winning keys of the last query over D. coherence: share of coordinates that follow the modal
  key of their head. lag_histogram: winner's age in octaves, [1, 2), [2, 4), ... after age 0. silent_keys: share of keys
  that win nothing and so receive no gradient. score_spread_over_value_spread: of the standard deviations.
  """
  T = winner.shape[0]
  last = jnp.sort(winner[-1], -1)
  agree = jnp.sum(winner[..., :, None] == winner[..., None, :], -1)
  lag = jnp.maximum(jnp.arange(T)[:, None, None, None, None] - winner, 0)
  octave = jnp.where(lag > 0, 1 + jnp.floor(jnp.log2(jnp.maximum(lag, 1) + 0.5)), 0)
  bins = 2 + max(T - 1, 1).bit_length()
  B, K = winner.shape[1:3]
  rows = jnp.arange(B)[:, None, None, None], jnp.arange(K)[:, None, None]
  won = jnp.zeros((T, B, K), bool).at[winner, *rows].set(True)
  return {
    "candidate_use": jnp.mean(1.0 + jnp.sum(last[..., 1:] != last[..., :-1], -1)) / head_dim,
    "coherence": jnp.mean(jnp.max(agree, -1)) / head_dim,
    "lag_histogram": jnp.stack([jnp.mean(octave == i) for i in range(bins)]),
    "silent_keys": 1 - jnp.mean(won),
    "score_spread_over_value_spread": jnp.std(scores) / (jnp.std(v) + 1e-6),
  }
