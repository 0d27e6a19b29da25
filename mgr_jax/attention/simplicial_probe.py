"""Diagnostics of attention over pairs, from at most the last 64 queries of each row. Run only when asked for."""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.trilinear import FORMS, Pairs, lagged, mutual_information, pair_mask, pair_weights
from mgr_jax.attention.simplicial_options import Options

QUERIES = 64


def _last(pairs: Pairs, queries: int, keys: int) -> Pairs:
  cut = lambda name, x: x[:, :, :, -queries:] if name.startswith("q") else x[:, :, -keys:]
  return Pairs(*(None if x is None else cut(name, x) for name, x in pairs._asdict().items()))


def _entropy(p, axes):
  return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axes)


def _rms(x, mask):
  return jnp.sqrt(
    jnp.sum(jnp.where(mask, jnp.square(x), 0.0)) / jnp.maximum(jnp.sum(jnp.broadcast_to(mask, x.shape)), 1)
  )


def pair_diagnostics(params, pairs: Pairs, windows, segment_ids_BT, opts: Options) -> dict[str, jax.Array]:
  """Float32 arrays, means over queries unless said otherwise.

  entropy: [3], of P and of its marginals over i and over j, in nats. degenerate: mass on pairs with i = j, i = t or
  j = t. lag: [2], mean t - i and t - j. outer_quarter: [2], mass in the older quarter of each window. unspent: mass of
  the sink. trilinear_share: RMS of the three-way logits over that of all logits. second_value: RMS of v'. tau: [H].
  mutual_information: [H] in nats, and mutual_information_share: of the largest possible (only with `measure_mi`).
  """
  T, (w1, w2) = pairs.q.shape[3], windows
  n = min(QUERIES, T)
  S = min(T, n + w1)
  pairs = _last(pairs, n, S)
  segments = None if segment_ids_BT is None else segment_ids_BT[:, -S:]
  masks = pair_mask(n, S, w1, w2, segments)
  weight, _ = pair_weights(FORMS[opts.score], pairs, masks, opts.sink)
  mass = jnp.sum(weight, (-2, -1))
  p = weight / mass[..., None, None]
  first, second = jnp.sum(p, -1), jnp.sum(p, -2)
  lag1 = np.arange(S - n, S)[:, None] - np.arange(S)
  lag2 = np.arange(w2)
  degenerate = (lag1[:, :, None] == lag2) | (lag1[:, :, None] == 0) | (lag2 == 0)
  outer1, outer2 = lag1 >= 0.75 * w1, lag2 >= 0.75 * w2
  aux = {
    "entropy": jnp.stack([jnp.mean(_entropy(p, (-2, -1))), *(jnp.mean(_entropy(m, -1)) for m in (first, second))]),
    "degenerate": jnp.mean(jnp.sum(p * degenerate, (-2, -1))),
    "lag": jnp.stack([jnp.mean(jnp.sum(first * lag1, -1)), jnp.mean(jnp.sum(second * lag2, -1))]),
    "outer_quarter": jnp.stack([jnp.mean(jnp.sum(first * outer1, -1)), jnp.mean(jnp.sum(second * outer2, -1))]),
    "trilinear_share": _trilinear_share(pairs, masks, opts),
    "second_value": _second_value(pairs, opts),
    "tau": jnp.exp(params["log_tau"]),
  }
  if opts.sink:
    aux["unspent"] = 1 - jnp.mean(mass)
  if opts.measure_mi:
    information = jnp.mean(mutual_information(p), (0, 3)).reshape(-1)
    most = jnp.log(jnp.minimum(jnp.sum(masks[0], -1), jnp.sum(masks[1], -1)))
    share = information / jnp.maximum(jnp.mean(most), 1e-9)
    aux |= {"mutual_information": information, "mutual_information_share": share}
  return {name: x.astype(jnp.float32) for name, x in aux.items()}


def _trilinear_share(pairs: Pairs, masks, opts: Options):
  q, k, k2 = (x.astype(jnp.float32) for x in (pairs.q, pairs.k, pairs.k2))
  n, w2 = q.shape[3], masks[1].shape[-1]
  x = FORMS[opts.score].combine(q[:, :, :, :, None], lagged(k2, n, w2)[:, :, None])
  three = jnp.einsum("bkrtjd,bkid->bkrtij", x, k)
  allowed = masks[0][..., None] & masks[1][..., None, :]
  if pairs.q_pair is None:
    return jnp.ones(())
  two = jnp.einsum("bkrtd,bkid->bkrti", pairs.q_pair, pairs.k_pair, preferred_element_type=jnp.float32)[..., None]
  return _rms(three, allowed) / jnp.maximum(_rms(three + two, allowed), 1e-9)


def _second_value(pairs: Pairs, opts: Options):
  v2 = pairs.shift if opts.value_mix == "sum" else pairs.gain - (opts.value_mix == "gated")
  return jnp.sqrt(jnp.mean(jnp.square(v2.astype(jnp.float32))))
