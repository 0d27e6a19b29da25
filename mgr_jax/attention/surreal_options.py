"""Options of `surreal` and everything that can be wrong with them."""

import dataclasses
import math

CHOICES = {
  "qk": ("direction", "full"),
  "values": ("plain", "float"),
  "granularity": ("column", "matrix"),
  "impl": ("auto", "reference"),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `surreal`.

  Args:
    qk: `direction`: query and key weights have no size, which QK-norm would cancel, and each head learns a temperature
      instead; `full`: every column has a size, as in `standard`.
    values: `plain`, or `float`: a direction of unit mean square and a log-magnitude in [-20, 20] per token and head.
    granularity: one size per output `column`, or one per head's `matrix` (one in all for the output projection).
    s_max: log-sizes stay in (-s_max, s_max); at least 1 + ½·log(n_head/n_kv_head), at most 20.
    renorm: the optimizer keeps directions at their initial norm; without it they drift outwards and learn ever slower.
    impl: `auto` (scales after the product, attention in tiles) or `reference` (explicit weights, dense scores).

  >>> Options().scaled, Options(qk="full").scaled
  (('wv',), ('wq', 'wk', 'wv'))
  """

  qk: str = "direction"
  values: str = "plain"
  granularity: str = "column"
  s_max: float = 8.0
  renorm: bool = True
  impl: str = "auto"

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(f"surreal option {name}={getattr(self, name)} is not one of {', '.join(choices)}")
    if not 0 < self.s_max <= 20:
      raise ValueError(f"surreal option s_max={self.s_max} is outside (0, 20]: e^s leaves the range safe in bfloat16")
    if self.qk == "full" and self.granularity == "matrix":
      raise ValueError(
        "surreal option qk=full has no effect with granularity=matrix: QK-norm cancels one size per head; use "
        "qk=direction, or granularity=column"
      )
    if self.s_max != 8.0 and not self.scaled:
      raise ValueError(
        f"surreal option s_max={self.s_max} has no effect with qk=direction, values=float: no weight has a log-size; "
        "leave it out"
      )

  @property
  def scaled(self) -> tuple[str, ...]:
    """The projections that carry log-sizes; what is normalised per head needs none."""
    return (("wq", "wk") if self.qk == "full" else ()) + (("wv",) if self.values == "plain" else ())

  def check_heads(self, cfg) -> None:
    """Raises `ValueError` when log-sizes of the initial weights, about -½·log(n_head/n_kv_head), may not fit."""
    least = 1 + 0.5 * math.log(cfg.n_head / cfg.n_kv_head)
    if self.scaled and self.s_max < least:
      raise ValueError(
        f"surreal option s_max={self.s_max} does not hold the initial sizes with n_head={cfg.n_head}, "
        f"n_kv_head={cfg.n_kv_head}; use {least:.3g} to 20"
      )
