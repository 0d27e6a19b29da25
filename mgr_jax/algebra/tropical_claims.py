"""Claims about the max-plus semiring, its matrices, polynomials and layers, each with a broken twin."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import tropical, tropical_training
from mgr_jax.algebra.tropical_matmul import tmm
from mgr_jax.claims import Check, Claim, claim, worst_of


def rng_of(key: jax.Array) -> np.random.Generator:
  """Cases are drawn by numpy: nothing to compile for them."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def worst(measure: Callable[[np.random.Generator, int], float], double: bool = True) -> Check:
  """A check from a measurement of one generator and scale, in double precision unless told otherwise."""

  def check(key, scale):
    with jax.enable_x64(double):
      return float(measure(rng_of(key), scale))

  return check


def distance(x, y) -> float:
  """Largest absolute difference; infinities of one sign agree."""
  x, y = np.asarray(x), np.asarray(y)
  return float(np.max(np.where(x == y, 0.0, np.abs(x - np.where(np.isinf(y) & (x == y), 0, y)))))


def _semiring(add, mul, zero, one) -> Check:
  def measure(rng, scale):
    a, b, c = rng.integers(-1024, 1025, (3, 1000 * scale)).astype(np.float32)
    pairs = (
      (add(add(a, b), c), add(a, add(b, c))),
      (mul(mul(a, b), c), mul(a, mul(b, c))),
      (add(a, b), add(b, a)),
      (mul(a, add(b, c)), add(mul(a, b), mul(a, c))),
      (add(a, a), a),
      (add(a, np.full_like(a, zero)), a),
      (mul(a, np.full_like(a, one)), a),
    )
    return worst_of(distance(x, y) for x, y in pairs)

  return worst(measure, double=False)


def _product(product) -> Check:
  """Against the dense form, and (a b) c against a (b c)."""

  def measure(rng, scale):
    del scale
    a, b, c = (rng.integers(-1024, 1025, (4, m, n)).astype(np.float32) for m, n in ((5, 7), (7, 6), (6, 40)))
    dense = np.max(a[..., None] + b[:, None], 2)
    return worst_of(distance(product(a, b), dense), distance(product(product(a, b), c), product(a, product(b, c))))

  return worst(measure, double=False)


def _minmax(a, b):
  return jnp.min(jnp.maximum(a[..., None], b[..., None, :, :]), -2)


def _best_paths(cycle: bool) -> Check:
  """Kleene star against Floyd-Warshall on a random acyclic graph, and a ⊗ v = λ + v on a full matrix."""

  def measure(rng, scale):
    del scale
    n = 12
    graph = np.where(np.triu(rng.random((n, n)) < 0.4, 1), rng.integers(-9, 10, (n, n)), -np.inf)
    if cycle:
      graph[1, 0], graph[0, 1] = 5.0, 1.0
    best = np.maximum(graph, np.where(np.eye(n, dtype=bool), 0.0, -np.inf))
    for k in range(n):
      best = np.maximum(best, best[:, k, None] + best[k])
    try:
      star = tropical.kleene_star(jnp.asarray(graph))
    except ValueError:
      return np.inf
    a = jnp.asarray(rng.normal(size=(8, 8)))
    value, vector = tropical.eigen_karp(a)
    return worst_of(distance(star, best), distance(tropical.tmv(a, vector), value + vector))

  return worst(measure)


def _fundamental_theorem(drop: int) -> Check:
  """p against its product form on a grid, and multiplicities against degree - order; `drop` leaves roots out."""

  def measure(rng, scale):
    errors = []
    for _ in range(4 * scale):
      c = rng.normal(size=9)
      c[rng.integers(1, 8)] = -np.inf
      roots = tropical.trop_roots(c)
      roots = tropical.Roots(roots.at[drop:], roots.multiplicity[drop:])
      x = np.linspace(-4, 4, 101)
      terms = np.max(np.where(np.isfinite(c), c, -1e9) + np.arange(9) * x[:, None], -1)
      errors += [distance(tropical.factored(c, roots, x), terms), abs(roots.multiplicity.sum() - 8)]
    return worst_of(errors)

  return worst(measure)


def _projective(metric: Callable) -> Check:
  """Violations of a metric on vectors up to constants: shifts, symmetry, triangle, zero exactly on one line.

  And of the canonical representative: largest entry 0, the same for every shift.
  """
  metric = jax.jit(metric)

  def measure(rng, scale):
    x, y, z = rng.normal(size=(3, 200 * scale, 6))
    a, b = rng.normal(size=(2, 200 * scale, 1))
    d = metric(x, y)
    broken = [np.abs(metric(x + a, y + b) - d), np.abs(metric(y, x) - d), metric(x, z) - d - metric(y, z)]
    broken += [metric(x, x + a), np.where(d > 0, 0.0, 1.0)]
    broken += [np.abs(metric(_gauge(x), _gauge(y)) - d), np.abs(_gauge(x + a) - _gauge(x)), np.max(_gauge(x), -1)]
    return worst_of(float(np.max(violation)) for violation in broken)

  return worst(measure)


_gauge = jax.jit(tropical.gauge)


def _smooth(slack: float) -> Check:
  """How far log Σ e^{βx}/β leaves [max, max + slack·log(n)/β], attained by equal entries, and ⊕_β its laws."""
  lse, add = jax.jit(tropical.lse_beta), jax.jit(tropical.maslov_add)

  def measure(rng, scale):
    x = rng.normal(size=(50 * scale, 3)) * rng.integers(0, 2, (50 * scale, 1))
    found = []
    for beta in (0.5, 4.0):
      above, (a, b, c) = lse(x, beta) - np.max(x, -1), x.T
      both = add(add(a, b, beta), c, beta)
      found += [np.max(-above), np.max(above) - slack * np.log(3) / beta, distance(both, lse(x, beta))]
      found += [distance(both, add(a, add(b, c, beta), beta)), distance(add(a + c, b + c, beta), add(a, b, beta) + c)]
    return worst_of(found)

  return worst(measure)


def _route_stability(factor: float) -> Check:
  """Share of winners lost when every rival is raised by `factor` times the gap, and the winner not at all."""

  def measure(rng, scale):
    x = rng.normal(size=(1000 * scale, 32))
    winner = np.argmax(x, -1)
    top = np.sort(x, -1)
    raised = x + factor * (top[:, -1:] - top[:, -2:-1])
    rows = np.arange(len(x))
    raised[rows, winner] = x[rows, winner]
    return np.mean(np.argmax(raised, -1) != winner)

  return worst(measure)


def _relu_squared(rng, n, m):
  w1, w2 = rng.normal(size=(n, m)), rng.normal(size=(m, n))
  return lambda x: np.maximum(x @ w1, 0) ** 2 @ w2


def _feed_forward(rational_map: Callable | None) -> Check:
  """Two layers against the collapsed one, and sup-norm growth beyond 1 (one stack) and 2 (a difference of two)."""

  def measure(rng, scale):
    n, m = 16, 64
    layer = jax.jit(tropical.maxplus_layer)
    branches = [tuple(rng.normal(size=s) for s in ((n, m), (m,), (m, n), (n,))) for _ in range(2)]
    stack = lambda x, p: np.asarray(layer(p[2], p[3], layer(p[0], p[1], x)))
    x = rng.normal(size=(50 * scale, n))
    moved = x + rng.choice((-1e-3, 1e-3), x.shape)
    growth = lambda f: np.max(np.abs(f(moved) - f(x))) / 1e-3
    rational = rational_map(rng, n, m) if rational_map else lambda x: stack(x, branches[0]) - stack(x, branches[1])
    w, b = jax.jit(tropical.collapse_ffn)(*branches[0])
    collapsed = distance(layer(w, b, x), stack(x, branches[0]))
    return worst_of(collapsed, growth(lambda x: stack(x, branches[0])) - 1, growth(rational) - 2)

  return worst(measure)


def _certified_step(factor: float) -> Check:
  """Largest deviation of the own loss's change from -η·moved over one step for each sample."""

  def measure(rng, scale):
    tables, words, labels = tropical_training.random_task(rng, 24)
    loss_of = lambda tables: tropical_training.losses(tropical_training.classify(tables, words).logits, labels)
    loss, found = loss_of(tables), []
    for i in np.tile(np.arange(24), scale):
      tables, size, moved = tropical_training.perceptron_step(tables, words[i], labels[i], factor)
      before, loss = loss, loss_of(tables)
      found.append(abs(loss[i] - before[i] + size * moved))
    return worst_of(found)

  return worst(measure)


CLAIMS: tuple[Claim, ...] = (
  claim(
    "tropical.semiring",
    "max and + form an idempotent semiring with zero -inf and one 0, exactly in float32; + and × are not idempotent",
    _semiring(np.maximum, np.add, -np.inf, 0.0),
    0.0,
    _semiring(np.add, np.multiply, 0.0, 1.0),
  ),
  claim(
    "tropical.matrix_product",
    "the max-plus product equals its dense form and is associative; the min-max product is another one",
    _product(jax.jit(tmm)),
    0.0,
    _product(jax.jit(_minmax)),
  ),
  claim(
    "tropical.best_paths",
    "a* holds the best path weights (Floyd-Warshall); a ⊗ v = λ + v, λ the largest cycle mean; positive cycles raise",
    _best_paths(cycle=False),
    1e-9,
    _best_paths(cycle=True),
    ("Karp, 1978, A characterization of the minimum cycle mean in a digraph",),
  ),
  claim(
    "tropical.fundamental_theorem",
    "a tropical polynomial is the product of its roots, whose multiplicities add up to degree - order",
    _fundamental_theorem(drop=0),
    1e-9,
    _fundamental_theorem(drop=1),
  ),
  claim(
    "tropical.projective_metric",
    "Hilbert's distance is a metric of vectors up to constants; the largest difference alone is not",
    _projective(tropical.hilbert_dist),
    1e-12,
    _projective(lambda x, y: jnp.max(jnp.abs(x - y), -1)),
  ),
  claim(
    "tropical.smooth_maximum",
    "log Σ e^{βx}/β lies in [max, max + log(n)/β]; ⊕_β is associative and + distributes over it; half the bound fails",
    _smooth(1.0),
    1e-12,
    _smooth(0.5),
  ),
  claim(
    "tropical.route_stability",
    "if every rival rises by at most c and c is below the gap, the argmax stays (share of winners lost)",
    _route_stability(0.999),
    0.0,
    _route_stability(1.001),
  ),
  claim(
    "tropical.certified_step",
    "a perceptron step below an eighth of every lead changes the sample's loss by -η times the entries moved",
    _certified_step(1.0),
    1e-12,
    _certified_step(20.0),
  ),
  claim(
    "tropical.feed_forward",
    "two max-plus layers are one; a stack is 1-Lipschitz in the sup norm, a difference of two 2-Lipschitz",
    _feed_forward(None),
    1e-9,
    _feed_forward(_relu_squared),
    ("Zhang, Naitzat, Lim, 2018, arXiv 1805.07091",),
  ),
)
