"""Claims about quaternions, each with a broken twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import hypercomplex as hc
from mgr_jax.claims import Check, claim, worst_of

# Row a, column b: which unit a·b is, and its sign.
TABLE_UNIT = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
TABLE_SIGN = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, -1, -1, 1], [1, 1, -1, -1]])


def generator(key: jax.Array) -> np.random.Generator:
  """NumPy noise from a JAX key."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


products = jax.jit(hc.hamilton)


def _flipped(a, b):
  """The product with the sign of one of its 16 terms flipped."""
  return hc.hamilton(a, b).at[..., 0].add(2 * a[..., 1] * b[..., 1])


def _worst(*differences) -> jax.Array:
  return jnp.max(jnp.stack([jnp.max(jnp.abs(d)) for d in differences]))


def _double(measure):
  """Runs `measure(rng, scale)` in float64."""

  def check(key, scale):
    with jax.enable_x64(True):
      return float(measure(generator(key), scale))

  return check


def _basis(swap: bool) -> Check:
  """Largest deviation of the 16 products of basis units from the table; `swap` exchanges j and k in it."""

  def measure(key, scale):
    del key, scale
    order = np.array([0, 1, 3, 2]) if swap else np.arange(4)
    expected = np.zeros((4, 4, 4))
    rows, columns = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    expected[order[rows], order[columns], order[TABLE_UNIT]] = TABLE_SIGN
    unit = np.eye(4, dtype=np.float32)
    return float(np.max(np.abs(np.asarray(products(unit[:, None], unit[None])) - expected)))

  return measure


@functools.partial(jax.jit, static_argnums=1)
def _ring_residual(abc, product):
  a, b, c = abc
  ab, square = product(a, b), lambda x: jnp.sum(x * x, -1)
  associative = product(ab, c) - product(a, product(b, c))
  reversing = hc.conjugate(ab) - product(hc.conjugate(b), hc.conjugate(a))
  size = jnp.sqrt(square(a) * square(b))
  length = jnp.sqrt(square(ab)) / size - 1
  return _worst(associative / (size * jnp.sqrt(square(c)))[..., None], reversing / size[..., None], length)


def _composition(product) -> Check:
  """Relative residuals of associativity, conjugation and length; as multiples of 1e-14 and, in float32, of 1e-6."""

  def measure(key, scale):
    triples = generator(key).standard_normal((3, 10_000 * scale, 4))
    with jax.enable_x64(True):
      double = _ring_residual(triples, product)
    single = _ring_residual(triples.astype(np.float32), product)
    return worst_of(float(double) / 1e-14, float(single) / 1e-6)

  return measure


def block_reused(b):
  """A wrong right multiplication: the lower right block of R(b) is that of L(b)."""
  return hc.right_matrix(b).at[..., 2:, 2:].set(hc.left_matrix(b)[..., 2:, 2:])


def _matrices(right_matrix) -> Check:
  """Largest residual of ab = L(a) b = R(b) a and of L(a)R(b) = R(b)L(a)."""

  @jax.jit
  def residual(a, b):
    L, R, ab = hc.left_matrix(a), right_matrix(b), hc.hamilton(a, b)
    apply = lambda M, x: jnp.einsum("nij,nj->ni", M, x)
    return _worst(apply(L, b) - ab, apply(R, a) - ab, L @ R - R @ L)

  return _double(lambda rng, scale: residual(*rng.standard_normal((2, 10_000 * scale, 4))))


_left_matrix = jax.jit(hc.left_matrix)


def _isometry(flip: bool) -> Check:
  """Largest residual of L(a)ᵀL(a) = |a|²I and det L(a) = |a|⁴, relative; `flip` changes the sign of one entry."""

  def measure(rng, scale):
    a = rng.standard_normal((1000 * scale, 4))
    L = np.array(_left_matrix(a))
    if flip:
      L[:, 1, 2] *= -1
    n2 = np.sum(a * a, -1)
    gram = np.swapaxes(L, 1, 2) @ L / n2[:, None, None] - np.eye(4)
    return worst_of(np.max(np.abs(gram)), np.max(np.abs(np.linalg.det(L) / n2**2 - 1)))

  return _double(measure)


def _naive_exp(omega):
  """The formula as written, guarded in the value only."""
  theta = jnp.sqrt(jnp.sum(omega * omega, -1, keepdims=True))
  return jnp.concatenate([jnp.cos(theta), omega * jnp.where(theta > 0, jnp.sin(theta) / theta, 1)], -1)


def _exponential(exp) -> Check:
  """Largest residual of |exp ω| = 1, log exp ω = ω, exp log u = u, and of D exp(0) = (0, I)."""

  @jax.jit
  def residual(omega):
    u = exp(omega)
    round_trip = exp(hc.quat_log(u)) - u
    slope = jax.jacobian(exp)(jnp.zeros(3)) - jnp.eye(4)[:, 1:]
    return _worst(jnp.sum(u * u, -1) - 1, hc.quat_log(u) - omega, round_trip, slope)

  def measure(rng, scale):
    axis = rng.standard_normal((1000 * scale, 3))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    sizes = np.concatenate([[0, 1e-12, 1e-4, 1e-3, 3.0], rng.uniform(0, 3, len(axis) - 5)])
    return residual(axis * sizes[:, None])

  return _double(measure)


def units(rng, *shape) -> np.ndarray:
  """Uniform unit quaternions [*shape, 4], float64."""
  a = rng.standard_normal((*shape, 4))
  return a / np.linalg.norm(a, axis=-1, keepdims=True)


def _covariance(both: bool) -> Check:
  """Largest residual of m(gqh, gkh, gvr) = g m(q,k,v) r and <gqh, gkh> = <q, k>; h on q alone unless `both`."""

  @jax.jit
  def residual(qkv, ghr):
    (q, k, v), (g, h, r) = qkv, ghr
    times = lambda *xs: functools.reduce(hc.hamilton, xs)
    mixing = lambda q, k, v: times(q, hc.conjugate(k), v)
    q2, k2 = times(g, q, h), times(g, k, h) if both else times(g, k)
    score = jnp.sum(q2 * k2, -1) - jnp.sum(q * k, -1)
    return _worst(mixing(q2, k2, times(g, v, r)) - times(g, mixing(q, k, v), r), score)

  return _double(lambda rng, scale: residual(rng.standard_normal((3, 1000 * scale, 4)), units(rng, 3, 1000 * scale)))


def _relative_position(on_the_right: bool) -> Check:
  """Largest change of score and rotor of q_t, k_s when both positions move by the same amount."""

  @jax.jit
  def rotor(q, k, p_t, p_s):
    put = lambda a, p: hc.hamilton(a, p) if on_the_right else hc.hamilton(p, a)
    return hc.hamilton(put(q, p_t), hc.conjugate(put(k, p_s)))

  def measure(rng, scale):
    q, k = units(rng, 2, 1000 * scale)
    t, s, shift = rng.integers(0, 1000, (3, len(q)))
    place = lambda at: np.stack([np.cos(0.1 * at), np.sin(0.1 * at), 0 * at, 0 * at], -1)
    still, moved = (rotor(q, k, place(t + by), place(s + by)) for by in (0, shift))
    return np.max(np.abs(np.asarray(moved) - np.asarray(still)))

  return _double(measure)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _gate_residual(x, omega, omega_right, tau, n, right_matrix):
  gate = jnp.exp(tau) * hc.left_matrix(hc.quat_exp(omega)) @ right_matrix(hc.quat_exp(omega_right))
  iterated, _ = jax.lax.scan(lambda y, _: (jnp.einsum("nij,nj->ni", gate, y, precision="highest"), None), x, None, n)
  closed = hc.rotor_gate(x, n * omega, n * omega_right, n * tau)
  norm = lambda a: jnp.sqrt(jnp.sum(a * a, -1, keepdims=True))
  # In units of the length of the result: float32 would overflow otherwise for no fault of the gate.
  size = jnp.exp(n * tau) * norm(x)
  return _worst((iterated - closed) / size, norm(iterated) / size - 1)


def _gate(right_matrix) -> Check:
  """Relative residual of n = 512 iterations against the closed form and e^(nτ)|x|, as a multiple of the tolerance:
  1e-11 in float64; in float32 2e-4, since rounding of one gate, about 1e-7, is repeated n times."""

  def measure(key, scale):
    rng, n = generator(key), 512
    worst = 0.0
    for size in (0.01, 0.3, 1.0):
      x, (omega, omega_right) = rng.standard_normal((8 * scale, 4)), size * rng.standard_normal((2, 8 * scale, 3))
      args = (x, omega, omega_right, np.asarray(0.005))
      with jax.enable_x64(True):
        double = _gate_residual(*args, n, right_matrix)
      single = _gate_residual(*(np.asarray(a, np.float32) for a in args), n, right_matrix)
      worst = worst_of(worst, float(double) / 1e-11, float(single) / 2e-4)
    return worst

  return measure


CLAIMS = (
  claim(
    "hypercomplex.basis",
    "the 16 products of 1, i, j, k are those of the table, exactly",
    _basis(swap=False),
    0.0,
    _basis(swap=True),
  ),
  claim(
    "hypercomplex.composition",
    "(ab)c = a(bc), conj(ab) = b̄ā and |ab| = |a||b|, to 1e-14 in float64 and 1e-6 in float32",
    _composition(hc.hamilton),
    1.0,
    _composition(_flipped),
  ),
  claim(
    "hypercomplex.matrices",
    "ab = L(a)b = R(b)a for all a and b, and L(a)R(b) = R(b)L(a)",
    _matrices(hc.right_matrix),
    1e-12,
    _matrices(block_reused),
  ),
  claim(
    "hypercomplex.left_isometry",
    "L(a)ᵀL(a) = |a|²I and det L(a) = |a|⁴",
    _isometry(flip=False),
    1e-11,
    _isometry(flip=True),
  ),
  claim(
    "hypercomplex.exponential",
    "|exp ω| = 1, exp and log are inverse for |ω| < π, and exp has its gradient at ω = 0",
    _exponential(hc.quat_exp),
    1e-12,
    _exponential(_naive_exp),
  ),
  claim(
    "hypercomplex.covariance",
    "m(q,k,v) = q k̄ v obeys m(gqh, gkh, gvr) = g m(q,k,v) r, and <gqh, gkh> = <q, k>, for unit g, h, r",
    _covariance(both=True),
    1e-12,
    _covariance(both=False),
  ),
  claim(
    "hypercomplex.relative_position",
    "with positions multiplied on the right, q p(t) conj(k p(s)) depends on t - s alone; on the left it does not",
    _relative_position(on_the_right=True),
    1e-10,
    _relative_position(on_the_right=False),
    refs=("Su et al., 2021, arXiv 2104.09864",),
  ),
  claim(
    "hypercomplex.rotor_gate",
    "n = 512 gates e^τ u x v give e^(nτ) uⁿ x vⁿ and the length e^(nτ)|x|",
    _gate(hc.right_matrix),
    1.0,
    _gate(block_reused),
  ),
)
