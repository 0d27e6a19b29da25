"""Scaling algebra: error models as sums of power laws, which term dominates where, and exact exponents of frontiers.

    E(X) = E∞ + Σ_i A_i Π_j X_j^{p_ij}

with resources X_j such as parameters, tokens, steps or learning rate. E∞ has the growth of a constant and dominates E
itself, so everything here is about E - E∞. Exponents are rational, and so are the results (power laws of this form:
Hoffmann et al., 2022, arXiv 2203.15556).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

Powers = Mapping[str, Fraction]


@dataclasses.dataclass(frozen=True)
class Term:
  """coefficient · Π_j X_j^{powers[j]}, coefficient > 0; an error that falls with X_j has a negative power of it."""

  coefficient: float
  powers: Powers

  def log(self, log_point: Mapping[str, float]) -> float:
    """The logarithm of the term at X_j = e^{log_point[j]}."""
    return math.log(self.coefficient) + sum(float(p) * log_point[name] for name, p in self.powers.items())

  def power(self, name: str) -> Fraction:
    return Fraction(self.powers.get(name, 0))


def term(coefficient: float = 1.0, **powers: int | Fraction) -> Term:
  """A term by the names of its resources: `term(400, N=Fraction(-1, 3))`.

  Raises:
    ValueError: a coefficient that is not positive.
  """
  if not coefficient > 0:
    raise ValueError(f"coefficient={coefficient} is not positive; signs belong into the exponents")
  return Term(coefficient, {name: Fraction(p) for name, p in powers.items() if p})


@dataclasses.dataclass(frozen=True)
class ErrorModel:
  """E∞ + the terms."""

  floor: float
  terms: tuple[Term, ...]

  @property
  def resources(self) -> tuple[str, ...]:
    return tuple(sorted(set().union(*(t.powers for t in self.terms))))

  def excess(self, log_point: Mapping[str, float]) -> float:
    """E - E∞ at X_j = e^{log_point[j]}."""
    return sum(math.exp(t.log(log_point)) for t in self.terms)


def regime(model: ErrorModel, log_point: Mapping[str, float]) -> int:
  """The index of the term that dominates E - E∞ at a point; the first of equal ones."""
  return max(range(len(model.terms)), key=lambda i: model.terms[i].log(log_point))


def balance(first: Term, second: Term, name: str) -> dict[str, Fraction]:
  """The exponents of X_name ≍ Π_j X_j^{result[j]} on the line where both terms have the same order.

  Raises:
    ValueError: both terms have the same power of X_name.
  """
  difference = first.power(name) - second.power(name)
  if not difference:
    raise ValueError(f"both terms have the power {first.power(name)} of {name}: no {name} balances them")
  others = sorted({*first.powers, *second.powers} - {name})
  found = {other: (second.power(other) - first.power(other)) / difference for other in others}
  return {other: e for other, e in found.items() if e}


def substitute(t: Term, name: str, powers: Powers) -> Term:
  """The term with X_name = Π_j X_j^{powers[j]}."""
  rest = {other: p for other, p in t.powers.items() if other != name}
  for other, p in powers.items():
    rest[other] = rest.get(other, Fraction(0)) + t.power(name) * p
  return Term(t.coefficient, {other: p for other, p in rest.items() if p})


class Frontier(NamedTuple):
  """X_j ≍ C^{exponents[j]} and E - E∞ ≍ C^{rate} for the best use of a budget C.

  `shares[i]` is the share of the i-th term's logarithm in that of the optimum: the multipliers that certify it, which
  are positive and add up to 1.
  """

  exponents: dict[str, Fraction]
  rate: Fraction
  shares: tuple[Fraction, ...]


def frontier(model: ErrorModel, cost: Powers) -> Frontier:
  """Minimises E - E∞ in order of magnitude under Π_j X_j^{cost[j]} = C, exactly.

  In exponents this is a linear program: minimise the largest Σ_j p_ij ξ_j under Σ_j cost_j ξ_j = 1. It is solved where
  all terms balance, and accepted with the multipliers λ >= 0, Σ_i λ_i p_ij = rate·cost_j, that prove it optimal.

  Raises:
    ValueError: the number of terms differs from that of the resources, the terms do not determine the point, or their
      balance is not the optimum because a term is better driven to nothing.

  >>> model = ErrorModel(1.69, (term(406.4, N=Fraction(-34, 100)), term(410.7, D=Fraction(-28, 100))))
  >>> print(frontier(model, {"N": Fraction(1), "D": Fraction(1)}).exponents["N"])
  14/31
  """
  names, terms = tuple(sorted({*model.resources, *cost})), model.terms
  if len(terms) != len(names):
    raise ValueError(f"{len(terms)} terms do not determine {len(names)} resources {', '.join(names)}")
  powers = [[t.power(name) for name in names] for t in terms]
  price = [Fraction(cost.get(name, 0)) for name in names]
  *xi, rate = solve(
    [[*row, Fraction(-1)] for row in powers] + [[*price, Fraction(0)]], [Fraction(0)] * len(terms) + [1]
  )
  shares = solve([list(column) for column in zip(*powers, strict=True)], [rate * p for p in price])
  if min(shares) < 0:
    worst = shares.index(min(shares))
    raise ValueError(f"the balance of all terms is not the optimum: term {worst} is better driven to nothing")
  return Frontier(dict(zip(names, xi, strict=True)), rate, tuple(shares))


def solve(matrix: Sequence[Sequence[Fraction]], right: Sequence[Fraction]) -> list[Fraction]:
  """The solution of a square system of linear equations, exactly.

  Raises:
    ValueError: the matrix is singular.
  """
  rows = [[Fraction(x) for x in (*row, b)] for row, b in zip(matrix, right, strict=True)]
  for i in range(len(rows)):
    pivot = next((r for r in range(i, len(rows)) if rows[r][i]), None)
    if pivot is None:
      raise ValueError("the balance equations are singular: the terms do not determine the resources")
    rows[i], rows[pivot] = rows[pivot], rows[i]
    rows[i] = [x / rows[i][i] for x in rows[i]]
    for r in range(len(rows)):
      if r != i and rows[r][i]:
        rows[r] = [x - rows[r][i] * y for x, y in zip(rows[r], rows[i], strict=True)]
  return [row[-1] for row in rows]
