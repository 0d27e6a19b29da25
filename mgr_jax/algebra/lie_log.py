"""Logarithms of rotations, principal: every angle in [0, π]."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mgr_jax.algebra.hypercomplex import SIGN, quat_log
from mgr_jax.algebra.lie import dimension

# cos of the half-angle, or the mean of two, below which the logarithm is reported as ill-conditioned.
NEAR_PI = 1e-3


def quaternions_of_so4(R: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Unit quaternions (p, c) with R x = p x c̄, [..., 4, 4] -> two of [..., 4], with Re p + Re c >= 0.

  Cayley's factorisation: M[m, n] = ¼ ⟨x ↦ e_m x ē_n, R⟩ is the matrix p cᵀ of rank one, and its longest row is parallel
  to c. The sign chosen is that of the shorter rotation.
  """
  e = np.arange(4)
  conjugate_sign = np.where(e == 0, 1, -1)
  # e_m x ē_n takes e_j to ± e_(m xor j xor n), with these signs, and each is read off one entry of R.
  m, n, j = e[:, None, None], e[None, :, None], e[None, None, :]
  sign = SIGN[m, j] * SIGN[m ^ j, n] * conjugate_sign[n]
  M = 0.25 * jnp.sum(R[..., m ^ j ^ n, j] * sign, -1)
  longest = jnp.argmax(jnp.sum(M * M, -1), -1)
  c = jnp.take_along_axis(M, longest[..., None, None], -2)[..., 0, :]
  c /= jnp.linalg.norm(c, axis=-1, keepdims=True)
  p = jnp.sum(M * c[..., None, :], -1)
  turn = jnp.where(p[..., :1] + c[..., :1] < 0, -1, 1).astype(R.dtype)
  return turn * p, turn * c


def log_so(R: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Coordinates a with exp skew(a) = R and all angles at most π, for b = 2, 3, 4: [..., b, b] -> [..., b(b-1)/2].

  Also returns near_pi [...]: True where an angle is within about 2e-3 of π, so that the axis is decided by rounding.

  Raises:
    ValueError: b > 4, for which `log_so_host` runs on the host.

  >>> a, near_pi = log_so(jnp.array([[0.0, 1.0], [-1.0, 0.0]]))
  >>> round(float(a[0]), 4), bool(near_pi)
  (1.5708, False)
  """
  b = R.shape[-1]
  if b == 2:
    a = jnp.arctan2(R[..., 0, 1], R[..., 0, 0])
    return a[..., None], jnp.abs(jnp.cos(a / 2)) < NEAR_PI
  if b > 4:
    raise ValueError(f"log_so has closed forms for b = 2, 3, 4, got b={b}; log_so_host serves any b outside a program")
  if b == 3:
    # Rotations of the imaginary quaternions are those of R⁴ with p = c.
    pad = [(0, 0)] * (R.ndim - 2) + [(1, 0), (1, 0)]
    R = jnp.pad(R, pad).at[..., 0, 0].set(1)
  p, c = quaternions_of_so4(R)
  u1, u2, u3 = jnp.moveaxis(quat_log(p), -1, 0)
  v1, v2, v3 = jnp.moveaxis(quat_log(c), -1, 0)
  a = [v1 - u1, v2 - u2, v3 - u3, -u3 - v3, u2 + v2, -u1 - v1]
  return jnp.stack(a[-dimension(b) :], -1), 0.5 * (p[..., 0] + c[..., 0]) < NEAR_PI


def log_so_host(R: np.ndarray) -> np.ndarray:
  """Coordinates [b(b-1)/2] of the principal logarithm of one rotation [b, b], by the real Schur form. NumPy only.

  Raises:
    ValueError: R is not a rotation to 1e-4, or an angle is within 1e-6 of π, where the logarithm is not unique.

  >>> turn = np.eye(5)
  >>> turn[:2, :2] = [[0.6, 0.8], [-0.8, 0.6]]
  >>> log_so_host(turn).round(4)[:2].tolist()
  [0.9273, 0.0]
  """
  R = np.asarray(R, np.float64)
  b = R.shape[-1]
  if np.max(np.abs(R.T @ R - np.eye(b))) > 1e-4 or np.linalg.det(R) < 0:
    raise ValueError("log_so_host needs a rotation: RᵀR = I to 1e-4 and det R = +1")
  S, Z = scipy.linalg.schur(R, output="real")
  L, i = np.zeros((b, b)), 0
  while i < b:
    if i + 1 < b and abs(S[i + 1, i]) > 1e-9:
      angle = np.arctan2(S[i, i + 1], S[i, i])
      if abs(abs(angle) - np.pi) < 1e-6:
        raise ValueError("an angle of R is π: the principal logarithm is not unique")
      L[i, i + 1], L[i + 1, i] = angle, -angle
      i += 2
    else:
      if S[i, i] < 0:
        raise ValueError("an angle of R is π: the principal logarithm is not unique")
      i += 1
  A = Z @ L @ Z.T
  return A[np.triu_indices(b, 1)]
