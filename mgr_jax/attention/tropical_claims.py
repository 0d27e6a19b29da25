"""Claims about tropical attention, each with a broken twin. Laws of the algebra are in the algebra room."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.tropical_claims import distance, worst
from mgr_jax.attention import tropical_cases as cases
from mgr_jax.attention import tropical_scan
from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_scan import Plan
from mgr_jax.attention.tropical_tiles import scores
from mgr_jax.claims import Check, Claim, claim, worst_of

SLOPES = np.array([0.0, 0.125])
NONE = np.zeros(2)


def _same_attention(bracket: bool) -> Check:
  """Scan in chunks of 1, 16 and all tokens (must agree bit for bit), tiles and the definition."""

  def measure(rng, scale):
    del scale
    T, found = 97, []
    q, k, v = (np.float32(x) for x in cases.draw(rng, T, 8, B=2, R=2))
    for decay, cut in ((NONE, 0), (SLOPES, 40)):
      args = q, k, v, np.float32(decay), cases.clock(T, 2, cut)
      scan = cases.unmasked(q, k, v) if bracket else cases.by_scan(*args)
      for chunk in (1, 16):
        found.append(np.inf if np.any(cases.by_scan(*args, chunk) != scan) else 0.0)
      found += [distance(cases.by_tiles(*args), scan), distance(cases.by_definition(*args), scan)]
    return worst_of(found)

  return worst(measure, double=False)


def _causality(bracket: bool) -> Check:
  """Change of the first outputs when later tokens are replaced, and their gradient with respect to those tokens."""

  def measure(rng, scale):
    del scale
    T, j = 33, 20
    time = cases.clock(T)
    f = cases.unmasked if bracket else lambda q, k, v: cases.by_scan(q, k, v, np.float32(SLOPES), time)
    args, others = ([np.float32(x) for x in cases.draw(rng, T)] for _ in range(2))
    mixed = [np.concatenate([a[:j], b[j:]]) for a, b in zip(args, others, strict=True)]
    cotangent = np.where(np.arange(T) < j, 1.0, 0.0).astype(np.float32).reshape(-1, 1, 1, 1, 1) * np.ones(
      (1, 1, 2, 1, 8)
    )
    value, gradient = cases.pulled_back(f, args, np.float32(cotangent))
    return worst_of(distance(f(*mixed)[:j], value[:j]), *(float(np.max(np.abs(g[j:]))) for g in gradient))

  return worst(measure, double=False)


@functools.partial(jax.jit, static_argnums=2)
def _winning_keys(q, k, opts):
  return jnp.argmax(scores(q[None, None, None], k[None, None], opts)[0, 0, 0], -1)


def _capacity(hilbert: bool) -> Check:
  """Distinct winning keys beyond D (one group) and beyond n^S (S groups of n), over random and adversarial queries."""

  def measure(rng, scale):
    D, groups = 8, 2
    keys = rng.normal(size=(200, D)).astype(np.float32)
    queries = np.concatenate([3 * rng.normal(size=(4000 * scale, D)).astype(np.float32), keys, -keys])
    count = lambda opts: len(np.unique(_winning_keys(queries, keys, opts)))
    if hilbert:
      return count(Options(score="hilbert")) - D
    return worst_of(count(Options()) - D, count(Options(score_groups=groups)) - (D // groups) ** groups)

  return worst(measure, double=False)


def _product_code(permute: bool) -> Check:
  """The grouped score of all 256 pairs of one-hot digit codes against -c·Hamming distance, c = 3."""

  def measure(rng, scale):
    del scale
    n = S = 4
    digits = np.stack(np.unravel_index(np.arange(n**S), (n,) * S), -1)
    code = lambda d: np.where(np.arange(n) == d[..., None], 0.0, -3.0).reshape(len(d), -1).astype(np.float32)
    queries = (digits + 1) % n if permute else digits
    hamming = np.sum(digits[:, None] != digits[None], -1)
    opts = Options(score_groups=S)
    got = scores(code(queries)[None, None, None], code(digits)[None, None], opts)[0, 0, 0]
    return distance(got, -3.0 * hamming)

  return worst(measure, double=False)


def _gauge(shift_keys: bool) -> Check:
  """Change of centred outputs under a constant per query and one for all keys, and of Hilbert outputs under any."""

  def measure(rng, scale):
    del scale
    q, k, v = (np.float32(x) for x in cases.draw(rng, 40))
    time, decay = cases.clock(40), np.float32(SLOPES)
    c_q, c_k = (rng.normal(size=(*x.shape[:-1], 1)).astype(np.float32) for x in (q, k))
    out = lambda q, k: cases.centred(cases.by_scan(q, k, cases.with_score(v), decay, time))
    hilbert = lambda q, k: cases.by_tiles(q, k, v, decay, time, Options(score="hilbert"))
    change = distance(out(q + c_q, k + (c_k if shift_keys else 1.5)), out(q, k))
    return worst_of(change, distance(hilbert(q + c_q, k + c_k), hilbert(q, k)))

  return worst(measure, double=False)


def _lipschitz(route: bool) -> Check:
  """Sup-norm growth under joint perturbations beyond 3 (outputs) and 5 (centred ones); how far 3 is from attained."""

  def measure(rng, scale):
    q, k, v = cases.draw(rng)
    time, size, found = cases.clock(24), 1e-3, []
    if route:
      q, k = 0 * q, 0 * k
      f = lambda q, k, v: cases.by_definition(q, k, v, NONE, time, None, Options(agg="route"))
    else:
      f = lambda q, k, v: cases.by_scan(q, k, cases.with_score(v), SLOPES, time)
    base = f(q, k, v)
    for _ in range(20 * scale):
      moved = f(*(x + size * rng.choice((-1, 1), x.shape) for x in (q, k, v)))
      found.append(distance(moved, base) / size - 3)
      if not route:
        found.append(distance(cases.centred(moved), cases.centred(base)) / size - 5)
    if not route:
      attained = distance(f(q + size, k + size, v + size)[..., :-1], base[..., :-1]) / size
      found.append(abs(attained - 3))
    return worst_of(found)

  return worst(measure)


def _gradient(shift: int) -> Check:
  """The gradient through the winners, their coordinate shifted by `shift`, against autodiff of the definition."""

  def measure(rng, scale):
    del scale
    q, k, v = cases.draw(rng)
    time, g = cases.clock(24), rng.normal(size=q.shape)
    got = _through_winners(q, k, v, jnp.asarray(SLOPES), time, g, shift)
    return cases.leaf_distance(got, _by_autodiff(q, k, v, jnp.asarray(SLOPES), time, g))

  return worst(measure)


@jax.jit
def _through_winners(q, k, v, decay, time, g, shift):
  plan = Plan(q.shape[0], cases.REBASE)
  _, saved = tropical_scan._fwd_rule(q, k, v, decay, time, plan)
  D = q.shape[-1]
  winner = saved[0] // D * D + (saved[0] % D + shift) % D
  return tropical_scan._bwd_rule(plan, (winner, *saved[1:]), g)[:4]


@jax.jit
def _by_autodiff(q, k, v, decay, time, g):
  f = lambda q, k, v, decay: cases.by_definition(q, k, v, decay, time)
  return cases.pulled_back(f, (q, k, v, decay), g)[1]


def _credit(centred: bool) -> Check:
  """Σ_s dv = Σ_t g, and with score centring Σ_r dq = 0 and Σ dk = 0, on integers full of ties."""

  def measure(rng, scale):
    del scale
    q, k, v = (np.float32(x) for x in cases.draw(rng, 40, integers=True))
    time, g = cases.clock(40), rng.integers(-3, 4, q.shape).astype(np.float32)

    def f(q, k, v):
      y = cases.by_scan(q, k, cases.with_score(v), np.float32(NONE), time)
      return cases.centred(y) if centred else y[..., :-1]

    dq, dk, dv = cases.pulled_back(f, (q, k, v), g)[1]
    balance = distance(np.sum(dv, 0), np.sum(g, (0, 3)))
    return worst_of(balance, float(np.max(np.abs(np.sum(dq, -1)))), float(np.max(np.abs(np.sum(dk, (0, -1))))))

  return worst(measure, double=False)


def _pieces(stale: bool) -> Check:
  """Bits that differ between the whole scan and its continuation from a carried state; `stale` never rebases.

  The first p tokens at once, then one by one, over several rebasing periods.
  """

  def measure(rng, scale):
    del scale
    T = 50
    q, k, v = (np.float32(x) for x in cases.draw(rng, T))
    time, decay = cases.clock(T), np.float32([0.1, 0.3])
    whole, worst_p = cases.by_scan(q, k, v, decay, time), 0
    for p in (0, 1, 15, 16, 17, 40):
      worst_p = max(worst_p, int(np.sum(_continued(q, k, v, decay, time, p, stale) != whole)))
    return worst_p

  return worst(measure, double=False)


def _continued(q, k, v, decay, clock, p, stale):
  xs = [np.asarray(x) for x in _shifted(q, k, v, decay, clock)]
  if stale:
    xs[3] = np.where(np.isinf(xs[3]), xs[3], 0.0)
  state = tropical_scan.empty_state(*k.shape[1:], v.shape[-1])
  first = np.zeros((0, *q.shape[1:]), np.float32)
  if p:
    first, state = _first_piece(*(x[:p] for x in xs), state)
  return np.concatenate([first, _one_by_one(*xs, state, p)[p:]])


@jax.jit
def _shifted(q, k, v, decay, clock):
  return tropical_scan.shifted(q, k, v, decay, clock, cases.REBASE)


@jax.jit
def _first_piece(q, k, v, loss, state):
  y, _, state = tropical_scan.run(q, k, v, loss, state, q.shape[0], track=False)
  return y, state


@jax.jit
def _one_by_one(q, k, v, loss, state, start):
  """Outputs of all tokens, of which those from `start` on are inserted; one program for every start."""

  def token(state, xs):
    t, *xs = xs
    y, _, after = tropical_scan.run(*(x[None] for x in xs), state, 1, track=False)
    return jnp.where(t < start, state, after), y[0]

  return jax.lax.scan(token, state, (jnp.arange(q.shape[0]), q, k, v, loss))[1]


def _key_centring(centre: bool) -> Check:
  """0.95 minus the share of queries whose best two of 256 keys tie exactly when keys lose their largest coordinate."""

  def measure(rng, scale):
    ties = []
    for _ in range(60 * scale):
      q, k = rng.normal(size=16), rng.normal(size=(256, 16))
      k = k - np.max(k, -1, keepdims=True) if centre else k
      top = np.sort(np.max(q + k, -1))
      ties.append(top[-1] == top[-2])
    return 0.95 - np.mean(ties)

  return worst(measure)


CLAIMS: tuple[Claim, ...] = (
  claim(
    "tropical.one_attention",
    "the scan gives the same bits for every chunk and equals tiles and definition, with decay and documents",
    _same_attention(bracket=False),
    1e-5,
    _same_attention(bracket=True),
  ),
  claim(
    "tropical.causal_scan",
    "outputs before j and their gradients do not depend on tokens from j on, bit for bit; the unmasked bracket does",
    _causality(bracket=False),
    0.0,
    _causality(bracket=True),
  ),
  claim(
    "tropical.capacity",
    "over all queries at most D of 200 keys win a max-plus score, n^S with S groups of n; Hilbert scores exceed D",
    _capacity(hilbert=False),
    0.0,
    _capacity(hilbert=True),
    ("Develin, Santos, Sturmfels, 2005, arXiv math/0312114",),
  ),
  claim(
    "tropical.product_code",
    "with one-hot digit codes the grouped score is -c times the Hamming distance of the digits, exactly",
    _product_code(permute=False),
    0.0,
    _product_code(permute=True),
  ),
  claim(
    "tropical.gauge",
    "centred outputs ignore a constant per query and one for all keys; Hilbert scores ignore one per key too",
    _gauge(shift_keys=False),
    1e-5,
    _gauge(shift_keys=True),
  ),
  claim(
    "tropical.lipschitz",
    "in the sup norm outputs are 3-Lipschitz in (q, k, v) jointly, attained; 5 when centred; routing jumps",
    _lipschitz(route=False),
    1e-9,
    _lipschitz(route=True),
  ),
  claim(
    "tropical.winner_gradient",
    "the gradient through the winners equals autodiff of the definition where nothing ties",
    _gradient(shift=0),
    1e-9,
    _gradient(shift=1),
  ),
  claim(
    "tropical.credit_balance",
    "Σ_s dv = Σ_t g exactly, ties included; with score centring Σ_r dq = 0 and Σ dk = 0, without it not",
    _credit(centred=True),
    0.0,
    _credit(centred=False),
  ),
  claim(
    "tropical.pieces",
    "continuing from a carried state gives the bits of the whole scan, across rebasing; a stale rebase does not",
    _pieces(stale=False),
    0.0,
    _pieces(stale=True),
  ),
  claim(
    "tropical.key_centring",
    "subtracting each key's largest coordinate makes the best two of 256 keys tie in 95 % of trials (D = 16)",
    _key_centring(centre=True),
    0.0,
    _key_centring(centre=False),
  ),
)
