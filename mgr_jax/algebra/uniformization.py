"""exp of a Markov generator as a Poisson average of powers of a stochastic matrix, with the error of cutting it.

A generator Q, with Q_ij >= 0 off the diagonal and rows that sum to 0, whose rates are at most λ is Q = λ(P - I) with P
row-stochastic, and with m = λτ

    e^(τQ) u = Σ_k w_k P^k u,   w_k = e^-m m^k / k!  (Jensen, 1953).

All terms are positive, so nothing cancels. Cut after k = K and divided by Σ_(k<=K) w_k it is an average of convex
combinations: rows of the result sum to 1, and it is off by at most tail(K, m)·(max u - min u) in every channel, with
tail(K, m) = Pr[Poisson(m) > K]. Without the division it is off by at most tail·max|u|.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgr_jax.algebra.lie import matmul


def poisson_tail(terms, m) -> jax.Array:
  """Pr[Poisson(m) > K], the regularised lower incomplete gamma function P(K + 1, m)."""
  return jax.scipy.special.gammainc(jnp.asarray(terms, jnp.result_type(float)) + 1, m)


def fewest_terms(m: float, tail: float = 1e-7) -> int:
  """The smallest K >= 1 with Pr[Poisson(m) > K] <= tail. On the host, with numbers.

  Raises:
    ValueError: m not in (0, 700] or tail not in [1e-15, 1).

  >>> [fewest_terms(m) for m in (0.01, 1, 4, 16)]
  [3, 10, 18, 41]
  """
  if not 0 < m <= 700:
    raise ValueError(f"m={m} is outside (0, 700]")
  if not 1e-15 <= tail < 1:
    raise ValueError(f"tail={tail} is outside [1e-15, 1)")
  K = 1
  while _tail(K, m) > tail:
    K += 1
  return K


def _tail(K: int, m: float) -> float:
  """Σ_(k>K) w_k, summed from its own first term: 1 - Σ_(k<=K) w_k would lose all digits."""
  weight = math.exp((K + 1) * math.log(m) - m - math.lgamma(K + 2))
  total, k = 0.0, K + 1
  while weight > 1e-18 * total or k <= m:
    total += weight
    k += 1
    weight *= m / k
  return total


def poisson_sum(hop: Callable[[jax.Array], jax.Array], u: jax.Array, m: jax.Array, terms: int) -> jax.Array:
  """Σ_(k<=K) w_k P^k u / Σ_(k<=K) w_k for `hop`: z ↦ P z and K = `terms`, a static number.

  Horner's rule z ← u + (m/k) P z for k = K .. 1. `m` broadcasts against u. Linear in u; K hops. K must not depend on
  data, or else what one token sees would depend on others.
  """

  def step(carry, k):
    z, total = carry
    return (u + m / k * hop(z), 1 + m / k * total), None

  ones = jnp.ones(jnp.shape(m), u.dtype)
  (z, total), _ = jax.lax.scan(step, (u, ones), jnp.arange(terms, 0, -1, dtype=u.dtype))
  return z / total


def expm_markov(Q: jax.Array, u: jax.Array, tau: jax.Array, rate: float, terms: int) -> jax.Array:
  """e^(τQ) u for a generator Q [n, n] with rates -Q_ii <= `rate`, and u [n, ...]; see the top for the error.

  A larger rate than necessary costs terms and changes nothing else.

  >>> import numpy as np
  >>> Q = np.array([[0.0, 0.0], [1.0, -1.0]], np.float32)  # leaves state 1 for state 0 at rate 1
  >>> there = np.array([0, 1], np.float32)
  >>> round(float(jax.jit(expm_markov, static_argnums=4)(Q, there, 1.0, 1.0, 12)[1]), 4)  # 1/e is still there
  0.3679
  """
  P = jnp.eye(Q.shape[-1], dtype=Q.dtype) + Q / rate
  return poisson_sum(lambda z: matmul(P, z.reshape(z.shape[0], -1)).reshape(z.shape), u, rate * tau, terms)


def dyadic_walk(logits: jax.Array) -> jax.Array:
  """Row-stochastic P [..., n, n] of a walk into the past from logits [..., n, 1 + J]: stay, or hop by 2^j, j < J.

  Row t is a softmax over staying and the hops with t - 2^j >= 0, so P is lower-triangular and exactly stochastic at the
  start too; row 0 stays. Distance d is reached in as many hops as d has binary ones.

  >>> import numpy as np
  >>> jax.jit(dyadic_walk)(np.zeros((3, 2), np.float32)).tolist()
  [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
  """
  n, taps = logits.shape[-2:]
  position = jnp.arange(n)
  offset = jnp.array([0] + [2**j for j in range(taps - 1)])
  allowed = position[:, None] >= offset
  weight = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), -1)
  target = jnp.where(allowed, position[:, None] - offset, n)
  return jnp.zeros((*logits.shape[:-1], n + 1), weight.dtype).at[..., position[:, None], target].add(weight)[..., :n]
