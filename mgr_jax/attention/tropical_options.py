"""Options of `tropical` and everything that can be wrong with them."""

import dataclasses
import math

from mgr_jax import homotopy

CHOICES = {
  "score": ("maxplus", "hilbert", "dot"),
  "qk_norm": ("rms", "none"),
  "decay": ("alibi", "learned", "none"),
  "out_norm": ("rms", "center_max", "none"),
  "final": ("hold", "snap"),
  "agg": ("maxplus", "route"),
  "impl": ("auto", "scan", "tiled", "pallas", "matrix", "streaming", "reference"),
}

TAU = 4.0
"""Initial scale of queries and keys: how much larger score gaps are than value gaps."""

EXPONENT_RANGE = 80.0
"""Largest exponent whose exp and reciprocal are normal float32 numbers, with room for sums."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `tropical`.

  Args:
    score: `maxplus` max_r(q_r + k_r), `hilbert` minus Hilbert's projective distance, `dot` <q, k>/√D.
    score_groups: splits the coordinates of a max-plus score into this many groups whose maxima are added; divides D.
      With S groups up to (D/S)^S keys can win instead of D.
    center_score: subtract the largest score max_s a_ts, so that a constant added to a query changes nothing.
    center_q, center_k, center_v: subtract the largest coordinate of each query, key or value.
    qk_norm: `rms` normalises queries and keys per head, or `none`.
    rope: rotary position embedding; max_r(q_r + k_r) is not relative under it, so the decay is the better position.
    decay: recency penalty λ(t-s): `alibi` (fixed slopes, every other key/value head without), `learned`, or `none`.
    out_norm: of each head's output: `rms`, `center_max` (subtract its largest coordinate), or `none`.
    beta: `none` takes maxima; a number smooths them, max -> log Σ exp(β·)/β; a schedule such as exp:1:64 anneals.
    final: what a finite beta does in the last 5% of training: `hold` its value, or `snap` to maxima.
    agg: `maxplus` adds score and value, `route` copies the value of the key with the largest score.
    impl: `scan` (hard, linear time), `tiled` (hard, any score), `pallas` (kernels of either for GPU and TPU, never
      picked by `auto`), `matrix` (finite beta on the matrix unit), `streaming` (finite beta, any range), `reference`
      (dense), or `auto`.
    chunk: tokens per chunk of `scan`, `matrix` and the scan of `pallas`; 0 picks. Divides rebase.
    rebase: the decay's local index runs over this many tokens.
    margins: emit the share of outputs whose winner is certified (`coverage`) on every call, from two rows.
    deterministic: the gradient of `scan`, kernels or not, adds up in a fixed order on every backend.
  """

  score: str = "maxplus"
  score_groups: int = 1
  center_score: bool = True
  center_q: bool = False
  center_k: bool = False
  center_v: bool = False
  qk_norm: str = "rms"
  rope: bool = False
  decay: str = "alibi"
  out_norm: str = "rms"
  beta: str = "none"
  final: str = "hold"
  agg: str = "maxplus"
  impl: str = "auto"
  chunk: int = 0
  rebase: int = 256
  margins: bool = False
  deterministic: bool = False

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise self._error(name, f"is not one of {', '.join(choices)}")
    if self.score_groups < 1:
      raise self._error("score_groups", "is outside its range; use 1 or a divisor of the head size")
    if self.rebase < 1:
      raise self._error("rebase", "is outside its range; use 1 or more tokens")
    if self.chunk < 0:
      raise self._error("chunk", "is outside its range; use 0 (automatic) or a divisor of rebase")
    if self.chunk and self.rebase % self.chunk:
      raise self._error("chunk", f"does not divide rebase={self.rebase}")
    self._check_beta()
    self._check_impl()
    self._check_effect()

  def _error(self, name, what):
    return ValueError(f"tropical option {name}={getattr(self, name)} {what}")

  def _check_beta(self):
    if self.beta == "none":
      return
    try:
      course = homotopy.parse(self.beta)
    except ValueError as e:
      raise self._error("beta", f"is not none, a number > 0, or a schedule: {e}") from None
    if course.kind == "coverage" and not self.margins:
      raise self._error("beta", "reads the coverage of the margins; add margins=true")
    if not self.factors:
      raise self._error("beta", "needs score=maxplus, score_groups=1, agg=maxplus")

  def _check_impl(self):
    """A named implementation that cannot serve raises instead of falling back."""
    hard = self.beta == "none"
    linear = hard and self.factors, "score=maxplus, score_groups=1, agg=maxplus, beta=none"
    serves = {
      "scan": linear,
      "pallas": (hard, "beta=none; impl=matrix and impl=streaming serve a finite beta"),
      "tiled": (hard, "beta=none"),
      "matrix": (not hard and self.qk_norm == "rms", "a finite beta and qk_norm=rms"),
      "streaming": (not hard, "a finite beta"),
    }
    ok, needs = serves.get(self.impl, (True, ""))
    if not ok:
      raise self._error("impl", f"cannot serve these options: it needs {needs}")

  def _check_effect(self):
    """An option that would change nothing is a mistake."""
    shift_free = self.score == "hilbert" or (self.score == "maxplus" and (self.center_score or self.agg == "route"))
    stateful = self.factors and self.decay != "none"
    # `reference` stands in for any implementation, with the options of that one.
    chunked = self.factors and self.impl in ("auto", "scan", "pallas", "matrix", "reference")
    scanned = self.factors and self.beta == "none" and self.impl in ("auto", "scan", "pallas", "reference")
    effective = {
      "score_groups": (self.score == "maxplus", "score=maxplus"),
      "center_score": (self.agg == "maxplus", "agg=maxplus"),
      "center_q": (
        not shift_free,
        "a score that a constant added to a query changes: center_score=false, or score=dot",
      ),
      "center_k": (self.score != "hilbert", "score=maxplus or dot"),
      "final": (self.beta != "none", "a finite or scheduled beta"),
      "chunk": (chunked, "impl=scan, pallas, matrix or auto with a score that factors"),
      "rebase": (stateful, "score=maxplus, score_groups=1, agg=maxplus and a decay"),
      "margins": (self.factors, "score=maxplus, score_groups=1, agg=maxplus"),
      "deterministic": (scanned, "impl=scan, pallas or auto with a score that factors"),
    }
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for name, (has_effect, where) in effective.items():
      if getattr(self, name) != defaults[name] and not has_effect:
        raise self._error(name, f"has no effect here; it needs {where}")

  @property
  def factors(self) -> bool:
    """Whether the score and the sum over keys factor, so that a D×D state replaces the past."""
    return self.score == "maxplus" and self.score_groups == 1 and self.agg == "maxplus"

  @property
  def course(self) -> homotopy.Homotopy | None:
    """The parsed beta; `None` for maxima."""
    return None if self.beta == "none" else homotopy.parse(self.beta)


def snapped(opts: Options) -> Options:
  """The options of the last 5% of training: maxima where `final=snap`. The parameters are the same."""
  if opts.final == "hold":
    return opts
  impl = opts.impl if opts.impl == "reference" else "auto"
  return dataclasses.replace(opts, beta="none", final="hold", impl=impl)


def matrix_beta(head_dim: int) -> float:
  """The largest beta for which no score can underflow in `matrix` at the initial scale τ.

  RMS-normalised, scaled coordinates stay within τ√D, so the score of every pair lies within 2τ√D of the sum of its
  largest query and key coordinates; β times that must stay below `EXPONENT_RANGE`.
  """
  return EXPONENT_RANGE / (2 * TAU * math.sqrt(head_dim))


def implementation(opts: Options, head_dim: int) -> str:
  """What `auto` stands for; static, so that no future token can change the choice."""
  if opts.impl != "auto":
    return opts.impl
  if opts.beta == "none":
    return "scan" if opts.factors else "tiled"
  bounded = opts.qk_norm == "rms" and opts.course.stop <= matrix_beta(head_dim)
  return "matrix" if bounded else "streaming"


def check_head(opts: Options, head_dim: int) -> None:
  """Raises `ValueError` when the options do not fit the head size."""
  if head_dim % opts.score_groups:
    divisors = ", ".join(str(n) for n in range(1, head_dim + 1) if head_dim % n == 0)
    raise ValueError(
      f"tropical option score_groups={opts.score_groups} does not divide the head size {head_dim}; use one of "
      f"{divisors}"
    )
  if opts.rope and head_dim % 2:
    raise ValueError(f"tropical option rope=True rotates pairs, but the head size {head_dim} is odd")
  if opts.impl == "matrix" and opts.course.stop > matrix_beta(head_dim):
    raise ValueError(
      f"tropical option impl=matrix cannot hold beta={opts.beta} at head size {head_dim}: scores underflow float32; "
      f"use beta up to {matrix_beta(head_dim):.3g}, or impl=streaming"
    )
