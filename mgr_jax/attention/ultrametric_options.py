"""Options of `ultrametric` and everything that can be wrong with them."""

import dataclasses
import math

from mgr_jax import homotopy

CACHE_FROM_NODES = 65_536  # `decode=auto`: larger trees are mostly empty, and a cache of the tokens is smaller.
MAX_NODES = 2**22
MAX_LOG2_MASS = 100  # α^K·T stays below 2^100, inside float32 with room for values and gradients.


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `ultrametric`.

  Args:
    p: branching of the digit tree, 2 to 64.
    K: its depth, digits per query or key, 1 to 32.
    digits: `soft` digits are softmax probabilities; `st` takes their most likely class, with a straight-through
      gradient; `hard` does the same without any gradient, so routing stays as it was initialised.
    theta: temperature of the softmax, a number or a schedule such as exp:1.0:0.2.
    alpha_init: mean initial α of the kernel α^lcp, above 1; 0 stands for p^1.5. Heads differ: α - 1 is spread by
      factors from 1/2 to 2.
    alpha_learn: learn one α per query head.
    level_weights: `geometric` c_d = α^d - α^(d-1), or `free`, one learned positive c_d per level and query head.
    decay: recency λ^(t-s): `alibi` (every second key/value head has λ < 1, fixed), `none`, or `learned` for all heads.
    digits_k: use only the first `digits_k` digits, which is the kernel α^min(lcp, digits_k); 0 uses all.
    balance: weight of the KL divergence from uniform to the mean use of the classes, averaged over levels and heads.
    tie_digits: queries use the digit table of their key/value head.
    digit_rope: rotate queries and keys by position before they get digits.
    impl: `features` (linear attention over the p^K leaves), `sort` (hard digits, trees of any size), `reference` (all
      pairs), or `auto`.
    chunk: tokens per chunk, 8 to 1024.
    f_max: the largest tree, in nodes, that `features` may use.
    ste: gradient of `st` digits: `exact` derivative of the expected kernel, or `local`, which ignores that deeper
      digits must agree too (`sort` has only this one).
    decode: state of the decoder: `table` of all tree nodes, `cache` of all tokens, or `auto`.
    freeze_levels: the tables of this many leading digits are not trained.
  """

  p: int = 4
  K: int = 3
  digits: str = "st"
  theta: str = "exp:1.0:0.2"
  alpha_init: float = 0.0
  alpha_learn: bool = True
  level_weights: str = "geometric"
  decay: str = "alibi"
  digits_k: int = 0
  balance: float = 1e-3
  tie_digits: bool = False
  digit_rope: bool = False
  impl: str = "auto"
  chunk: int = 64
  f_max: int = 1024
  ste: str = "exact"
  decode: str = "auto"
  freeze_levels: int = 0

  def __post_init__(self):
    self._check_range("p", 2 <= self.p <= 64, "2 to 64")
    self._check_range("K", 1 <= self.K <= 32, "1 to 32")
    self._check_choice("digits", ("soft", "st", "hard"))
    try:
      homotopy.parse(self.theta)
    except ValueError as e:
      raise ValueError(f"ultrametric option theta={self.theta}: {e}; use a number above 0 or exp:1.0:0.2") from None
    finite = math.isfinite(self.alpha_init)
    self._check_range("alpha_init", self.alpha_init == 0 or (finite and self.alpha_init > 1), "above 1, or 0 for p^1.5")
    self._check_choice("level_weights", ("geometric", "free"))
    self._check_choice("decay", ("alibi", "none", "learned"))
    self._check_range("digits_k", 0 <= self.digits_k <= self.K, f"0 to K = {self.K}")
    self._check_range("balance", math.isfinite(self.balance) and self.balance >= 0, "0 or more")
    self._check_choice("impl", ("auto", "features", "sort", "reference"))
    self._check_range("chunk", 8 <= self.chunk <= 1024, "8 to 1024")
    self._check_range("f_max", 3 <= self.f_max <= MAX_NODES, f"3 to {MAX_NODES}")
    self._check_choice("ste", ("exact", "local"))
    self._check_choice("decode", ("auto", "table", "cache"))
    self._check_range("freeze_levels", 0 <= self.freeze_levels <= self.K, f"0 to K = {self.K}")
    self._check_effect()
    self._check_impl()

  def _check_choice(self, name, choices):
    if getattr(self, name) not in choices:
      raise ValueError(f"ultrametric option {name}={getattr(self, name)} is not one of {', '.join(choices)}")

  def _check_range(self, name, ok, allowed):
    if not ok:
      raise ValueError(f"ultrametric option {name}={getattr(self, name)} is outside its range; use {allowed}")

  def _check_impl(self):
    """A named implementation that cannot serve raises instead of falling back."""
    if self.implementation == "features":
      if self.nodes > self.f_max:
        raise ValueError(
          f"ultrametric option impl={self.impl}: a tree with p={self.p} and {self.depth} digits has {self.nodes} "
          f"nodes, more than f_max={self.f_max}; {self._sort_advice()}"
        )
      if self.ste == "local":
        raise ValueError("ultrametric option ste=local is not served by impl=features; use impl=sort or ste=exact")
    if self.implementation == "sort":
      if self.digits == "soft":
        raise ValueError(
          "ultrametric option digits=soft cannot be served by impl=sort; use digits=st, or impl=features"
        )
      if self.digits == "st" and self.ste == "exact":
        raise ValueError("ultrametric option ste=exact needs impl=features; with impl=sort use ste=local")
    if self.decode == "table" and self.nodes > MAX_NODES:
      raise ValueError(
        f"ultrametric option decode=table: {self.nodes} tree nodes exceed {MAX_NODES}; use decode=cache or fewer digits"
      )

  def _sort_advice(self):
    how = "ste=local (impl=sort)" if self.digits == "st" else "digits=st with ste=local (impl=sort)"
    return f"use {how if self.digits != 'hard' else 'impl=sort'}, fewer digits, or a larger f_max"

  def _check_effect(self):
    """An option that would change nothing is a mistake."""
    routed = self.digits != "hard"
    effective = {
      "theta": (routed, "digits=st or soft"),
      "balance": (routed, "digits=st or soft"),
      "freeze_levels": (routed, "digits=st or soft"),
      "ste": (self.digits == "st", "digits=st"),
      "alpha_learn": (self.level_weights == "geometric", "level_weights=geometric"),
      "f_max": (self.impl != "sort", "impl=auto or features"),
    }
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for name, (has_effect, where) in effective.items():
      if getattr(self, name) != defaults[name] and not has_effect:
        raise ValueError(f"ultrametric option {name}={getattr(self, name)} has no effect here; it needs {where}")

  @property
  def depth(self) -> int:
    """Digits in use."""
    return self.digits_k or self.K

  @property
  def nodes(self) -> int:
    """Nodes of the tree, Σ_{d <= depth} p^d."""
    return (self.p ** (self.depth + 1) - 1) // (self.p - 1)

  @property
  def leaves(self) -> int:
    return self.p**self.depth

  @property
  def alpha_mean(self) -> float:
    return self.alpha_init or self.p**1.5

  @property
  def implementation(self) -> str:
    """The implementation that `auto` stands for: `features` where the tree is small enough, else `sort`."""
    if self.impl != "auto":
      return self.impl
    if self.digits == "st" and self.ste == "local":
      return "sort"
    return "sort" if self.nodes > self.f_max and self.digits == "hard" else "features"

  @property
  def decoder(self) -> str:
    """The decode state that `auto` stands for."""
    if self.decode != "auto":
      return self.decode
    return "cache" if self.nodes > CACHE_FROM_NODES else "table"
