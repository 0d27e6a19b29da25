"""Claims about Lanczos over PyTrees and the macro step in its Krylov space, each with a broken twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.claims import Check, claim, worst_of
from mgr_jax.optim import hoss_spectrum as macro
from mgr_jax.optim.lanczos import combine, lanczos, project

DIM = 64
POSITIVE = (0.01, 0.1, 1.0, 10.0, 100.0)
INDEFINITE = (-2.0, -0.5, 0.0, 0.5, 3.0)


def rng_of(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def symmetric(rng, values) -> np.ndarray:
  """A matrix with these eigenvalues, repeated to `DIM`, and random eigenvectors."""
  U = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
  return U * np.resize(values, DIM) @ U.T


def function_of(H: np.ndarray, f) -> np.ndarray:
  """f(H) of a symmetric matrix, in NumPy."""
  l, U = np.linalg.eigh(H)
  return U * f(l) @ U.T


def phi_reference(l, delta):
  """Φ_δ in float64 NumPy."""
  safe = np.where(np.abs(l * delta) < 1e-12, 1.0, l)
  return np.where(np.abs(l * delta) < 1e-12, delta, -np.expm1(-delta * safe) / safe)


def unravel(x):
  """[DIM] as a tree of a matrix, a vector and a scalar."""
  return {"matrix": x[:40].reshape(8, 5), "rest": [x[40:63], x[63]]}


def ravel(tree):
  return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


@functools.partial(jax.jit, static_argnums=5)
def _krylov_step(H, g, delta, growth, tol, rank):
  space = lanczos(lambda v: unravel(H @ ravel(v)), unravel(g), rank, breakdown_tol=tol)
  mean = ravel(combine(space.basis, macro.mean_coefficients(macro.spectrum(space), delta, "flow", growth)))
  return mean, space._replace(basis=jax.vmap(ravel)(space.basis))


def krylov_step(H, g, delta, rank=5, growth=np.inf, tol=1e-12):
  """The mean step for F = w·H·w/2 with gradient g, and the Krylov space that it is in; in the precision of g."""
  return _krylov_step(*(np.asarray(x, g.dtype) for x in (H, g, delta, growth, tol)), rank)


def mean_step(H, g, delta, rank=5, growth=np.inf):
  return np.asarray(krylov_step(H, g, delta, rank, growth)[0], np.float64)


def _exact(missing: bool) -> Check:
  """Largest relative error of the mean over its tolerance: 1e-9 in float64; in float32 1e-5, 2e-3 beyond δ = 1.

  Float32 takes one product more than there are distinct eigenvalues: the last exact direction is the difference of
  vectors 10⁴ times its size. `missing` adds an eigenvalue, so that the float64 products are one too few.
  """

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for _ in range(scale):
      for values, deltas in ((POSITIVE, (1e-4, 0.1, 1.0, 10.0, 1e4)), (INDEFINITE, (1e-4, 0.1, 1.0, 10.0))):
        H, g = symmetric(rng, (*values, 1.7) if missing else values), rng.standard_normal(DIM)
        for delta in deltas:
          exact = -function_of(H, lambda l, delta=delta: phi_reference(l, delta)) @ g
          with jax.enable_x64(True):
            double = mean_step(H, g, delta, 5)
          worst = np.max([worst, np.linalg.norm(double - exact) / np.linalg.norm(exact) / 1e-9])
          if not missing:
            single = mean_step(H, g.astype(np.float32), delta, 6)
            tolerance = 1e-5 if delta <= 1 else 2e-3
            worst = np.max([worst, np.linalg.norm(single - exact) / np.linalg.norm(exact) / tolerance])
    return worst

  return measure


def _limit(large: bool, broken: bool) -> Check:
  """δ -> 0: |m + δg|/|δg| over δ·l_max/2, for gradient descent; δ -> inf: error against -H⁻¹g over 1e-8."""

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for _ in range(3 * scale):
      g = rng.standard_normal(DIM)
      with jax.enable_x64(True):
        if large:
          H = symmetric(rng, INDEFINITE[:2] + POSITIVE[2:] if broken else POSITIVE[1:])
          m, newton = mean_step(H, g, 50 / 0.1, growth=1.0), -np.linalg.solve(H, g)
          worst = np.max([worst, np.linalg.norm(m - newton) / np.linalg.norm(newton) / 1e-8])
        else:
          H, delta = symmetric(rng, POSITIVE), 1e-4 / 100
          m = -np.linalg.solve(H, g) if broken else mean_step(H, g, delta)
          worst = np.max([worst, np.linalg.norm(m + delta * g) / np.linalg.norm(delta * g) / (delta * 100 / 2)])
    return worst

  return measure


def _semigroup(descent: bool) -> Check:
  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for values in (POSITIVE, INDEFINITE) * scale:
      H, w = symmetric(rng, values), rng.standard_normal(DIM)
      first, second = 10 ** rng.uniform(-2, 0.3, 2)
      move = lambda w, t, H=H: w + (-t * H @ w if descent else mean_step(H, H @ w, t, 20))
      with jax.enable_x64(True):
        once, twice = move(w, first + second), move(move(w, first), second)
      worst = np.max([worst, np.linalg.norm(once - twice) / np.linalg.norm(once)])
    return worst

  return measure


def _dissipation(sign: float) -> Check:
  """Relative error of F(w + m) - F(w) against -g·Ψ_δ(H)·g, and any increase; `sign` multiplies the argument of φ."""

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for values in (POSITIVE, INDEFINITE) * scale:
      H, g, delta = symmetric(rng, values), rng.standard_normal(DIM), 10 ** rng.uniform(-2, 0)
      with jax.enable_x64(True):
        m = mean_step(sign * H, g, delta)
      change = g @ m + m @ H @ m / 2
      expected = -g @ function_of(H, lambda l, delta=delta: phi_reference(2 * l, delta)) @ g
      worst = np.max([worst, abs(change / expected - 1), change])
    return worst

  return measure


def _orthonormal(reorth: int) -> Check:
  """max |QᵀQ - I| in float32 after 40 steps, with ten eigenvalues up to 1e5 and 990 in [1e-4, 1]."""
  run = jax.jit(lambda d, g: lanczos(lambda v: d * v, g, 40, reorth=reorth, breakdown_tol=0.0).basis)

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for _ in range(scale):
      d = np.concatenate([np.geomspace(10, 1e5, 10), 10 ** rng.uniform(-4, 0, 990)]).astype(np.float32)
      Q = np.asarray(run(d, rng.standard_normal(1000).astype(np.float32)), np.float64)
      worst = np.max([worst, np.max(np.abs(Q @ Q.T - np.eye(40)))])
    return worst

  return measure


_residual = jax.jit(macro.residual, static_argnums=2)


def tridiagonal(alpha, beta) -> np.ndarray:
  """The matrix with this diagonal and off-diagonal."""
  return np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1)


def _decay_spectrum(rng):
  return symmetric(rng, np.linspace(0.02, 20, DIM)), rng.standard_normal(DIM)


def _projected(skip: int) -> Check:
  """Errors of QᵀHQ = T, and how far Ritz values leave the spectrum or extreme ones shrink as r grows.

  `skip` shifts the off-diagonal of T.
  """

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for _ in range(2 * scale):
      H, g = _decay_spectrum(rng)
      with jax.enable_x64(True):
        _, space = krylov_step(H, g, 1.0, 20)
      Q, T = np.asarray(space.basis), tridiagonal(space.alpha, np.roll(space.beta, skip))
      l = np.linalg.eigvalsh(H)
      ends = np.array([np.linalg.eigvalsh(T[:r, :r])[[0, -1]] for r in range(1, 21)])
      outside = worst_of(l[0] - ends[-1, 0], ends[-1, 1] - l[-1])
      shrinking = worst_of(np.max(np.diff(ends[:, 0])), np.max(-np.diff(ends[:, 1])))
      worst = np.max([worst, np.max(np.abs(Q @ H @ Q.T - T)), outside, shrinking])
    return worst

  return measure


def _breakdown(tol: float) -> Check:
  """Errors for g an eigenvector: dimension other than 1, mean; and for g = 0 anything but zero."""

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for _ in range(scale):
      H = symmetric(rng, POSITIVE)
      g = 3 * np.linalg.eigh(H)[1][:, 30]
      with jax.enable_x64(True):
        m, space = krylov_step(H, g, 0.5, tol=tol)
        zero, empty = krylov_step(H, 0 * g, 0.5, tol=tol)
      exact = -phi_reference(g @ H @ g / (g @ g), 0.5) * g
      worst = np.max([worst, np.max(np.abs(np.asarray(m) - exact)), np.max(np.abs(np.asarray(zero)))])
      worst = np.max([worst, abs(np.sum(space.active) - 1), np.sum(empty.active)])
    return worst

  return measure


def _estimate(last: bool) -> Check:
  """Largest |log10| of estimated over true error of the mean, among ranks with relative errors in [1e-8, 1e-1].

  The estimate is δ|g| times `macro.residual`; without `last` it takes the first row of Φ_δ(T) in place of the last.
  """

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for delta in np.repeat([0.3, 1.0, 3.0], scale):
      H, g = _decay_spectrum(rng)
      exact = -function_of(H, lambda l, delta=delta: phi_reference(l, delta)) @ g
      with jax.enable_x64(True):
        _, space = krylov_step(H, g, 1.0, 20)
        Q, T = np.asarray(space.basis), tridiagonal(space.alpha, space.beta)
        for r in (3, 6, 9, 12):
          theta, vectors = np.linalg.eigh(T[:r, :r])
          # The estimate reads the first and the last component only: with zeros beyond r one shape serves every rank.
          ends = np.zeros((2, 12))
          ends[:, :r] = vectors[[0, -1]]
          s = macro.Spectrum(np.resize(theta, 12), ends, np.arange(12) < r, np.linalg.norm(g), T[r, r - 1])
          phi = vectors @ (phi_reference(theta, delta) * vectors[0])
          m = -s.norm * phi @ Q[:r]
          error = np.linalg.norm(m - exact)
          rho = float(_residual(s, delta, "flow")) if last else T[r, r - 1] * abs(phi[0])
          if 1e-8 < error / np.linalg.norm(exact) < 1e-1:
            worst = np.max([worst, abs(np.log10(delta * s.norm * rho / error))])
    return worst

  return measure


@jax.jit
def _tree_and_array(H, g):
  T = lanczos(lambda v: unravel(H @ ravel(v)), unravel(g), 5, breakdown_tol=1e-12)
  A = lanczos(lambda v: H @ v, g, 5, breakdown_tol=1e-12)
  s = macro.spectrum(T)
  mean = lambda basis: combine(basis, macro.mean_coefficients(s, 1.0, "abs"))
  return project(T.basis, unravel(g)), project(A.basis, g), ravel(mean(T.basis)), mean(A.basis)


def _tree_is_array(drop: bool) -> Check:
  """Relative difference of basis and mean over a tree and over one array, float32; `drop` forgets the last leaf."""

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for _ in range(scale):
      H, g = symmetric(rng, (0.5, 1.0, 2.0, 3.0, 5.0, 7.0)), rng.standard_normal(DIM)
      c, d, m, n = map(np.asarray, _tree_and_array(H.astype(np.float32), g.astype(np.float32)))
      n = np.append(n[:-1], 0) if drop else n
      worst = np.max([worst, np.max(np.abs(c - d)) / np.max(np.abs(d)), np.max(np.abs(m - n)) / np.max(np.abs(n))])
    return worst

  return measure


CLAIMS = (
  claim(
    "hoss.mean",
    "with r the number of distinct eigenvalues m = -Φ_δ(H)g exactly, δ from 1e-4 to 1e4, l = 0 and l < 0 included",
    _exact(False),
    1.0,
    _exact(True),
    refs=("Hochbruck & Lubich, 1997, SIAM J. Numer. Anal. 34",),
  ),
  claim(
    "hoss.small_time", "|m + δg| <= δ·l_max/2 · |δg| for δ -> 0", _limit(False, False), 1 + 1e-3, _limit(False, True)
  ),
  claim("hoss.large_time", "m = -H⁻¹g for δ·l_min = 50, if H > 0", _limit(True, False), 1.0, _limit(True, True)),
  claim("hoss.semigroup", "steps of δ_1 and δ_2 are one of δ_1 + δ_2", _semigroup(False), 1e-9, _semigroup(True)),
  claim(
    "hoss.dissipation", "F(w + m) - F(w) = -g·Ψ_δ(H)·g <= 0 for every H", _dissipation(1.0), 1e-9, _dissipation(-1.0)
  ),
  claim("lanczos.orthonormal", "QᵀQ = I in float32 with outliers", _orthonormal(2), 1e-5, _orthonormal(0)),
  claim(
    "lanczos.projection", "QᵀHQ = T; extreme Ritz values grow, inside the spectrum", _projected(0), 1e-8, _projected(1)
  ),
  claim(
    "lanczos.breakdown",
    "g an eigenvector gives dimension 1 and the exact mean, g = 0 gives zero",
    _breakdown(1e-12),
    1e-10,
    _breakdown(1e-300),
  ),
  claim(
    "hoss.error_estimate",
    "δ|g|·β_r|e_r·Φ_δ(T)e_1| is within a factor 100 of the error of m",
    _estimate(True),
    2.0,
    _estimate(False),
  ),
  claim(
    "lanczos.trees", "a tree gives what its ravelled vector gives", _tree_is_array(False), 1e-6, _tree_is_array(True)
  ),
)
