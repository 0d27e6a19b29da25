"""p-adic integers as digit strings, valuations, and the geometry of the p-ary tree.

Digits are int arrays [..., K], least significant first, so that lcp(x, y) = v_p(x - y) up to K (Robert, 2000, ch. 1).
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.padic_kernel import level_weights

INT32_RANGE = 2**31


def digits(n, p: int, K: int):
  """First K base-p digits, [...] -> [..., K].

  int32 on the device; where p^K reaches 2^31, a host array from Python integers of any size.

  >>> digits(11, 3, 4).tolist()
  [2, 0, 1, 0]
  """
  if p**K >= INT32_RANGE:
    n = np.asarray(n, object)
    return np.stack([(n // p**j % p).astype(np.int32) for j in range(K)], -1)
  return jnp.asarray(n, jnp.int32)[..., None] // jnp.asarray(p ** np.arange(K), jnp.int32) % p


def undigits(a, p: int):
  """Σ_j a_j p^j, the inverse of `digits`; Python integers in a host array where p^K reaches 2^31."""
  K = a.shape[-1]
  if p**K >= INT32_RANGE:
    return np.sum(np.asarray(a).astype(object) * np.array([p**j for j in range(K)], object), -1)
  return jnp.sum(jnp.asarray(a) * jnp.asarray(p ** np.arange(K), jnp.int32), -1)


def vp(n, p: int, K: int) -> jax.Array:
  """v_p(n), the number of times p divides n, at most K (v_p(0) is infinite): int32, p^K < 2^31.

  >>> vp(jnp.array([1, 6, 18, 0]), 3, 5).tolist()
  [0, 1, 2, 5]
  """
  return jnp.sum(jnp.asarray(n)[..., None] % jnp.asarray(p ** np.arange(1, K + 1), jnp.int32) == 0, -1, dtype=jnp.int32)


def vp_rational(x: Fraction, p: int) -> float:
  """v_p of a rational number, exact; infinite for 0.

  >>> vp_rational(Fraction(9, 2), 3), vp_rational(Fraction(2, 9), 3)
  (2, -2)
  """
  if x == 0:
    return float("inf")
  power, numerator, denominator = 0, x.numerator, x.denominator
  while numerator % p == 0:
    numerator, power = numerator // p, power + 1
  while denominator % p == 0:
    denominator, power = denominator // p, power - 1
  return power


def lcp(a: jax.Array, b: jax.Array) -> jax.Array:
  """Number of leading digits that agree, [..., K], [..., K] -> [...].

  20 - 2 is divisible by 9 and not by 27:

  >>> int(lcp(digits(2, 3, 5), digits(20, 3, 5)))
  2
  """
  return jnp.sum(jnp.cumprod(a == b, -1, dtype=jnp.int32), -1)


def padic_add(a: jax.Array, b: jax.Array, p: int) -> jax.Array:
  """Digits of x + y mod p^K."""
  return _carried(a + b, p)


def padic_mul(a: jax.Array, b: jax.Array, p: int) -> jax.Array:
  """Digits of x·y mod p^K; K·(p - 1)² < 2^31."""
  K = a.shape[-1]
  columns = [jnp.sum(a[..., : j + 1] * b[..., j::-1][..., : j + 1], -1) for j in range(K)]
  return _carried(jnp.stack(columns, -1), p)


def _carried(columns, p):
  def step(carry, column):
    total = column + carry
    return total // p, total % p

  _, found = jax.lax.scan(step, jnp.zeros_like(columns[..., 0]), jnp.moveaxis(columns, -1, 0))
  return jnp.moveaxis(found, 0, -1)


def tropical_shadow(vq: jax.Array, vk: jax.Array) -> jax.Array:
  """min_j (v(q_j) + v(k_j)) over the last axis: a lower bound of v_p(Σ q_j k_j), strict where leading digits cancel."""
  return jnp.min(vq + vk, -1)


def haar_tie_rate(p: int) -> float:
  """P[v(x + y) > min(v(x), v(y))] = 1/(p + 1) for independent uniform p-adic integers."""
  return 1 / (p + 1)


def shell_mass(T: int, p: int, K: int, alpha) -> jax.Array:
  """Expected Σ α^lcp over the keys with lcp = d, for d = 0 .. K and T uniform keys: T·(1 - 1/p)·(α/p)^d, T·(α/p)^K."""
  share = (jnp.asarray(alpha) / p) ** jnp.arange(K + 1)
  return T * share * jnp.where(jnp.arange(K + 1) < K, 1 - 1 / p, 1.0)


def n_eff(weights: jax.Array) -> jax.Array:
  """Effective number of keys (Σw)² / Σw² over the last axis.

  >>> n_eff(jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])).tolist()
  [4.0, 1.0]
  """
  return jnp.sum(weights, -1) ** 2 / jnp.sum(weights * weights, -1)


def gromov_product(distance, base: int):
  """(x|y) = (d(o, x) + d(o, y) - d(x, y))/2 for all pairs, o the point `base`: [n, n] -> [n, n].

  Leaves 1 and 2 meet one edge below the root 0:

  >>> gromov_product(np.array([[0, 2, 2], [2, 0, 2], [2, 2, 0]]), 0)[1, 2].tolist()
  1.0
  """
  return (distance[base][:, None] + distance[base] - distance) / 2


def four_point_delta(distance, base: int):
  """Smallest δ with (x|z) >= min((x|y), (y|z)) - δ for all triples; 0 in a tree (Gromov, 1987)."""
  product = gromov_product(distance, base)
  return jnp.max(jnp.minimum(product[:, :, None], product[None]) - product[:, None])


def truncation_bound(weights_lcp: jax.Array, alpha, depth: int, v_max) -> jax.Array:
  """2·max|v|·(1 - n_k/n_K): how far attention with `depth` digits can be from attention with all of them.

  Args:
    weights_lcp: lcp of the query with every visible key, [..., S]; its largest possible value is K.
    v_max: largest |v| of the visible values.
  """
  full = jnp.sum(jnp.asarray(alpha) ** weights_lcp, -1)
  coarse = jnp.sum(jnp.asarray(alpha) ** jnp.minimum(weights_lcp, depth), -1)
  return 2 * v_max * (1 - coarse / full)


__all__ = [
  "digits",
  "four_point_delta",
  "gromov_product",
  "haar_tie_rate",
  "lcp",
  "level_weights",
  "n_eff",
  "padic_add",
  "padic_mul",
  "shell_mass",
  "tropical_shadow",
  "truncation_bound",
  "undigits",
  "vp",
  "vp_rational",
]
