"""Claims about sums under the LCP kernel: implementations, causality, digit gradients, limits; with broken twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import padic, padic_kernel
from mgr_jax.attention.ultrametric_dense import dense_attention, lcp_weights, sums
from mgr_jax.attention.ultrametric_features import tree_attention
from mgr_jax.attention.ultrametric_sort import ball_attention
from mgr_jax.claims import Check, claim, largest_difference, worst_of

B, G, R, D = 2, 2, 2, 4
T = 97  # Not a multiple of the chunk; one length, so that claims share compiled programs.
CHUNK = 8


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _one_hot(classes, p):
  """[..., K, T] -> [..., K, p, T]."""
  return (np.asarray(classes)[..., None, :] == np.arange(p)[:, None]).astype(float)


def _case(rng, T, p, K, alpha=2.5, soft=False):
  """Digits with planted shared prefixes, level weights, values, decay and documents, as float64 numpy."""
  if soft:
    a, b = (rng.dirichlet(np.ones(p), (*heads, K, T)).swapaxes(-1, -2) for heads in ((B, G, R), (B, G)))
  else:
    key = rng.integers(0, p, (B, G, K, T))
    query = rng.integers(0, p, (B, G, R, K, T))
    depth = rng.integers(0, K + 1, (B, G, R, 1, T))
    copied = np.take_along_axis(key[:, :, None], rng.integers(0, T, (B, G, R, 1, T)), -1)
    query = np.where(np.arange(K)[:, None] < depth, copied, query)
    a, b = _one_hot(query, p), _one_hot(key, p)
  c = np.asarray(padic_kernel.level_weights(np.full((G, R), alpha), K), float)
  v = rng.normal(size=(B, T, G, D))
  return a, b, c, v, np.array([0.0, -0.07]), np.sort(rng.integers(0, 3, (B, T)), 1)


ATTENTION = {
  "features": lambda *args: tree_attention(*args, CHUNK),
  "sort": lambda *args: ball_attention(*args, CHUNK),
  "dense": dense_attention,
}


@functools.partial(jax.jit, static_argnums=0)
def _attend(impl, *case):
  return ATTENTION[impl](*case)


@jax.jit
def _without_own_key(a, b, c, v, log_decay, segments):
  """A token sees earlier tokens of its document only, as when its key is stored after its query was answered."""
  lag = np.arange(v.shape[1])[:, None] - np.arange(v.shape[1])
  seen = (lag > 0) & (segments[:, :, None] == segments[:, None, :])[:, None, None]
  out, mass = sums(lcp_weights(a, b, c, log_decay, seen, lag), v)
  return out / jnp.maximum(mass, 1)


def _implementations(broken: bool) -> Check:
  """Largest difference from the dense form in float64, hard digits by both fast paths and soft digits by features."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    with jax.enable_x64(True):
      for _ in range(scale):
        case = _case(rng, T, 3, 3)
        dense = (_without_own_key if broken else functools.partial(_attend, "dense"))(*case)
        worst = worst_of(worst, *(largest_difference(_attend(impl, *case), dense) for impl in ("features", "sort")))
        case = _case(rng, T, 3, 3, soft=True)
        worst = worst_of(worst, largest_difference(_attend("features", *case), _attend("dense", *case)))
    return worst

  return measure


def _integers(alpha: float) -> Check:
  """Largest float32 difference of three implementations when α is dyadic and values are integers, without decay."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for _ in range(scale):
      a, b, c, v, _, segments = _case(rng, T, 3, 3, alpha)
      case = [np.float32(x) for x in (a, b, c, np.round(8 * v))] + [np.float32([0, 0]), segments]
      dense = _attend("dense", *case)
      worst = worst_of(worst, *(largest_difference(_attend(impl, *case), dense) for impl in ("features", "sort")))
    return worst

  return measure


def _causal(leaky: bool) -> Check:
  """Largest change of the first 50 outputs when all later inputs are replaced, by every implementation, with documents.

  `leaky` sums whole balls, later keys included.
  """

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for _ in range(scale):
      a, b, c, v, decay, segments = (np.float32(x) if x.dtype == float else x for x in _case(rng, T, 3, 3))
      other = [np.float32(x) for x in _case(rng, T, 3, 3)[:4]]
      join = lambda x, y, axis: np.concatenate([np.take(x, range(50), axis), np.take(y, range(50, T), axis)], axis)
      changed = join(a, other[0], -1), join(b, other[1], -1), c, join(v, other[3], 1), decay, segments
      for impl in ("features", "sort", "dense"):
        attend = _whole_balls if leaky else functools.partial(_attend, impl)
        before, after = attend(a, b, c, v, decay, segments), attend(*changed)
        worst = worst_of(worst, largest_difference(before[..., :50, :], after[..., :50, :]))
    return worst

  return measure


@jax.jit
def _whole_balls(a, b, c, v, log_decay, segments):
  del log_decay, segments
  out, mass = sums(lcp_weights(a, b, c, None, True, 0), v)
  return out / mass


def _digit_gradients(case, d_y, y, mass, local: bool, strict: bool = False):
  """The digits' gradients by explicit sums over pairs; `strict` leaves out a token's own key."""
  a, b, c, v, _, _ = case
  K, T = a.shape[-3], v.shape[1]
  u = d_y / mass
  w = -np.sum(u * y, -1)
  pair = np.einsum("bgrtd,bsgd->bgrts", u, v) + w[..., None]
  pair = pair * (np.tri(T, k=-1) if strict else np.tri(T))
  match = np.einsum("bgrkit,bgkis->kbgrts", a, b)
  weight = c[..., None, None]
  d_a, d_b = np.zeros_like(a), np.zeros_like(b)
  for j in range(K):
    before = np.prod(match[:j], 0)
    deeper = np.zeros_like(pair)
    for d in range(j + 1, (j + 1 if local else K) + 1):
      deeper += weight[:, :, d] * np.prod(match[j + 1 : d], 0)
    d_match = pair * before * deeper
    d_a[..., j, :, :] = np.einsum("bgrts,bgis->bgrit", d_match, b[..., j, :, :])
    d_b[..., j, :, :] = np.einsum("bgrts,bgrit->bgis", d_match, a[..., j, :, :])
  return d_a, d_b


@functools.partial(jax.jit, static_argnums=0)
def _library_gradients(impl, d_y, a, b, *rest):
  y, pull = jax.vjp(lambda a, b: ATTENTION[impl](a, b, *rest), a, b)
  return y, pull(d_y)


def _credit(impl: str, **formula) -> Check:
  """Largest difference between an implementation's digit gradients and the explicit sums, up to the tangent space.

  Digits are probabilities, so a constant over the classes of a digit changes nothing; it is removed from both.
  """

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    with jax.enable_x64(True):
      for _ in range(scale):
        case = (*_case(rng, 30, 3, 4)[:4], None, None)
        d_y = rng.normal(size=(B, G, R, 30, D))
        y, found = _library_gradients(impl, d_y, *case)
        mass = np.sum(np.asarray(lcp_weights(*case[:3], None, np.tri(30) > 0, 0)), -1, keepdims=True)
        tangent = lambda x: np.asarray(x) - np.mean(np.asarray(x), -2, keepdims=True)
        exact = _digit_gradients(case, d_y, np.asarray(y), mass, **formula)
        worst = worst_of(
          worst, *(largest_difference(tangent(x), tangent(e)) for x, e in zip(found, exact, strict=True))
        )
    return worst

  return measure


def _limits(low: float, high: float) -> Check:
  """Distance to the prefix mean as α -> 1, and to the mean over the deepest occupied ball as α -> ∞."""

  def measure(key, scale):
    del scale
    a, b, _, v, _, _ = _case(_rng(key), 64, 3, 3)
    lcp = np.sum(np.cumprod(np.einsum("bgrkit,bgkis->kbgrts", a, b), 0), 0)
    deepest = np.where(np.tri(64), lcp, -1)
    weights = [np.broadcast_to(np.tri(64), lcp.shape), deepest == np.max(deepest, -1, keepdims=True)]
    worst = 0.0
    with jax.enable_x64(True):
      for alpha, weight in zip((low, high), weights, strict=True):
        c = np.asarray(padic_kernel.level_weights(np.full((G, R), alpha), 3))
        mean = np.einsum("bgrts,bsgd->bgrtd", weight / np.sum(weight, -1, keepdims=True), v)
        worst = worst_of(worst, largest_difference(_attend("features", a, b, c, v, None, None), mean))
    return worst

  return measure


def _certificate(factor: float) -> Check:
  """Largest excess of |y_K - y_k| over factor·max|v|·(1 - n_k/n_K), on random keys and on a planted pair."""

  def measure(key, scale):
    rng, worst = _rng(key), -np.inf
    with jax.enable_x64(True):
      for case in range(4 * scale):
        alpha, lcp = 2.0 + case, rng.integers(0, 7, (1, 64))
        v = rng.normal(size=64)
        if case == 0:
          # One key agrees with the query to the end and has value 1, a hundred nowhere and have -1.
          lcp, v = np.array([[0] * 100 + [6]]), np.array([-1.0] * 100 + [1.0])
        for k in range(6):
          weights = alpha ** np.minimum(lcp, k), alpha**lcp
          coarse, full = (np.sum(w * v, -1) / np.sum(w, -1) for w in weights)
          bound = factor / 2 * np.asarray(padic.truncation_bound(jnp.asarray(lcp), alpha, k, np.max(np.abs(v))))
          worst = worst_of(worst, float(np.max(np.abs(full - coarse) - bound)))
    return worst

  return measure


def _phase(claimed: float | None) -> Check:
  """Largest relative error of the measured shell masses' ratios against α/p (or against `claimed`), d <= 5.

  4096 uniform keys, p = 2, K = 8, averaged over 64 queries; infinite when n_eff does not fall with α.
  """

  def measure(key, scale):
    rng, worst, effective = _rng(key), 0.0, []
    key_digits, query_digits = (rng.integers(0, 2, (n, 8)) for n in (4096, 64 * scale))
    lcp = np.cumprod(query_digits[:, None] == key_digits, -1).sum(-1)
    for alpha in (1.5, 2.0, 4.0):
      mass = np.mean([np.sum(np.where(lcp == d, alpha**lcp, 0), -1) for d in range(7)], -1)
      ratio = claimed or alpha / 2
      worst = worst_of(worst, float(np.max(np.abs(mass[1:6] / mass[:5] / ratio - 1))))
      effective.append(float(np.mean(np.asarray(padic.n_eff(jnp.asarray(alpha**lcp))))))
    return worst if effective[0] > effective[1] > effective[2] else float("inf")

  return measure


CLAIMS = (
  claim(
    "ultrametric.implementations",
    "features = sort = all pairs with hard digits, features = all pairs with soft ones, in float64",
    _implementations(False),
    1e-12,
    _implementations(True),
  ),
  claim(
    "ultrametric.integers",
    "with dyadic α, integer values and no decay all implementations agree bit for bit in float32",
    _integers(4.0),
    0.0,
    _integers(3.3),
  ),
  claim(
    "ultrametric.causal",
    "no implementation's outputs change, bit for bit, when later tokens are replaced, in packed documents",
    _causal(False),
    0.0,
    _causal(True),
  ),
  claim(
    "ultrametric.credit",
    "dA_j(t)[i] = Σ_s E_ts 1[prefix equal] 1[digit = i] Σ_{d>=j} c_d 1[digits j+1..d agree]: credit of sibling balls",
    _credit("features", local=False),
    1e-12,
    _credit("features", local=True),
  ),
  claim(
    "ultrametric.local_credit",
    "the sort path's gradient is the same sum with c_j in place of its last factor, a token's own key included",
    _credit("sort", local=True),
    1e-12,
    _credit("sort", local=True, strict=True),
    refs=("Bengio et al., 2013, arXiv 1308.3432",),
  ),
  claim(
    "ultrametric.limits",
    "α -> 1 gives the prefix mean, α -> ∞ the mean over the deepest occupied ball",
    _limits(1 + 1e-6, 2.0**20),
    1e-4,
    _limits(2.0, 2.0),
  ),
  claim(
    "ultrametric.certificate",
    "|y_K - y_k| <= 2 max|v| (1 - n_k/n_K); without the factor 2 a planted pair violates it",
    _certificate(2.0),
    1e-12,
    _certificate(1.0),
  ),
  claim(
    "ultrametric.phase_transition",
    "successive shells weigh α/p of each other: coarse ones win below α = p, deep ones above; n_eff falls with α",
    _phase(None),
    0.05,
    _phase(1.0),
  ),
)
