"""Symmetries of the two bracketings of query, inverse key and value.

(q k̄)v commutes with left multiplication of all three by a unit imaginary u, q(k̄v) with right multiplication; such maps
generate Spin(7) in SO(8), in two different places. Both commute with the automorphisms of the octonions, the group G₂.
"""

import numpy as np

from mgr_jax.algebra.octonions import SIGNS, multiply


def early(q, k, v) -> np.ndarray:
  """(q k̄)v, components first."""
  return np.stack(multiply(multiply(q, [k[0], *-k[1:]]), v))


def late(q, k, v) -> np.ndarray:
  """q(k̄v), components first."""
  return np.stack(multiply(q, multiply([k[0], *-k[1:]], v)))


def left_matrix(u: np.ndarray) -> np.ndarray:
  """L_u with L_u x = ux, 8x8.

  >>> left_matrix(np.eye(8)[0]).trace().item()
  8.0
  """
  return np.stack([np.stack(multiply(u, e)) for e in np.eye(8)], 1)


def right_matrix(u: np.ndarray) -> np.ndarray:
  """R_u with R_u x = xu, 8x8."""
  return np.stack([np.stack(multiply(e, u)) for e in np.eye(8)], 1)


def unit_imaginary(rng: np.random.Generator, against=()) -> np.ndarray:
  """A random unit imaginary octonion orthogonal to those in `against`, which are orthonormal."""
  u = np.concatenate([[0.0], rng.standard_normal(7)])
  for other in against:
    u -= (u @ other) * other
  return u / np.linalg.norm(u)


def random_automorphism(rng: np.random.Generator) -> np.ndarray:
  """A random element of G₂ as an 8x8 matrix.

  A basic triple, orthonormal imaginary a, b, c with c orthogonal to ab, is the image of (e_1, e_2, e_4) under exactly
  one automorphism, because the three generate the algebra.

  >>> g, e = random_automorphism(np.random.default_rng(0)), np.eye(8)
  >>> bool(np.allclose(g @ multiply(e[3], e[5]), multiply(g @ e[3], g @ e[5])))
  True
  """
  a = unit_imaginary(rng)
  b = unit_imaginary(rng, [a])
  ab = np.stack(multiply(a, b))
  image = {0: np.eye(8)[0], 1: a, 2: b, 4: unit_imaginary(rng, [a, b, ab])}
  for x, y in ((1, 2), (1, 4), (2, 4), (3, 4)):
    image[x ^ y] = SIGNS[x, y] * np.stack(multiply(image[x], image[y]))
  return np.stack([image[i] for i in range(8)], 1)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
  """A random orthogonal 8x8 matrix."""
  return np.linalg.qr(rng.standard_normal((8, 8)))[0]


def covariance_residual(mixing, g: np.ndarray, triple: np.ndarray) -> float:
  """Largest |m(gq, gk, gv) - g·m(q, k, v)| over unit octonions, `triple` being [3, 8, cases]."""
  triple = triple / np.linalg.norm(triple, axis=1, keepdims=True)
  moved = mixing(*np.einsum("ij,njc->nic", g, triple))
  return float(np.max(np.abs(moved - g @ mixing(*triple))))
