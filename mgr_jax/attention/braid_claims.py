"""Claims about braid attention as a layer, each with a broken twin. Laws of the braid group are in the algebra room."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.braid_chebyshev import chebyshev_gated_sum, interpolation_error
from mgr_jax.attention.braid_gates import causal_mask, dense_gated_sum
from mgr_jax.attention.braid_scores import ADDITIVE
from mgr_jax.attention.braid_sorted import sorted_gated_sum
from mgr_jax.attention.braid_sweep import sweep
from mgr_jax.attention.mechanism import Context, Mechanism, group_heads, rope_tables, ungroup_heads
from mgr_jax.claims import Check, Claim, claim, relative_difference, worst_of
from mgr_jax.config import GPTConfig


def _rng(key: jax.Array) -> np.random.Generator:
  """Cases are drawn by numpy: nothing to compile for them."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _layer(rng, record: Mechanism, width: int = 8, heads: int = 2, kv_heads: int = 1, **options):
  """A tiny configuration, options, and parameters in which no path is switched off."""
  cfg = GPTConfig(vocab_size=2, n_layer=1, n_head=heads, n_kv_head=kv_heads, n_embd=width)
  opts = record.options(**options)

  def draw(spec):
    noise = rng.standard_normal(spec.shape, np.float32)
    if spec.init == "constant":
      return np.float32(spec.std) + 0.3 * noise
    return noise * np.float32(width**-0.5 if spec.role == "matrix" else 1.0)

  return cfg, opts, {name: draw(spec) for name, spec in record.param_specs(cfg, opts).items()}


def _context(positions_BT, cfg):
  return Context(positions_BT, shared={"rope": rope_tables(positions_BT, cfg.head_dim, cfg.rope_base)})


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(record, params, x_BTC, cfg, opts, positions_T=None):
  if positions_T is None:
    positions_T = jnp.arange(x_BTC.shape[1])
  return record.apply(params, x_BTC, _context(positions_T[None], cfg), cfg, opts)[0]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _decode(record, params, x_BTC, cfg, opts):
  """The same layer, one token at a time."""

  def token(state, xs):
    i, x = xs
    y, state = record.step(params, x[:, None], state, _context(i[None, None], cfg), cfg, opts)
    return state, y[:, 0]

  B, T, _ = x_BTC.shape
  state = record.init_state(cfg, opts, B, T)
  return jax.lax.scan(token, state, (jnp.arange(T), x_BTC.swapaxes(0, 1)))[1].swapaxes(0, 1)


def _largest(x) -> float:
  return float(np.max(np.abs(np.asarray(x, np.float64))))


def _order_dependence(record: Mechanism, *cases: dict, symmetric: bool) -> Check:
  """How much the last output moves when all earlier tokens are permuted; the largest or smallest over the cases."""

  def measure(key, scale):
    rng, found = _rng(key), []
    for options in cases:
      cfg, opts, params = _layer(rng, record, **options)
      # Options and shapes are those of `LENGTH_CASES`, whose programs serve here too.
      for _ in range(4):
        x = rng.standard_normal((2 * scale, 9, cfg.n_embd), np.float32)
        shuffled = x[:, [*rng.permutation(8), 8]]
        found.append(relative_difference(*(_apply(record, params, z, cfg, opts)[:, -1] for z in (shuffled, x))))
    return worst_of(found) if symmetric else min(found)

  return measure


def _dense(hard, a, b, v):
  sides = (group_heads(x, v.shape[2]) for x in (a, b))
  mask = causal_mask(v.shape[1])
  return jax.tree.map(ungroup_heads, dense_gated_sum(ADDITIVE, hard, *sides, v.swapaxes(1, 2), mask))


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(f, args, cotangents):
  value, pull = jax.vjp(f, *args)
  return value, pull(cotangents)


@functools.cache
def _interpolated(rank):
  return lambda a, b, v: chebyshev_gated_sum(a, b, v, None, rank, 4.0)


def _sorted(a, b, v):
  soft = lambda a, b, v, segments: _dense(False, a, b, v)
  return sorted_gated_sum(soft, a, b, v, None)


_DENSE = {hard: functools.partial(_dense, hard) for hard in (False, True)}


def _gate_case(rng, T, bound):
  """Scores [B, T, H] and [B, T, K] in (-bound, bound), values, and cotangents."""
  B, H, K, D = 1, 2, 1, 2
  a, b = (rng.uniform(-bound, bound, (B, T, heads)) for heads in (H, K))
  return (a, b, rng.normal(size=(B, T, K, D))), (rng.normal(size=(B, T, H, D)), rng.normal(size=(B, T, H)))


def _interpolation(rank: int) -> Check:
  """Relative error over the error bound of rank 24 at M = 4; gradients are allowed rank times as much."""

  def measure(key, scale):
    del scale
    with jax.enable_x64(True):
      case = _gate_case(_rng(key), 150, 4.0)
      value, pulled = _value_and_gradient(_interpolated(rank), *case)
      exact, gradient = _value_and_gradient(_DENSE[False], *case)
      worst = worst_of(relative_difference(value, exact), relative_difference(pulled, gradient) / 24)
      return worst / interpolation_error(24, 4.0)

  return measure


def _dominance(tie: float) -> Check:
  """Relative error in float32 on scores with many exact ties; the dense side may count ties (tie > 0)."""

  def measure(key, scale):
    del scale
    (a, b, v), cotangents = jax.tree.map(np.float32, _gate_case(_rng(key), 150, 4.0))
    a, b = np.round(2 * a) / 2, np.round(2 * b) / 2
    fast = _value_and_gradient(_sorted, (a, b, v), cotangents)
    return relative_difference(fast, _value_and_gradient(_DENSE[True], (a + np.float32(tie), b, v), cotangents))

  return measure


@functools.partial(jax.jit, static_argnums=0)
def _sweep_mass(score, q, k):
  ones = jnp.ones((*k.shape[:2], k.shape[3], 1))
  mass, rest = sweep(score, q, k, ones, None)
  return mass[..., 0], rest


def _sweep_identity(sign: float) -> Check:
  """|Σ_j A_ij + remainder - 1| for random β; the remainder may be taken from the opposite logits."""

  def measure(key, scale):
    rng = _rng(key)
    a, b = (rng.normal(size=(4 * scale, 1, 2, 100)).astype(np.float32) for _ in range(2))
    mass, _ = _sweep_mass(ADDITIVE, a, b)
    return _largest(mass + _sweep_mass(ADDITIVE, sign * a, sign * b)[1] - 1)

  return measure


def _rapidity_finite(record: Mechanism, raw: bool = False) -> Check:
  """Number of non-finite outputs and gradients, or (raw) of the weights written with sinh itself.

  Sweeps end where little is left, so tokens far apart are put next to each other: 384 without a gap, then 128 anywhere
  up to position 32767.
  """

  def measure(key, scale):
    del scale
    rng = _rng(key)
    positions = np.concatenate([np.arange(384), np.sort(rng.choice(np.arange(384, 32767), 127, False)), [32767]])
    if raw:
      lag = 0.101 * (positions[1:] - positions[:-1].min())
      with np.errstate(over="ignore", invalid="ignore"):
        weight = np.sinh(np.float32(lag)) / (np.sinh(np.float32(lag)) + np.sinh(np.float32(1)))
      return float(np.sum(~np.isfinite(weight)))
    cfg, opts, params = _layer(rng, record, width=2, heads=1, mode="monodromy", score="rapidity")
    x = rng.standard_normal((1, len(positions), 2), np.float32)
    found = _energy_gradient(record, params, x, cfg, opts, positions)
    found.append(_apply(record, params, x.astype(jnp.bfloat16), cfg, opts, positions))
    return float(sum(np.sum(~np.isfinite(np.asarray(leaf, np.float32))) for leaf in found))

  return measure


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _energy_gradient(record, params, x_BTC, cfg, opts, positions_T):
  """Leaves of y and of the gradient of Σ y² with respect to parameters."""

  def energy(params):
    y = record.apply(params, x_BTC, _context(positions_T[None], cfg), cfg, opts)[0]
    return jnp.sum(jnp.square(y.astype(jnp.float32))), y

  gradient, y = jax.grad(energy, has_aux=True)(params)
  return [y, *jax.tree.leaves(gradient)]


LENGTH_CASES = (
  {},
  {"mode": "discrete", "norm": "sqrt_count", "bins": 8},
  {"norm": "mass", "recency": True},
  {"mode": "monodromy"},
  {"mode": "word", "strands": 3},
)


def _length_invariance(record: Mechanism, total: bool = False) -> Check:
  """Largest relative difference, over modes and positions, between the whole sequence and one token at a time.

  The decoder cannot know the length, so this also bounds f(x)[:t] - f(x[:t]). `total` divides the whole-sequence sum by
  √T, as if the norm were the total count.
  """

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    for options in LENGTH_CASES[1:2] if total else LENGTH_CASES:
      cfg, opts, params = _layer(rng, record, **options)
      x = rng.standard_normal((2 * scale, 9, cfg.n_embd), np.float32)
      whole = _apply(record, params, x, cfg, opts)
      if total:
        whole = whole * np.sqrt(np.arange(1, 10) / 9)[:, None]
      worst = worst_of(worst, relative_difference(_decode(record, params, x, cfg, opts), whole))
    return worst

  return measure


def _word_layer(rng, record, strands, **options):
  """A one-head layer that takes the letter its one-hot input names, never writes, and outputs what it reads."""
  width = 8
  cfg, opts, params = _layer(rng, record, width, 1, mode="word", word_gate="hard", strands=strands, **options)
  params["w_letter"] = 50 * np.eye(width, strands, dtype=np.float32)[:, None]
  params["w_gate"] = np.full((width, 1), -200, np.float32)
  params["wo"] = np.eye(width, dtype=np.float32)[None]
  return cfg, opts, params


def _symmetric_group(record: Mechanism, law: str) -> Check:
  """Largest error of the label read at the first position, after every letter of random words of length 1000 in S5."""

  def measure(key, scale):
    rng = _rng(key)
    cfg, opts, params = _word_layer(rng, record, 5, word_law=law)
    params["w_read"] = np.broadcast_to(np.where(np.arange(5) == 0, 200, 0), (8, 1, 5)).astype(np.float32)
    params["strands"] = np.broadcast_to(np.arange(5.0, dtype=np.float32)[:, None], (1, 5, 8))
    words = rng.integers(0, 5, (4 * scale, 1000))
    labels = np.tile(np.arange(5), (len(words), 1))
    rows, first = np.arange(len(words)), []
    for letter in words.T:
      left = np.maximum(letter - 1, 0)
      labels[rows, left], labels[rows, letter] = labels[rows, letter], labels[rows, left].copy()
      first.append(labels[:, 0].copy())
    y = _apply(record, params, np.eye(8, dtype=np.float32)[words], cfg, opts)
    return _largest(y - np.stack(first, 1)[..., None])

  return measure


# Both sides of every relation between positive letters of five strands, as three letters (0 is idle).
RELATIONS = np.array(
  [((i, i + 1, i), (i + 1, i, i + 1)) for i in (1, 2, 3)]
  + [((i, j, 0), (j, i, 0)) for i, j in ((1, 3), (1, 4), (2, 4))]
)


def _equal_words(record: Mechanism, equal: bool) -> Check:
  """Difference of what is read after the left and the right sides of 13 random relations, or (not equal) a shuffle."""

  def measure(key, scale):
    rng = _rng(key)
    cfg, opts, params = _word_layer(rng, record, 5)
    relations = RELATIONS[rng.integers(0, len(RELATIONS), (4 * scale, 13))]
    left, right = (relations[:, :, side].reshape(4 * scale, 39) for side in (0, 1))
    other = right if equal else rng.permuted(left, axis=1)
    # Idle letters follow, so both are read by the same weights.
    inputs = (np.eye(8, dtype=np.float32)[np.pad(word, ((0, 0), (0, 961)))] for word in (left, other))
    return _largest(np.subtract(*(_apply(record, params, x, cfg, opts)[:, -1] for x in inputs)))

  return measure


def _gate_gradient(record: Mechanism, plain: bool = False) -> Check:
  """0 when the scores of discrete gates receive a gradient, 1 when it is exactly zero."""

  def measure(key, scale):
    del scale
    rng = _rng(key)
    cfg, opts, params = _layer(rng, record, mode="discrete")
    x = rng.standard_normal((1, 9, cfg.n_embd), np.float32)
    if plain:
      gates = lambda a: jnp.sum(jnp.square((a[:, None] > x[0, :, 0]).astype(jnp.float32) @ x[0]))
      return float(np.all(jax.jit(jax.grad(gates))(x[0, :, 1]) == 0))
    leaves = _energy_gradient(record, params, x, cfg, opts, np.arange(9))[1:]
    gradient = dict(zip(sorted(params), leaves, strict=True))
    return float(any(np.all(gradient[name] == 0) for name in ("w_a", "w_b", "beta", "wq", "wk")))

  return measure


def _causal(record: Mechanism, reverse: bool = False) -> Check:
  """Largest change of the first 6 outputs when the inputs after them are replaced; `reverse` reads backwards."""

  def measure(key, scale):
    rng, worst = _rng(key), 0.0
    turn = -1 if reverse else 1
    for options in LENGTH_CASES:
      cfg, opts, params = _layer(rng, record, **options)
      x, other = (rng.standard_normal((2 * scale, 9, cfg.n_embd), np.float32) for _ in range(2))
      other[:, :6] = x[:, :6]
      y = (_apply(record, params, z[:, ::turn], cfg, opts)[:, ::turn][:, :6] for z in (x, other))
      worst = worst_of(worst, _largest(np.subtract(*y)))
    return worst

  return measure


def mechanism_claims(record: Mechanism) -> tuple[Claim, ...]:
  """What `record` promises besides the algebra. Checks run the record they are given, so mutants can be tested."""
  return (
    claim(
      "braid.order_blindness",
      "without recency an additive layer's y_i is a symmetric function of the earlier tokens; sweeps and words are not",
      _order_dependence(record, {}, symmetric=True),
      1e-5,
      _order_dependence(record, {"mode": "monodromy"}, {"mode": "word", "strands": 3}, symmetric=False),
    ),
    claim(
      "braid.chebyshev",
      "24 Chebyshev nodes give σ(a+b) on |a|, |b| <= 4 within 2ρ^-24, its gradient within 24 times that; 4 do not",
      _interpolation(24),
      1.0,
      _interpolation(4),
    ),
    claim(
      "braid.sorted",
      "the sorted sum equals the dense discrete sum in value and gradient, ties not selected, T not a power of two",
      _dominance(0.0),
      1e-5,
      _dominance(1e-3),
    ),
    claim(
      "braid.sweep_mass",
      "Σ_j A_ij + remainder = 1 for any β whatsoever: an identity of stick-breaking, no evidence of integrability",
      _sweep_identity(1.0),
      1e-6,
      _sweep_identity(-1.0),
      refs=("Tan et al., 2024, arXiv 2410.17980",),
    ),
    claim(
      "braid.rapidity_finite",
      "the rapidity sweep is finite at positions up to 32767, in float32 with gradient and in bfloat16; sinh overflows",
      _rapidity_finite(record),
      0.0,
      _rapidity_finite(record, raw=True),
    ),
    claim(
      "braid.length_invariance",
      "f(x)[:t] = f(x[:t]) and step = apply at every position, in all modes; a norm by the total length breaks it",
      _length_invariance(record),
      2e-5,
      _length_invariance(record, total=True),
    ),
    claim(
      "braid.symmetric_group",
      "hard letters with t = 1 track the product in S5 exactly over words of length 1000; t = 0.99 forgets",
      _symmetric_group(record, "perm"),
      0.0,
      _symmetric_group(record, "burau"),
    ),
    claim(
      "braid.equal_words",
      "positive words that are equal as braids give equal strands; the same letters in another order do not",
      _equal_words(record, True),
      1e-5,
      _equal_words(record, False),
    ),
    claim(
      "braid.straight_through",
      "the scores of discrete gates receive a gradient (residual 0); a plain step gives exactly zero (residual 1)",
      _gate_gradient(record),
      0.0,
      _gate_gradient(record, plain=True),
      refs=("Bengio et al., 2013, arXiv 1308.3432",),
    ),
    claim(
      "braid.causal",
      "outputs before position j do not change, bit for bit, when inputs from j on are replaced, in all modes",
      _causal(record),
      0.0,
      _causal(record, reverse=True),
    ),
  )
