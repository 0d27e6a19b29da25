"""Ultrametric attention shown: a strange geometry, one layer by three algorithms, a phase transition, truncation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from mgr_jax.algebra import padic, padic_functions, padic_kernel, padic_tree
from mgr_jax.attention.ultrametric_dense import dense_attention
from mgr_jax.attention.ultrametric_features import tree_attention
from mgr_jax.attention.ultrametric_sort import ball_attention

P, K, T = 2, 8, 4096
RATIOS = (0.75, 1.0, 2.0)
ALPHA = 1.5  # Of the truncation figures.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def triangles(key: jax.Array) -> str:
  """Three 3-adic triangles with their sides."""
  rows = []
  for x, y, z in _rng(key).integers(0, 3**6, (3, 3)).tolist():
    side = lambda a, b: f"3^-{int(padic.vp(abs(a - b), 3, 6))}"
    rows.append(f"    {x:>4} {y:>4} {z:>4}    {side(x, y):>6} {side(y, z):>6} {side(x, z):>6}")
  return "\n".join(rows)


def tie_rates(key: jax.Array) -> str:
  """Measured and exact probability that v(x + y) exceeds both valuations."""
  rng, found = _rng(key), []
  for p, depth in ((2, 20), (3, 12), (5, 8)):
    x, y = rng.integers(0, p**depth, (2, 100_000))
    v = [np.asarray(padic.vp(z, p, depth)) for z in (x, y, x + y)]
    found.append(f"p={p}: {np.mean(v[2] > np.minimum(v[0], v[1])):.4f} ({padic.haar_tie_rate(p):.4f})")
  return ", ".join(found)


def random_digits(rng: np.random.Generator, n: int, p: int, depth: int) -> np.ndarray:
  """One-hot digits [depth, p, n]."""
  return (rng.integers(0, p, (depth, 1, n)) == np.arange(p)[:, None]).astype(np.float32)


def agreement(key: jax.Array) -> str:
  """Largest differences between three algorithms for the same layer, hard digits, in float32."""
  rng, p, depth, n = _rng(key), 4, 3, 300
  a, b = (random_digits(rng, n, p, depth)[None, None] for _ in range(2))
  c = np.asarray(padic_kernel.level_weights(jnp.full((1, 1), 8.0), depth))
  v = rng.standard_normal((1, n, 1, 8), np.float32)
  case = (a[:, :, None], b, c, v, None, None)
  dense = jax.jit(dense_attention)(*case)
  features = jax.jit(lambda *x: tree_attention(*x, 64))(*case)
  sort = jax.jit(lambda *x: ball_attention(*x, 64))(*case)
  largest = lambda x: float(jnp.max(jnp.abs(x - dense)))
  return f"features {largest(features):.0e}, sort {largest(sort):.0e} at T = {n}, p = {p}, K = {depth}"


@functools.cache
def shells(seed: int) -> dict[float, tuple[np.ndarray, float]]:
  """Mean share of the mass at lcp = d, and mean effective number of keys, for each α/p; 64 queries, T uniform keys."""
  rng = np.random.default_rng(seed)
  keys, queries = (rng.integers(0, P, (n, K)) for n in (T, 64))
  lcp = np.cumprod(queries[:, None] == keys, -1).sum(-1)
  found = {}
  for ratio in RATIOS:
    weight = (ratio * P) ** lcp
    share = np.stack([np.sum(np.where(lcp == d, weight, 0), -1) for d in range(K + 1)], -1)
    share = np.mean(share / share.sum(-1, keepdims=True), 0)
    found[ratio] = share, float(np.mean(np.asarray(padic.n_eff(weight))))
  return found


def _seed(key: jax.Array) -> int:
  return int(_rng(key).integers(2**31))


@functools.cache
def precision(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Largest error over 256 queries of attention with k of K digits, and the largest bound, for k = 0 .. K."""
  rng = np.random.default_rng(seed)
  keys, queries = (rng.integers(0, P, (n, K)) for n in (512, 256))
  lcp, v = np.cumprod(queries[:, None] == keys, -1).sum(-1), rng.uniform(-1, 1, 512)
  mean = lambda k: np.sum((w := ALPHA ** np.minimum(lcp, k)) * v, -1) / np.sum(w, -1)
  errors = [float(np.max(np.abs(mean(K) - mean(k)))) for k in range(K + 1)]
  top = np.max(np.abs(v))
  bounds = [float(jnp.max(padic.truncation_bound(jnp.asarray(lcp), ALPHA, k, top))) for k in range(K + 1)]
  return np.array(errors), np.array(bounds)


def write_once(key: jax.Array) -> str:
  """Errors, nodes, and accuracy on all strings after passes that see part of the balls."""
  rng, p, depth, rows = _rng(key), 4, 3, []
  label = rng.integers(0, p, (p**depth, 1)).astype(np.int32)
  digits = lambda x: np.asarray(x)[:, None] // p ** np.arange(depth) % p
  for samples in (32, 128, 2048):
    seen = rng.integers(0, p**depth, samples)
    tree, erred = padic_tree.tree_fit(jnp.asarray(digits(seen)), jnp.asarray(label[seen]), p)
    every = digits(np.arange(p**depth))
    right = np.all(np.asarray(padic_tree.predict(tree, padic_tree.paths(jnp.asarray(every), p), p)) == label, -1)
    share = len(np.unique(seen)) / p**depth
    rows.append(
      f"    {samples:>5} samples  {int(erred.sum()):>3} errors  {int(tree.exists.sum()):>3} nodes"
      f"  right on {np.mean(right):.2f} of all leaves; {share:.2f} of them seen"
    )
  return "\n".join(rows)


def functions_of_a_padic_integer() -> tuple[str, str]:
  """Valuations of Mahler's coefficients of x² + 3·C(x, 4), and digits of a root of x² = 2 in ℤ_7."""
  values = [x * x + 3 * padic_functions.mahler_eval([0, 0, 0, 0, 1], x) for x in range(8)]
  root = padic_functions.hensel_lift([-2, 0, 1], 3, 7, 10)
  return str(padic_functions.mahler_coeffs(values)), "".join(str(root[-1] // 7**j % 7) for j in range(10))


def story(key: jax.Array) -> str:
  found, (errors, bounds) = shells(_seed(key)), precision(_seed(key))
  phases = "\n".join(
    f"    α/p = {ratio:<5g} share of lcp 0, 1, ... {K}:  {' '.join(f'{s:.2f}' for s in share)}   n_eff {n_eff:.0f}"
    for ratio, (share, n_eff) in found.items()
  )
  mahler, root = functions_of_a_padic_integer()
  return f"""\
What it is. Queries and keys get K digits in base p. A key counts α^lcp, lcp the number of leading
digits it shares with the query. That is a tree: a ball of radius p^-d holds all keys with the same
first d digits. The kernel has p^K features, so attention is linear in T and decodes from a table.

What it is not. No softmax over keys, no content match finer than the last digit, and by itself no
gain as a language model: whether routing learns something useful is for training runs to show.

A strange geometry: in every 3-adic triangle the two longest sides are equal
       x    y    z      |xy|   |yz|   |xz|
{triangles(key)}
    v(x + y) exceeds v(x) and v(y) with probability 1/(p+1), measured (exact):
    {tie_rates(key)}

One layer, three algorithms: largest difference from all pairs in float32
    {agreement(key)}

A phase transition at α = p ({T} uniform keys, p = {P})
{phases}

Fewer digits are a coarser ball, with a certificate: largest error and bound, p = {P}, α = {ALPHA:g}
    digits  {"".join(f"{k:>7}" for k in range(0, K + 1, 2))}
    error   {"".join(f"{e:>7.3f}" for e in errors[::2])}
    bound   {"".join(f"{b:>7.3f}" for b in bounds[::2])}

Learning without gradients: one node per error, never rewritten
{write_once(key)}

Functions of a p-adic integer
    Mahler coefficients of x² + 3·C(x,4): {mahler}
    a root of x² = 2 in the 7-adic integers, lowest digit first: {root}...
"""


def phase_transition(key: jax.Array):
  """Shell masses on both sides of α = p, and truncation error against its certificate."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  for i, (ratio, (share, n_eff)) in enumerate(shells(_seed(key)).items()):
    label = f"α/p = {ratio:g}, n_eff {n_eff:.0f}"
    left.plot(np.arange(K + 1), share, color=COLOURS[i], marker="osD"[i], lw=2, label=label)
  left.set(xlabel="shared digits d", ylabel="share of the attention mass", title="where the mass lies")
  errors, bounds = precision(_seed(key))
  right.semilogy(np.arange(K), bounds[:K], color="0.4", ls="--", lw=2, label="bound")
  right.semilogy(np.arange(K), errors[:K], color=COLOURS[0], marker="o", lw=2, label="largest error")
  right.set(xlabel=f"digits used of {K}", title=f"dropping digits, p = {P}, α = {ALPHA:g}")
  for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=10)
  return figure


def balls(key: jax.Array):
  """The 3-adic distance matrix of 0 .. 80, ordered by digits: balls are nested blocks."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.4), layout="constrained")
  natural, ordered = figure.subplots(1, 2)
  n = np.arange(81)
  digits = np.asarray(padic.digits(n, 3, 4))
  order = np.argsort(digits @ 3 ** np.arange(3, -1, -1))
  for ax, index, title in ((natural, n, "0, 1, 2, ..."), (ordered, order, "ordered by digits")):
    x = index[:, None] - index[None]
    image = ax.imshow(np.asarray(padic.vp(x, 3, 4)), cmap="viridis", interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
  figure.colorbar(image, ax=(natural, ordered), label="shared digits, $v_3(x-y)$", ticks=range(5))
  return figure


DEMO = Demo(
  name="ultrametric",
  summary="attention by shared digits: the geometry of the p-adic tree, exact and linear in T",
  story=story,
  plots=(phase_transition, balls),
  refs=("Robert 2000", "Gromov 1987", "Mahler 1958"),
)
