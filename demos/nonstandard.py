"""Non-standard optimisation: numbers with infinitesimals, exact macro-steps of gradient flow, their gains and costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import hyperreal_claims
from mgr_jax.algebra import hyperreal_functions as functions
from mgr_jax.algebra.hyperreal import TERMS, coefficient, eps, replaced, sqrt, st
from mgr_jax.algebra.hyperreal_calculus_claims import (
  CASES,
  infinitely_many_steps,
  mean_value_fraction,
  quotients,
  scheduled_steps,
)
from mgr_jax.optim import hoss_claims, hoss_krylov_claims
from mgr_jax.optim.hoss_krylov_claims import phi_reference, tridiagonal
from mgr_jax.optim.hoss_step import scale_by_hoss
from mgr_jax.optim.lanczos import Krylov, lanczos
from train.experiments.verdict import INCONCLUSIVE, interval

# Batches of the claims' size, so that both compile each operation once.
ONES = np.ones(CASES)
M = (10, 30, 100, 300, 1000)
STIFF = np.array([1e6, 1.0])
CHAINS = 2000
DIM, RANKS, TIMES = 1000, 72, (10.0, 100.0, 1000.0)
RANK, REACH = 8, np.logspace(0, 5, 81)
BUDGET, SEEDS = 600, 5  # gradient equivalents of the small network, and repetitions


def rng_of(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def cost(rank: int, share: float = 1.0) -> float:
  """Gradient equivalents of a macro-step: products on a share of the batch, linearized once, two gradients each."""
  return 1 + share * (1 + 2 * rank)


def sgd_loss(rate: float, gradients) -> np.ndarray:
  """Loss of ½ wᵀ diag(1e6, 1) w from (1, 1) after so many steps of gradient descent, in closed form."""
  with np.errstate(over="ignore"):
    left = np.abs(1 - rate * STIFF) ** np.asarray(gradients, float)[..., None]
    return 0.5 * np.sum(STIFF * left**2, -1)


@jax.jit
def hoss_loss(delta: jax.Array) -> jax.Array:
  """The same after 0..200 macro-steps of rank 2, [201]; call it in float64."""
  tx = scale_by_hoss(1.0, rank=2, breakdown_tol=1e-12)

  def step(carry, _):
    w, state = carry
    updates, state = tx.update(STIFF * w, state, w, hvp_fn=lambda v: STIFF * v, scale=delta)
    return (w + updates, state), w

  start = jnp.ones(2)
  w = jax.lax.scan(step, (start, tx.init(start)), None, length=201)[1]
  return 0.5 * jnp.sum(STIFF * w**2, -1)


def stationary(key: jax.Array, delta: float) -> tuple[np.ndarray, np.ndarray]:
  """Variances of w and of its steps, [2] each, in chains of exact Ornstein-Uhlenbeck steps with τ = 1.

  Means over the last 100 of 400 steps.
  """
  rng, decay = rng_of(key), np.exp(-delta * STIFF)
  spread = np.sqrt(hoss_claims.psi(STIFF, delta))
  w, found = np.zeros((CHAINS, 2)), []
  for _ in range(400):
    before, w = w, decay * w + spread * rng.standard_normal(w.shape)
    found.append((w.var(0), (w - before).var(0)))
  return tuple(np.mean(found[-100:], 0))


def spectra() -> dict[str, np.ndarray]:
  """`DIM` eigenvalues each, the largest 1."""
  rest = np.linspace(0, 1e-3, DIM - 10)
  return {
    "uniform": np.linspace(0, 1, DIM),
    "log-uniform": np.logspace(-6, 0, DIM),
    "power law": np.arange(1, DIM + 1) ** -1.5,
    "ten outliers": np.r_[np.logspace(-3, 0, 10), rest],
  }


@jax.jit
def krylov(l: jax.Array, g: jax.Array) -> Krylov:
  return lanczos(lambda v: l * v, g, RANKS, breakdown_tol=1e-13)


def convergence(key: jax.Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Relative errors of the macro-step, per spectrum: at `TIMES` from the first r Krylov vectors, [TIMES, r = 1..RANKS],
  and from the first `RANK` of them at the times `REACH`.

  The gradient is random. One Lanczos run serves all ranks and times.
  """
  g, found = rng_of(key).standard_normal(DIM), {}
  for name, l in spectra().items():
    with jax.enable_x64(True):
      space = jax.tree.map(np.asarray, krylov(l, g))
    errors = functools.partial(_errors, l, g, space)
    found[name] = errors(TIMES, range(1, RANKS + 1)), errors(REACH, [RANK])[:, 0]
  return found


def _errors(l, g, space: Krylov, times, ranks) -> np.ndarray:
  """[times, ranks]; the leading block of T of each rank stands for the curvature."""
  time = np.asarray(times)[:, None]
  exact = -phi_reference(l, time) * g
  # Inside of the basis and outside of it; the basis is orthonormal.
  inside = exact @ space.basis.T
  outside = np.linalg.norm(exact - inside @ space.basis, axis=-1)
  T, errors = tridiagonal(space.alpha, space.beta), []
  for r in ranks:
    theta, V = np.linalg.eigh(T[:r, :r])
    found = np.zeros_like(inside)
    found[:, :r] = -space.norm * (phi_reference(np.abs(theta), time) * V[0]) @ V.T
    errors.append(np.hypot(np.linalg.norm(found - inside, axis=-1), outside))
  return np.stack(errors, -1) / np.linalg.norm(exact, axis=-1)[:, None]


def tasks(key: jax.Array) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Data and start of a tanh network 12-16-1 per seed: 64 examples of a teacher, inputs of scales from 1 to 1/100."""
  rng, scales = rng_of(key), np.logspace(0, -2, 12)
  normal = lambda *shape: rng.standard_normal((SEEDS, *shape))
  x = normal(64, 12) * scales
  teacher = np.tanh(x @ (normal(12, 8) / scales[:, None] / 3)) @ normal(8, 1)
  y = teacher[..., 0] / teacher.std((1, 2))[:, None]
  start = {"in": normal(12, 16), "bias": np.zeros((SEEDS, 16)), "out": normal(16) / 4}
  return jax.tree.map(np.float32, ({"x": x, "y": y}, start))


def network_loss(data: dict[str, jax.Array], p: dict[str, jax.Array]) -> jax.Array:
  """Mean squared error as a share of the variance."""
  return jnp.mean((jnp.tanh(data["x"] @ p["in"] + p["bias"]) @ p["out"] - data["y"]) ** 2)


def descend(tx, steps: int, linear_decay: bool, data, start, size: jax.Array) -> jax.Array:
  """Final loss of one run; `size` multiplies the learning rate or the macro time."""
  loss = functools.partial(network_loss, data)

  def step(carry, t):
    p, state = carry
    value, g = jax.value_and_grad(loss)(p)
    product = lambda v: jax.jvp(jax.grad(loss), (p,), (v,))[1]
    scale = size * (1 - t / steps if linear_decay else 1.0)
    updates, state = tx.update(g, state, p, hvp_fn=product, scale=scale, value=value, loss_fn=loss)
    return (optax.apply_updates(p, updates), state), None

  (p, _), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps, dtype=jnp.float32))
  return loss(p)


def race(key: jax.Array) -> dict[str, np.ndarray]:
  """log10 of the final loss, [seeds, 7 step parameters over 3 or 4.5 decades], at `BUDGET` gradient equivalents.

  AdamW, whose rate falls linearly to 0, and HOSS of rank `RANK` with products of the Hessian. HOSS looks at the loss
  after each step to adapt its macro time, for another third of a gradient.
  """
  by_scale = optax.GradientTransformationExtraArgs(
    lambda p: optax.EmptyState(), lambda u, s, p=None, *, scale, **_: (jax.tree.map(lambda x: -scale * x, u), s)
  )
  adamw = optax.chain(optax.scale_by_adam(0.9, 0.95), by_scale)
  hoss = scale_by_hoss(1.0, rank=RANK, delta_policy="lm")
  arms = {
    "AdamW": (adamw, BUDGET, True, 10 ** np.linspace(-3, 0, 7)),
    "HOSS": (hoss, int(BUDGET / (cost(RANK) + 1 / 3)), False, 10 ** np.linspace(-1, 3.5, 7)),
  }
  found, (data, start) = {}, tasks(key)
  for name, (tx, steps, decay, sizes) in arms.items():
    run = functools.partial(descend, tx, steps, decay)
    over_grid = jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None))
    runs = jax.jit(over_grid)(data, start, jnp.asarray(sizes, jnp.float32))
    found[name] = np.log10(np.nan_to_num(np.asarray(runs, float), nan=1e9, posinf=1e9))
  return found


def field() -> str:
  e = eps()
  value, slope = jax.jvp(lambda x: x * (1 / x), (0.0,), (1.0,))
  cube = functions.derivatives(lambda x: x**3, 2.0, 3, terms=TERMS)
  theta = mean_value_fraction(np.full(CASES, 0.3))[0]
  limits = lambda terms: quotients(ONES, terms)[:, 0]
  shown = lambda x: ", ".join("?" if np.isnan(c) else f"{c:g}" for c in np.asarray(x).tolist())
  return f"""\
    1/(1 + ε) = {1 / (1 + e)}
    1/ε = {1 / e}    10¹²·ε < 1: {bool(1e12 * e < 1)}    (ε + ε²) - ε = {(e + e * e) - e}    √(4ε² + 4ε³ + ε⁴) = {
    sqrt(4 * e**2 + 4 * e**3 + e**4)
  }
    x³ and its derivatives at 2, read off (2 + ε)³: {shown(cube)}
    st of sin ε/ε, (1 - cos ε)/ε², (e^ε - 1 - ε)/ε²: {shown(limits(6))}; of two terms: {shown(limits(2))}
    ε·(1/ε) = {e * (1 / e)}; with dual numbers {float(value):g} + {float(slope):g}ε
    e^(x+ε) - e^x = ε·e^(x+θε) at x = 0.3: θ = {float(st(theta)):g} + {float(coefficient(theta, 1)):.6f}ε + ..."""


def euler_table() -> str:
  left, rows = infinitely_many_steps(ONES)[0], []
  flow, first = float(st(left)), float(coefficient(left, 1))
  for m in M:
    steps = (1 - 1 / m) ** m
    rows.append(f"    m = {m:<5} {steps:.6f}   minus the flow {steps - flow:+.2e}   predicted {first / m:+.2e}")
  one, other = scheduled_steps(ONES, (1.0, 1.0))[0], scheduled_steps(ONES, (0.6, 2.0), (0.4, 0.5))[0]
  shown = lambda x: f"{float(st(x)):.6f} {float(coefficient(x, 1)):+.4f}ε"
  return "\n".join([f"    z = 1: {left}", *rows, f"    steps ε: {shown(one)};  steps 2ε, then ε/2: {shown(other)}"])


def valley(key: jax.Array) -> str:
  crawl = int(np.ceil(np.log(0.01) / np.log1p(-1e-6 * STIFF[1])))
  rows = [
    f"    SGD, rate 1e-3: F = {sgd_loss(1e-3, 5):.1e} after 5 gradients",
    f"    SGD, rate 1e-6: F = {sgd_loss(1e-6, 1000):.3f} after 1000 gradients; {crawl:,} until y has fallen to 1%",
    f"    HOSS, δ = 1, rank 2: F = {hoss_loss(1.0)[5]:.1e} after 5 steps, {5 * cost(2):g} gradient equivalents",
  ]
  for delta in (0.1, 1.0, 5.0):
    variance, step = stationary(key, delta)
    theory = 0.5 / STIFF
    step_theory = -2 * theory * np.expm1(-delta * STIFF)
    rows.append(
      f"    noise, δ = {delta:<3g}: Var/theory x {variance[0] / theory[0]:.3f}, y {variance[1] / theory[1]:.3f};"
      f" of one step Var x/Var y {step[0] / step[1]:.2e}, theory {step_theory[0] / step_theory[1]:.2e}"
    )
  return "\n".join(rows)


def krylov_table(key: jax.Array) -> str:
  """Ranks for one percent, and the time that rank `RANK` advances per gradient equivalent."""
  errors = convergence(key)
  head = "".join(f"{time:>6g}" for time in TIMES)
  rows = [f"    {'rank for 1% at δ·l_max =':<25}{head}   rank {RANK}: per step  per gradient   at 1/16"]
  for name, (found, at_rank) in errors.items():
    needed = "".join(f"{int(np.argmax(e < 0.01)) + 1:6d}" for e in found)
    reach = REACH[np.flatnonzero(at_rank < 0.01)[-1]]
    rows.append(f"    {name:<25}{needed}{reach:19.1f}{reach / cost(RANK):14.1f}{reach / cost(RANK, 1 / 16):10.1f}")
  rule = "".join(f"{1.7 * np.sqrt(time):6.1f}" for time in TIMES)
  return "\n".join([*rows, f"    {'1.7·√(δ·l_max)':<25}{rule}   SGD, at most: {2:3.1f}{2:14.1f}"])


def network_table(key: jax.Array) -> str:
  found = race(key)
  best = {name: log[:, np.argmin(log.mean(0))] for name, log in found.items()}
  gap = interval(best["HOSS"] - best["AdamW"])
  word = "AdamW wins" if gap.low > 0 else "HOSS wins" if gap.high < 0 else INCONCLUSIVE
  rows = [
    f"    {name:<6} best {log.mean(0).min():6.2f}   worst of its grid {min(log.mean(0).max(), 99):6.2f}"
    for name, log in found.items()
  ]
  return "\n".join([*rows, f"    HOSS - AdamW: {gap.mean:+.2f} ± {gap.half:.2f}, {word}"])


def story(key: jax.Array) -> str:
  with jax.enable_x64(True):
    numbers, steps, stiff = field(), euler_table(), valley(key)
  escape = {neg: int(np.argmax(np.asarray(x) < -0.2)) + 1 for neg, x in hoss_claims.saddle_descents().items()}
  moved = hoss_claims.saddle_naively()[1] - np.float32(1e-6)
  return f"""\
Numbers with infinitesimals. A number is a series in ε, 0 < ε < every positive real; six terms kept.
It has an order, inverses, and a standard part st, the nearest real:
{numbers}

Infinitely many infinitely small steps. 1/ε steps of gradient descent of length δε leave the factor
(1 - zε)^(1/ε) of a mode with δλ = z. Its standard part is the gradient flow's e^-z, and its next
term is what a finite number m of steps costs:
{steps}
The flow knows a schedule only through its macro time. All of this can be said with limits as well,
and it removes no setting: a step size is traded for the macro time δ.

A macro-step is that flow run for δ, with gradient and curvature frozen: HOSS. In the valley
F = (10⁶x² + y²)/2 from (1, 1):
{stiff}
Rank 2 makes two curvatures exact. In general a step of rank r sees a Krylov space of dimension r.

What a rank resolves, and the time in units of 1/l_max that rank {RANK} advances at 1% error: per step,
per gradient with products on all of the batch (a step costs {cost(RANK):g}), on 1/16 of it ({cost(RANK, 1 / 16):.1f}):
{krylov_table(key)}
So as a flow it is no faster than SGD on the first two, unless products are cheap; outliers are its
case. Far beyond that reach it is no flow but close to a Newton step in the Krylov space.

A saddle. F = (x² - y²)/2 + y⁴/4 from (1, 10⁻⁶): below -0.2 after {escape["abs"]} steps with |curvature|,
{escape["flat"]} with negative curvature as 0, {escape["flow"]} with the true flow. With δ = 6·10⁻⁴, curvature cut
off below 10⁻⁶ and (1 - e^-δl)/l in float32 as it stands, y moves by {moved:g}.

A small network, all of the batch, {BUDGET} gradient equivalents, {SEEDS} seeds: log10 of the final loss over
grids of seven step sizes, AdamW's rate over 3 decades and falling to 0, HOSS's first δ over 4.5:
{network_table(key)}
"""


def infinitesimals(key: jax.Array):
  """The standard part with finite numbers of steps around it, and their error against the first infinitesimal term."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  z = np.linspace(0, 3, CASES)
  with jax.enable_x64(True):
    flow = infinitely_many_steps(z)
    corrected = {m: np.asarray(replaced(flow, 1 / m, 2)) for m in (3, 10)}
    first = np.abs(np.asarray(coefficient(flow, 1)))
  left.plot(z, np.exp(-z), color="0.2", lw=2, label=r"standard part $e^{-z}$")
  for m, colour, marker in ((3, ORANGE, "s"), (10, BLUE, "o")):
    left.plot(z, (1 - z / m) ** m, color=colour, lw=0, marker=marker, ms=5, markevery=20, label=f"{m} steps")
    left.plot(z, corrected[m], color=colour, lw=1.5, ls="--")
  left.plot([], [], color="0.4", lw=1.5, ls="--", label="two terms, ε = 1/m")
  styled(left, "what is left of a mode", "z = δλ", "factor", size=12)
  m = np.logspace(0.6, 4, 15).round()
  for target, colour, marker in ((0.1, GREEN, "o"), (0.4, BLUE, "s"), (2.0, PINK, "^")):
    i = np.argmin(np.abs(z - target))
    error = np.abs((1 - z[i] / m) ** m - np.exp(-z[i]))
    right.loglog(m, error, color=colour, lw=0, marker=marker, ms=5, label=f"z = {target:g}")
    right.loglog(m, first[i] / m, color=colour, lw=1.5)
  right.plot([], [], color="0.4", lw=1.5, label="first term")
  right.set_ylim(1e-7, 30)
  styled(right, "error of m steps", "steps m", "distance from the flow", legend=None, size=12)
  right.legend(frameon=False, fontsize=11, ncols=2, columnspacing=1, handlelength=1.2, loc="upper right")
  return figure


def ranks(key: jax.Array):
  """Error of the macro-step against the rank, for three macro times; the rule of thumb marked."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.2), layout="constrained")
  errors, r = convergence(key), np.arange(1, RANKS + 1)
  axes = figure.subplots(1, 2, sharey=True)
  for ax, name in zip(axes, ("uniform", "ten outliers"), strict=True):
    for time, error, colour, marker in zip(TIMES, errors[name][0], (GREEN, BLUE, PINK), "os^", strict=True):
      error = np.maximum(error, 1e-12)
      ax.semilogy(
        r, error, color=colour, lw=2, marker=marker, ms=5, markevery=6, label=rf"$\delta l_{{\max}} = {time:g}$"
      )
      ax.axvline(1.7 * np.sqrt(time), color=colour, lw=1.2, ls=":")
    ax.axhline(0.01, color="0.5", lw=1, ls="--")
    ax.plot([], [], color="0.4", lw=1.2, ls=":", label=r"$1.7\sqrt{\delta l_{\max}}$")
    styled(ax, f"spectrum: {name}", "rank r", "relative error", legend=None, size=12)
    ax.set(ylim=(1e-10, 3), xlim=(0, RANKS))
    ax.label_outer()
  axes[1].legend(frameon=False, fontsize=11, handlelength=1.2, loc=(0.27, 0.03))  # between the curves and the last rule
  return figure


def valley_and_saddle(key: jax.Array):
  """Loss in the stiff valley against gradient equivalents, and beside a saddle against steps."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  n = np.r_[1, 2, 3, np.logspace(0.7, 8, 120).round()]
  for rate, colour, marker in ((1e-3, PINK, "^"), (1e-6, ORANGE, "s"), (1.9e-6, GREEN, "D")):
    loss, marked = np.minimum(sgd_loss(rate, n), 1e99), [0, *range(9, 120, 20)]
    left.loglog(n, loss, color=colour, lw=2, marker=marker, ms=5, markevery=marked, label=f"SGD, rate {rate:g}")
  with jax.enable_x64(True):
    for delta, colour, marker in ((0.1, "0.5", "v"), (1.0, BLUE, "o")):
      loss = np.asarray(hoss_loss(delta))[1:]
      spent, marked = cost(2) * np.arange(1, len(loss) + 1), [0, 2, 8, 29, 99]
      left.loglog(spent, loss, color=colour, lw=2, marker=marker, ms=5, markevery=marked, label=f"HOSS, δ = {delta:g}")
  styled(left, r"$F = (10^6x^2 + y^2)/2$", "gradient equivalents", "loss F", "upper right", size=12)
  left.set(ylim=(1e-12, 1e40), yticks=[1e-10, 1, 1e10, 1e20])
  styles = {"abs": ("|curvature|", BLUE, "-"), "flat": ("cut at 0", GREEN, "--"), "flow": ("true flow", PINK, "-.")}
  for neg, losses in hoss_claims.saddle_descents().items():
    label, colour, style = styles[neg]
    right.plot(np.arange(1, 61), losses[:60], color=colour, ls=style, lw=2, label=label)
  right.axhline(-0.25, color="0.5", lw=1, ls=":")
  styled(right, r"$F = (x^2 - y^2)/2 + y^4/4$", "steps of δ = 0.5", "loss F", size=12)
  return figure


DEMO = Demo(
  name="nonstandard",
  summary="infinitesimals one can compute with, and exact macro-steps of gradient flow",
  story=story,
  claims=(*hyperreal_claims.CLAIMS, *hoss_krylov_claims.CLAIMS, *hoss_claims.CLAIMS),
  plots=(infinitesimals, ranks, valley_and_saddle),
  refs=("Keisler 1976", "Shamseddine, Berz 2010", "Hochbruck, Ostermann 2010"),
  not_shown=(
    ("HOSS against tuned AdamW on language", "twenty minutes; python -m train.bench optimizers"),
    ("HOSS over condition numbers, ranks and spectra", "python -m train.bench stiff"),
    ("what a step costs in FLOPs and seconds", "python -m train.bench step; counts checked by tests/test_races.py"),
    ("symmetric curvature products under every mechanism", "checked by tests/test_curvature.py"),
    ("trust radius, resuming, noise of the other kinds", "checked by tests/test_hoss.py"),
    ("derivatives against Taylor mode and nested gradients", "checked by tests/test_algebra_hyperreal.py"),
    ("all hyperreal numbers", "an ultrapower is not computable; Levi-Civita series are a computable ordered field"),
    ("whether curvature-shaped noise generalises better", "many trained networks, not run"),
  ),
)
