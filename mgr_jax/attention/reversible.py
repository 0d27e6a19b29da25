"""`reversible(item)`: a stack of two streams that wraps any mechanism, with activation memory independent of depth.

    x1 <- x1 + F(x2),    x2 <- x2 + G(x1)

with F the wrapped mechanism and G the MLP, each after a norm. Whatever F and G are, the map is a bijection with unit
determinant, and its inverse needs no solver. The backward pass reconstructs the inputs of each layer from its outputs,
at the price of one more forward pass. Subtraction undoes addition bit for bit only in integers, so streams are int32
fixed point. With bfloat16 inside F and G, a float32 stream that comes back one unit off flips a rounding inside the
next F, and the error grows: 0.8 after 96 layers at width 64 and T=128.

As a layer of its own it is `standard`; what it changes is the stack, in `model.reversible`.
"""

import dataclasses

from mgr_jax.attention import standard

MODES = ("additive", "symplectic")
STREAMS = ("full", "half")
STATES = ("fixed32", "float32")
BACKWARD = ("reconstruct", "autodiff", "remat")
MIXERS = ("none", "givens", "cayley")
INTEGRATORS = ("euler", "leapfrog")


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `reversible`; consecutive reversible layers with the same ones form one stack.

  Args:
    mode: `additive`, or `symplectic`: F = -h∇V and G = h∇T in closed form, in place of `standard` and the MLP.
    streams: `full` (both of width C: the parameters of a plain stack) or `half` (C/2 and half the heads: a quarter).
    state: `fixed32` (int32, exact) or `float32` streams.
    frac_bits: fractional bits of fixed point, 8 to 20; the range is ±2^(31 - frac_bits).
    backward: `reconstruct`, `autodiff` (stores everything) or `remat` (stores the streams of every layer).
    mix: orthogonal map of each stream's channels after every layer: `none`, `givens` or `cayley` (float32 only).
    mix_rank: of `cayley`, 1 or more.
    tied: one layer's parameters serve all layers of a run.
    integrator: symplectic only: `euler` (first order) or `leapfrog` (second order, two attention kicks per layer).
    h: symplectic only: step size, 0 < h <= 1.
    lambda_min: symplectic only: least confinement, >= 0.
  """

  mode: str = "additive"
  streams: str = "full"
  state: str = "fixed32"
  frac_bits: int = 16
  backward: str = "reconstruct"
  mix: str = "none"
  mix_rank: int = 4
  tied: bool = False
  integrator: str = "euler"
  h: float = 1.0
  lambda_min: float = 0.05

  def __post_init__(self):
    choices = {"mode": MODES, "streams": STREAMS, "backward": BACKWARD, "mix": MIXERS, "integrator": INTEGRATORS}
    for name, values in choices.items():
      if getattr(self, name) not in values:
        raise ValueError(f"{name}={getattr(self, name)} is not one of {', '.join(values)}")
    if self.state not in STATES:
      raise ValueError(f"state={self.state} is not one of {', '.join(STATES)}; streams of 8 bits cannot be inverted")
    if not 8 <= self.frac_bits <= 20:
      raise ValueError(f"frac_bits={self.frac_bits} is not in 8..20")
    if self.mix_rank < 1:
      raise ValueError(f"mix_rank={self.mix_rank} is not 1 or more")
    if not 0 < self.h <= 1:
      raise ValueError(f"h={self.h} is not in (0, 1]")
    if not 0 <= self.lambda_min < float("inf"):
      raise ValueError(f"lambda_min={self.lambda_min} is not 0 or more")
    if self.mix == "cayley" and self.state == "fixed32":
      raise ValueError("mix=cayley has no exact integer form; use state=float32 or mix=givens")
    self._refuse_without_effect()

  def _refuse_without_effect(self):
    needs = {
      "frac_bits": (self.state == "fixed32", "state=fixed32"),
      "mix_rank": (self.mix == "cayley", "mix=cayley"),
      "integrator": (self.mode == "symplectic", "mode=symplectic"),
      "h": (self.mode == "symplectic", "mode=symplectic"),
      "lambda_min": (self.mode == "symplectic", "mode=symplectic"),
    }
    for field in dataclasses.fields(self):
      effective, condition = needs.get(field.name, (True, ""))
      if not effective and getattr(self, field.name) != field.default:
        raise ValueError(f"{field.name}={getattr(self, field.name)} has no effect without {condition}")


def inner_config(cfg, opts: Options):
  """The configuration of one stream: `cfg`, or half its width and heads.

  Raises:
    ValueError: `streams=half` and an odd number of heads.
  """
  if opts.streams == "full":
    return cfg
  if cfg.n_head % 2 or cfg.n_kv_head % 2:
    raise ValueError(f"streams=half needs even n_head={cfg.n_head} and n_kv_head={cfg.n_kv_head}")
  half = {"n_embd": cfg.n_embd // 2, "n_head": cfg.n_head // 2, "n_kv_head": cfg.n_kv_head // 2}
  return dataclasses.replace(cfg, **half, attention="standard")


def check(cfg, opts: Options, mechanism: str, inner) -> None:
  """Raises `ValueError` unless a stack of `cfg` can wrap `mechanism` with its options `inner`."""
  width = inner_config(cfg, opts).n_embd
  if opts.backward == "reconstruct" and cfg.remat != "none":
    raise ValueError(f"remat={cfg.remat} would compute twice what backward=reconstruct computes anyway; use remat=none")
  if opts.mix == "givens" and width % 2:
    raise ValueError(f"mix=givens turns pairs of channels, but the streams have width {width}")
  if opts.mix == "cayley" and 2 * opts.mix_rank > width:
    raise ValueError(f"mix_rank={opts.mix_rank} is above half the streams' width {width}")
  if opts.mode == "symplectic":
    plain = dataclasses.replace(standard.Options(), impl=getattr(inner, "impl", "auto"))
    if mechanism != "standard" or inner != plain:
      raise ValueError(f"mode=symplectic brings its own attention in place of standard and cannot wrap {mechanism}")
    if cfg.mlp != "relu2":
      raise ValueError(f"mode=symplectic brings its own MLP, so mlp={cfg.mlp} has no effect; use mlp=relu2")


MECHANISM = dataclasses.replace(
  standard.MECHANISM,
  name="reversible",
  options=Options,
  wrapper=True,
  claims=(),
  refs=(
    "Gomez et al., 2017, arXiv 1707.04585 (reversible residual networks)",
    "Kitaev et al., 2020, arXiv 2001.04451 (over attention; not its hashing)",
    "MacKay et al., 2018, arXiv 1810.10999 (fixed point; not its forgetting)",
    "Jin et al., 2020, arXiv 2001.03750 (gradient modules of the symplectic mode)",
    "Hoover et al., 2023, arXiv 2302.07253 (attention as a gradient; not its non-causal energy)",
  ),
  variants=(
    "reversible",
    "reversible(fractal, mix=givens, frac_bits=18)",
    "reversible(streams=half, state=float32, mix=cayley, tied=true)",
    "reversible(mode=symplectic, integrator=leapfrog, h=0.5, lambda_min=0.1)",
    "reversible(braid, backward=remat)",
    "reversible(mode=symplectic)",
  ),
)
