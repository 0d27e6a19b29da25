"""Gauge attention: rotations that depend on content, what their order is worth, and what does not drift."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import icosahedral
from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.algebra.lie_claims import CLAIMS
from mgr_jax.algebra.lie_exp_claims import exp_float64, skew_float64
from mgr_jax.algebra.lie_prefix_claims import (
  BLOCKS,
  LENGTH,
  SCANS,
  misread_by_angles,
  pair_products,
  read_by_rotations,
  serial_float64,
  so4_products,
)
from mgr_jax.algebra.lie_series_claims import series_errors, slopes
from mgr_jax.algebra.uniformization import fewest_terms
from mgr_jax.algebra.uniformization_claims import truncation

COLOURS, MARKERS = (BLUE, ORANGE, GREEN, PINK), "osD^"
FACTORS = 8192
STEPS = (0.2, 0.1, 0.05, 0.025)
LETTERS = (1, 4, 64, 4096)


def two_turns(degrees: float, plane: bool) -> float:
  """Angle in degrees between turning first by U, then by V, and first by V, then by U.

  U and V turn by that angle about two axes of space; in one `plane`, by it and by half of it.
  """
  axes = ((0, 0, -1), (0, 0, -0.5)) if plane else ((0, 0, -1), (0, 1, 0))
  U, V = exp_float64(skew_float64(np.radians(degrees) * np.array(axes), 3))
  # The distance of two rotations by the angle θ from each other is 2√2 sin ½θ; arccos of the trace would cancel.
  return float(np.degrees(2 * np.arcsin(min(1.0, np.linalg.norm(V @ U - U @ V) / 8**0.5))))


def covariance(rng: np.random.Generator, step: float, n: int = 12, b: int = 4) -> dict[str, float]:
  """Largest change of scores and of outputs, seen from the moved frames, when every position changes its frame.

  q, k, v become S_t q, S_t k, S_t v with S_t a random walk of rotations. Three rules say what becomes of U_t = exp A_t.
  Generators and the steps of the walk have entries of size `step`.
  """
  q, k, v = rng.normal(size=(3, n, b))
  A, moves = step * skew_float64(rng.normal(size=(2, n, 6)), b)
  S = serial_float64(exp_float64(moves))
  before = np.concatenate([np.eye(b)[None], S[:-1]])
  back = lambda M: np.swapaxes(M, -1, -2)

  def attend(U, q, k, v):
    T = serial_float64(U)
    pulled = [np.einsum("tji,tj->ti", T, w) for w in (q, k, v)]
    scores = np.where(np.tri(n) > 0, pulled[0] @ pulled[1].T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    out = np.einsum("tij,tj->ti", T, weights / weights.sum(1, keepdims=True) @ pulled[2])
    return np.where(np.isfinite(scores), scores, 0), out

  U = exp_float64(A)
  scores, out = attend(U, q, k, v)
  moved = [np.einsum("tij,tj->ti", S, w) for w in (q, k, v)]
  rules = {
    "U_t → S_t U_t S_(t-1)ᵀ": S @ U @ back(before),
    "A_t → S_t A_t S_tᵀ + (S_t - S_(t-1)) S_tᵀ": scipy.linalg.expm(S @ A @ back(S) + (S - before) @ back(S)),
    "U_t as it was": U,
  }
  change = {}
  for name, edges in rules.items():
    new_scores, new_out = attend(edges, *moved)
    change[name] = max(np.max(np.abs(new_scores - scores)), np.max(np.abs(new_out - np.einsum("tij,tj->ti", S, out))))
  return change


def long_product(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(drift, distance from the double-precision product), largest so far, of one product by three ways to compute it."""
  a = (0.3 * rng.normal(size=(FACTORS, 1, 6))).astype(np.float32)
  exact = serial_float64(exp_float64(skew_float64(a, 4)))
  found = {
    "float32, corrected": so4_products(a, "chunk:64"),
    "float32": so4_products(a, "chunk:64", False),
    "bfloat16": so4_products(a, "chunk:64", False, jnp.bfloat16),
  }
  drift = lambda T: np.max(np.abs(np.swapaxes(T, -1, -2) @ T - np.eye(4)), (-1, -2, -3))
  distance = lambda T: np.max(np.abs(T - exact), (-1, -2, -3))
  return {name: tuple(np.maximum.accumulate(f(T)) for f in (drift, distance)) for name, T in found.items()}


def milliseconds(rng: np.random.Generator) -> dict[str, float]:
  """Shortest of five runs of each scan over quaternion pairs."""
  u = rng.normal(size=(LENGTH, 2, 4, BLOCKS)).astype(np.float32)
  u /= np.linalg.norm(u, axis=2, keepdims=True)
  best = {}
  for scan in SCANS:
    times = []
    for _ in range(6):
      start = time.perf_counter()
      pair_products(u, scan).block_until_ready()
      times.append(time.perf_counter() - start)
    best[scan] = 1e3 * min(times[1:])
  return best


def story(key: jax.Array) -> str:
  rng = generator(key)
  angles = (10, 45, 90)
  turns, flat = ("".join(f"{two_turns(a, plane):8.1f}°" for a in angles) for plane in (False, True))
  changes = [covariance(rng, step) for step in (0.3, 0.03, 0.003)]
  rules = "\n".join(f"    {name:<44}" + "".join(f"{c[name]:9.0e}" for c in changes) for name in changes[0])
  drifts = "\n".join(
    f"    {name:<24}{drift[-1]:16.1e}{distance[-1]:26.1e}" for name, (drift, distance) in long_product(rng).items()
  )
  order = slopes(series_errors(rng, STEPS), STEPS)[:, 0]
  terms = {m: (int(np.ceil(m + 8 * np.sqrt(m))), fewest_terms(m)) for m in (0.01, 4.0)}
  tails = {m: scipy.stats.poisson.sf(few, m) for m, (few, _) in terms.items()}
  read = read_by_rotations(rng, 8, LETTERS[-1])
  by_rotation = "".join(f"{np.mean(read[:, n - 1]):9.1%}" for n in LETTERS)
  by_angle = "".join(f"{1 - misread_by_angles(rng, n, draws=2000):9.1%}" for n in LETTERS)
  scans = ", ".join(f"{name} {ms:.1f} ms" for name, ms in milliseconds(rng).items())
  return f"""\
What it is. Every token emits a rotation U_t = exp A_t of small blocks of channels. The ordered
product T_t = U_t ··· U_0 carries queries, keys and values into one common frame, where they meet in
ordinary attention, ⟨T_tᵀq_t, T_sᵀk_s⟩; the output is carried back by T_t. Because rotations invert,
what lies between two tokens needs no T×T object: R = T_t T_sᵀ exactly.

What it is not. A chain has one path between two positions, so it has no curvature. What is real is
that rotations of three dimensions do not commute: the product remembers the order of tokens.

Order. One turn, then another, against the other way round; the two ends are apart by
    turns by                {"".join(f"{a:8d}°" for a in angles)}
    about x and about y     {turns}
    in one plane            {flat}
    In a plane angles add, and a sum forgets its order.

Covariance: change of scores and outputs when
    frames and generators move per step by           0.3     0.03    0.003
{rules}
    The first rule is exact; the second, often written for it, is its limit for small steps only.
    This is about the core. A layer whose projections are fixed is not invariant.

A product of {FACTORS:,} rotations  max |TᵀT - I|   distance from the exact one
{drifts}
    Correction keeps T orthogonal; it cannot undo the rounding that turned it. bfloat16 is lost.

Series for log(e^X e^Y) cut after order 1 .. 4 errs as ε to the power {", ".join(f"{s:.2f}" for s in order)}

Uniformization. A walk of m hops on average, cut where the Poisson tail is below 1e-7, takes
    {terms[0.01][1]} and {terms[4.0][1]} hops at m = 0.01 and 4. The rule of thumb m + 8√m says \
{terms[0.01][0]} and {terms[4.0][0]}, with tails of
    {tails[0.01]:.0e} and {tails[4.0]:.0e}: it is no bound where m is small, and wasteful where it is not.

Words over the icosahedral group A₅: share of random words whose product is named rightly
    letters               {"".join(f"{n:9,}" for n in LETTERS)}
    frames in SO(3)       {by_rotation}
    sums of angles        {by_angle}    chance {1 / icosahedral.ORDER:.1%}
    One layer, by construction; whether training finds it is another question. A fixed-depth
    transformer without such a product cannot do this at all lengths, unless TC⁰ = NC¹.

Time of {LENGTH:,} steps of {BLOCKS} blocks here: {scans}
"""


def order_on_a_sphere(key: jax.Array):
  """Where one vector ends after the same twelve rotations in 2,000 orders, in three dimensions and in the plane."""
  from matplotlib.figure import Figure

  rng = generator(key)
  a = 0.5 * rng.normal(size=(12, 3))
  orders = rng.permuted(np.tile(np.arange(12), (2000, 1)), axis=1)

  def ends(edges):
    w = np.tile(np.eye(3)[0], (len(orders), 1))
    for turn in orders.T:
      w = np.einsum("nij,nj->ni", edges[turn], w)
    return w

  figure = Figure(figsize=(7, 3.6), layout="constrained")
  axes = figure.add_subplot(projection="mollweide")
  for coordinates, colour, size, label in (
    (a, BLUE, 3, "rotations in three dimensions"),
    (a * [1, 0, 0], ORANGE, 70, "rotations in one plane: a single point"),
  ):
    x, y, z = ends(exp_float64(skew_float64(coordinates, 3))).T
    axes.scatter(np.arctan2(y, x), np.arcsin(np.clip(z, -1, 1)), s=size, color=colour, label=label, lw=0)
  axes.grid(alpha=0.3)
  axes.set_xticklabels([])
  axes.set_yticklabels([])
  legend = figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
  for handle in legend.legend_handles:
    handle.set_sizes([40])
  axes.set_title("one vector after the same 12 rotations, in 2,000 orders", fontsize=13)
  return figure


def drift(key: jax.Array):
  """How far a long product is from orthogonal, and from the product in double precision, by three ways."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.8), layout="constrained")
  ax = figure.subplots()
  at = 2 ** np.arange(4, 14)
  ways = zip(long_product(generator(key)).items(), COLOURS, MARKERS, strict=False)
  for (name, (off, distance)), colour, marker in ways:
    ax.loglog(at, off[at - 1], "-", marker=marker, ms=6, color=colour, label=name)
    ax.loglog(at, distance[at - 1], ":", lw=1.8, color=colour)
  ax.plot([], [], ":", lw=1.8, color="0.4", label="distance from the exact product")
  ax.set_xticks(at[::3], [f"{n:,}" for n in at[::3]])
  ax.minorticks_off()
  styled(ax, "a long product of rotations, largest error so far", "factors", "max $|T^{\\top}T - I|$", None)
  ax.legend(frameon=False, fontsize=11, loc="center left", bbox_to_anchor=(0.2, 0.54))
  return figure


def series_and_words(key: jax.Array):
  """Errors of the series for log(e^X e^Y) by order, with their slopes; what names the product of a word over A₅."""
  from matplotlib.figure import Figure

  rng = generator(key)
  figure = Figure(figsize=(7.4, 3.8), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
  errors = series_errors(rng, STEPS)[..., 0]
  for k, slope in enumerate(slopes(errors, STEPS)):
    label = f"order {k + 1}: slope {slope:.2f}"
    left.loglog(STEPS, errors[k], marker=MARKERS[k], ms=6, color=COLOURS[k], label=label)
  left.set(ylim=(1e-14, 1e-1))
  left.set_xticks(STEPS, [f"{step:g}" for step in STEPS])
  left.minorticks_off()
  styled(left, "series for log(e$^X$e$^Y$)", "ε, size of X and Y", "largest error", "lower right")
  lengths = np.array([1, 2, 3, 4, 6, 8, 16, 32, 64])
  read = read_by_rotations(rng, 8, LETTERS[-1])
  right.semilogx(lengths, [np.mean(read[:, n - 1]) for n in lengths], "o-", color=BLUE, label="frames in SO(3)")
  angles = [1 - misread_by_angles(rng, n, draws=3000) for n in lengths]
  right.semilogx(lengths, angles, "s--", color=ORANGE, label="sums of angles")
  right.axhline(1 / icosahedral.ORDER, color="0.4", lw=1.2, ls=":", label="chance")
  right.set_xticks(2 ** np.arange(0, 7, 2), [f"{n}" for n in 2 ** np.arange(0, 7, 2)])
  right.minorticks_off()
  styled(right, "words over A₅", "letters", "share named rightly", "center right")
  return figure


def uniformization(key: jax.Array):
  """The error of the cut series below its bound, and how many terms a tail of 1e-7 takes."""
  from matplotlib.figure import Figure

  rng = generator(key)
  figure = Figure(figsize=(7.6, 3.8), layout="constrained")
  left, right = figure.subplots(1, 2)
  m = np.geomspace(0.1, 16, 8)
  fine = np.geomspace(0.1, 16, 60)
  for K, colour, marker in zip((3, 8, 12), COLOURS, MARKERS, strict=False):
    left.loglog(fine, scipy.stats.poisson.sf(K, fine), "-", lw=1.5, color=colour)
    errors = np.array([truncation(rng, float(x), K)[1] for x in m])
    seen = errors > 1e-13
    left.loglog(m[seen], errors[seen], marker, ms=6, mfc="none", color=colour, label=f"K = {K}")
  left.plot([], [], "-", color="0.4", label="Poisson tail")
  left.set(ylim=(1e-13, 1e5))
  styled(left, "worst error found, and its bound", "m, mean number of hops", "error / range of values", "upper left")
  fine = np.geomspace(0.01, 16, 120)
  right.semilogx(fine, [fewest_terms(float(x)) for x in fine], color=BLUE, lw=1.8, label="tail ≤ 1e-7")
  right.semilogx(fine, np.ceil(fine + 8 * np.sqrt(fine)), "--", color=ORANGE, lw=1.8, label="⌈m + 8√m⌉")
  styled(right, "terms that are needed", "m, mean number of hops", "K", "upper left")
  return figure


DEMO = Demo(
  name="gauge",
  summary="rotations that depend on content, and what their order is worth",
  story=story,
  timed=True,
  claims=CLAIMS,
  plots=(order_on_a_sphere, drift, series_and_words, uniformization),
  refs=("Barrington 1989", "Jensen 1953", "Blanes et al. 2009, arXiv 0810.5488"),
  not_shown=(
    ("whether training finds the words of A₅", "20 minutes: python -m train.experiment gauge_word_problem"),
    ("speed of a whole layer", "needs a quiet machine: python -m train.bench speed --attention=gauge"),
    ("other options than the default", "tests/test_conformance.py and tests/test_gauge.py run the claims on variants"),
    ("products of 1, 2, 63, 64 and 65 factors", "checked by tests/test_algebra_lie.py"),
    ("symplectic exponentials", "python -m demos run reversible"),
  ),
)
