"""The kernel and its obvious sum: o_i = Σ_{j≤i} w_ij v_j and mass Σ_{j≤i} w_ij, w_ij = K_ij^β e^{-slope·(i-j)}.

K_ij is a product (kernel leaf) or a nested mixture (prefix) of a few matrix products X of query and key features; see
`fractal_routing`. All weights lie in (0, 1], so no exponential per pair and no running maximum is needed. Layout:
features q [B, K, R, T, f] and k [B, K, S, f], values v [B, K, S, D], β [K, R], slope [K, G] with
G = R or 1; everything float32 but v.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

overlap = functools.partial(jnp.einsum, "bkrtf,bksf->bkrts", precision="highest")


class Pairs(NamedTuple):
  """The two sides of the kernel, and what shapes it: `slope_KG`, `beta_KR` are `None` without decay and at β = 1."""

  q: tuple[jax.Array, ...]
  k: tuple[jax.Array, ...]
  slope_KG: jax.Array | None = None
  beta_KR: jax.Array | None = None


def combine(products: list[jax.Array], prefix: bool) -> jax.Array:
  """K from its products: Π X_g, or P_1 + X_1 (P_2 + X_2 (P_3 + ...)) of the list [P_1, X_1, P_2, ..., P_n]."""
  if not prefix:
    return functools.reduce(jnp.multiply, products)
  kernel = products[-1]
  for mixed, whole in zip(products[-3::-2], products[-2::-2], strict=True):
    kernel = mixed + whole * kernel
  return kernel


def pull(products: list[jax.Array], d_kernel: jax.Array, prefix: bool) -> list[jax.Array]:
  """Cotangents of the products: dX_g = dK Π_{h≠g} X_h by prefix and suffix products, never by division."""
  if len(products) == 1:
    return [d_kernel]
  if prefix:
    inner = [products[-1]]
    for mixed, whole in zip(products[-3:1:-2], products[-2:2:-2], strict=True):
      inner.insert(0, mixed + whole * inner[0])
    found = []
    for whole, rest in zip(products[1::2], inner, strict=True):
      found += [d_kernel, d_kernel * rest]
      d_kernel = d_kernel * whole
    return [*found, d_kernel]
  before, after = [d_kernel], [None]
  for x in products[:-1]:
    before.append(before[-1] * x)
  for x in products[:0:-1]:
    after.insert(0, x if after[0] is None else after[0] * x)
  return [b if a is None else b * a for b, a in zip(before, after, strict=True)]


def path_overlap(q_BKRTF, k_BKSF, m: int, alpha_K=None) -> jax.Array:
  """K level by level from addresses [..., depth·m]: Π_l <q_l, k_l>, or with `alpha_K` Σ_l α_l Π_{j≤l} <q_j, k_j>."""
  product, mixture = 1.0, 0.0
  for level in range(q_BKRTF.shape[-1] // m):
    if alpha_K is not None:
      mixture = mixture + alpha_K[:, level, None, None, None] * product
    digit = slice(level * m, (level + 1) * m)
    product = product * overlap(q_BKRTF[..., digit], k_BKSF[..., digit])
  return product if alpha_K is None else mixture + alpha_K[:, -1, None, None, None] * product


def dense_sum(kernel, v, mask, lag, slope_KG=None, beta_KR=None):
  """The obvious form; `mask` and `lag` = i - j broadcast against the kernel [B, K, R, T, S]."""
  if beta_KR is not None:
    kernel = kernel ** beta_KR[..., None, None]
  if slope_KG is not None:
    kernel = kernel * jnp.exp(-slope_KG[..., None, None] * jnp.maximum(lag, 0))
  weight = jnp.where(mask, kernel, 0.0)
  return mix(weight, v), jnp.sum(weight, -1)


def mix(weight, v):
  """Σ_s w v in the type of v, summed in float32 or wider."""
  wide = jnp.promote_types(v.dtype, jnp.float32)
  return jnp.einsum("bkrts,bksd->bkrtd", weight.astype(v.dtype), v, preferred_element_type=wide)
