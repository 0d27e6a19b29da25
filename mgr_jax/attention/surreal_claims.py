"""Claims about scale-direction weights and floating values, each with a broken twin."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgr_jax.attention import standard
from mgr_jax.attention.mechanism import Context, Mechanism, rope_tables
from mgr_jax.attention.surreal_linear import linear_specs, multiplier, norms, sizes, weights
from mgr_jax.attention.surreal_options import Options
from mgr_jax.attention.surreal_values import by_definition, channels, leading
from mgr_jax.claims import Check, Claim, claim, largest_difference, relative_difference
from mgr_jax.config import GPTConfig
from mgr_jax.params import init_params

CFG = GPTConfig(vocab_size=2, n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
PER_HEAD, PER_COLUMN = Options(granularity="matrix"), Options(qk="full", s_max=2.0)


def _rng(key) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(record: Mechanism, params, x_BTC, opts):
  positions = jnp.arange(x_BTC.shape[1])[None]
  ctx = Context(positions, shared={"rope": rope_tables(positions, CFG.head_dim, CFG.rope_base)})
  return record.apply(params, x_BTC, ctx, CFG, opts)[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _start(key, record: Mechanism, opts):
  """Initial parameters of a layer, and the weights that they stand for when all gates are 1."""
  params = init_params(key, record.param_specs(CFG, opts))
  if record is standard.MECHANISM:
    return params, params
  return params, weights(params | {"wo_gate": jnp.ones_like(params["wo_gate"])}, CFG, opts)


@functools.partial(jax.jit, static_argnums=1)
def _weights_and_sizes(params, opts):
  return weights(params, CFG, opts), sizes(params, opts)


def _noisy(rng, record: Mechanism, opts: Options):
  """Parameters in which no path is switched off."""
  start, _ = _start(jax.random.key(int(rng.integers(2**31))), record, opts)
  return {n: np.asarray(p) + np.float32(0.2) * rng.standard_normal(p.shape, np.float32) for n, p in start.items()}


def _input(rng):
  return rng.standard_normal((2, 13, CFG.n_embd), np.float32)


def _matched_start(record: Mechanism, other_key: bool) -> Check:
  """Largest difference from `standard` drawn with the same key, given one output projection."""

  def measure(key, scale):
    del scale
    x, found = _input(_rng(key)), []
    plain, _ = _start(jax.random.fold_in(key, 1) if other_key else key, standard.MECHANISM, standard.Options())
    for opts in (PER_HEAD, PER_COLUMN):
      params, matrices = _start(key, record, opts)
      params["wo_gate"] = np.ones(params["wo_gate"].shape, np.float32)
      same = _apply(standard.MECHANISM, plain | {"wo": matrices["wo"]}, x, standard.Options())
      found.append(largest_difference(_apply(record, params, x, opts), same))
    return float(np.max(found))

  return measure


def _sizes_are_norms(record: Mechanism, scaled: str) -> Check:
  """Relative: norms of the weights against their sizes, and the change of the output when directions grow sevenfold."""

  def measure(key, scale):
    del scale
    rng, found = _rng(key), []
    for opts in (PER_HEAD, PER_COLUMN):
      params, specs = _noisy(rng, record, opts), linear_specs(CFG, opts)
      (matrices, of), x = _weights_and_sizes(params, opts), _input(rng)
      for name, spec in specs.items():
        if spec.role == "direction":
          measured = np.sqrt(np.sum(np.square(matrices[name], dtype=np.float64), spec.unit_dims)) / spec.radius
          found.append(float(np.max(np.abs(measured / np.abs(np.squeeze(of[name])) - 1))))
      moved = {n: p * 7 if n in ("wq", "wk", scaled, "wo") else p for n, p in params.items()}
      found.append(relative_difference(_apply(record, moved, x, opts), _apply(record, params, x, opts)))
    return float(np.max(found))

  return measure


def _gradients(normalised: bool) -> Check:
  """<v, dv> for every column, and ds - <dW, W>, in float64."""
  spec = linear_specs(CFG, Options())["wv"]

  @jax.jit
  def both(x, v, s):
    by = multiplier if normalised else lambda v, spec, size: size
    y = lambda v, s: jnp.einsum("tc,chd->thd", x, v) * by(v, spec, jnp.exp(s))
    dv, ds = jax.grad(lambda v, s: jnp.sum(jnp.sin(y(v, s))), (0, 1))(v, s)
    w = v * multiplier(v, spec, jnp.exp(s))
    dw = jax.grad(lambda w: jnp.sum(jnp.sin(jnp.einsum("tc,chd->thd", x, w))))(w)
    return jnp.sum(v * dv, 0), ds - jnp.sum(dw * w, 0)

  def measure(key, scale):
    del scale
    rng = _rng(key)
    with jax.enable_x64(True):
      v, s = rng.standard_normal(spec.shape), rng.standard_normal(spec.shape[1:])
      found = both(rng.standard_normal((20, CFG.n_embd)), v, s)
      return float(np.max([np.max(np.abs(r)) for r in found]))

  return measure


def _renormalised(drop_norm: bool) -> Check:
  """Relative change of x·W when directions that five Adam steps moved are brought back to their radius."""
  spec = linear_specs(CFG, Options())["wv"]
  by = lambda v: 1.0 if drop_norm else multiplier(v, spec)
  y = lambda v, x: jnp.einsum("tc,chd->thd", x, v) * by(v)

  @jax.jit
  def run(v, x):
    adam = optax.adamw(0.1)

    def body(carry, _):
      v, state = carry
      updates, state = adam.update(jax.grad(lambda v: jnp.sum(jnp.sin(y(v, x))))(v), state, v)
      return (v + updates, state), None

    (v, _), _ = jax.lax.scan(body, (v, adam.init(v)), None, 5)
    return y(v, x), y(v * (spec.radius / norms(v, spec)), x)

  def measure(key, scale):
    del scale
    rng = _rng(key)
    v = rng.standard_normal(spec.shape, np.float32)
    return relative_difference(*run(v / np.linalg.norm(v, axis=0), rng.standard_normal((20, CFG.n_embd), np.float32)))

  return measure


def _folded(record: Mechanism, fold: Callable, forget_sizes: bool) -> Check:
  """Relative difference of the layer and of `standard` with the folded weights."""

  def measure(key, scale):
    del scale
    rng, found = _rng(key), []
    for opts in (PER_HEAD, PER_COLUMN):
      params, x = _noisy(rng, record, opts), _input(rng)
      if opts.qk == "direction":
        params["tau"] = _start(key, record, opts)[0]["tau"]
      plain, gain = fold(params, CFG, opts)
      plain = {n: params[n] if forget_sizes else w for n, w in plain.items()}
      found.append(float(jnp.max(jnp.abs(gain - 1))))
      expected = _apply(record, params, x, opts)
      found.append(relative_difference(_apply(standard.MECHANISM, plain, x, standard.Options()), expected))
    return float(np.max(found))

  return measure


@jax.jit
def _both_forms(scores, u, l):
  """e^Λ ū by the definition of ū and Λ, and as one attention over channels; ū and Λ."""
  direction, log_size = by_definition(scores, u, l)
  size = jnp.exp(l)[..., None]
  mixed = jnp.einsum("bkrts,bksd->bkrtd", jax.nn.softmax(scores, -1), jnp.concatenate([size * u, size], -1))
  return jnp.exp(log_size)[..., None] * direction, mixed[..., :-1], direction, log_size - jnp.log(mixed[..., -1])


def _directions(rng, S: int = 40, D: int = 8):
  u = rng.standard_normal((1, 2, S, D))
  return u / np.sqrt(np.mean(u**2, -1, keepdims=True))


def _identity(naive: bool) -> Check:
  """Relative difference of both forms: float64 with |ℓ| up to 60. The broken twin has float32 and ℓ of 100."""

  def measure(key, scale):
    del scale
    rng = _rng(key)
    scores, u = 3 * rng.standard_normal((1, 2, 2, 9, 40)), _directions(rng)
    l = 100.0 + rng.standard_normal((1, 2, 40)) if naive else rng.uniform(-60, 60, (1, 2, 40))
    with jax.enable_x64(not naive):
      if naive:
        scores, u, l = (np.float32(a) for a in (scores, u, l))
      left, right, _, gap = jax.device_get(_both_forms(scores, u, l))
    size = np.max(np.abs(left), -1, keepdims=True)
    return float(np.max([np.max(np.abs(left - right) / size), np.max(np.abs(gap))]))

  return measure


def _in_tiles(cut: float) -> Check:
  """Relative difference of the tiled float32 pass and the float64 definition for ℓ of ±20, on all directions and Λ."""

  @jax.jit
  def tiled(q, k, u, l):
    values = channels(u.swapaxes(1, 2), jnp.clip(l, -cut, cut).swapaxes(1, 2)).swapaxes(1, 2)
    mean, log_size = leading(standard.tiled_attention(q, k, values, None, 0, False)[0])
    return mean * jnp.exp(-log_size)[..., None], log_size

  def measure(key, scale):
    del scale
    rng, T = _rng(key), 70
    q, k = rng.standard_normal((1, 2, 2, T, 8)), rng.standard_normal((1, 2, T, 8))
    u, l = _directions(rng, T), 20 * rng.choice([-1.0, 1.0], (1, 2, T))
    scores = np.where(np.tri(T, dtype=bool), np.einsum("bkrtd,bksd->bkrts", q, k) * 8**-0.5, -np.inf)
    with jax.enable_x64(True):
      _, _, direction, _ = _both_forms(scores, u, l)
      _, log_size = by_definition(jnp.asarray(scores), jnp.asarray(u), jnp.asarray(l))
    got = tiled(*(np.float32(a) for a in (q, k, u, l)))
    return largest_difference(got, (direction, log_size))

  return measure


def _dominance(lead: float) -> Check:
  """Largest difference of ū from the direction of the token whose ℓ exceeds all others by `lead`."""

  def measure(key, scale):
    del scale
    rng = _rng(key)
    l = rng.uniform(-10, -9, (1, 2, 40))
    l[..., 17] = -9 + lead
    with jax.enable_x64(True):
      u = _directions(rng)
      _, _, direction, _ = _both_forms(rng.standard_normal((1, 2, 2, 9, 40)), u, l)
    return largest_difference(direction, np.broadcast_to(u[:, :, None, None, 17], direction.shape))

  return measure


def claims(record: Mechanism, fold: Callable) -> tuple[Claim, ...]:
  """All claims of the layer `record`, whose factors `fold` multiplies out."""
  return (
    claim(
      "surreal.matched_start",
      "drawn with the same key, the layer is the function of standard attention",
      _matched_start(record, other_key=False),
      1e-5,
      _matched_start(record, other_key=True),
    ),
    claim(
      "surreal.size_and_direction",
      "the norm of a weight is e^s (relative), and multiplying directions by 7 changes nothing",
      _sizes_are_norms(record, "wv"),
      2e-6,
      _sizes_are_norms(record, "wv_scale"),
    ),
    claim(
      "surreal.gradients",
      "<v, ∂L/∂v> = 0 and ∂L/∂s = <∂L/∂W, W>, in float64",
      _gradients(normalised=True),
      1e-10,
      _gradients(normalised=False),
      refs=("Salimans and Kingma, 2016, arXiv 1602.07868",),
    ),
    claim(
      "surreal.renormalisation",
      "bringing directions back to their radius after five optimizer steps changes no output (relative)",
      _renormalised(drop_norm=False),
      2e-6,
      _renormalised(drop_norm=True),
    ),
    claim(
      "surreal.fold",
      "standard attention with the folded weights is the same layer (relative)",
      _folded(record, fold, forget_sizes=False),
      2e-6,
      _folded(record, fold, forget_sizes=True),
    ),
    claim(
      "surreal.floating_identity",
      "e^Λ ū = Σ softmax(a) e^ℓ u and Λ = LSE(a+ℓ) - LSE(a), for |ℓ| up to 60 in float64 (relative)",
      _identity(naive=False),
      1e-12,
      _identity(naive=True),
    ),
    claim(
      "surreal.floating_tiles",
      "one tiled float32 pass gives ū and Λ for ℓ of ±20",
      _in_tiles(cut=20.0),
      2e-5,
      _in_tiles(cut=19.9),
    ),
    claim(
      "surreal.dominance",
      "where one log-magnitude leads by 30, ū is the direction of that token",
      _dominance(30.0),
      1e-9,
      _dominance(0.1),
    ),
  )
