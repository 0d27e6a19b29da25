"""Options of `simplicial` and everything that can be wrong with them."""

import dataclasses

MAX_GLOBAL = 512
"""Longest context for windows without limit: their cost grows as T³."""

CHOICES = {
  "mode": ("trilinear", "linear2", "two_hop", "resolvent"),
  "score": ("complex", "hadamard", "det3"),
  "value_mix": ("gated", "product", "sum"),
  "charges": ("auto", "cycle", "none"),
  "order": ("all", "increasing"),
  "feature": ("softplus", "exp"),
  "decay": ("none", "alibi"),
  "impl": ("auto", "reference", "blocked", "tiled", "chunked", "scan"),
}
IMPLEMENTATIONS = {
  "trilinear": ("auto", "reference", "blocked"),
  "linear2": ("auto", "reference", "chunked", "scan"),
  "two_hop": ("auto", "reference", "tiled"),
  "resolvent": ("auto", "reference", "tiled"),
}
NEEDS = {
  "w1": ("trilinear",),
  "w2": ("trilinear",),
  "score": ("trilinear",),
  "value_mix": ("trilinear", "linear2"),
  "pair": ("trilinear",),
  "charges": ("trilinear",),
  "sink": ("trilinear",),
  "block": ("trilinear",),
  "measure_mi": ("trilinear",),
  "hops": ("two_hop",),
  "order": ("linear2",),
  "feature": ("linear2",),
  "decay": ("linear2",),
}
"""The modes in which an option has an effect."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `simplicial`.

  Args:
    mode: `trilinear` (softmax over pairs of earlier tokens in two windows), `linear2` (all pairs, factorised weights,
      linear time), `two_hop` (mixture of A v, A² v, ...), `resolvent` ((1-ρ) A (I - ρA)⁻¹ v).
    w1, w2: windows of the first and the second token of a pair, 1 <= w2 <= w1; 0 = all, for contexts up to 512.
    score: `complex` Re Σ q k k', `hadamard` Σ q k k', or `det3` Σ det[q, k, k'] (head size divisible by 3).
    value_mix: of a pair's two values: `gated` v∘(1 + v'), `product` v∘v', `sum` v + v'.
    pair: adds the pairwise score <q, k>/√D with rotary positions.
    charges: `cycle` rotates the arguments of the complex score by charges that sum to zero, `none` does not; `auto` is
      `cycle` for the complex score.
    sink: adds one zero logit without value, so that mass may stay unspent.
    hops: powers of A in the mixture, 1 to 4.
    block: queries per tile.
    order: pairs in any order, or `increasing`: the first token strictly before the second.
    feature: positive map of normalised queries and keys, `softplus` or `exp`.
    decay: `alibi` lets both tokens of a pair fade as e^{-m·distance}, with a learned m per key/value head that starts
      at the slope 2^(-8(h+1)/K) of head h of K.
    measure_mi: diagnostics also measure the mutual information of the two tokens of a pair.
    impl: `blocked` (trilinear), `tiled` (two_hop, resolvent), `chunked` or `scan` (linear2), `reference`, or `auto`.
  """

  mode: str = "trilinear"
  w1: int = 128
  w2: int = 16
  score: str = "complex"
  value_mix: str = "gated"
  pair: bool = True
  charges: str = "auto"
  sink: bool = False
  hops: int = 2
  block: int = 16
  order: str = "all"
  feature: str = "softplus"
  decay: str = "none"
  measure_mi: bool = False
  impl: str = "auto"

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(f"simplicial option {name}={getattr(self, name)} is not one of {', '.join(choices)}")
    if self.impl not in IMPLEMENTATIONS[self.mode]:
      raise ValueError(
        f"simplicial option impl={self.impl} cannot serve mode={self.mode}; "
        f"use one of {', '.join(IMPLEMENTATIONS[self.mode])}"
      )
    for field in dataclasses.fields(self):
      modes = NEEDS.get(field.name, (self.mode,))
      if self.mode not in modes and getattr(self, field.name) != field.default:
        raise ValueError(
          f"simplicial option {field.name}={getattr(self, field.name)} has no effect with mode={self.mode}; "
          f"it needs mode={' or '.join(modes)}"
        )
    self._check_range("w1", self.w1 >= 0, "a number of tokens, or 0 for all")
    limit = self.w1 or MAX_GLOBAL
    self._check_range("w2", self.w2 >= 0 and (self.w2 or limit) <= limit, f"1 to w1={self.w1}, or 0 (all) with w1=0")
    if self.w2 == 0 and self.w1:
      raise ValueError(f"simplicial option w2=0 (all) with w1={self.w1}; the second window is at most the first")
    self._check_range("hops", 1 <= self.hops <= 4, "1 to 4")
    self._check_range("block", 1 <= self.block <= 1024, "1 to 1024")
    if self.score != "complex" and self.charges == "cycle":
      raise ValueError(
        f"simplicial option charges=cycle with score={self.score}: no rotation makes that form depend on position "
        "differences alone; use charges=none, or score=complex"
      )

  def _check_range(self, name, ok, allowed):
    if not ok:
      raise ValueError(f"simplicial option {name}={getattr(self, name)} is outside its range; use {allowed}")

  def check_fits(self, cfg) -> None:
    """Raises ValueError when head size or context do not suit the options."""
    if self.score == "det3" and cfg.head_dim % 3:
      raise ValueError(f"simplicial option score=det3 needs a head size divisible by 3, not {cfg.head_dim}")
    for name in ("w1", "w2"):
      if self.mode == "trilinear" and getattr(self, name) == 0 and cfg.seq_len > MAX_GLOBAL:
        raise ValueError(
          f"simplicial option {name}=0 (all tokens) is limited to contexts up to {MAX_GLOBAL}, not {cfg.seq_len}; "
          f"use {name} of 1 or more"
        )

  @property
  def rotates(self) -> bool:
    """Whether the three-way score carries charges."""
    return self.score == "complex" and self.charges != "none"

  def windows(self, length: int) -> tuple[int, int]:
    """w1 and w2 for at most `length` tokens."""
    w1 = min(self.w1 or length, length)
    return w1, min(self.w2 or length, w1)
