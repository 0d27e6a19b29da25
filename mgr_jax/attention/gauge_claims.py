"""Claims about transport in attention: what it computes, what it cannot see, and its closed gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import lie
from mgr_jax.algebra.hypercomplex_claims import generator
from mgr_jax.algebra.lie_exp_claims import exp_float64, skew_float64
from mgr_jax.algebra.lie_prefix import prefix_product
from mgr_jax.attention import gauge_poisson, standard
from mgr_jax.attention.gauge_chain import Chain, Setting
from mgr_jax.attention.gauge_fibres import fibre
from mgr_jax.attention.gauge_options import Options
from mgr_jax.attention.mechanism import Context, Mechanism, rope_tables
from mgr_jax.claims import Check, Claim, claim, relative_difference, worst_of
from mgr_jax.config import GPTConfig

B, K, D = 2, 2, 8


def rotations(rng, b: int, *shape, size: float = 1.0) -> np.ndarray:
  """Random rotations [*shape, b, b] in float64."""
  return exp_float64(skew_float64(size * rng.standard_normal((*shape, lie.dimension(b))), b))


def _turn(M, w):
  """M w for M [B, T, K, n, b, b] and w [B, T, K, ..., D], whose block i holds the channels i, n + i, 2n + i, ..."""
  n, b = M.shape[-3:-1]
  return np.einsum("btknij,btk...jn->btk...in", M, w.reshape(*w.shape[:-1], b, n)).reshape(w.shape)


@jax.jit
def _frames(U):
  return prefix_product(U, axis=1, reorthogonal=False)


def core(U, q, k, v) -> tuple[np.ndarray, np.ndarray]:
  """Scores and outputs of transported attention with rotary positions, from edges U [B, T, K, n, b, b], float64."""
  T = np.asarray(_frames(U))
  q, k, v = (_turn(np.swapaxes(T, -1, -2), w) for w in (q, k, v))
  wave = np.exp(1j * np.arange(q.shape[1])[:, None] * 0.3 ** np.arange(D // 2))[None, :, None]
  spin = lambda w: (w[..., : D // 2] + 1j * w[..., D // 2 :]) * wave
  q, k = (np.concatenate([z.real, z.imag], -1) for z in (spin(q), spin(k)))
  scores = np.einsum("btkd,bskd->bkts", q, k)
  scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
  weight = np.exp(scores - scores.max(-1, keepdims=True))
  weight /= weight.sum(-1, keepdims=True)
  return np.where(np.isfinite(scores), scores, 0), _turn(T, np.einsum("bkts,bskd->btkd", weight, v))


def covariance_error(rng, rule: str) -> float:
  """Largest change of scores, and of S_t⁻¹ outputs, when every token's fibre is turned by a random S_t.

  `rule` is how edges follow: `group` (U_t → S_t U_t S_(t-1)ᵀ), `algebra` (A → S A Sᵀ + ΔS Sᵀ in the exponent), `none`.
  """
  length, b = 12, 4
  with jax.enable_x64(True):
    n = D // b
    A = skew_float64(0.3 * rng.standard_normal((B, length, K, n, lie.dimension(b))), b)
    S = rotations(rng, b, B, length, K, n, size=2.0 if rule != "algebra" else 0.3)
    U = exp_float64(A)
    last = np.concatenate([np.broadcast_to(np.eye(b), S[:, :1].shape), S[:, :-1]], 1)
    back = np.swapaxes(S, -1, -2)
    moved = {"group": lambda: S @ U @ np.swapaxes(last, -1, -2), "none": lambda: U}
    if rule == "algebra":
      M = S @ A @ back + (S - last) @ back
      moved["algebra"] = lambda: exp_float64((M - np.swapaxes(M, -1, -2)) / 2)
    q, k, v = (rng.standard_normal((B, length, K, D)) for _ in range(3))
    before = core(U, q, k, v)
    scores, out = core(moved[rule](), *(_turn(S, w) for w in (q, k, v)))
    return worst_of(np.max(np.abs(scores - before[0])), np.max(np.abs(_turn(back, out) - before[1])))


def _covariance(rule: str) -> Check:
  def measure(key, scale):
    rng = generator(key)
    return worst_of(covariance_error(rng, rule) for _ in range(scale))

  return measure


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_closed_form(b, scan, a, w, u, segments):
  """A scalar of pulled and pushed vectors, and its gradient with respect to everything."""

  def objective(a, w, u):
    F = fibre(b).frames(a, Chain(segment_ids_BT=segments), Setting(9.0, scan, False))
    (pulled,), (pushed,) = fibre(b).pull(F, (w,)), fibre(b).push(F, (u,))
    return jnp.sum(jnp.sin(pulled) + jnp.cos(2 * pushed))

  return jax.value_and_grad(objective, (0, 1, 2))(a, w, u)


@functools.cache
def above_diagonal(b: int) -> np.ndarray:
  """The matrix [p, p] from the coordinates of `fibre(b)` to those above the diagonal."""
  with jax.enable_x64(True):
    return np.asarray(jax.jit(fibre(b).coordinates)(np.eye(lie.dimension(b))))


def edges(a, b: int) -> np.ndarray:
  """exp of generators a [..., p, n], also complex ones, in double precision: [..., n, b, b]."""
  return exp_float64(skew_float64(np.swapaxes(above_diagonal(b) @ a, -1, -2), b))


def _by_matrices(b, newest_left, a, w, u, segments):
  """The same scalar through products of matrices, which is analytic: its arguments may be complex."""
  T = edges(a, b)
  for t in range(1, T.shape[1]):
    product = T[:, t] @ T[:, t - 1] if newest_left else T[:, t - 1] @ T[:, t]
    same = segments[:, t] == segments[:, t - 1]
    T[:, t] = np.where(same[:, None, None, None, None], product, T[:, t])
  return np.sum(np.sin(_turn(np.swapaxes(T, -1, -2), w)) + np.cos(2 * _turn(T, u)))


def _gradients(newest_left: bool) -> Check:
  """Relative difference of the value and of its derivatives along random directions: closed, and by complex steps.

  The imaginary part of f(x + ih·d) / h is ∂f/∂d to all digits for h = 1e-30, since nothing is subtracted (Squire and
  Trapp, 1998). Two documents per row, float64.
  """

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    with jax.enable_x64(True):
      segments = np.array([[0] * 5 + [1] * 6, [0] * 11])
      for b, scan in ((3, "serial"), (4, "chunk:4")):
        shapes = (B, 11, K, lie.dimension(b), 2), (B, 11, K, 2, 2 * b), (B, 11, K, 2, 2 * b)
        point = [rng.standard_normal(shape) for shape in shapes]
        value, gradient = _by_closed_form(b, scan, *point, segments)
        worst = worst_of(worst, relative_difference(value, _by_matrices(b, newest_left, *point, segments)))
        for _ in range(2 * scale):
          direction = [rng.standard_normal(shape) for shape in shapes]
          moved = (x + 1e-30j * d for x, d in zip(point, direction, strict=True))
          slope = _by_matrices(b, newest_left, *moved, segments).imag / 1e-30
          size = np.sqrt(sum(np.vdot(g, g) for g in gradient))
          along = sum(np.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
          worst = worst_of(worst, float(abs(along - slope) / size))
    return worst

  return measure


def _layer(rng, record: Mechanism, length: int, size: float, **options):
  """A small configuration, options, noisy parameters with generators of the given size, and an input."""
  cfg = GPTConfig(vocab_size=2, seq_len=length, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
  opts = record.options(**options)
  specs = record.param_specs(cfg, opts)
  params = {name: 0.3 * rng.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}
  params["gen_out"] *= size
  return cfg, opts, params, rng.standard_normal((B, length, 16), np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(record, params, x_BTC, cfg, opts):
  positions = jnp.arange(x_BTC.shape[1])[None]
  ctx = Context(positions, shared={"rope": rope_tables(positions, cfg.head_dim, cfg.rope_base)})
  return record.apply(params, x_BTC, ctx, cfg, opts)[0]


def _start(record: Mechanism, size: float) -> Check:
  """Largest difference from softmax attention with the same projections."""

  def measure(key, scale):
    del scale
    cfg, opts, params, x = _layer(generator(key), record, 33, size)
    softmax = _apply(standard.MECHANISM, params, x, cfg, standard.Options())
    return float(jnp.max(jnp.abs(_apply(record, params, x, cfg, opts) - softmax)))

  return measure


@jax.jit
def _transported(a, q, k, v):
  """Attention [B, T, 1, 1, D] of one head by pulling back, in float32."""
  F = fibre(4).frames(a, Chain(), Setting(9.0, "serial", True))
  q, k, v = fibre(4).pull(F, (q, k, v))
  last = lambda w: w.transpose(0, 2, 3, 1, 4)
  out, _ = standard.dense_attention(last(q), last(k)[:, :, 0], last(v)[:, :, 0])
  return fibre(4).push(F, (out.transpose(0, 3, 1, 2, 4),))[0]


def _carried_keys(newest_left: bool) -> Check:
  """Largest difference between the fast path, and keys and values carried along every edge in turn (NumPy, float64)."""

  def measure(key, scale):
    del scale
    rng, length, b = generator(key), 20, 4
    n = D // b
    a = rng.standard_normal((B, length, 1, 6, n), np.float32)
    q, k, v = rng.standard_normal((3, B, length, 1, 1, D), np.float32)
    got = np.asarray(_transported(a, q, k, v))[:, :, 0, 0]
    U = edges(a.astype(np.float64), b)
    q, k, v = (np.asarray(w, float)[:, :, 0, 0].reshape(B, length, b, n) for w in (q, k, v))
    worst = 0.0
    R = np.zeros((B, 0, n, b, b))
    for t in range(length):
      edge = U[:, t, 0][:, None]
      R = edge @ R if newest_left else R @ edge
      R = np.concatenate([R, np.broadcast_to(np.eye(b), (B, 1, n, b, b))], 1)
      keys, values = (np.einsum("bsnij,bsjn->bsin", R, w[:, : t + 1]) for w in (k, v))
      weight = np.exp(np.einsum("bin,bsin->bs", q[:, t], keys) / D**0.5)
      out = np.einsum("bs,bsin->bin", weight / weight.sum(1, keepdims=True), values)
      worst = worst_of(worst, float(np.max(np.abs(out.reshape(B, D) - got[:, t]))))
    return worst

  return measure


def _stochastic(symmetric: bool) -> Check:
  """How far the Poisson mixer is from a causal average: row sums, negative weights, weights of later tokens."""

  def measure(key, scale):
    del scale
    rng, length = generator(key), 32
    cfg, opts = GPTConfig(vocab_size=2, seq_len=length, n_layer=1, n_head=2, n_kv_head=1, n_embd=64), Options()
    params = {"off_bias": rng.standard_normal((2, 6), np.float32), "time": rng.standard_normal(2).astype(np.float32)}
    q = rng.standard_normal((1, 1, 2, length, length), np.float32)
    k = rng.standard_normal((1, 1, length, length), np.float32)
    M = jax.jit(lambda q, k: gauge_poisson.mix_hops(params, q, k, jnp.eye(length)[None, None], None, cfg, opts))(q, k)
    M = np.asarray(M, float)
    if symmetric:
      M = (M + M.swapaxes(-1, -2)) / 2
    return worst_of(np.max(np.abs(M.sum(-1) - 1)), -M.min(), np.max(np.abs(np.triu(M, 1))))

  return measure


def mechanism_claims(record: Mechanism) -> tuple[Claim, ...]:
  """All claims that need the layer or its parts."""
  return (
    claim(
      "gauge.covariance",
      "turning every token's fibre by S_t, with U_t → S_t U_t S_(t-1)ᵀ, leaves scores alone and turns outputs by S_t",
      _covariance("group"),
      1e-12,
      _covariance("none"),
    ),
    claim(
      "gauge.transport",
      "attention over pulled-back vectors = attention over keys and values carried along every edge, U_t ··· U_(s+1)",
      _carried_keys(newest_left=True),
      2e-5,
      _carried_keys(newest_left=False),
    ),
    claim(
      "gauge.closed_gradient",
      "one reverse sum of torques gives the derivative through all edges, equal to that by complex steps (b = 3, 4)",
      _gradients(newest_left=True),
      1e-10,
      _gradients(newest_left=False),
    ),
    claim(
      "gauge.starts_as_softmax",
      "with generators of zero the layer is softmax attention with rotary positions",
      _start(record, 0.0),
      1e-6,
      _start(record, 1.0),
    ),
    claim(
      "gauge.hops_are_averages",
      "the Poisson mixer is a causal average: rows sum to one, nothing is negative, nothing comes from later tokens",
      _stochastic(symmetric=False),
      2e-6,
      _stochastic(symmetric=True),
      refs=("Jensen, 1953, Markoff chains as an aid in the study of Markoff processes",),
    ),
  )
