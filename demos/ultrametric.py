"""Ultrametric attention: a strange geometry, one layer by four algorithms, a phase transition, truncation, learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import padic, padic_functions, padic_kernel, padic_tree
from mgr_jax.attention import ultrametric_balls as balls
from mgr_jax.attention.ultrametric_decode import nodes_of_path
from mgr_jax.attention.ultrametric_dense import dense_attention
from mgr_jax.attention.ultrametric_digits import class_of
from mgr_jax.attention.ultrametric_features import tree_attention
from mgr_jax.attention.ultrametric_sort import ball_attention

P, K, T = 2, 8, 4096
RATIOS = (0.75, 1.0, 2.0)
ALPHA = 1.5  # Of the truncation figures.
PRIMES = ((2, 20), (3, 12), (5, 8), (7, 7))  # With the number of digits that int32 holds.
BRANCHING, DEPTH, SAMPLES = 4, 4, 2048  # Of the write-once tree.
SEEN = (32, 128, 512, 2048)
EXCEPTIONS = (0, 1, 2, 4, 8)
MAHLER = {"4^x": lambda x: 4**x, "x mod 3": lambda x: x % 3}
KEPT, POINTS = (1, 2, 4, 6, 8), 25
_vp = jax.jit(padic.vp, static_argnums=(1, 2))


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _seed(key: jax.Array) -> int:
  return int(_rng(key).integers(2**31))


def vp(n, p: int, depth: int) -> np.ndarray:
  return np.asarray(_vp(np.asarray(n, np.int32), p, depth))


def text_of(n: int, p: int, length: int) -> str:
  """Digits of n, the lowest first."""
  return "".join(str(n // p**j % p) for j in range(length))


def triangles(key: jax.Array) -> str:
  """Four 3-adic triangles with their sides."""
  points = _rng(key).integers(0, 3**6, (4, 3))
  sides = vp(np.abs(points - np.roll(points, -1, 1)), 3, 6)
  return "\n".join(
    "    " + "".join(f"{x:>5}" for x in p) + "   " + "".join(f"   3^-{d}" for d in side)
    for p, side in zip(points.tolist(), sides.tolist(), strict=True)
  )


def shared_digits(key: jax.Array) -> str:
  """Pairs of integers whose difference is divisible by 1, 3, 9 and 27, with their digits."""
  rng, rows = _rng(key), []
  for power in range(4):
    x = int(rng.integers(0, 300))
    y = x + int(rng.choice((1, 2, 4, 5, 7, 8))) * 3**power
    a, b = (np.asarray(padic.digits(np.array(n), 3, 6)) for n in (x, y))
    lcp, v = int(np.cumprod(a == b).sum()), int(vp(y - x, 3, 6))
    rows.append(f"    {x:>5} {text_of(x, 3, 6)}   {y:>5} {text_of(y, 3, 6)}   shared {lcp}   v({y - x}) = {v}")
  return "\n".join(rows)


def shadows(key: jax.Array) -> tuple[str, int, int]:
  """Inner products as digits, as valuations with their (min,+) shadow, and as sums of leading terms; p = 3.

  Returns five of them as text, of 20,000 how many cancel, and how many are in line with the rule: the valuation exceeds
  the shadow exactly if the leading terms cancel.
  """
  p, depth = 3, 12
  q, k = _rng(key).integers(1, 60, (2, 20_000, 3))
  vq, vk, product = vp(q, p, depth), vp(k, p, depth), np.sum(q * k, -1)
  v, shadow = vp(product, p, depth), np.min(vq + vk, -1)
  leading = np.where(vq + vk == shadow[:, None], (q // p**vq) * (k // p**vk), 0).sum(-1) % p
  show = [*np.flatnonzero(leading != 0)[:3], *np.flatnonzero(leading == 0)[:2]]
  rows = "\n".join(
    f"    {'·'.join(map(str, [q[i].tolist(), k[i].tolist()])):<28} = {product[i]:>5} = {text_of(product[i], p, 8)}"
    f"   v = {v[i]}   shadow {shadow[i]}   leading sum {leading[i]}"
    for i in show
  )
  return rows, int(np.sum(v > shadow)), int(np.sum((v > shadow) == (leading == 0)))


@functools.cache
def tie_rates(seed: int) -> dict[int, float]:
  """For each p how often v(x + y) exceeds both valuations, of 100,000 pairs."""
  rng, found = np.random.default_rng(seed), {}
  for p, depth in PRIMES:
    x, y = rng.integers(0, p**depth, (2, 100_000))
    v = [vp(z, p, depth) for z in (x, y, x + y)]
    found[p] = float(np.mean(v[2] > np.minimum(v[0], v[1])))
  return found


def by_table(a, b, c, v):
  """The layer one token at a time with the tables of decoding: every node holds the sums of its ball."""
  p, K = b.shape[-2], b.shape[-3]
  key, query = (nodes_of_path(class_of(x), p)[None] for x in (b[0, 0], a[0, 0, 0]))
  values = jnp.pad(v[0, :, 0], ((0, 0), (0, 1)), constant_values=1.0)
  now = jnp.zeros((1, 1), jnp.int32)

  def token(table, xs):
    key, query, value = xs
    table = balls.write(table, key[None], jnp.broadcast_to(value, (1, K + 1, value.size)), now, now[0], None)
    sums = c[0, 0] @ balls.read(table, query[None], now, None)[0]
    return table, sums[:-1] / sums[-1]

  empty = balls.empty(1, padic_tree.n_nodes(p, K), values.shape[-1], decays=False)
  return jax.lax.scan(token, empty, (key[0], query[0], values))[1][None, None, None]


def agreement(key: jax.Array) -> str:
  """Largest differences between four algorithms for the same layer, hard digits, in float32."""
  rng, p, depth, n = _rng(key), 4, 3, 300
  one_hot = lambda: (rng.integers(0, p, (1, 1, depth, 1, n)) == np.arange(p)[:, None]).astype(np.float32)
  a, b, v = one_hot(), one_hot(), rng.standard_normal((1, n, 1, 8), np.float32)
  c = np.asarray(jax.jit(padic_kernel.level_weights, static_argnums=1)(np.full((1, 1), 8, np.float32), depth))
  case = (a[:, :, None], b, c, v)
  dense = jax.jit(lambda *x: dense_attention(*x, None, None))(*case)
  fast = {
    "features": lambda *x: tree_attention(*x, None, None, 64),
    "sort": lambda *x: ball_attention(*x, None, None, 64),
    "table": by_table,
  }
  differences = {name: float(np.max(np.abs(np.asarray(jax.jit(f)(*case)) - dense))) for name, f in fast.items()}
  return ", ".join(f"{name} {x:.0e}" for name, x in differences.items()) + f" at T = {n}, p = {p}, K = {depth}"


@functools.cache
def shells(seed: int, ratios: tuple[float, ...] = RATIOS) -> dict[float, tuple[np.ndarray, float]]:
  """Mean share of the mass at lcp = d, and mean effective number of keys, for each α/p; 64 queries, T uniform keys."""
  rng = np.random.default_rng(seed)
  keys, queries = (rng.integers(0, P, (n, K)) for n in (T, 64))
  lcp = np.cumprod(queries[:, None] == keys, -1).sum(-1)
  count = np.stack([np.sum(lcp == d, -1) for d in range(K + 1)], -1)
  found = {}
  for ratio in ratios:
    weight = (ratio * P) ** np.arange(K + 1)
    mass = count * weight
    share = np.mean(mass / mass.sum(-1, keepdims=True), 0)
    found[ratio] = share, float(np.mean(mass.sum(-1) ** 2 / np.sum(mass * weight, -1)))
  return found


@functools.cache
def precision(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Largest error over 256 queries of attention with k of K digits, and the largest bound, for k = 0 .. K."""
  rng = np.random.default_rng(seed)
  keys, queries = (rng.integers(0, P, (n, K)) for n in (512, 256))
  lcp, v = np.cumprod(queries[:, None] == keys, -1).sum(-1), rng.uniform(-1, 1, 512)
  mean = lambda k: np.sum((w := ALPHA ** np.minimum(lcp, k)) * v, -1) / np.sum(w, -1)
  errors = [float(np.max(np.abs(mean(K) - mean(k)))) for k in range(K + 1)]
  bound = jax.jit(lambda k: jnp.max(padic.truncation_bound(lcp, ALPHA, k, np.max(np.abs(v)))))
  return np.array(errors), np.array([float(bound(k)) for k in range(K + 1)])


@jax.jit
def _fitted(digits, labels, every):
  tree, erred = padic_tree.tree_fit(digits, labels, BRANCHING)
  return tree.exists, erred, padic_tree.predict(tree, padic_tree.paths(every, BRANCHING), BRANCHING)


def fit(order, label) -> tuple[int, int, np.ndarray]:
  """Errors and nodes of one pass over the leaves in `order`, and which of all leaves are right afterwards.

  The last sample is repeated up to `SAMPLES`: it is right by then, and changes nothing.
  """
  every = np.arange(BRANCHING**DEPTH)
  order = np.pad(order, (0, SAMPLES - len(order)), mode="edge")
  digits = every[:, None] // BRANCHING ** np.arange(DEPTH) % BRANCHING
  exists, erred, found = _fitted(np.int32(digits[order]), np.int32(label[order]), np.int32(digits))
  return int(erred.sum()), int(exists.sum()), np.all(np.asarray(found) == label, -1)


@functools.cache
def write_once(seed: int) -> list[tuple[int, int, int, float, float]]:
  """Random labels: samples, errors, nodes, share of all leaves that are right, and the best possible expectation.

  Nothing can do better than to know the leaves it saw and to guess among p labels elsewhere.
  """
  rng, leaves, rows = np.random.default_rng(seed), BRANCHING**DEPTH, []
  label = rng.integers(0, BRANCHING, (leaves, 1))
  for n in SEEN:
    seen = rng.integers(0, leaves, n)
    errors, nodes, right = fit(seen, label)
    share = len(np.unique(seen)) / leaves
    rows.append((n, errors, nodes, float(np.mean(right)), share + (1 - share) / BRANCHING))
  return rows


def exceptions(seed: int) -> list[tuple[int, int, bool]]:
  """One label everywhere but at some leaves, eight passes: exceptions, nodes, whether all leaves are right."""
  rng, leaves, rows = np.random.default_rng(seed), BRANCHING**DEPTH, []
  for n in EXCEPTIONS:
    label = np.ones((leaves, 1), int)
    label[rng.permutation(leaves)[:n]] = 2
    _, nodes, right = fit(np.tile(np.arange(leaves), SAMPLES // leaves), label)
    rows.append((n, nodes, bool(np.all(right))))
  return rows


def mahler(f, kept: int) -> tuple[int | float, int | float]:
  """Smallest valuation of the dropped coefficients, and of the error of the first `kept` terms on 0 .. `POINTS` - 1."""
  values = [f(x) for x in range(POINTS)]
  coeffs = padic_functions.mahler_coeffs(values)
  errors = [y - padic_functions.mahler_eval(coeffs[:kept], x) for x, y in enumerate(values)]
  return padic_functions.mahler_certificate(coeffs, kept, 3), min(padic_functions.valuation(e, 3) for e in errors)


def functions_of_a_padic_integer() -> tuple[str, str]:
  """Truncated Mahler series of two functions on ℤ_3, and a root of x² = 2 in ℤ_7 lifted digit by digit."""
  rows = []
  for name, f in MAHLER.items():
    reached, bound = ([mahler(f, n)[i] for n in KEPT] for i in (1, 0))
    cells = "".join(f"{f'3^-{r}' if r == b else 'differs':>8}" for r, b in zip(reached, bound, strict=True))
    rows.append(f"    {name:<9}{cells}")
  lifted = [
    f"    {n} digits  r = {r:>7}   r² - 2 = {r * r - 2:>13} = {(r * r - 2) // 7**n}·7^{n}   {text_of(r, 7, n)}"
    for n, r in enumerate(padic_functions.hensel_lift([-2, 0, 1], 3, 7, 7), start=1)
    if n % 2
  ]
  return "\n".join(rows), "\n".join(lifted)


def story(key: jax.Array) -> str:
  seed = _seed(key)
  found, (errors, bounds) = shells(seed), precision(seed)
  products, cancelled, in_line = shadows(key)
  rates = "   ".join(f"p={p}: {rate:.4f} ({padic.haar_tie_rate(p):.4f})" for p, rate in tie_rates(seed).items())
  phases = "\n".join(
    f"    {ratio:<5g} {' '.join(f'{s:.2f}' for s in share)}   {n_eff:6.0f}" for ratio, (share, n_eff) in found.items()
  )
  learned = "\n".join(
    f"    {n:>7} {errors:>8} {nodes:>7} {right:>14.3f} {best:>14.3f}"
    for n, errors, nodes, right, best in write_once(seed)
  )
  rows = exceptions(seed)
  but, sparse = (", ".join(str(row[i]) for row in rows) for i in (0, 1))
  right = "all" if all(right for *_, right in rows) else "not all"
  series, root = functions_of_a_padic_integer()
  return f"""\
What it is. Queries and keys get K digits in base p. A key counts α^lcp, lcp the number of leading
digits it shares with the query. That is a tree: a ball of radius p^-d holds all keys with the same
first d digits. The kernel has p^K features, so attention is linear in T and decodes from a table.

What it is not. No softmax over keys, no content match finer than the last digit, and by itself no
gain as a language model: whether routing learns something useful is for training runs to show.

A strange geometry. In every 3-adic triangle the two longest sides are equal:
        x    y    z      |xy|   |yz|   |zx|
{triangles(key)}
Digits from the lowest: x and y share as many as v counts factors 3 in the difference.
{shared_digits(key)}

Three shadows of an inner product: digits, valuation, and the sum of its leading terms mod 3.
{products}
    v exceeds min(v(q) + v(k)), the (min,+) shadow, in {cancelled} of 20000, and just where the leading
    terms cancel in {in_line}. For uniform x and y, v(x + y) > min(v(x), v(y)) with probability 1/(p+1):
    {rates}

One tree, four algorithms: largest difference from all pairs in float32
    {agreement(key)}

A phase transition at α = p. {T} uniform keys, p = {P}; share of the mass by shared digits:
    α/p   {"".join(f"{d:>4} " for d in range(K + 1))}   n_eff
{phases}

Fewer digits are a coarser ball, with a certificate: largest error and bound, p = {P}, α = {ALPHA:g}
    digits  {"".join(f"{k:>7}" for k in range(0, K + 1, 2))}
    error   {"".join(f"{e:>7.3f}" for e in errors[::2])}
    bound   {"".join(f"{b:>7.3f}" for b in bounds[::2])}

Learning without gradients: one node per error, never rewritten. {BRANCHING**DEPTH} leaves, {BRANCHING} random labels:
    samples   errors   nodes   right, of all   best possible
{learned}
    nodes for one label everywhere but at {but} leaves: {sparse}; {right} right

Mahler's series on the 3-adic integers, cut off. The largest error is the largest coefficient left
out, here over 0 .. {POINTS - 1}:
    terms    {"".join(f"{n:>8}" for n in KEPT)}
{series}
Hensel's lift. A root of x² = 2 modulo 7 grows into a 7-adic one, lowest digit first:
{root}
"""


def _panels():
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.1), layout="constrained")
  return figure, *figure.subplots(1, 2)


def geometry(key: jax.Array):
  """The 3-adic tree with the balls around one point, and all distances between 0 .. 80 in the order of the digits."""
  del key
  figure, tree, matrix = _panels()
  place = lambda prefix: sum((d - 1) * 3.0**-j for j, d in enumerate(prefix))
  strings, point = [()], (1, 0, 2)
  for depth in range(3):
    strings = [(*prefix, d) for prefix in strings for d in range(3)]
    for s in strings:
      inside = s == point[: depth + 1]
      x = [place(s[:-1]), place(s)]
      tree.plot(x, [-depth, -depth - 1], color=BLUE if inside else "0.75", lw=2 if inside else 1, zorder=2 + inside)
  for depth, colour in enumerate((PINK, ORANGE, GREEN)):
    y, centre, reach = -3.25 - 0.3 * depth, place(point[:depth]), 1.45 * 3.0**-depth
    tree.plot([centre - reach, centre + reach], [y, y], color=colour, lw=5, solid_capstyle="butt")
    tree.text(centre + reach + 0.05, y, f"$3^{{-{depth}}}$", fontsize=11, color=colour, va="center")
  tree.set(ylim=(-4.1, 0.15), yticks=range(-3, 1), yticklabels=range(3, -1, -1), xticks=[])
  styled(tree, "balls around one point, by radius", "digit strings", "digits read", legend=None)
  n = np.arange(81)
  order = np.argsort(np.asarray(padic.digits(n, 3, 4)) @ 3 ** np.arange(3, -1, -1))
  depth = vp(np.abs(order[:, None] - order), 3, 4)
  image = matrix.imshow(depth, cmap="viridis", interpolation="nearest")
  matrix.set(xticks=[], yticks=[])
  matrix.set_title("0 .. 80 ordered by digits", fontsize=13)
  bar = figure.colorbar(image, ax=matrix, ticks=range(5))
  bar.set_label("shared digits, $v_3(x-y)$", size=12)
  bar.ax.tick_params(labelsize=12)
  return figure


def phase_transition(key: jax.Array):
  """Shell masses on both sides of α = p, and the effective number of keys."""
  figure, left, right = _panels()
  for i, (ratio, (share, _)) in enumerate(shells(_seed(key)).items()):
    look = {"color": (BLUE, ORANGE, GREEN)[i], "hatch": ("", "//", "..")[i], "edgecolor": "white", "lw": 0}
    left.bar(np.arange(K + 1) + 0.28 * (i - 1), share, 0.28, label=f"α/p = {ratio:g}", **look)
  left.set_xticks(range(0, K + 1, 2))
  styled(left, "where the mass lies", "shared digits", "share of the mass")
  ratios = tuple(2.0 ** np.linspace(-1, 2, 13))
  effective = [n_eff for _, n_eff in shells(_seed(key), ratios).values()]
  right.loglog(ratios, effective, color=BLUE, marker="o", ms=5, lw=2)
  right.axvline(1, color="0.5", lw=1, ls="--")
  right.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
  right.minorticks_off()
  styled(right, f"how many of {T} keys count", "α/p", "effective number", legend=None)
  return figure


def truncation_and_learning(key: jax.Array):
  """Error of fewer digits against its certificate, and write-once learning against the best possible."""
  figure, left, right = _panels()
  errors, bounds = precision(_seed(key))
  left.semilogy(np.arange(K), bounds[:K], color="0.3", ls="--", lw=1.5, label="certificate")
  left.semilogy(np.arange(K), errors[:K], color=BLUE, marker="o", ms=6, lw=2, label="largest error")
  styled(left, "fewer digits", f"digits kept of {K}", "change of the output")
  samples, errors, _, reached, best = zip(*write_once(_seed(key)), strict=True)
  right.semilogx(samples, best, color="0.3", ls="--", lw=1.5, base=2, label="best possible")
  right.semilogx(samples, reached, color=BLUE, marker="o", ms=6, lw=2, base=2, label="write-once tree")
  styled(right, "one pass, no gradients", "samples", "share of leaves right", legend="upper left")
  return figure


def arithmetic(key: jax.Array):
  """How often leading digits cancel, and how fast Mahler's series converges."""
  figure, left, right = _panels()
  rates = tie_rates(_seed(key))
  p = np.linspace(2, 7, 50)
  left.plot(p, 1 / (p + 1), color="0.3", lw=1.5, ls="--", label="1/(p+1)")
  left.plot(p, 1 / p, color=ORANGE, lw=1.5, ls=":", label="1/p")
  left.plot(rates.keys(), rates.values(), color=BLUE, marker="o", ms=7, lw=0, label="measured")
  left.set(xticks=list(rates), ylim=(0, 0.55))
  styled(left, "x + y loses digits", "p", "probability")
  kept = np.arange(1, 13)
  for (name, f), colour, marker in zip(MAHLER.items(), (BLUE, GREEN), "os", strict=True):
    right.plot(kept, [mahler(f, n)[1] for n in kept.tolist()], color=colour, marker=marker, ms=5, lw=2, label=name)
  right.set(xticks=range(0, 13, 3), yticks=range(0, 13, 3))
  styled(right, "Mahler's series, cut off", "terms kept", "digits that are right")
  return figure


DEMO = Demo(
  name="ultrametric",
  summary="attention by shared digits: the geometry of the p-adic tree, exact and linear in T",
  story=story,
  plots=(geometry, phase_transition, truncation_and_learning, arithmetic),
  refs=(
    "Gromov, 1987, Hyperbolic groups",
    "Mahler, 1958, An interpolation series for continuous functions of a p-adic variable",
  ),
  not_shown=(
    ("time against T beside softmax", "needs minutes of a quiet machine; python -m train.bench speed measures it"),
    ("memory linear in T", "checked by tests/test_ultrametric.py from the compiled programs"),
    ("frozen levels keep their digits bit for bit", "checked by tests/test_ultrametric.py over 50 training steps"),
    ("gradients by values and level weights", "checked by tests/test_ultrametric.py against autodiff of all pairs"),
    ("whether learned routing helps", "seven minutes; python -m train.experiment ultrametric_routing"),
    ("retrieval from deeper trees and longer texts than trained on", "needs training; no experiment is kept"),
    ("trees drawn in hyperbolic space, whose products approach lcp", "attention never leaves the tree; not built"),
    ("diagnostics of a run", "--probe_every writes them to metrics.jsonl"),
  ),
)
