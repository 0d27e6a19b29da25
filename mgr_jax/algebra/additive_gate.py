"""Gates that depend on a query score plus a key score: nested selections, prefix schedules, low-rank sigmoid.

With w_ij = step(a_i + b_j > τ) every query ranks the keys by the same b, so its selection is a prefix of one sorted
list, and adding up the selection is the braid word σ_1 σ_2 ··· σ_k under the swap law. With w_ij = σ(a_i + b_j) and
bounded scores the matrix has numerically low rank.
"""

import jax
import jax.numpy as jnp

from mgr_jax.algebra.braid import Strands, execute, swap


def additive_mask(a_T: jax.Array, b_S: jax.Array, tau: jax.Array = 0.0) -> jax.Array:
  """M[T, S] = (b_j > τ - a_i). Strict, so a tie at the threshold is not selected; rows form a chain under inclusion."""
  return b_S[None, :] > tau - a_T[:, None]


def prefix_schedule(a_T: jax.Array, b_S: jax.Array, tau: jax.Array = 0.0) -> tuple[jax.Array, jax.Array]:
  """Order [S] of the keys by b descending (stable), and k [T]: query i selects the first k_i keys of that order.

  Cost O((S + T) log S).

  >>> order, k = jax.jit(prefix_schedule)(jnp.array([0.0]), jnp.array([-1.0, 3.0, 2.0]))
  >>> order.tolist(), k.tolist()  # Keys 1 and 2 have a positive sum.
  ([1, 2, 0], [2])
  """
  order = jnp.argsort(b_S, descending=True, stable=True)
  k = b_S.shape[0] - jnp.searchsorted(b_S[order[::-1]], tau - a_T, side="right")
  return order, k


def prefix_word(k: jax.Array, length: int) -> jax.Array:
  """The word σ_1 σ_2 ··· σ_k, padded with idle letters to `length`. (σ_1^k would meet one neighbour k times.)

  >>> prefix_word(2, 4).tolist()
  [1, 2, 0, 0]
  """
  letters = jnp.arange(1, length + 1)
  return jnp.where(letters <= k, letters, 0)


def execute_schedule(order: jax.Array, k: jax.Array, payload: jax.Array) -> jax.Array:
  """Sum of the first k payloads [S, ...] in `order` [S], obtained by moving an empty strand across k others.

  The aggregator starts at position 0 with payload 0 and runs `prefix_word(k)` under the swap law. Reference for the
  prefix sum; cost O(S) sequential.
  """
  y = jnp.concatenate([jnp.zeros_like(payload[:1]), payload[order]])
  return execute(prefix_word(k, order.shape[0]), Strands(jnp.zeros_like(y), y), swap).acc[k]


def non_nested_fraction(mask_TS: jax.Array, visible_TS: jax.Array | None = None) -> jax.Array:
  """Fraction of query pairs whose selections, on the keys that both may see, are not ordered by inclusion.

  Zero for every additive gate. Cost O(T² S).

  >>> float(non_nested_fraction(jnp.array([[True, False], [False, True]])))
  1.0
  """
  selected = mask_TS if visible_TS is None else mask_TS & visible_TS
  rejected = ~mask_TS if visible_TS is None else ~mask_TS & visible_TS
  differs = jnp.matmul(selected.astype(jnp.float32), rejected.astype(jnp.float32).T, precision="highest") > 0
  crossing = jnp.triu(differs & differs.T, 1)
  count = mask_TS.shape[0]
  return jnp.sum(crossing) / max(1, count * (count - 1) // 2)


def chebyshev_nodes(rank: int, bound: float) -> jax.Array:
  """Chebyshev points of the first kind on [-bound, bound], [rank], descending."""
  return bound * jnp.cos(jnp.pi * (jnp.arange(rank) + 0.5) / rank)


def chebyshev_features(a: jax.Array, rank: int, bound: float) -> jax.Array:
  """ℓ_m(a) [..., rank]: Lagrange basis at `chebyshev_nodes`, so f(a) ≈ Σ_m ℓ_m(a) f(x_m) on |a| <= bound.

  ℓ_m(a) = (2/r) Σ'_k T_k(x_m/bound) T_k(a/bound), the first term halved. The barycentric quotient is a little more
  accurate in float32 (5e-7 against 2e-6) but its derivative is lost at the nodes; this form has no division. Cost
  O(rank²) per score. (Trefethen, 2013, ch. 2-4.)
  """
  z = a / bound
  chebyshev = [jnp.ones_like(z), z]
  for _ in range(rank - 2):
    chebyshev.append(2 * z * chebyshev[-1] - chebyshev[-2])
  values = jnp.stack(chebyshev[:rank], axis=-1)
  k = jnp.arange(rank)
  transform = jnp.cos(jnp.pi * k[:, None] * (k + 0.5) / rank) * jnp.where(k == 0, 1.0, 2.0)[:, None] / rank
  return jnp.matmul(values, transform.astype(values.dtype), precision="highest")


def sigmoid_bernstein_radius(bound: float) -> jax.Array:
  """ρ = π/M + √(1 + π²/M²): the error of rank-r interpolation of σ(a + b) in |a| <= M falls like ρ^-r for every b.

  σ(a + b) has its nearest poles at a = -b ± iπ; the closest to [-M, M] in the sense of Bernstein ellipses has b = 0.

  >>> round(float(sigmoid_bernstein_radius(4.0)), 2)
  2.06
  """
  ratio = jnp.pi / bound
  return ratio + jnp.sqrt(1 + ratio**2)


def sigmoid_rank_bound(k: jax.Array, bound: float) -> jax.Array:
  """4 exp(-π²k / log(4 e^{2M})), which bounds σ_k / σ_0 for the singular values of [σ(a_i + b_j)], |a|, |b| <= M.

  With x = e^a and y = e^{-b} the matrix is x/(x+y): its displacement has rank one and the spectra of x and -y lie in
  separated intervals, so Zolotarev numbers bound the decay (Beckermann and Townsend, 2017, 1609.09494).
  """
  return 4 * jnp.exp(-(jnp.pi**2) * k / (jnp.log(4.0) + 2 * bound))
