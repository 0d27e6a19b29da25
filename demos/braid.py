"""Braid attention: what the braid group does and does not do in a sum with additive gates."""

import re

import jax
import numpy as np

from demos import braid_tasks
from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, styled
from mgr_jax.algebra import additive_gate, braid, knots
from mgr_jax.algebra.braid_claims import CLAIMS

STRANDS = 3
# Closes to the knot 5_2; its letters 3 to 5 are a site of the third Reidemeister move.
WORD = np.array([1, 1, 1, 2, -1, 2])
SITE = 2
BOUNDS = (2.0, 4.0, 8.0)
RANKS = np.arange(4, 41, 4)
COLOURS = (BLUE, ORANGE, GREEN)

_alexander = jax.jit(knots.alexander_coefficients, static_argnums=1)
_jones = jax.jit(knots.jones_coefficients, static_argnums=1)
_permutation = jax.jit(braid.permutation, static_argnums=1)
_linking = jax.jit(braid.linking_matrix, static_argnums=1)


def third_reidemeister(word: np.ndarray, site: int) -> np.ndarray:
  """Replaces σ_i^a σ_j^b σ_i^c by σ_j^c σ_i^b σ_j^a at `site`, |i-j| = 1, not a = c != b."""
  (a, b, c), moved = word[site : site + 3], word.copy()
  moved[site : site + 3] = np.sign(c) * abs(b), np.sign(b) * abs(a), np.sign(a) * abs(b)
  return moved


def word_text(word: np.ndarray) -> str:
  """σ₁σ₂⁻¹ and so on."""
  digits = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
  return "".join(f"σ{str(abs(i)).translate(digits)}{'⁻¹' if i < 0 else ''}" for i in word.tolist() if i) or "1"


def polynomial_text(coefficients: np.ndarray) -> str:
  """Integer coefficients of s^-d .. s^d, s² = t, as a Laurent polynomial in t, highest power first."""
  degree, text = len(coefficients) // 2, ""
  for power in range(degree, -degree - 1, -1):
    c = round(float(coefficients[power + degree]))
    if c:
      exponent = f"{power // 2}" if power % 2 == 0 else f"({power}/2)"
      monomial = "" if power == 0 else "t" if power == 2 else f"t^{exponent}"
      size = str(abs(c)) if abs(c) != 1 or not monomial else ""
      sign = ("-" if c < 0 else "") if not text else (" - " if c < 0 else " + ")
      text += f"{sign}{size}{monomial}"
  return text or "0"


def mathtext(polynomial: str) -> str:
  """`polynomial_text` with exponents in braces."""
  return re.sub(r"\^(\S+)", r"^{\1}", polynomial)


def invariants(word: np.ndarray) -> tuple[str, str]:
  """Δ(t) and V(t) of the closure, with their coefficients recovered in double precision."""
  with jax.enable_x64(True):
    return polynomial_text(np.asarray(_alexander(word, STRANDS))), polynomial_text(np.asarray(_jones(word, STRANDS)))


@jax.jit
def _strands_after(words, acc, payload):
  states = braid.Strands(acc, payload)
  laws = {
    "swap": (states, braid.swap),
    "Burau, t = 1/2": (payload, braid.burau(0.5)),
    "restricted": (states, braid.restricted),
  }
  run = lambda word: {name: braid.execute(word, state, law) for name, (state, law) in laws.items()}
  return jax.vmap(run)(words)


def law_changes(first: np.ndarray, second: np.ndarray, key: jax.Array) -> dict[str, float]:
  """The largest change of a strand state between two words, for each crossing law, in double precision."""
  acc, payload = _generator(key).standard_normal((2, STRANDS, 1))
  with jax.enable_x64(True):
    after = _strands_after(np.stack([first, second]), acc, payload)
  change = lambda state: max(float(np.max(np.abs(np.diff(x, axis=0)))) for x in jax.tree.leaves(state))
  # The order in which they are told, not that of a jitted dictionary.
  return {name: change(after[name]) for name in ("swap", "Burau, t = 1/2", "restricted")}


def _generator(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def interpolation_errors(rank: int) -> np.ndarray:
  """max |σ(a+b) - Σ_m ℓ_m(a) σ(x_m+b)| over a grid of |a|, |b| <= M, for each M of `BOUNDS`, in double precision."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  k, unit = np.arange(rank), np.linspace(-1, 1, 201)
  angle = np.pi * (k + 0.5) / rank
  halved = np.where(k == 0, 1, 2) / rank
  features = np.cos(k * np.arccos(unit)[:, None]) @ (halved[:, None] * np.cos(k[:, None] * angle))
  return np.array(
    [
      np.max(
        np.abs(sigmoid(bound * (unit[:, None] + unit)) - features @ sigmoid(bound * (np.cos(angle)[:, None] + unit)))
      )
      for bound in BOUNDS
    ]
  )


def singular_values(bound: float) -> np.ndarray:
  """Singular values of σ(a+b) on the same grid, over the largest."""
  grid = np.linspace(-bound, bound, 201)
  values = np.linalg.svd(1 / (1 + np.exp(-grid[:, None] - grid)), compute_uv=False)
  return values / values[0]


@jax.jit
def _burau_matrices(word, ts):
  return jax.vmap(lambda t: braid.burau_matrix(word, 5, t))(ts)


def remembered(rng: np.random.Generator, ts: tuple[float, ...]) -> list[float]:
  """Spread between the rows of the Burau matrix of 200 random letters on five strands: 1 keeps all, 0 has forgotten."""
  matrices = np.asarray(_burau_matrices(rng.integers(1, 5, 200), np.float32(ts)))
  return np.max(np.ptp(matrices, axis=1), axis=-1).tolist()


def story(key: jax.Array) -> str:
  rng = _generator(key)
  moved = third_reidemeister(WORD, SITE)
  (alexander, jones), (alexander_moved, jones_moved) = invariants(WORD), invariants(moved)
  same = "the same" if (alexander, jones) == (alexander_moved, jones_moved) else f"{alexander_moved}, {jones_moved}"
  permutation = np.asarray(_permutation(WORD, STRANDS)) + 1
  linking = np.asarray(_linking(WORD, STRANDS)).tolist()
  changes = "\n".join(f"      {law:<15} {value:.1e}" for law, value in law_changes(WORD, moved, key).items())
  words, length, ts = 16, 10_000, (1.0, 0.99, 0.6)
  right = int(braid_tasks.tracked(rng, words, length)[:, -1].all((-1, -2)).sum())
  memory = ", ".join(f"{spread:.2g} at t = {t:g}" for t, spread in zip(ts, remembered(rng, ts), strict=True))
  p, sizes = braid_tasks.trained(rng), (10, 100, 400)
  errors = [braid_tasks.sum_errors(rng, p, n) for n in sizes]
  arms = "\n".join(f"    {name:<22}" + "".join(f"{e[name]:>9.1e}" for e in errors) for name in errors[0])
  seen = f"{braid_tasks.SHORTEST} to {braid_tasks.LONGEST} tokens"
  k, off = braid_tasks.as_words(rng, p, sizes[-1])
  few, many = interpolation_errors(12), interpolation_errors(24)
  rank = "\n".join(
    f"    M = {bound:g}:  rank 12 {few[i]:.0e},  rank 24 {many[i]:.0e}"
    f",  predicted rate {float(additive_gate.sigmoid_bernstein_radius(bound)):.2f}^-rank"
    for i, bound in enumerate(BOUNDS)
  )
  return f"""\
What it is. Token i adds up earlier values with gates φ(a_i + b_j), φ a sigmoid or a step. A hard
gate selects a prefix of the keys sorted by b, and adding that prefix up is the braid word
σ₁σ₂···σₖ under the swap law.

What it is not. That sum uses no braid relation. Gates do not see order, and every query ranks the
keys alike, so one layer cannot look a key up by content. The braid group acts only where words act
on strands. None of the laws below says that a language model gains from them.

A word and its closure
    β = {word_text(WORD)}, and β' = {word_text(moved)} by the third Reidemeister move
    permutation {permutation.tolist()}, writhe {int(np.sign(WORD).sum())}, crossing numbers n_ab {linking}
    Δ(t) = {alexander}
    V(t) = {jones};  of β': {same}
    largest change of the strands from β to β':
{changes}
    The restricted law is no representation. Swap is one, yet sees only the permutation and n_ab.

Words as a memory
    S₅: {right} of {words} random words of length {length:,} end in the right permutation (chance: 1 in 120),
    read from the strands of one layer with mode=word, hard letters and t = 1
    Burau forgets: row spread after 200 letters {memory}

Sum of the values whose tag is positive, trained on {seen}: relative error
{"".rjust(26)}{"".join(f"{n:>9}" for n in sizes)}  tokens
{arms}
    The tag is an input and separates the tokens linearly, so this is an easy task: gates solve it,
    and so does DeepSets. One softmax head averages what it selects; the number of all tokens does
    not tell how many those were (a second head that averages tags could).
    The trained hard gates as words σ₁···σₖ, {sizes[-1]} tokens, k = {min(k)} to {max(k)}: executing them gives
    the masked sums to {off:.0e}

Soft gates have low rank: error of Chebyshev interpolation of σ(a + b), |a|, |b| <= M
{rank}
"""


def closure(key: jax.Array):
  """The word, an equal word, and the closed braid; over-strands are unbroken."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.8), layout="constrained")
  left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
  for ax, word, name in zip(left.subplots(2, 1), (WORD, third_reidemeister(WORD, SITE)), ("β", "β'"), strict=True):
    draw_braid(ax, word, name)
  ax = right.subplots()
  draw_closure(ax, WORD)
  alexander, jones = invariants(WORD)
  ax.set_title("closure of β", fontsize=13)
  text = f"$\\Delta={mathtext(alexander)}$\n$V={mathtext(jones)}$"
  ax.text(0.5, -0.04, text, transform=ax.transAxes, ha="center", va="top", fontsize=12)
  return figure


def strand_paths(word: np.ndarray, gap: float = 0.17) -> list[tuple[np.ndarray, np.ndarray]]:
  """Polylines (x, y) of the strands by starting position; NaN where a strand passes under another."""
  u = np.linspace(0, 1, 61)
  order, paths = list(range(STRANDS)), [[] for _ in range(STRANDS)]
  for column, letter in enumerate(word.tolist()):
    i = abs(letter) - 1
    for position, strand in enumerate(order):
      target = {i: i + 1, i + 1: i}.get(position, position)
      y = -(position + (target - position) * u * u * (3 - 2 * u))
      # In a positive crossing the strand that goes down (from i to i+1) passes over.
      under = target != position and (target > position) != (letter > 0)
      paths[strand].append((column + u, np.where(under & (np.abs(u - 0.5) < gap), np.nan, y)))
    order[i], order[i + 1] = order[i + 1], order[i]
  return [tuple(np.concatenate(part) for part in zip(*path, strict=True)) for path in paths]


def draw_braid(ax, word: np.ndarray, name: str) -> None:
  """One open braid, read from left to right: letters below, strands numbered at both ends, the move's site shaded."""
  for strand, (x, y) in enumerate(strand_paths(word)):
    end = np.asarray(_permutation(word, STRANDS))[strand]
    ax.plot(x, y, color=COLOURS[strand], lw=3, solid_capstyle="butt")
    for at, row, side in ((-0.2, strand, "right"), (len(word) + 0.2, end, "left")):
      ax.text(at, -row, strand + 1, color=COLOURS[strand], ha=side, va="center", fontsize=12, weight="bold")
  for column, letter in enumerate(word.tolist()):
    label = rf"$\sigma_{abs(letter)}{'^{-1}' if letter < 0 else ''}$"
    ax.text(column + 0.5, -STRANDS + 0.35, label, ha="center", va="center", fontsize=13)
  ax.axvspan(SITE, SITE + 3, color="0.93", lw=0)
  ax.set_title(name, fontsize=13)
  ax.set(xlim=(-0.7, len(word) + 0.7), ylim=(-STRANDS - 0.1, 0.5), aspect="equal")
  ax.axis("off")


def draw_closure(ax, word: np.ndarray) -> None:
  """The closed braid; one colour for each component of the link."""
  permutation, component = np.asarray(_permutation(word, STRANDS)), {}
  for start in range(STRANDS):
    strand, colour = start, len(set(component.values()))
    while strand not in component:
      component[strand] = colour
      strand = int(permutation[strand])
  angle = np.linspace(-np.pi / 2, np.pi / 2, 61)
  for strand, (x, y) in enumerate(strand_paths(word)):
    # The strand leaves at the right, returns above the braid, and enters at its own final position on the left.
    row = int(permutation[strand])
    radius = row + 0.6
    right, left = len(word) + radius * np.cos(angle), -radius * np.cos(angle[::-1])
    turn = 0.6 + radius * np.sin(angle)
    # The first point reaches back a little, so that no seam shows where the strand before it arrives.
    path = np.concatenate([[-0.05], x, right, left]), np.concatenate([y[:1], y, turn, turn[::-1]])
    ax.plot(*path, color=COLOURS[component[strand]], lw=3, solid_capstyle="butt", solid_joinstyle="round")
    ax.annotate(
      "",
      (len(word) / 2 - 0.3, 0.6 + radius),
      (len(word) / 2 + 0.3, 0.6 + radius),
      arrowprops={"arrowstyle": "-|>", "color": COLOURS[component[strand]], "lw": 2},
    )
  ax.set(aspect="equal")
  ax.axis("off")


def low_rank(key: jax.Array):
  """Singular values of σ(a+b), and the error of Chebyshev interpolation, with the predicted rates."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.4), layout="constrained")
  spectrum, interpolation = figure.subplots(1, 2, sharey=True)
  errors = np.stack([interpolation_errors(rank) for rank in RANKS.tolist()], axis=1)
  for bound, error, colour, marker in zip(BOUNDS, errors, COLOURS, "osD", strict=True):
    style = {"color": colour, "marker": marker, "ms": 5, "lw": 0, "label": f"M = {bound:g}"}
    spectrum.semilogy(np.arange(21), singular_values(bound)[:21], **style)
    spectrum.semilogy(additive_gate.sigmoid_rank_bound(np.arange(21), bound), color=colour, lw=1.5, ls="--")
    interpolation.semilogy(RANKS, error, **style)
    rho = float(additive_gate.sigmoid_bernstein_radius(bound))
    interpolation.semilogy(RANKS, rho**-RANKS, color=colour, lw=1.5, ls="--")
  spectrum.set_ylim(1e-13, 10)
  for ax, dashed in ((spectrum, "Zolotarev bound"), (interpolation, r"$\rho^{-r}$")):
    ax.plot([], [], color="0.4", lw=1.5, ls="--", label=dashed)
  styled(spectrum, "singular values of σ(a + b)", "index k", "relative to the largest", "lower left")
  styled(interpolation, "Chebyshev interpolation", "rank r", "largest error", "upper right")
  return figure


DEMO = Demo(
  name="braid",
  summary="sums with additive gates, and what braid words add to them",
  story=story,
  claims=CLAIMS,
  plots=(closure, braid_tasks.tasks, low_rank),
  refs=("Artin 1947", "Burau 1935", "Jones 1985", "Kauffman 1987", "Zaheer et al., 2017, arXiv 1703.06114 (DeepSets)"),
  not_shown=(
    (
      "Time against T, dense, sorted and Chebyshev",
      "needs minutes of a quiet machine and optimised programs: python -m train.bench speed times them",
    ),
    (
      "A trained baseline for the word problem",
      "an experiment, not a demonstration; S₅ is tracked by hand-set letters",
    ),
    ("Recall by content, which additive gates cannot do", "nestedness is the claim; no model is trained on it here"),
    ("Gradients of every mode against the obvious forms", "checked by tests/test_braid.py in double precision"),
    ("Decode states that do not grow, training memory", "checked by tests/test_braid.py"),
    (
      "Measurements of a layer (saturation, mass, letter entropy)",
      "python -m train.main writes them with --probe_every=50",
    ),
  ),
)
