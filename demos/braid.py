"""Braid attention: what the braid group does and does not do in a sum with additive gates."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from mgr_jax.algebra import additive_gate, braid, knots
from mgr_jax.algebra.braid_claims import CLAIMS

STRANDS = 3
# Closes to the knot 5_2; its letters 3 to 5 are a site of the third Reidemeister move.
WORD = np.array([1, 1, 1, 2, -1, 2])
SITE = 2
BOUNDS = (2.0, 4.0, 8.0)
RANKS = np.arange(4, 41, 4)
# Okabe and Ito: told apart with every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


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
    alexander = jax.jit(knots.alexander_coefficients, static_argnums=1)(jnp.asarray(word), STRANDS)
    jones = jax.jit(knots.jones_coefficients, static_argnums=1)(jnp.asarray(word), STRANDS)
    return polynomial_text(np.asarray(alexander)), polynomial_text(np.asarray(jones))


def law_changes(first: np.ndarray, second: np.ndarray, key: jax.Array) -> dict[str, float]:
  """The largest change of a strand state between two words, for each crossing law, in double precision."""
  with jax.enable_x64(True):
    acc, payload = jax.random.normal(key, (2, STRANDS, 1))
    states = {
      "swap": (braid.Strands(acc, payload), braid.swap),
      "Burau, t = 1/2": (payload, braid.burau(0.5)),
      "restricted": (braid.Strands(acc, payload), braid.restricted),
    }
    changes = {}
    for name, (state, law) in states.items():
      one, other = (braid.execute(word, state, law) for word in (first, second))
      changes[name] = max(
        float(jnp.max(jnp.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True)
      )
    return changes


@functools.partial(jax.jit, static_argnums=0)
def interpolation_errors(rank: int) -> jax.Array:
  """max |σ(a+b) - Σ_m ℓ_m(a) σ(x_m+b)| over a grid of |a|, |b| <= M, for each M of `BOUNDS`; wants double precision."""

  def error(bound):
    grid = bound * jnp.linspace(-1, 1, 401)
    nodes = additive_gate.chebyshev_nodes(rank, bound)
    product = additive_gate.chebyshev_features(grid, rank, bound) @ jax.nn.sigmoid(nodes[:, None] + grid)
    return jnp.max(jnp.abs(jax.nn.sigmoid(grid[:, None] + grid) - product))

  return jax.vmap(error)(jnp.array(BOUNDS))


def singular_values(bound: float) -> np.ndarray:
  """Singular values of σ(a+b) on the same grid, over the largest."""
  grid = np.linspace(-bound, bound, 401)
  values = np.linalg.svd(1 / (1 + np.exp(-grid[:, None] - grid)), compute_uv=False)
  return values / values[0]


def tracked(key: jax.Array, words: int, length: int) -> int:
  """How many random S_5 words end right when strands carry labels through them.

  The reference multiplies the transpositions as permutations, pair by pair in a balanced tree.
  """
  letters = jax.vmap(lambda k: braid.random_word(k, length, 5, positive=True))(jax.random.split(key, words))
  states = braid.Strands(jnp.zeros(5, int), jnp.arange(5))
  carried = jax.jit(jax.vmap(lambda word: braid.execute(word, states, braid.swap).payload))(letters)
  index = np.asarray(letters)[..., None]
  product = np.tile(np.arange(5), (words, length, 1))
  np.put_along_axis(product, index - 1, index, axis=-1)
  np.put_along_axis(product, index, index - 1, axis=-1)
  while product.shape[1] > 1:
    if product.shape[1] % 2:
      product = np.concatenate([product, np.tile(np.arange(5), (words, 1, 1))], axis=1)
    product = np.take_along_axis(product[:, ::2], product[:, 1::2], axis=-1)
  return int((np.asarray(carried) == product[:, 0]).all(axis=1).sum())


def remembered(key: jax.Array, t: float) -> float:
  """Spread between the rows of the Burau matrix of 200 random letters on five strands: 1 keeps all, 0 has forgotten."""
  matrix = braid.burau_matrix(braid.random_word(key, 200, 5, positive=True), 5, t)
  return float(jnp.max(jnp.max(matrix, axis=0) - jnp.min(matrix, axis=0)))


def story(key: jax.Array) -> str:
  moved = third_reidemeister(WORD, SITE)
  (alexander, jones), (alexander_moved, jones_moved) = invariants(WORD), invariants(moved)
  same = "the same" if (alexander, jones) == (alexander_moved, jones_moved) else f"{alexander_moved}, {jones_moved}"
  permutation = np.asarray(braid.permutation(WORD, STRANDS)) + 1
  linking = np.asarray(braid.linking_matrix(WORD, STRANDS)).tolist()
  changes = "\n".join(f"      {law:<15} {value:.1e}" for law, value in law_changes(WORD, moved, key).items())
  words, length = 64, 10_000
  right = tracked(key, words, length)
  memory = ", ".join(f"{remembered(key, t):.2g} at t = {t:g}" for t in (1.0, 0.99, 0.6))
  with jax.enable_x64(True):
    few, many = interpolation_errors(12), interpolation_errors(24)
  errors = "\n".join(
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
    permutation {permutation.tolist()}, writhe {int(braid.writhe(WORD))}, crossing numbers n_ab {linking}
    Δ(t) = {alexander}
    V(t) = {jones};  of β': {same}
    largest change of the strands from β to β':
{changes}
    The restricted law is no representation. Swap is one, yet sees only the permutation and n_ab.

Words as a memory
    S₅: {right} of {words} random words of length {length:,} end in the right permutation (chance: 1 in 120)
    Burau forgets: row spread after 200 letters {memory}

Soft gates have low rank: error of Chebyshev interpolation of σ(a + b), |a|, |b| <= M
{errors}
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
    end = np.asarray(braid.permutation(word, STRANDS))[strand]
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
  permutation, component = np.asarray(braid.permutation(word, STRANDS)), {}
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
  with jax.enable_x64(True):
    errors = np.stack([interpolation_errors(rank) for rank in RANKS.tolist()], axis=1)
    for bound, error, colour, marker in zip(BOUNDS, errors, COLOURS[:3], "osD", strict=True):
      label = f"M = {bound:g}"
      style = {"color": colour, "marker": marker, "ms": 5, "lw": 0, "label": label}
      values = singular_values(bound)[:21]
      spectrum.semilogy(np.arange(21), values, **style)
      spectrum.semilogy(additive_gate.sigmoid_rank_bound(np.arange(21), bound), color=colour, lw=1.5, ls="--")
      interpolation.semilogy(RANKS, error, **style)
      rho = float(additive_gate.sigmoid_bernstein_radius(bound))
      interpolation.semilogy(RANKS, rho**-RANKS, color=colour, lw=1.5, ls="--")
  spectrum.set(
    xlabel="index k", ylabel="relative to the largest", title="singular values of σ(a + b)", ylim=(1e-13, 10)
  )
  interpolation.set(xlabel="rank r", ylabel="largest error", title="Chebyshev interpolation")
  for ax, dashed in ((spectrum, "Zolotarev bound"), (interpolation, r"$\rho^{-r}$")):
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=12)
    ax.xaxis.label.set_size(13)
    ax.yaxis.label.set_size(13)
    ax.title.set_size(13)
    ax.plot([], [], color="0.4", lw=1.5, ls="--", label=dashed)
    ax.legend(frameon=False, fontsize=11, handletextpad=0.4)
  return figure


DEMO = Demo(
  name="braid",
  summary="sums with additive gates, and what braid words add to them",
  story=story,
  claims=CLAIMS,
  plots=(closure, low_rank),
  refs=("Artin 1947", "Burau 1935", "Jones 1985", "Kauffman 1987"),
)
