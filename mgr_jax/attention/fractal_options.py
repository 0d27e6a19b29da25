"""Options of `fractal` and everything that can be wrong with them."""

import dataclasses

CHOICES = {
  "mode": ("attend", "memory"),
  "kernel": ("leaf", "prefix"),
  "rule": ("sum", "overwrite"),
  "address": ("soft", "hard"),
  "position": ("alibi", "none", "rope"),
  "beta": ("fixed1", "learned"),
  "impl": ("auto", "reference", "tiled", "chunked", "sorted"),
}
MAX_LEAVES = 65536  # Rows of a table.
MAX_DIGITS = 1024  # Router outputs per token and head.
MIN_OVERLAP = 1e-30  # The smallest path overlap whose logarithm float32 still holds.


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `fractal`.

  Args:
    m: branches of the address tree, at least 2.
    depth: levels of the address tree, at least 1; a table has m^depth leaves.
    mode: `attend` weighs past tokens by the overlap of their paths; `memory` keeps a table of leaves.
    kernel: `leaf` compares whole paths, `prefix` a learned mixture of all prefixes.
    rule: of the memory: `sum` adds values up, `overwrite` replaces what a leaf held.
    address: `soft` distributions over branches, or `hard` choices (one-hot, with the gradient of log p of the choice).
    position: `alibi` lets sums decay with distance, `none` does not; `rope` rotates what is routed, which moves a
      token's address with its position: a negative control.
    floor_eps: soft digits are mixed with this share of the uniform distribution, 1e-4 to 0.2.
    beta: `learned` raises the overlap to a power per head, at least 0.1.
    backoff: hard overwrite reads the deepest prefix that holds a value, instead of the leaf alone.
    balance: weight of the loss that spreads keys over the branches of every level, at least 0.
    impl: `tiled` (sums, dense inside tiles), `chunked` (linear in T: sums and soft overwrite), `sorted` (hard
      overwrite, T log T), `reference` (the obvious form), or `auto`.
  """

  m: int = 4
  depth: int = 4
  mode: str = "attend"
  kernel: str = "leaf"
  rule: str = "sum"
  address: str = "soft"
  position: str = "alibi"
  floor_eps: float = 0.01
  beta: str = "fixed1"
  backoff: bool = False
  balance: float = 0.0
  impl: str = "auto"

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(f"fractal option {name}={getattr(self, name)} is not one of {', '.join(choices)}")
    self._check_range("m", self.m >= 2, "2 or more")
    self._check_range("depth", self.depth >= 1, "1 or more")
    self._check_range("m", self.m * self.depth <= MAX_DIGITS, f"m*depth up to {MAX_DIGITS}, not {self.m * self.depth}")
    self._check_range("floor_eps", 1e-4 <= self.floor_eps <= 0.2, "1e-4 to 0.2")
    self._check_range("balance", 0 <= self.balance < float("inf"), "a number of at least 0, such as 0.01")
    if self.tabulates and self.leaves > MAX_LEAVES:
      raise ValueError(
        f"fractal option depth={self.depth} with m={self.m} makes a table of m^depth = {self.leaves:.3g} leaves, and "
        f"mode={self.mode}, impl={self.impl} allows {MAX_LEAVES}; use a smaller depth"
      )
    self._check_effect()
    self._check_impl()

  def _check_range(self, name, ok, allowed):
    if not ok:
      raise ValueError(f"fractal option {name}={getattr(self, name)} is outside its range; use {allowed}")

  def _check_effect(self):
    """An option that would change nothing is a mistake."""
    soft, overwrite = self.address == "soft", self.rule == "overwrite"
    needs = {
      "rule": (self.mode == "memory", "mode=memory"),
      "floor_eps": (soft, "address=soft"),
      "beta": (self.mode == "attend" and soft, "mode=attend, address=soft"),
      "backoff": (overwrite and not soft and self.kernel == "leaf", "rule=overwrite, address=hard, kernel=leaf"),
    }
    for field in dataclasses.fields(self):
      ok, where = needs.get(field.name, (True, ""))
      if not ok and getattr(self, field.name) != field.default:
        raise ValueError(
          f"fractal option {field.name}={getattr(self, field.name)} has no effect with mode={self.mode}, "
          f"rule={self.rule}, address={self.address}, kernel={self.kernel}; it needs {where}"
        )
    if overwrite and self.position == "none":
      raise ValueError(
        "fractal option position=none has no effect with rule=overwrite, which has no decay to switch off"
      )
    if self.beta == "learned" and self.kernel == "leaf" and (self.floor_eps / self.m) ** self.depth < MIN_OVERLAP:
      raise ValueError(
        f"fractal option depth={self.depth} with beta=learned lets overlaps fall to (floor_eps/m)^depth = "
        f"{(self.floor_eps / self.m) ** self.depth:.0e}, and a power needs at least {MIN_OVERLAP:.0e}; use a smaller "
        "depth, a larger floor_eps, or kernel=prefix"
      )

  def _check_impl(self):
    """A named implementation that cannot serve raises instead of falling back."""
    latest = self.rule == "overwrite" and self.address == "hard"
    serves = {
      "tiled": (self.rule == "sum", "overwriting has no pairwise weights; use chunked (soft) or sorted (hard)"),
      "chunked": (
        self.beta == "fixed1" and not latest,
        "a power of the overlap has no table (use tiled), and hard overwrite needs none (use sorted)",
      ),
      "sorted": (latest, "it finds the latest token of a leaf: use it with rule=overwrite, address=hard"),
    }
    ok, why = serves.get(self.impl, (True, ""))
    if not ok:
      raise ValueError(
        f"fractal option impl={self.impl} cannot serve mode={self.mode}, rule={self.rule}, address={self.address}, "
        f"beta={self.beta}: {why}"
      )

  @property
  def leaves(self) -> int:
    """m^depth."""
    return self.m**self.depth

  @property
  def nodes(self) -> int:
    """Rows of a table: the leaves, or with prefixes all (m^(depth+1) - 1)/(m - 1) nodes of the tree."""
    if self.kernel == "prefix" or self.backoff:
      return (self.m ** (self.depth + 1) - 1) // (self.m - 1)
    return self.leaves

  @property
  def tabulates(self) -> bool:
    """Whether a table of leaves is sure to be built."""
    return self.mode == "memory" or self.impl == "chunked"

  @property
  def decays(self) -> bool:
    """Whether sums forget with distance."""
    return self.position == "alibi" and self.rule == "sum"
