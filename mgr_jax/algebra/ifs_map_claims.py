"""Claims about iterated function systems as maps of sets: contraction, Hutchinson's theorem, dimension.

Identities are measured in double precision.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import ifs
from mgr_jax.claims import Check, claim, worst_of


def generator(key: jax.Array) -> np.random.Generator:
  """NumPy's generator of a JAX key."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


@jax.jit
def _contraction_residual(ratios, offsets, word, believed, x, y):
  A, t = ifs.compose(ifs.similarities(ratios, offsets), word)
  image = lambda x: A @ x + t
  shrunk = jnp.linalg.norm(image(x) - image(y)) - jnp.prod(ratios[believed]) * jnp.linalg.norm(x - y)
  iterated = jax.lax.fori_loop(0, 200, lambda _, x: image(x), x)
  return jnp.maximum(jnp.abs(shrunk), jnp.max(jnp.abs(iterated - ifs.fixed_point(A, t))))


def _contraction(shift: int) -> Check:
  """Residual of |f_w x - f_w y| = s_w |x - y| and of the fixed point; `shift` takes s_w from other digits."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    with jax.enable_x64(True):
      for _ in range(4 * scale):
        ratios, offsets, word = rng.uniform(0.2, 0.6, 3), rng.normal(size=(3, 2)), rng.integers(0, 3, 4)
        points = rng.normal(size=(2, 2))
        worst = worst_of(worst, float(_contraction_residual(ratios, offsets, word, (word + shift) % 3, *points)))
    return worst

  return measure


@jax.jit
def _hutchinson_excess(ratios, angles, offsets, bound, one, other):
  """How far d_H(F S₁, F S₂) exceeds bound·d_H(S₁, S₂), and d_H(S, A) the collage bound; `bound` < 1."""
  turn = jnp.stack([jnp.cos(angles), -jnp.sin(angles), jnp.sin(angles), jnp.cos(angles)], -1).reshape(-1, 2, 2)
  maps = ifs.Maps(ratios[:, None, None] * turn, offsets)
  images = ifs.hutchinson(maps, one), ifs.hutchinson(maps, other)
  shrunk = ifs.hausdorff(*images) - bound * ifs.hausdorff(one, other)
  attractor = one[:1]
  for _ in range(7):
    attractor = ifs.hutchinson(maps, attractor)
  # Seven steps leave attractor points that are off by at most s^7 times the first step's distance.
  slack = bound**7 * ifs.hausdorff(one[:1], ifs.hutchinson(maps, one[:1])) / (1 - bound)
  collage = ifs.hausdorff(one, attractor) - ifs.hausdorff(one, images[0]) / (1 - bound) - slack
  return jnp.maximum(shrunk, collage)


def _hutchinson(expands: bool) -> Check:
  def measure(key, scale):
    rng, worst = generator(key), 0.0
    for _ in range(2 * scale):
      ratios, offsets = rng.uniform(0.3, 0.6, 2), rng.normal(size=(2, 2))
      bound = ratios.max()
      if expands:
        ratios = np.array([ratios[0], 1.05])
      angles = rng.uniform(0, 2 * np.pi, 2)
      sets = rng.normal(size=(2, 200, 2))
      args = jax.tree.map(np.float32, (ratios, angles, offsets, bound, *sets))
      worst = worst_of(worst, float(_hutchinson_excess(*args)))
    return worst

  return measure


def _dimension(ratios_twisted: bool) -> Check:
  """|Σ s_i^D - 1| for random ratios, and |D - log m / log(1/s)| for equal ones."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    for _ in range(5 * scale):
      ratios = rng.uniform(0.1, 0.7, 4)
      D = ifs.similarity_dimension(ratios)
      worst = worst_of(worst, abs(np.sum((ratios[:3] if ratios_twisted else ratios) ** D) - 1))
    return worst_of(worst, abs(ifs.similarity_dimension(np.full(3, 0.5)) - np.log(3) / np.log(2)))

  return measure


CLAIMS = (
  claim(
    "fractal.ifs_contraction",
    "|f_w x - f_w y| = s_w |x - y| with s_w the product of the ratios; the closed fixed point is where 200 steps end",
    _contraction(0),
    1e-12,
    _contraction(1),
  ),
  claim(
    "fractal.hutchinson",
    "d_H(F S₁, F S₂) <= s d_H(S₁, S₂), and d_H(S, A) <= d_H(S, F S)/(1-s) (collage theorem)",
    _hutchinson(False),
    1e-5,
    _hutchinson(True),
    refs=("Hutchinson 1981", "Barnsley and Demko 1985"),
  ),
  claim(
    "fractal.moran_dimension",
    "the similarity dimension D solves Σ s_i^D = 1; equal ratios give log m / log(1/s)",
    _dimension(False),
    1e-12,
    _dimension(True),
    refs=("Moran 1946",),
  ),
)
