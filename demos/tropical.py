"""Tropical attention: what max and plus buy, what they cost, and what a margin certifies."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import tropical
from mgr_jax.attention import tropical_cases as cases
from mgr_jax.attention.tropical_margins import winners_and_margins
from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_tiles import scores

D = 16
ITEMS = (4, 8, 16, 32, 64, 128, 256)
GROUPS = 4
DECOYS = 8 ** np.arange(1, 5)
GAP, SPREAD = 4.0, 2.0
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LENGTHS = {"scan": (512, 1024, 2048, 4096), "tiles": (256, 512, 1024)}


def rng_of(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def float32_case(rng, T: int):
  """q, k, v of one head pair of size D, slopes and clock."""
  q, k, v = (np.float32(x) for x in cases.draw(rng, T, D))
  return q, k, v, np.float32([0.0, 2**-6]), cases.clock(T)


def paths() -> tuple[float, list[int]]:
  """The heaviest path 0 -> 3 of a small graph by squaring, and the matrix row of all heaviest paths from 0."""
  edges = np.full((4, 4), -np.inf)
  for i, j, weight in ((0, 1, 2), (1, 2, 3), (0, 2, 4), (2, 3, 1), (0, 3, 5)):
    edges[i, j] = weight
  star = np.asarray(tropical.kleene_star(jnp.asarray(edges, jnp.float32)))
  return float(star[0, 3]), [int(x) for x in star[0]]


def growth(key: jax.Array) -> dict[str, float]:
  """Slope of log time over log T of the forward pass, by scan and by tiles; the fastest of three runs each."""
  found = {}
  for name, lengths in LENGTHS.items():
    seconds = []
    for T in lengths:
      args = float32_case(rng_of(key), T)
      run = cases.by_scan if name == "scan" else cases.by_tiles
      jax.block_until_ready(run(*args))
      times = []
      for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
      seconds.append(min(times))
    found[name] = float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
  return found


def retrievable(key: jax.Array) -> dict[str, np.ndarray]:
  """Share of n stored random keys that some query can select, for each n of `ITEMS`.

  A max-plus score selects through one coordinate per group, so one-hot queries exhaust what any query can do. For
  Hilbert's score and for softmax (keys of equal length) each key is its own query.
  """
  rng, found = rng_of(key), {"one group": [], f"{GROUPS} groups": [], "Hilbert": [], "softmax": []}
  n = D // GROUPS
  digits = np.stack(np.unravel_index(np.arange(n**GROUPS), (n,) * GROUPS), -1)
  grouped = np.where(np.arange(n) == digits[..., None], 0.0, -1e3).reshape(-1, D)
  one_hot = np.where(np.eye(D), 0.0, -1e3)
  for items in ITEMS:
    keys = rng.normal(size=(items, D))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    queries = {
      "one group": (one_hot, Options()),
      f"{GROUPS} groups": (grouped, Options(score_groups=GROUPS)),
      "Hilbert": (keys, Options(score="hilbert")),
      "softmax": (keys, Options(score="dot")),
    }
    for name, (q, opts) in queries.items():
      a = scores(jnp.float32(q)[None, None, None], jnp.float32(keys)[None, None], opts)[0, 0, 0]
      found[name].append(len(np.unique(np.argmax(a, -1))) / items)
  return {name: np.array(shares) for name, shares in found.items()}


def pivot(key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """One key leads n-1 equal decoys by `GAP`: its softmax weight, and whether max-plus returns its value, for each n.

  Decoys carry values of their own within `SPREAD`, so pooling the values would not find the pivot's.
  """
  rng, weight, exact = rng_of(key), [], []
  for n in DECOYS.tolist():
    score = np.where(np.arange(n) == 0, GAP, 0.0)
    value = rng.uniform(-SPREAD, SPREAD, (n, D)) / 2
    weight.append(np.exp(GAP) / np.exp(score).sum())
    exact.append(np.all(np.max(score[:, None] + value, 0) - GAP == (GAP + value[0]) - GAP))
  return np.array(weight), np.array(exact)


def homotopy(key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Largest distance of finite-β outputs from the limit, and the bound (log D + log T)/β, for each β of `BETAS`."""
  T = 64
  q, k, v, decay, clock = float32_case(rng_of(key), T)
  hard = cases.by_scan(q, k, v, decay, clock)
  gap = [float(jnp.max(cases.by_streaming(q, k, v, decay, clock, beta) - hard)) for beta in BETAS]
  return np.array(gap), (np.log(D) + np.log(T)) / np.array(BETAS)


def margins(key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Margins γ of all outputs of a random case, and the share that certifies the winner at each β: γ > log(D)/β."""
  q, k, v, decay, clock = float32_case(rng_of(key), 128)
  found = jax.jit(lambda: winners_and_margins(q, k, v, decay, clock, cases.REBASE))()
  margin = np.asarray(found.margin)[1:].ravel()
  return margin, np.array([np.mean(margin > np.log(D) / beta) for beta in BETAS])


def story(key: jax.Array) -> str:
  heaviest, row = paths()
  roots = tropical.trop_roots([0.0, 3.0, 4.0, -np.inf, -np.inf, -2.0])
  root_text = ", ".join(f"{x:g} (×{m})" for x, m in zip(roots.at, roots.multiplicity, strict=True))
  args = float32_case(rng_of(key), 256)
  scan, exact = cases.by_scan(*args), cases.by_definition(*args)
  chunks = bool(jnp.all(cases.by_scan(*args, 16) == scan))
  slope = growth(key)
  shares = retrievable(key)
  table = "\n".join(f"    {name:<12}" + "".join(f"{share:8.0%}" for share in shares[name]) for name in shares)
  weight, returned = pivot(key)
  decoys = "\n".join(
    f"    {n:>6} keys   softmax weight {w:7.2%}   max-plus {'exact' if ok else 'mixed'}"
    for n, w, ok in zip(DECOYS, weight, returned, strict=True)
  )
  gap, bound = homotopy(key)
  steps = "\n".join(
    f"    β = {beta:<5g} largest gap {g:7.4f}   bound {b:7.4f}" for beta, g, b in zip(BETAS, gap, bound, strict=True)
  )
  margin, certified = margins(key)
  rng = rng_of(key)
  q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((D,), (32, D), (32, 4)))
  route = tropical.route_trace(q, k, v)
  routes = "\n".join(
    f"    output {d} = q[{r}] + k[{s},{r}] + v[{s},{d}] = {q[r]:.3f} {k[s, r]:+.3f} {v[s, d]:+.3f} = {y:.3f}"
    for d, (s, r, y) in enumerate(zip(*(np.asarray(x).tolist() for x in route), strict=True))
  )
  return f"""\
A new arithmetic. Read + as max and × as +. Powers of a matrix of edge weights hold best paths: the
heaviest path 0 -> 3 of a small graph weighs {heaviest:g}, and all from 0 weigh {row}.
max(0, x+3, 2x+4, 5x-2) has the roots {root_text}: as many as its degree.

Attention that is a scan. y_td = max over s and r of q_tr + k_sr + v_sd. The maxima exchange, so
U[r, d] = max_s (k_sr + v_sd), a D×D table, replaces the whole past.
    largest |scan - definition| at T = 256: {float(jnp.max(jnp.abs(scan - exact))):.1e}
    in chunks of 16 tokens {"the same bits" if chunks else "other bits"}
    measured time grows as T^{slope["scan"]:.2f} by the scan, T^{slope["tiles"]:.2f} by tiles of scores

The capacity cliff. A query sees a key only where that key holds a coordinate's record: at most D
of the keys can ever win. Share of n stored keys that any query can select, D = {D}:
    n           {"".join(f"{n:8d}" for n in ITEMS)}
{table}

No dilution. One key leads the others by {GAP:g}; all values lie within {SPREAD:g}:
{decoys}
If values spread more than the lead, max-plus is a running maximum of the values instead.

The homotopy. log Σ exp(β·)/β in place of max is linear attention with features exp(βx), read in
log-values. It never equals softmax attention. Its distance from the limit:
{steps}

Certificates. The winner of an output leads the next key by γ, and stays while q, k and v move by
less than γ/6. Median γ here: {np.median(margin):.2f}. Smoothed scores provably keep the hard winner of
{certified[4]:.0%} of the outputs at β = {BETAS[4]:g}, of {certified[6]:.0%} at β = {BETAS[6]:g}.

Routes. Every output is one sum that can be named:
{routes}
"""


def capacity(key: jax.Array):
  """How many stored keys can be selected, and how a pivot fares among decoys."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), layout="constrained")
  left, right = figure.subplots(1, 2)
  styles = zip(retrievable(key).items(), (BLUE, GREEN, PINK, ORANGE), "osD^", strict=True)
  for (name, share), colour, marker in styles:
    left.semilogx(ITEMS, share, color=colour, marker=marker, ms=6, lw=2, base=2, label=name)
  left.axvline(D, color="0.5", lw=1, ls="--")
  left.text(D * 1.08, 0.02, "n = D", fontsize=11, color="0.3")
  left.set_ylim(0, 1.08)
  styled(left, "keys that any query can select", "stored keys n", "share")
  weight, returned = pivot(key)
  right.loglog(DECOYS, weight, color=ORANGE, marker="^", ms=6, lw=2, label="softmax weight")
  right.loglog(
    DECOYS, 1 / (1 + (DECOYS - 1) * np.exp(-GAP)), color="0.3", lw=1, ls="--", label=r"$1/(1+(n-1)e^{-\delta})$"
  )
  right.loglog(DECOYS, returned, color=BLUE, marker="o", ms=6, lw=2, label="max-plus, exact share")
  styled(right, f"one key leads by {GAP:g}", "keys n", "weight of the leading key")
  return figure


def smoothing(key: jax.Array):
  """Distance of finite β from the limit with its bound, and the distribution of margins."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), layout="constrained")
  left, right = figure.subplots(1, 2)
  gap, bound = homotopy(key)
  left.loglog(BETAS, gap, color=BLUE, marker="o", ms=6, lw=2, label="largest gap")
  left.loglog(BETAS, bound, color="0.3", lw=1, ls="--", label=r"$(\log D+\log T)/\beta$")
  styled(left, "finite β above the maximum", "β", "distance")
  margin, _ = margins(key)
  right.hist(margin, bins=60, color=BLUE, label="outputs")
  for beta, colour in ((2.0, ORANGE), (8.0, PINK)):
    right.axvline(np.log(D) / beta, color=colour, lw=2, ls="--", label=rf"$\log D/\beta$ at $\beta={beta:g}$")
  styled(right, "margins: what is certified lies right of a line", "γ", "outputs")
  return figure


DEMO = Demo(
  name="tropical",
  summary="attention in the max-plus semiring: linear time, little capacity, certificates",
  story=story,
  plots=(capacity, smoothing),
  refs=("Develin, Santos, Sturmfels 2005", "Zhang, Naitzat, Lim 2018", "Hashemi et al. 2025"),
)
