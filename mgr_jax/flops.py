"""FLOPs accounting. Convention: a matrix product m·n·k costs 2mnk; causal scores are counted at T/2 keys per query."""

from typing import NamedTuple


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
