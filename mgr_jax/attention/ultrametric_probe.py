"""Diagnostics of ultrametric attention: where in the tree its mass lies. Run only when asked for."""

import jax
import jax.numpy as jnp

from mgr_jax.attention import ultrametric_balls as balls
from mgr_jax.attention.ultrametric_chunks import wide
from mgr_jax.attention.ultrametric_digits import class_of, one_hot
from mgr_jax.attention.ultrametric_options import Options

QUERIES = 64


def diagnostics(soft, a, b, c_GR, v_BTGD, log_decay_G, segment_ids_BT, alpha_H, opts: Options) -> dict[str, jax.Array]:
  """Float32 scalars and small arrays; attention figures from at most the last 64 queries of each row.

  shell_mass [K+1]: share of the mass at lcp = d. nearest_depth [K+1]: histogram of the largest lcp with an earlier key.
  alone: share of queries whose deepest ball holds no earlier key. n_eff: (Σw)²/Σw². entropy: of the weights, nats.
  usage_entropy [K]: of the mean use of the classes over log p; p^(that) is the perplexity. max_probability: mean.
  balls [K]: occupied nodes of a row over min(p^d, T). largest_ball [K]: share of the keys in the largest.
  certificate: mean bound 2·max|v|·(1 - n_{K-1}/n_K) on what the last digit can change. alpha [H], alpha_over_p [H].
  """
  T = v_BTGD.shape[1]
  start = max(0, T - QUERIES)
  K = opts.depth
  weight = lambda d: c_GR[..., d, None, None]
  lag = jnp.arange(start, T)[:, None] - jnp.arange(T)
  seen = lag >= 0
  if segment_ids_BT is not None:
    seen = seen & (segment_ids_BT[:, start:, None] == segment_ids_BT[:, None, :])[:, None, None]
  seen = jnp.broadcast_to(seen, (*a.shape[:3], T - start, T)).astype(jnp.float32)
  if log_decay_G is not None:
    seen = seen * jnp.exp(log_decay_G[:, None, None, None] * jnp.maximum(lag, 0))
  agree = _agreements(a[..., start:], b)
  kernel = sum(weight(d) * agree[d] for d in range(K + 1)) * seen
  mass = jnp.sum(kernel, -1)
  reach = jnp.cumsum(c_GR, -1)
  beyond = [*agree[1:], jnp.zeros_like(agree[0])]
  shells = [reach[..., d, None, None] * (agree[d] - beyond[d]) * seen for d in range(K + 1)]
  shell_mass = jnp.stack([jnp.mean(jnp.sum(shell, -1) / mass) for shell in shells])
  share = kernel / mass[..., None]
  cut = jnp.sum(kernel - weight(K) * agree[K] * seen, -1) / mass
  aux = {
    "shell_mass": shell_mass,
    "n_eff": jnp.mean(1 / jnp.sum(share * share, -1)),
    "entropy": -jnp.mean(jnp.sum(share * jnp.log(share + 1e-30), -1)),
    "certificate": jnp.mean(2 * jnp.max(jnp.abs(wide(v_BTGD))) * (1 - cut)),
    "max_probability": 0.5 * sum(jnp.mean(jnp.max(x, -2)) for x in soft),
    "usage_entropy": 0.5 * sum(_usage_entropy(x) for x in soft),
  }
  aux |= _nearest(a[..., start:], b, (seen > 0) & (lag > 0), K)
  aux |= _occupancy(b, opts)
  if alpha_H is not None:
    aux |= {"alpha": alpha_H, "alpha_over_p": alpha_H / opts.p}
  return jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(jnp.float32), aux)


def _agreements(a, b):
  """[P(lcp >= d) for d = 0 .. K], each [B, G, R, t, S]."""
  matches = jnp.einsum("bgrkit,bgkis->kbgrts", a, b)
  return [jnp.ones_like(matches[0]), *jnp.cumprod(matches, 0)]


def _nearest(a, b, earlier, K):
  depth = sum(_agreements(one_hot(a), one_hot(b))[1:])
  nearest = jnp.max(jnp.where(earlier, depth, -1), -1)
  return {
    "nearest_depth": jnp.stack([jnp.mean(nearest == d) for d in range(K + 1)]),
    "alone": jnp.mean(nearest < K),
  }


def _usage_entropy(probability):
  use = jnp.mean(probability, (0, -1))
  entropy = -jnp.sum(use * jnp.log(use + 1e-30), -1) / jnp.log(use.shape[-1])
  return jnp.mean(entropy, tuple(range(entropy.ndim - 1)))


def _occupancy(b, opts):
  B, G, K, _, T = b.shape
  digits = jnp.moveaxis(class_of(b), -2, -1).reshape(B * G, T, K)
  numbers = balls.ball_numbers(digits, jnp.zeros((B * G, T), jnp.int32), opts.p)[1:]
  count = jax.vmap(jax.vmap(lambda n: jnp.zeros(T).at[n].add(1)))(numbers)
  possible = jnp.asarray([min(opts.p**d, T) for d in range(1, K + 1)], jnp.float32)
  return {
    "balls": jnp.mean(jnp.sum(count > 0, -1), -1) / possible,
    "largest_ball": jnp.mean(jnp.max(count, -1), -1) / T,
  }
