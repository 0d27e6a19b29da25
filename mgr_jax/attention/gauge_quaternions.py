"""Frames in SO(3) and SO(4) as unit quaternions, component by component, with closed gradients.

SO(4) acts on a block w of four channels as w ↦ p w c̄ with unit quaternions p and c, SO(3) on three as w ↦ p w p̄. Their
running products T_t = U_t ··· U_0 are kept as one array per component, so every pass is elementwise over all blocks.

A gradient never runs through the products. Frames carry a `twist` of zeros whose cotangent stands for that of ξ in
T_t → T_t e^ξ; pulling and pushing vectors give it as a torque, from what they return alone. Moving one edge by
U_s → e^ξ U_s turns every T_t with t >= s into T_t e^(T_sᵀ ξ T_s), so the cotangent at the edge is the sum of all later
torques, carried to s: one reverse sum.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra import lie
from mgr_jax.algebra.hypercomplex import product
from mgr_jax.algebra.lie_prefix import scan_products
from mgr_jax.attention.gauge_chain import Chain, Setting
from mgr_jax.attention.gauge_documents import restarted, sum_from

ONE = (1.0, 0.0, 0.0, 0.0)


class Frames(NamedTuple):
  """Quaternions, one (b = 3) or two (p and c), each four arrays [B, T, K, n]; for each a twist of three arrays."""

  rotation: tuple
  twist: tuple


def by_tokens(f, *trees):
  """f of trees of arrays [B, T, ...], which treats every token alone, in up to 8 pieces one after the other.

  A loop keeps the compiler from repeating a chain of products in every reader of its result, transposes included.
  """
  B, T = jax.tree.leaves(trees)[0].shape[:2]
  pieces = math.gcd(B * T, 8)
  split = lambda x: x.reshape(pieces, 1, B * T // pieces, *x.shape[2:])
  out = jax.lax.map(lambda xs: f(*xs), jax.tree.map(split, trees))
  return jax.tree.map(lambda x: x.reshape(B, T, *x.shape[3:]), out)


def conj(q):
  return q[0], -q[1], -q[2], -q[3]


def _multiply(newer, older):
  return tuple(map(product, newer, older))


def _inverse(T):
  return tuple(map(conj, T))


def _dot(x, y):
  return x[0] * y[0] + x[1] * y[1] + x[2] * y[2]


def _halves(a: jax.Array) -> list[tuple]:
  """Coordinates [..., 3 or 6, n] -> the logarithms of the quaternions."""
  scale = 0.5 if a.shape[-2] == 3 else math.sqrt(0.5)
  return [tuple(scale * a[..., i + j, :] for j in range(3)) for i in range(0, a.shape[-2], 3)]


def matrix_coordinates(a: jax.Array) -> jax.Array:
  """The same rotations in coordinates above the diagonal, row by row: an orthogonal change, [..., 3 or 6, n]."""
  if a.shape[-2] == 3:
    x, y, z = (a[..., i, :] for i in range(3))
    return jnp.stack([-z, y, -x], -2)
  (ux, uy, uz), (cx, cy, cz) = _halves(a)
  return jnp.stack([cx - ux, cy - uy, cz - uz, -uz - cz, uy + cy, -ux - cx], -2)


def _circular(x: jax.Array, bound: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """cos θ, sinc θ = sin θ / θ and curl θ = (1 - sinc 2θ) / θ² of x = θ² <= bound².

  By Taylor polynomials at θ / 2^s <= 3/2, where what is cut is below rounding, and s doublings: multiply-adds alone,
  unlike library sines, and smooth at 0.
  """
  doublings = max(0, math.ceil(math.log2(bound / 1.5)))
  y = x * 0.25**doublings
  cos, sinc, curl = (jnp.zeros_like(x) for _ in range(3))
  for n in range(8 if x.dtype == jnp.float32 else 15, -1, -1):
    cos = (-1) ** n / math.factorial(2 * n) + y * cos
    sinc = (-1) ** n / math.factorial(2 * n + 1) + y * sinc
    curl = (-4) ** n * 4 / math.factorial(2 * n + 3) + y * curl
  for _ in range(doublings):
    half, sinc = sinc, sinc * cos
    cos, curl = 2 * cos * cos - 1, 0.25 * curl + 0.5 * sinc * half * half
  return cos, sinc, curl


def _pull_back_exp(u, cos, sinc, curl, xi):
  """Jᵀξ where e^(u+δ) = e^(Jδ) e^u to first order, J = sinc 2θ + curl·uuᵀ + sinc²·[u]ₓ."""
  along, across = curl * _dot(u, xi), sinc * sinc
  cross = u[1] * xi[2] - u[2] * xi[1], u[2] * xi[0] - u[0] * xi[2], u[0] * xi[1] - u[1] * xi[0]
  return tuple(sinc * cos * x + along * y - across * z for x, y, z in zip(xi, u, cross, strict=True))


def base_rotation(coordinates: jax.Array) -> tuple:
  """The factor of `Chain.base` from coordinates above the diagonal [6, n]."""
  return tuple(tuple(q) for q in lie.so4_quaternions(coordinates, 0))


def start_rotation(b: int, batch: int, heads: int, n: int) -> tuple:
  """The identity in the shape of `Chain.start`."""
  one = tuple(jnp.full((batch, heads, n), x, jnp.float32) for x in ONE)
  return (one,) * (b - 2)


def _edges(a, chain: Chain, setting: Setting):
  """U of every token, and per factor what `_circular` returns."""
  bound = setting.theta_max * (0.5 if a.shape[-2] == 3 else math.sqrt(0.5))
  logs, U = [], []
  for u in _halves(a):
    cos, sinc, curl = _circular(_dot(u, u), bound)
    logs.append((cos, sinc, curl))
    U.append((cos, *(sinc * x for x in u)))
  if chain.base is not None:
    U = list(_multiply(chain.base, U))
  if chain.valid_BT is not None:
    mask = chain.valid_BT[..., None, None]
    U = [tuple(jnp.where(mask, x, one) for x, one in zip(q, ONE, strict=True)) for q in U]
  return tuple(U), logs


def _normalised(q):
  inverse = jax.lax.rsqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
  return tuple(inverse * x for x in q)


def _frames(a, chain: Chain, setting: Setting):
  U, logs = _edges(a, chain, setting)
  T = scan_products(_multiply, (ONE,) * len(U), U, chain.start, setting.scan, 1)
  if chain.segment_ids_BT is not None:
    T = restarted(T, chain.segment_ids_BT, _multiply, _inverse)
  if setting.reorthogonal:
    T = tuple(map(_normalised, T))
  twist = tuple(tuple(jnp.zeros_like(x) for x in q[1:]) for q in T)
  return Frames(T, twist), logs


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frames(a: jax.Array, chain: Chain, setting: Setting) -> Frames:
  """T_t = U_t ··· U_0 · start with U = base · exp(a), restarting with every document; a [B, T, K, 3 or 6, n].

  The gradient of a comes from the twist alone, so frames must be used through `pull` and `push`.
  """
  return _frames(a, chain, setting)[0]


def _frames_forward(a, chain, setting):
  out, logs = _frames(a, chain, setting)
  return out, (a, logs, out.rotation, chain)


def _frames_backward(setting, saved, cotangent):
  a, logs, T, chain = saved
  xi = _edge_torques(T, cotangent.twist, chain.segment_ids_BT, setting.scan)
  if chain.base is not None:
    xi = [_carried(conj(e), x) for e, x in zip(chain.base, xi, strict=True)]

  def token(a, xi, logs):
    grads = []
    for u, circular, x in zip(_halves(a), logs, xi, strict=True):
      grads += _pull_back_exp(u, *circular, x)
    return grads

  grads = by_tokens(token, a, tuple(xi), tuple(logs))
  grad = jnp.stack(grads, -2) * (0.5 if len(grads) == 3 else math.sqrt(0.5))
  if chain.valid_BT is not None:
    grad = jnp.where(chain.valid_BT[..., None, None, None], grad, 0)
  return grad, None


frames.defvjp(_frames_forward, _frames_backward)


def _carried(q, s):
  """Imaginary q s q̄."""
  return product(product(q, (jnp.zeros_like(s[0]), *s)), conj(q))[1:]


def _edge_torques(T, twist, segment_ids_BT, scan: str):
  """Σ_(t>=s) of the twists, in the document of s, carried by T_s."""
  if scan == "serial" and segment_ids_BT is None:

    def token(later, xs):
      T, twist = xs
      later = jax.tree.map(jnp.add, later, twist)
      return later, tuple(map(_carried, T, later))

    first = lambda x: jnp.moveaxis(x, 1, 0)
    zero = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), twist)
    _, xi = jax.lax.scan(token, zero, jax.tree.map(first, (T, twist)), reverse=True)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), xi)
  later = sum_from(twist, segment_ids_BT)
  return tuple(map(_carried, T, later))


def _components(w, b):
  """w [..., D], or the b components of its blocks, as a float quaternion per block."""
  if not isinstance(w, tuple):
    n = w.shape[-1] // b
    w = tuple(w.astype(jnp.promote_types(w.dtype, jnp.float32))[..., i * n : (i + 1) * n] for i in range(b))
  return w if b == 4 else (jnp.zeros_like(w[0]), *w)


def _factors(T):
  """p and c with an axis for the vectors of one frame."""
  spread = [tuple(x[:, :, :, None] for x in q) for q in T]
  return spread[0], spread[-1]


def _sandwich(left, w, right, b):
  """left · w · right as the b components of every block."""
  return product(product(left, _components(w, b)), right)[4 - b :]


def _joined(parts, like):
  """Components of every vector as channels, in the dtype of `like`."""
  return tuple(jnp.concatenate(x, -1).astype(w.dtype) for x, w in zip(parts, like, strict=True))


def _pull(T, vectors, b):
  p, c = _factors(T)
  return tuple(_sandwich(conj(p), w, c, b) for w in vectors)


def _push(T, vectors, b):
  p, c = _factors(T)
  return tuple(_sandwich(p, w, conj(c), b) for w in vectors)


def _torque(gradients, vectors, b, sign):
  """Cotangent of the twist when T → T e^ξ moves w to ±ξw: vectors w and their gradients g, in the common frame.

  With e^ξ: w ↦ e^η w e^-ζ the cotangents of η and ζ are the imaginary parts of g w̄ and -w̄ g.
  """
  left = right = (0.0, 0.0, 0.0)
  for g, w in zip(gradients, vectors, strict=True):
    g, w = _components(g, b), _components(w, b)
    left = tuple(s + jnp.sum(x, 3) for s, x in zip(left, product(g, conj(w))[1:], strict=True))
    right = tuple(s - jnp.sum(x, 3) for s, x in zip(right, product(conj(w), g)[1:], strict=True))
  left, right = (tuple(sign * x for x in side) for side in (left, right))
  return (tuple(map(jnp.add, left, right)),) if b == 3 else (left, right)


def _pulled(T, vectors, b):
  return _joined(by_tokens(functools.partial(_pull, b=b), T, vectors), vectors)


def _pushed(T, vectors, b):
  return _joined(by_tokens(functools.partial(_push, b=b), T, vectors), vectors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pull(F: Frames, vectors: tuple, b: int) -> tuple:
  """T_tᵀ w = p̄ w c for every array w [B, T, K, R, D] of the tuple: all tokens in one common frame."""
  return _pulled(F.rotation, vectors, b)


def _pull_forward(F, vectors, b):
  out = _pulled(F.rotation, vectors, b)
  return out, (F.rotation, out)


def _pull_backward(b, saved, gradients):
  def token(T, out, gradients):
    return _torque(gradients, out, b, -1.0), _push(T, gradients, b)

  T, out = saved
  twist, parts = by_tokens(token, T, out, gradients)
  return Frames(jax.tree.map(jnp.zeros_like, T), twist), _joined(parts, gradients)


pull.defvjp(_pull_forward, _pull_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def push(F: Frames, vectors: tuple, b: int) -> tuple:
  """T_t w = p w c̄: from the common frame to that of every token."""
  return _pushed(F.rotation, vectors, b)


def _push_forward(F, vectors, b):
  return _pushed(F.rotation, vectors, b), (F.rotation, vectors)


def _push_backward(b, saved, gradients):
  def token(T, vectors, gradients):
    pulled = _pull(T, gradients, b)
    return _torque(pulled, vectors, b, 1.0), pulled

  T, vectors = saved
  twist, parts = by_tokens(token, T, vectors, gradients)
  return Frames(jax.tree.map(jnp.zeros_like, T), twist), _joined(parts, gradients)


push.defvjp(_push_forward, _push_backward)


def matrices(T, b: int) -> jax.Array:
  """The b×b matrices of quaternions, [..., n, b, b]."""
  p, c = (jnp.stack(q, -1) for q in (T[0], T[-1]))
  return lie.so3_from_quaternion(p) if b == 3 else lie.so4_matrix(p, c)
