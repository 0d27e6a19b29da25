"""Claims about ordered products: all scans agree, the gradient is closed, drift is held, and what order is worth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import icosahedral, lie
from mgr_jax.algebra.hypercomplex import quat_log
from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.algebra.lie_exp_claims import drift_float64, exp_float64, skew_float64
from mgr_jax.algebra.lie_prefix import prefix_product, prefix_quaternions
from mgr_jax.claims import Check, claim, largest_difference, worst_of

SCANS = ("assoc", "serial", "chunk:16")
LENGTH, BLOCKS = 1024, 16


def serial_float64(U: np.ndarray) -> np.ndarray:
  """U_t ··· U_0 of matrices [T, ..., b, b] one after the other in double precision."""
  T = np.array(U, np.float64)
  for t in range(1, len(T)):
    T[t] = T[t] @ T[t - 1]
  return T


@jax.jit
def so4_edges(a):
  """Quaternion pairs [T, 2, 4, n] of coordinates [T, n, 6]."""
  return jnp.stack(lie.so4_quaternions(jnp.swapaxes(a, 1, 2), 1), 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def pair_products(u, scan, normalise=True):
  """Running products of quaternion pairs [T, 2, 4, n]."""
  return prefix_quaternions(u, None, scan, component=-2, normalise=normalise)


@jax.jit
def pair_matrices(T):
  """Rotations [T, n, 4, 4] of quaternion pairs [T, 2, 4, n]."""
  return lie.so4_matrix(*jnp.unstack(jnp.swapaxes(T, 2, 3), axis=1))


def so4_products(a, scan, normalise=True, dtype=np.float32) -> np.ndarray:
  """Frames [T, n, 4, 4] of coordinates [T, n, 6] by quaternion pairs multiplied in `dtype`."""
  u = np.asarray(so4_edges(a)).astype(dtype)
  return np.asarray(pair_matrices(np.asarray(pair_products(u, scan, normalise), np.float32)), np.float64)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _matrix_products(a, b, scan, reorthogonal):
  return prefix_product(lie.exp_so(a, b, 2.0), None, scan, reorthogonal=reorthogonal)


def _scans(newest_left: bool) -> Check:
  """Largest difference between every scan at T = 1024 and the serial double product; the twin multiplies backwards."""

  def measure(key, scale):
    a = (0.3 * generator(key).normal(size=(LENGTH, BLOCKS * scale, 6))).astype(np.float32)
    U = exp_float64(skew_float64(a, 4))
    exact = serial_float64(U if newest_left else np.swapaxes(U, -1, -2))
    exact = exact if newest_left else np.swapaxes(exact, -1, -2)
    found = [so4_products(a, scan) for scan in SCANS] + [_matrix_products(a, 4, "chunk:16", True)]
    return worst_of(largest_difference(T, exact) for T in found)

  return measure


@functools.partial(jax.jit, static_argnums=2)
def _gradients(a, W, b):
  """Gradients of ⟨W, T(a)⟩: closed, closed without its conjugation by T, and by autodiff through all products."""
  U, pull_back = jax.vjp(lambda a: lie.exp_so(a, b, 16.0), a)

  def through(U):
    return jax.lax.scan(lambda T, u: (lie.matmul(u, T),) * 2, jnp.eye(b, dtype=U.dtype), U)[1]

  T, through_back = jax.vjp(through, U)
  (closed,) = jax.vjp(lambda U: prefix_product(U, None, "assoc", reorthogonal=False), U)[1](W)
  M = jnp.swapaxes(T, -1, -2) @ W
  unturned = jax.lax.cumsum(0.5 * (M - jnp.swapaxes(M, -1, -2)), 0, reverse=True) @ U
  return [pull_back(U_bar)[0] for U_bar in (closed, unturned, through_back(W)[0])]


@jax.jit
def _quaternion_gradients(a, W):
  loss = lambda T: jnp.vdot(W, lie.so4_matrix(*T))
  serial = lambda u: jax.lax.scan(lambda T, x: (lie.matmul(x, T),) * 2, jnp.eye(4, dtype=a.dtype), lie.exp_so4(u))[1]

  def closed(a):
    return loss([prefix_quaternions(x, None, "chunk:8") for x in lie.so4_quaternions(a)])

  return jax.grad(closed)(a), jax.grad(lambda a: jnp.vdot(W, serial(a)))(a)


def _closed_gradient(conjugated: bool) -> Check:
  def measure(key, scale):
    rng, worst = generator(key), 0.0
    with jax.enable_x64(True):
      for _ in range(scale):
        a, W = 0.5 * rng.normal(size=(16, 3)), rng.normal(size=(16, 3, 3))
        closed, unturned, expected = _gradients(a, W, 3)
        worst = worst_of(worst, largest_difference(closed if conjugated else unturned, expected))
        a, W = rng.normal(size=(16, 6)), rng.normal(size=(16, 4, 4))
        worst = worst_of(worst, largest_difference(*_quaternion_gradients(a, W)))
    return worst

  return measure


def _drift(corrected: bool) -> Check:
  """max |TᵀT - I| up to T = 8192 in float32, generators of size 0.3: quaternion pairs and 6×6 matrices."""

  def measure(key, scale):
    rng = generator(key)
    a4, a6 = ((0.3 * rng.normal(size=(8192, scale, p))).astype(np.float32) for p in (6, 15))
    quaternions = so4_products(a4, "chunk:64", corrected)
    return worst_of(drift_float64(quaternions), drift_float64(_matrix_products(a6, 6, "chunk:64", corrected)))

  return measure


def _multiset(b: int) -> Check:
  """Change of the transport T_t T_sᵀ when the tokens strictly between s and t are permuted."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    for _ in range(4 * scale):
      a = rng.normal(size=(32, lie.dimension(b))).astype(np.float32)
      orders = (np.arange(32), np.array([0, *rng.permutation(np.arange(1, 31)), 31]))
      frames = [np.asarray(_matrix_products(a[order], b, "serial", True)) for order in orders]
      worst = worst_of(worst, largest_difference(*(T[-1] @ T[0].T for T in frames)))
    return worst

  return measure


@functools.partial(jax.jit, static_argnums=1)
def _so3_frames(a, scan):
  return prefix_quaternions(lie.so3_quaternion(a), None, scan, axis=1)


def word_coordinates(words: np.ndarray) -> np.ndarray:
  """so(3) coordinates [..., 3], float32, whose exponentials are the icosahedral rotations of the words."""
  omega = 2 * np.asarray(jax.jit(quat_log)(icosahedral.icosians().astype(np.float32)))
  return np.stack([-omega[:, 2], omega[:, 1], -omega[:, 0]], -1)[words]


def read_by_rotations(rng: np.random.Generator, words: int, length: int) -> np.ndarray:
  """[words, length]: whether the frame T_t is nearest to the running product of a random word over A₅."""
  word = rng.integers(0, icosahedral.ORDER, (words, length))
  found = icosahedral.nearest(_so3_frames(word_coordinates(word), "chunk:64"))
  return found == icosahedral.running_products(word)


def misread_by_angles(rng: np.random.Generator, length: int, draws: int = 20_000, bins: int = 360) -> float:
  """Share of random words whose product is not the likeliest one given the sum of one random angle per letter.

  The likeliest product of each of `bins` equal arcs is learnt from as many words as it is then tested on.
  """
  angle = rng.uniform(-np.pi, np.pi, icosahedral.ORDER)
  table = icosahedral.multiplication_table()
  product, total = np.zeros((2, draws), int), np.zeros((2, draws))
  for letter in rng.integers(0, icosahedral.ORDER, (length, 2, draws), np.int8):
    product, total = table[letter, product], total + angle[letter]
  arc = np.floor(total % (2 * np.pi) * bins / (2 * np.pi)).astype(int) % bins
  count = np.zeros((bins, icosahedral.ORDER))
  np.add.at(count, (arc[0], product[0]), 1)
  return float(np.mean(count.argmax(1)[arc[1]] != product[1]))


CLAIMS = (
  claim(
    "gauge.scans_agree",
    "U_t ··· U_0 by tree, one by one and in chunks, quaternions or matrices: the double-precision product, T = 1024",
    _scans(True),
    2e-5,
    _scans(False),
  ),
  claim(
    "gauge.prefix_gradient",
    "one reverse cumulative sum, skew(T_s Σ_(t>=s) T_tᵀ Ḡ_t T_sᵀ), is the gradient through all products",
    _closed_gradient(True),
    1e-10,
    _closed_gradient(False),
  ),
  claim(
    "gauge.drift",
    "one correction step holds max |TᵀT - I| of 8192 float32 factors at rounding; without it the error grows",
    _drift(True),
    1e-6,
    _drift(False),
  ),
  claim(
    "gauge.plane_rotations_forget_order",
    "for b = 2 permuting the tokens between s and t leaves the transport unchanged; for b = 4 it does not",
    _multiset(2),
    1e-5,
    _multiset(4),
  ),
  claim(
    "gauge.icosahedral_words",
    "frames in SO(3) name every running product of words of 4096 letters over A₅; sums of angles do not",
    lambda key, scale: float(np.mean(~read_by_rotations(generator(key), 8 * scale, 4096))),
    0.0,
    lambda key, scale: misread_by_angles(generator(key), 64),
    refs=("Barrington 1989", "Merrill et al. 2024, arXiv 2404.08819"),
  ),
)
