"""Rotations of values by unit quaternions, in the layout of attention heads.

A head of size D = 4N holds N quaternions with the component axis outermost: component c of quaternion n is entry
c·N + n. So products are sums of products of contiguous slices of N lanes, and no axis of length 4 is innermost.
"""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.algebra import hypercomplex
from mgr_jax.algebra.hypercomplex import DEGENERATE, product


def blocks(x_D: jax.Array) -> jax.Array:
  """[..., D] -> [..., 4, N], components on their own axis."""
  return x_D.reshape(*x_D.shape[:-1], 4, x_D.shape[-1] // 4)


def rotate_by_position(x_BTHD: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """x_n · exp(i θ_n t), θ_n = base^(-n/N): (w, x) turns by +θt and (y, z) by -θt.

  A product on the right: q p(t) conj(k p(s)) = q p(t-s) k̄, so scores and rotors both depend on t - s alone.

  Args:
    rope: cos and sin of t·base^(-i/2N) [B or 1, T, 2N]; every other one is used.
  """
  cos, sin = (table[:, :, None, ::2] for table in rope)
  w, x, y, z = jnp.split(x_BTHD.astype(jnp.float32), 4, -1)
  turned = [w * cos - x * sin, x * cos + w * sin, y * cos + z * sin, z * cos - y * sin]
  return jnp.concatenate(turned, -1).astype(x_BTHD.dtype)


def strengthen(rotor_BTHD: jax.Array, strength_H: jax.Array) -> jax.Array:
  """û^λ for every block, λ per head: 0 is the identity, 1 the rotor itself."""
  u = hypercomplex.unit(blocks(rotor_BTHD.astype(jnp.float32)), -2)
  return hypercomplex.power(u, strength_H[:, None, None], -2).reshape(rotor_BTHD.shape).astype(rotor_BTHD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def turn(rotor_D: jax.Array, x_D: jax.Array, action: str, inverse: bool) -> jax.Array:
  """u x (`left`) or u x ū (`sandwich`) block by block, u = r/|r|, or conj(u) in its place (`inverse`).

  Degenerate rotors, |r|² <= 1e-12, act as the identity and get no gradient. Float32 inside, x's dtype outside; 16
  multiplications per block and product. The gradient is in closed form, since transposed slices would cost more than
  the product: with y = w x, dx = w̄ dy and dw = dy x̄; with y = w x w̄, dx = w̄ dy w and dw = dy w x̄ + dȳ w x.
  """
  return _turn(rotor_D, x_D, action, inverse)


def _turn(rotor, x, action, inverse):
  u, _ = _unit(_components(rotor))
  return _join(_act(_conjugate(u) if inverse else u, _components(x), action), x.dtype)


def _turn_fwd(rotor, x, action, inverse):
  return _turn(rotor, x, action, inverse), (rotor, x)


def _turn_bwd(action, inverse, saved, dy_D):
  rotor, x = saved
  u, inverse_norm = _unit(_components(rotor))
  w, values, dy = _conjugate(u) if inverse else u, _components(x), _components(dy_D)
  dx = _act(_conjugate(w), dy, action)
  if action == "left":
    dw = product(dy, _conjugate(values))
  else:
    terms = product(product(dy, w), _conjugate(values)), product(product(_conjugate(dy), w), values)
    dw = tuple(a + b for a, b in zip(*terms, strict=True))
  du = _conjugate(dw) if inverse else dw
  along = sum(a * b for a, b in zip(u, du, strict=True))
  d_rotor = tuple(inverse_norm * (b - a * along) for a, b in zip(u, du, strict=True))
  return _join(d_rotor, rotor.dtype), _join(dx, x.dtype)


turn.defvjp(_turn_fwd, _turn_bwd)


def _components(x_D):
  return tuple(jnp.split(x_D.astype(jnp.promote_types(x_D.dtype, jnp.float32)), 4, -1))


def _join(components, dtype):
  return jnp.concatenate(components, -1).astype(dtype)


def _conjugate(a):
  return (a[0], -a[1], -a[2], -a[3])


def _unit(r):
  """The unit quaternion and 1/|r|; 1 and 0 where r is degenerate."""
  n2 = sum(c * c for c in r)
  regular = n2 > DEGENERATE
  inverse_norm = jnp.where(regular, jax.lax.rsqrt(jnp.where(regular, n2, 1)), 0)
  return (jnp.where(regular, r[0] * inverse_norm, 1), *(c * inverse_norm for c in r[1:])), inverse_norm


def _act(w, x, action):
  turned = product(w, x)
  return turned if action == "left" else product(turned, _conjugate(w))


def pairwise(weight_BHTS, q_rotor_BHTD, k_rotor_BHSD, v_BHSD, action: str) -> jax.Array:
  """Σ_j p_ij m(R_ij, v_j) with every relative rotor R_ij = û_i conj(û_j) formed: T²·D memory, the definition."""
  u, w = (_unit(_components(r))[0] for r in (q_rotor_BHTD, k_rotor_BHSD))
  pair = lambda x: tuple(c[:, :, None] for c in x)
  relative = product(tuple(c[:, :, :, None] for c in u), pair(_conjugate(w)))
  moved = _act(relative, pair(_components(v_BHSD)), action)
  return _join(tuple(jnp.sum(weight_BHTS[..., None] * c, 3) for c in moved), v_BHSD.dtype)
