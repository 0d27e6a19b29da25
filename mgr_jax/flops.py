"""FLOPs accounting. Convention: a matrix product m·n·k costs 2mnk; causal scores are counted at T/2 keys per query."""

import math
import re
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


# Dense bfloat16 matrix products of one chip in FLOP/s, from the vendors' data sheets, by how `device_kind` begins; of
# several names that fit the longest counts.
PEAK_BFLOAT16 = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Peak FLOP/s of one device in that compute type; None, never a guess, for what is not in the table.

  >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") / 1e12
  989.0
  >>> peak_flops("cpu", "bfloat16") is None
  True
  """
  names = [name for name in PEAK_BFLOAT16 if re.match(rf"{name}\b", device_kind)]
  return PEAK_BFLOAT16[max(names, key=len)] if names and dtype == "bfloat16" else None


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
