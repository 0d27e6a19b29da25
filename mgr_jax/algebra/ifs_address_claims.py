"""Claims about addresses as points of a self-similar set: separation, prefixes, decoding, means, codes of values."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import ifs_address
from mgr_jax.algebra.ifs_map_claims import generator
from mgr_jax.claims import Check, claim, worst_of


@functools.partial(jax.jit, static_argnums=(1, 2))
def _translations(s, m, depth):
  words = ifs_address.word_of(jnp.arange(m**depth), m, depth)
  return ifs_address.translation(words, ifs_address.corner_offsets(m, 3, s), s)


def _first_difference(words):
  """Number of common leading digits of every pair of different words [n, n] (depth on the diagonal)."""
  return np.sum(np.cumprod(words[:, None] == words[None], -1), -1)


def _separation(overlapping: bool) -> Check:
  """Largest shortfall of the gap between leaf cubes below s^l·(1-2s), l their common digits, over all pairs."""

  def measure(key, scale):
    del key, scale
    worst = -np.inf
    ratios = (0.55,) if overlapping else (0.2, 0.4, 0.49)
    for m, depth, s in itertools.product((2, 4, 8), (1, 2, 3), ratios):
      words = np.stack(np.unravel_index(np.arange(m**depth), (m,) * depth), -1)
      # The first map has no offset, so a word followed by zeros lies where the word does.
      with jax.enable_x64(True):
        low = np.asarray(_translations(s, m, 3))[:: m ** (3 - depth)]
      gap = np.max(np.abs(low[:, None] - low[None]), -1) - s**depth
      shortfall = s ** _first_difference(words) * max(1 - 2 * s, 0) - gap
      np.fill_diagonal(shortfall, -np.inf)
      worst = worst_of(worst, float(shortfall.max()))
    return worst_of(worst, 0.0)

  return measure


def _cylinders(reverse: bool) -> Check:
  """Largest excess of the diameter of leaves with a common prefix of length l over s^l; `reverse` reads suffixes."""

  def measure(key, scale):
    del key, scale
    m, depth, worst = 4, 3, 0.0
    with jax.enable_x64(True):
      for s in (0.2, 0.4, 0.49):
        cube = np.asarray(_translations(s, m, depth)).reshape(*(m,) * depth, 3)
        if reverse:
          cube = cube.transpose(2, 1, 0, 3)
        for level in range(depth + 1):
          cells = cube.reshape(m**level, -1, 3)
          diameter = np.max(cells.max(1) - cells.min(1)) + s**depth
          worst = worst_of(worst, float(diameter - s**level))
    return worst

  return measure


@functools.partial(jax.jit, static_argnums=(5, 6))
def _wrong_words(leaf, corner, noise, s, digits, m, depth):
  words = ifs_address.word_of(leaf, m, depth)
  x = ifs_address.leaf_extremes(words, ifs_address.corner_offsets(m, corner.shape[-1], s), s, corner) + noise
  wrong = (ifs_address.decode(x, m, depth, s) != words) & (jnp.arange(depth) < digits)
  return jnp.mean(jnp.any(wrong, -1).astype(float))


def _decoding(multiple: float) -> Check:
  """Share of addresses that noise of ± `multiple` times the bound corrupts, at extreme points of the leaf cubes."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    m, depth, s, n = 4, 3, 0.4, 2000 * scale
    with jax.enable_x64(True):
      for digits in range(1, depth + 1):
        corner, sign = rng.integers(0, 2, (n, 2)).astype(float), rng.choice([-1.0, 1.0], (n, 2))
        noise = multiple * ifs_address.decoding_margin(s, digits) * sign
        wrong = _wrong_words(rng.integers(0, m**depth, n), corner, noise, s, digits, m, depth)
        worst = worst_of(worst, float(wrong))
    return worst

  return measure


@jax.jit
def _soft_point_error(p, offsets, s, exponent):
  m, depth = len(offsets), p.shape[0]
  words = ifs_address.word_of(jnp.arange(m**depth), m, depth)
  probability = jnp.prod(p[jnp.arange(depth), words], -1)
  mean = probability @ ifs_address.leaf_point(words, offsets, s)
  return jnp.max(jnp.abs(ifs_address.soft_leaf_point(p, offsets, s**exponent) - mean))


def _soft_point(exponent: float) -> Check:
  def measure(key, scale):
    del scale
    rng = generator(key)
    with jax.enable_x64(True):
      return float(_soft_point_error(rng.dirichlet(np.ones(4), 3), rng.normal(size=(4, 5)), 0.4, exponent))

  return measure


_greedy_code = jax.jit(ifs_address.greedy_code, static_argnums=2)


def _code_error(s_claimed: float) -> Check:
  """Largest excess of the value code's error at ratio s over s^k/2, s in (1/2, 0.6) or below 1/2."""

  def measure(key, scale):
    v = generator(key).uniform(size=1000 * scale)
    with jax.enable_x64(True):
      _, back = _greedy_code(v, s_claimed, 8)
      return float(np.max(np.abs(np.asarray(back) - v))) - s_claimed**8 / 2

  return measure


CLAIMS = (
  claim(
    "fractal.leaf_separation",
    "corner scheme: leaf cubes that share exactly l digits are at least s^l (1-2s) apart, for all pairs",
    _separation(False),
    1e-12,
    _separation(True),
  ),
  claim(
    "fractal.prefix_is_cylinder",
    "leaves with a common prefix of length l lie in a cube of side s^l",
    _cylinders(False),
    1e-12,
    _cylinders(True),
  ),
  claim(
    "fractal.address_decoding",
    "noise of 0.99·s^{j-1}(1-2s)/2 corrupts none of the first j digits; 1.5 times the bound does",
    _decoding(0.99),
    0.0,
    _decoding(1.5),
  ),
  claim(
    "fractal.soft_address",
    "the mean fixed point of a soft address is Σ_w P(w) x*_w, without enumerating leaves",
    _soft_point(1.0),
    1e-12,
    _soft_point(1.01),
  ),
  claim(
    "fractal.value_code",
    "greedy digits of ratio s >= 1/2 leave an error of at most s^k/2; for s < 1/2 there are gaps",
    _code_error(0.55),
    1e-12,
    _code_error(0.45),
  ),
)
