"""Octonions: where the brackets matter, why 29 sums are enough, and which symmetries remain."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from mgr_jax.algebra import octonion_symmetry as symmetry
from mgr_jax.algebra.octonion_claims import generator
from mgr_jax.algebra.octonion_mixing_claims import CLAIMS, singular_values, trilinear
from mgr_jax.algebra.octonions import PAIRS, SIGNS, associator, multiply
from mgr_jax.attention import resolve
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt

# Okabe and Ito: told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
FORMS = {"softmax": "standard", "q(k̄v)": "octonion(bracketing=late)", "(q k̄)v": "octonion"}
WIDTHS = {"softmax": 8, "q(k̄v)": 8, "(q k̄)v": 29}


def sign_rows() -> str:
  """The table of signs, eight lines."""
  return "\n".join("    " + f"e{a}  " + "  ".join("-+"[int(s > 0)] for s in row) for a, row in enumerate(SIGNS))


def oriented_lines() -> list[tuple[int, int, int]]:
  """The seven lines of the Fano plane, each a quaternion algebra: e_a e_b = e_c, cyclically."""
  found = {frozenset((a, b, a ^ b)): (a, b, a ^ b) for a, b in PAIRS if a and SIGNS[a, b] > 0}
  return sorted(found.values())


def covariance(rng: np.random.Generator) -> dict[str, tuple[float, float]]:
  """Residuals of (q k̄)v and q(k̄v) when q, k and v are all moved by one orthogonal map."""
  u = symmetry.unit_imaginary(rng)
  maps = {
    "automorphism (G₂)": symmetry.random_automorphism(rng),
    "left multiplication by u": symmetry.left_matrix(u),
    "the same, Re u = 0.6": symmetry.left_matrix(0.6 * np.eye(8)[0] + 0.8 * u),
    "right multiplication by u": symmetry.right_matrix(u),
    "any rotation (SO(8))": symmetry.random_rotation(rng),
  }
  triple = rng.standard_normal((3, 8, 200))
  return {
    n: tuple(symmetry.covariance_residual(m, g, triple) for m in (symmetry.early, symmetry.late))
    for n, g in maps.items()
  }


def associator_size(rng: np.random.Generator, inside: bool) -> float:
  """Mean |[q, k̄, v]|² for random unit octonions, or for those of one quaternion algebra."""
  x = rng.standard_normal((3, 8, 20_000)) * (np.arange(8) < (4 if inside else 8))[:, None]
  return float(np.mean(np.sum(np.square(associator(*(x / np.linalg.norm(x, axis=1, keepdims=True)))), 0)))


def forward_cost(form: str, T: int) -> tuple[float, float]:
  """Milliseconds (least of five) and temporary MB of the forward pass, one layer of four heads of 16, batch 8."""
  cfg = GPTConfig(vocab_size=2, seq_len=T, n_layer=1, n_head=4, n_kv_head=4, n_embd=64, attention=FORMS[form])
  layer = resolve(cfg)[0]
  specs = layer.mechanism.param_specs(cfg, layer.options)
  params = {name: 0.1 * spec.draw(jax.random.key(0)) + 0.01 for name, spec in specs.items()}
  x = jax.random.normal(jax.random.key(1), (8, T, 64))

  def forward(params, x):
    return layer.mechanism.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, layer.options)[0]

  program = jax.jit(forward).lower(params, x).compile()
  seconds = []
  for _ in range(6):
    start = time.perf_counter()
    jax.block_until_ready(program(params, x))
    seconds.append(time.perf_counter() - start)
  return 1e3 * min(seconds[1:]), program.memory_analysis().temp_size_in_bytes / 1e6


def story(key: jax.Array) -> str:
  rng = generator(key)
  e = np.eye(8)
  left, right = (int(m[7]) for m in (multiply(multiply(e[1], e[2]), e[4]), multiply(e[1], multiply(e[2], e[4]))))
  size, inside = associator_size(rng, False), associator_size(rng, True)
  lines = ", ".join("".join(map(str, line)) for line in oriented_lines())
  values = singular_values(trilinear()["early"])
  steps = ", ".join(f"{np.sum(np.abs(values - s) < 1e-9)} of {s}" for s in (8, 4, 0))
  ranks = {name: int(np.sum(singular_values(tensor) > 1e-9)) for name, tensor in trilinear().items()}
  ladder = "\n".join(f"    {name:<28}{a:12.0e}{b:12.0e}" for name, (a, b) in covariance(rng).items())
  T = 256
  costs = "\n".join(
    f"    {form:<18}{8 + WIDTHS[form]:>12}" + "{:>10.1f}{:>10.1f}".format(*forward_cost(form, T)) for form in FORMS
  )
  pairs = 4 * 8 * 4 * T**2 * 16 / 1e6
  return f"""\
What it is. A head is cut into octonions, pairs of quaternions multiplied by one more doubling.
Query, key and value meet as q k⁻¹ v, with softmax weights. Octonions do not associate, so there are
two readings, (q k̄)v and q(k̄v), which differ by the associator [q, k̄, v].

Signs of e_a e_b = ±e_(a xor b), one row for each a
{sign_rows()}
    Lines of the Fano plane, e_a e_b = e_c in cyclic order: {lines}

Brackets matter. (e1 e2)e4 = {left:+d} e7, but e1(e2 e4) = {right:+d} e7. For random unit octonions
    |[q, k̄, v]|² is {size:.3f} on average (21/16 = {21 / 16:.3f}), and |(q k̄)v|² = 1; for quaternions {inside:.0e}.

The price of brackets. q(k̄v) is attention over the values k̄v, as cheap as softmax. (q k̄)v looks
as if every pair had to be multiplied. It is an operator on q, though, which depends on k and v
alone: ⟨k, v⟩ times the identity plus a skew matrix. Sums of operators are operators, so one pass
over the 1 + 28 numbers that describe them does it.
    Singular values of the map from k ⊗ v to operators: {steps}
    Dimensions spanned: {ranks["early"]} for (q k̄)v, {ranks["late"]} for q(k̄v), {ranks["associator"]} for the associator

Forward pass of one layer, T = {T}, batch 8; multiply-adds per pair and octonion
                       per pair        ms        MB
{costs}
    {"(q k̄)v, pairwise":<18}{8 + 136:>12}         -{pairs:>10.1f}   for q k̄ alone

What remains of symmetry, as residuals when one map moves q, k and v
                                   (q k̄)v      q(k̄v)
{ladder}
    Unit imaginary u generate Spin(7), 21 of the 28 dimensions of SO(8), differently for the two
    readings; both share the 14 of G₂. Quaternions keep three commuting copies of SU(2).
    One loss is practical. Position cannot enter through q and k on the right, as it can for
    quaternions, so only scores are rotated.

What it is not. Each term keeps the length of its value, but their weighted sum does not. Whether a
model is better for it is a question for train.experiment octonion_words, not for this page.
"""


def fano_plane(key: jax.Array):
  """The seven lines of imaginary units, arrows along e_a e_b = e_c, and singular values of (q k̄)v."""
  from matplotlib.figure import Figure

  del key
  figure = Figure(figsize=(7.4, 3.6), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
  lines = oriented_lines()
  # Corners, the middles of the sides between them, and the centre; the circle through the middles is the last line.
  corner = {1: (0, 1), 2: (-np.sqrt(3) / 2, -0.5), 4: (np.sqrt(3) / 2, -0.5)}
  place = {n: np.array(p) for n, p in corner.items()}
  place |= {a ^ b: (place[a] + place[b]) / 2 for a, b in ((1, 2), (1, 4), (2, 4))} | {7: np.zeros(2)}
  arrow = {"arrowstyle": "-|>", "color": BLUE, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
  for line in lines:
    points = [place[i] for i in line]
    if set(line) == {3, 5, 6}:
      angle = np.linspace(0, 2 * np.pi, 100)
      left.plot(np.cos(angle) / 2, np.sin(angle) / 2, color=BLUE, lw=1.6)
      turn = np.sign(np.linalg.det(np.stack(points[:2])))
      for p in points:
        tip = 0.5 * _rotated(p / np.linalg.norm(p), turn * 1.1)
        left.annotate("", tip, 0.5 * _rotated(p / np.linalg.norm(p), turn * 0.95), arrowprops=arrow)
      continue
    # The middle point of the drawn segment; arrows run through it in the order of the product.
    middle = min(
      range(3), key=lambda i: np.linalg.norm(points[i] - points[i - 1]) + np.linalg.norm(points[i] - points[i - 2])
    )
    a, b, c = (points[(middle + i) % 3] for i in (-1, 0, 1))
    left.plot(*np.stack([a, c]).T, color=BLUE, lw=1.6)
    for start, end in ((a, b), (b, c)):
      left.annotate("", start + 0.62 * (end - start), start + 0.5 * (end - start), arrowprops=arrow)
  for n, p in place.items():
    left.plot(*p, "o", ms=22, color="white", mec=BLUE, mew=1.6)
    left.text(*p, f"$e_{n}$", ha="center", va="center", fontsize=13)
  left.set(aspect="equal", xlim=(-1.1, 1.1), ylim=(-0.75, 1.2))
  left.axis("off")
  left.set_title("$e_a e_b = e_c$ along the arrows", fontsize=13)
  for name, colour, marker in (("early", BLUE, "o"), ("late", ORANGE, "s"), ("associator", GREEN, "D")):
    values = singular_values(trilinear()[name])
    label = {"early": "$(q\\bar{k})v$", "late": "$q(\\bar{k}v)$", "associator": "difference"}[name]
    right.plot(np.arange(1, 65), values, marker, ms=4, mfc="none", color=colour, label=label)
  right.set(xlabel="number", ylabel="singular value", title="from $k \\otimes v$ to operators on $q$")
  right.legend(frameon=False, fontsize=12)
  _plain(right)
  return figure


def _rotated(p, angle):
  return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ p


def _plain(ax):
  ax.spines[["top", "right"]].set_visible(False)
  ax.tick_params(labelsize=12)
  for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
    text.set_size(13)


def symmetries(key: jax.Array):
  """Residuals of five maps for both readings, and how the associator of random units is distributed."""
  from matplotlib.figure import Figure

  rng = generator(key)
  figure = Figure(figsize=(7.4, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
  found = covariance(rng)
  rows = np.arange(len(found))
  for i, (label, colour) in enumerate((("$(q\\bar{k})v$", BLUE), ("$q(\\bar{k}v)$", ORANGE))):
    left.barh(
      rows + 0.2 * (2 * i - 1), [r[i] for r in found.values()], height=0.36, left=1e-17, color=colour, label=label
    )
  left.set(xscale="log", xlim=(1e-17, 10), xlabel="residual", title="symmetry or not")
  left.set_yticks(rows, list(found))
  left.invert_yaxis()
  left.legend(frameon=False, fontsize=11, loc="upper right")
  x = rng.standard_normal((3, 8, 20_000))
  size = np.linalg.norm(associator(*(x / np.linalg.norm(x, axis=1, keepdims=True))), axis=0)
  right.hist(size, np.linspace(0, 2, 41), density=True, color=GREEN)
  right.set(xlabel="$|[q, \\bar{k}, v]|$", ylabel="density", title="random units")
  for ax in (left, right):
    _plain(ax)
  return figure


DEMO = Demo(
  name="octonion",
  summary="products that depend on their brackets, and what the brackets cost",
  story=story,
  claims=CLAIMS,
  plots=(fano_plane, symmetries),
  refs=("Baez, 2002, arXiv math/0105155",),
)
