"""Octonions: where the brackets matter, why 29 sums are enough, and which symmetries remain."""

import functools
import time
import tracemalloc

import jax
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import octonion_symmetry as symmetry
from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.algebra.octonion_mixing_claims import CLAIMS, singular_values, trilinear
from mgr_jax.algebra.octonions import BLOCKS, PAIRS, SIGNS, act, conjugate, multiply, operator, wedge

EARLY, LATE = "$(q\\bar{k})v$", "$q(\\bar{k}v)$"
WIDTHS = {"each pair": 136, "64 sums": 64, "29 sums": 29, "q(k̄v), 8 sums": 8}


def sign_rows() -> str:
  """The table of signs, eight lines."""
  return "\n".join("    " + f"e{a}  " + "  ".join("-+"[int(s > 0)] for s in row) for a, row in enumerate(SIGNS))


def oriented_lines() -> list[tuple[int, int, int]]:
  """The seven lines of the Fano plane, each a quaternion algebra: e_a e_b = e_c, cyclically."""
  found = {frozenset((a, b, a ^ b)): (a, b, a ^ b) for a, b in PAIRS if a and SIGNS[a, b] > 0}
  # The smallest unit first.
  return sorted(line[line.index(min(line)) :] + line[: line.index(min(line))] for line in found.values())


def ladder(rng: np.random.Generator) -> dict[str, tuple[float, float, float]]:
  """Residuals of q k̄ v for quaternions, of (q k̄)v and of q(k̄v), when q, k and v are moved; NaN where it does not apply.

  Quaternions, as octonions (a, 0), move by gqh, gkh, gvr to g m r, octonions by one orthogonal map.
  """
  u = symmetry.unit_imaginary(rng)
  triple = rng.standard_normal((3, 8, 200))
  inside = np.arange(8) < 4
  q, k, v = triple * inside[:, None]
  g, h, r = (x[:, None] / np.linalg.norm(x) for x in rng.standard_normal((3, 8)) * inside)
  times = lambda *xs: functools.reduce(lambda a, b: np.stack(multiply(a, b)), xs)
  moved = symmetry.early(times(g, q, h), times(g, k, h), times(g, v, r))
  found = {
    "gqh, gkh, gvr: SU(2)³ (9)": (float(np.max(np.abs(moved - times(g, symmetry.early(q, k, v), r)))),) + 2 * (np.nan,)
  }
  maps = {
    "automorphism: G₂ (14)": symmetry.random_automorphism(rng),
    "u·, Re u = 0: Spin(7) (21)": symmetry.left_matrix(u),
    "·u, Re u = 0: Spin(7) (21)": symmetry.right_matrix(u),
    "u·, Re u = 0.6": symmetry.left_matrix(0.6 * np.eye(8)[0] + 0.8 * u),
    "any rotation: SO(8) (28)": symmetry.random_rotation(rng),
  }
  for name, map_ in maps.items():
    readings = (symmetry.early, symmetry.late)
    found[name] = (np.nan, *(symmetry.covariance_residual(m, map_, triple) for m in readings))
  return found


def associator_share(rng: np.random.Generator, keys: int, inside: bool = False) -> tuple[float, float]:
  """Σ p|[q, k̄, v]|² / Σ p|m|² over random weights of `keys` keys, and |Σ p [q, k̄, v]|² / |Σ p (q k̄)v|².

  q, k and v are random units, or those of one quaternion algebra.
  """
  x = rng.standard_normal((3, 8, 2000, keys)) * (np.arange(8) < (4 if inside else 8))[:, None, None]
  q, k, v = x / np.linalg.norm(x, axis=1, keepdims=True)
  q = np.broadcast_to(q[..., :1], q.shape)
  p = rng.dirichlet(np.ones(keys), 2000)
  early, late = symmetry.early(q, k, v), symmetry.late(q, k, v)
  energy = lambda y: np.sum(y * y, 0)
  each = np.sum(p * energy(early - late)) / np.sum(p * energy(early))
  total = np.sum(energy(np.sum(p * (early - late), -1))) / np.sum(energy(np.sum(p * early, -1)))
  return float(each), float(total)


def weights(T: int) -> np.ndarray:
  """Equal weights of all tokens so far [T, T]."""
  return np.tri(T) / np.arange(1, T + 1)[:, None]


def mixed(way: str, p: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Σ_s p_ts m(q_t, k_s, v_s) [8, T, N] for weights [T, T] and octonions [8, T, N], by one of `WIDTHS`."""
  _, T, N = q.shape
  # einsum, not a matrix product: libraries of those take threads, which a busy machine makes wait.
  summed = lambda parts: list(np.einsum("ts,sf->tf", p, np.concatenate(parts, -1)).reshape(T, -1, N).swapaxes(0, 1))
  if way == "each pair":
    pairs = multiply(multiply(q[:, :, None], conjugate(k[:, None])), v[:, None])
    return np.stack([np.einsum("ts,tsn->tn", p, m) for m in pairs])
  if way == "64 sums":
    sums = summed([a * b for a in k for b in v])
    operators = np.einsum("oqm,mtn->oqtn", trilinear()["early"].reshape(8, 8, 64).astype(q.dtype), np.stack(sums))
    return np.einsum("oqtn,qtn->otn", operators, q)
  if way == "29 sums":
    return np.stack(act(summed(operator(wedge(k, v))), q))
  return np.stack(multiply(q, summed(multiply(conjugate(k), v))))


def cost(rng: np.random.Generator, T: int, way: str) -> tuple[float, float]:
  """Milliseconds (least of three) and peak MB of `mixed` in NumPy, one head of 16 in float32, weights given."""
  q, k, v = rng.standard_normal((3, 8, T, 2), np.float32)
  p = weights(T).astype(np.float32)
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    mixed(way, p, q, k, v)
    seconds.append(time.perf_counter() - start)
  tracemalloc.start()
  mixed(way, p, q, k, v)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return 1e3 * min(seconds), peak / 1e6


def story(key: jax.Array) -> str:
  rng = generator(key)
  e = np.eye(8)
  left, right = (int(m[7]) for m in (multiply(multiply(e[1], e[2]), e[4]), multiply(e[1], multiply(e[2], e[4]))))
  (each, total), (inside, _) = associator_share(rng, 8), associator_share(rng, 8, True)
  lines = ", ".join("".join(map(str, line)) for line in oriented_lines())
  values = singular_values(trilinear()["early"])
  steps = ", ".join(f"{np.sum(np.abs(values - s) < 1e-9)} of {s}" for s in (8, 4, 0))
  ranks = {name: int(np.sum(singular_values(tensor) > 1e-9)) for name, tensor in trilinear().items()}
  number = lambda r: f"{'-' if np.isnan(r) else f'{r:.0e}':>12}"
  rungs = "\n".join(f"    {name:<32}" + "".join(map(number, row)) for name, row in ladder(rng).items())
  T = 256
  p, x = weights(T), rng.standard_normal((3, 8, T, 2))
  same = [mixed(way, p, *x) for way in list(WIDTHS)[:3]]
  agreement = max(np.max(np.abs(y - same[0])) for y in same) / np.max(np.abs(same[0]))
  costs = "\n".join(
    f"    {way:<20}{WIDTHS[way]:>12}" + "{:>12.1f}{:>10.2f}".format(*cost(rng, T, way)) for way in WIDTHS
  )
  return f"""\
What it is. A head is cut into octonions, pairs of quaternions multiplied by one more doubling.
Query, key and value meet as q k⁻¹ v, with softmax weights. Octonions do not associate, so there are
two readings, (q k̄)v and q(k̄v), which differ by the associator [q, k̄, v].

Signs of e_a e_b = ±e_(a xor b), one row for each a
{sign_rows()}
    Lines of the Fano plane, e_a e_b = e_c in cyclic order: {lines}

Brackets matter. (e1 e2)e4 = {left:+d} e7, but e1(e2 e4) = {right:+d} e7. For random unit octonions the
    associator has {each:.3f} times the energy of the products (in theory 21/16 = {21 / 16:.4f}), and after
    summing over 8 keys {total:.2f} times that of the output; for quaternions {inside:.0e}.

Where 29 comes from. q(k̄v) is attention over the values k̄v, as cheap as softmax. (q k̄)v looks as
if every pair had to be multiplied. It is an operator on q, though, which depends on k and v alone:
⟨k, v⟩ times the identity plus a skew matrix. Sums of operators are operators, so one pass over the
1 + 28 numbers that describe them does it.
    Singular values of the map from k ⊗ v to operators: {steps}
    Dimensions spanned: {ranks["early"]} for (q k̄)v, {ranks["late"]} for q(k̄v), {ranks["associator"]} for the associator

Four ways to mix {T} tokens, one head of 16, in NumPy; multiply-adds per pair and octonion
                           per pair          ms        MB
{costs}
    The first three agree to {agreement:.0e} of the largest number. All need the scores too, 8 per pair.

What remains of symmetry: residuals when q, k and v are moved; in brackets dimensions of groups
                                     quaternions      (q k̄)v      q(k̄v)
{rungs}
    Unit imaginary u generate Spin(7), differently for the two readings; both share G₂.
    One loss is practical. For quaternions h changes nothing, so position can enter through it, by
    products on the right; for octonions it cannot, and only scores are rotated.

What it is not. Each term keeps the length of its value, but their weighted sum does not. Whether a
model is better for it is a question for train.experiment octonion_words, not for this page.
"""


def fano_plane(key: jax.Array):
  """The seven lines of imaginary units, with arrows along e_a e_b = e_c."""
  from matplotlib.figure import Figure

  del key
  figure = Figure(figsize=(5.2, 4.6), layout="constrained")
  ax = figure.subplots()
  # Corners, the middles of the sides between them, and the centre; the circle through the middles is the last line.
  corner = {1: (0, 1), 2: (-np.sqrt(3) / 2, -0.5), 4: (np.sqrt(3) / 2, -0.5)}
  place = {n: np.array(p) for n, p in corner.items()}
  place |= {a ^ b: (place[a] + place[b]) / 2 for a, b in ((1, 2), (1, 4), (2, 4))} | {7: np.zeros(2)}
  for line in oriented_lines():
    points = [place[i] for i in line]
    # One colour for sides, one for what passes through the centre, one for the circle.
    colour = GREEN if set(line) == {3, 5, 6} else ORANGE if 7 in line else BLUE
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.8, "mutation_scale": 18, "shrinkA": 0, "shrinkB": 0}
    if set(line) == {3, 5, 6}:
      angle = np.linspace(0, 2 * np.pi, 100)
      ax.plot(np.cos(angle) / 2, np.sin(angle) / 2, color=colour, lw=1.8)
      turn = np.sign(np.linalg.det(np.stack(points[:2])))
      for p in points:
        # At a third of the arc, clear of the lines through the centre.
        start, end = (_rotated(p, turn * at) for at in (0.62, 0.74))
        ax.annotate("", end, start, arrowprops=arrow)
      continue
    # The middle point of the drawn segment; arrows run through it in the order of the product.
    middle = min(
      range(3), key=lambda i: np.linalg.norm(points[i] - points[i - 1]) + np.linalg.norm(points[i] - points[i - 2])
    )
    a, b, c = (points[(middle + i) % 3] for i in (-1, 0, 1))
    ax.plot(*np.stack([a, c]).T, color=colour, lw=1.8)
    for start, end in ((a, b), (b, c)):
      ax.annotate("", start + 0.6 * (end - start), start + 0.4 * (end - start), arrowprops=arrow)
  for n, p in place.items():
    ax.plot(*p, "o", ms=26, color="white", mec="black", mew=1.4, zorder=3)
    ax.text(*p, f"$e_{n}$", ha="center", va="center", fontsize=15, zorder=4)
  ax.set(aspect="equal", xlim=(-1.05, 1.05), ylim=(-0.68, 1.15))
  ax.axis("off")
  ax.set_title("$e_a e_b = e_c$ along the arrows", fontsize=14)
  return figure


def _rotated(p, angle):
  return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ p


def where_29_comes_from(key: jax.Array):
  """Singular values of the 64x64 flattening of both readings and of their difference; the signs of the 28 others."""
  from matplotlib.figure import Figure

  del key
  figure = Figure(figsize=(7.6, 4.2), layout="constrained")
  left, right = figure.subfigures(1, 2, width_ratios=(1.45, 1))
  axes = left.subplots(3, 1, sharex=True)
  labels = {"early": (EARLY, BLUE), "late": (LATE, ORANGE), "associator": ("difference", GREEN)}
  for ax, (name, (label, colour)) in zip(axes, labels.items(), strict=True):
    values = singular_values(trilinear()[name])
    rank = int(np.sum(values > 1e-9))
    ax.bar(np.arange(1, 65), values, width=0.75, color=colour)
    ax.set(xlim=(0, 65), ylim=(0, 9.5), yticks=(0, 4, 8))
    ax.text(64.5, 8.8, f"{label}: rank {rank}", ha="right", va="top", fontsize=13, color=colour)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=12)
  axes[1].set_ylabel("singular value", fontsize=13)
  axes[2].set_xlabel("number, of 64", fontsize=13)
  left.suptitle("from $k \\otimes v$ to operators on $q$", fontsize=13)
  H = np.zeros((28, 28))
  for row, terms in enumerate(BLOCKS):
    for sign, i in terms:
      H[row, i] = sign
  # Grouped by a xor b: seven blocks.
  order = sorted(range(28), key=lambda i: (PAIRS[i][0] ^ PAIRS[i][1], PAIRS[i]))
  ax = right.subplots()
  at = np.argwhere(H[np.ix_(order, order)])
  signs = H[np.ix_(order, order)][tuple(at.T)]
  for sign, colour, marker in ((1, BLUE, "s"), (-1, ORANGE, "s")):
    y, x = at[signs == sign].T
    ax.plot(x, y, marker, ms=5.2, color=colour, mec="none", label=f"{sign:+d}")
  ax.set(aspect="equal", xlim=(-1, 28), ylim=(28, -1), xticks=(0, 27), yticks=(0, 27))
  ax.set_xticklabels((1, 28))
  ax.set_yticklabels((1, 28))
  styled(ax, "the 28 skew entries", "$k_a v_b - k_b v_a$", "entry of the matrix", None)
  ax.legend(frameon=False, fontsize=12, loc="upper right", handletextpad=0.1)
  return figure


def four_ways(key: jax.Array):
  """Time and memory of mixing by pairs, by 64, 29 and 8 sums, against the number of tokens, with their slopes."""
  from matplotlib.figure import Figure

  rng = generator(key)
  figure = Figure(figsize=(7.6, 3.9), layout="constrained")
  axes = figure.subplots(1, 2)
  time_axis, memory_axis = axes
  for way, colour, marker in zip(WIDTHS, (PINK, GREEN, BLUE, ORANGE), "v^os", strict=True):
    lengths = (64, 128, 256) if way == "each pair" else (64, 128, 256, 512)
    ms, megabytes = np.array([cost(rng, T, way) for T in lengths]).T
    slope = np.polyfit(np.log(lengths[-3:]), np.log(megabytes[-3:]), 1)[0]
    time_axis.loglog(lengths, ms, marker=marker, ms=6, color=colour, label=way)
    memory_axis.loglog(lengths, megabytes, marker=marker, ms=6, color=colour, label=f"{way}: slope {slope:.1f}")
  for ax, title, label in zip(axes, ("time", "memory beside the weights"), ("ms", "MB"), strict=True):
    ax.set_xticks((64, 128, 256, 512), ("64", "128", "256", "512"))
    ax.minorticks_off()
    styled(ax, title, "tokens", label, None)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.5)
    ax.legend(frameon=False, fontsize=11, loc="upper left")
  return figure


def symmetries(key: jax.Array):
  """Residuals of six maps, for quaternions and for both readings."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  ax = figure.subplots()
  found = ladder(generator(key))
  rows = np.arange(len(found))
  for i, (label, colour) in enumerate((("quaternions", GREEN), (EARLY, BLUE), (LATE, ORANGE))):
    shift = 0.2 * (2 * i - 3) if i else 0.0
    residual = np.array([r[i] for r in found.values()])
    ax.barh(rows + shift, residual, height=0.36, left=1e-17, color=colour, label=label)
  ax.set(xscale="log", xlim=(1e-17, 1e4))
  ax.set_xticks((1e-16, 1e-12, 1e-8, 1e-4, 1))
  ax.set_yticks(rows, list(found))
  ax.invert_yaxis()
  styled(ax, "does the mixing move along?", "residual (rounding: yes)", "", "upper right")
  return figure


DEMO = Demo(
  name="octonion",
  summary="products that depend on their brackets, and what the brackets cost",
  story=story,
  timed=True,
  claims=CLAIMS,
  plots=(fano_plane, where_29_comes_from, four_ways, symmetries),
  refs=("Baez, 2002, arXiv math/0105155",),
  not_shown=(
    ("the associator of trained heads", "a training run writes associator_energy: train.main --probe_every=100"),
    ("whether octonions help to multiply octonions", "minutes: python -m train.experiment octonion_words"),
    ("speed of a whole layer", "needs a quiet machine: python -m train.bench speed --attention=octonion"),
    ("gradients, bfloat16, memory of the gradient, zero blocks", "checked by tests/test_octonion.py"),
    ("other options than the default", "tests/test_conformance.py runs the claims on variants"),
  ),
)
