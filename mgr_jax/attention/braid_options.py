"""Options of `braid` and everything that can be wrong with them."""

import dataclasses

from mgr_jax.attention.braid_chebyshev import interpolation_error

MODES = ("soft", "discrete", "monodromy", "word")
NORMS = ("sqrt_mass", "mass", "sqrt_count", "none")
SCORES = {
  "soft": ("additive", "bilinear"),
  "discrete": ("additive", "bilinear"),
  "monodromy": ("bilinear", "additive", "rapidity"),
  "word": (),
}
"""Scores of each mode; `auto` is the first."""

MAX_GATE_ERROR = 1e-3  # A named `chebyshev` must be an implementation of σ, not another function.

WORD_LAWS = ("burau", "perm")
NOT_WORD_LAWS = {
  "restricted": "it is no braid representation: s1 s2 s1 - s2 s1 s2 adds (y2, y1 - y3, -y2) to the accumulators",
  "stochastic": "the six-vertex law divided by b + c breaks the braid relation (residual 3e-3 on a random instance)",
  "swap": "it acts on pairs (accumulator, payload) and grows without bound; the word state needs a convex mixture",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `braid`.

  Args:
    mode: `soft` gates σ(logit), `discrete` gates step(logit), `monodromy` (stick-breaking sweep), `word` (letters act
      on strands).
    score: `additive` a_i + b_j, `bilinear` <q_i, k_j>/√D, `rapidity` (monodromy only: position differences), or `auto`:
      bilinear for monodromy, else additive.
    norm: of the gated sum: by √(1 + Σw) (`sqrt_mass`), 1 + Σw (`mass`), √(i+1) (`sqrt_count`), or `none`.
    tau: discrete threshold: key j is selected by i when the logit exceeds tau.
    recency: adds -λ(i - j) with a learned λ >= 0 per head to additive scores.
    impl: `tiled`, `chebyshev` (soft additive, linear time), `sorted` (discrete additive, T log T), `reference` (the
      obvious form), or `auto`.
    cheb_rank: interpolation nodes of `chebyshev`, 8 to 64.
    bound_M: additive scores are squashed into (-M, M).
    bins: quantises discrete additive key scores to this power of two of levels, so that the decode state is O(bins); 0
      keeps them exact.
    strands: of `word`, 2 to 64.
    word_law: `burau` with a learned t per head, or `perm` (t = 1).
    word_gate: `soft` mixes letters, `hard` takes the most likely one (straight-through gradient).
  """

  mode: str = "soft"
  score: str = "auto"
  norm: str = "sqrt_mass"
  tau: float = 0.0
  recency: bool = False
  impl: str = "auto"
  cheb_rank: int = 24
  bound_M: float = 4.0
  bins: int = 0
  strands: int = 8
  word_law: str = "burau"
  word_gate: str = "soft"

  def __post_init__(self):
    self._check_choice("mode", MODES)
    self._check_choice("score", ("auto", *SCORES[self.mode]))
    self._check_choice("norm", NORMS)
    self._check_range("cheb_rank", 8 <= self.cheb_rank <= 64, "8 to 64")
    self._check_range("bound_M", 0 < self.bound_M <= 16, "(0, 16]")
    self._check_range("strands", 2 <= self.strands <= 64, "2 to 64")
    self._check_range("tau", abs(self.tau) < 2 * self.bound_M, f"|tau| < 2*bound_M = {2 * self.bound_M:g}")
    self._check_range("bins", self.bins == 0 or (self.bins > 1 and self.bins & (self.bins - 1) == 0), "0, 2, 4, 8, ...")
    if self.word_law in NOT_WORD_LAWS:
      raise ValueError(
        f"braid option word_law={self.word_law} cannot drive words: {NOT_WORD_LAWS[self.word_law]}; "
        f"use one of {', '.join(WORD_LAWS)}"
      )
    self._check_choice("word_law", WORD_LAWS)
    self._check_choice("word_gate", ("soft", "hard"))
    self._check_choice("impl", ("auto", "reference", "tiled", "chebyshev", "sorted"))
    self._check_impl()
    self._check_effect()

  def _check_choice(self, name, choices):
    if getattr(self, name) not in choices:
      where = f" with mode={self.mode}" if name == "score" else ""
      raise ValueError(f"braid option {name}={getattr(self, name)}{where} is not one of {', '.join(choices)}")

  def _check_range(self, name, ok, allowed):
    if not ok:
      raise ValueError(f"braid option {name}={getattr(self, name)} is outside its range; use {allowed}")

  def _check_impl(self):
    """A named implementation that cannot serve raises instead of falling back."""
    additive, gated = self.scoring == "additive", self.mode in ("soft", "discrete")
    allowed = {
      "tiled": (self.mode != "word", "mode=word has no score tiles; use impl=auto or reference"),
      "chebyshev": (
        self.mode == "soft" and additive and not self.recency,
        "it interpolates bounded additive gates: use it with mode=soft, score=additive, recency=false",
      ),
      "sorted": (
        self.mode == "discrete" and additive,
        "it sorts key scores: use it with mode=discrete, score=additive",
      ),
    }
    ok, why = allowed.get(self.impl, (True, ""))
    error = interpolation_error(self.cheb_rank, self.bound_M)
    if self.impl == "chebyshev" and ok and error > MAX_GATE_ERROR:
      ranks = [r for r in range(8, 65) if interpolation_error(r, self.bound_M) <= MAX_GATE_ERROR]
      raise ValueError(
        f"braid option cheb_rank={self.cheb_rank} with bound_M={self.bound_M:g} leaves gate errors up to {error:.0e}; "
        f"use cheb_rank of at least {ranks[0]}"
      )
    if not ok:
      setting = f"mode={self.mode}" + (f", score={self.scoring}" if gated else "") + f", recency={self.recency}".lower()
      raise ValueError(f"braid option impl={self.impl} cannot serve {setting}: {why}")

  def _check_effect(self):
    """An option that would change nothing is a mistake."""
    gated, additive = self.mode in ("soft", "discrete"), self.scoring == "additive"
    bounded = additive and gated and not self.recency
    effective = {
      "norm": (gated, "mode=soft or mode=discrete"),
      "tau": (self.mode == "discrete", "mode=discrete"),
      "recency": (additive, "score=additive"),
      "cheb_rank": (bounded, "mode=soft or discrete, score=additive, recency=false"),
      "bound_M": (additive, "score=additive"),
      "bins": (
        self.mode == "discrete" and additive and not self.recency,
        "mode=discrete, score=additive, recency=false",
      ),
      "strands": (self.mode == "word", "mode=word"),
      "word_law": (self.mode == "word", "mode=word"),
      "word_gate": (self.mode == "word", "mode=word"),
    }
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for name, (has_effect, where) in effective.items():
      if getattr(self, name) != defaults[name] and not has_effect:
        score = f", score={self.scoring}" if self.scoring else ""
        raise ValueError(
          f"braid option {name}={getattr(self, name)} has no effect with mode={self.mode}{score}; it needs {where}"
        )

  @property
  def scoring(self) -> str:
    """The score that `auto` stands for; empty for `word`."""
    return self.score if self.score != "auto" else (*SCORES[self.mode], "")[0]
