"""Gauge attention: rotations that depend on content, what their order is worth, and what does not drift."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats

from demos.demo import Demo
from mgr_jax.algebra import icosahedral, lie
from mgr_jax.algebra.lie_claims import CLAIMS
from mgr_jax.algebra.lie_prefix import prefix_quaternions
from mgr_jax.algebra.lie_prefix_claims import SCANS, misread_by_angles, read_by_rotations, serial_float64
from mgr_jax.algebra.lie_prefix_claims import so4_products as products
from mgr_jax.algebra.lie_series_claims import series_errors, slopes
from mgr_jax.algebra.uniformization import fewest_terms
from mgr_jax.algebra.uniformization_claims import truncation

# Okabe and Ito: told apart with every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^"
LENGTH = 8192
STEPS = (0.2, 0.1, 0.05, 0.025)

_skew = jax.jit(lie.skew, static_argnums=1)
_exp_so4 = jax.jit(lie.exp_so4)


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def two_turns(degrees: float) -> float:
  """Angle in degrees between turning about x, then y, and turning about y, then x, by the same angle."""
  about = lambda *axis: scipy.linalg.expm(np.asarray(_skew(np.radians(degrees) * np.array(axis, np.float32), 3)))
  x, y = about(0, 0, -1), about(0, 1, 0)
  return float(np.degrees(np.arccos(np.clip((np.trace((y @ x).T @ (x @ y)) - 1) / 2, -1, 1))))


def covariance(rng: np.random.Generator, step: float, n: int = 12, b: int = 4) -> dict[str, float]:
  """Largest change of scores and of outputs, seen from the moved frames, when every position changes its frame.

  q, k, v become S_t q, S_t k, S_t v with S_t a random walk of rotations. Three rules say what becomes of U_t = exp A_t.
  Generators and the steps of the walk have entries of size `step`.
  """
  q, k, v = rng.normal(size=(3, n, b))
  A, moves = step * np.asarray(_skew(rng.normal(size=(2, n, 6)).astype(np.float32), b), np.float64)
  S = serial_float64(scipy.linalg.expm(moves))
  before = np.concatenate([np.eye(b)[None], S[:-1]])
  back = lambda M: np.swapaxes(M, -1, -2)

  def attend(U, q, k, v):
    T = serial_float64(U)
    pulled = [np.einsum("tji,tj->ti", T, w) for w in (q, k, v)]
    scores = np.where(np.tri(n) > 0, pulled[0] @ pulled[1].T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    out = np.einsum("tij,tj->ti", T, weights / weights.sum(1, keepdims=True) @ pulled[2])
    return np.where(np.isfinite(scores), scores, 0), out

  U = scipy.linalg.expm(A)
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


@functools.cache
def _long_product(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(drift, distance from the double-precision product) at every step of one product, by three ways to compute it."""
  a = (0.3 * np.random.default_rng(seed).normal(size=(LENGTH, 1, 6))).astype(np.float32)
  with jax.enable_x64(True):
    exact = serial_float64(np.asarray(_exp_so4(a.astype(np.float64))))
  ways = {
    "float32, corrected": products(a, "chunk:64"),
    "float32": products(a, "chunk:64", False),
    "bfloat16": products(a.astype(jnp.bfloat16), "chunk:64", False),
  }
  found = {name: np.asarray(T, np.float64) for name, T in ways.items()}
  drift = lambda T: np.max(np.abs(np.swapaxes(T, -1, -2) @ T - np.eye(4)), (-1, -2, -3))
  distance = lambda T: np.max(np.abs(T - exact), (-1, -2, -3))
  return {name: tuple(np.maximum.accumulate(f(T)) for f in (drift, distance)) for name, T in found.items()}


def milliseconds(rng: np.random.Generator, length: int = 1024, blocks: int = 64) -> dict[str, float]:
  """Shortest of five runs of each scan over quaternion pairs."""
  u = rng.normal(size=(length, 4, 2 * blocks)).astype(np.float32)
  u /= np.linalg.norm(u, axis=1, keepdims=True)
  best = {}
  for scan in SCANS:
    run = jax.jit(functools.partial(prefix_quaternions, scan=scan, component=-2))
    run(u).block_until_ready()
    times = []
    for _ in range(5):
      start = time.perf_counter()
      run(u).block_until_ready()
      times.append(time.perf_counter() - start)
    best[scan] = 1e3 * min(times)
  return best


def story(key: jax.Array) -> str:
  rng = _rng(key)
  turns = "".join(f"{two_turns(degrees):7.1f}°" for degrees in (10, 45, 90))
  changes = [covariance(rng, step) for step in (0.3, 0.03, 0.003)]
  rules = "\n".join(f"    {name:<44}" + "".join(f"{c[name]:9.0e}" for c in changes) for name in changes[0])
  long = _long_product(int(rng.integers(2**31)))
  drifts = "\n".join(f"    {name:<24}{drift[-1]:9.1e}{distance[-1]:12.1e}" for name, (drift, distance) in long.items())
  order = slopes(series_errors(rng, STEPS), STEPS)[:, 0]
  terms = {m: (int(np.ceil(m + 8 * np.sqrt(m))), fewest_terms(m)) for m in (0.01, 4.0)}
  tails = {m: scipy.stats.poisson.sf(few, m) for m, (few, _) in terms.items()}
  lengths = (1, 4, 64, 4096)
  read = read_by_rotations(rng, 8, lengths[-1])
  by_rotation = "".join(f"{np.mean(read[:, n - 1]):9.1%}" for n in lengths)
  by_angle = "".join(f"{1 - misread_by_angles(rng, n, draws=3000):9.1%}" for n in lengths)
  scans = ", ".join(f"{name} {ms:.1f} ms" for name, ms in milliseconds(rng).items())
  thumb = f"{terms[0.01][0]} and {terms[4.0][0]}, with tails of {tails[0.01]:.0e} and {tails[4.0]:.0e}"
  return f"""\
What it is. Every token emits a rotation U_t = exp A_t of small blocks of channels. The ordered
product T_t = U_t ··· U_0 carries queries, keys and values into one common frame, where they meet in
ordinary attention, ⟨T_tᵀq_t, T_sᵀk_s⟩; the output is carried back by T_t. Because rotations invert,
what lies between two tokens needs no T×T object: R = T_t T_sᵀ exactly.

What it is not. A chain has one path between two positions, so it has no curvature. What is real is
that rotations of three dimensions do not commute: the product remembers the order of tokens.

Turning about x and then y, against y and then x, by 10°, 45°, 90°: {turns} apart
    In the plane the two orders agree: angles add, and a sum forgets its order.

Covariance: change of scores and outputs when
    frames and generators move per step by           0.3     0.03    0.003
{rules}
    The first rule is exact; the second, often written for it, is its limit for small steps only.
    This is about the core. A layer whose projections are fixed is not invariant.

A product of {LENGTH:,} rotations       max |TᵀT - I|    from the double product
{drifts}
    Correction keeps T orthogonal; it cannot undo the rounding that turned it. bfloat16 is lost.

Series for log(e^X e^Y) cut after order 1 .. 4 errs as ε to the power {", ".join(f"{s:.2f}" for s in order)}

Uniformization: hops needed for a tail of 1e-7 at m = 0.01 and 4: {terms[0.01][1]} and {terms[4.0][1]}
    The rule m + 8√m takes {thumb}: it bounds nothing.

Words over the icosahedral group A₅, product named rightly, for words of
    letters               {"".join(f"{n:9,}" for n in lengths)}
    frames in SO(3)       {by_rotation}
    sums of angles        {by_angle}    chance {1 / icosahedral.ORDER:.1%}
    One layer, by construction; whether training finds it is another question. A fixed-depth
    transformer without such a product cannot do this at all lengths, unless TC⁰ = NC¹.

1,024 steps of 64 blocks on this machine: {scans}
"""


def order_on_a_sphere(key: jax.Array):
  """Where one vector ends after the same twelve rotations in 2,000 orders, in three dimensions and in the plane."""
  from matplotlib.figure import Figure

  rng = _rng(key)
  a = 0.5 * rng.normal(size=(12, 3)).astype(np.float32)
  U = scipy.linalg.expm(np.asarray(_skew(a, 3), np.float64))
  in_plane = scipy.linalg.expm(np.asarray(_skew(a * np.array([1, 0, 0], np.float32), 3), np.float64))
  orders = [rng.permutation(12) for _ in range(2000)]
  end = lambda edges: np.stack([functools.reduce(lambda w, t: edges[t] @ w, order, np.eye(3)[0]) for order in orders])
  figure = Figure(figsize=(7, 3.6), layout="constrained")
  axes = figure.add_subplot(projection="mollweide")
  for points, colour, size, label in (
    (end(U), COLOURS[0], 3, "rotations in three dimensions"),
    (end(in_plane), COLOURS[1], 70, "rotations in one plane: a single point"),
  ):
    x, y, z = points.T
    axes.scatter(np.arctan2(y, x), np.arcsin(np.clip(z, -1, 1)), s=size, color=colour, label=label, lw=0)
  axes.grid(alpha=0.3)
  axes.set_xticklabels([])
  axes.set_yticklabels([])
  legend = figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
  for handle in legend.legend_handles:
    handle.set_sizes([40])
  axes.set_title("one vector after the same 12 rotations, in 2,000 orders", fontsize=13)
  return figure


def _tidy(*axes):
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=11)
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
      text.set_size(13)


def drift_and_series(key: jax.Array):
  """Drift of a long product, and the errors of the series for log(e^X e^Y) with their slopes."""
  from matplotlib.figure import Figure

  rng = _rng(key)
  figure = Figure(figsize=(7.6, 3.8), layout="constrained")
  left, right = figure.subplots(1, 2)
  at = 2 ** np.arange(4, 14)
  for (name, (drift, distance)), colour in zip(_long_product(int(rng.integers(2**31))).items(), COLOURS, strict=False):
    left.loglog(at, drift[at - 1], "-o", ms=4, color=colour, label=name)
    left.loglog(at, distance[at - 1], ":", lw=1.5, color=colour)
  left.plot([], [], ":", color="0.4", label="distance from the exact product")
  left.set(xlabel="factors", ylabel="max |TᵀT - I|", title="orthogonality", ylim=(5e-8, 3e4))
  left.legend(frameon=False, fontsize=9.5, loc="upper left")
  errors = series_errors(rng, STEPS)[..., 0]
  for k, slope in enumerate(slopes(errors, STEPS)):
    label = f"order {k + 1}: slope {slope:.2f}"
    right.loglog(STEPS, errors[k], marker=MARKERS[k], ms=5, color=COLOURS[k], label=label)
  right.set(xlabel="ε, size of X and Y", ylabel="error", title="series for log(e^X e^Y)", ylim=(1e-11, 1e1))
  right.set_xticks(STEPS, [f"{step:g}" for step in STEPS])
  right.minorticks_off()
  right.legend(frameon=False, fontsize=9.5, loc="upper left")
  _tidy(left, right)
  return figure


def uniformization(key: jax.Array):
  """The error of the cut series below its bound, and how many terms a tail of 1e-7 takes."""
  from matplotlib.figure import Figure

  rng = _rng(key)
  figure = Figure(figsize=(7.6, 3.6), layout="constrained")
  left, right = figure.subplots(1, 2)
  m = np.geomspace(0.1, 16, 12)
  for K, colour, marker in zip((3, 8, 18), COLOURS, MARKERS, strict=False):
    left.loglog(m, scipy.stats.poisson.sf(K, m), "-", lw=1.2, color=colour, label=f"bound, K = {K}")
    errors = np.array([truncation(rng, float(x), K)[1] for x in m])
    seen = errors > 1e-14
    left.loglog(m[seen], errors[seen], marker, ms=5, mfc="none", color=colour)
  left.plot([], [], "o", mfc="none", color="0.4", label="worst error found")
  left.set(
    xlabel="m, mean number of hops", ylabel="error / range of values", title="cut after K hops", ylim=(1e-15, 1e7)
  )
  left.legend(frameon=False, fontsize=9.5, loc="upper left")
  fine = np.geomspace(0.01, 16, 60)
  right.semilogx(fine, [fewest_terms(float(x)) for x in fine], color=COLOURS[0], lw=1.8, label="tail <= 1e-7")
  right.semilogx(fine, np.ceil(fine + 8 * np.sqrt(fine)), "--", color=COLOURS[1], lw=1.8, label="⌈m + 8√m⌉")
  right.set(xlabel="m, mean number of hops", ylabel="K", title="terms that are needed")
  right.legend(frameon=False, fontsize=11)
  _tidy(left, right)
  return figure


DEMO = Demo(
  name="gauge",
  summary="rotations that depend on content, and what their order is worth",
  story=story,
  claims=CLAIMS,
  plots=(order_on_a_sphere, drift_and_series, uniformization),
  refs=("Barrington 1989", "Jensen 1953", "Blanes et al. 2009, arXiv 0810.5488"),
)
