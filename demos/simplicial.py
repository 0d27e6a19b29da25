"""Simplicial complexes: boundaries, holes, flows, and what pairs of tokens can and cannot say."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from mgr_jax.algebra import hodge, homology, mixer, simplicial
from mgr_jax.algebra.simplicial_claims import CLAIMS, SPACES
from mgr_jax.algebra.trilinear import mutual_information
from mgr_jax.attention.simplicial_form_claims import MODULUS, match3_head, match3_temperature, planted_triples

ROWS, COLUMNS = 6, 8
# Okabe and Ito: told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def group_text(rank: int, torsion: tuple[int, ...]) -> str:
  """ℤ² ⊕ ℤ/2 and the like."""
  free = ("ℤ" if rank == 1 else f"ℤ{str(rank).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}",) if rank else ()
  return " ⊕ ".join((*free, *(f"ℤ/{d}" for d in torsion))) or "0"


def betti_table() -> str:
  """One line per space: simplices, χ, Betti numbers over two fields, and H_1 over the integers."""
  rows = [("space", "simplices", "χ", "β over ℚ", "β over 𝔽₂", "H₁(ℤ)")]
  numbers = lambda values: " ".join(map(str, values))
  for name, (make, *_) in SPACES.items():
    complex_ = make()
    rational, binary = (homology.betti_numbers(complex_, field) for field in ("Q", "F2"))
    first = group_text(rational[1], homology.torsion(complex_, 1))
    chi = str(homology.euler_characteristic(complex_))
    rows.append((name, numbers(complex_.sizes), chi, numbers(rational), numbers(binary), first))
  widths = [max(len(row[i]) for row in rows) for i in range(6)]
  return "\n".join("    " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@functools.cache
def surface() -> simplicial.Complex:
  return simplicial.grid_torus(ROWS, COLUMNS)


@functools.cache
def flow_parts() -> dict[str, np.ndarray]:
  """One unit sent along one path on the torus, edge by edge, and the Hodge parts of that flow."""
  complex_ = surface()
  D1, D2 = (simplicial.boundary(complex_, k) for k in (1, 2))
  vertices = [COLUMNS + c for c in range(1, 7)] + [r * COLUMNS + 6 for r in range(2, 5)]
  index, flow = complex_.index(1), np.zeros(complex_.size(1))
  for a, b in itertools.pairwise(vertices):
    flow[index[min(a, b), max(a, b)]] = 1 if a < b else -1
  with jax.enable_x64(True):
    p, h, q = hodge.hodge_decompose(complex_, jnp.asarray(flow), 1)
    parts = {"flow": flow, "gradient": D1.transpose(p), "curl": D2.apply(q), "harmonic": h}
    return {name: np.asarray(part) for name, part in parts.items()}


def energies() -> str:
  """Σ x² of each part, and their sum over the energy of the flow."""
  energy = {name: float(np.sum(part**2)) for name, part in flow_parts().items()}
  total = energy.pop("flow")
  shares = ",  ".join(f"{name} {value:.2f}" for name, value in energy.items())
  return f"{shares};  sum {sum(energy.values()):.2f} of {total:.2f}"


def ring(key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Noisy points on a circle, and their distances."""
  turn, noise = jax.random.split(key)
  angles = 2 * np.pi * (np.arange(28) + np.asarray(jax.random.uniform(turn, (28,)))) / 28
  points = np.stack([np.cos(angles), np.sin(angles)], axis=1) + 0.08 * np.asarray(jax.random.normal(noise, (28, 2)))
  return points, np.sqrt(np.sum(np.square(points[:, None] - points), axis=-1))


def mixed_masses(key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Mass on vertices, edges and triangles of the torus before and after three layers of the mixer."""
  complex_ = surface()
  keys = jax.random.split(key, complex_.dim + 2)
  params = mixer.init_mixer(keys[0], 3, complex_.dim + 1, 4)
  features = tuple(jax.random.normal(k, (n, 4)) for k, n in zip(keys[1:], complex_.sizes, strict=True))
  before = mixer.Levels(features, tuple(jnp.ones(n) for n in complex_.sizes))
  after = jax.jit(mixer.mix)(params, before, simplicial.boundaries(complex_))
  totals = lambda state: np.array([float(jnp.sum(m)) for m in state.masses])
  return totals(before), totals(after)


def heads(key: jax.Array, cases: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
  """Planted pairs [cases, 2], and the weights [cases, i, j] of a three-way and of a pairwise hand-built head."""
  x, pairs = planted_triples(np.random.default_rng(np.asarray(jax.random.key_data(key))), cases)
  weights = (match3_head(x, match3_temperature(), pairwise)[..., ::-1] for pairwise in (False, True))
  return pairs, tuple(weights)


def pair_lines(key: jax.Array) -> str:
  """For both heads, the mass on the planted pair and the mutual information of its two tokens."""
  pairs, weights = heads(key, 100)
  (i, j), rows, lines = pairs.T, np.arange(100), []
  for name, weight in zip(("three-way", "pairwise"), weights, strict=True):
    first = weight.shape[2] - weight.shape[1]  # the windows end at the query and may differ in length
    mass = weight[rows, i, j + first] + weight[rows, j, i + first]
    nats = float(np.mean(np.asarray(mutual_information(weight))))
    lines.append(f"    {name:<10} mass on the pair {mass.mean():.3f}, mutual information {nats:.3f} nats")
  return "\n".join(lines)


def story(key: jax.Array) -> str:
  loops = homology.persistence(ring(key)[1])[1]
  lengths = np.sort(loops.death - loops.birth)[::-1]
  second = f"the next longest {lengths[1]:.2f}" if len(lengths) > 1 else "there is no other"
  before, after = mixed_masses(key)
  masses = lambda m: " + ".join(f"{x:.1f}" for x in m) + f" = {m.sum():.3f}"
  return f"""\
What it is. A simplex is a set of tokens: a pair is an edge, a triple a triangle. The boundary of a
boundary is zero, ∂∂ = 0, and from this alone follow the number of holes of every dimension,
the split of a flow into three parts, and heat flow that stops at the holes.

What it is not. Two steps of pairwise attention, A(Av), contain no triangle: each weight is a sum of
products of pairs. None of the laws below says that a language model gains from triangles.

Holes, exactly, by elimination over two fields
{betti_table()}
    Where the two fields differ there is torsion: a loop that bounds nothing, though twice it does.

One head, three tokens: 100 rows where one pair of earlier tokens completes the query to 0 mod {MODULUS}
{pair_lines(key)}

One unit sent along one path on a torus of {ROWS} x {COLUMNS} squares, split into three parts (energies)
    {energies()}
    The gradient is what a battery would drive between the ends. The harmonic part has no source and
    no whirl: it goes around a hole, and no local look finds it.

Holes of a cloud: {len(ring(key)[0])} noisy points on a circle, joined at growing distance
    the longest loop lives for {lengths[0]:.2f}, {second}

A mixer that conserves mass, three layers on the torus, over vertices + edges + triangles
    before {masses(before)}
    after  {masses(after)}
"""


def hodge_split(key: jax.Array):
  """The flow and its three parts on the unrolled torus, opposite sides glued; the longest arrow fills its edge."""
  del key
  from matplotlib.figure import Figure

  complex_ = surface()
  tail, head = complex_.simplices[1].T
  start = np.stack([tail % COLUMNS, tail // COLUMNS], axis=1).astype(float)
  size = np.array([COLUMNS, ROWS])
  step = np.stack([head % COLUMNS, head // COLUMNS], axis=1) - start
  step = (step + size / 2) % size - size / 2  # the short way round
  middle = (start + step / 2) % size
  figure = Figure(figsize=(9, 6.8), layout="constrained")
  parts = flow_parts()
  colours = ("0.25", BLUE, ORANGE, GREEN)
  for ax, (name, part), colour in zip(figure.subplots(2, 2).flat, parts.items(), colours, strict=True):
    arrow = 0.95 * step * (part / np.max(np.abs(part)))[:, None]
    ax.quiver(
      *(middle - arrow / 2).T, *arrow.T, angles="xy", scale_units="xy", scale=1, color=colour, width=0.006, headwidth=4
    )
    share = np.sum(part**2) / np.sum(parts["flow"] ** 2)
    ax.set_title(name if name == "flow" else f"{name}, {share:.0%} of the energy", fontsize=13)
    ax.set(xlim=(-0.6, COLUMNS + 0.1), ylim=(-0.6, ROWS + 0.1), aspect="equal", xticks=[], yticks=[])
  return figure


def three_tokens(key: jax.Array):
  """Weights of pairs (i, j) for one query, the planted pair framed; the pairwise head can only mark rows."""
  from matplotlib.figure import Figure

  pairs, weights = heads(key, 1)
  figure = Figure(figsize=(8, 3.9), layout="constrained")
  for ax, weight, name in zip(figure.subplots(1, 2), weights, ("three-way", "pairwise"), strict=True):
    first = weight.shape[2] - weight.shape[1]
    shown = ax.imshow(weight[0][:, first:], cmap="Blues", vmin=0)
    for i, j in (pairs[0], pairs[0][::-1]):
      ax.plot(j, i, marker="s", ms=14, mfc="none", mec=ORANGE, mew=2)
    ax.set_title(f"{name} head", fontsize=13)
    ax.set_xlabel("second token j", fontsize=13)
    ax.set_ylabel("first token i", fontsize=13)
    figure.colorbar(shown, ax=ax, shrink=0.85)
  return figure


def persistence(key: jax.Array):
  """A noisy circle and the bars of its loops and components."""
  from matplotlib.figure import Figure

  points, distances = ring(key)
  components, loops = homology.persistence(distances)
  figure = Figure(figsize=(8, 3.8), layout="constrained")
  cloud, bars = figure.subplots(1, 2)
  longest = np.argmax(loops.death - loops.birth)
  near = np.argwhere(np.triu(distances <= loops.birth[longest], 1))
  for i, j in near:
    cloud.plot(*points[[i, j]].T, color="0.7", lw=1, zorder=1)
  cloud.scatter(*points.T, color=BLUE, s=25, zorder=2)
  cloud.set(aspect="equal", xticks=[], yticks=[])
  cloud.set_title(f"joined at {loops.birth[longest]:.2f}, when the loop closes", fontsize=13)
  end, row = 1.1 * loops.death.max(), 0
  for found, colour, label in ((components, BLUE, "components"), (loops, ORANGE, "loops")):
    for i, (birth, death) in enumerate(zip(found.birth, np.minimum(found.death, end), strict=True)):
      bars.plot([birth, death], [row, row], color=colour, lw=2.5, label=label if i == 0 else None)
      row += 1
  bars.set(xlabel="distance", yticks=[])
  bars.set_title("how long each lives", fontsize=13)
  bars.tick_params(labelsize=12)
  bars.xaxis.label.set_size(13)
  bars.spines[["top", "right", "left"]].set_visible(False)
  bars.legend(frameon=False, fontsize=12, loc="lower right")
  return figure


DEMO = Demo(
  name="simplicial",
  summary="boundaries, holes and flows, and attention over pairs of tokens",
  story=story,
  claims=CLAIMS,
  plots=(hodge_split, three_tokens, persistence),
  refs=(
    "Clift, Doryn, Murfet, Wallbridge, 2019, arXiv 1909.00668",
    "Eckmann 1944",
    "Munkres 1984",
    "Edelsbrunner, Letscher, Zomorodian 2002",
  ),
)
