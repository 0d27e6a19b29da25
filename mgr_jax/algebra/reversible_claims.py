"""Claims about couplings in fixed point, orthogonal mixers, and the volume both preserve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import fixed_point, mixers
from mgr_jax.claims import Check, claim, worst_of

FRAC_BITS = 16
DEPTH = 32


def generator(key: jax.Array) -> np.random.Generator:
  """NumPy's generator of a JAX key."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _update(w, z, frac_bits=FRAC_BITS):
  """A coupling function with tokens mixed and products in bfloat16, as a layer has: int32 [B, T, C] -> int32."""
  x = fixed_point.from_fixed(z, frac_bits)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  mixed = jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1)[:, None]
  y = jnp.tanh(mixed.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
  return fixed_point.to_fixed(y, frac_bits)


def _saturating(a, b):
  """a + b that stops at the ends of the range instead of wrapping around."""
  total = a + b
  overflow = ((a ^ total) & (b ^ total)) < 0
  return jnp.where(overflow, jnp.where(a < 0, jnp.int32(-(2**31)), jnp.int32(2**31 - 1)), total)


@functools.partial(jax.jit, static_argnums=2)
def _forward(ws, z, add):
  def layer(z, w):
    a = add(z[0], _update(w[0], z[1]))
    return (a, add(z[1], _update(w[1], a))), None

  return jax.lax.scan(layer, z, ws)[0]


@functools.partial(jax.jit, static_argnums=2)
def _inverse(ws, z, truncates):
  """`truncates`: forget the last bit of every update, as rounding on one side only would."""

  def layer(z, w):
    update = lambda *args: _update(*args) & -2 if truncates else _update(*args)
    b = fixed_point.subtract(z[1], update(w[1], z[0]))
    return (fixed_point.subtract(z[0], update(w[0], b)), b), None

  return jax.lax.scan(layer, z, ws, reverse=True)[0]


@jax.jit
def _fixed(x):
  return fixed_point.to_fixed(x, FRAC_BITS)


def _mismatches(z, back) -> float:
  return float(sum(np.sum(np.asarray(a) != np.asarray(b)) for a, b in zip(z, back, strict=True)))


def _coupling(truncates: bool) -> Check:
  def measure(key, scale):
    rng, wrong = generator(key), 0.0
    ws = rng.normal(size=(DEPTH, 2, 8, 8)).astype(np.float32)
    for size in (1e-3, 1.0, 30.0):
      z = tuple(_fixed(rng.normal(size=(2, 2, 5 * scale, 8)).astype(np.float32) * np.float32(size)))
      wrong += _mismatches(z, _inverse(ws, _forward(ws, z, fixed_point.add), truncates))
    return wrong

  return measure


def _wrap_around(add) -> Check:
  """Updates are far below 2³¹, so only a state that starts at the ends of the range meets the border."""

  def measure(key, scale):
    rng = generator(key)
    ws = rng.normal(size=(DEPTH, 2, 8, 8)).astype(np.float32)
    ends = rng.integers(-(2**17), 2**17, (2, 2, 5 * scale, 8)) + 2**31
    z = tuple(ends.astype(np.uint32).view(np.int32))
    return _mismatches(z, _inverse(ws, _forward(ws, z, add), False))

  return measure


_lifting = jax.jit(mixers.lifting)
_cayley_map = jax.jit(mixers.cayley)
_givens = jax.jit(mixers.givens_fixed)
_givens_inverse = jax.jit(mixers.givens_fixed_inverse)


def _two_shears(z, coefficients, permutation):
  """A lifting that stops after two of its three shears."""
  t, s = (np.asarray(c, np.float64) for c in coefficients)
  a, b = np.split(np.asarray(z)[..., permutation].astype(np.int64), 2, axis=-1)
  a = a - np.rint(t * b).astype(np.int64)
  b = b + np.rint(s * a).astype(np.int64)
  return np.concatenate([a, b], -1)[..., np.argsort(permutation)]


def _turned(key, scale):
  rng = generator(key)
  z = rng.integers(-(2**20), 2**20, (200 * scale, 16)).astype(np.int32)
  angle = rng.uniform(-np.pi / 2, np.pi / 2, 8).astype(np.float32)
  return z, angle, _lifting(angle), mixers.pairing(16, 1)


def _givens_round_trip(omits: bool) -> Check:
  def measure(key, scale):
    z, _, coefficients, permutation = _turned(key, scale)
    forward = _two_shears if omits else _givens
    back = _givens_inverse(np.asarray(forward(z, coefficients, permutation), np.int32), coefficients, permutation)
    return float(np.sum(np.asarray(back) != z))

  return measure


def _givens_deviation(omits: bool) -> Check:
  def measure(key, scale):
    z, angle, coefficients, permutation = _turned(key, scale)
    a, b = np.split(z[:, permutation].astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))
    real = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    found = np.asarray((_two_shears if omits else _givens)(z, coefficients, permutation))[:, permutation]
    return float(np.max(np.abs(found - real)))

  return measure


def _cayley(factor: float) -> Check:
  """Largest deviation from the dense solve and from orthogonality; `factor` scales the low-rank term."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    with jax.enable_x64(True):
      one = np.eye(32)
      for _ in range(2 * scale):
        U, V = rng.normal(size=(2, 32, 2)) / 4
        A = U @ V.T - V @ U.T
        Q = np.asarray(_cayley_map(one, U, V)).T
        Q = one + factor * (Q - one)
        worst = worst_of(worst, np.max(np.abs(Q - np.linalg.solve(one - A, one + A))), np.max(np.abs(Q.T @ Q - one)))
    return worst

  return measure


def _fixed_point_cayley(x, U, V):
  """One step of the iteration y <- x + A(x + y) from y = x + Ax, that is (I + A)²x: not orthogonal."""
  A = U @ V.T - V @ U.T
  y = x + x @ A.T
  return y + y @ A.T


@functools.partial(jax.jit, static_argnums=1)
def _jacobian(values, mixer):
  ws, x, U, V, angle, stretch = values
  permutation = mixers.pairing(4, 0)

  def stack(flat):
    a, b = flat.reshape(2, 3, 4)
    for w in ws:
      a = (a + jnp.tanh(jnp.cumsum(b, 0) @ w)) * stretch
      b = b + jnp.tanh(jnp.cumsum(a, 0) @ w.T)
      a, b = mixer(a, U, V), mixers.givens(b, angle, permutation)
    return jnp.stack([a, b]).reshape(-1)

  return jax.jacfwd(stack)(x)


def _volume(mixer, stretch: float) -> Check:
  def measure(key, scale):
    del scale
    rng = generator(key)
    with jax.enable_x64(True):
      U, V = rng.normal(size=(2, 4, 1)) / 2
      values = rng.normal(size=(3, 4, 4)), rng.normal(size=24), U, V, rng.uniform(-1, 1, 2), np.float64(stretch)
      return abs(float(np.linalg.det(np.asarray(_jacobian(values, mixer)))) - 1)

  return measure


CLAIMS = (
  claim(
    "reversible.coupling_inverts",
    f"fixed-point streams come back bit for bit through {DEPTH} layers of bfloat16 arithmetic: words that differ",
    _coupling(False),
    0.0,
    _coupling(True),
    refs=("Gomez et al., 2017, arXiv 1707.04585", "MacKay et al., 2018, arXiv 1810.10999"),
  ),
  claim(
    "reversible.wraps_around",
    "streams that overflow 2^31 still come back bit for bit: words that differ",
    _wrap_around(fixed_point.add),
    0.0,
    _wrap_around(_saturating),
  ),
  claim(
    "reversible.givens_inverts",
    "a rotation as three rounded shears is undone bit for bit: words that differ",
    _givens_round_trip(False),
    0.0,
    _givens_round_trip(True),
  ),
  claim(
    "reversible.givens_turns",
    "three rounded shears stay within two units of the real rotation for |Z| < 2^20",
    _givens_deviation(False),
    2.0,
    _givens_deviation(True),
  ),
  claim(
    "reversible.cayley_is_orthogonal",
    "I + 2L(I - R'L)^-1 R' equals (I - A)^-1 (I + A) with A = LR', and Q'Q = I",
    _cayley(1.0),
    1e-12,
    _cayley(0.5),
  ),
  claim(
    "reversible.volume",
    "the Jacobian of couplings and both mixers has determinant one",
    _volume(mixers.cayley, 1.0),
    1e-10,
    _volume(_fixed_point_cayley, 1.0),
  ),
  claim(
    "reversible.volume_of_couplings",
    "the Jacobian of couplings has determinant one; scaling one stream by 1.01 per layer is seen",
    _volume(mixers.cayley, 1.0),
    1e-10,
    _volume(mixers.cayley, 1.01),
  ),
)
