"""Alexander and Jones polynomials of the closure of a braid word, evaluated at a point, and their coefficients.

Both are computed through representations of the braid group: Burau, and Temperley-Lieb on a tensor product of qubits.
They depend on the closed link alone (conjugation and stabilisation leave them unchanged), which makes them ground truth
for anything that claims to execute braid words. Single or double precision as the arguments are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mgr_jax.algebra.braid import burau_matrix, writhe


def conway_alexander(word: jax.Array, strands: int, s: jax.Array) -> jax.Array:
  """Conway-normalised Alexander polynomial of the closure at t = s²: Δ(t) = Δ(1/t), unknot 1, a knot has Δ(1) = 1.

  Δ = minor(1 - Burau(word)) / (t^{n-1} (-s)^{writhe-n+1}), the minor without the last row and column. For links of
  several components Δ is a polynomial in s = √t. Complex scalar; cost O(L n + n³).
  """
  s = jnp.asarray(s, jnp.result_type(s, complex))
  t = s * s
  minor = jnp.linalg.det((jnp.eye(strands) - burau_matrix(word, strands, t))[:-1, :-1])
  return minor / (t ** (strands - 1) * (-s) ** (writhe(word) - strands + 1))


def alexander(word: jax.Array, strands: int, t: jax.Array) -> jax.Array:
  """`conway_alexander` at the principal square root of t. Trefoil: t - 1 + 1/t; figure-eight: -t + 3 - 1/t."""
  return conway_alexander(word, strands, jnp.sqrt(jnp.asarray(t, jnp.result_type(t, complex))))


def kauffman_bracket(word: jax.Array, strands: int, a: jax.Array) -> jax.Array:
  """Kauffman bracket of the closure, <unknot> = 1: invariant under the second and third Reidemeister moves.

  σ_i^{±1} = a^{±1} + a^{∓1} E_i, where E = [[-a², 1], [1, -a⁻²]] on the qubit states (01, 10) and zero elsewhere,
  E² = d E, E_i E_{i±1} E_i = E_i, d = -a² - a⁻²; the bracket is Tr(μ^{⊗n} ρ(word)) / d with μ = diag(-a², -a⁻²).
  A curl (first Reidemeister move) multiplies it by -a^{±3}. (Kauffman, 1987; Jones, 1985.)

  Complex scalar; singular at a⁴ = -1 (d = 0). Memory O(4^n), cost O(L 4^n).
  """
  a = jnp.asarray(a, jnp.result_type(a, complex))
  basis = jnp.arange(2**strands)

  def cross(rho: jax.Array, letter: jax.Array) -> tuple[jax.Array, None]:
    low = jnp.maximum(strands - 1 - jnp.abs(letter), 0)
    left, right = (basis >> (low + 1)) & 1, (basis >> low) & 1
    diagonal = jnp.where(left != right, jnp.where(left == 0, -(a**2), -(a**-2)), 0)
    flipped = jnp.where((left != right)[:, None], rho[basis ^ (3 << low)], 0)
    cupcap = diagonal[:, None] * rho + flipped
    power = jnp.where(letter > 0, a, 1 / a)
    return jnp.where(letter == 0, rho, power * rho + cupcap / power), None

  rho, _ = lax.scan(cross, jnp.eye(2**strands, dtype=a.dtype), jnp.asarray(word))
  ones = lax.population_count(basis)
  weight = (-(a**2)) ** (strands - ones) * (-(a**-2)) ** ones
  return jnp.sum(weight * jnp.diagonal(rho)) / (-(a**2) - a**-2)


def jones(word: jax.Array, strands: int, a: jax.Array) -> jax.Array:
  """Jones polynomial V(t) of the closure at t = a⁻⁴: (-a³)^{-writhe} <closure>. Closure of σ_1³: t + t³ - t⁴."""
  a = jnp.asarray(a, jnp.result_type(a, complex))
  return (-(a**3)) ** (-writhe(word)) * kauffman_bracket(word, strands, a)


def laurent_coefficients(f: Callable[[jax.Array], jax.Array], degree: int) -> jax.Array:
  """Real coefficients [2·degree+1] of a Laurent polynomial f(s), exponents -degree .. degree.

  Samples f at the 2·degree+1 roots of unity and inverts the discrete Fourier transform; exact up to rounding when f has
  no other exponents. An odd number of roots never contains s = ±i, where the bracket's normalisation is singular.
  """
  count = 2 * degree + 1
  samples = jax.vmap(f)(jnp.exp(2j * jnp.pi * jnp.arange(count) / count))
  return jnp.roll(jnp.fft.fft(samples) / count, degree).real


def alexander_coefficients(word: jax.Array, strands: int) -> jax.Array:
  """Coefficients of `conway_alexander` in s = √t, exponents -L .. L.

  >>> trefoil = jax.jit(alexander_coefficients, static_argnums=1)(jnp.array([1, 1, 1]), 2)
  >>> [round(c) for c in trefoil.tolist()]  # t - 1 + 1/t
  [0, 1, 0, -1, 0, 1, 0]
  """
  return laurent_coefficients(lambda s: conway_alexander(word, strands, s), len(word))


def jones_coefficients(word: jax.Array, strands: int) -> jax.Array:
  """Coefficients of the Jones polynomial in s = √t, exponents -(2L+n) .. 2L+n."""
  return laurent_coefficients(lambda s: jones(word, strands, s**-0.5), 2 * len(word) + strands)
