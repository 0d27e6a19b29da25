"""Analytic functions of Levi-Civita numbers by Taylor recurrences, and what follows: derivatives, limits, powers.

For an analytic f and y = f(x), y' = f'(x)·x' in the formal variable ε gives y_n = (1/n) Σ_{j=1..n} j·x_j·d_{n-j} with
d = f'(x), whose first n terms are known by then (Griewank & Walther, 2008, Evaluating Derivatives, ch. 13). Each
function costs K² products and is undefined (NaN) at infinite numbers.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.hyperreal import (
  EXACT,
  LC,
  TERMS,
  _normal,
  _shifted,
  coefficient,
  eps,
  inverse,
  is_limited,
  real,
  st,
)


def _standard_window(x: LC) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Coefficients of ε⁰..ε^(K-1), whether the standard part is unknown or infinite, and the order of any f(x)."""
  a = _shifted(x.coef, jnp.clip(x.val, 0, x.terms))
  undefined = ~is_limited(x) | (x.order <= 0)
  standard = ~x.lost & ((x.val >= EXACT) | ((x.val == 0) & jnp.all(x.coef[..., 1:] == 0, -1)))
  return a, undefined, jnp.where(standard, EXACT, jnp.minimum(x.order, x.terms))


def _solved(x: LC, start: Sequence[Callable], derivative: Callable) -> tuple[LC, ...]:
  """The series y of a system y' = derivative(y)·x'; `start` are the functions at the standard part.

  `derivative(ys, m)` is the list of coefficients m of the derivatives from the coefficients 0..m of the ys.
  """
  a, undefined, order = _standard_window(x)
  a = jnp.where(undefined[..., None], 1, a)
  ys = [[f(a[..., 0])] for f in start]
  ds = [[] for _ in start]
  for n in range(1, x.terms):
    for d, new in zip(ds, derivative(ys, n - 1), strict=True):
      d.append(new)
    slopes = np.arange(1, n + 1) * a[..., 1 : n + 1]
    for y, d in zip(ys, ds, strict=True):
      y.append(jnp.sum(slopes * jnp.stack(d[::-1], -1), -1) / n)
  zero = jnp.zeros_like(x.val)
  return tuple(_normal(zero, jnp.stack(y, -1), order, undefined) for y in ys)


@jax.jit
def exp(x: LC) -> LC:
  """e^x for a limited x."""
  return _solved(x, [jnp.exp], lambda ys, m: [ys[0][m]])[0]


@jax.jit
def sin_cos(x: LC) -> tuple[LC, LC]:
  """sin x and cos x for a limited x."""
  return _solved(x, [jnp.sin, jnp.cos], lambda ys, m: [ys[1][m], -ys[0][m]])


def sin(x: LC) -> LC:
  """sin x for a limited x."""
  return sin_cos(x)[0]


def cos(x: LC) -> LC:
  """cos x for a limited x."""
  return sin_cos(x)[1]


@jax.jit
def tanh(x: LC) -> LC:
  """tanh x for a limited x, by t' = (1 - t²)·x'."""

  def derivative(ys, m):
    t = ys[0]
    return [(m == 0) - sum(t[i] * t[m - i] for i in range(m + 1))]

  return _solved(x, [jnp.tanh], derivative)[0]


@jax.jit
def log(x: LC) -> LC:
  """log x for x > 0 that is neither infinite nor infinitesimal: no series in powers of ε is log ε."""
  y = inverse(x)
  (found,) = _solved(x, [lambda a: jnp.log(jnp.where(a > 0, a, 1))], lambda ys, m: [y.coef[..., m]])
  outside = (x.val != 0) | ~(x.coef[..., 0] > 0)
  return _normal(found.val, found.coef, found.order, outside)


def raised(x: LC, y: LC) -> LC:
  """x^y = exp(y·log x), also for an infinite y as long as y·log x is limited: (1 + aε)^(1/ε)."""
  return exp(y * log(x))


def derivatives(f: Callable[[LC], LC], x, n: int, terms: int | None = None) -> jax.Array:
  """f(x), f'(x), ..., f⁽ⁿ⁾(x) at real points x [...]: k! times the coefficient of ε^k in f(x + ε); float [..., n + 1].

  A coefficient that `terms` terms (n + 1 unless told) do not determine is NaN.

  >>> derivatives(lambda x: x**3, 2.0, 3).tolist()
  [8.0, 12.0, 12.0, 6.0]
  """
  terms = terms or n + 1
  y = f(real(x, terms) + eps(terms))
  return jnp.stack([math.factorial(k) * coefficient(y, k) for k in range(n + 1)], -1)


def limit(f: Callable[[LC], LC], x=0.0, terms: int = TERMS) -> jax.Array:
  """lim f at the real x from above, as st(f(x + ε)): L'Hôpital's rule by arithmetic.

  NaN where the quotient is infinite, or where so many leading terms cancel that `terms` do not suffice.
  """
  return st(f(real(x, terms) + eps(terms)))
