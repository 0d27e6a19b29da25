"""Simplicial complexes: boundaries, holes, flows, and what pairs of tokens can and cannot say."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import homology, mixer, simplicial
from mgr_jax.algebra.simplicial_claims import CLAIMS, SPACES, edge_split, mixer_case, parity, run_mixer
from mgr_jax.algebra.trilinear import CHARGES
from mgr_jax.attention import resolve
from mgr_jax.attention.mechanism import projection_cost
from mgr_jax.attention.simplicial_chain_claims import additivity
from mgr_jax.attention.simplicial_form_claims import (
  MODULUS,
  ROWS,
  information_of,
  match3_head,
  match3_temperature,
  planted_mass,
  planted_triples,
  score_drift,
)
from mgr_jax.attention.simplicial_linear_claims import order_contrast
from mgr_jax.config import GPTConfig

SQUARES_DOWN, SQUARES_ACROSS = 6, 8
ROTATIONS = {
  "balanced charges, complex": (CHARGES, "complex"),
  "ordinary rotary, complex": (((1, 1, 1),), "complex"),
  "ordinary rotary, Hadamard": (((1, 1, 1),), "hadamard"),
}
LENGTHS = (256, 1024, 4096, 16384)
COSTS = {
  "standard": "standard",
  "two_hop": "simplicial(mode=two_hop)",
  "trilinear": "simplicial",
  "linear2": "simplicial(mode=linear2)",
}


def _size(x: float) -> str:
  return f"{x:.2f}" if x >= 0.01 else f"{x:.0e}"


def rng_of(key: jax.Array) -> np.random.Generator:
  """NumPy's generator of a key: nothing to compile for what it draws."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


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
  return simplicial.grid_torus(SQUARES_DOWN, SQUARES_ACROSS)


@functools.cache
def flow_parts() -> dict[str, np.ndarray]:
  """One unit sent along one path on the torus, edge by edge, and the Hodge parts of that flow."""
  complex_ = surface()
  vertices = [SQUARES_ACROSS + c for c in range(1, 7)] + [r * SQUARES_ACROSS + 6 for r in range(2, 5)]
  index, flow = complex_.index(1), np.zeros(complex_.size(1))
  for a, b in itertools.pairwise(vertices):
    flow[index[min(a, b), max(a, b)]] = 1 if a < b else -1
  with jax.enable_x64(True):
    gradient, harmonic, curl = map(np.asarray, edge_split(complex_, flow))
  return {"flow": flow, "gradient": gradient, "curl": curl, "harmonic": harmonic}


def energies() -> str:
  """Σ x² of each part, and their sum over the energy of the flow."""
  energy = {name: float(np.sum(part**2)) for name, part in flow_parts().items()}
  total = energy.pop("flow")
  shares = ",  ".join(f"{name} {value:.2f}" for name, value in energy.items())
  return f"{shares};  sum {sum(energy.values()):.2f} of {total:.2f}"


def ring(key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Noisy points on a circle, and their distances."""
  rng = rng_of(key)
  angles = 2 * np.pi * (np.arange(28) + rng.uniform(size=28)) / 28
  points = np.stack([np.cos(angles), np.sin(angles)], axis=1) + 0.08 * rng.standard_normal((28, 2))
  return points, np.sqrt(np.sum(np.square(points[:, None] - points), axis=-1))


def mass_trace(key: jax.Array, times: int = 3) -> np.ndarray:
  """Mass on vertices, edges and triangles of the seven-vertex torus, and after each three layers, [times+1, 3]."""
  complex_ = simplicial.torus()
  params, state = mixer_case(rng_of(key), complex_)
  state = mixer.Levels(state.features, tuple(np.ones(n, np.float32) for n in complex_.sizes))
  trace = [state]
  for _ in range(times):
    trace.append(run_mixer(params, trace[-1], simplicial.boundaries(complex_)))
  return np.array([[np.sum(np.float64(m)) for m in state.masses] for state in trace])


def mass_lines(key: jax.Array) -> str:
  return "\n".join(
    f"    after {3 * i} layers   " + " + ".join(f"{x:5.2f}" for x in row) + f" = {row.sum():.4f}"
    for i, row in enumerate(mass_trace(key))
  )


def parity_lines(key: jax.Array) -> str:
  found = parity(rng_of(key))
  odd = np.unique(found.odd)
  odd = f"{odd[0]:.4f}" if len(odd) == 1 else f"{odd[0]:.4f} to {odd[-1]:.4f}"
  return f"16 odd readouts {odd} each, majority rate {found.majority:.4f}, squares {found.even:.3f}"


def heads(key: jax.Array) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Planted pairs [cases, 2], and weights [cases, i, t - j] of hand-built heads.

  `marginals` is the product of the two marginals of the three-way head: the nearest that two pairwise heads come to it.
  """
  x, pairs = planted_triples(rng_of(key), ROWS)
  three, two = (match3_head(x, match3_temperature(), pairwise) for pairwise in (False, True))
  product = three.sum(2, keepdims=True) * three.sum(1, keepdims=True)
  return pairs, {"three-way": three, "its marginals": product, "pairwise": two}


def pair_lines(key: jax.Array) -> str:
  """For every head, the mass on the planted pair and the mutual information of its two tokens."""
  pairs, weights = heads(key)
  return "\n".join(
    f"    {name:<14} mass on the pair {planted_mass(weight, pairs).mean():.3f}, "
    f"mutual information {abs(information_of(weight)):.3f} nats"
    for name, weight in weights.items()
  )


def hop_lines(key: jax.Array) -> str:
  """How far outputs are from additive in the values."""
  return "\n".join(
    f"    {name:<22} |y(v + w) - y(v) - y(w)| = {_size(additivity(three_way)(key, 1))} of the output"
    for name, three_way in (("A v + A² v", False), ("attention over pairs", True))
  )


def drifts(key: jax.Array, shifts) -> dict[str, np.ndarray]:
  """Largest change of the three-way score when all positions move, by rotation and shift."""
  return {name: score_drift(rng_of(key), *arms, shifts) for name, arms in ROTATIONS.items()}


def drift_lines(key: jax.Array) -> str:
  return "\n".join(f"    {name:<28}{_size(drift[0]):>9}" for name, drift in drifts(key, (91,)).items())


def order_line(key: jax.Array) -> str:
  """How far outputs for A..B and B..A are apart, over all and over increasing pairs: means of eight draws."""
  with jax.enable_x64(True):
    cases = [[order_contrast(rng_of(jax.random.fold_in(key, i)), order) for i in range(8)] for order in (False, True)]
  return "over all pairs {}, over increasing pairs {}".format(*(_size(np.mean(case)) for case in cases))


def counted(attention: str, T: int) -> float:
  """FLOPs per token of one head of size 64 at context T without projections, from the mechanism's own count."""
  cfg = GPTConfig(vocab_size=2, seq_len=T, n_layer=1, n_head=1, n_kv_head=1, n_embd=64, attention=attention)
  (layer,) = resolve(cfg)
  cost = layer.mechanism.cost(cfg, layer.options, T)
  return cost.matmul + cost.vector - projection_cost(cfg).matmul


def cost_lines() -> str:
  lines = ["    tokens      " + "".join(f"{T:9d}" for T in LENGTHS) + "   grows as"]
  for name, attention in COSTS.items():
    flops = [counted(attention, T) for T in LENGTHS]
    slope = np.polyfit(np.log(LENGTHS), np.log(flops), 1)[0]
    lines.append(f"    {name:<12}" + "".join(f"{f / 1e3:9.0f}" for f in flops) + f"   T^{abs(slope):.2f}")
  return "\n".join(lines)


def story(key: jax.Array) -> str:
  loops = homology.persistence(ring(key)[1])[1]
  lengths = np.sort(loops.death - loops.birth)[::-1]
  second = f"the next longest {lengths[1]:.2f}" if len(lengths) > 1 else "there is no other"
  # Compiling releases Python's lock: two parts at once.
  parts = (pair_lines, hop_lines, drift_lines, order_line, mass_lines, parity_lines)
  with ThreadPoolExecutor(2) as pool:
    flow, *texts = [pool.submit(energies), *(pool.submit(part, key) for part in parts)]
    pairs, hops, drift, order, masses, even = [text.result() for text in texts]
  return f"""\
What it is. A simplex is a set of tokens: a pair is an edge, a triple a triangle. The boundary of a
boundary is zero, ∂∂ = 0, and from this alone follow the number of holes of every dimension,
the split of a flow into three parts, and heat flow that stops at the holes.

What it is not. Two steps of pairwise attention, A(Av), contain no triangle: each weight is a sum of
products of pairs. None of the laws below says that a language model gains from triangles.

Holes, exactly, by elimination over two fields
{betti_table()}
    Where the two fields differ there is torsion: a loop that bounds nothing, though twice it does.

One unit sent along one path on a torus of {SQUARES_DOWN} x {SQUARES_ACROSS} squares, split into three parts (energies)
    {flow.result()}
    The gradient is what a battery would drive between the ends. The harmonic part has no source and
    no whirl: it goes around a hole, and no local look finds it.

Holes of a cloud: {len(ring(key)[0])} noisy points on a circle, joined at growing distance
    the longest loop lives for {lengths[0]:.2f}, {second}

Two hops are not triangles: at fixed scores they only add up values, a pair multiplies them
{hops}

One head, three tokens: {ROWS} rows where one pair of earlier tokens completes the query to 0 mod {MODULUS}
{pairs}

Positions: how far a three-way score moves when all tokens move by 91
{drift}

Order: distance of the outputs for A..B and B..A
    {order}

Cost: counted FLOPs per token of one head of size 64, in thousands, without projections
{cost_lines()}

A mixer that conserves mass, on the seven-vertex torus, over vertices + edges + triangles
{masses}

Parity: is the circulation of a flow large? The flow and its opposite have the same answer.
    {even}
    An odd network with a linear readout stays at one half whatever it is taught.
"""


def hodge_split(key: jax.Array):
  """The flow and its three parts on the unrolled torus, opposite sides glued; the longest arrow fills its edge."""
  del key
  from matplotlib.figure import Figure

  complex_ = surface()
  tail, head = complex_.simplices[1].T
  start = np.stack([tail % SQUARES_ACROSS, tail // SQUARES_ACROSS], axis=1).astype(float)
  size = np.array([SQUARES_ACROSS, SQUARES_DOWN])
  step = np.stack([head % SQUARES_ACROSS, head // SQUARES_ACROSS], axis=1) - start
  step = (step + size / 2) % size - size / 2  # the short way round
  middle = (start + step / 2) % size
  figure = Figure(figsize=(8, 6.3), layout="constrained")
  parts = flow_parts()
  colours = ("0.25", BLUE, ORANGE, GREEN)
  for ax, (name, part), colour in zip(figure.subplots(2, 2).flat, parts.items(), colours, strict=True):
    strength = part / np.max(np.abs(part))
    shown = np.abs(strength) > 0.03
    arrow = (0.95 * step * strength[:, None])[shown]
    ax.quiver(
      *(middle[shown] - arrow / 2).T, *arrow.T, angles="xy", scale_units="xy", scale=1, color=colour, width=0.007
    )
    share = np.sum(part**2) / np.sum(parts["flow"] ** 2)
    ax.set_title(name if name == "flow" else f"{name}, {share:.0%} of the energy", fontsize=13)
    ax.set(xlim=(-0.6, SQUARES_ACROSS + 0.1), ylim=(-0.6, SQUARES_DOWN + 0.1), aspect="equal", xticks=[], yticks=[])
  return figure


def three_tokens(key: jax.Array):
  """Weights of pairs (i, j) for one query with the planted pair framed, and those of its two marginals."""
  from matplotlib.figure import Figure

  pairs, weights = heads(key)
  case = int(np.argmin(np.abs(pairs - (4, 11)).sum(1)))
  figure = Figure(figsize=(8, 4.6), layout="constrained")
  names = {"three-way": "three-way head", "its marginals": "product of its marginals"}
  axes = figure.subplots(1, 2, sharey=True)
  for ax, (name, title) in zip(axes, names.items(), strict=True):
    weight = weights[name][case : case + 1]
    shown = ax.imshow(weight[0][:, ::-1], cmap="Blues", vmin=0, vmax=0.5)
    for i, j in (pairs[case], pairs[case][::-1]):
      ax.plot(j, i, marker="s", ms=13, mfc="none", mec=ORANGE, mew=2)
    ax.set(xticks=range(0, 16, 5), yticks=range(0, 16, 5))
    styled(ax, f"{title}\nmutual information {abs(information_of(weight)):.2f} nats", "second token j", "", None)
  axes[0].set_ylabel("first token i")
  bar = figure.colorbar(shown, ax=axes, shrink=0.85)
  bar.set_label("weight of the pair", fontsize=12)
  return figure


def positions(key: jax.Array):
  """How far the three-way score moves when all positions move, for three rotations."""
  from matplotlib.figure import Figure

  shifts = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
  figure = Figure(figsize=(7, 3.9), layout="constrained")
  ax = figure.subplots()
  looks = ((BLUE, "o-"), (ORANGE, "s--"), (PINK, "^-."))
  for (name, drift), (colour, look) in zip(drifts(key, shifts).items(), looks, strict=True):
    ax.loglog(shifts, drift, look, color=colour, label=name)
  ax.set_ylim(1e-16, 1e3)
  ax.set_xticks(shifts, map(str, shifts))
  ax.minorticks_off()
  styled(ax, "three-way score, all positions moved", "positions moved by", "largest change", "center left")
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
      bars.plot(
        [birth, death], [row, row], color=colour, lw=2 if colour == BLUE else 5, label=label if i == 0 else None
      )
      row += 1
  styled(bars, "how long each lives", "distance", "", "lower right")
  bars.set_yticks([])
  bars.spines["left"].set_visible(False)
  return figure


DEMO = Demo(
  name="simplicial",
  summary="boundaries, holes and flows, and attention over pairs of tokens",
  story=story,
  claims=CLAIMS,
  plots=(hodge_split, three_tokens, positions, persistence),
  refs=(
    "Clift, Doryn, Murfet, Wallbridge, 2019, arXiv 1909.00668",
    "Eckmann 1944",
    "Munkres 1984",
    "Edelsbrunner, Letscher, Zomorodian 2002",
  ),
  not_shown=(
    ("time against T", "needs minutes of a quiet machine; python -m train.bench speed measures it"),
    ("heat flow and sheaf Laplacians", "checked by tests/test_algebra_simplicial.py"),
    (
      "finite differences, other window sizes, decoding in pieces of other lengths",
      "checked by tests/test_simplicial.py",
    ),
    ("that training finds triangles", "needs minutes; python -m train.experiment simplicial_triple trains it"),
    ("holes in the attention of a trained model", "not recorded: it needs all weights of a row on the host"),
  ),
)
