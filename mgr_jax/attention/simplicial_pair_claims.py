"""Claims about attention over pairs in blocks: values, gradients, windows, and the pairwise case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.trilinear import FORMS, Form, Pairs, dense_pair_attention, pair_mask, pair_values
from mgr_jax.attention.simplicial_blocks import Shape, pair_attention
from mgr_jax.attention.simplicial_form_claims import largest, rng_of
from mgr_jax.claims import Check, claim, relative_difference, worst_of

B, K, R, T, D = 2, 2, 2, 37, 6
W1, W2 = 9, 5
# Shape and length of claims that share one program.
WINDOW, LENGTH = Shape(W1, W2, 12), 40


def draw_pairs(rng, length: int = T, mix: str = "gated", pair: bool = True, keys: int | None = None) -> Pairs:
  """Random float64 arguments with scores of unit variance."""
  S = length if keys is None else keys
  query = lambda: rng.standard_normal((B, K, R, length, D)) / np.sqrt(2 * D)
  key = lambda: rng.standard_normal((B, K, S, D))
  gain, shift = pair_values(mix, key())
  q_pair, k_pair = (query(), key()) if pair else (None, None)
  return Pairs(query(), key(), key(), key(), gain, shift, q_pair, k_pair)


def _blocked(form, shape, pairs, segments):
  return pair_attention(form, shape, pairs, segments)[0]


def _dense(form, shape, pairs, segments, w1):
  masks = pair_mask(pairs.q.shape[3], pairs.k.shape[2], w1, shape.w2, segments)
  return dense_pair_attention(form, pairs, masks, shape.sink)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def value_and_pullback(f, form: Form, shape: Shape, pairs: Pairs, segments, cotangent, *more):
  """Output of `_blocked` or `_dense` and its gradient in one direction."""
  out, pull = jax.vjp(lambda pairs: f(form, shape, pairs, segments, *more), pairs)
  return out, pull(cotangent)[0]


BLOCK_CASES = (
  ("complex", "gated", True, Shape(W1, W2, 12)),
  ("hadamard", "sum", False, Shape(W1, W2, 16, True)),
  ("det3", "product", True, Shape(W1, W2, 16)),
)


def _blocks(cases, off: int = 0, gradient: bool = False, form: Form | None = None) -> Check:
  """Relative difference of the blocked and the dense form in float64, of values or of gradients, over packed rows."""

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    with jax.enable_x64(True):
      for score, mix, pair, shape in cases:
        pairs = draw_pairs(rng, T, mix, pair)
        segments = np.sort(rng.integers(0, 3, (B, T)), 1)
        cotangent = rng.standard_normal(pairs.q.shape)
        used = form or FORMS[score]
        fast = value_and_pullback(_blocked, used, shape, pairs, segments, cotangent)
        slow = value_and_pullback(_dense, used, shape, pairs, segments, cotangent, shape.w1 - off)
        worst = worst_of(worst, relative_difference(fast[gradient], slow[gradient]))
    del scale
    return worst

  return measure


def _product_without_conjugate(q, k2):
  """Re Σ q k2 conj(k) as a function of k: trilinear, but not cyclic."""
  return FORMS["complex"].combine(q, k2) * np.repeat([1.0, -1.0], q.shape[-1] // 2)


NOT_CYCLIC = Form(_product_without_conjugate, 2)


@functools.partial(jax.jit, static_argnums=0)
def windowed(shape, pairs):
  return _blocked(FORMS["complex"], shape, pairs, jnp.zeros((1, pairs.k.shape[2]), jnp.int32))


def _outside_window(missing: int) -> Check:
  """Largest change of y_t when all tokens but those in (t - w1 + missing, t] are replaced; float32."""

  def measure(key, scale):
    rng = rng_of(key)
    as_float = lambda pairs: jax.tree.map(np.float32, pairs)
    pairs, other = as_float(draw_pairs(rng, LENGTH)), as_float(draw_pairs(rng, LENGTH))
    t = 25
    seen = np.arange(t - W1 + 1 + missing, t + 1)

    def mixed(x, y):
      y = y.copy()
      y[..., seen, :] = x[..., seen, :]
      return y

    del scale
    run = lambda pairs: np.asarray(windowed(WINDOW, pairs))[:, :, :, t]
    return largest(run(pairs) - run(jax.tree.map(mixed, pairs, other)))

  return measure


def _pairwise_case(mix: str) -> Check:
  """Relative difference between k' = v' = 0 and windowed softmax attention, written directly; float64."""

  def measure(key, scale):
    del scale
    rng = rng_of(key)
    with jax.enable_x64(True):
      pairs = draw_pairs(rng, LENGTH)
      zero = np.zeros_like(pairs.k)
      gain, shift = pair_values(mix, zero)
      pairs = pairs._replace(k2=zero, gain=gain, shift=shift)
      scores = np.einsum("bkrtd,bksd->bkrts", pairs.q_pair, pairs.k_pair)
      lag = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
      weight = np.exp(np.where((lag >= 0) & (lag < W1), scores, -np.inf))
      expected = np.einsum("bkrts,bksd->bkrtd", weight / weight.sum(-1, keepdims=True), pairs.v)
      return relative_difference(windowed(WINDOW, pairs), expected)

  return measure


CLAIMS = (
  claim(
    "simplicial.blocks",
    "attention over pairs in blocks equals its dense form, all scores and value mixes, packed rows, grouped heads",
    _blocks(BLOCK_CASES),
    1e-12,
    _blocks(BLOCK_CASES[:1], off=1),
  ),
  claim(
    "simplicial.gradient",
    "the closed-form gradient equals automatic differentiation of the dense form; it needs a cyclic score",
    _blocks(BLOCK_CASES, gradient=True),
    1e-10,
    _blocks(BLOCK_CASES[:1], gradient=True, form=NOT_CYCLIC),
  ),
  claim(
    "simplicial.window",
    "y_t does not change, bit for bit, when tokens after t and at t - w1 and before are replaced",
    _outside_window(0),
    0.0,
    _outside_window(1),
  ),
  claim(
    "simplicial.contains_softmax",
    "k' = v' = 0 gives windowed softmax attention",
    _pairwise_case("gated"),
    1e-12,
    _pairwise_case("product"),
  ),
)
