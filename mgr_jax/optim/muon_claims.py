"""Claims about orthogonalisation and Muon's updates, each with a broken twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgr_jax.claims import Check, claim
from mgr_jax.optim.muon import scale_by_muon
from mgr_jax.optim.muon_layout import layout, shape_factor
from mgr_jax.optim.newton_schulz import orthogonalise
from mgr_jax.params import ParamSpec

SHAPES = ((48, 48), (96, 32))
# Where singular values of at least `smallest`·|M|_F end after 5 steps.
INTERVALS = {("ns5", 1e-3): (0.470, 1.203), ("ns5", 1e-2): (0.681, 1.135), ("polar_express", 1e-3): (0.876, 1.124)}
PAPERS = ("Jordan et al., 2024, Muon", "Amsel, Persson, Musco, Gower, 2025, arXiv 2505.16932")


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def haar(rng: np.random.Generator, n: int) -> np.ndarray:
  """A uniformly random orthogonal matrix, float64."""
  q, r = np.linalg.qr(rng.normal(size=(n, n)))
  return q * np.sign(np.diag(r))


def matrix_with_spectrum(rng: np.random.Generator, m: int, n: int, smallest: float):
  """U [m, k], S [k], V [n, k] in float64; S log-uniform with |S| = 1, and least value `smallest`."""
  k = min(m, n)
  s = np.exp(rng.uniform(np.log(smallest), 0, k))
  s[0] = s.min() * 0.999
  # Raising small values lengthens the spectrum only a little: a few rounds reach the fixed point.
  for _ in range(50):
    s = np.maximum(s / np.linalg.norm(s), smallest)
  return haar(rng, m)[:, :k], s, haar(rng, n)[:, :k]


def _product(u, s, v):
  return np.float32((u * s) @ v.T)


# Not in the bfloat16 that accelerators take by themselves.
_exact = functools.partial(orthogonalise, dtype=jnp.float32)
_run = jax.jit(_exact, static_argnames=("ns", "steps", "dtype"))


def _sign(M, **_):
  """What replaces the polar factor in broken twins: sign descent."""
  return jnp.sign(M) / np.sqrt(max(M.shape[-2:]))


def _interval(steps: int) -> Check:
  """How far singular values leave the intervals."""

  def measure(key, scale):
    rng, worst = _rng(key), -np.inf
    for (ns, smallest), (low, high) in INTERVALS.items():
      for shape in SHAPES:
        cases = np.stack([_product(*matrix_with_spectrum(rng, *shape, smallest)) for _ in range(4 * scale)])
        s = np.linalg.svd(np.float64(_run(cases, ns=ns, steps=steps)), compute_uv=False)
        worst = np.max([worst, low - s.min(), s.max() - high])
    return worst

  return measure


def _polar(ns: str) -> Check:
  """Largest entry of X - U Vᵀ after 8 steps: in float32, in float64 times 10⁴, and of the SVD method in float32."""

  def measure(key, scale):
    del scale
    rng, worst = _rng(key), 0.0
    for shape in SHAPES:
      u, s, v = matrix_with_spectrum(rng, *shape, 1e-3)
      single = [_run(_product(u, s, v), ns=ns, steps=8), _run(_product(u, s, v), ns="svd")]
      with jax.enable_x64(True):
        double = np.asarray(_run((u * s) @ v.T, ns=ns, steps=8, dtype=jnp.float64))
      errors = [np.max(np.abs(x - u @ v.T)) for x in (*single, double)]
      worst = np.max([worst, errors[0], errors[1], 1e4 * errors[2]])
    return worst

  return measure


def _singular_vectors(run) -> Check:
  """Largest entry off the diagonal of Uᵀ X V."""

  def measure(key, scale):
    del scale
    rng, worst = _rng(key), 0.0
    for shape in SHAPES:
      u, s, v = matrix_with_spectrum(rng, *shape, 1e-3)
      inside = u.T @ np.float64(run(_product(u, s, v))) @ v
      worst = np.max([worst, np.max(np.abs(inside - np.diag(np.diag(inside))))])
    return worst

  return measure


def _equivariance(run) -> Check:
  """Largest entry of f(PMQ) - P f(M) Q, f(Mᵀ) - f(M)ᵀ, f(cM) - f(M), f(-M) + f(M) and f(0)."""

  def measure(key, scale):
    del scale
    rng, worst = _rng(key), 0.0
    for m, n in SHAPES:
      M, p, q = _product(*matrix_with_spectrum(rng, m, n, 1e-3)), haar(rng, m), haar(rng, n)
      f = lambda x: np.float64(run(np.float32(x)))
      base = f(M)
      pairs = [(f(p @ M @ q), p @ base @ q), (f(M.T), base.T), (f(1e3 * M), base), (f(-M), -base), (f(0 * M), 0)]
      worst = np.max([worst, *(np.max(np.abs(x - y)) for x, y in pairs)])
    return worst

  return measure


def _batched(run) -> Check:
  """Largest difference between a batch and its matrices taken one by one."""

  def measure(key, scale):
    del scale
    M = np.float32(_rng(key).normal(size=(3, 8, 5)))
    return float(np.max(np.abs(run(M) - np.stack([_run(x) for x in M]))))

  return measure


def _as_one_matrix(M):
  return _run(M.reshape(-1, M.shape[-1])).reshape(M.shape)


def _orientation(inverted: bool) -> Check:
  """Distance of the factors of a widening and a narrowing kernel [in, out] from 2 and 1."""

  def measure(key, scale):
    del key, scale
    kernels = {"widens": (16, 64), "narrows": (64, 16)}
    if inverted:
      factors = [shape_factor(n_out, n_in, "jordan") for n_in, n_out in kernels.values()]
    else:
      specs = {name: ParamSpec(shape, ("embed", "mlp")) for name, shape in kernels.items()}
      tx = scale_by_muon(specs, ns_fn=jnp.ones_like)
      zeros = {name: jnp.zeros(shape) for name, shape in kernels.items()}
      updates, _ = tx.update(zeros, tx.init(zeros))
      factors = [float(np.unique(updates[name]).item()) for name in kernels]
    return float(np.max(np.abs(np.array(factors) - [2.0, 1.0])))

  return measure


# Far from square, so that no singular value is small and rounding stays what it is.
TREE = {
  "wq": ParamSpec((2, 12, 3, 8), ("layers", "embed", "heads", "head_dim")),
  "wo": ParamSpec((2, 3, 8, 12), ("layers", "heads", "head_dim", "embed"), fan_in=2),
  "w_in": ParamSpec((12, 30), ("embed", "mlp")),
}


def _gradients(rng: np.random.Generator, size: float = 1.0):
  return {name: np.float32(size * rng.normal(size=spec.shape)) for name, spec in TREE.items()}


def _library(nesterov: bool) -> optax.GradientTransformation:
  """The library's Muon on `TREE`, with its own description of what is contracted."""
  dims = optax.contrib.MuonDimensionNumbers
  numbers = {"wq": dims(1, (2, 3)), "wo": dims((1, 2), 3), "w_in": dims(0, 1)}
  # The factor of the shape is private there: it is taken from the public optimizer, at a learning rate of -1.
  return optax.contrib.muon(
    -1.0, ns_coeffs=(3.4445, -4.7750, 2.0315), nesterov=nesterov, eps=1e-7, muon_weight_dimension_numbers=numbers
  )


def _same_as_library(corrections: dict[bool, str]) -> Check:
  """Largest difference from the library over 10 updates, for each (nesterov, bias_correction)."""

  def measure(key, scale):
    del scale
    worst = 0.0
    for nesterov, correction in corrections.items():
      ours = scale_by_muon(
        TREE,
        nesterov=nesterov,
        bias_correction=correction,
        momentum_warmup=0,
        ns_fn=functools.partial(_exact, ns="ns5"),
      )
      rng, transforms = _rng(key), (ours, _library(nesterov))
      states = [tx.init(_gradients(rng)) for tx in transforms]
      updates = [jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p)) for tx in transforms]
      for _ in range(10):
        g = _gradients(rng)
        with jax.default_matmul_precision("highest"):
          found, states = zip(*(update(g, s, g) for update, s in zip(updates, states, strict=True)), strict=True)
        worst = np.max([worst, *(float(np.max(np.abs(found[0][name] - found[1][name]))) for name in TREE)])
    return worst

  return measure


def _ascent(sign: float) -> Check:
  """0.681 - min <M, X>/|M|_* over spectra above 1e-2, or the most negative cosine of M and X over any; ns5."""

  def measure(key, scale):
    rng, worst = _rng(key), -np.inf
    for m, n in SHAPES:
      good = np.stack([_product(*matrix_with_spectrum(rng, m, n, 1e-2)) for _ in range(4 * scale)])
      low_rank = rng.normal(size=(4 * scale, m, 2)) @ rng.normal(size=(4 * scale, 2, n))
      cases = np.float32(np.concatenate([good, low_rank]))
      X = sign * np.float64(_run(cases, ns="ns5", steps=5))
      inner = np.sum(cases * X, (1, 2))
      nuclear = np.sum(np.linalg.svd(cases, compute_uv=False), -1)
      worst = np.max([worst, 0.681 - np.min((inner / nuclear)[: len(good)]), -np.min(inner / nuclear)])
    return float(worst)

  return measure


def _step_norm(make) -> Check:
  """Largest spectral norm of an update over lr · factor, for gradients of sizes 1e-8 to 1e8 in a row."""

  def measure(key, scale):
    del scale
    rng, lr, worst = _rng(key), 0.02, 0.0
    tx = optax.chain(make(), optax.scale_by_learning_rate(lr))
    state = tx.init(_gradients(rng))
    update = jax.jit(tx.update)
    for exponent in (0, 8, -8, 4, -4, 8):
      u, state = update(_gradients(rng, 10.0**exponent), state)
      for name, spec in TREE.items():
        form = layout(spec)
        s = np.linalg.svd(np.float64(form.pack(u[name])), compute_uv=False)
        worst = np.max([worst, np.max(s) / (lr * shape_factor(form.n_in, form.n_out, "jordan"))])
    return float(worst)

  return measure


CLAIMS = (
  claim(
    "muon.interval",
    "singular values from 1e-3 |M|_F end in [0.470, 1.203] (ns5) or [0.876, 1.124] (polar_express), from 1e-2 in "
    "[0.681, 1.135] (ns5); two steps do not get there",
    _interval(5),
    2e-3,
    _interval(2),
    PAPERS,
  ),
  claim(
    "muon.polar_factor",
    "8 steps of polar_express, and the SVD, give U Vᵀ of M = U S Vᵀ; 8 steps of ns5 do not",
    _polar("polar_express"),
    2e-5,
    _polar("ns5"),
    PAPERS,
  ),
  claim(
    "muon.singular_vectors",
    "an odd matrix polynomial keeps singular vectors: Uᵀ X V is diagonal; that of sign(M) is not",
    _singular_vectors(_run),
    1e-4,
    _singular_vectors(_sign),
  ),
  claim(
    "muon.equivariance",
    "f(PMQ) = P f(M) Q for orthogonal P, Q; f(Mᵀ) = f(M)ᵀ; f(cM) = f(M), f(-M) = -f(M), f(0) = 0",
    _equivariance(_run),
    1e-4,
    _equivariance(_sign),
  ),
  claim(
    "muon.batch",
    "a batch of matrices gives what one matrix after another gives; stacking them into one matrix does not",
    _batched(_run),
    1e-6,
    _batched(_as_one_matrix),
  ),
  claim(
    "muon.orientation",
    "a kernel [in, out] = [16, 64] gets the factor sqrt(out/in) = 2, [64, 16] gets 1; rows over columns inverts both",
    _orientation(False),
    0.0,
    _orientation(True),
  ),
  claim(
    "muon.library",
    "10 updates are those of optax.contrib.muon, without Nesterov and with, there with its bias correction only",
    _same_as_library({False: "none", True: "optax"}),
    5e-5,
    _same_as_library({True: "none"}),
  ),
  claim(
    "muon.ascent",
    "<M, X> > 0, and at least 0.681 |M|_* for singular values from 1e-2 |M|_F",
    _ascent(1.0),
    0.0,
    _ascent(-1.0),
    ("Bernstein, Newhouse, 2024, arXiv 2409.20325",),
  ),
  claim(
    "muon.bounded_step",
    "the spectral norm of a step is at most 1.21 · lr · factor, whatever the size of the gradients; that of SGD is not",
    _step_norm(lambda: scale_by_muon(TREE)),
    1.21,
    _step_norm(lambda: optax.trace(0.95, nesterov=True)),
  ),
)
