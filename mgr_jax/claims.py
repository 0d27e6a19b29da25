"""Claims: one mathematical statement with its check, tolerance and negative control.

A claim is written once and run by three callers: the demo (with its story), the test suite, and `--certify` at the
start of a training run.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable

import chex
import jax
import numpy as np

from mgr_jax.params import fold_in_name

Check = Callable[[jax.Array, int], float]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement that is measured, never asserted by hand.

  Args:
    name: stable dotted name, `<mechanism>.<law>`.
    statement: one sentence with the formula.
    check: `(key, scale) -> residual`; raises `AssertionError` through chex when the residual exceeds `tolerance`.
      `scale` multiplies the number of sampled cases (1 is the quick size).
    tolerance: the largest residual accepted; dimensionless unless the statement says otherwise.
    negative_control: the same measurement on a deliberately broken object. It must raise `AssertionError`.
    refs: papers.
  """

  name: str
  statement: str
  check: Check
  tolerance: float
  negative_control: Check
  refs: tuple[str, ...] = ()


def claim(
  name: str,
  statement: str,
  measure: Check,
  tolerance: float,
  broken: Check,
  refs: tuple[str, ...] = (),
) -> Claim:
  """Builds a `Claim` from two measurements: of the real object and of a broken one.

  Both go through the same chex assertion, residual <= tolerance; a NaN never passes.
  """

  def asserted(residual_of: Check) -> Check:
    def check(key: jax.Array, scale: int) -> float:
      residual = float(residual_of(key, scale))
      _assert_within(name, residual, tolerance)
      return residual

    return check

  return Claim(name, statement, asserted(measure), tolerance, asserted(broken), refs)


class Exceeded(AssertionError):
  """A measurement beyond its tolerance; `residual` is what was measured."""

  def __init__(self, message: str, residual: float):
    super().__init__(message)
    self.residual = residual


def _assert_within(name: str, residual: float, tolerance: float) -> None:
  if math.isnan(residual):
    raise Exceeded(f"{name}: residual is NaN", residual)
  try:
    chex.assert_scalar_in(residual, -math.inf, tolerance)
  except AssertionError as e:
    raise Exceeded(f"{name}: residual {residual:.3g} exceeds tolerance {tolerance:.3g}", residual) from e


def worst_of(*values) -> float:
  """The largest of the numbers, or of one iterable of them, as `max`; NaN when any is NaN, which `max` may lose.

  >>> max(1.0, float("nan")), worst_of(1.0, float("nan"))
  (1.0, nan)
  """
  values = values[0] if len(values) == 1 and np.iterable(values[0]) else values
  return float(np.max([float(v) for v in values]))


def largest_difference(a, b) -> float:
  """Largest absolute difference of two equally shaped trees; NaN where either is NaN."""
  differences = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))), a, b)
  return worst_of(jax.tree.leaves(differences))


def relative_difference(a, b) -> float:
  """`largest_difference` divided by the largest size in `b`, leaf by leaf; the worst leaf counts."""
  ratio = lambda x, y: largest_difference(x, y) / max(float(np.max(np.abs(np.asarray(y, np.float64)))), 1e-6)
  return worst_of(jax.tree.leaves(jax.tree.map(ratio, a, b)))


@dataclasses.dataclass(frozen=True)
class ClaimResult:
  """Outcome of one claim. `holds` needs both: the law passed and its broken twin was caught.

  `control_residual` is what was measured on the broken twin.
  """

  name: str
  statement: str
  residual: float | None
  tolerance: float
  passed: bool
  control_caught: bool
  seconds: float
  message: str = ""
  control_residual: float | None = None

  @property
  def holds(self) -> bool:
    return self.passed and self.control_caught

  @property
  def verdict(self) -> str:
    """`holds`, `violated`, or `vacuous`: the law passed, and so did its broken twin, so the check proves nothing."""
    if self.holds:
      return "holds"
    return "vacuous" if self.passed else "violated"


def run_claims(claims: Iterable[Claim], key: jax.Array, scale: int = 1) -> list[ClaimResult]:
  """Runs every claim and its negative control; each gets a key folded from its own name.

  Matrix products are computed at full precision, also where an accelerator's default is lower.

  Returns one `ClaimResult` per claim, in order. A failed claim is a result, not an exception; any exception other than
  `AssertionError` is a defect of the check itself and propagates.
  """
  with jax.default_matmul_precision("highest"):
    return [_run(c, fold_in_name(key, c.name), scale) for c in claims]


def _run(c: Claim, key: jax.Array, scale: int) -> ClaimResult:
  start = time.perf_counter()
  residual, control_residual, passed, message = None, None, True, ""
  try:
    residual = float(c.check(key, scale))
  except AssertionError as e:
    residual, passed, message = getattr(e, "residual", None), False, str(e)
  try:
    control_residual = c.negative_control(key, scale)
    caught = False
    message = "; ".join(filter(None, [message, f"{c.name}: the negative control passed the check"]))
  except AssertionError as e:
    control_residual, caught = getattr(e, "residual", None), True
  seconds = time.perf_counter() - start
  return ClaimResult(c.name, c.statement, residual, c.tolerance, passed, caught, seconds, message, control_residual)


def claims_table(results: Iterable[ClaimResult]) -> str:
  """Aligned text: what was measured, on the law and on its broken twin.

  >>> law = claim("sum.commutes", "a + b = b + a", lambda k, n: 0.0, 1e-6, lambda k, n: 1.0)
  >>> print(claims_table(run_claims([law], jax.random.key(0))))
  claim         measured  tolerance  broken twin  verdict
  sum.commutes         0    1.0e-06            1  holds
  """
  rows = [(r.name, *map(number_text, (r.residual, r.tolerance, r.control_residual)), r.verdict) for r in results]
  rows.insert(0, ("claim", "measured", "tolerance", "broken twin", "verdict"))
  width = [max(len(row[i]) for row in rows) for i in range(4)]
  line = lambda row: "  ".join(f"{cell:{'<' if i == 0 else '>'}{width[i]}}" for i, cell in enumerate(row[:4]))
  return "\n".join(f"{line(row)}  {row[4]}" for row in rows)


def number_text(x: float | None) -> str:
  """Three digits, `-` for what was not measured."""
  if x is None:
    return "-"
  return "0" if x == 0 else f"{x:.3g}" if 1e-3 <= abs(x) < 1e5 else f"{x:.1e}"
