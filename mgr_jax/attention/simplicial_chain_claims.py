"""Claims about powers of one attention matrix: averages, the geometric mixture, and that no pair enters."""

import functools

import jax
import numpy as np

from mgr_jax.attention.simplicial_form_claims import largest, rng_of
from mgr_jax.attention.simplicial_hops import hop_outputs, resolvent
from mgr_jax.attention.simplicial_pair_claims import LENGTH, WINDOW, draw_pairs, windowed
from mgr_jax.attention.simplicial_sweep import dense_weights
from mgr_jax.claims import Check, claim, relative_difference, worst_of

B, K, R, D = 2, 2, 2, 6


def _chain_inputs(rng, length: int = 40):
  q = rng.standard_normal((B, K, R, length, D))
  return q, rng.standard_normal((B, K, length, D)), rng.standard_normal((B, K, length, D))


@functools.partial(jax.jit, static_argnums=3)
def _hops(q, k, v, hops: int):
  return hop_outputs(q, k, v, None, hops)[0]


@jax.jit
def _resolvent(q, k, v, rho):
  return resolvent(q, k, v, rho, None)[0]


@jax.jit
def _weights(q, k):
  return dense_weights(q, k)[0]


def _mixtures(weights) -> Check:
  """Deviation from constants, and excess of the largest output over the largest value, of Σ_n weights_n A^n v."""

  def measure(key, scale):
    del scale
    rng = rng_of(key)
    weight = np.array(weights)[:, None, None, None, None, None]
    with jax.enable_x64(True):
      q, k, v = _chain_inputs(rng)
      constant = np.sum(weight * np.asarray(_hops(q, k, np.ones_like(v), len(weights))), 0) - 1
      excess = largest(np.sum(weight * np.asarray(_hops(q, k, v, len(weights))), 0)) - largest(v)
    return worst_of(largest(constant), excess)

  return measure


def _resolvent_laws(terms: int) -> Check:
  """Relative differences of the tiled resolvent from the series with `terms` terms and from the recursion over past
  outputs, and at ρ = 0 from softmax attention; float64."""

  def measure(key, scale):
    del scale
    rng = rng_of(key)
    rho = np.full((K, R), 0.6)
    with jax.enable_x64(True):
      q, k, v = _chain_inputs(rng)
      weight = np.asarray(_weights(q, k))
      once = np.einsum("bkrts,bksd->bkrtd", weight, v)
      series, power = np.zeros_like(once), once
      for n in range(terms):
        series += 0.4 * 0.6**n * power
        power = np.einsum("bkrts,bkrsd->bkrtd", weight, power)
      recursion, z = np.zeros_like(once), np.zeros_like(once)
      for t in range(q.shape[3]):
        own = weight[..., t, t, None]
        row = np.einsum("bkrs,bkrsd->bkrd", weight[..., t, :t], z[..., :t, :]) + own * 0.4 * v[:, :, None, t]
        recursion[..., t, :] = row / (1 - 0.6 * own)
        z[..., t, :] = 0.4 * v[:, :, None, t] + 0.6 * recursion[..., t, :]
      run = lambda rho: np.asarray(_resolvent(q, k, v, rho))
      y = run(rho)
      return worst_of(relative_difference(*pair) for pair in ((y, series), (y, recursion), (run(0 * rho), once)))

  return measure


def additivity(three_way: bool) -> Check:
  """Relative error of y(v + w) = y(v) + y(w) at fixed scores, w also for the second values where there are any."""

  def measure(key, scale):
    del scale
    rng = rng_of(key)
    with jax.enable_x64(True):
      if three_way:
        pairs, more = (draw_pairs(rng, LENGTH, "product") for _ in range(2))
        run = lambda v, gain: np.asarray(windowed(WINDOW, pairs._replace(v=v, gain=gain)))
        values = (pairs.v, pairs.gain), (more.v, more.gain)
      else:
        q, k, v = _chain_inputs(rng)
        run = lambda v: np.sum(np.asarray(_hops(q, k, v, 2)), 0)
        values = (v,), (rng.standard_normal(v.shape),)
      both = run(*(a + b for a, b in zip(*values, strict=True)))
      return relative_difference(run(*values[0]) + run(*values[1]), both)

  return measure


CLAIMS = (
  claim(
    "simplicial.hops_are_averages",
    "convex mixtures of A v and A² v keep constants and never exceed the largest value",
    _mixtures((2 / 3, 1 / 3)),
    1e-12,
    _mixtures((1.0, 0.5)),
  ),
  claim(
    "simplicial.resolvent",
    "(1-ρ) A (I - ρA)⁻¹ v = Σ_n (1-ρ) ρ^n A^{n+1} v = attention over past outputs, and softmax attention at ρ = 0",
    _resolvent_laws(80),
    1e-12,
    _resolvent_laws(2),
  ),
  claim(
    "simplicial.hops_are_additive",
    "at fixed scores two hops are additive in the values: no product of two tokens appears; with pairs it does",
    additivity(three_way=False),
    1e-12,
    additivity(three_way=True),
  ),
)
