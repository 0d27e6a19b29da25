"""Values of log-exp transseries at enormous arguments, in logarithms: a bridge from formal order to numbers."""

import decimal
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from mgr_jax.algebra.transseries import Series
from mgr_jax.algebra.transseries_growth import Growth

# e^{x^e} at log x = 10^6 has a logarithm of 434,295 digits: beyond float64, within the exponent range of a decimal.
_CONTEXT = decimal.Context(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[decimal.InvalidOperation])


class LogValue(NamedTuple):
  """sign·e^log; the sign 0 stands for the number 0."""

  sign: int
  log: Decimal


def log_eval(f: Series, log_x: int | float) -> LogValue:
  """f at x = e^{log_x}, the tail left out, as a signed log-sum-exp of its terms in 60 digits.

  To compare f and g evaluate f - g: their own logarithms may agree to more digits than are kept.

  Raises:
    ValueError: log_x <= 1, where log log x is not positive.

  >>> from mgr_jax.algebra.transseries_growth import X
  >>> float(log_eval(X * X, 1000).log)
  2000.0
  """
  if log_x <= 1:
    raise ValueError(f"log_x={log_x} is not above 1, so log log x is not positive")
  if not f.terms:
    return LogValue(0, Decimal("-Infinity"))
  first = f.terms[0][0]
  with decimal.localcontext(_CONTEXT):
    # Ratios of monomials are formed exactly: x and 1 times e^{e^1000} would be one number in any fixed precision.
    logs = [_log_monomial(m * first.inverse(), log_x) + _log_rational(abs(k)) for m, k in f.terms]
    top = max(logs)
    total = sum((1 if k > 0 else -1) * (log - top).exp() for log, (_, k) in zip(logs, f.terms, strict=True))
    if total == 0:
      return LogValue(0, Decimal("-Infinity"))
    return LogValue(1 if total > 0 else -1, top + abs(total).ln() + _log_monomial(first, log_x))


def _log_rational(q: Fraction) -> Decimal:
  return Decimal(q.numerator).ln() - Decimal(q.denominator).ln()


def _log_monomial(m: Growth, log_x) -> Decimal:
  """P(x) + a·log x + b·log log x + c·log log log x."""
  level = Decimal(log_x)
  ratio = lambda q: Decimal(q.numerator) / Decimal(q.denominator)
  total = sum((ratio(k) * (ratio(e) * level).exp() for e, k in m.p), Decimal(0))
  total += ratio(m.a) * level + ratio(m.b) * level.ln()
  return total + (ratio(m.c) * level.ln().ln() if m.c else 0)
