"""Tropical attention: what max and plus buy, what they cost, and what a margin certifies."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import tropical, tropical_training
from mgr_jax.attention import tropical_cases as cases
from mgr_jax.attention.tropical_margin_claims import applied_flip
from mgr_jax.attention.tropical_margins import winners_and_margins
from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_tiles import scores

D = 16
POLYNOMIAL = (0.0, 3.0, 4.0, -np.inf, -np.inf, -2.0)
ITEMS = (4, 8, 16, 32, 64, 128, 256)
GROUPS = 4
DECOYS = 8 ** np.arange(1, 5)
GAP, SPREAD = 4.0, 2.0
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LENGTHS = {"scan": (1024, 8192), "definition": (128, 512)}
SAMPLES, STEPS = 24, 300


def seed_of(key: jax.Array) -> int:
  return int(np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(2**31))


def float32_case(seed: int, T: int):
  """q, k, v of one head pair of size D, slopes and clock."""
  q, k, v = (np.float32(x) for x in cases.draw(np.random.default_rng(seed), T, D))
  return q, k, v, np.float32([0.0, 2**-6]), cases.clock(T)


def paths() -> tuple[float, list[int]]:
  """The heaviest path 0 -> 3 of a small graph by squaring, and the matrix row of all heaviest paths from 0."""
  edges = np.full((4, 4), -np.inf)
  for i, j, weight in ((0, 1, 2), (1, 2, 3), (0, 2, 4), (2, 3, 1), (0, 3, 5)):
    edges[i, j] = weight
  star = np.asarray(tropical.kleene_star(jnp.asarray(edges, jnp.float32)))
  return float(star[0, 3]), [int(x) for x in star[0]]


def growth(seed: int) -> dict[str, float]:
  """Slope of log time over log T of the forward pass, by scan and by the definition; the fastest of three runs each."""
  found = {}
  for name, lengths in LENGTHS.items():
    run, seconds = getattr(cases, f"by_{name}"), []
    for T in lengths:
      args = float32_case(seed, T)
      jax.block_until_ready(run(*args))
      times = []
      for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
      seconds.append(min(times))
    found[name] = float(np.log(seconds[1] / seconds[0]) / np.log(lengths[1] / lengths[0]))
  return found


@functools.cache
def retrievable(seed: int, draws: int = 8) -> dict[str, np.ndarray]:
  """Share of n stored random keys that some query can select, for each n of `ITEMS`; mean over draws.

  A max-plus score selects through one coordinate per group, so one-hot queries exhaust what any query can do. For
  Hilbert's score and for softmax (keys of equal length) each key is its own query.
  """
  n, most = D // GROUPS, max(ITEMS)
  keys = np.random.default_rng(seed).normal(size=(draws, 1, most, D)).astype(np.float32)
  keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
  digits = np.stack(np.unravel_index(np.arange(n**GROUPS), (n,) * GROUPS), -1)
  grouped = np.where(np.arange(n) == digits[..., None], 0.0, -1e3).reshape(-1, D)
  one_hot = np.where(np.eye(D)[np.arange(most) % D], 0.0, -1e3)
  same = lambda q: np.broadcast_to(np.float32(q), keys.shape)
  queries = {
    "one group": (same(one_hot), Options()),
    f"{GROUPS} groups": (same(grouped), Options(score_groups=GROUPS)),
    "Hilbert": (keys, Options(score="hilbert")),
    "softmax": (keys, Options(score="dot")),
  }
  found = {}
  for name, (q, opts) in queries.items():
    a = np.asarray(jax.jit(scores, static_argnums=2)(q[:, :, None], keys, opts))[:, 0, 0]
    rows = lambda n, own=q is keys: slice(n if own else None)
    selected = [[len(np.unique(np.argmax(x[rows(n), :n], -1))) / n for x in a] for n in ITEMS]
    found[name] = np.mean(selected, -1)
  return found


@functools.cache
def pivot(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One key leads n-1 equal decoys by `GAP`; for each n of `DECOYS` three shares.

  The pivot's softmax weight; the coordinates in which max-plus returns the pivot's value exactly; those in which a
  maximum of the values alone would. Decoys carry values of their own within `SPREAD`.
  """
  rng, found = np.random.default_rng(seed), []
  for n in DECOYS.tolist():
    score = np.where(np.arange(n) == 0, GAP, 0.0)
    value = rng.uniform(-SPREAD, SPREAD, (n, D)) / 2
    exact = np.max(score[:, None] + value, 0) - GAP == (GAP + value[0]) - GAP
    found.append((np.exp(GAP) / np.exp(score).sum(), np.mean(exact), np.mean(np.argmax(value, 0) == 0)))
  return tuple(np.array(found).T)


@functools.cache
def homotopy(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Largest distance of finite-β outputs from the limit, and the bound (log D + log T)/β, for each β of `BETAS`."""
  T = 64
  q, k, v, decay, clock = float32_case(seed, T)
  hard = cases.by_scan(q, k, v, decay, clock)
  gap = [float(jnp.max(cases.by_streaming(q, k, v, decay, clock, beta) - hard)) for beta in BETAS]
  return np.array(gap), (np.log(D) + np.log(T)) / np.array(BETAS)


@functools.cache
def margins(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Margins γ of all outputs of a random case, and the share that certifies the winner at each β: γ > log(D)/β."""
  q, k, v, decay, clock = float32_case(seed, 128)
  found = jax.jit(lambda: winners_and_margins(q, k, v, decay, clock, cases.REBASE))()
  margin = np.asarray(found.margin)[1:].ravel()
  return margin, np.array([np.mean(margin > np.log(D) / beta) for beta in BETAS])


@functools.cache
def flips(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Of n outputs: the margin, the smallest perturbation that flips the winner, and whether it is the smallest.

  That is: applied, 1.001 of it flips and 0.999 does not.
  """
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=shape) for shape in ((n, D), (32, D), (n, 32)))
  flip = tropical.smallest_flip(q, k, v)
  (margin, over), (_, under) = (applied_flip(q, k, v, flip, factor) for factor in (1.001, 0.999))
  return margin, flip.size, over & ~under


def routes(seed: int) -> tuple[str, bool]:
  """Four outputs of one query as named sums, and whether re-adding each gives the bits of the maximum."""
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((D,), (32, D), (32, 4)))
  route = tropical.route_trace(q, k, v)
  exact = np.max((k[:, :, None] + v[:, None]) + q[:, None], (0, 1))
  lines = (
    f"    output {d} = q[{r}] + k[{s},{r}] + v[{s},{d}] = {q[r]:.3f} {k[s, r]:+.3f} {v[s, d]:+.3f} = {y:.3f}"
    for d, (s, r, y) in enumerate(zip(*(np.asarray(x).tolist() for x in route), strict=True))
  )
  return "\n".join(lines), bool(np.all(np.asarray(route.value) == exact))


@functools.cache
def training(seed: int, factor: float = 1.0):
  """Perceptron steps on one wrong sample after another, each `factor` times as long as is certified.

  Returns:
    For each step its length η, the change of the sample's own loss, what η and the number of entries that moved predict
    for it, the change of the mean loss over all samples, and the mean loss itself.
  """
  tables, words, labels = tropical_training.random_task(np.random.default_rng(seed), SAMPLES)
  loss_of = lambda tables: tropical_training.losses(tropical_training.classify(tables, words).logits, labels)
  mean_of = lambda loss: np.mean(np.maximum(loss, 0))
  loss, found = loss_of(tables), []
  for step in range(STEPS):
    wrong = np.flatnonzero(loss > 0)
    if not wrong.size:
      break
    i = wrong[step % wrong.size]
    tables, size, moved = tropical_training.perceptron_step(tables, words[i], labels[i], factor)
    before, loss = loss, loss_of(tables)
    rise = mean_of(loss) - mean_of(before)
    found.append((size, loss[i] - before[i], -size * moved, rise, mean_of(loss)))
  return tuple(np.array(found).T)


def story(key: jax.Array) -> str:
  seed = seed_of(key)
  heaviest, row = paths()
  roots = tropical.trop_roots(POLYNOMIAL)
  root_text = ", ".join(f"{x:g} (×{m})" for x, m in zip(roots.at, roots.multiplicity, strict=True))
  args = float32_case(seed, LENGTHS["definition"][1])
  scan, exact = cases.by_scan(*args), cases.by_definition(*args)
  chunks = bool(jnp.all(cases.by_scan(*args, 16) == scan))
  slope = growth(seed)
  shares = retrievable(seed)
  table = "\n".join(f"    {name:<12}" + "".join(f"{share:8.0%}" for share in shares[name]) for name in shares)
  decoys = "\n".join(
    f"    {n:>6} keys  {w:15.2%}  {returned:14.0%}  {pooled:20.0%}"
    for n, w, returned, pooled in zip(DECOYS, *pivot(seed), strict=True)
  )
  gap, bound = homotopy(seed)
  steps = "\n".join(
    f"    β = {beta:<5g} largest gap {g:7.4f}   bound {b:7.4f}" for beta, g, b in zip(BETAS, gap, bound, strict=True)
  )
  margin, certified = margins(seed)
  lead, smallest, sharp = flips(seed)
  named, re_added = routes(seed)
  at_radius = np.mean(smallest < 1.001 * lead / 6)
  _, own, predicted, rise, _ = training(seed)
  _, long, counted, _, _ = training(seed, 20.0)
  rose = np.sum(long > 1e-12)
  as_counted, long_as_counted = (np.sum(np.abs(x) < 1e-12) for x in (own - predicted, long - counted))
  return f"""\
A new arithmetic. Read + as max and × as +. Powers of a matrix of edge weights hold best paths: the
heaviest path 0 -> 3 of a small graph weighs {heaviest:g}, and all from 0 weigh {row}.
max(0, x+3, 2x+4, 5x-2) has the roots {root_text}: as many as its degree.

Attention that is a scan. y_td = max over s and r of q_tr + k_sr + v_sd. The maxima exchange, so
U[r, d] = max_s (k_sr + v_sd), a D×D table, replaces the whole past.
    largest |scan - definition| at T = {len(scan)}: {float(jnp.max(jnp.abs(scan - exact))):.1e}
    in chunks of 16 tokens {"the same bits" if chunks else "other bits"}
    measured time grows as T^{slope["scan"]:.2f} by the scan, T^{slope["definition"]:.2f} over all pairs

The capacity cliff. A query sees a key only where that key holds a coordinate's record: at most D
of the keys can ever win. Share of n stored random keys that any query can select, D = {D}:
    n           {"".join(f"{n:8d}" for n in ITEMS)}
{table}

No dilution. One key leads the others by {GAP:g}; all values lie within {SPREAD:g} of each other:
                 softmax weight  max-plus exact  found by largest value
{decoys}
If values spread more than the lead, max-plus is a running maximum of the values instead.

The homotopy. log Σ exp(β·)/β in place of max is linear attention with features exp(βx), read in
log-values. It never equals softmax attention. Its distance from the limit:
{steps}

Certificates. The winner of an output leads the next key by γ, and stays while q, k and v move by
less than γ/6. Median γ here: {np.median(margin):.2f}. Smoothed scores provably keep the hard winner of
{certified[4]:.0%} of the outputs at β = {BETAS[4]:g}, of {certified[6]:.0%} at β = {BETAS[6]:g}.
    smallest perturbation that flips, in units of γ: {np.min(smallest / lead):.4f} to {np.max(smallest / lead):.4f}
    1.001 of it flips and 0.999 does not in {np.sum(sharp)} of {len(sharp)} outputs; {at_radius:.0%} flip right at γ/6

Routes. Every output is one sum that can be named:
{named}
    re-added they give {"the maximum's own bits" if re_added else "other bits"}

Monotone training. A network of maxima alone names four entries for each logit. One perceptron step
raises those of the true class by η, lowers the rival's; η < lead/8 keeps every winner, so the
sample's own loss falls by exactly η times the number of entries that moved. The mean may rise.
    {len(own)} certified steps: own loss fell as counted in {as_counted}, the mean loss rose in {np.sum(rise > 1e-12)}
    20 times as long: as counted in {long_as_counted} of {len(long)}; it rose in {rose}: logits are convex
"""


def _panels():
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.1), layout="constrained")
  return figure, *figure.subplots(1, 2)


def arithmetic(key: jax.Array):
  """A tropical polynomial with its roots, and the smooth family's way to the maximum."""
  figure, left, right = _panels()
  x = np.linspace(-5, 4, 200)
  for j, c in enumerate(POLYNOMIAL):
    if np.isfinite(c):
      left.plot(x, c + j * x, color="0.7", lw=1)
  c = np.array([max(c, -1e9) for c in POLYNOMIAL])
  left.plot(x, np.asarray(tropical.trop_poly_eval(c, x)), color=BLUE, lw=2.5)
  roots = tropical.trop_roots(POLYNOMIAL)
  for at, multiplicity in zip(roots.at, roots.multiplicity, strict=True):
    y = float(tropical.trop_poly_eval(c, np.array(at)))
    left.plot(at, y, color=ORANGE, marker="o", ms=7)
    left.annotate(f"×{multiplicity}", (at, y), (-4, 7), textcoords="offset points", fontsize=11, ha="right")
  left.set_ylim(-3, 16)
  styled(left, "max(0, x+3, 2x+4, 5x−2)", "x", "p(x)", legend=None)
  gap, bound = homotopy(seed_of(key))
  right.loglog(BETAS, bound, color="0.3", lw=1.5, ls="--", label=r"$(\log D+\log T)/\beta$")
  right.loglog(BETAS, gap, color=BLUE, marker="o", ms=6, lw=2, label="largest gap")
  styled(right, "finite β above the maximum", "β", "distance")
  return figure


def capacity(key: jax.Array):
  """How many stored keys can be selected, and how a pivot fares among decoys."""
  figure, left, right = _panels()
  looks = ((BLUE, "o", "-"), (GREEN, "s", "-"), (PINK, "D", "-"), (ORANGE, "^", ":"))
  for (name, share), (colour, marker, line) in zip(retrievable(seed_of(key)).items(), looks, strict=True):
    left.semilogx(ITEMS, share, color=colour, marker=marker, ms=5, lw=2, ls=line, base=2)
    x, y = {"one group": (4, 0.55), "Hilbert": (40, 1.04), "softmax": (40, 0.88)}.get(name, (40, 0.72))
    left.text(x, y, name, fontsize=11, color=colour)
  n = np.geomspace(ITEMS[0], ITEMS[-1], 99)
  left.semilogx(n, np.minimum(1, D / n), color="0.3", lw=1, ls="--", base=2)
  left.axvline(D, color="0.6", lw=1)
  left.annotate("n = D", (D, 0), (-4, 4), textcoords="offset points", fontsize=11, color="0.3", ha="right")
  left.annotate("D/n", (88, D / 88), (7, 3), textcoords="offset points", fontsize=11, color="0.3")
  left.set(ylim=(0, 1.12), yticks=(0, 0.5, 1))
  styled(left, "keys that a query can select", "stored keys n", "share", legend=None)
  weight, returned, _ = pivot(seed_of(key))
  theory = 1 / (1 + (DECOYS - 1) * np.exp(-GAP))
  right.loglog(DECOYS, returned, color=BLUE, marker="o", ms=6, lw=2, label="max-plus, exact share")
  right.loglog(DECOYS, weight, color=ORANGE, marker="^", ms=6, lw=0, label="softmax weight")
  right.loglog(DECOYS, theory, color="0.3", lw=1, ls="--", label=r"$1/(1+(n-1)e^{-\delta})$")
  right.set_ylim(1e-3, 2)
  styled(right, f"one key leads by δ = {GAP:g}", "keys n", "share", legend="lower left")
  return figure


def certificates(key: jax.Array):
  """The distribution of margins, and the smallest perturbations that flip a winner."""
  figure, left, right = _panels()
  margin, _ = margins(seed_of(key))
  left.hist(margin, bins=40, color=BLUE, alpha=0.8)
  for beta, colour, line in ((2.0, ORANGE, "--"), (8.0, PINK, "-")):
    left.axvline(np.log(D) / beta, color=colour, lw=2, ls=line, label=rf"$\log D/\beta$, $\beta={beta:g}$")
  styled(left, "certified: right of a line", "margin γ", "outputs")
  lead, smallest, _ = flips(seed_of(key))
  right.plot(lead, smallest, ".", color=BLUE, ms=4, label="smallest that flips")
  ends = np.array([0, lead.max()])
  right.plot(ends, ends / 6, color=ORANGE, lw=2, label="γ/6, certified")
  right.plot(ends, ends / 4, color="0.3", lw=1.5, ls="--", label="γ/4")
  styled(right, "perturbation of q, k and v", "margin γ", "size in the sup norm")
  return figure


def training_steps(key: jax.Array):
  """Certified perceptron steps: the sample's own loss, and the mean over all samples."""
  figure, left, right = _panels()
  size, own, _, rise, mean = training(seed_of(key))
  # Close to a tie steps are so short that rounding shows.
  own, rise = (np.where(size > 1e-9, x / np.maximum(size, 1e-9), np.nan) for x in (own, rise))
  left.plot(own, ".", color=BLUE, ms=4, label="the sample's own loss")
  left.plot(rise, "x", color=ORANGE, ms=4, label="mean over all samples")
  left.axhline(0, color="0.6", lw=1)
  styled(left, "change in one certified step", "step", "change over η", legend=None)
  left.set(ylim=(-9, 5), yticks=(-8, -6, -4, -2, 0, 2))
  left.legend(frameon=False, fontsize=11, loc="upper right", markerscale=2)
  right.plot(mean, color=ORANGE, lw=2)
  styled(right, "all samples together", "step", "mean loss", legend=None)
  return figure


DEMO = Demo(
  name="tropical",
  summary="attention in the max-plus semiring: linear time, little capacity, certificates",
  story=story,
  timed=True,
  plots=(arithmetic, capacity, certificates, training_steps),
  refs=(
    "Zhang, Naitzat, Lim, 2018, arXiv 1805.07091 (networks of maxima as tropical rational maps)",
    "Karp, 1978, A characterization of the minimum cycle mean in a digraph",
  ),
  not_shown=(
    ("time against T beside softmax", "needs minutes of a quiet machine; python -m train.bench speed measures it"),
    ("memory linear in T", "checked by tests/test_tropical.py from the compiled programs"),
    ("recall that training reaches", "half an hour of two cores; python -m train.experiment tropical_capacity"),
    ("longer texts than trained on, shortest paths by training, annealing β", "needs training; no experiment is kept"),
    ("the max-plus MLP, --mlp=tropical", "checked by tests/test_tropical_mlp.py; its algebra is tropical.feed_forward"),
    ("diagnostics of a run", "--probe_every writes them to metrics.jsonl; checked by tests/test_tropical.py"),
    ("second derivatives", "checked by tests/test_tropical.py against autodiff of the definition"),
  ),
)
