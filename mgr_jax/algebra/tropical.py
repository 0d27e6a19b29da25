"""Max-plus algebra: graphs, polynomials, Hilbert's metric, the smooth family, layers and what a margin certifies.

The semiring is (ℝ ∪ {-inf}, max, +): ⊕ is max with zero -inf, ⊗ is + with one 0. Products of matrices are in
`tropical_matmul`. Functions are pure and may be jitted unless they say that they run on the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.tropical_matmul import tmm


def tmv(a: jax.Array, x: jax.Array) -> jax.Array:
  """(a ⊗ x)_i = max_k (a_ik + x_k) for a [m, k] and x [..., k].

  >>> tmv(jnp.array([[0.0, 5.0], [2.0, 1.0]]), jnp.array([10.0, 3.0])).tolist()
  [10.0, 12.0]
  """
  return jnp.max(a + x[..., None, :], -1)


def identity(n: int, dtype=jnp.float32) -> jax.Array:
  """0 on the diagonal, -inf elsewhere."""
  return jnp.where(jnp.eye(n, dtype=bool), 0.0, -jnp.inf).astype(dtype)


@jax.jit
def _closure(a):
  n = a.shape[0]
  star = jnp.maximum(a, identity(n, a.dtype))
  for _ in range(max(1, (n - 1).bit_length())):
    star = tmm(star, star)
  return star, jnp.max(jnp.diagonal(tmm(a, star)))


def kleene_star(a: jax.Array, tolerance: float = 0.0) -> jax.Array:
  """a* = ⊕_{n>=0} aⁿ: the best weight of a path from i to j, by ⌈log2 n⌉ squarings of I ⊕ a. Runs on the host.

  Args:
    a: [n, n] edge weights, -inf where there is no edge.
    tolerance: how far above 0 a cycle may weigh.

  Raises:
    ValueError: a cycle has positive weight, so no best path exists.

  The way 0 -> 1 -> 2 is heavier than the edge 0 -> 2:

  >>> no = -jnp.inf
  >>> kleene_star(jnp.array([[no, 2.0, 3.0], [no, no, 4.0], [no, no, no]]))[0].tolist()
  [0.0, 2.0, 6.0]
  """
  star, heaviest = _closure(a)
  if heaviest > tolerance:
    raise ValueError(f"the graph has a cycle of positive weight ({float(heaviest):g} or more); a* does not exist")
  return star


def eigen_karp(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The max-plus eigenvalue of an irreducible matrix and an eigenvector: a ⊗ v = λ + v. Runs on the host.

  λ is the largest mean weight of a cycle, max_v min_{k<n} ((aⁿ)_0v - (aᵏ)_0v)/(n-k) (Karp, 1978). v is the column of
  (a - λ)* at a node of a cycle that attains it.

  Raises:
    ValueError: node 0 lies on no cycle, so that a is not irreducible.

  The cycle 0 -> 1 -> 0 has the mean (2 + 4)/2:

  >>> value, _ = eigen_karp(jnp.array([[1.0, 2.0], [4.0, -jnp.inf]]))
  >>> float(value)
  3.0
  """
  value, vector = _karp(a)
  if not jnp.isfinite(value):
    raise ValueError("the matrix is not irreducible: no cycle passes through what node 0 reaches")
  return value, vector


@jax.jit
def _karp(a):
  n = a.shape[0]
  rows = [identity(n, a.dtype)[0]]
  for _ in range(n):
    rows.append(jnp.max(rows[-1][:, None] + a, 0))
  walks = jnp.stack(rows[:-1])
  # A length without a walk does not limit the minimum; a node that n steps do not reach cannot attain the maximum.
  means = jnp.where(walks > -jnp.inf, (rows[-1] - walks) / (n - jnp.arange(n))[:, None], jnp.inf)
  value = jnp.max(jnp.where(rows[-1] > -jnp.inf, jnp.min(means, 0), -jnp.inf))
  star, _ = _closure(a - value)
  critical = jnp.argmax(jnp.diagonal(tmm(a - value, star)))
  return value, star[:, critical]


def trop_poly_eval(coefficients: jax.Array, x: jax.Array) -> jax.Array:
  """p(x) = max_j (c_j + j·x), convex and piecewise linear; c [n+1], x of any shape."""
  return jnp.max(coefficients + jnp.arange(coefficients.shape[0]) * x[..., None], -1)


class Roots(NamedTuple):
  """Tropical roots in ascending order with their multiplicities; host arrays."""

  at: np.ndarray
  multiplicity: np.ndarray


def trop_roots(coefficients) -> Roots:
  """Where the maximum of `trop_poly_eval` changes its term, by the upper hull of the points (j, c_j). Runs on the host.

  Multiplicities, the hull edges' lengths, add up to degree minus order: the tropical fundamental theorem.

  max(0, x + 3, 2x + 4):

  >>> roots = trop_roots([0.0, 3.0, 4.0])
  >>> roots.at.tolist(), roots.multiplicity.tolist()
  ([-3.0, -1.0], [1, 1])
  """
  c = np.asarray(coefficients, np.float64)
  hull: list[int] = []
  for j in np.flatnonzero(np.isfinite(c)).tolist():
    while len(hull) > 1:
      a, b = hull[-2:]
      if (c[b] - c[a]) * (j - a) > (c[j] - c[a]) * (b - a):
        break
      hull.pop()
    hull.append(j)
  nodes = np.asarray(hull)
  length = np.diff(nodes)
  return Roots(-np.diff(c[nodes]) / length, length)


def factored(coefficients, roots: Roots, x):
  """c_top + order·x + Σ_i multiplicity_i · max(x, root_i), the product form that equals p. Runs on the host."""
  c, x = np.asarray(coefficients, np.float64), np.asarray(x, np.float64)
  finite = np.flatnonzero(np.isfinite(c))
  terms = roots.multiplicity * np.maximum(x[..., None], roots.at)
  return c[finite[-1]] + finite[0] * x + terms.sum(-1)


def hilbert_dist(x: jax.Array, y: jax.Array) -> jax.Array:
  """d_H = max_r(x_r - y_r) - min_r(x_r - y_r) over the last axis, a metric up to adding a constant to x or y.

  2-Lipschitz in each argument in the sup norm.

  >>> x = jnp.array([1.0, 4.0, 2.0])
  >>> float(hilbert_dist(x, x + 7)), float(hilbert_dist(x, jnp.zeros(3)))
  (0.0, 3.0)
  """
  return jnp.max(x - y, -1) - jnp.min(x - y, -1)


def gauge(x: jax.Array) -> jax.Array:
  """x - max x over the last axis, the representative of x + ℝ·1 with largest coordinate 0; 2-Lipschitz."""
  return x - jnp.max(x, -1, keepdims=True)


def lse_beta(x: jax.Array, beta, axis: int = -1) -> jax.Array:
  """log Σ e^{βx} / β, between max x and max x + log(n)/β."""
  return jax.nn.logsumexp(beta * x, axis) / beta


def maslov_add(x: jax.Array, z: jax.Array, beta) -> jax.Array:
  """x ⊕_β z = log(e^{βx} + e^{βz})/β: commutative, associative, not idempotent; max as β grows."""
  return jnp.logaddexp(beta * x, beta * z) / beta


def maxplus_layer(w: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
  """y_j = max_i (x_i + w_ij) + b_j for w [n, m]; 1-Lipschitz in the sup norm."""
  return jnp.max(x[..., :, None] + w, -2) + b


def collapse_ffn(w1: jax.Array, b1: jax.Array, w2: jax.Array, b2: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The single max-plus layer (w, b) that two in a row are: w_ic = max_j (w1_ij + b1_j + w2_jc), b = b2."""
  return tmm(w1 + b1, w2), b2


class Route(NamedTuple):
  """Which key s and coordinate r an output comes from, and its value."""

  key: jax.Array
  coordinate: jax.Array
  value: jax.Array


def route_trace(q: jax.Array, k: jax.Array, v: jax.Array) -> Route:
  """The winners of y_d = max_s max_r (q_r + k_sr + v_sd) for one query q [D], keys [S, D] and values [S, E].

  Earliest key, lowest coordinate at ties. The value is (k + v) + q in the scan's order, so it re-adds exactly.
  """
  z = k[:, :, None] + v[:, None, :] + q[:, None]
  key = jnp.argmax(jnp.max(z, 1), 0)
  column = jnp.arange(v.shape[1])
  coordinate = jnp.argmax(z[key, :, column], -1)
  return Route(key, coordinate, (k[key, coordinate] + v[key, column]) + q[coordinate])


def margin_radius(margin: jax.Array, moves: str) -> jax.Array:
  """Sup-norm size below which perturbations keep the winner: γ/2 when `moves` is `one` of q, k, v; γ/6 for `all`."""
  return margin / {"one": 2, "all": 6}[moves]


class Flip(NamedTuple):
  """The smallest change that makes another key win: its size, the new winner and the coordinate it wins through."""

  size: np.ndarray
  rival: np.ndarray
  coordinate: np.ndarray


def smallest_flip(q, k, v) -> Flip:
  """The least ε for which q, k and v, moved by ε each, let another key reach max_s max_r (q_r + k_sr + v_s).

  Key s reaches the winner w through its coordinate r when q_r, k_sr and v_s rise and all else about w falls. Then
  l_sr - l_wi gains 6ε, and 4ε for i = r, whose q_r both share, so that ε = min_sr max_i (l_wi - l_sr)/(6 or 4), between
  γ/6 and γ/4. Runs on the host.

  Args:
    q, k, v: [..., D], [S, D] and [..., S]: one output coordinate per query.

  The winner leads by 3; what both share through coordinate 0 leaves 4ε:

  >>> flip = smallest_flip([[0.0]], [[4.0], [1.0]], [[0.0, 0.0]])
  >>> float(flip.size[0]), int(flip.rival[0])
  (0.75, 1)
  """
  q, k, v = (np.asarray(x) for x in (q, k, v))
  terms = q[..., None, :] + k + v[..., None]
  winner = np.argmax(np.max(terms, -1), -1)[..., None, None]
  best = np.take_along_axis(terms, winner, -2)
  lead = (best[..., None, :] - terms[..., None]) / np.where(np.eye(k.shape[-1], dtype=bool), 4, 6)
  size = np.where(np.arange(k.shape[0])[:, None] == winner, np.inf, np.max(lead, -1))
  flat = size.reshape(*size.shape[:-2], -1)
  rival, coordinate = np.divmod(np.argmin(flat, -1), k.shape[-1])
  return Flip(np.min(flat, -1), rival, coordinate)
