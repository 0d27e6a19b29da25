"""Claims about sums over pairs in linear time: their value, and what ordered pairs can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.simplicial_form_claims import largest, rng_of
from mgr_jax.attention.simplicial_linear import Features, Times, empty_state
from mgr_jax.attention.simplicial_sums import normalise, pair_sums, paired_values
from mgr_jax.claims import Check, claim, relative_difference, worst_of

B, K, R, T = 2, 2, 2, 37


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sums(features, rate, ordered: bool, impl: str):
  batch, heads, length, r = features.g.shape
  times = Times(np.arange(1, length + 1, dtype=np.int32)[None], None)
  state = empty_state(batch, heads, r, features.a.shape[-1], ordered, features.a.dtype)
  return pair_sums(features, rate, times, state, impl)[0]


def _linear(strict: bool) -> Check:
  """Relative difference of the linear-time sums (both orders, both implementations) and Σ_ij W_tij γ^… a_i∘b_j."""

  def measure(key, scale):
    del scale
    rng, worst = rng_of(key), 0.0
    positive = lambda *shape: rng.uniform(0.1, 1.0, shape)
    values = lambda: rng.standard_normal((B, K, T, 3))
    features = Features(positive(B, K, R, T, 8), positive(B, K, T, 8), positive(B, K, T, 8), values(), values())
    rate = np.array([0.0, 0.2])
    lag = np.arange(T)[:, None] - np.arange(T)
    fade = np.where(lag >= 0, np.exp(-rate[:, None, None] * np.maximum(lag, 0)), 0.0)
    f, g, h, a, b = features
    for ordered in (False, True):
      weight = np.einsum("bkrtf,bkif,bkjf->bkrtij", f, g, h)
      weight = weight * fade[:, None, :, :, None] * fade[:, None, :, None, :]
      if ordered:
        weight = weight * np.tri(T, k=-1 if strict else 0).T
      exact = np.einsum("bkrtij,bkie,bkje->bkrte", weight, a, b)
      with jax.enable_x64(True):
        for impl in ("scan", "chunked"):
          worst = worst_of(worst, relative_difference(_sums(features, rate, ordered, impl), exact))
    return worst

  return measure


@functools.partial(jax.jit, static_argnums=3)
def _last_output(x, k2, v2, ordered: bool):
  """Of one head whose queries, keys and values are x, with exponential features and the mix `product`."""
  a, b = paired_values("product", x, v2)
  sums = _sums(Features(jnp.exp(x)[:, :, None], jnp.exp(x), jnp.exp(k2), a, b), None, ordered, "scan")
  return normalise(sums, "product")[..., -1, :]


def order_contrast(rng, ordered: bool) -> float:
  """How far the last outputs for A..B and B..A are apart: one head, mix `product`, k' and v' linear in k and v.

  With k = k' and v = v' a pair counts the same either way, and even ordered sums could not tell.
  """
  tokens, second_key, second_value = rng.standard_normal((2, 4)), *rng.standard_normal((2, 4, 4))
  x = rng.standard_normal((1, 1, 12, 4))
  outputs = []
  for first, second in (tokens, tokens[::-1]):
    x[0, 0, 2], x[0, 0, 8] = first, second
    outputs.append(np.asarray(_last_output(x, x @ second_key, x @ second_value, ordered)))
  return largest(outputs[0] - outputs[1])


def _forgets_order(ordered: bool) -> Check:
  def measure(key, scale):
    with jax.enable_x64(True):
      return worst_of(order_contrast(rng_of(jax.random.fold_in(key, case)), ordered) for case in range(4 * scale))

  return measure


def _sees_order(ordered: bool) -> Check:
  """0.1 minus the mean contrast."""

  def measure(key, scale):
    with jax.enable_x64(True):
      cases = [order_contrast(rng_of(jax.random.fold_in(key, case)), ordered) for case in range(8 * scale)]
      return 0.1 - float(np.mean(cases))

  return measure


CLAIMS = (
  claim(
    "simplicial.linear_sums",
    "linear-time sums over pairs equal Σ_ij W_tij v_i∘v'_j, over all and over increasing pairs, with and without decay",
    _linear(strict=True),
    1e-12,
    _linear(strict=False),
  ),
  claim(
    "simplicial.unordered_forgets_order",
    "over all pairs the outputs for A..B and B..A agree",
    _forgets_order(ordered=False),
    1e-12,
    _forgets_order(ordered=True),
  ),
  claim(
    "simplicial.ordered_sees_order",
    "over increasing pairs the outputs for A..B and B..A differ by more than 0.1 on average (measured: 0.1 - mean)",
    _sees_order(ordered=True),
    0.0,
    _sees_order(ordered=False),
  ),
)
