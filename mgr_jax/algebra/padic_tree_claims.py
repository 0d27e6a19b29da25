"""Claims about trees, small errors and functions of p-adic integers, each with a broken twin."""

import functools
import itertools
import math
from fractions import Fraction

import jax
import numpy as np

from mgr_jax.algebra import padic, padic_functions, padic_tree
from mgr_jax.claims import Check, claim, worst_of


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _gromov(leaf_base: bool) -> Check:
  """Largest |(x|y)_root - lcp| over all leaf pairs of three trees; the root is added as a last point."""

  def measure(key, scale):
    del key, scale
    worst = 0.0
    for p, K in ((2, 4), (3, 5), (4, 3)):
      leaves = np.array(list(itertools.product(range(p), repeat=K)))
      lcp = np.cumprod(leaves[:, None] == leaves[None], -1).sum(-1)
      n = len(leaves)
      distance = np.full((n + 1, n + 1), K, int)
      distance[:n, :n], distance[n, n] = 2 * (K - lcp), 0
      product = padic.gromov_product(distance, 0 if leaf_base else n)[:n, :n]
      worst = worst_of(worst, float(np.max(np.abs(product - lcp))))
      if n < 100:
        worst = worst_of(worst, float(padic.four_point_delta(distance, n)))
    return worst

  return measure


def _flat_error(k: int) -> Check:
  """Violations of v(Σ e_i) >= k and v(Π(1 + e_i) - 1) >= k for rationals with v(e_i) >= k."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for p in (2, 3, 5):
      for _ in range(100 * scale):
        units = [Fraction(int(rng.integers(1, 99)), 7 * 11) for _ in range(5)]
        errors = [u * Fraction(p) ** int(rng.integers(k, k + 3)) for u in units]
        if k < 0:
          errors = [Fraction(1, p), Fraction(1, p)]
        wrong += padic.vp_rational(sum(errors), p) < k
        wrong += padic.vp_rational(math.prod((1 + e for e in errors), start=Fraction(1)) - 1, p) < k
    return float(wrong)

  return measure


def _mahler(tighter: int) -> Check:
  """Violations of the round trip, and of min_x v(f(x) - truncated f(x)) = certificate + tighter."""

  def measure(key, scale):
    rng, wrong = _rng(key), 0
    for p, kept in itertools.product((2, 3, 5), (0, 5, 12, 20)):
      values = rng.integers(0, p**6, 24).tolist()
      coeffs = padic_functions.mahler_coeffs(values)
      wrong += sum(padic_functions.mahler_eval(coeffs, x) != values[x] for x in range(24))
      bound = padic_functions.mahler_certificate(coeffs, kept, p)
      short = [padic_functions.mahler_eval(coeffs[:kept], x) for x in range(24)]
      reached = min(padic_functions.valuation(f - g, p) for f, g in zip(values, short, strict=True))
      wrong += reached != bound + tighter
    return float(wrong)

  return measure


_fit = jax.jit(padic_tree.tree_fit, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def _predicted(tree, digits, p):
  return padic_tree.predict(tree, padic_tree.paths(digits, p), p)


def _write_once(deeper: bool) -> Check:
  """|errors - nodes| plus errors in a second pass over all strings; labels may depend on one digit more."""

  def measure(key, scale):
    del scale
    rng, wrong = _rng(key), 0
    for p, depth, m in ((4, 3, 2), (16, 2, 1)):
      # One digit more than the tree has, which labels ignore unless told otherwise.
      every = np.arange(p ** (depth + 1))
      label = rng.integers(0, p, (every.size, m))[every if deeper else every % p**depth]
      leaves = np.tile(np.arange(p**depth), (depth + 2) * p)
      strings = rng.permutation(leaves) + p**depth * rng.integers(0, p, leaves.size)
      digits = strings[:, None] // p ** np.arange(depth) % p
      tree, erred = _fit(digits.astype(np.int32), label[strings].astype(np.int32), p)
      nodes, errors = int(np.sum(tree.exists)), int(np.sum(erred))
      found = _predicted(tree, every[:, None] // p ** np.arange(depth) % p, p)
      wrong += abs(errors - nodes) + max(0, nodes - padic_tree.n_nodes(p, depth))
      wrong += int(np.sum(np.any(np.asarray(found) != label, -1)))
    return float(wrong)

  return measure


CLAIMS = (
  claim(
    "padic.gromov_product",
    "(x|y)_root = lcp(x, y) for the leaves of a tree; from another base point it is not",
    _gromov(False),
    0.0,
    _gromov(True),
    refs=("Gromov, 1987, Hyperbolic groups",),
  ),
  claim(
    "padic.flat_error",
    "v(e_i) >= k >= 0 implies v(Σ e_i) >= k and v(Π(1+e_i) - 1) >= k; at k = -1 the product fails",
    _flat_error(2),
    0.0,
    _flat_error(-1),
  ),
  claim(
    "padic.mahler",
    "f(x) = Σ a_n C(x,n), and dropping terms costs exactly max |a_n|_p in the sup norm",
    _mahler(0),
    0.0,
    _mahler(1),
    refs=("Mahler, 1958, An interpolation series for continuous functions of a p-adic variable",),
  ),
  claim(
    "padic.write_once",
    "one node per error and never a rewrite: errors = nodes <= Σ p^d, then every string is right",
    _write_once(False),
    0.0,
    _write_once(True),
  ),
)
