"""Three-way scores on triples (query, key, second key), and attention over pairs of tokens in its dense form.

A form T3(q, k, k') is linear in each argument and cyclic, T3(q, k, k') = T3(k, k', q); vectors have D real entries:

    complex   Re Σ_f q_f k_f k'_f over D/2 complex numbers, first half real parts, second half imaginary
    hadamard  Σ_d q_d k_d k'_d
    det3      Σ_l det[q_l, k_l, k'_l] over D/3 vectors of three thirds; alternating and invariant under rotations

(Clift et al., 2019, arXiv 1909.00668; Roy et al., 2025, arXiv 2507.02754.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHARGES = ((-1, 1, 0), (-1, 0, 1), (-2, 1, 1))
"""Rotation charges (n_q, n_k, n_k') that sum to zero: channels that see t - i, t - j, and t minus the midpoint."""


class Form(NamedTuple):
  """A trilinear form.

  Args:
    combine: `(q, k2) -> x` with T3(q, k, k2) = <x, k>. Since the form is cyclic, the gradients of <x, k> for a
      cotangent dx are dq = combine(k2, dx) and dk2 = combine(dx, q).
    variance: Var T3 / D for independent entries of unit variance.
  """

  combine: Callable[[jax.Array, jax.Array], jax.Array]
  variance: int

  def __call__(self, q, k, k2) -> jax.Array:
    """T3(q, k, k2) over the last axis."""
    return jnp.sum(self.combine(q, k2) * k, -1)

  def scale(self, head_dim: int) -> float:
    """Brings T3 of unit-RMS vectors to unit variance."""
    return (self.variance * head_dim) ** -0.5


def _conjugate_product(q, k2):
  a, b = jnp.split(q, 2, -1)
  c, d = jnp.split(k2, 2, -1)
  return jnp.concatenate([a * c - b * d, -(a * d + b * c)], -1)


def _cross(q, k2):
  x, y, z = jnp.split(q, 3, -1)
  u, v, w = jnp.split(k2, 3, -1)
  return jnp.concatenate([v * z - w * y, w * x - u * z, u * y - v * x], -1)


FORMS = {
  "complex": Form(_conjugate_product, 2),
  "hadamard": Form(lambda q, k2: q * k2, 1),
  "det3": Form(_cross, 2),
}


def rotate_by_charge(x: jax.Array, cos: jax.Array, sin: jax.Array, argument: int, charges=CHARGES) -> jax.Array:
  """Multiplies complex channel f of x by e^{i n θ_f pos}; n = charges[f mod len(charges)][argument].

  T3 of the three rotated arguments depends on position differences alone exactly when every triple of charges sums to
  zero.

  Args:
    x: [..., D].
    cos, sin: of θ_f·pos, broadcastable to [..., D/2].
    argument: 0 for q, 1 for k, 2 for k'.
  """
  n = np.resize([triple[argument] for triple in charges], x.shape[-1] // 2)
  size = np.abs(n)
  if size.max() > 2:
    raise ValueError(f"charges={charges} go beyond 2")
  c = jnp.where(size == 0, 1.0, jnp.where(size == 1, cos, cos * cos - sin * sin))
  s = np.sign(n) * jnp.where(size == 1, sin, 2 * sin * cos)
  a, b = jnp.split(x, 2, -1)
  return jnp.concatenate([a * c - b * s, a * s + b * c], -1)


class Pairs(NamedTuple):
  """Arguments of attention over pairs; query side [B, K, R, T, D], key side [B, K, S, D].

  logit(t, i, j) = T3(q_t, k_i, k2_j) + <q_pair_t, k_pair_i>, queries already scaled; the pair (i, j) carries the value
  gain_j ∘ v_i + shift_j. `None` for the last pairwise arguments, `gain` or `shift` means 0, 1 and 0.
  """

  q: jax.Array
  k: jax.Array
  k2: jax.Array
  v: jax.Array
  gain: jax.Array | None = None
  shift: jax.Array | None = None
  q_pair: jax.Array | None = None
  k_pair: jax.Array | None = None


def pair_values(mix: str, v2: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
  """(gain, shift) of the value v_i∘(1 + v2_j) (`gated`), v_i∘v2_j (`product`) or v_i + v2_j (`sum`)."""
  return {"gated": (1 + v2, None), "product": (v2, None), "sum": (None, v2)}[mix]


def lagged(x_BKSD: jax.Array, T: int, width: int) -> jax.Array:
  """[B, K, T, width, D]: the token δ = 0 .. width - 1 before each of the last T; the first one where there is none."""
  S = x_BKSD.shape[2]
  return jnp.take(x_BKSD, np.maximum(np.arange(S - T, S)[:, None] - np.arange(width), 0), axis=2)


def pair_mask(T: int, S: int, w1: int, w2: int, segments_BS=None) -> tuple[jax.Array, jax.Array]:
  """Allowed i in (t - w1, t] as [B or 1, 1, 1, T, S] and lags t - j < w2 as [B or 1, 1, 1, T, w2], in one document.

  The T queries are the last of the S tokens.
  """
  t, s = jnp.arange(S - T, S)[:, None], jnp.arange(S)
  masks = ((s <= t) & (s > t - w1))[None], (jnp.arange(w2) <= t)[None]
  if segments_BS is not None:
    own = segments_BS[:, S - T :, None]
    second = lagged(segments_BS[:, None, :, None], T, w2)[:, 0, :, :, 0]
    masks = masks[0] & (own == segments_BS[:, None, :]), masks[1] & (own == second)
  return tuple(mask[:, None, None] for mask in masks)


def pair_weights(form: Form, pairs: Pairs, masks, sink: bool = False) -> tuple[jax.Array, jax.Array]:
  """Softmax over all allowed pairs jointly: P [B, K, R, T, S, w2] indexed (t, i, t - j), and logsumexp [B, K, R, T].

  `sink` adds one zero logit that carries no value. Cost O(T·S·w2·D): for small S.
  """
  wide = jnp.promote_types(pairs.q.dtype, jnp.float32)
  q, k, k2 = (x.astype(wide) for x in (pairs.q, pairs.k, pairs.k2))
  x = form.combine(q[:, :, :, :, None], lagged(k2, q.shape[3], masks[1].shape[-1])[:, :, None])
  logit = jnp.einsum("bkrtjd,bkid->bkrtij", x, k)
  if pairs.q_pair is not None:
    logit += jnp.einsum("bkrtd,bkid->bkrti", pairs.q_pair.astype(wide), pairs.k_pair.astype(wide))[..., None]
  logit = jnp.where(masks[0][..., None] & masks[1][..., None, :], logit, -jnp.inf)
  lse = jax.nn.logsumexp(logit, (-2, -1))
  if sink:
    lse = jnp.logaddexp(lse, 0.0)
  return jnp.exp(logit - lse[..., None, None]), lse


def dense_pair_attention(form: Form, pairs: Pairs, masks, sink: bool = False) -> tuple[jax.Array, jax.Array]:
  """y_t = Σ_ij P_tij (gain_j∘v_i + shift_j) [B, K, R, T, D], as it is written, and the logsumexp."""
  weight, lse = pair_weights(form, pairs, masks, sink)
  T, w2 = weight.shape[3], weight.shape[5]
  second = lambda x: lagged(x.astype(weight.dtype), T, w2)
  out = jnp.einsum("bkrtij,bkid->bkrtjd", weight, pairs.v.astype(weight.dtype))
  if pairs.gain is not None:
    out *= second(pairs.gain)[:, :, None]
  out = jnp.sum(out, -2)
  if pairs.shift is not None:
    out += jnp.einsum("bkrtij,bktjd->bkrtd", weight, second(pairs.shift))
  return out.astype(pairs.q.dtype), lse


def mutual_information(weight_ij: jax.Array) -> jax.Array:
  """KL(P ‖ P_i·P_j) in nats over the last two axes: 0 exactly when the logits are f_i + g_j on a product of windows.

  Positive values certify that the weights are not a product of two pairwise attentions. A sink counts as no mass: P is
  normalised first.

  >>> mutual_information(jnp.full((2, 2), 0.25)).item(), round(mutual_information(jnp.eye(2) / 2).item(), 4)
  (0.0, 0.6931)
  """
  p = weight_ij / jnp.sum(weight_ij, (-2, -1), keepdims=True)
  product = jnp.sum(p, -1, keepdims=True) * jnp.sum(p, -2, keepdims=True)
  positive = p > 0
  ratio = jnp.where(positive, p, 1.0) / jnp.where(positive, product, 1.0)
  return jnp.sum(jnp.where(positive, p * jnp.log(ratio), 0.0), (-2, -1))


def match3_vectors(x: np.ndarray, modulus: int) -> tuple[np.ndarray, np.ndarray]:
  """Query and key vectors whose complex form is the indicator of x_t + x_i + x_j ≡ 0 (mod M), float64.

  T3(q, k, k') = Σ_{f<M} e^{2πi f (x_t + x_i + x_j)/M} / M with the frequencies f and M - f taken together, so that
  D = M + 1 for odd M. One softmax head needs width, heads and precision that grow with the length for this
  (Sanford et al., 2023, arXiv 2306.02896).

  Args:
    x: integers [...]. modulus: odd M.

  Returns:
    q [..., M + 1] and k [..., M + 1]; k serves as both keys.

  >>> q, k = match3_vectors(np.array([1, 2, 4]), 7)  # 1 + 2 + 4 = 7
  >>> round(float(FORMS["complex"](q[0], k[1], k[2])), 5), round(abs(float(FORMS["complex"](q[0], k[1], k[1]))), 5)
  (1.0, 0.0)
  """
  if modulus < 3 or modulus % 2 == 0:
    raise ValueError(f"modulus={modulus} is not an odd number of 3 or more")
  f = np.arange((modulus + 1) // 2)
  angle = 2 * math.pi * f * np.asarray(x)[..., None] / modulus
  k = np.concatenate([np.cos(angle), np.sin(angle)], -1)
  weight = np.where(f == 0, 1.0, 2.0) / modulus
  return k * np.tile(weight, 2), k
