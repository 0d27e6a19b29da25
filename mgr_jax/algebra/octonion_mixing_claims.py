"""Claims about the bracketings (q k̄)v and q(k̄v) and the operators behind them, measured in double precision."""

import numpy as np

from mgr_jax.algebra import octonion_symmetry as symmetry
from mgr_jax.algebra.octonion_claims import generator, largest
from mgr_jax.algebra.octonions import BLOCKS, PAIRS, act, column, conjugate, inner, multiply, operator, wedge
from mgr_jax.claims import Check, claim, worst_of

CASES = 500
RANKS = {"early": 29, "late": 8, "associator": 21, "mixture": 29}


def trilinear() -> dict[str, np.ndarray]:
  """The tensors [o, q, k, v] of both bracketings, their difference, and a mixture."""
  q, k, v = (np.expand_dims(np.eye(8), [1 + j for j in range(3) if j != i]) for i in range(3))
  q, k, v = (np.broadcast_to(x, (8, 8, 8, 8)) for x in (q, k, v))
  early, late = symmetry.early(q, k, v), symmetry.late(q, k, v)
  return {"early": early, "late": late, "associator": early - late, "mixture": 0.7 * late + 0.3 * early}


def singular_values(tensor: np.ndarray) -> np.ndarray:
  """Of the map from k ⊗ v to operators on q, a 64x64 matrix."""
  return np.linalg.svd(tensor.reshape(64, 64), compute_uv=False)


def _ranks(expected: dict[str, int]) -> Check:
  def measure(key, scale):
    del key, scale
    return float(
      worst_of(abs(int(np.sum(singular_values(t) > 1e-9)) - expected[name]) for name, t in trilinear().items())
    )

  return measure


def _matrices(sign: int) -> Check:
  """M + Mᵀ = 2⟨k, v⟩Id for M: q -> (q k̄)v, M·1 = k̄v, and H Hᵀ = 4·Id in each of the seven blocks of signs.

  `sign` flips one entry of the blocks.
  """

  def measure(key, scale):
    k, v = generator(key).standard_normal((2, 8, CASES * scale))
    numbers = operator(wedge(k, v))
    M = np.stack([act(numbers, e[:, None] * np.ones_like(k)) for e in np.eye(8)], 1)
    symmetric = M + M.swapaxes(0, 1) - 2 * inner(k, v) * np.eye(8)[:, :, None]
    defects = [largest(symmetric), largest(column(numbers) - np.stack(multiply(conjugate(k), v)))]
    H = np.zeros((28, 28))
    for row, terms in enumerate(BLOCKS):
      for s, i in terms:
        H[row, i] = s
    H[0, 0] *= sign
    crossed = [(PAIRS[i][0] ^ PAIRS[i][1]) != (PAIRS[j][0] ^ PAIRS[j][1]) for i, j in zip(*np.nonzero(H), strict=True)]
    return worst_of(*defects, largest(H @ H.T - 4 * np.eye(28)), float(any(crossed)))

  return measure


def _operator_acts(broken: bool) -> Check:
  """Σ_j p_j (q k̄_j)v_j from 29 sums, and Σ_j p_j q(k̄_j v_j) from eight of them; `broken` swaps two of the 29."""

  def measure(key, scale):
    rng = generator(key)
    q, k, v = rng.standard_normal((3, 8, 64 * scale, 5))
    p = rng.dirichlet(np.ones(5), 64 * scale)
    total = lambda parts: [np.sum(p * x, -1, keepdims=True) for x in parts]
    sums = total(operator(wedge(k, v)))
    if broken:
      sums[9], sums[10] = sums[10], sums[9]
    q = q[..., :1]
    early = largest(np.stack(act(sums, q)) - total(symmetry.early(q, k, v)))
    return worst_of(early, largest(np.stack(multiply(q, column(sums))) - total(symmetry.late(q, k, v))))

  return measure


def _closed_form(sign: float) -> Check:
  """(q k̄)v - ⟨k,v⟩q - ⟨q,k⟩v + ⟨q,v⟩k is alternating, orthogonal to q, k, v, and as long as their Gram determinant."""

  def measure(key, scale):
    q, k, v = generator(key).standard_normal((3, 8, CASES * scale))
    cross = lambda q, k, v: symmetry.early(q, k, v) - inner(k, v) * q - inner(q, k) * v + sign * inner(q, v) * k
    x = cross(q, k, v)
    gram = np.einsum("iac,jac->cij", *[np.stack([q, k, v])] * 2)
    length = inner(x, x) / np.linalg.det(gram) - 1
    swapped = [x + cross(*args) for args in ((k, q, v), (q, v, k))]
    # Lengths grow with the cube of the arguments; those of small determinants carry the error of the subtraction.
    sound = np.linalg.det(gram) > 1e-2 * np.prod([inner(y, y) for y in (q, k, v)], 0)
    orthogonal = worst_of(largest(inner(x, y)) for y in (q, k, v))
    return worst_of(orthogonal / 100, largest(length[sound]), worst_of(map(largest, swapped)) / 100)

  return measure


def _covariance(which: str) -> Check:
  """The largest residual of the symmetries, or the least of maps that are none."""

  def measure(key, scale):
    rng, residuals = generator(key), []
    for _ in range(4 * scale):
      triple, u = rng.standard_normal((3, 8, 50)), symmetry.unit_imaginary(rng)
      left, right, g2 = symmetry.left_matrix(u), symmetry.right_matrix(u), symmetry.random_automorphism(rng)
      pairs = {
        "real": [(symmetry.early, left), (symmetry.late, right), (symmetry.early, g2), (symmetry.late, g2)],
        "swapped": [(symmetry.early, right), (symmetry.late, left)],
        "rotation": [(m, symmetry.random_rotation(rng)) for m in (symmetry.early, symmetry.late)],
        "tilted": [(symmetry.early, symmetry.left_matrix(np.eye(8)[0] * 0.6 + 0.8 * u))],
      }
      residuals += [symmetry.covariance_residual(*pair, triple) for pair in pairs[which]]
    return (max if which == "real" else min)(residuals)

  return measure


def _quaternions(outside: float) -> Check:
  """Both bracketings on octonions of the form (a, 0), against each other and the Hamilton product."""

  def measure(key, scale):
    q, k, v = generator(key).standard_normal((3, 8, CASES * scale)) * np.array([1.0] * 4 + [outside] * 4)[:, None]
    w, x, y, z = np.stack(multiply(q, np.stack(conjugate(k))))[:4]
    a, b, c, d = v[:4]
    hamilton = (
      w * a - x * b - y * c - z * d,
      w * b + x * a + y * d - z * c,
      w * c - x * d + y * a + z * b,
      w * d + x * c - y * b + z * a,
    )
    early, late = symmetry.early(q, k, v), symmetry.late(q, k, v)
    return worst_of(largest(early - late), largest(early[:4] - np.stack(hamilton)), largest(early[4:]))

  return measure


def _norms(strength: float) -> Check:
  """| |m| - |v| | for unit q, k and both bracketings; how far |m_λ| exceeds |v| at λ = `strength`, at most 1."""

  def measure(key, scale):
    q, k, v = generator(key).standard_normal((3, 8, CASES * scale))
    q, k = (x / np.linalg.norm(x, axis=0) for x in (q, k))
    early, late, size = symmetry.early(q, k, v), symmetry.late(q, k, v), np.linalg.norm(v, axis=0)
    exact = worst_of(largest(np.linalg.norm(m, axis=0) - size) for m in (early, late))
    excess = np.max(np.linalg.norm(late + strength * (early - late), axis=0) - size)
    return worst_of(exact, float(excess))

  return measure


CLAIMS = (
  claim(
    "octonion.ranks",
    "operators on q span 29 dimensions for (q k̄)v, 8 for q(k̄v), 21 for their difference, 29 for mixtures",
    _ranks(RANKS),
    0.0,
    _ranks(RANKS | {"early": 64}),
  ),
  claim(
    "octonion.operator_is_skew",
    "q -> (q k̄)v is ⟨k, v⟩·Id plus a skew matrix, made of k ∧ v by seven 4x4 Hadamard matrices",
    _matrices(1),
    1e-12,
    _matrices(-1),
  ),
  claim(
    "octonion.29_sums",
    "Σ p_j (q k̄_j)v_j follows from 29 sums over j that do not contain q, Σ p_j q(k̄_j v_j) from eight",
    _operator_acts(broken=False),
    1e-12,
    _operator_acts(broken=True),
  ),
  claim(
    "octonion.triple_cross_product",
    "(q k̄)v = ⟨k,v⟩q + ⟨q,k⟩v - ⟨q,v⟩k + X with X alternating, orthogonal to q, k, v, |X|² their Gram determinant",
    _closed_form(1.0),
    1e-11,
    _closed_form(-1.0),
  ),
  claim(
    "octonion.spin7",
    "u·, u unit imaginary, on q, k, v moves (q k̄)v along, ·u does so for q(k̄v), automorphisms for both",
    _covariance("real"),
    1e-12,
    _covariance("swapped"),
  ),
  claim(
    "octonion.not_all_rotations",
    "these symmetries are special: a generic rotation of the eight components is none",
    _covariance("real"),
    1e-12,
    _covariance("rotation"),
  ),
  claim(
    "octonion.imaginary_units_only",
    "left multiplication is a symmetry of (q k̄)v for imaginary units; with a real part it is none",
    _covariance("real"),
    1e-12,
    _covariance("tilted"),
  ),
  claim(
    "octonion.quaternions_inside",
    "on octonions (a, 0) the brackets do not matter and the product is Hamilton's",
    _quaternions(0.0),
    1e-12,
    _quaternions(1.0),
  ),
  claim(
    "octonion.norms",
    "|m| = |v| for both bracketings, |m| <= |v| between them, not beyond",
    _norms(0.5),
    1e-12,
    _norms(2.0),
  ),
)
