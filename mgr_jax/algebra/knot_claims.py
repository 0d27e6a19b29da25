"""Claims about the Alexander and Jones polynomials of closed braids, each with a broken twin; double precision."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import braid, knots
from mgr_jax.algebra.braid_sampling import equal_words, letters, worst
from mgr_jax.claims import Check, Claim, claim

# A word on n strands whose closure is the named knot, its Δ(t) and its V(t).
KNOTS = {
  "unknot": ((1,), 2, lambda t: 1 + 0 * t, lambda t: 1 + 0 * t),
  "unknot on three strands": ((1, -2), 3, lambda t: 1 + 0 * t, lambda t: 1 + 0 * t),
  "trefoil": ((1, 1, 1), 2, lambda t: t - 1 + 1 / t, lambda t: t + t**3 - t**4),
  "figure-eight": ((1, -2, 1, -2), 3, lambda t: -t + 3 - 1 / t, lambda t: t**2 - t + 1 - 1 / t + t**-2),
}


def _points(rng: np.random.Generator, count: int) -> np.ndarray:
  """Complex numbers of modulus 0.9 .. 1.1 away from the odd eighth roots of unity, where the bracket is singular."""
  angle = rng.uniform(-0.6, 0.6, count) + np.pi / 2 * rng.integers(4, size=count)
  return rng.uniform(0.9, 1.1, count) * np.exp(1j * angle)


@functools.cache
def _knot_residual(invariant: str) -> Callable[..., jax.Array]:
  def residual(point, flip):
    errors = []
    for tabulated, n, alexander, jones in KNOTS.values():
      word = jnp.asarray(tabulated).at[-1].multiply(flip)
      if invariant == "jones":
        errors.append(knots.jones(word, n, point) - jones(point**-4))
      else:
        errors.append(knots.alexander(word, n, point) - alexander(point))
    return jnp.max(jnp.abs(jnp.stack(errors)))

  return residual


def _knot_table(invariant: str, flip: int) -> Check:
  """Invariants of the tabulated closures against their polynomials, with the last letter raised to `flip`."""
  return worst(
    lambda rng, count: (_points(rng, count), np.full(count, flip)),
    _knot_residual(invariant),
    count=8,
  )


def _markov(invariant: Callable[[jax.Array, int, jax.Array], jax.Array]) -> Check:
  """Change of an invariant under group relations, conjugation and both stabilisations of words on four strands."""

  def sample(rng, count):
    words, equal = equal_words(rng, count)
    by = letters(rng, count, 2, 4)
    conjugated = np.concatenate([by, words[:, :10], -by[:, ::-1]], axis=1)
    on_four = np.stack([words, equal, conjugated], axis=1)
    on_five = np.stack([np.concatenate([words, np.full((count, 1), sign * 4)], axis=1) for sign in (1, -1)], axis=1)
    return on_four, on_five, _points(rng, count)

  def residual(on_four, on_five, point):
    values = [jax.vmap(lambda w, n=n: invariant(w, n, point))(words) for words, n in ((on_four, 4), (on_five, 5))]
    expected = values[0][0]
    return jnp.max(jnp.abs(jnp.concatenate(values) - expected)) / jnp.maximum(1, jnp.abs(expected))

  return worst(sample, residual)


def _unnormalised_alexander(word: jax.Array, n: int, t: jax.Array) -> jax.Array:
  """The Burau minor without the unit that makes it a link invariant."""
  return jnp.linalg.det((jnp.eye(n) - braid.burau_matrix(word, n, t))[:-1, :-1])


CLAIMS: tuple[Claim, ...] = (
  claim(
    "braid.alexander_knots",
    "Δ of two unknots, the trefoil and the figure-eight from the Burau minor: 1, 1, t - 1 + 1/t, -t + 3 - 1/t",
    _knot_table("alexander", 1),
    1e-9,
    _knot_table("alexander", -1),
    ("Burau 1935",),
  ),
  claim(
    "braid.jones_knots",
    "V of two unknots, trefoil and figure-eight from Temperley-Lieb: 1, 1, t + t³ - t⁴, t² - t + 1 - 1/t + 1/t²",
    _knot_table("jones", 1),
    1e-9,
    _knot_table("jones", -1),
    ("Jones 1985", "Kauffman 1987"),
  ),
  claim(
    "braid.alexander_markov",
    "Δ of the closure is unchanged by group relations, conjugation and stabilisation",
    _markov(knots.alexander),
    1e-9,
    _markov(_unnormalised_alexander),
    ("Markov 1936",),
  ),
  claim(
    "braid.jones_markov",
    "V of the closure is unchanged by group relations, conjugation, stabilisation; not without its writhe factor",
    _markov(knots.jones),
    1e-9,
    _markov(knots.kauffman_bracket),
    ("Markov 1936", "Kauffman 1987"),
  ),
)
