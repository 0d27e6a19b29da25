"""Fractal attention: addresses in a tree, what their geometry is good for, and what a table of leaves retains."""

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import ifs, ifs_address, ifs_memory
from mgr_jax.algebra.ifs_claims import CLAIMS

M, DEPTH, RATIO, FLOOR = 4, 4, 0.4, 0.01
LEAVES = M**DEPTH
WIDTH = 16
COUNTS = tuple(2**n for n in range(4, 13))
RATIOS, DIGITS = (0.4, 0.5, 0.6), 12
COLOURS = (BLUE, ORANGE, GREEN, PINK)
GREY, SKY = "#777777", "#56B4E9"

_chaos_game = jax.jit(ifs.chaos_game, static_argnums=(2, 3))
_write = jax.jit(ifs_memory.write)
_read = jax.jit(ifs_memory.read)


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def systems() -> dict[str, tuple[ifs.Maps, np.ndarray, int]]:
  """Maps, the corners of a box around the attractor, and how often the maps are applied to them."""
  box = lambda x, y: np.array([(a, b) for a in x for b in y], np.float32)
  corners = np.asarray(ifs_address.corner_offsets(M, 2, RATIO))
  found = {
    "fern": (ifs.barnsley_fern(), box((-2.2, 2.7), (0, 10)), 5),
    "triangle": (ifs.sierpinski(), box((0, 1), (0, 1)), 5),
    "corners": (ifs.similarities(np.full(M, RATIO), corners), box((-0.5, 1.5), (-0.5, 1.5)), 5),
  }
  return {name: (ifs.Maps(*map(np.asarray, maps)), square, n) for name, (maps, square, n) in found.items()}


def iterates(maps: ifs.Maps, points: np.ndarray, count: int) -> list[np.ndarray]:
  """S, F(S), ..., F^count(S) for a finite set S."""
  sets = [points]
  for _ in range(count):
    images = np.einsum("mde,ne->mnd", maps.linear, sets[-1]) + maps.offset[:, None]
    sets.append(images.reshape(-1, 2).astype(np.float32))
  return sets


def farthest(a: np.ndarray, b: np.ndarray) -> float:
  """The largest distance of a point of `a` to its nearest in `b`, a few rows at a time."""
  nearest = [
    np.min(np.square(part[:, :1] - b[:, 0]) + np.square(part[:, 1:] - b[:, 1]), 1)
    for part in np.array_split(a, max(1, len(a) // 256))
  ]
  return float(np.sqrt(np.max(np.concatenate(nearest))))


def approaches(name: str, attractor: np.ndarray | None = None) -> tuple[np.ndarray, float]:
  """d_H(Fⁿ(S), A) of a filled box S around the attractor, n = 0, 1, ..., and the largest Lipschitz constant.

  A lies in every Fⁿ(S), so the distance runs one way; it is taken at the corners of the images of the box. Points of A
  may be given; otherwise they are images of the fixed points of maps that only scale.
  """
  maps, square, count = systems()[name]
  if attractor is None:
    fixed = maps.offset / (1 - maps.linear[0, 0, 0])
    attractor = np.unique(iterates(maps, fixed, 7 if len(fixed) == 3 else 5)[-1], axis=0)
  distances = np.array([farthest(points, attractor) for points in iterates(maps, square, count)])
  return distances, float(np.linalg.norm(maps.linear, 2, axis=(-2, -1)).max())


def match_weights(rng: np.random.Generator, keys: int, draws: int = 50) -> dict[str, float]:
  """Mean weight of the one exact match among `keys` others: three ways to weigh addresses, and softmax of vectors."""
  digit = rng.integers(0, M, (draws, keys + 1, DEPTH))
  digit[:, 0] = 0
  digit[:, 1:, 0] += (digit[:, 1:] == 0).all(-1)
  agree = np.where(digit == 0, 1, 0)
  # With ε mixed in, digits that agree overlap by (1-ε)² + 2ε(1-ε)/m + ε²/m, others by that without the first term.
  rest = 2 * FLOOR * (1 - FLOOR) / M + FLOOR**2 / M
  overlap = rest + (1 - FLOOR) ** 2 * agree
  normal = rng.standard_normal((draws, keys + 1))
  cosine = normal / np.sqrt(normal**2 + rng.chisquare(63, normal.shape))
  cosine[:, 0] = 1
  weights = {
    "leaf": np.prod(overlap, -1),
    "prefix": (1 + np.cumprod(overlap, -1).sum(-1)) / (DEPTH + 1),
    "softmax, 64 channels": np.exp(8 * cosine),
    "softmax of the sum": np.exp(overlap.sum(-1) / np.sqrt(DEPTH)),
  }
  return {name: float(np.mean(w[:, 0] / w.sum(1))) for name, w in weights.items()}


def retention_arms(rng: np.random.Generator, counts: tuple[int, ...] = COUNTS) -> dict[str, list[float]]:
  """Share of all values written so far that each memory returns (error below 0.1), after each of `counts` writes.

  One stream of Gaussian pairs of key and value, 16 wide, written a few at a time and never seen again. A leaf is the
  hash of a key. The queue and the regressions hold 256 values, or as many numbers; nearest neighbours must hold keys
  too, so 128.
  """
  keys, values = rng.standard_normal((2, counts[-1], WIDTH)).astype(np.float32)
  leaf = rng.integers(0, LEAVES, counts[-1])
  offsets = ifs_address.corner_offsets(M, WIDTH, np.float32(RATIO)).astype(jnp.float32)
  store, table = ifs_memory.empty_store(offsets, RATIO, DEPTH), np.zeros((LEAVES, WIDTH), np.float32)
  moments, batch = np.zeros((WIDTH, 2 * WIDTH)), counts[0]
  regress = lambda moments: np.linalg.solve(moments[:, :WIDTH] + 1e-3 * np.eye(WIDTH), moments[:, WIDTH:])
  shares = {name: [] for name in ("IFS store", "plain array", "queue", "neighbours", "ridge, running", "ridge, last")}
  for end in range(batch, counts[-1] + 1, batch):
    new = slice(end - batch, end)
    store = _write(store, leaf[new], values[new])
    table[leaf[new]] = values[new]  # NumPy assigns in order: the last write stays.
    moments += keys[new].T @ np.concatenate([keys[new], values[new]], 1)
    if end not in counts:
      continue
    asked, recent = keys[:end], slice(max(0, end - LEAVES), end)
    last = keys[recent].T @ np.concatenate([keys[recent], values[recent]], 1)
    near = slice(max(0, end - LEAVES // 2), end)
    distance = np.sum(asked**2, 1)[:, None] - 2 * asked @ keys[near].T + np.sum(keys[near] ** 2, 1)
    weight = np.exp(-8 * (distance - distance.min(1, keepdims=True)))
    found = {
      "IFS store": np.asarray(_read(store, np.arange(LEAVES)))[leaf[:end]],
      "plain array": table[leaf[:end]],
      "queue": np.where((np.arange(end) >= recent.start)[:, None], values[:end], np.nan),
      "neighbours": weight / weight.sum(1, keepdims=True) @ values[near],
      "ridge, running": asked @ regress(moments),
      "ridge, last": asked @ regress(last),
    }
    for name, value in found.items():
      shares[name].append(float(np.mean(np.max(np.abs(value - values[:end]), -1) < 0.1)))
  return shares


def law(counts: tuple[int, ...]) -> list[float]:
  """The share of values that no later one replaced, expected for uniform leaves."""
  return [ifs_memory.intact_fraction(n, np.full(LEAVES, 1 / LEAVES)) for n in counts]


@jax.jit
def _wrong(leaf, corner, noise):
  words = ifs_address.word_of(leaf, M, DEPTH)
  points = ifs_address.leaf_extremes(words, ifs_address.corner_offsets(M, 2, RATIO), RATIO, corner)
  return ifs_address.decode(points + noise, M, DEPTH, RATIO) != words


def corrupted(rng: np.random.Generator, sizes: np.ndarray, draws: int) -> np.ndarray:
  """Share of addresses whose first 1, 2, ... digits noise of ± each size corrupts, at extreme points of leaf cubes."""
  leaf, corner = rng.integers(0, LEAVES, draws), np.float32(rng.integers(0, 2, (draws, 2)))
  noise = np.float32(sizes)[:, None, None] * rng.choice(np.float32([-1, 1]), (draws, 2))
  return np.mean(np.cumsum(_wrong(leaf, corner, noise), -1) > 0, 1)


def margins() -> np.ndarray:
  """Noise that 1, 2, ... digits survive."""
  return np.array([ifs_address.decoding_margin(RATIO, digits) for digits in range(1, DEPTH + 1)])


_greedy = jax.jit(ifs_address.greedy_code, static_argnums=2)


def code_quality(rng: np.random.Generator, ratio: float) -> np.ndarray:
  """Peak signal-to-noise ratio in dB of uniform values under the greedy code of 1, 2, ... digits."""
  v = rng.uniform(size=20_000)
  with jax.enable_x64(True):
    digits = np.asarray(_greedy(v, ratio, DIGITS)[0])
  # A shorter code is the beginning of a longer one, with the middle of its interval for what follows.
  place = ratio ** np.arange(DIGITS)
  back = np.cumsum(digits * place * (1 - ratio), -1) + ratio * place / 2
  return -10 * np.log10(np.mean((back - v[:, None]) ** 2, 0))


def story(key: jax.Array) -> str:
  rng = _rng(key)
  triangle = np.asarray(_chaos_game(key, ifs.sierpinski(), 1000, 300))
  boxes = ifs.box_counting_dimension(triangle, 2.0 ** -np.arange(2, 8))
  moran = ifs.similarity_dimension(np.full(3, 0.5))
  distances, ratio = approaches("triangle")
  slope = np.polyfit(np.arange(len(distances)), np.log(distances), 1)[0]
  sharp = [match_weights(rng, n) for n in (1023, 4095)]
  sharpness = "\n".join(f"    {name:<28}{sharp[0][name]:8.4f}{sharp[1][name]:9.4f}" for name in sharp[0])
  counts, told = COUNTS[:7], (64, 256, 1024)
  arms = retention_arms(rng, counts)
  line = lambda name, share: f"    {name:<24}" + "".join(f"{share[counts.index(n)]:8.3f}" for n in told)
  retention = "\n".join(line(name, share) for name, share in arms.items())
  margin = margins()[-1]
  noise = corrupted(rng, margin * np.array([0.99, 1.5]), 20_000)[:, -1]
  reach, flat = len(distances) - 1, np.sqrt(DEPTH)
  code = ", ".join(f"{code_quality(rng, r)[7]:.1f} dB at s = {r:g}" for r in RATIOS)
  return f"""\
What it is. Each token chooses a branch at each of {DEPTH} levels of a {M}-ary tree, softly. A query meets a
key with the probability that their paths coincide, a product over levels. That product is an inner
product of {M}^{DEPTH} = {LEAVES} features, so the same function is a table of {LEAVES} leaves read in constant time.

What it is not. Storing a value at a leaf as a translation and reading the fixed point returns the
value, whatever the contractions are: the store is an array. No forgetting is a property of where
writes go, not of geometry, and a router that keeps learning moves the addresses.

Sharpness: weight of the one exact match among      1,023    4,095 others
{sharpness}
    Softmax of 64 channels: scores √64·cos of random directions. Softmax of the sum: of the overlaps
    of all levels over √{DEPTH}, at most {flat:g}. Prefixes have equal weights here; a layer learns them.

Retention: share intact, values: {"".join(f"{n:,}".rjust(8) for n in told)[4:]}
{retention}
{line("law for uniform leaves", law(counts))}
    A queue of the last {LEAVES} values keeps as many or more; a table finds its values by leaf, without
    a search. Nearest neighbours must store keys too and hold half. Ridge regression on all pairs,
    or on the last {LEAVES}, keeps no value exactly once there are more pairs than dimensions.

Geometry does remain in four places
    Any set is drawn to the attractor: the Hausdorff distance of Fⁿ(square) from the Sierpinski
      triangle falls as exp({slope:.2f} n) up to n = {reach}; Hutchinson: as exp({np.log(ratio):.2f} n) or faster
    Dimension of that triangle: {boxes:.3f} by counting boxes, {moran:.3f} = log 3 / log 2 by Moran
    Addresses as points survive noise up to s^(k-1)(1-2s)/2 = {margin:.4f}:
      {noise[0]:.1%} corrupted at 0.99 of it, {noise[1]:.1%} at 1.5
    Values as 8-digit codes: {code}
      Separated codes (s < 1/2) resist noise and leave gaps; covering ones (s >= 1/2) the opposite.
"""


def attractors(key: jax.Array):
  """Barnsley's fern and the Sierpinski triangle by the chaos game, a square on its way there, and how fast it comes."""
  from matplotlib.collections import PolyCollection
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 6.2), layout="constrained")
  (fern, triangle), (squares, decay) = figure.subplots(2, 2)
  leaves = np.asarray(_chaos_game(key, ifs.barnsley_fern(), 2000, 500, np.float32(ifs.FERN_PROBABILITIES)))
  dust = np.asarray(_chaos_game(key, ifs.sierpinski(), 1000, 300))
  for ax, points, title, colours, (left, right, low, high) in (
    (fern, leaves, "fern, 1,000,000 points", "Greens", (-2.4, 2.9, -0.2, 10.2)),
    (triangle, dust, "triangle, 300,000 points", "Blues", (-0.05, 1.05, -0.05, 0.92)),
  ):
    rows = 600
    columns = round(rows * (right - left) / (high - low))
    x, y = points.T
    cell = ((y - low) / (high - low) * rows).astype(int) * columns + ((x - left) / (right - left) * columns).astype(int)
    density = np.bincount(cell, minlength=rows * columns).reshape(rows, columns)
    ax.imshow(
      np.where(density > 0, np.log1p(density), np.nan),
      vmin=-2,
      cmap=colours,
      origin="lower",
      extent=(left, right, low, high),
      interpolation="nearest",
    )
    ax.set_title(title, fontsize=13)
    ax.axis("off")
  maps, square, _ = systems()["triangle"]
  for n, colour in ((0, "0.93"), (1, SKY), (3, ORANGE), (5, BLUE)):
    corners = iterates(maps, square, n)[-1].reshape(-1, 4, 2)[:, (0, 1, 3, 2)]
    squares.add_collection(PolyCollection(corners, facecolor=colour, edgecolor="white", lw=0.3))
  squares.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
  squares.set_title("Fⁿ(square), n = 0, 1, 3, 5", fontsize=13)
  squares.axis("off")
  for name, colour, marker in zip(systems(), (GREEN, BLUE, ORANGE), "osD", strict=True):
    distance, ratio = approaches(name, leaves[::250] if name == "fern" else None)
    steps = np.arange(len(distance))
    decay.semilogy(steps, distance, marker, ms=7, color=colour, label=f"{name}, s = {ratio:.2g}")
    decay.semilogy(steps, distance[0] * ratio**steps, "--", lw=1.5, color=colour)
  decay.set_ylim(5e-4, 10)
  styled(decay, "Hutchinson's theorem", "n", r"$d_H(F^n(S), A)$", "lower left")
  decay.plot([], [], "--", color="0.4", label=r"$s^n\,d_H(S, A)$")
  decay.legend(frameon=False, fontsize=11, loc="lower left", handlelength=1.2)
  return figure


def addresses(key: jax.Array):
  """Addresses as points, coloured by prefix; which digits survive noise; the quality of values as digits."""
  from matplotlib.collections import PolyCollection
  from matplotlib.colors import to_rgba
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.2), layout="constrained")
  grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
  points, noise, code = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
  words = np.stack(np.unravel_index(np.arange(LEAVES), (M,) * DEPTH), -1)
  offsets = np.asarray(ifs_address.corner_offsets(M, 2, RATIO))
  low = sum(RATIO**level * offsets[words[:, level]] for level in range(DEPTH))
  cubes = low[:, None] + RATIO**DEPTH * np.array([(0, 0), (0, 1), (1, 1), (1, 0)])
  shades = [to_rgba(COLOURS[word[0]], 0.4 + 0.2 * word[1]) for word in words.tolist()]
  points.add_collection(PolyCollection(cubes, facecolors=shades, lw=0))
  for digit, (x, y) in enumerate(((0.0, 0.45), (0.0, 0.55), (0.6, 0.45), (0.6, 0.55))):
    points.text(x, y, f"{digit} . . .", color=COLOURS[digit], fontsize=13, va="center")
  points.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
  points.set_title(f"{LEAVES} addresses, s = {RATIO:g}", fontsize=13)
  points.axis("off")
  rng, sizes = _rng(key), np.geomspace(0.0005, 0.3, 80)
  shares = corrupted(rng, sizes, 2000)
  styles = zip(range(DEPTH, 0, -1), COLOURS, ("-", "--", "-.", ":"), strict=True)
  for digits, colour, style in styles:
    noise.semilogx(
      sizes, shares[:, digits - 1], style, lw=2, color=colour, label=f"{digits} digits" if digits > 1 else "1 digit"
    )
    noise.axvline(margins()[digits - 1], color=colour, lw=1)
  noise.set_ylim(-0.02, 1.02)
  styled(noise, "decoding; margins as lines", "noise", "share corrupted", legend=None, size=12)
  noise.legend(frameon=False, fontsize=11, loc="upper left", handlelength=1.5, borderaxespad=0.1, labelspacing=0.2)
  bits = np.arange(1, DIGITS + 1)
  for ratio, colour, marker in zip(RATIOS, COLOURS, "osD", strict=False):
    code.plot(bits, code_quality(rng, ratio), marker=marker, ms=5, lw=1.5, color=colour, label=f"s = {ratio:g}")
  code.set_xticks((2, 4, 6, 8, 10, 12))
  styled(code, "values as greedy codes", "bits", "PSNR in dB", legend=None, size=12)
  code.legend(frameon=False, fontsize=11, loc="upper left", handlelength=1.5, borderaxespad=0.1, labelspacing=0.2)
  return figure


def retention_and_sharpness(key: jax.Array):
  """What memories retain of a stream, against the closed law; the weight of one exact match among many keys."""
  from matplotlib.figure import Figure

  rng = _rng(key)
  figure = Figure(figsize=(7, 4.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  looks = zip("osD^vx", (BLUE, ORANGE, GREEN, SKY, PINK, GREY), strict=True)
  for (name, share), (marker, colour) in zip(retention_arms(rng).items(), looks, strict=True):
    style = {"ms": 10, "mfc": "none", "mew": 2} if name == "IFS store" else {"ms": 5}
    left.semilogx(COUNTS, share, marker, color=colour, label=name, **style)
  left.semilogx(COUNTS, law(COUNTS), "--", color="0.4", lw=1.5, label="law")
  left.set_ylim(-0.03, 1.05)
  styled(left, f"memory of {LEAVES} rows", "values written", "share intact", legend=None)
  weights = [match_weights(rng, n - 1) for n in COUNTS]
  for name, colour, marker in zip(weights[0], COLOURS, "osD^", strict=True):
    right.loglog(COUNTS, [w[name] for w in weights], marker=marker, ms=5, lw=1.5, color=colour, label=name)
  styled(right, "sharpness", "keys", "weight of the exact match", legend=None)
  for ax, columns in ((left, 2), (right, 1)):
    ax.legend(
      frameon=False,
      fontsize=11,
      loc="upper center",
      bbox_to_anchor=(0.5, -0.2),
      ncols=columns,
      handletextpad=0.3,
      columnspacing=1,
    )
  return figure


DEMO = Demo(
  name="fractal",
  summary="paths in a tree as addresses, and what their geometry does and does not buy",
  story=story,
  claims=CLAIMS,
  plots=(attractors, addresses, retention_and_sharpness),
  refs=("Hutchinson 1981", "Barnsley and Demko 1985", "Moran 1946"),
  not_shown=(
    (
      "Recall by trained routers, and what an equal softmax cache recalls",
      "takes minutes: python -m train.experiment fractal_retrieval",
    ),
    ("Back-off to prefixes on new leaves, forgetting of trained routers", "experiments that were not run"),
    ("All gradients against the obvious forms, tiles of one head at a time", "checked by tests/test_fractal.py"),
    ("Decoding in pieces of 1, 16 and 40 tokens, states that do not grow", "checked by tests/test_fractal.py"),
    ("Usage of leaves, staleness, entropy of the router", "python -m train.main writes them with --probe_every=50"),
    ("Time against T", "needs a quiet machine: python -m train.bench speed --attention=fractal --seq_len=1024"),
  ),
)
