"""FLOPs accounting. Convention: a matrix product m·n·k costs 2mnk; causal scores are counted at T/2 keys per query."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.extend import core


class Cost(NamedTuple):
  """Forward cost per token. `matmul` and `vector` in FLOPs, `exp` in transcendental calls, `bytes` of state or cache
  read per decoded token."""

  matmul: float = 0.0
  vector: float = 0.0
  exp: float = 0.0
  bytes: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(*(a + b for a, b in zip(self, other, strict=True)))

  def __mul__(self, n: float) -> "Cost":
    return Cost(*(a * n for a in self))

  __rmul__ = __mul__

  @property
  def flops(self) -> float:
    """Matrix and vector FLOPs together; a transcendental call is counted as one."""
    return self.matmul + self.vector + self.exp


def matmul_flops(f: Callable, *args) -> float:
  """FLOPs of all matrix products that `f(*args)` executes, from its traced program; `args` may be abstract.

  A loop body counts as often as it runs, which the compiler's own analysis does not do. Of the branches of a `cond` the
  dearest counts; a `while` without a known number of iterations counts once.
  """
  return _matmul_flops(jax.make_jaxpr(f)(*args).jaxpr)


def _matmul_flops(jaxpr) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [_matmul_flops(j) for j in _sub_jaxprs(eqn.params)]
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif eqn.primitive.name == "cond":
      total += max(inner)
    else:
      total += eqn.params.get("length", 1) * sum(inner) if eqn.primitive.name == "scan" else sum(inner)
  return total


def _sub_jaxprs(params) -> Iterator:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
        yield getattr(item, "jaxpr", item)
