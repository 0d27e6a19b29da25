"""Claims about the Alexander and Jones polynomials of closed braids, each with a broken twin; double precision."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import braid, knots
from mgr_jax.algebra.braid_sampling import equal_words, letters, worst
from mgr_jax.claims import Check, Claim, claim

# A word on n strands whose closure is the named knot, its Δ(t) and its V(t); 0 is an idle letter.
KNOTS = {
  "unknot": ((0, 0, 0, 1), 2, lambda t: 1 + 0 * t, lambda t: 1 + 0 * t),
  "unknot on three strands": ((0, 0, 1, -2), 3, lambda t: 1 + 0 * t, lambda t: 1 + 0 * t),
  "trefoil": ((0, 1, 1, 1), 2, lambda t: t - 1 + 1 / t, lambda t: t + t**3 - t**4),
  "figure-eight": ((1, -2, 1, -2), 3, lambda t: -t + 3 - 1 / t, lambda t: t**2 - t + 1 - 1 / t + t**-2),
}


def _points(rng: np.random.Generator, count: int) -> np.ndarray:
  """Complex numbers of modulus 0.9 .. 1.1 away from the odd eighth roots of unity, where the bracket is singular."""
  angle = rng.uniform(-0.6, 0.6, count) + np.pi / 2 * rng.integers(4, size=count)
  return rng.uniform(0.9, 1.1, count) * np.exp(1j * angle)


@functools.cache
def _knot_residual(invariant: str) -> Callable[..., jax.Array]:
  measure = {"jones": knots.jones, "alexander": knots.alexander}[invariant]

  def residual(point, flip):
    errors = []
    for n in (2, 3):
      tabulated = [knot for knot in KNOTS.values() if knot[1] == n]
      words = jnp.array([word for word, *_ in tabulated]).at[:, -1].multiply(flip)
      found = jax.vmap(lambda word, n=n: measure(word, n, point))(words)
      known = [jones(point**-4) if invariant == "jones" else alexander(point) for *_, alexander, jones in tabulated]
      errors.append(found - jnp.stack(known))
    return jnp.max(jnp.abs(jnp.concatenate(errors)))

  return residual


def _knot_table(invariant: str, flip: int) -> Check:
  """Invariants of the tabulated closures against their polynomials, with the last letter raised to `flip`."""
  return worst(
    lambda rng, count: (_points(rng, count), np.full(count, flip)),
    _knot_residual(invariant),
    count=8,
  )


def _markov(invariant: Callable[..., jax.Array], unit: Callable[..., jax.Array], whole: bool) -> Check:
  """Change of an invariant under group relations, conjugation and both stabilisations of words on four strands.

  Without its `unit(word, n, point)`, unless `whole`.
  """

  def sample(rng, count):
    words, equal = equal_words(rng, count)
    by = letters(rng, count, 2, 4)
    conjugated = np.concatenate([by, words[:, :10], -by[:, ::-1]], axis=1)
    on_four = np.stack([words, equal, conjugated], axis=1)
    on_five = np.stack([np.concatenate([words, np.full((count, 1), sign * 4)], axis=1) for sign in (1, -1)], axis=1)
    return on_four, on_five, _points(rng, count), np.full(count, whole)

  return worst(sample, _markov_residual(invariant, unit))


@functools.cache
def _markov_residual(invariant, unit):
  def residual(on_four, on_five, point, whole):
    def measure(word, n):
      return invariant(word, n, point) / jnp.where(whole, 1, unit(word, n, point))

    values = [jax.vmap(lambda w, n=n: measure(w, n))(words) for words, n in ((on_four, 4), (on_five, 5))]
    expected = values[0][0]
    return jnp.max(jnp.abs(jnp.concatenate(values) - expected)) / jnp.maximum(1, jnp.abs(expected))

  return residual


def _alexander_unit(word: jax.Array, n: int, t: jax.Array) -> jax.Array:
  """What makes the Burau minor a link invariant."""
  return 1 / (t ** (n - 1) * (-jnp.sqrt(t)) ** (braid.writhe(word) - n + 1))


def _writhe_factor(word: jax.Array, n: int, a: jax.Array) -> jax.Array:
  """What makes the Kauffman bracket a link invariant."""
  del n
  return (-(a**3)) ** (-braid.writhe(word))


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
    _markov(knots.alexander, _alexander_unit, True),
    1e-9,
    _markov(knots.alexander, _alexander_unit, False),
    ("Markov 1936",),
  ),
  claim(
    "braid.jones_markov",
    "V of the closure is unchanged by group relations, conjugation, stabilisation; not without its writhe factor",
    _markov(knots.jones, _writhe_factor, True),
    1e-9,
    _markov(knots.jones, _writhe_factor, False),
    ("Markov 1936", "Kauffman 1987"),
  ),
)
