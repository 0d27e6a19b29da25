"""Claims about the overlap of paths as a kernel: its forms agree, it is positive, sharp, and has a safe gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.ifs_map_claims import generator
from mgr_jax.attention.fractal_chunks import table_sum
from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_overlap import dense_sum, path_overlap, pull
from mgr_jax.attention.fractal_routing import table_features
from mgr_jax.attention.fractal_samples import DEPTH, M, T, random_paths, random_sides
from mgr_jax.attention.fractal_tiles import tiled_sum
from mgr_jax.claims import Check, claim, relative_difference, worst_of


def _causal():
  lag = jnp.arange(T)[:, None] - jnp.arange(T)
  return lag >= 0, lag


@functools.partial(jax.jit, static_argnums=1)
def _three_forms(sides, options, summed):
  sums = jnp.einsum("bkrtf,bksf->bkrts", sides.q, sides.k) / DEPTH
  kernel = jnp.where(summed, sums, path_overlap(sides.q, sides.k, M, sides.alpha_K))
  dense = dense_sum(kernel, sides.v, *_causal(), sides.slope_KG)
  table = table_sum(sides, None, options)
  return dense, tiled_sum(sides, None, None, options), (table[..., :-1], table[..., -1])


def _one_function(kernel: str, summed: bool) -> Check:
  def measure(key, scale):
    del scale
    options = Options(m=M, depth=DEPTH, kernel=kernel)
    with jax.enable_x64(True):
      dense, tiled, table = _three_forms(random_sides(generator(key), options), options, summed)
      return worst_of(relative_difference(tiled, dense), relative_difference(table, dense))

  return measure


@functools.partial(jax.jit, static_argnums=2)
def _gram(p, alpha, options):
  kernel = path_overlap(p[:, :, None], p, M, alpha)[0, 0, 0]
  by_features = table_features(p, options, alpha) @ table_features(p, options).mT
  return jnp.linalg.eigvalsh(kernel)[0], jnp.max(jnp.abs(by_features[0, 0] - kernel))


def _positive_kernel(signed: bool) -> Check:
  """Largest of -(least eigenvalue) and the distance to the feature form; `signed` makes one level count negative."""

  def measure(key, scale):
    del scale
    rng = generator(key)
    alpha = rng.dirichlet(np.ones(DEPTH + 1), 1)
    if signed:
      alpha[0, -1] *= -1
    with jax.enable_x64(True):
      least, error = _gram(random_paths(rng, 1, 1, 60), alpha, Options(m=M, depth=DEPTH, kernel="prefix"))
      return worst_of(-float(least), float(error))

  return measure


@jax.jit
def _match_weight(keys):
  """Weight of the first key for a query of its own address: by path overlap, by softmax of summed overlaps/√depth."""
  product = path_overlap(keys[:, :, None, :1], keys, 4)[:, 0, 0, 0]
  summed = jax.nn.softmax(jnp.einsum("bkf,bsf->bks", keys[:, 0, :1], keys[:, 0])[:, 0] / 2)
  return jnp.mean(product[:, 0] / jnp.sum(product, -1)), jnp.mean(summed[:, 0])


def _sharpness(summed: bool) -> Check:
  """How far the mean weight of the one exact match among 1023 other addresses falls short of 3/4."""

  def measure(key, scale):
    rng = generator(key)
    # Leaf numbers 1 .. 255 never equal the first key's leaf 0.
    leaf = np.concatenate([np.zeros((50 * scale, 1), int), rng.integers(1, 256, (50 * scale, 1023))], 1)
    digit = leaf[..., None] // 4 ** np.arange(3, -1, -1) % 4
    one_hot = np.eye(4, dtype=np.float32)[digit].reshape(*leaf.shape, 16)
    weights = _match_weight((0.99 * one_hot + 0.0025)[:, None])
    return 0.75 - float(weights[summed])

  return measure


@functools.partial(jax.jit, static_argnums=2)
def _product_gradient(products, d_kernel, divide):
  if divide:
    whole = functools.reduce(jnp.multiply, products)
    return [d_kernel * whole / x for x in products]
  return pull(products, d_kernel, False)


@jax.jit
def _autodiff(products, d_kernel):
  return jax.vjp(lambda xs: functools.reduce(jnp.multiply, xs), products)[1](d_kernel)[0]


def _product_rule(divide: bool) -> Check:
  """Error of the tile's product rule against autodiff, where many factors are exactly zero or down to 1e-4."""

  def measure(key, scale):
    del scale
    rng = generator(key)
    factors = rng.uniform(size=(4, 30, 30)) * rng.choice([0, 1e-4, 1], (4, 30, 30))
    products = list(factors.astype(np.float32))
    d_kernel = rng.normal(size=(30, 30)).astype(np.float32)
    got, want = _product_gradient(products, d_kernel, divide), _autodiff(products, d_kernel)
    return float(np.max([np.max(np.abs(a - b)) for a, b in zip(got, want, strict=True)]))

  return measure


CLAIMS = (
  claim(
    "fractal.attention_is_memory",
    "Π_l <q_l, k_l> with decay: pairs, tiles and a table of leaves give one and the same sum",
    _one_function("leaf", False),
    1e-12,
    _one_function("leaf", True),
    refs=("Katharopoulos et al., 2020, arXiv 2006.16236",),
  ),
  claim(
    "fractal.prefix_attention_is_memory",
    "Σ_l α_l Π_{j<=l} <q_j, k_j>: pairs, tiles and a table of all nodes give one and the same sum",
    _one_function("prefix", False),
    1e-12,
    _one_function("prefix", True),
  ),
  claim(
    "fractal.prefix_kernel",
    "the prefix kernel is an inner product of node features, so its Gram matrices have no negative eigenvalue",
    _positive_kernel(False),
    1e-10,
    _positive_kernel(True),
  ),
  claim(
    "fractal.sharpness",
    "one exact match among 1023 other addresses (m = depth = 4, ε = 0.01) gets a mean weight of at least 3/4; a "
    "softmax of summed overlaps does not",
    _sharpness(False),
    0.0,
    _sharpness(True),
  ),
  claim(
    "fractal.product_rule",
    "the gradient of a product by prefix and suffix products equals autodiff, also at factors of zero",
    _product_rule(False),
    1e-6,
    _product_rule(True),
  ),
)
