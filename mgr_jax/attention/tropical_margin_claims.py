"""Claims about margins: exactness, and what they certify."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import tropical
from mgr_jax.algebra.tropical_claims import distance, worst
from mgr_jax.attention import tropical_cases as cases
from mgr_jax.attention.tropical_margins import winners_and_margins
from mgr_jax.claims import Check, Claim, claim

SLOPES = np.array([0.0, 0.125])


@jax.jit
def _found(q, k, v, clock):
  return winners_and_margins(q, k, v, SLOPES, clock, cases.REBASE)


@functools.partial(jax.jit, static_argnums=3)
def _two_best(q, k, v, distinct: bool):
  """top1 - top2 of a_ts + v_sd by sorting, over keys, or over pairs of key and coordinate. [T, B, K, R, D]."""
  T = q.shape[0]
  lag = jnp.arange(T)[:, None] - jnp.arange(T)
  z = q[:, None] + k[None, :, :, :, None] - (SLOPES[:, None, None] * lag[:, :, None, None, None, None])
  z = jnp.where(lag[:, :, None, None, None, None] >= 0, z, -jnp.inf)
  z = z[..., None] + v[None, :, :, :, None, None, :]
  z = jnp.max(z, -2, keepdims=True) if distinct else z
  top = jnp.sort(jnp.moveaxis(z, (1, -2), (-2, -1)).reshape(*z.shape[:1], *z.shape[2:5], z.shape[-1], -1), -1)
  return top[..., -1] - top[..., -2]


def _exact_margins(distinct: bool) -> Check:
  """Against sorting, where there is a second key."""

  def measure(rng, scale):
    del scale
    q, k, v = cases.draw(rng, 40)
    exact = _two_best(q, k, v, distinct)
    return distance(_found(q, k, v, cases.clock(40)).margin[1:], exact[1:])

  return worst(measure)


def _certificate(factor: float, adversary: bool) -> Check:
  """Share of outputs whose winner changes when q, k and v move by factor·γ of that output.

  At random signs; the adversary lowers the winner's key and value and raises all others.
  """

  def measure(rng, scale):
    T, flips, trials = 24, 0, 0
    time = cases.clock(T)
    q, k, v = cases.draw(rng, T)
    before = jax.tree.map(np.asarray, _found(q, k, v, time))
    for _ in range(40 * scale):
      at = rng.integers(2, T), 0, rng.integers(2), 0, rng.integers(8)
      size, winner = factor * before.margin[at], before.key[at]
      if adversary:
        sign = np.where(np.arange(T) == winner, -1.0, 1.0).reshape(-1, 1, 1, 1)
        moved = q, k + size * sign, v + size * sign
      else:
        moved = (x + size * rng.choice((-1, 1), x.shape) for x in (q, k, v))
      flips += int(np.asarray(_found(*moved, time).key)[at] != winner)
      trials += 1
    return flips / trials

  return worst(measure)


def _sharp_radius(claimed: float | None) -> Check:
  """Share of outputs where the closed form fails: outside [γ/6, γ/4], no flip at 1.001 of it, or one at 0.999.

  `claimed` puts another multiple of γ in its place.
  """

  def measure(rng, scale):
    n, S, D = 200 * scale, 32, 8
    q, k, v = (rng.normal(size=shape) for shape in ((n, D), (S, D), (n, S)))
    flip = tropical.smallest_flip(q, k, v)
    lead, _ = applied_flip(q, k, v, flip, 0.0)
    size = flip.size if claimed is None else claimed * lead
    flip = flip._replace(size=size)
    outside = (size < lead / 6 * (1 - 1e-9)) | (size > lead / 4 * (1 + 1e-9))
    return np.mean(outside | ~applied_flip(q, k, v, flip, 1.001)[1] | applied_flip(q, k, v, flip, 0.999)[1])

  return worst(measure)


def applied_flip(q, k, v, flip: tropical.Flip, factor: float) -> tuple[np.ndarray, np.ndarray]:
  """Margins of all outputs, and which winners change when `factor` of the flip's perturbation is applied to each."""
  total = np.max(q[:, None] + k, -1) + v
  winner, (second, first) = np.argmax(total, -1), np.partition(total, -2, axis=-1)[:, -2:].T
  size, key = factor * flip.size[:, None], np.arange(k.shape[0])
  query = q + size * np.where(np.arange(k.shape[1]) == flip.coordinate[:, None], 1.0, -1.0)
  of_key = size * ((key == flip.rival[:, None]) * 1.0 - (key == winner[:, None]))
  moved = np.max(query[:, None] + k, -1) + of_key + v + of_key
  return first - second, np.argmax(moved, -1) != winner


CLAIMS: tuple[Claim, ...] = (
  claim(
    "tropical.margins",
    "the scan with two best values per state entry gives the exact gap between the best two distinct keys",
    _exact_margins(distinct=True),
    1e-12,
    _exact_margins(distinct=False),
  ),
  claim(
    "tropical.certificate",
    "perturbing q, k and v by 0.99·γ/6 in the sup norm never changes the winner; 1.5·γ/2 by an adversary does",
    _certificate(0.99 / 6, adversary=False),
    0.0,
    _certificate(1.5 / 2, adversary=True),
  ),
  claim(
    "tropical.sharp_radius",
    "the smallest joint perturbation that flips a winner has a closed form between γ/6 and γ/4, and γ/6 is attained",
    _sharp_radius(None),
    0.0,
    _sharp_radius(1 / 6),
  ),
)
