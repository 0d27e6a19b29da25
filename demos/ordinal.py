"""Ordinals shown: arithmetic that does not commute, games that end, programs with ranks, and a schedule."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import ordinal_claims, ordinal_descent_claims
from mgr_jax.algebra.ordinal import OMEGA, Ord, natural_sum
from mgr_jax.algebra.ordinal_descent import hardy, largest_below
from mgr_jax.algebra.ordinal_games import cut, goodstein, heads, hydra_rank
from mgr_jax.algebra.ordinal_programs import Program, repeat, sequence, task
from mgr_jax.algebra.ordinal_rank import from_rank, lex_cmp, to_rank
from mgr_jax.algebra.ordinal_sampling import rng_of
from mgr_jax.schedules import ordinal_claims as schedule_claims
from mgr_jax.schedules.base import ANNEAL, EVENT_NAMES, EXHAUSTED, NO_EVENT, RESTART
from mgr_jax.schedules.ordinal_machine import OrdinalConfig, limit_events, n_drops, ordinal_init, ordinal_step
from train.races import regime

HYDRA = (((), ()),)
CONFIG = OrdinalConfig(A0=2, B0=3, P0=20, clip_loss=6.0, rise_z=6.0, rise_count=5)
STEPS, JUMP, DIM, RATE, SPREAD = 1200, 300, 16, 0.3, 0.3
REFILLS = OrdinalConfig(A0=2, B0=3, P0=20, rel_tol=0.1)
NOISE = (0.02, 0.05, 0.1)
FIRST = (REFILLS.A0, REFILLS.B0, REFILLS.P0)
STREAMS, LONGEST = 8, 4096
RACE_STREAMS, RACE_STEPS = 8, 4000


def shown(x) -> str:
  return str(x).replace("w", "ω").replace("*", "·")


def calculator() -> str:
  """Expressions beside their mirror images, evaluated."""
  pairs = (
    ("1 + w", "w + 1"),
    ("2 * w", "w * 2"),
    ("(w + 1) * 2", "w*2 + 1*2"),
    ("(1 + 1) * w", "1*w + 1*w"),
    ("2 ^ w", "w ^ 2"),
    ("(w + 1) ^ 2", "w^2 + w*2 + 1"),
  )
  cell = lambda text: f"{shown(text):<13} = {shown(Ord.parse(text))}"
  return "\n".join(f"    {cell(a):<34}{cell(b)}" for a, b in pairs)


def quotient() -> str:
  """Quotient and remainder of the story's example."""
  q, r = divmod(Ord.parse("w^2*3 + w*5 + 7"), Ord.parse("w*2 + 1"))
  return f"{shown(q)}, {shown(r)}"


def hardy_of_four() -> tuple[int, int]:
  """(m, e) with H_{ω^ω}(3) = f(f(f(3))) = m·2^e, m odd, f = H_{ω²}, f(n) = n·2^n. Only m and e fit anywhere."""
  n = hardy(OMEGA**2, hardy(OMEGA**2, 3))
  twos = (n & -n).bit_length() - 1
  return n >> twos, n + twos


def battle(rng) -> tuple[list[Ord], int]:
  """Ranks of a hydra under random cuts, the t-th of which grows t copies, and its largest number of heads."""
  hydra, ranks, most = HYDRA, [hydra_rank(HYDRA)], len(heads(HYDRA))
  while heads(hydra):
    hydra = cut(hydra, rng.choice(heads(hydra)), len(ranks))
    ranks.append(hydra_rank(hydra))
    most = max(most, len(heads(hydra)))
  return ranks, most


class Path(NamedTuple):
  """A run of the machine: per step, rank int32[T, 3], loss, running mean, best mean, multiplier, event."""

  rank: np.ndarray
  loss: np.ndarray
  ema: np.ndarray
  best: np.ndarray
  multiplier: np.ndarray
  event: np.ndarray


@jax.jit
def _descend_noisily(noise_TD, target_TD):
  def step(carry, now):
    point, state = carry
    noise, target = now
    loss = 1 + 0.5 * jnp.sum((point - target) ** 2) + SPREAD * noise[-1]
    state, multiplier, event = ordinal_step(CONFIG, state, loss)
    point = point - RATE * multiplier * (point - target + noise[:-1])
    rank = jnp.stack([state.a, state.b, state.c])
    return (point, state), (rank, loss, state.ema, state.best, multiplier, event)

  return jax.lax.scan(step, (jnp.zeros(DIM), ordinal_init(CONFIG)), (noise_TD, target_TD))[1]


@functools.cache
def _path(seed: bytes) -> Path:
  rng = np.random.default_rng(list(seed))
  target = np.where(np.arange(STEPS)[:, None] < JUMP, 1.0, -1.0) * rng.standard_normal(DIM)
  noise = rng.standard_normal((STEPS, DIM + 1))
  return Path(*map(np.asarray, _descend_noisily(jnp.float32(noise), jnp.float32(target))))


def path(key: jax.Array) -> Path:
  """Gradient steps with noise in 16 dimensions towards a target that jumps once; the machine sees the loss."""
  return _path(np.asarray(jax.random.key_data(key)).tobytes())


def trajectory(p: Path) -> str:
  """The steps at which a higher coefficient was spent, with the rank before and after."""
  rows = [f"{0:8d}  {shown(from_rank(p.rank[0])):<42}{p.multiplier[0]:<9g}start"]
  for t in np.flatnonzero(p.event != NO_EVENT):
    before, after = (shown(from_rank(p.rank[i])) for i in (t - 1, t))
    what = EVENT_NAMES[p.event[t]]
    if p.event[t] == RESTART and np.any(p.rank[t - 1, 1:] > 0):
      what += f", mean rose {'after the jump' if 0 < t - JUMP < 50 else '(false alarm)'}"
    after = "" if p.event[t] == EXHAUSTED else f"> {after}"
    rows.append(f"{t:8d}  {before:<20}{after:<22}{p.multiplier[t]:<9g}{what}")
  return "\n".join(rows)


def never_rises(p: Path) -> bool:
  """Whether all neighbouring ranks are in order, on the device and as ordinals."""
  device = np.asarray(lex_cmp(p.rank[1:], p.rank[:-1])) <= 0
  host = [b <= a for a, b in itertools.pairwise(map(from_rank, p.rank))]
  return bool(np.all(device)) and all(host)


WARM_UP, TRAIN, COOL, CYCLE = task("warm-up", 10), task("train", OMEGA), task("anneal", 5), task("restart", OMEGA**2)
PROGRAM = sequence(WARM_UP, repeat(sequence(TRAIN, COOL), 3), repeat(CYCLE, 2))


class Measured:
  """Settles rank ω, and each coefficient that refills, at the moment it begins; whatever is finite counts down."""

  def __init__(self, rng):
    self.rng = rng

  def below(self, rank: Ord) -> Ord:
    if rank.is_successor:
      return rank.limit_part + (rank.finite_part - 1)
    return largest_below(rank, self.rng.randint(1, 20))

  def which(self, n: int) -> int:
    return self.rng.randrange(n)


def run_program(program: Program, chooser) -> tuple[int, bool]:
  """Number of events until the end, and whether every one lowered the rank."""
  n, descends = 0, True
  while not program.rank.is_zero:
    after = program.step(chooser)
    descends, program, n = descends and after.rank < program.rank, after, n + 1
  return n, descends


@functools.partial(jax.jit, static_argnums=0)
def _lengths(cfg: OrdinalConfig, loss_NT):
  """Observations without improvement until nothing is left, limit events, and whether that came to pass; per stream."""

  def step(state, loss):
    before = state
    state, _, event = ordinal_step(cfg, state, loss)
    spent = ~before.done & (state.n_improve == before.n_improve) & (event != EXHAUSTED)
    return state, (spent, (event == ANNEAL) | (event == RESTART))

  def stream(loss_T):
    state, (spent, limits) = jax.lax.scan(step, ordinal_init(cfg), loss_T)
    return jnp.sum(spent), jnp.sum(limits), state.done

  return jax.vmap(stream)(loss_NT)


def lengths(key: jax.Array, refill: str) -> tuple[np.ndarray, np.ndarray]:
  """Lengths and limit events of whole descents on losses 1 + noise, int [NOISE, STREAMS]."""
  cfg = dataclasses.replace(REFILLS, refill=refill)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  loss = 1 + np.array(NOISE)[:, None, None] * rng.standard_normal((len(NOISE), STREAMS, LONGEST))
  spent, limits, done = map(np.asarray, _lengths(cfg, jnp.float32(loss.reshape(-1, LONGEST))))
  assert done.all(), "the streams are too short"
  return spent.reshape(len(NOISE), STREAMS), limits.reshape(len(NOISE), STREAMS)


def refill_table(key: jax.Array) -> str:
  """Lengths of the same descent with fixed and with measured patience, for each noise level."""
  found = {refill: lengths(key, refill) for refill in ("geometric", "adaptive")}
  between = lambda v: f"{v.min()}" if v.min() == v.max() else f"{v.min()} to {v.max()}"
  return "\n".join(
    f"    {noise:<8g}" + "".join(f"{between(n[i]):>16}{between(limits[i]):>9}" for n, limits in found.values())
    for i, noise in enumerate(NOISE)
  )


@functools.cache
def raced() -> dict:
  """The streaming regression at reduced size; the same streams whatever the demo's seed."""
  with jax.enable_x64(False):
    return regime.run(RACE_STREAMS, RACE_STEPS, say=lambda line: None)


def race_table(result: dict) -> str:
  """Each machine against its blind twin and against the best other arm."""
  rows = []
  for name, c in result["claims"].items():
    kind, _, arm = name.partition(": ")
    arms = result["arms"]
    if kind == "feedback":
      risks = f"{arms[arm]['median']:>9.3f}{arms[c['baseline']]['median']:>9.3f}"
      ratio = f"{c['ratio']:>8.2f} [{c['interval'][0]:.2f}, {c['interval'][1]:.2f}]"
      best = result["claims"][f"best: {arm}"]
      rows.append(f"    {arm:<18}{risks}{ratio:<23}{c['verdict']:<16}{best['ratio']:<8.2f}{best['verdict']}")
  return "\n".join(rows)


def story(key: jax.Array) -> str:
  rng = rng_of(key)
  sums = natural_sum(1, OMEGA), natural_sum(OMEGA, 1)
  three = ", ".join(f"{s.value} ~ {shown(s.shadow)}" for s in goodstein(3))
  four = list(itertools.islice(goodstein(4), 6))
  odd, twos = hardy_of_four()
  ranks, most = battle(rng)
  p = path(key)
  runs = [run_program(PROGRAM, Measured(rng)) for _ in range(3)]
  descend = all(lowered for _, lowered in runs)
  swapped = Ord.of(0)
  for part in (WARM_UP, repeat(sequence(TRAIN, COOL), 3), repeat(CYCLE, 2)):
    swapped = swapped + part.rank
  levels = repeat(repeat(task("patience", OMEGA), REFILLS.B0 + 1), REFILLS.A0 + 1)
  most_drops = (limit_events(REFILLS) + 1) * (REFILLS.p_max + 1) - 1
  result = raced()
  best = result["claims"]["best: ordinal"]["baseline"]
  return f"""\
What it is. Ordinals below ε₀, exact. They measure what is still left of a process that has to end
although nobody knows when: whoever lowers ω has to name an integer, and then that counts down.
The schedule `ordinal` spends such a rank: patience, then cuts of the rate, then restarts.

What it is not. A reason why the rate should be cut: the rank proves that a schedule ends, whatever
the loss does, and nothing about the loss.

Calculator
{calculator()}
    natural sums commute: 1 ⊕ ω = {shown(sums[0])}, ω ⊕ 1 = {shown(sums[1])}
    {shown("w^2*3 + w*5 + 7")} = ({shown("w*2 + 1")}) · q + r with q, r = {quotient()}

Goodstein: write n with powers of 2, 3, 4, ..., take 1 away each time; ω in place of the base.
    from 3: {three}: ended
    from 4: {", ".join(str(s.value) for s in four)}, ... not run: it takes {odd}·2^{twos} - 3 steps, and ends because
    {" > ".join(shown(s.shadow) for s in four[:5])} > ... must

A hydra grows t branches back at the t-th cut. Ranks of one battle, up to {most} heads:
    {" > ".join(map(shown, ranks))}

The rank of a schedule, ω²a + ωb + c, lexicographically: whatever is refilled, a higher one paid.
    step    rank                                      rate     event
{trajectory(p)}
    no step raises the rank, by ordinals and on the device: {never_rises(p)}; a restart raises the rate

Programs have ranks. While P runs at rank p, "P; Q" has rank ρ(Q) + p: the later one on the left.
    {PROGRAM}
    {PROGRAM.term} = {shown(PROGRAM.rank)}
    with {", ".join(f"ρ({t}) = {shown(t.rank)}" for t in (WARM_UP, TRAIN, COOL, CYCLE))}
    three runs, lengths settled on the way: {", ".join(str(n) for n, _ in runs)} events; each lowered it: {descend}
    the other way round the sum is {shown(swapped)}, and a step of the warm-up changes nothing

Fixed or measured patience: the same certificate from {shown(from_rank(FIRST))}, other lengths.
    noise          geometric    limits        adaptive    limits
{refill_table(key)}
    Geometric patience visits one list of {n_drops(REFILLS)} ranks, known beforehand: a counter. Adaptive patience
    has no bound but that of its integers, {most_drops:.1e}, and ends all the same.
    "{levels}" has rank {shown(levels.rank)}: while the number of levels is fixed, less than ω² is enough.

Does looking at the loss help? A target that changes twice, {RACE_STREAMS} streams of {RACE_STEPS:,} samples, every
arm at its best rate. A blind twin is the same machine that sees no loss. Best other arm: {best}.
    machine                risk    blind   ratio [95%]       feedback        to the best other arm
{race_table(result)}
    So few short streams decide little. In full: python -m train.bench regime
"""


def goodstein_from_four(key: jax.Array):
  """A sequence of integers that rises, and the coefficients of its descending shadow."""
  del key
  from matplotlib.figure import Figure

  steps = list(itertools.islice(goodstein(4), 1, 97))
  base, ranks = [s.base for s in steps], np.stack([to_rank(s.shadow, 3) for s in steps])
  figure = Figure(figsize=(7, 3.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.semilogy(base, [s.value for s in steps], color=BLUE, lw=2)
  styled(left, "the integers rise ...", "base", "value", legend=None, size=12)
  names = ("of ω²", "of ω", "of 1")
  for name, rank, colour, style in zip(names, ranks.T, (ORANGE, GREEN, BLUE), ("-", "--", "-"), strict=True):
    right.step(base, rank, where="post", color=colour, ls=style, lw=2, label=name)
  right.set_yscale("symlog", linthresh=4)
  right.set_yticks([0, 1, 2, 4, 10, 30, 100], ["0", "1", "2", "4", "10", "30", "100"])
  right.set_ylim(top=1500)
  right.legend(frameon=False, fontsize=11, handlelength=1, columnspacing=1, ncols=3, loc="upper left")
  styled(right, "... their shadow descends", "base", "coefficient", legend=None, size=12)
  return figure


def schedule(key: jax.Array):
  """One run: loss with its mean and the best of each level, the multiplier, and the patience left."""
  from matplotlib.figure import Figure

  p, t = path(key), np.arange(STEPS)
  figure = Figure(figsize=(7, 5.6), layout="constrained")
  panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.6, 2))
  panels[0].semilogy(t, p.loss, color="0.75", lw=0.7, label="loss")
  panels[0].semilogy(t, p.ema, color=BLUE, lw=1.8, label="running mean")
  panels[0].semilogy(t, np.where(np.isfinite(p.best), p.best, np.nan), color=ORANGE, lw=1.8, label="best of the level")
  styled(panels[0], "", "", f"loss, jump at {JUMP}", legend=None, size=12)
  panels[1].step(t, p.multiplier, where="post", color=GREEN, lw=2)
  panels[1].set_yscale("log", base=2)
  styled(panels[1], "", "", "multiplier\nof the rate", legend=None, size=12)
  for a, colour, hatch in zip(range(CONFIG.A0, -1, -1), (PINK, BLUE, ORANGE), ("//", "..", "\\\\"), strict=True):
    there = np.where(p.rank[:, 0] == a, p.rank[:, 2], np.nan)
    panels[2].fill_between(t, there, step="post", facecolor=colour, alpha=0.5, hatch=hatch, lw=0, label=f"{a} left")
  styled(panels[2], "", "step", "patience left", legend=None, size=12)
  panels[2].legend(frameon=False, fontsize=11, title="restarts", title_fontsize=11, handlelength=1.2, loc="upper right")
  for event, colour, style in ((ANNEAL, "0.6", ":"), (RESTART, "0.1", "-"), (EXHAUSTED, ORANGE, "--")):
    for ax, at in itertools.product(panels, np.flatnonzero(p.event == event)):
      ax.axvline(at, color=colour, lw=1.3, ls=style)
    panels[0].plot([], [], color=colour, ls=style, label=EVENT_NAMES[event])
  for ax in panels:
    ax.set_xlim(0, STEPS)
  panels[0].set_ylim(0.4, 60)
  figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=11, ncols=3, loc="outside upper center")
  return figure


def excess_risk(key: jax.Array):
  """Learning curves of the streaming regression: the machines, their blind twins, and the best other arm."""
  del key
  from matplotlib.figure import Figure

  result = raced()
  best = result["claims"]["best: ordinal"]["baseline"]
  figure = Figure(figsize=(7, 3.2), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True)
  for ax, machine in zip(axes, ("ordinal", "ordinal rise"), strict=True):
    styles = ((machine, ORANGE, "-"), (f"{machine}{regime.BLIND}", BLUE, "--"), (best, "0.4", ":"))
    for name, colour, style in styles:
      curve = result["arms"][name]["excess"]
      ax.semilogy(
        np.linspace(0, RACE_STEPS, len(curve), endpoint=False), curve, color=colour, ls=style, lw=2, label=name
      )
    title = f"{machine}, median of {RACE_STREAMS}"
    styled(ax, title, "sample", r"excess risk $|\theta - \theta^*|^2$", "upper right", size=12)
    ax.label_outer()
  axes[0].set_ylim(top=30)
  return figure


DEMO = Demo(
  name="ordinal",
  summary="ordinals below ε₀: arithmetic, games that end, ranks of programs, and a schedule that must run out",
  story=story,
  claims=(*ordinal_claims.CLAIMS, *ordinal_descent_claims.CLAIMS, *schedule_claims.CLAIMS),
  plots=(goodstein_from_four, schedule, excess_risk),
  refs=("Cantor 1897", "Goodstein 1944", "Kirby, Paris 1982", "Dershowitz, Manna 1979"),
  not_shown=(
    ("Goodstein's sequence from 4 to its end", "more steps than any machine could run; the story says how many"),
    ("the streaming regression at full length", "python -m train.bench regime"),
    ("language models, fixed schedules against this one", "many training runs, not done"),
    ("resuming, replicas, moments after a restart", "checked by tests/test_ordinal_schedule.py and tests/test_step.py"),
    ("an independent machine step by step", "checked by tests/test_ordinal_schedule.py"),
  ),
)
