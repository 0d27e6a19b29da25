"""Surreal numbers shown: numbers from nothing, infinities and growth rates in order, and exact scaling frontiers."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, styled
from mgr_jax.algebra import (
  scaling,
  scaling_claims,
  scaling_probe,
  scaling_probe_claims,
  surreal,
  surreal_claims,
  surreal_dyadic,
  transseries,
  transseries_claims,
)
from mgr_jax.algebra.scaling import ErrorModel, term
from mgr_jax.algebra.surreal import Form, form
from mgr_jax.algebra.transseries_eval import log_eval
from mgr_jax.algebra.transseries_growth import LOG_LOG_X, LOG_X, X, exp, growth, number
from mgr_jax.algebra.transseries_omega import EPSILON, OMEGA
from train.dominance import claims as dominance_claims
from train.experiments.verdict import INCONCLUSIVE, interval

HALF, QUARTERS = Fraction(1, 2), Fraction(3, 4)
# Fitted to language models of 70 million to 16 billion parameters (Hoffmann et al., 2022).
MODEL = ErrorModel(1.69, (term(406.4, N=Fraction(-34, 100)), term(410.7, D=Fraction(-28, 100))))
COMPUTE = {"N": Fraction(1), "D": Fraction(1)}
# A linear layer [IN, OUT] learned from TOKENS inputs, with every rate of RATES.
IN, OUT, TOKENS, STEPS, SEEDS = 12, 8, 24, 200, 8
RATES = 10.0 ** np.linspace(-2, 1, 7)


def _rng(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def forms() -> str:
  """A table of forms with their values, birthdays and paths."""
  of = lambda left, right: Form(tuple(map(form, left)), tuple(map(form, right)))
  shown = (of([], []), of([0], []), of([0], [1]), of([HALF], [1]), of([0, HALF], [1]), of([-1], [5]), of([2], [3]))
  rows = []
  for f in shown:
    x = surreal.value(f)
    rows.append(f"    {f!r:<16} {x!s:>5} {surreal_dyadic.birthday(x):>6}   {surreal_dyadic.signs(x)}")
  return "\n".join(rows)


def refused(action) -> str:
  """What an impossible request answers."""
  try:
    action()
  except ValueError as e:
    return f"{type(e).__name__}: {e}"
  return "accepted"


@functools.cache
def rates() -> tuple:
  """Twelve functions of x, fastest first, sorted by dominance alone."""
  found = [
    *(LOG_X, exp(X), X / LOG_X, growth(a=HALF), LOG_LOG_X, exp(X * X), X * LOG_X, number(1) / X, X * X),
    *(exp(growth(a=HALF)), exp(X) / X, exp(2 * LOG_LOG_X)),
  ]
  return tuple(sorted(found, key=functools.cmp_to_key(lambda f, g: transseries.compare(g, f))))


def misplaced(log_x: float) -> int:
  """Neighbours in the order of growth whose values at x = e^{log_x} stand the other way round."""
  return sum(log_eval(f - g, log_x).sign < 0 for f, g in itertools.pairwise(rates()))


def ladder() -> str:
  """The twelve functions with the logarithms of their values at x = e^1000."""
  cells = [f"{f!s:<12} {log_eval(f, 1000).log:>11.3e}" for f in rates()]
  return "\n".join(f"    {a}      {b}" for a, b in zip(cells[:6], cells[6:], strict=True))


@functools.cache
def optimum(log_c: float) -> float:
  """log N of the best split of C = ND by grid search."""
  log_n = np.linspace(0, log_c, 20001)
  excess = [np.exp(t.log({"N": log_n, "D": log_c - log_n})) for t in MODEL.terms]
  return float(log_n[np.argmin(sum(excess))])


def chosen_axes(key: jax.Array, landscapes: int = 60) -> tuple[float, float]:
  """Share of starved landscapes whose axis is named, and of balanced ones for which any axis is."""
  rng, named, wrong = _rng(key), 0, 0
  for _ in range(landscapes):
    best, scores = scaling_probe_claims.starved(rng)
    found = scaling_probe_claims.probe(scaling_probe_claims.plant(rng, scores), rng)
    named += (found.word, found.axis) == ("dominant", best)
    found = scaling_probe_claims.probe(scaling_probe_claims.plant(rng, scaling_probe_claims.near_tie(rng)), rng)
    wrong += found.word == "dominant"
  return named / landscapes, wrong / landscapes


@functools.partial(jax.jit, static_argnums=0)
def _descents(factored: bool, rate, x, target, start) -> jax.Array:
  """Squared errors of x·W over those of zero, averaged over the outputs, [STEPS]; Adam, its rate falling to 0.

  With `factored`, W = e^s·v/|v| by column, which begins as the same W; v goes back to norm 1 after every step.
  """
  size = lambda w: jnp.linalg.norm(w, axis=0)
  weights = lambda p: jnp.exp(p["s"]) * p["v"] / size(p["v"]) if factored else p["w"]

  def loss(p):
    squares = lambda w: jnp.sum((x @ w) ** 2, 0)
    return jnp.mean(squares(weights(p) - target) / squares(target))

  tx = optax.scale_by_adam(0.9, 0.95)

  def step(carry, t):
    p, state = carry
    value, g = jax.value_and_grad(loss)(p)
    u, state = tx.update(g, state)
    p = jax.tree.map(lambda p, u: p - rate * (1 - t / STEPS) * u, p, u)
    return (p | ({"v": p["v"] / size(p["v"])} if factored else {}), state), value

  p = {"s": jnp.log(size(start)), "v": start / size(start)} if factored else {"w": start}
  return jax.lax.scan(step, (p, tx.init(p)), jnp.arange(STEPS, dtype=jnp.float32))[1]


def races(key: jax.Array) -> dict[int, dict[str, tuple[float, np.ndarray]]]:
  """Best rate and errors [SEEDS, STEPS] of plain and factored weights, for outputs of one size and of 4 decades."""
  rng, found = _rng(key), {}
  x, target = rng.standard_normal((SEEDS, TOKENS, IN)), rng.standard_normal((SEEDS, IN, OUT))
  start = rng.standard_normal((SEEDS, IN, OUT)) * IN**-0.5
  for decades in (0, 4):
    goal = target * 10 ** np.linspace(-decades / 2, decades / 2, OUT)
    found[decades] = {}
    for name in ("plain", "factored"):
      run = functools.partial(_descents, name == "factored")
      runs = jax.vmap(jax.vmap(run, (None, 0, 0, 0)), (0, None, None, None))
      curves = np.asarray(runs(*map(np.float32, (RATES, x, goal, start))), np.float64)
      best = int(np.argmin(np.log(curves[..., -1]).mean(1)))
      found[decades][name] = float(RATES[best]), curves[best]
  return found


def sizes_table(key: jax.Array) -> str:
  """Per parameterisation, median steps to an error of 0.1 and log10 of the final error; interval of its difference."""
  rows = []
  for decades, found in races(key).items():
    last = {name: np.log10(curves[:, -1]) for name, (_, curves) in found.items()}
    gap = interval(last["factored"] - last["plain"])
    soon = {name: np.median(np.argmax(curves < 0.1, 1)) for name, (_, curves) in found.items()}
    cells = [f"{soon[name]:6.0f}{last[name].mean():8.2f} (rate {rate:5.3f})" for name, (rate, _) in found.items()]
    word = "behind" if gap.low > 0 else "ahead" if gap.high < 0 else INCONCLUSIVE
    rows.append(f"    {decades} decades {'   '.join(cells)}   {gap.mean:+.2f} ± {gap.half:.2f}, {word}")
  return "\n".join(rows)


def story(key: jax.Array) -> str:
  product = surreal.multiply(form(QUARTERS), form(Fraction(3, 2)))
  third = [surreal_dyadic.inverse(surreal_dyadic.Dyadic(3), n) for n in (4, 8, 16)]
  cut = ", ".join(f"{a.value} ± {a.bound}" for a in third)
  chain = (OMEGA - 1, OMEGA, OMEGA + 1, OMEGA * 2, OMEGA * OMEGA)
  ordered = all(f < g for f, g in itertools.pairwise(chain))
  inverse = 1 / (1 + EPSILON)
  exponents, rate, _ = scaling.frontier(MODEL, COMPUTE)
  slope = (optimum(60.0) - optimum(40.0)) / 20
  law = lambda x: 1.7 + 3 * x**-0.34
  aitken = scaling_probe.predict(law(1), law(0.5), law(0.25))
  named, wrong = chosen_axes(key)
  return f"""\
What it is. Numbers as {{L | R}}: the simplest number above everything in L and below everything in R.
The same idea, leading order first, coefficient second, orders infinite numbers, growth rates and
the terms of a scaling law. As a layer, weights are e^size times a unit direction.

What it is not. A new kind of expressivity: the layer is the standard one at the start, and only
moves differently. And an ordering of loss terms is not a measurement of which one matters; that
takes training smaller systems: python -m train.bench dominance

Numbers from nothing
    form             value birthday  path from 0
{forms()}
    1/2 + 1/2 = {surreal.add(form(HALF), form(HALF))} and 3/4 · 3/2 = {product} = {product!r}, from options alone
    {{1 | 0}}: {refused(lambda: Form((form(1),), (form(0),)))}
    1/3 needs infinitely many days; after 4, 8, 16: {cut}

Infinite and infinitesimal
    {" < ".join(map(str, chain))}: {ordered}
    1/(1 + ε) = {transseries.truncated(inverse, 8)}
    1/(1 + ε) against itself: {refused(lambda: transseries.compare(inverse, inverse))}

Growth rates sorted by dominance, with log f at x = e^1000
{ladder()}
    neighbours out of order at x = e^2: {misplaced(2)}, at e^1000: {misplaced(1000)}

Exact scaling frontiers: E = {MODEL.floor} + 406.4 N^-0.34 + 410.7 D^-0.28 under C = ND
    N ∝ C^{exponents["N"]} = C^{float(exponents["N"]):.4f}, by grid search C^{slope:.4f}; E - E∞ ∝ C^({rate})
    Every term of E itself is dominated by the constant {MODEL.floor}: ratios of losses compare nothing.

Which axis to double next, from the system and its half and quarter
    E = 1.7 + 3 X^-0.34: predicted benefit {float(aitken.low):.7f}, true {law(1) - law(2):.7f}
    planted landscapes, 5% noise: starved axis named in {named:.0%}; some axis in {wrong:.0%} of near ties

Sizes apart from directions: a layer [{IN}, {OUT}] learned as W = e^s·v/|v| or as plain W, both from the
same W, with Adam at the best of {len(RATES)} rates, {SEEDS} seeds. Steps until the error is a tenth of that of
W = 0, and log10 of it after {STEPS} steps, for outputs of one size and of sizes over 4 decades:
               plain: steps, error          factored: steps, error     difference, 95%
{sizes_table(key)}
    As a layer of a language model: python -m train.experiment surreal_param
"""


def tree(key: jax.Array):
  """The numbers of the first five days in their order, each under the one it refines."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  ax, numbers = figure.subplots(), surreal_claims.born_by(5)
  place = {x: i for i, x in enumerate(numbers)}
  for x, i in place.items():
    day, word = surreal_dyadic.birthday(x), surreal_dyadic.signs(x)
    if word:
      parent = place[surreal_dyadic.from_signs(word[:-1])]
      colour, style = (BLUE, "-") if word[-1] == "+" else (ORANGE, "--")
      ax.plot([parent, i], [day - 1, day], color=colour, ls=style, lw=1.2, zorder=1)
    leaf = {"va": "top", "rotation": 90, "xytext": (0, -5)} if day == 5 else {"va": "center", "xytext": (0, 0)}
    box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
    ax.annotate(str(x), (i, day), textcoords="offset points", ha="center", fontsize=11, bbox=box, **leaf)
  ax.set(ylim=(6.1, -0.3), yticks=range(6), xticks=[])
  styled(ax, "63 numbers in order; solid: greater (+), dashed: less (-)", "", "birthday", None, 12)
  ax.spines["bottom"].set_visible(False)
  return figure


def regimes(key: jax.Array):
  """Which term dominates E - E∞ over parameters and tokens, the exact frontier, and optima found on a grid."""
  del key
  from matplotlib.colors import ListedColormap
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  ax = figure.subplots()
  log10 = np.linspace(6, 13, 201)
  log_n, log_d = np.meshgrid(log10 * np.log(10), log10 * np.log(10))
  logs = np.stack([t.log({"N": log_n, "D": log_d}) for t in MODEL.terms])
  ax.pcolormesh(log10, log10, np.argmax(logs, 0), cmap=ListedColormap(["#cfe3f2", "#f9dcc8"]), rasterized=True)
  excess = ax.contour(log10, log10, np.exp(logs).sum(0), levels=[0.1, 0.2, 0.4, 0.8, 1.6], colors="0.4")
  ax.clabel(excess, fmt="%g", fontsize=11)
  exponents = scaling.frontier(MODEL, COMPUTE).exponents
  budgets = np.array([14.0, 16, 18, 20, 22, 23.5])
  best = np.array([optimum(float(c * np.log(10))) for c in budgets]) / np.log(10)
  line = best[2] + float(exponents["N"]) * (budgets - budgets[2])
  ax.plot(line, budgets - line, color=GREEN, lw=2, label="frontier, exact exponents")
  ax.plot(best, budgets - best, "o", color="0.1", ms=5, label="best on a grid")
  ax.set(xlim=(6, 13), ylim=(6, 13))
  ax.text(6.2, 11.3, "N too\nsmall", color=BLUE, fontsize=12)
  ax.text(8.3, 6.4, "D too small", color=ORANGE, fontsize=12)
  axes = r"$\log_{10}$ of parameters $N$", r"$\log_{10}$ of tokens $D$"
  styled(ax, r"which term dominates $E - E_\infty$ (contours)", *axes, "lower right", 12)
  return figure


def sizes(key: jax.Array):
  """Learning curves of plain and factored weights, for outputs of equal size and of sizes over four decades."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.2), layout="constrained")
  axes, step = figure.subplots(1, 2, sharey=True), np.arange(1, STEPS + 1)
  for ax, (decades, found) in zip(axes, races(key).items(), strict=True):
    for (name, (_, curves)), colour, style in zip(found.items(), (ORANGE, BLUE), ("--", "-"), strict=True):
      ax.semilogy(step, np.median(curves, 0), color=colour, ls=style, lw=2, label=name)
      ax.fill_between(step, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
    title = f"outputs over {decades} decades" if decades else "outputs of one size"
    styled(ax, title, "step", "relative squared error", "lower left", 12)
    ax.label_outer()
  return figure


DEMO = Demo(
  name="surreal",
  summary="leading order first: numbers from nothing, infinities, growth rates, and scaling laws compared exactly",
  story=story,
  claims=(
    *surreal_claims.CLAIMS,
    *transseries_claims.CLAIMS,
    *scaling_claims.CLAIMS,
    *scaling_probe_claims.CLAIMS,
    *dominance_claims.CLAIMS,
  ),
  plots=(tree, regimes, sizes),
  refs=(
    "Conway 2001",
    "Gonshor 1986",
    "van den Dries, Aschenbrenner, van der Hoeven 2017",
    "Hoffmann et al. 2022, arXiv 2203.15556",
  ),
  not_shown=(
    (
      "the dominance probe on starved networks, and ablation beside it",
      "needs trained halves and quarters; measured by python -m train.bench dominance",
    ),
    ("factored weights and floating values in language models", "minutes; python -m train.experiment surreal_param"),
    ("the probe against really trained doublings of 24 systems", "hours of training, not run"),
    ("learning rates that transfer across widths", "no width-transferring parameterisation exists here"),
    ("directions that drift outwards without renormalisation", "checked by tests/test_surreal_attention.py"),
  ),
)
