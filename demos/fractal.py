"""Fractal attention: addresses in a tree, what their geometry is good for, and what a table of leaves retains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from mgr_jax.algebra import ifs, ifs_address, ifs_memory
from mgr_jax.algebra.ifs_claims import CLAIMS

M, DEPTH, RATIO, FLOOR = 4, 4, 0.4, 0.01
LEAVES = M**DEPTH
# Okabe and Ito: told apart with every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_chaos_game = jax.jit(ifs.chaos_game, static_argnums=(2, 3))


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def match_weights(rng: np.random.Generator, keys: int, draws: int = 50) -> dict[str, float]:
  """Mean weight of the one exact match among `keys` other addresses, by three ways to weigh them."""
  digit = rng.integers(0, M, (draws, keys + 1, DEPTH))
  digit[:, 0] = 0
  digit[:, 1:, 0] += (digit[:, 1:] == 0).all(-1)
  agree = np.where(digit == 0, 1, 0)
  # With ε mixed in, digits that agree overlap by (1-ε)² + 2ε(1-ε)/m + ε²/m, others by that without the first term.
  rest = 2 * FLOOR * (1 - FLOOR) / M + FLOOR**2 / M
  overlap = rest + (1 - FLOOR) ** 2 * agree
  leaf, prefix = np.prod(overlap, -1), (1 + np.cumprod(overlap, -1).sum(-1)) / (DEPTH + 1)
  summed = np.exp(overlap.sum(-1) / np.sqrt(DEPTH))
  weights = {"leaf": leaf, "prefix": prefix, "softmax of summed overlaps": summed}
  return {name: float(np.mean(w[:, 0] / w.sum(1))) for name, w in weights.items()}


def retention_arms(rng: np.random.Generator, writes: int) -> dict[str, float]:
  """Share of `writes` values that each memory returns at the end (error below 0.1), in the order in which they came.

  Keys and values are unit Gaussian, 16 wide; a leaf is the hash of a key. All arms but the dictionary hold 256 rows.
  """
  d = 16
  keys, values = rng.standard_normal((2, writes, d))
  leaf = rng.integers(0, LEAVES, writes)
  store = ifs_memory.empty_store(ifs_address.corner_offsets(M, d, np.float32(RATIO)).astype(jnp.float32), RATIO, DEPTH)
  store = ifs_memory.write(store, jnp.asarray(leaf), jnp.asarray(values, jnp.float32))
  table = np.zeros((LEAVES, d))
  table[leaf] = values  # NumPy assigns in order: the last write stays.
  ridge = np.linalg.solve(keys.T @ keys + 1e-3 * np.eye(d), keys.T @ values)
  newest = np.arange(writes) >= writes - LEAVES
  arms = {
    "IFS store": ifs_memory.read(store, jnp.asarray(leaf)),
    "plain array": table[leaf],
    "last 256": np.where(newest[:, None], values, np.nan),
    "ridge regression": keys @ ridge,
  }
  intact = lambda found: float(np.mean(np.max(np.abs(np.asarray(found) - values), -1) < 0.1))
  return {name: intact(found) for name, found in arms.items()}


@functools.partial(jax.jit, static_argnums=2)
def _corrupted(key, multiple, draws):
  """Share of addresses that noise of ± multiple·bound corrupts, at extreme points of the leaf cubes."""
  keys = jax.random.split(key, 3)
  offsets = ifs_address.corner_offsets(M, 2, RATIO)
  words = ifs_address.word_of(jax.random.randint(keys[0], (draws,), 0, LEAVES), M, DEPTH)
  corner = jax.random.bernoulli(keys[1], shape=(draws, 2)).astype(float)
  noise = multiple * ifs_address.decoding_margin(RATIO, DEPTH) * jax.random.rademacher(keys[2], (draws, 2), float)
  x = ifs_address.leaf_extremes(words, offsets, RATIO, corner) + noise
  return jnp.mean(jnp.any(ifs_address.decode(x, M, DEPTH, RATIO) != words, -1).astype(float))


def code_errors(rng: np.random.Generator, ratio: float, depth: int = 8) -> float:
  """Peak signal-to-noise ratio in dB of uniform values under the greedy code."""
  v = rng.uniform(size=20_000)
  with jax.enable_x64(True):
    _, back = ifs_address.greedy_code(jnp.asarray(v), ratio, depth)
    return float(-10 * np.log10(np.mean((np.asarray(back) - v) ** 2)))


def story(key: jax.Array) -> str:
  rng = _rng(key)
  triangle = np.asarray(_chaos_game(key, ifs.sierpinski(), 1000, 300))
  boxes = ifs.box_counting_dimension(triangle, 2.0 ** -np.arange(2, 8))
  moran = ifs.similarity_dimension(np.full(3, 0.5))
  sharp = {n: match_weights(rng, n - 1) for n in (1024, 4096)}
  sharpness = "\n".join(f"    {name:<28}{sharp[1024][name]:8.4f}{sharp[4096][name]:9.4f}" for name in sharp[1024])
  arms = {n: retention_arms(rng, n) for n in (64, 256, 1024)}
  retention = "\n".join(f"    {name:<24}" + "".join(f"{arms[n][name]:8.3f}" for n in arms) for name in arms[64])
  law = "".join(f"{ifs_memory.intact_fraction(n, np.full(LEAVES, 1 / LEAVES)):8.3f}" for n in arms)
  noise = [float(_corrupted(key, multiple, 20_000)) for multiple in (0.99, 1.5)]
  codes = {ratio: code_errors(rng, ratio) for ratio in (0.4, 0.5, 0.6)}
  code = ", ".join(f"{value:.1f} dB at s = {ratio:g}" for ratio, value in codes.items())
  return f"""\
What it is. Each token chooses a branch at each of {DEPTH} levels of a {M}-ary tree, softly. A query meets a
key with the probability that their paths coincide, a product over levels. That product is an inner
product of {M}^{DEPTH} = {LEAVES} features, so the same function is a table of {LEAVES} leaves read in constant time.

What it is not. Storing a value at a leaf as a translation and reading the fixed point returns the
value, whatever the contractions are: the store is an array. No forgetting is a property of where
writes go, not of geometry, and a router that keeps learning moves the addresses.

Sharpness: weight of the one exact match among      1,023    4,095 other addresses
{sharpness}

Retention: share intact, values: {"".join(f"{n:,}".rjust(8) for n in arms)[4:]}
{retention}
    {"law for uniform leaves":<24}{law}
    A queue of the last 256 values keeps as many or more; a table finds them by leaf, without a search.
    Ridge regression keeps no value exactly once there are more keys than dimensions.

Geometry does remain in three places
    Dimension of the Sierpinski triangle: {boxes:.3f} by counting boxes, {moran:.3f} = log 3 / log 2 by Moran
    Addresses as points survive noise up to s^(k-1)(1-2s)/2 = {ifs_address.decoding_margin(RATIO, DEPTH):.4f}:
      {noise[0]:.1%} corrupted at 0.99 of it, {noise[1]:.1%} at 1.5
    Values as 8-digit codes: {code}
      Separated codes (s < 1/2) resist noise and leave gaps; covering ones (s >= 1/2) do the opposite.
"""


def attractors(key: jax.Array):
  """The fern by the chaos game; leaves of the corner scheme, coloured by first digit, shaded by second."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.2), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
  fern = np.asarray(_chaos_game(key, ifs.barnsley_fern(), 1000, 200, jnp.array(ifs.FERN_PROBABILITIES)))
  left.plot(*fern.T, ",", color=COLOURS[2], alpha=0.5, rasterized=True)
  left.set_title("Barnsley's fern", fontsize=13)
  left.set(aspect="equal")
  left.axis("off")
  words = np.asarray(ifs_address.word_of(jnp.arange(LEAVES), M, DEPTH))
  low = np.asarray(ifs_address.translation(jnp.asarray(words), ifs_address.corner_offsets(M, 2, RATIO), RATIO))
  for (x, y), word in zip(low, words, strict=True):
    side = RATIO**DEPTH
    right.fill_between([x, x + side], y, y + side, color=COLOURS[word[0]], alpha=0.4 + 0.2 * word[1], lw=0)
  for digit, (x, y) in enumerate(((0.02, 0.45), (0.02, 0.55), (0.65, 0.45), (0.65, 0.55))):
    right.text(x, y, f"{digit}...", color=COLOURS[digit], fontsize=12, va="center")
  right.set_title(f"{LEAVES} addresses, s = {RATIO:g}: a prefix is a cube", fontsize=13)
  right.set(aspect="equal", xlabel="first coordinate", ylabel="second coordinate")
  right.spines[["top", "right"]].set_visible(False)
  return figure


def retention_and_sharpness(key: jax.Array):
  """Retention against its law, and the weight of one exact match against the number of keys."""
  from matplotlib.figure import Figure

  rng = _rng(key)
  figure = Figure(figsize=(7, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  counts = 2 ** np.arange(4, 13)
  measured = [retention_arms(rng, int(n)) for n in counts]
  for name, colour, marker, fill in (
    ("IFS store", COLOURS[0], "o", "none"),
    ("plain array", COLOURS[1], "x", COLOURS[1]),
    ("last 256", COLOURS[2], "s", COLOURS[2]),
    ("ridge regression", COLOURS[3], "D", COLOURS[3]),
  ):
    left.semilogx(
      counts, [m[name] for m in measured], marker, ms=8 if fill == "none" else 5, mfc=fill, color=colour, label=name
    )
  law = [ifs_memory.intact_fraction(int(n), np.full(LEAVES, 1 / LEAVES)) for n in counts]
  left.semilogx(counts, law, "--", color="0.4", lw=1.5, label="law")
  left.set(xlabel="values written", ylabel="share intact", title=f"memory of {LEAVES} rows")
  weights = [match_weights(rng, int(n) - 1) for n in counts]
  for name, colour, marker in zip(weights[0], COLOURS, "osD", strict=False):
    right.loglog(counts, [w[name] for w in weights], marker=marker, ms=5, lw=1.5, color=colour, label=name)
  right.set(xlabel="keys", ylabel="weight of the exact match", title="sharpness")
  left.legend(loc="center left", bbox_to_anchor=(0, 0.36), frameon=False, fontsize=10, handletextpad=0.3)
  right.legend(loc="center right", bbox_to_anchor=(1.02, 0.72), frameon=False, fontsize=10, handletextpad=0.3)
  for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=12)
    ax.xaxis.label.set_size(13)
    ax.yaxis.label.set_size(13)
    ax.title.set_size(13)
  return figure


DEMO = Demo(
  name="fractal",
  summary="paths in a tree as addresses, and what their geometry does and does not buy",
  story=story,
  claims=CLAIMS,
  plots=(attractors, retention_and_sharpness),
  refs=("Hutchinson 1981", "Barnsley and Demko 1985", "Moran 1946"),
)
