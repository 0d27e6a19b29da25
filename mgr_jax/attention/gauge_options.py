"""Options of `gauge` and everything that can be wrong with them."""

import dataclasses
import math

from mgr_jax.algebra.lie_prefix import check_scan
from mgr_jax.algebra.uniformization import fewest_terms

CHOICES = {
  "b": (2, 3, 4, 6, 8),
  "context": ("token", "edge"),
  "rope": ("outer", "base", "none"),
  "values": ("transport", "plain"),
  "mixer": ("softmax", "poisson"),
  "share": ("kv", "layer"),
  "reorth": ("auto", "off"),
  "impl": ("auto", "reference"),
}
MAX_RATE = 16.0
MAX_TERMS = 64
TAIL = 1e-7  # of the Poisson distribution, for the automatic number of terms


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `gauge`.

  Args:
    b: channels per block: each block of a head is carried by a rotation in SO(b). 2 commutes: the abelian control.
    rank: rank of the map from activations to generators, of which at most n_embd is used; 0 is a full matrix.
    theta_max: bound on the angles of one step in radians, above 0; below π, rotations by π take several tokens.
    context: a generator depends on its `token`, or on the `edge`: the token and the one before it.
    rope: rotary positions `outer` (after the pull-back), `base` (a constant part of every step of the transport, which
      then turns values too), or `none`.
    values: `transport` carries values like keys, `plain` leaves them as they are.
    mixer: `softmax`, or `poisson`: a Poisson number of hops to tokens 0, 1, 2, 4, ... back.
    m_max: poisson: largest mean number of hops, above 0 to 16.
    terms: poisson: hops after which the series ends; 0 takes the fewest with a tail of at most 1e-7 at m_max.
    reach: poisson: the farthest hop is 2^reach; 0 takes the largest power of two below seq_len.
    scan: how running products are taken: `auto`, `assoc`, `serial` or `chunk:c`; all give the same up to rounding.
    reorth: `auto` makes products exactly orthogonal again, `off` lets rounding accumulate.
    share: one transport per key/value head (`kv`) or per layer (`layer`).
    impl: `auto`, or `reference` (serial products of matrices, dense scores).
  """

  b: int = 4
  rank: int = 32
  theta_max: float = 4.0
  context: str = "token"
  rope: str = "outer"
  values: str = "transport"
  mixer: str = "softmax"
  m_max: float = 4.0
  terms: int = 0
  reach: int = 0
  scan: str = "auto"
  reorth: str = "auto"
  share: str = "kv"
  impl: str = "auto"

  def __post_init__(self):
    for name, choices in CHOICES.items():
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(f"gauge option {name}={value} is not one of {', '.join(map(str, choices))}")
    self._check_range("rank", self.rank >= 0, "1 or more, or 0 for a full matrix")
    self._check_range("theta_max", 0 < self.theta_max < math.inf, "a positive number of radians, such as 4")
    self._check_range("m_max", 0 < self.m_max <= MAX_RATE, f"a number above 0, up to {MAX_RATE:g}")
    self._check_range("terms", 0 <= self.terms <= MAX_TERMS, f"1 up to {MAX_TERMS}, or 0 for automatic")
    self._check_range("reach", 0 <= self.reach <= 30, "1 up to 30, or 0 for automatic")
    if self.scan != "auto":
      try:
        check_scan(self.scan)
      except ValueError:
        raise ValueError(
          f"gauge option scan={self.scan} is not one of auto, assoc, serial, chunk:c with c of 2 or more"
        ) from None
    if self.rope == "base" and self.b % 2:
      raise ValueError(f"gauge option rope=base turns pairs of channels of a block, and b={self.b} is odd; use b=4")
    self._check_effect()

  def _check_range(self, name, ok, allowed):
    if not ok:
      raise ValueError(f"gauge option {name}={getattr(self, name)} is outside its range; use {allowed}")

  def _check_effect(self):
    """An option that would change nothing is a mistake."""
    poisson = (self.mixer == "poisson", "mixer=poisson")
    products = (self.b > 2, "b of 3 or more: at b=2 the running product is a sum of angles")
    needs = {"m_max": poisson, "terms": poisson, "reach": poisson, "scan": products, "reorth": products}
    for field in dataclasses.fields(self):
      ok, where = needs.get(field.name, (True, ""))
      if not ok and getattr(self, field.name) != field.default:
        raise ValueError(f"gauge option {field.name}={getattr(self, field.name)} has no effect; it needs {where}")

  def check_sizes(self, cfg) -> None:
    """Raises `ValueError` where the options do not fit the sizes of `cfg`."""
    D = cfg.head_dim
    if D % self.b:
      fitting = ", ".join(str(b) for b in CHOICES["b"] if D % b == 0)
      raise ValueError(f"gauge option b={self.b} does not divide the head size {D}; use b of {fitting}")

  def hops(self, cfg) -> int:
    """Number of dyadic hops 1, 2, 4, ..., 2^reach."""
    return 1 + (self.reach or max(1, cfg.seq_len - 1).bit_length() - 1)

  @property
  def n_terms(self) -> int:
    """Hops after which the Poisson series ends."""
    return self.terms or fewest_terms(self.m_max, TAIL)
