"""Claims about the flow maps of one eigenvalue, about noise, and about HOSS on losses that are not quadratic."""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mgr_jax.algebra.phi import oscillator, phi1, phi_delta, psi_delta
from mgr_jax.claims import Check, claim
from mgr_jax.optim import hoss_noise
from mgr_jax.optim import hoss_spectrum as macro
from mgr_jax.optim.hoss_krylov_claims import phi_reference, rng_of
from mgr_jax.optim.hoss_step import scale_by_hoss
from mgr_jax.optim.lanczos import tree_norm


def _quotient(z):
  return (jnp.exp(z) - 1) / z


_psi = jax.jit(psi_delta)


def psi(l, delta) -> np.ndarray:
  """Ψ_δ in the precision of l."""
  l = np.asarray(l)
  return np.asarray(_psi(l, l.dtype.type(delta)))


def _last_place(f) -> Check:
  """Largest error of f against φ1 with 50 digits, in units in the last place, for 1e-12 <= |z| <= 50."""
  f = jax.jit(f)

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    with decimal.localcontext() as context, jax.enable_x64(True):
      context.prec = 50
      for dtype in (np.float32, np.float64):
        size = 10 ** rng.uniform(-12, np.log10(50), 400 * scale)
        z = (size * rng.choice([-1, 1], size.shape)).astype(dtype)
        found = np.asarray(f(z))
        for x, y in zip(map(float, z), found, strict=True):
          exact = (decimal.Decimal(x).exp() - 1) / decimal.Decimal(x)
          worst = np.max([worst, float(abs(decimal.Decimal(float(y)) - exact)) / float(np.spacing(dtype(exact)))])
    return worst

  return measure


def _momentum(smooth: bool) -> Check:
  """Relative error of `oscillator` against the exponential of its companion matrix, over damping regimes.

  Not `smooth` is the printed quotient, which is 0/0 at l = 0 and at critical damping.
  """

  def quotient(l, friction, delta):
    w = np.sqrt(l - friction**2 / 4 + 0j)
    with np.errstate(all="ignore"):
      S = np.exp(-friction * delta / 2) * np.sin(w * delta) / w
      return ((1 - np.exp(-friction * delta / 2) * np.cos(w * delta) - friction / 2 * S) / l).real, S.real

  run = jax.jit(oscillator)

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    for friction in (0.0, 0.1, 2.0, 30.0):
      delta = 10 ** rng.uniform(-2, 0.5)
      l = np.concatenate([[0, 1e-9, friction**2 / 4, friction**2 / 4 + 1e-7], rng.uniform(-3, 60, 4 * scale)])
      with jax.enable_x64(True):
        K, S = map(np.asarray, run(l, friction, delta)) if smooth else quotient(l, friction, delta)
      for value, k, s in zip(l, K, S, strict=True):
        flow = scipy.linalg.expm(delta * np.array([[0, 1, 0], [-value, -friction, -1], [0, 0, 0]]))
        found = np.abs([k / -flow[0, 2] - 1, (s - flow[0, 1]) / delta])
        worst = np.inf if np.any(np.isnan(found)) else np.max([worst, *found])
    return worst

  return measure


@jax.jit
def _covariance(H, sigma, delta):
  theta, vectors = jnp.linalg.eigh(H)
  s = macro.Spectrum(theta, vectors, jnp.ones(theta.size, bool), 1.0, 0.0)
  return vectors @ macro.covariance(s, delta, "flow", sigma) @ vectors.T, theta, vectors


def _lyapunov(doubled: bool) -> Check:
  """Errors of HC + CH = Σ - e^{-δH}Σe^{-δH} and of C against 32-point quadrature of its integral.

  `doubled` has the exponents 2·l_i in place of l_i + l_j.
  """

  def measure(key, scale):
    rng, worst = rng_of(key), 0.0
    nodes, weights = np.polynomial.legendre.leggauss(32)
    for low in (0.1, -2.0) * scale:
      U = np.linalg.qr(rng.standard_normal((6, 6)))[0]
      H, delta = U * rng.uniform(low, 3, 6) @ U.T, 0.4
      sigma = rng.standard_normal((6, 3))
      sigma = sigma @ sigma.T
      with jax.enable_x64(True):
        C, theta, vectors = map(np.asarray, _covariance(H, sigma, delta))
      if doubled:
        psi = -np.expm1(-2 * delta * theta) / (2 * theta)
        C = vectors @ (vectors.T @ sigma @ vectors * psi[:, None]) @ vectors.T
      E = scipy.linalg.expm(-delta * H)
      flows = [scipy.linalg.expm(-t * H) for t in delta * (nodes + 1) / 2]
      integral = sum(w * delta / 2 * e @ sigma @ e for w, e in zip(weights, flows, strict=True))
      worst = np.max([worst, np.max(np.abs(H @ C + C @ H - sigma + E @ sigma @ E)), np.max(np.abs(C - integral))])
    return worst

  return measure


@functools.partial(jax.jit, static_argnums=2)
def _kernels(theta, delta, neg):
  """Decrease per |g|² along each eigenvector, and the covariance of unit noise."""
  n = theta.size
  s = lambda v: macro.Spectrum(theta, jnp.eye(n).at[0].set(v), jnp.ones(n, bool), 1.0, 0.0)
  eye = s(jnp.eye(n)[0])
  return jax.vmap(lambda v: macro.decrease(s(v), delta, neg))(jnp.eye(n)), macro.covariance(eye, delta, neg, jnp.eye(n))


def _same_operator(mixed: bool) -> Check:
  """Largest difference between decrease and noise kernels; `mixed` leaves the noise's curvature as it is."""

  def measure(key, scale):
    theta, worst = np.concatenate([[-5.0, -0.3, 0.0], rng_of(key).uniform(-2, 9, 5 * scale)]), 0.0
    with jax.enable_x64(True):
      for neg in macro.NEGATIVE:
        fall, C = map(np.asarray, _kernels(theta, 1.0, neg))
        C = np.diag(psi(theta, 1.0)) if mixed else C
        worst = np.max([worst, np.max(np.abs(C - np.diag(fall)))])
    return worst

  return measure


@functools.partial(jax.jit, static_argnums=3)
def _draws(key, H, g, n):
  one = lambda k: hoss_noise.full_noise(k, lambda v: H @ v, g, 0.7, "abs", 0.3, 8)
  return jax.vmap(one)(jax.random.split(key, n))


def _full_law(full: bool) -> Check:
  """Relative Frobenius error of the covariance of 20000 draws in 8 dimensions; else of their part in span{g, Hg}."""

  def measure(key, scale):
    rng = rng_of(key)
    U = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    l = np.array([-1.0, 0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0])
    H, g = (U * l @ U.T).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    x = np.asarray(_draws(key, H, g, 20_000 * scale), np.float64)
    if not full:
      Q = np.linalg.qr(np.stack([g, H @ g], 1))[0]
      x = x @ Q @ Q.T
    exact = 0.3 * U * phi_reference(2 * np.abs(l), 0.7) @ U.T
    return np.linalg.norm(x.T @ x / len(x) - exact) / np.linalg.norm(exact)

  return measure


def _stationary(euler: bool) -> Check:
  """Largest relative error of τ/(2l) after 500 steps of 4000 chains on diag(1e6, 1), δ = 0.1, 1 and 5."""
  flow = jax.jit(lambda l, delta: (phi_delta(l, delta), psi_delta(l, delta)))

  def measure(key, scale):
    rng, worst, l = rng_of(key), 0.0, np.array([1e6, 1.0], np.float32)
    for delta in (0.1, 1.0, 5.0):
      mean, variance = (delta, delta) if euler else map(np.asarray, flow(l, np.float32(delta)))
      w = np.zeros((4000 * scale, 2), np.float32)
      with np.errstate(all="ignore"):
        for _ in range(500):
          w = w - mean * l * w + np.sqrt(variance) * rng.standard_normal(w.shape, np.float32)
        worst = np.max([worst, *np.abs(np.nan_to_num(np.var(w, 0), nan=np.inf) * 2 * l - 1)])
    return worst

  return measure


def _network(w):
  """log cosh loss of a network of 2 inputs, 2 hidden units and 1 output on 6 points; 9 parameters."""
  x = jnp.linspace(-1, 1, 12).reshape(6, 2)
  hidden = jnp.tanh(x @ w["in"] + w["bias"])
  return jnp.mean(jnp.log(jnp.cosh(hidden @ w["out"][:2] + w["out"][2] - jnp.sin(3 * x[:, 0]))))


@jax.jit
def _errors(w, deltas):
  """Distances of one macro step, and of one step of gradient descent, from gradient flow by 400 Runge-Kutta steps."""
  tx = scale_by_hoss(1.0, rank=9, neg="flow", breakdown_tol=1e-14)
  gradient = jax.grad(_network)
  g, product = jax.linearize(gradient, w)
  along = lambda w, t, v: jax.tree.map(lambda x, y: x + t * y, w, v)

  def error(delta):
    def runge_kutta(w, _):
      h = -delta / 400

      def stage(carry, weights):
        total, k = carry
        inner, outer = weights
        k = gradient(along(w, inner * h, k))
        return (along(total, outer * h, k), k), None

      weights = np.array([0, 0.5, 0.5, 1]), np.array([1, 2, 2, 1]) / 6
      return jax.lax.scan(stage, (w, g), weights)[0][0], None

    exact = jax.lax.scan(runge_kutta, w, None, 400)[0]
    step = tx.update(g, tx.init(w), w, hvp_fn=product, scale=delta)[0]
    distance = lambda step: tree_norm(jax.tree.map(lambda w, s, e: w + s - e, w, step, exact))
    return distance(step), distance(jax.tree.map(lambda g: -delta * g, g))

  return jax.vmap(error)(deltas)


def _order(descent: bool) -> Check:
  """|slope - 3| of log error against log δ, of one step against gradient flow, float64."""

  def measure(key, scale):
    rng, worst, deltas = rng_of(key), 0.0, 0.02 * 2.0 ** np.arange(5)
    for _ in range(2 * scale):
      with jax.enable_x64(True):
        w = {name: jnp.asarray(rng.standard_normal(n)) for name, n in (("in", (2, 2)), ("bias", 2), ("out", 3))}
        e = np.asarray(_errors(w, deltas)[int(descent)])
      worst = np.max([worst, abs(np.polyfit(np.log(deltas), np.log(e), 1)[0] - 3)])
    return worst

  return measure


def saddle(w):
  """F = (x² - y²)/2 + y⁴/4."""
  return 0.5 * (w[0] ** 2 - w[1] ** 2) + 0.25 * w[1] ** 4


@jax.jit
def saddle_descents() -> dict[str, jax.Array]:
  """`saddle` after each of 100 steps of δ = 0.5 from (1, 1e-6), [100] for every policy; float32."""
  start = jnp.array([1, 1e-6], jnp.float32)

  def losses(neg):
    tx = scale_by_hoss(0.5, rank=2, neg=neg)

    def step(w, _):
      g, product = jax.linearize(jax.grad(saddle), w)
      w = w + tx.update(g, tx.init(w), w, hvp_fn=product)[0]
      return w, saddle(w)

    return jax.lax.scan(step, start, None, 100)[1]

  return {neg: losses(neg) for neg in macro.NEGATIVE}


def saddle_naively() -> np.ndarray:
  """Where 60 float32 steps of δ = 6e-4 from (1, 1e-6) end, curvature clamped at 1e-6, (1 - e^{-δl})/l as it stands."""
  w, delta = np.array([1, 1e-6], np.float32), np.float32(6e-4)
  for _ in range(60):
    g = np.array([w[0], w[1] ** 3 - w[1]], np.float32)
    l = np.maximum(np.array([1, 3 * w[1] ** 2 - 1], np.float32), np.float32(1e-6))
    w = w - (1 - np.exp(-delta * l)) / l * g
  return w


def _saddle(naive: bool) -> Check:
  """Largest F = (x² - y²)/2 + y⁴/4 after 60 steps of δ = 0.5 from (1, 1e-6), over the policies; float32.

  `naive`: Ritz values clamped from below at 1e-6, (1 - exp(-δl))/l with δ = 6e-4.
  """
  if naive:
    return lambda key, scale: saddle(saddle_naively())
  return lambda key, scale: np.max([losses[59] for losses in saddle_descents().values()])


CLAIMS = (
  claim(
    "phi.accuracy",
    "φ1 within 4 units in the last place, |z| from 1e-12 to 50",
    _last_place(phi1),
    4.0,
    _last_place(_quotient),
  ),
  claim(
    "phi.momentum",
    "w'' + γw' + lw = -g in closed form, smooth through critical damping and l = 0",
    _momentum(True),
    1e-10,
    _momentum(False),
  ),
  claim("hoss.lyapunov", "HC + CH = Σ - e^{-δH}Σe^{-δH}", _lyapunov(False), 1e-9, _lyapunov(True)),
  claim(
    "hoss.one_operator",
    "the decrease of the model per |g|² and the covariance per τ are one kernel Ψ_δ(θ~), whatever is made of θ < 0",
    _same_operator(False),
    1e-10,
    _same_operator(True),
  ),
  claim(
    "hoss.full_noise",
    "noise from its own Krylov space has covariance τ·Ψ_δ(H): 5 % in 20000 draws",
    _full_law(True),
    0.05,
    _full_law(False),
    refs=("Chow & Saad, 2014, SIAM J. Sci. Comput. 36",),
  ),
  claim(
    "hoss.stationary",
    "the stationary variance is τ/(2l) for every δ, also at δ·l = 5e6",
    _stationary(False),
    0.08,
    _stationary(True),
  ),
  claim(
    "hoss.order",
    "the mean step follows gradient flow of a network with error O(δ³), gradient descent with O(δ²)",
    _order(False),
    0.3,
    _order(True),
    refs=("Hochbruck & Ostermann, 2010, Acta Numerica 19",),
  ),
  claim(
    "hoss.saddle",
    "from 1e-6 beside a saddle 60 steps of δ = 0.5 reach F < -0.2 under every policy; min F is -0.25",
    _saddle(False),
    -0.2,
    _saddle(True),
  ),
)
