"""Addresses: words over m digits as points of a self-similar set, and back.

A word w = (i_1, ..., i_k), i_1 outermost, is the map f_w = f_{i_1} ∘ ... ∘ f_{i_k}. With f_i(x) = s x + t_i this is
f_w(x) = s^k x + c_w, c_w = Σ_j s^{j-1} t_{i_j}: words with a common prefix of length l lie in one cube of side s^l. The
index of a word is Σ_j i_j m^{k-j}, the same order of significance.

Corner scheme: m = 2^e maps towards the corners of a cube, t_i = (1-s)·corner_i in the first e coordinates, 0 < s < 1/2.
"""

import jax
import jax.numpy as jnp


def word_of(index: jax.Array, m: int, depth: int) -> jax.Array:
  """Digits [..., depth] of a leaf index, first most significant.

  >>> word_of(jnp.array(6), m=4, depth=3).tolist()
  [0, 1, 2]
  """
  powers = m ** jnp.arange(depth - 1, -1, -1)
  return index[..., None] // powers % m


def index_of(word: jax.Array, m: int) -> jax.Array:
  """Leaf index of digits [..., depth].

  >>> int(index_of(jnp.array([0, 1, 2]), m=4))
  6
  """
  return jnp.sum(word * m ** jnp.arange(word.shape[-1] - 1, -1, -1), -1)


def corner_offsets(m: int, d: int, s) -> jax.Array:
  """t_i = (1-s)·(binary digits of i), [m, d].

  Raises:
    ValueError: m is no power of two, or has more than d binary digits.

  >>> corner_offsets(4, 2, 0.5).tolist()
  [[0.0, 0.0], [0.0, 0.5], [0.5, 0.0], [0.5, 0.5]]
  """
  e = m.bit_length() - 1
  if m < 2 or m != 1 << e or e > d:
    raise ValueError(f"m={m} corners need a power of two of at most 2^{d} in {d} dimensions")
  bits = jnp.arange(m)[:, None] >> jnp.arange(e - 1, -1, -1) & 1
  return (1 - s) * jnp.pad(bits, ((0, 0), (0, d - e)))


def translation(word: jax.Array, offsets: jax.Array, s) -> jax.Array:
  """c_w = Σ_j s^{j-1} t_{i_j}, [..., d] for words [..., depth]."""
  weights = s ** jnp.arange(word.shape[-1], dtype=offsets.dtype)
  return jnp.einsum("...jd,j->...d", offsets[word], weights, precision="highest")


def leaf_point(word: jax.Array, offsets: jax.Array, s) -> jax.Array:
  """The fixed point of f_w: c_w / (1 - s^k)."""
  return translation(word, offsets, s) / (1 - s ** word.shape[-1])


def soft_leaf_point(p: jax.Array, offsets: jax.Array, s) -> jax.Array:
  """Mean fixed point Σ_w P(w) x*_w under independent digits p [..., depth, m], in O(depth·m·d): all maps share s."""
  depth = p.shape[-2]
  weights = s ** jnp.arange(depth, dtype=offsets.dtype)
  return jnp.einsum("...jm,md,j->...d", p, offsets, weights, precision="highest") / (1 - s**depth)


def decode(x: jax.Array, m: int, depth: int, s) -> jax.Array:
  """Digits [..., depth] of points near corner-scheme leaves: threshold at 1/2, subtract t_i, divide by s, repeat."""
  e, d = m.bit_length() - 1, x.shape[-1]
  offsets = corner_offsets(m, d, s)
  place = 1 << jnp.arange(e - 1, -1, -1)

  def step(x, _):
    digit = jnp.sum((x[..., :e] > 0.5) * place, -1)
    return (x - offsets[digit]) / s, digit

  return jnp.moveaxis(jax.lax.scan(step, x, length=depth)[1], 0, -1)


def decoding_margin(s: float, digits: int) -> float:
  """Largest noise (each coordinate) below which the first `digits` digits of a translation c_w are always recovered.

  s^{j-1}(1-2s)/2 suffices for every point of the leaf cubes; it is tight over them.

  >>> round(decoding_margin(0.4, 1), 4), round(decoding_margin(0.4, 4), 4)
  (0.1, 0.0064)
  """
  return s ** (digits - 1) * (1 - 2 * s) / 2


def leaf_extremes(word: jax.Array, offsets: jax.Array, s, corner) -> jax.Array:
  """f_w(corner): where the base cube's corner [d] lies inside the leaf's cube."""
  return translation(word, offsets, s) + s ** word.shape[-1] * corner


def greedy_code(v: jax.Array, s: float, depth: int) -> tuple[jax.Array, jax.Array]:
  """Codes each coordinate of v in [0, 1] by `depth` binary digits of ratio s, coarsest first, always the nearer image.

  Returns (digits [..., depth], reconstruction). The error is at most s^depth / 2 for s >= 1/2, where the images cover
  the interval (s = 1/2 is binary fixed point); for s < 1/2 values in the gaps keep an error of up to (1-2s)/2.

  >>> digits, back = greedy_code(jnp.array(0.7), 0.5, 3)
  >>> digits.tolist(), float(back)
  ([1, 0, 1], 0.6875)
  """
  centre = 0.5

  def step(carry, j):
    rest, total = carry
    scale = s**j
    digit = (rest > centre).astype(v.dtype)
    return ((rest - (1 - s) * digit) / s, total + scale * (1 - s) * digit), digit

  (_, total), digits = jax.lax.scan(step, (v, jnp.zeros_like(v)), jnp.arange(depth, dtype=v.dtype))
  return jnp.moveaxis(digits, 0, -1).astype(jnp.int32), total + s**depth * centre
