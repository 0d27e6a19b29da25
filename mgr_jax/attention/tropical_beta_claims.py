"""Claims about finite β: how far from the limit, and what it is, each with a broken twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.tropical_claims import worst
from mgr_jax.attention import tropical_cases as cases
from mgr_jax.claims import Check, Claim, claim, worst_of

SLOPES = np.array([0.0, 0.125])
NONE = np.zeros(2)
BETAS = (0.5, 2.0, 8.0, 32.0)


def _sandwich(factor: float) -> Check:
  """Distance of finite β from the limit beyond factor·(log D + log(t+1))/β, and any growth of its mean with β.

  Half of the cases have all inputs equal, where a sum of n terms attains log(n)/β.
  """

  def measure(rng, scale):
    del scale
    T, D = 64, 8
    time, found = cases.clock(T), []
    q, k, v = cases.draw(rng, T, D)
    for args in ((q, k, cases.with_score(v)), (0 * q, 0 * k, cases.with_score(0 * v))):
      hard = cases.by_scan(*args, NONE, time)
      slack = (np.log(D) + np.log(np.arange(T) + 1.0)).reshape(-1, 1, 1, 1, 1)
      gaps = [np.asarray(cases.by_streaming(*args, NONE, time, beta) - hard) for beta in BETAS]
      found += [np.max(gap - factor * slack / beta) for gap, beta in zip(gaps, BETAS, strict=True)]
      found += [np.max(-gap) for gap in gaps]
      found.append(worst_of(np.diff([np.mean(gap) for gap in gaps])))
    return worst_of(found)

  return worst(measure)


def _by_features(q, k, v, decay, beta, elu):
  """Linear attention in log-values with φ = e^{βx}, or elu(βx) + 1."""
  T = q.shape[0]
  phi = (lambda x: jax.nn.elu(beta * x) + 1) if elu else (lambda x: jnp.exp(beta * x))
  lag = jnp.arange(T)[:, None] - jnp.arange(T)
  weight = jnp.einsum("tbkrd,sbkd->bkrts", phi(q), phi(k)) * jnp.exp(-beta * decay[:, None, None, None] * lag)
  weight = jnp.where(lag >= 0, weight, 0.0)
  total = jnp.einsum("bkrts,sbkd->tbkrd", weight, jnp.exp(beta * v))
  return jnp.log(total / jnp.moveaxis(jnp.sum(weight, -1), 3, 0)[..., None]) / beta


@functools.partial(jax.jit, static_argnums=0)
def _differentiated(form, q, k, v, beta, cotangent):
  return cases.pulled_back(lambda q, k, v: form(q, k, v, beta), (q, k, v), cotangent)


def _streaming(q, k, v, beta):
  time = cases.clock(q.shape[0])
  return cases.centred(cases.by_streaming(q, k, cases.with_score(v), SLOPES, time, beta))


def _matrix(q, k, v, beta):
  time = cases.clock(q.shape[0])
  return cases.centred(cases.by_matrix(q, k, cases.with_score(v), SLOPES, time, beta))


def _exponential(q, k, v, beta):
  return _by_features(q, k, v, SLOPES, beta, elu=False)


def _shifted_elu(q, k, v, beta):
  return _by_features(q, k, v, SLOPES, beta, elu=True)


def _linear_attention(features) -> Check:
  """Streaming and matrix forms against the feature map, values and gradients, in float64."""

  def measure(rng, scale):
    del scale
    q, k, v = cases.draw(rng, 40)
    cotangent, found = rng.normal(size=q.shape), []
    for beta in (0.5, 2.0, 8.0):
      exact = _differentiated(features, q, k, v, beta, cotangent)
      for form in (_streaming, _matrix):
        found.append(cases.leaf_distance(_differentiated(form, q, k, v, beta, cotangent), exact))
    return worst_of(found)

  return worst(measure)


CLAIMS: tuple[Claim, ...] = (
  claim(
    "tropical.sandwich",
    "0 <= y_β - y <= (log D + log(t+1))/β, decreasing in β; equal inputs attain it, so half the bound fails",
    _sandwich(1.0),
    1e-9,
    _sandwich(0.5),
  ),
  claim(
    "tropical.linear_attention",
    "finite-β attention is linear attention with φ(x) = e^{βx} in log-values, by both implementations, with gradients",
    _linear_attention(_exponential),
    1e-10,
    _linear_attention(_shifted_elu),
    ("Katharopoulos et al., 2020, arXiv 2006.16236",),
  ),
)
