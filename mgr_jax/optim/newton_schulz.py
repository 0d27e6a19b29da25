"""Orthogonalisation: the polar factor of a matrix by odd polynomials, made of matrix products only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPS = 1e-7


class Quintic(NamedTuple):
  """p(s) = a·s + b·s³ + c·s⁵, applied to all singular values at once."""

  a: float
  b: float
  c: float


# Steep at 0 and never convergent: large singular values keep moving within [0.68, 1.14] (Jordan et al., 2024).
NS5 = Quintic(3.4445, -4.7750, 2.0315)

# Step k is the best odd quintic on the interval that step k-1 leaves of [1e-3, 1]; the last row repeats
# (Amsel, Persson, Musco, Gower, 2025, arXiv 2505.16932).
POLAR_EXPRESS = (
  Quintic(8.28721201814563, -23.595886519098837, 17.300387312530933),
  Quintic(4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  Quintic(3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  Quintic(3.3184196573706015, -2.488488024314874, 0.51004894012372),
  Quintic(2.300652019954817, -1.6689039845747493, 0.4188073119525673),
  Quintic(1.891301407787398, -1.2679958271945868, 0.37680408948524835),
  Quintic(1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
  Quintic(1.875, -1.25, 0.375),
)
# Rounding factors to bfloat16 may push singular values above 1, where the best quintics grow fast: they get this much
# room. Without it a Gaussian matrix [128, 512] comes out with a singular value of 2.2.
SAFETY = 1.01

METHODS = ("polar_express", "ns5", "svd")


def quintics(ns: str, steps: int, safety: float = 1.0) -> tuple[Quintic, ...]:
  """The polynomial of each step; with `safety` f that of `polar_express` is p(s/f), but for its last row."""
  if ns == "ns5":
    return (NS5,) * steps
  roomy = [Quintic(a / safety, b / safety**3, c / safety**5) for a, b, c in POLAR_EXPRESS[:-1]]
  return tuple((*roomy, POLAR_EXPRESS[-1])[min(k, len(roomy))] for k in range(steps))


def orthogonalise(M: jax.Array, ns: str = "polar_express", steps: int = 5, dtype=None) -> jax.Array:
  """The polar factor U Vᵀ of M = U S Vᵀ, or an approximation U p(S) Vᵀ of it.

      X_0 = M / (|M|_F + 1e-7),   A = X_k X_kᵀ,   X_{k+1} = a_k X_k + (b_k A + c_k A²) X_k

  Tall matrices are transposed first, so A is the smaller of the two Gram matrices. Singular values of at least
  1e-3 |M|_F end in [0.876, 1.124] with `polar_express` (8 steps give 1 to rounding) and in [0.470, 1.203] with `ns5`,
  those of at least 1e-2 |M|_F in [0.681, 1.135]. Smaller ones are multiplied by at most 1026 and 485: directions that M
  hardly has stay small.

  Args:
    M: [..., m, n]; all leading axes are batch axes.
    ns: one of `METHODS`. `svd` is exact: 1 for every singular value above rounding, 0 for the others.
    steps: number of iterations; `svd` has none.
    dtype: of the factors of matrix products; sums are float32. By default that of M, at least float32, and bfloat16 on
      accelerators that multiply it fast: it moves X by 1% to 2% with `ns5`, by 7% to 11% with `polar_express`, whose
      interval becomes [0.845, 1.125]. `svd` ignores it.

  Returns:
    The shape and dtype of M. A zero matrix gives zero. Matrices with |M|_F near 1e-7 and below come out smaller.

  Raises:
    ValueError: unknown `ns`, `steps` below 1, M with fewer than 2 axes.

  Cost: steps · (4 m² n + 2 m³) FLOPs per matrix for m <= n.

  >>> M = jnp.diag(jnp.array([3.0, 1.0, 0.1]))
  >>> jnp.round(jnp.diag(orthogonalise(M, "svd")), 3).tolist()
  [1.0, 1.0, 1.0]
  """
  if ns not in METHODS:
    raise ValueError(f"ns={ns!r} is not one of {METHODS}")
  if steps < 1:
    raise ValueError(f"steps={steps} is not positive")
  if M.ndim < 2:
    raise ValueError(f"M has shape {M.shape}, not [..., m, n]")
  exact = jnp.promote_types(M.dtype, jnp.float32)
  if ns == "svd":
    return _polar_factor(M.astype(exact)).astype(M.dtype)
  dtype = jnp.dtype((jnp.bfloat16 if _bfloat16_is_fast() else exact) if dtype is None else dtype)
  tall = M.shape[-2] > M.shape[-1]
  X = (M.mT if tall else M).astype(exact)
  X = X / (jnp.linalg.norm(X, axis=(-2, -1), keepdims=True) + EPS)

  def matmul(x, y):
    # Accelerators would otherwise round the factors of a float32 product to fewer bits.
    precision = None if dtype == jnp.bfloat16 else "highest"
    return jnp.matmul(x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=exact)

  def step(X, quintic):
    a, b, c = quintic
    A = matmul(X, X.mT)
    return a * X + matmul(b * A + c * matmul(A, A), X), None

  # X itself stays in float32: its rounding errors would be lifted like any other small singular value.
  rows = quintics(ns, steps, SAFETY if dtype == jnp.bfloat16 else 1.0)
  X, _ = jax.lax.scan(step, X, tuple(jnp.asarray(rows, exact).T))
  return (X.mT if tall else X).astype(M.dtype)


def _polar_factor(M: jax.Array) -> jax.Array:
  u, s, vt = jnp.linalg.svd(M, full_matrices=False)
  rounding = max(M.shape[-2:]) * jnp.finfo(M.dtype).eps * s[..., :1]
  return jnp.matmul(u * (s > rounding)[..., None, :], vt, precision="highest")


def _bfloat16_is_fast() -> bool:
  """True on TPUs and on GPUs of compute capability 8 and up."""
  device = jax.devices()[0]
  capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
  return device.platform == "tpu" or (capability is not None and float(capability) >= 8)
