"""Ordinals below ε₀ in Cantor normal form: exact order, sums, products, powers, differences and quotients.

α = ω^{a_1}·c_1 + ... + ω^{a_k}·c_k with a_1 > ... > a_k ordinals themselves and integers c_i >= 1; 0 is the empty sum.
(Cantor, 1897; Sierpiński, 1958, Cardinal and Ordinal Numbers, ch. XIV.)

No descent α > β > γ > ... goes on for ever. Exponents are of smaller height, so by induction they are well-ordered;
take an infinite descent with the least leading exponent. Its leading terms (exponent, coefficient) never increase, so
they are constant from some point on. Without them the rest still descends, with a smaller leading exponent: a
contradiction.
"""

import dataclasses
import functools

from mgr_jax.algebra import ordinal_text


def _with_ordinal(operation):
  """Lets the right operand be a Python integer."""

  @functools.wraps(operation)
  def method(self, other):
    return operation(self, Ord.of(other)) if isinstance(other, Ord) or _is_int(other) else NotImplemented

  return method


def _is_int(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


@functools.total_ordering
@dataclasses.dataclass(frozen=True, eq=False, repr=False, slots=True)
class Ord:
  """An ordinal below ε₀. Natural numbers may be operands: `1 + OMEGA == OMEGA`.

  `+ * **` are Cantor's: continuous and strictly increasing in the right operand, not commutative. `alpha - beta` is the
  γ with β + γ = α; `divmod(alpha, beta)` is the (q, r) with α = β·q + r and r < β.

  Args:
    terms: pairs (exponent, coefficient), exponents strictly decreasing, coefficients Python integers >= 1.

  Raises:
    ValueError: terms that are no Cantor normal form.

  >>> OMEGA + 1 > 1 + OMEGA
  True
  >>> (OMEGA + 1) * 2, 2 * (OMEGA + 1)
  (Ord.parse('w*2 + 1'), Ord.parse('w + 2'))
  """

  terms: tuple[tuple["Ord", int], ...] = ()

  def __post_init__(self):
    if not isinstance(self.terms, tuple):
      raise ValueError(f"terms={self.terms!r} is no tuple of pairs (exponent, coefficient); Ord.of takes integers")
    for term in self.terms:
      if not isinstance(term, tuple) or len(term) != 2:
        raise ValueError(f"terms: {term!r} is no pair (exponent, coefficient)")
      if not _is_int(term[1]) or term[1] < 1:
        raise ValueError(f"terms: coefficient {term[1]!r} is no integer >= 1")
    if not all(isinstance(exponent, Ord) for exponent, _ in self.terms):
      object.__setattr__(self, "terms", tuple((Ord.of(exponent), c) for exponent, c in self.terms))
    for (first, _), (second, _) in zip(self.terms, self.terms[1:], strict=False):
      if not second < first:
        raise ValueError(f"terms: exponents must strictly decrease, {first} stands before {second}")

  @classmethod
  def of(cls, value: "Ord | int") -> "Ord":
    """`value` as an ordinal.

    Raises:
      ValueError: neither an ordinal nor an integer >= 0.
    """
    if isinstance(value, Ord):
      return value
    if not _is_int(value) or value < 0:
      raise ValueError(f"{value!r} is no ordinal; an integer >= 0 is one, and `Ord.parse` reads text")
    return cls(((ZERO, value),)) if value else ZERO

  @classmethod
  def parse(cls, text: str) -> "Ord":
    """The value of an expression such as `w^2*3 + w*5 + 7`, by the arithmetic of ordinals: `1 + w` is ω.

    Raises:
      ValueError: see `ordinal_text.evaluate`.

    >>> Ord.parse("w^w + w*2 + 3").degree
    Ord.parse('w')
    """
    return ordinal_text.evaluate(text, cls.of, OMEGA)

  @property
  def is_zero(self) -> bool:
    return not self.terms

  @property
  def is_finite(self) -> bool:
    """A natural number; `int(alpha)` gives it."""
    return not self.terms or self.terms[0][0].is_zero

  @property
  def is_successor(self) -> bool:
    """β + 1 for some β."""
    return bool(self.terms) and self.terms[-1][0].is_zero

  @property
  def is_limit(self) -> bool:
    """Neither 0 nor a successor."""
    return bool(self.terms) and not self.terms[-1][0].is_zero

  @property
  def is_additively_indecomposable(self) -> bool:
    """ω^a, which is no sum of two smaller ordinals."""
    return len(self.terms) == 1 and self.terms[0][1] == 1

  @property
  def degree(self) -> "Ord":
    """The leading exponent. Raises `ValueError` for 0, which has none."""
    if self.is_zero:
      raise ValueError("0 has no leading exponent")
    return self.terms[0][0]

  @property
  def finite_part(self) -> int:
    """The n of α = λ + n, n finite, λ zero or a limit."""
    return self.terms[-1][1] if self.is_successor else 0

  @property
  def limit_part(self) -> "Ord":
    """The λ of α = λ + n."""
    return Ord(self.terms[:-1]) if self.is_successor else self

  def __int__(self) -> int:
    if not self.is_finite:
      raise ValueError(f"{self} is infinite")
    return self.finite_part

  def __eq__(self, other) -> bool:
    if _is_int(other):
      return self.is_finite and self.finite_part == other
    return self.terms == other.terms if isinstance(other, Ord) else NotImplemented

  def __hash__(self) -> int:
    return hash(self.finite_part if self.is_finite else self.terms)

  @_with_ordinal
  def __lt__(self, other: "Ord") -> bool:
    # The first difference of two tuples decides, and a prefix is smaller: just so with normal forms.
    return self.terms < other.terms

  @_with_ordinal
  def __add__(self, other: "Ord") -> "Ord":
    """Drops from α every term below the leading one of β, which absorbs them; an equal exponent is merged."""
    if other.is_zero:
      return self
    lead, coefficient = other.terms[0]
    kept = [term for term in self.terms if lead <= term[0]]
    if kept and kept[-1][0] == lead:
      coefficient += kept.pop()[1]
    return Ord((*kept, (lead, coefficient), *other.terms[1:]))

  @_with_ordinal
  def __mul__(self, other: "Ord") -> "Ord":
    """Σ over the terms ω^b·d of β: ω^{a_1+b}·d for b > 0; for b = 0, α with its leading coefficient times d."""
    if self.is_zero or other.is_zero:
      return ZERO
    (lead, coefficient), *rest = self.terms
    terms = [(lead + b, d) for b, d in other.limit_part.terms]
    if other.is_successor:
      terms += [(lead, coefficient * other.finite_part), *rest]
    return Ord(tuple(terms))

  @_with_ordinal
  def __pow__(self, other: "Ord") -> "Ord":
    """With β = λ + k: α^k by k products; α^λ = ω^{a_1·λ} for infinite α.

    For finite n >= 2, n^{ω^e·c} = ω^{ω^{e-1}·c} with e - 1 the left difference, which is e when e is infinite.
    """
    limit, k = other.limit_part, other.finite_part
    if limit.is_zero:
      return _power(self, k)
    if self.is_zero or self == 1:
      return self
    if self.is_finite:
      return omega(Ord(tuple((e - 1, c) for e, c in limit.terms))) * int(self) ** k
    return omega(self.degree * limit) * _power(self, k)

  @_with_ordinal
  def __sub__(self, other: "Ord") -> "Ord":
    """The unique γ with β + γ = α. Raises `ValueError` where β > α."""
    for i, (mine, yours) in enumerate(zip(self.terms, other.terms, strict=False)):
      if mine == yours:
        continue
      if mine < yours:
        break
      same = mine[0] == yours[0]
      return Ord(((mine[0], mine[1] - same * yours[1]), *self.terms[i + 1 :]))
    else:
      if len(other.terms) <= len(self.terms):
        return Ord(self.terms[len(other.terms) :])
    raise ValueError(f"no ordinal added to {other} gives {self}, which is smaller")

  @_with_ordinal
  def __divmod__(self, other: "Ord") -> tuple["Ord", "Ord"]:
    """The unique (q, r) with α = β·q + r and r < β. Raises `ZeroDivisionError` for β = 0."""
    if other.is_zero:
      raise ZeroDivisionError(f"{self} divided by 0")
    lead, d = other.terms[0]
    above = tuple((e - lead, c) for e, c in self.terms if lead < e)
    rest = Ord(self.terms[len(above) :])
    n = rest.terms[0][1] // d if rest.terms and rest.terms[0][0] == lead else 0
    if n and rest < other * n:
      n -= 1
    return Ord(above) + n, rest - other * n

  def __floordiv__(self, other) -> "Ord":
    return divmod(self, Ord.of(other))[0]

  def __mod__(self, other) -> "Ord":
    return divmod(self, Ord.of(other))[1]

  def __radd__(self, other) -> "Ord":
    return Ord.of(other) + self

  def __rmul__(self, other) -> "Ord":
    return Ord.of(other) * self

  def __rpow__(self, other) -> "Ord":
    return Ord.of(other) ** self

  def __rsub__(self, other) -> "Ord":
    return Ord.of(other) - self

  def __rdivmod__(self, other) -> tuple["Ord", "Ord"]:
    return divmod(Ord.of(other), self)

  def __str__(self) -> str:
    return " + ".join(_term_text(exponent, c) for exponent, c in self.terms) or "0"

  def __repr__(self) -> str:
    return f"Ord.parse({str(self)!r})"


def _power(alpha: Ord, k: int) -> Ord:
  """α^k by repeated squaring; O(log k) products."""
  result, square = ONE, alpha
  while k:
    if k & 1:
      result = result * square
    k >>= 1
    square = square * square if k else square
  return result


def _term_text(exponent: Ord, coefficient: int) -> str:
  if exponent.is_zero:
    return str(coefficient)
  text = str(exponent)
  power = {"1": "w"}.get(text, f"w^{text}" if exponent.is_finite or exponent == OMEGA else f"w^({text})")
  return power if coefficient == 1 else f"{power}*{coefficient}"


def omega(exponent: Ord | int = 1) -> Ord:
  """ω^exponent."""
  return Ord(((Ord.of(exponent), 1),))


ZERO = Ord()
ONE = Ord.of(1)
OMEGA = omega()


def natural_sum(alpha: Ord | int, beta: Ord | int) -> Ord:
  """α ⊕ β: all terms, coefficients of equal exponents added. Commutative, strictly increasing (Hessenberg, 1906).

  >>> natural_sum(1, OMEGA) == natural_sum(OMEGA, 1)
  True
  """
  coefficients: dict[Ord, int] = {}
  for exponent, c in (*Ord.of(alpha).terms, *Ord.of(beta).terms):
    coefficients[exponent] = coefficients.get(exponent, 0) + c
  return Ord(tuple(sorted(coefficients.items(), reverse=True)))


def natural_product(alpha: Ord | int, beta: Ord | int) -> Ord:
  """α ⊗ β: the bilinear extension of ω^a ⊗ ω^b = ω^{a ⊕ b}.

  >>> natural_product(2, OMEGA), 2 * OMEGA
  (Ord.parse('w*2'), Ord.parse('w'))
  """
  products = (Ord(((natural_sum(a, b), c * d),)) for a, c in Ord.of(alpha).terms for b, d in Ord.of(beta).terms)
  return functools.reduce(natural_sum, products, ZERO)
