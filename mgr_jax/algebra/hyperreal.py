"""Computable hyperreal numbers: truncated Levi-Civita series, an ordered field with infinitesimal and infinite ones.

A number is Σ_k coef_k ε^(val+k) with K terms, integer exponents and ε positive but smaller than every positive real.
Dual numbers, a + bε with ε² = 0, are no field: ε has no inverse there, and no number is infinite. (Levi-Civita, 1892;
Berz, 1992, Automatic differentiation as nonarchimedean analysis; Shamseddine & Berz, 2010, Analysis on the Levi-Civita
field.)
"""

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np

TERMS = 6
EXACT = 2**30 - 1  # twice this still fits into int32
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LC:
  """Σ_{k<K} coef_k ε^(val+k) + O(ε^order): a batch of truncated Levi-Civita numbers, and a PyTree.

  `+ - * / **`, comparisons and `abs` work with other such batches of the same K and with real numbers; they broadcast.
  A comparison decides by the sign of the leading coefficient of the difference, and `x == y` means that no known term
  differs, so exactly one of <, ==, > holds (`decided` tells whether the first unknown term could change that).
  Results without a meaning (1/0, a function of an infinite number) have NaN coefficients, and so has everything
  computed from them.

  All operations work under `jit`, `vmap` and `grad`; derivatives are those of the coefficients with exponents fixed: a
  leading coefficient that is exactly 0 is absent and gets none. Coefficients are floats: whether terms cancel is
  decided by exact equality with 0, so integer and dyadic coefficients behave as in the field and others up to rounding.

  Args:
    val: int32 [...], the exponent of the leading term; `EXACT` for 0.
    coef: float [..., K]; coef[..., 0] is not 0 unless the number is.
    order: int32 [...], the first exponent at which terms are unknown; `EXACT` if no term was dropped.

  >>> e = eps()
  >>> 1 / (1 - e), (e + e**2) - e, bool(1e12 * e < 1)
  (1 + ε + ε² + ε³ + ε⁴ + ε⁵ + O(ε⁶), ε², True)
  """

  val: jax.Array
  coef: jax.Array
  order: jax.Array

  # NumPy arrays leave operators with these numbers to them.
  __array_ufunc__ = None

  @property
  def lost(self) -> jax.Array:
    """Whether nonzero terms may have been dropped: then the number is known modulo ε^order only; bool [...]."""
    return self.order < EXACT

  @property
  def shape(self) -> tuple[int, ...]:
    return self.coef.shape[:-1]

  @property
  def terms(self) -> int:
    """K, the number of terms carried."""
    return self.coef.shape[-1]

  def __add__(self, other):
    return _binary(_add, self, other)

  def __mul__(self, other):
    return _binary(_multiply, self, other)

  def __neg__(self):
    return LC(self.val, -self.coef, self.order)

  def __sub__(self, other):
    return _binary(lambda x, y: _add(x, -y), self, other)

  def __truediv__(self, other):
    return _binary(lambda x, y: _multiply(x, inverse(y)), self, other)

  def __rsub__(self, other):
    return -self + other

  def __rtruediv__(self, other):
    return inverse(self) * other

  __radd__ = __add__
  __rmul__ = __mul__

  def __pow__(self, exponent):
    """x^p for a real number p; for a whole p by multiplication, so that exact stays exact."""
    if not isinstance(exponent, numbers.Real):
      return NotImplemented
    return integer_power(self, int(exponent)) if float(exponent).is_integer() else power(self, float(exponent))

  def __lt__(self, other):
    return _compared(self, other, (-1,))

  def __gt__(self, other):
    return _compared(self, other, (1,))

  def __eq__(self, other):
    return _compared(self, other, (0,))

  def __ne__(self, other):
    equal = _compared(self, other, (0,))
    return equal if equal is NotImplemented else ~equal

  def __le__(self, other):
    return _compared(self, other, (-1, 0))

  def __ge__(self, other):
    return _compared(self, other, (0, 1))

  __hash__ = None

  def __abs__(self):
    return LC(self.val, self.coef * jnp.where(self.coef[..., :1] < 0, -1, 1), self.order)

  def __getitem__(self, index):
    """A part of the batch."""
    return jax.tree.map(lambda x: x[index], self)

  def __repr__(self) -> str:
    if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in (self.val, self.coef, self.order)):
      return f"LC(shape={getattr(self.coef, 'shape', None)})"
    if isinstance(self.coef, jax.core.Tracer):
      return f"LC(shape={self.shape}, terms={self.terms}, traced)"
    if self.shape:
      return "[" + ", ".join(repr(self[i]) for i in range(self.shape[0])) + "]"
    return text(self)


def text(x: LC, digits: int = 6) -> str:
  """One number as a sum, such as `3 + 2ε - ε² + O(ε⁴)`; coefficients with `digits` significant digits."""
  val, order = int(x.val), int(x.order)
  parts = [(float(c), val + k) for k, c in enumerate(np.asarray(x.coef, np.float64)) if c != 0]
  if any(np.isnan(c) for c, _ in parts):
    return "undefined"
  sums = [_term(abs(c), n, digits) for c, n in parts]
  signs = ["-" if c < 0 else "+" for c, _ in parts]
  if order < EXACT:
    sums, signs = [*sums, f"O({_monomial(order) or '1'})"], [*signs, "+"]
  joined = " ".join(f"{s} {t}" for s, t in zip(signs, sums, strict=True)) or "+ 0"
  return joined[2:] if joined[0] == "+" else "-" + joined[2:]


def _monomial(exponent: int) -> str:
  return {0: "", 1: "ε"}.get(exponent, "ε" + str(exponent).translate(_SUPERSCRIPTS))


def _term(size: float, exponent: int, digits: int) -> str:
  monomial = _monomial(exponent)
  return monomial if size == 1 and monomial else f"{size:.{digits}g}{monomial}"


def real(x, terms: int = TERMS) -> LC:
  """The standard number x, float [...], with room for `terms` terms; exact."""
  return _real(jnp.asarray(x, jnp.result_type(float)), terms)


def eps(terms: int = TERMS) -> LC:
  """ε, the unit infinitesimal."""
  return series(np.eye(1, terms)[0], 1)


def omega(terms: int = TERMS) -> LC:
  """1/ε, an infinite number."""
  return series(np.eye(1, terms)[0], -1)


def series(coef, val=0, order=EXACT) -> LC:
  """ε^val Σ_k coef_k ε^k + O(ε^order) in normal form: leading zeros are shifted out.

  Args:
    coef: float [..., K].
    val, order: int [...] that broadcast against the batch.

  >>> series([0, 0, 3.0], -1)
  3ε
  """
  coef = jnp.asarray(coef, jnp.result_type(float))
  val, order = (jnp.broadcast_to(jnp.asarray(n, jnp.int32), coef.shape[:-1]) for n in (val, order))
  return _normal(val, coef, order)


@functools.partial(jax.jit, static_argnums=1)
def _real(x: jax.Array, terms: int) -> LC:
  val = jnp.where(x == 0, EXACT, 0).astype(jnp.int32)
  undefined = jnp.isnan(x)[..., None]
  coef = jnp.where(undefined, jnp.nan, jnp.where(np.arange(terms) == 0, x[..., None], 0))
  return LC(val, coef, jnp.full(x.shape, EXACT, jnp.int32))


def inverse(x: LC) -> LC:
  """1/x; undefined at 0. Cost: K² products."""
  return power(x, -1.0)


def power(x: LC, p: float) -> LC:
  """x^p for a real p; with u = Σ a_k ε^k the unit part, b = u^p obeys n·a_0·b_n = Σ_{j=1..n} (p·j - n + j) a_j b_{n-j}.

  (Miller's recurrence; Knuth, 1997, The Art of Computer Programming 2, 4.7.) Undefined where no such number is in the
  field: val·p not whole, a negative number with p not whole, 0 with p < 0. Cost: K² products.
  """
  return _power(x, float(p))


def sqrt(x: LC) -> LC:
  """The positive root; x > 0 with an even valuation, or 0."""
  return power(x, 0.5)


def integer_power(x: LC, n: int) -> LC:
  """x^n by repeated squaring; n < 0 through the inverse."""
  if n < 0:
    return inverse(integer_power(x, -n))
  found = real(jnp.ones(x.shape), x.terms)
  while n:
    found = found * x if n % 2 else found
    n, x = n // 2, x * x if n > 1 else x
  return found


@jax.jit
def sign(x: LC) -> jax.Array:
  """-1, 0 or 1, as the leading coefficient; 0 also where no term is known, and 2 for undefined numbers: int32 [...]."""
  lead = x.coef[..., 0]
  return jnp.where(jnp.isnan(lead), 2, jnp.sign(lead).astype(jnp.int32))


def decided(x: LC, y) -> jax.Array:
  """Whether a comparison of x with y is certain: a known term differs, or no term of either is unknown."""
  return _binary(lambda x, y: _certain(_add(x, -y)), x, y)


@jax.jit
def _certain(x: LC) -> jax.Array:
  return (x.coef[..., 0] != 0) | ~x.lost


@jax.jit
def coefficient(x: LC, exponent) -> jax.Array:
  """The coefficient of ε^exponent, an int or int32 [...]; NaN where it is unknown."""
  place = exponent - x.val
  inside = (place >= 0) & (place < x.terms)
  found = jnp.take_along_axis(x.coef, jnp.clip(place, 0, x.terms - 1)[..., None], -1)[..., 0]
  unknown = (exponent >= x.order) | jnp.isnan(x.coef[..., 0])
  return jnp.where(unknown, jnp.nan, jnp.where(inside, found, 0))


@jax.jit
def st(x: LC) -> jax.Array:
  """The standard part: the real number infinitely close to a limited x. NaN for infinite and for undefined x, and where
  the term ε⁰ is unknown. On limited numbers st(x + y) = st(x) + st(y) and st(xy) = st(x)·st(y).

  >>> float(st(3 + 2 * eps())), float(st(omega()))
  (3.0, nan)
  """
  return jnp.where(is_limited(x), coefficient(x, 0), jnp.nan)


@jax.jit
def is_limited(x: LC) -> jax.Array:
  """|x| < n for some natural n, as far as the known terms tell: val >= 0, and order >= 0 at least."""
  return (_lead(x) >= 0) & ~jnp.isnan(x.coef[..., 0])


@jax.jit
def is_infinitesimal(x: LC) -> jax.Array:
  """|x| < 1/n for every natural n; 0 is one."""
  return (_lead(x) > 0) & ~jnp.isnan(x.coef[..., 0])


@jax.jit
def is_infinite(x: LC) -> jax.Array:
  """|x| > n for every natural n."""
  return (x.val < 0) & ~jnp.isnan(x.coef[..., 0])


def infinitely_close(x: LC, y) -> jax.Array:
  """x ≈ y: the difference is infinitesimal."""
  return _binary(lambda x, y: is_infinitesimal(_add(x, -y)), x, y)


@functools.partial(jax.jit, static_argnums=2)
def replaced(x: LC, step, terms: int | None = None) -> jax.Array:
  """Σ_k coef_k step^(val+k) with a real number in place of ε, over the first `terms` terms; step broadcasts."""
  k = jnp.arange(terms or x.terms)
  exponent = jnp.where(x.coef[..., 0] == 0, 0, x.val)[..., None] + k
  return jnp.sum(x.coef[..., : len(k)] * jnp.asarray(step)[..., None] ** exponent, -1)


def _lead(x: LC) -> jax.Array:
  """A lower bound of the true valuation: that of the first known or unknown term."""
  return jnp.minimum(x.val, x.order)


def _binary(f, x: LC, y):
  """f(x, y) after bringing y to the type of x and both to one batch shape; `NotImplemented` for other types."""
  if not isinstance(y, LC):
    if not isinstance(y, numbers.Real | np.ndarray | jax.Array):
      return NotImplemented
    y = real(y, x.terms)
  if x.terms != y.terms:
    raise ValueError(f"terms: numbers with {x.terms} and with {y.terms} terms do not mix")
  shape = jnp.broadcast_shapes(x.shape, y.shape)

  def spread(z: LC) -> LC:
    if z.shape == shape:
      return z
    return LC(*(jnp.broadcast_to(a, shape + a.shape[len(z.shape) :]) for a in (z.val, z.coef, z.order)))

  return f(spread(x), spread(y))


def _compared(x: LC, y, signs: tuple[int, ...]):
  """Whether the sign of x - y is one of `signs`."""
  found = _binary(lambda x, y: sign(_add(x, -y)), x, y)
  return found if found is NotImplemented else functools.reduce(jnp.logical_or, [found == s for s in signs])


def _moved(order: jax.Array, by: jax.Array) -> jax.Array:
  """order + by, where `EXACT` stays itself."""
  return jnp.where(order >= EXACT, EXACT, jnp.minimum(order + by, EXACT))


def _shifted(coef: jax.Array, by: jax.Array) -> jax.Array:
  """Coefficients moved `by` places to higher exponents, [..., K], int32 [...]; what leaves the window is dropped."""
  K = coef.shape[-1]
  place = jnp.arange(K, dtype=jnp.int32) - by[..., None]
  found = jnp.take_along_axis(coef, jnp.clip(place, 0, K - 1), -1)
  return jnp.where((place >= 0) & (place < K), found, 0)


@jax.jit
def _normal(start: jax.Array, coef: jax.Array, order: jax.Array, undefined=False) -> LC:
  """ε^start Σ coef_k ε^k + O(ε^order): unknown terms are cleared, leading zeros shifted out."""
  undefined = undefined | jnp.isnan(coef[..., 0])
  exponent = start[..., None] + jnp.arange(coef.shape[-1], dtype=jnp.int32)
  coef = jnp.where(exponent < order[..., None], coef, 0)
  nonzero = coef != 0
  zeros = jnp.argmax(nonzero, -1).astype(jnp.int32)
  val = jnp.where(undefined, 0, jnp.where(jnp.any(nonzero, -1), start + zeros, EXACT))
  coef = jnp.where(undefined[..., None], jnp.nan, _shifted(coef, -zeros))
  return LC(val, coef, jnp.where(undefined, EXACT, order))


def _undefined(*xs: LC) -> jax.Array:
  return functools.reduce(jnp.logical_or, [jnp.isnan(x.coef[..., 0]) for x in xs])


@jax.jit
def _add(x: LC, y: LC) -> LC:
  K, start = x.terms, jnp.minimum(x.val, y.val)
  order, total = jnp.minimum(x.order, y.order), 0
  for z in (x, y):
    by = jnp.minimum(z.val - start, K)
    dropped = jnp.any((z.coef != 0) & (jnp.arange(K) + by[..., None] >= K), -1)
    order = jnp.where(dropped, jnp.minimum(order, start + K), order)
    total = total + _shifted(z.coef, by)
  return _normal(start, total, order, _undefined(x, y))


@jax.jit
def _multiply(x: LC, y: LC) -> LC:
  K = x.terms
  place = np.arange(2 * K - 1)[:, None] - np.arange(K)
  rows = jnp.where((place >= 0) & (place < K), y.coef[..., np.clip(place, 0, K - 1)], 0)
  product = jnp.sum(x.coef[..., None, :] * rows, -1)
  start = jnp.minimum(x.val + y.val, EXACT)
  order = jnp.minimum(_moved(x.order, _lead(y)), _moved(y.order, _lead(x)))
  dropped = jnp.any(product[..., K:] != 0, -1)
  order = jnp.where(dropped, jnp.minimum(order, start + K), order)
  return _normal(start, product[..., :K], order, _undefined(x, y))


@functools.partial(jax.jit, static_argnums=1)
def _power(x: LC, p: float) -> LC:
  K, zero = x.terms, x.coef[..., 0] == 0
  lead = jnp.where(zero, 1, x.coef[..., 0])
  start = jnp.round(jnp.where(zero, 0, x.val) * p)
  outside = ~zero & (start != jnp.where(zero, 0, x.val) * p)
  outside |= zero & ((p <= 0) | x.lost)
  if not p.is_integer():
    outside |= lead < 0
    lead = jnp.abs(lead)
  found = [lead**p if p != -1 else 1 / lead]
  for n in range(1, K):
    j = np.arange(1, n + 1)
    earlier = jnp.stack(found[::-1], -1)
    found.append(jnp.sum((p * j - n + j) * x.coef[..., 1 : n + 1] * earlier, -1) / (n * lead))
  start = start.astype(jnp.int32)
  order = _moved(x.order, start - jnp.where(zero, 0, x.val))
  order = jnp.where(jnp.any(x.coef[..., 1:] != 0, -1), jnp.minimum(order, start + K), order)
  coef = jnp.where(zero[..., None], 0, jnp.stack(found, -1))
  return _normal(start, coef, order, outside | _undefined(x))
