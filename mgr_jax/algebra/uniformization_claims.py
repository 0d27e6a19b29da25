"""Claims about uniformization: walks are stochastic and causal, and the cut of the series errs within its bound."""

import functools

import jax
import numpy as np
import scipy.stats

from mgr_jax.algebra import uniformization
from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.algebra.lie_exp_claims import exp_float64
from mgr_jax.claims import Check, claim, worst_of

LENGTH = 32
ROUNDING = 1e-13

_walk = jax.jit(uniformization.dyadic_walk)


@functools.partial(jax.jit, static_argnums=3)
def poisson_sum(P, u, m, terms):
  """The mixed u [n, d] of a dense P [n, n]."""
  return uniformization.poisson_sum(lambda z: P @ z, u, m, terms)


def _rolled_walk(logits):
  """Hops by a cyclic shift, with the mask on the other end: rows lose the weight that the mask drops."""
  weight = np.asarray(jax.nn.softmax(logits, -1))
  P = np.diag(weight[:, 0])
  for j in range(weight.shape[1] - 1):
    hop = np.roll(np.eye(LENGTH), -(2**j), 1) * weight[:, j + 1 : j + 2]
    hop[LENGTH - 2**j :] = 0
    P += np.tril(hop)
  return P


def _stochastic(rolled: bool) -> Check:
  """Worst row sum - 1, negative entry or weight on the future, of powers and of the Poisson average."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    for _ in range(4 * scale):
      logits = rng.normal(size=(LENGTH, 6)).astype(np.float32)
      P = _rolled_walk(logits) if rolled else np.asarray(_walk(logits))
      mixed = poisson_sum(P, np.eye(LENGTH, dtype=np.float32), np.float32(4.0), 18)
      for M in (P, np.linalg.matrix_power(P, 5), np.asarray(mixed)):
        worst = worst_of(worst, np.max(np.abs(M.sum(1) - 1)), -np.min(M), np.max(np.triu(M, 1)))
    return float(worst)

  return measure


def truncation(rng: np.random.Generator, m: float, terms: int, used: int | None = None) -> tuple[float, float]:
  """(error / bound, error) at worst over two walks, in float64, for a series of `terms`; computed with `used`.

  One walk is random; the other always hops by one, and values tell those within `used` hops from all others, for which
  the bound is attained. Errors below rounding count as none.
  """
  used = terms if used is None else used
  logits = rng.normal(size=(LENGTH, 6))
  always = np.where(np.arange(6) == 1, 60.0, 0.0) * np.ones((LENGTH, 1))
  bound = scipy.stats.poisson.sf(terms, m)
  reached = np.arange(LENGTH)[:, None] < LENGTH - 1 - used
  ratio, largest = 0.0, 0.0
  with jax.enable_x64(True):
    # Both of one shape, for one program.
    for logit, u in ((logits, rng.normal(size=(LENGTH, 2))), (always, np.concatenate([reached, ~reached], 1))):
      P, u = np.asarray(_walk(logit)), u.astype(np.float64)
      exact = exp_float64(m * (P - np.eye(LENGTH))) @ u
      error = np.max(np.abs(np.asarray(poisson_sum(P, u, m, used)) - exact) / np.ptp(u, 0))
      largest = worst_of(largest, float(error))
      ratio = worst_of(ratio, float(max(0.0, error - ROUNDING) / max(bound, ROUNDING)))
  return ratio, largest


def _bound(missing: int) -> Check:
  """Worst error / bound; infinite where a bound above rounding is 50 times larger than the error, that is vacuous."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    cases = [(m, K) for m in (0.01, 1.0, 4.0, 8.0) for K in (3, 8, 12)]
    for m, K in cases:
      ratio, _ = truncation(rng, m, K, K - missing)
      vacuous = ratio < 1 / 50 and scipy.stats.poisson.sf(K, m) > 100 * ROUNDING
      worst = worst_of(worst, np.inf if vacuous and not missing else ratio)
    return float(worst)

  return measure


CLAIMS = (
  claim(
    "gauge.walks_are_stochastic",
    "powers of a dyadic walk and their Poisson average have rows >= 0 with sum 1 that see no future, even at the start",
    _stochastic(False),
    1e-6,
    _stochastic(True),
  ),
  claim(
    "gauge.uniformization_bound",
    "|Σ_(k<=K) w_k P^k u / Σ w_k - e^(m(P-I)) u| <= Pr[Poisson(m) > K] · (max u - min u), and some walk attains it",
    _bound(0),
    1.000001,
    _bound(1),
    refs=("Jensen 1953",),
  ),
)
