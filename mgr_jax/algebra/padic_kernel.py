"""The LCP kernel α^lcp of digit strings, for hard and for random digits, and its finite feature map.

lcp(x, y) is the number of leading digits that agree. With c_0 = 1, c_d = α^d - α^(d-1) the power telescopes,
α^lcp = Σ_d c_d·1[lcp >= d]. For independent digits with probabilities A_j and B_j its mean is

    E[α^lcp] = Σ_d c_d Π_{j<=d} <A_j, B_j> = <Ψ(A), Φ(B)>,   Φ(B) = B_1 ⊗ ... ⊗ B_K,
    Ψ(A) = c_0 + A_1 ⊗ (c_1 + A_2 ⊗ (c_2 + ... (c_{K-1} + c_K·A_K))),

with p^K features, because Σ_i B_j[i] = 1 makes shallow nodes sums of leaves. All weights sit on the query side, so they
may be negative. α^E[lcp] is a different number and does not factor.

Digits are arrays [..., K, p, T] of probabilities (one-hot when hard), tokens innermost: sums over a digit are then sums
of a few contiguous slices. XLA reduces over such short axes about 20 times slower than it adds the slices, hence the
closed-form pullbacks here, which cost O(p^K) per token.
"""

import jax
import jax.numpy as jnp


def level_weights(alpha: jax.Array, depth: int) -> jax.Array:
  """c_0 = 1, c_d = α^d - α^(d-1) for d = 1 .. depth: [...] -> [..., depth + 1]; all positive for α > 1.

  >>> level_weights(3.0, 2).tolist()
  [1.0, 2.0, 6.0]
  """
  power = jnp.asarray(alpha)[..., None] ** jnp.arange(depth + 1)
  return jnp.concatenate([jnp.ones_like(power[..., :1]), power[..., 1:] - power[..., :-1]], -1)


def horner(weights, matches):
  """c_0 + m_1(c_1 + m_2(c_2 + ...)): `weights[d]` for d = 0 .. K, `matches[j - 1]` for digit j.

  Two of three digits agree, α = 3:

  >>> horner([1, 2, 6, 18], [1, 1, 0])
  9
  """
  kernel = weights[len(matches)]
  for d in reversed(range(len(matches))):
    kernel = weights[d] + matches[d] * kernel
  return kernel


def kernel_tile(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
  """E[α^lcp] of all pairs: digits [..., K, p, T], [..., K, p, S] and weights [..., K + 1] -> [..., T, S].

  K·p multiply-adds per pair in one elementwise pass; nothing but the result is stored.
  """
  K, p = a.shape[-3:-1]
  match = lambda j: sum(a[..., j, i, :, None] * b[..., j, i, None, :] for i in range(p))
  return horner([c[..., d, None, None] for d in range(K + 1)], [match(j) for j in range(K)])


def key_features(b: jax.Array) -> jax.Array:
  """Φ: digits [..., K, p, T] -> [..., p^K, T]; the first digit is the most significant axis."""
  phi = b[..., -1, :, :]
  for j in reversed(range(b.shape[-3] - 1)):
    phi = _outer(b[..., j, :, :], phi)
  return phi


def query_features(a: jax.Array, c: jax.Array) -> jax.Array:
  """Ψ: digits [..., K, p, T] and weights [..., K + 1] -> [..., p^K, T]."""
  K = a.shape[-3]
  weight = lambda d: c[..., d, None, None]
  psi = weight(K - 1) + weight(K) * a[..., -1, :, :]
  for j in reversed(range(K - 1)):
    psi = weight(j) + _outer(a[..., j, :, :], psi)
  return psi


def _outer(digit, rest):
  product = digit[..., :, None, :] * rest[..., None, :, :]
  return product.reshape(*product.shape[:-3], -1, product.shape[-1])


def _first(x, p):
  """The slices of the first digit: p arrays [..., p^(d-1), T] of an array [..., p^d, T] over nodes of depth d."""
  x = x.reshape(*x.shape[:-2], p, -1, x.shape[-1])
  return [x[..., i, :, :] for i in range(p)]


def _last(x, p):
  """The slices of the last digit."""
  x = x.reshape(*x.shape[:-2], -1, p, x.shape[-1])
  return [x[..., i, :] for i in range(p)]


def _dot(digit, slices):
  return sum(digit[..., i, None, :] * piece for i, piece in enumerate(slices))


def _mean_over_first(x, a, depth, p):
  """Contracts the first `depth` digits of x [..., nodes, T] with their probabilities."""
  for j in range(depth):
    x = _dot(a[..., j, :, :], _first(x, p))
  return x


def key_features_pullback(b: jax.Array, d_phi: jax.Array) -> jax.Array:
  """Gradient of <d_phi, Φ(b)> with respect to the digits, [..., K, p, T]."""
  K, p = b.shape[-3:-1]
  subtree, grads = d_phi, []
  for j in reversed(range(K)):
    grads.append(_mean_over_first(subtree, b, j, p))
    subtree = _dot(b[..., j, :, :], _last(subtree, p)) if j else None
  return jnp.stack(grads[::-1], -3)


def query_features_pullback(a: jax.Array, c: jax.Array, d_psi: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gradients of <d_psi, Ψ(a)>: digits [..., K, p, T], and weights per token, [..., K + 1, T] in the shape of a."""
  K, p = a.shape[-3:-1]
  weight = lambda d: c[..., d, None, None]
  # ball: gradient of a depth-d ball's indicator; subtree: that of the same node with all that hangs below it.
  ball, subtree = d_psi, weight(K) * d_psi
  d_digits, d_weights = [], []
  for d in reversed(range(1, K + 1)):
    d_digits.append(_mean_over_first(subtree, a, d - 1, p))
    d_weights.append(_mean_over_first(ball, a, d, p))
    ball, subtree = sum(_last(ball, p)), _dot(a[..., d - 1, :, :], _last(subtree, p))
    subtree = weight(d - 1) * ball + subtree
  d_weights.append(ball)
  return jnp.stack(d_digits[::-1], -3), jnp.concatenate(d_weights[::-1], -2)
