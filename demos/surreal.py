"""Surreal numbers shown: numbers from nothing, infinities and growth rates in order, and exact scaling frontiers."""

import functools
import itertools
from fractions import Fraction

import jax
import numpy as np

from demos.demo import Demo
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

HALF, QUARTERS = Fraction(1, 2), Fraction(3, 4)
# Fitted to language models of 70 million to 16 billion parameters (Hoffmann et al., 2022).
MODEL = ErrorModel(1.69, (term(406.4, N=Fraction(-34, 100)), term(410.7, D=Fraction(-28, 100))))
COMPUTE = {"N": Fraction(1), "D": Fraction(1)}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


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
"""


def tree(key: jax.Array):
  """The numbers of the first five days, each under the one it refines."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  ax, box = figure.subplots(), {"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.8}
  for x in surreal_claims.born_by(5):
    day, word = surreal_dyadic.birthday(x), surreal_dyadic.signs(x)
    at = float(x.fraction)
    if word:
      parent = surreal_dyadic.from_signs(word[:-1])
      colour = COLOURS[0] if word[-1] == "+" else COLOURS[1]
      ax.plot([float(parent.fraction), at], [day - 1, day], color=colour, lw=1)
    ax.plot(at, day, "o", ms=3, color="0.2")
    if day <= 3 or x.k == 0:
      ax.annotate(str(x), (at, day), (0, 5), textcoords="offset points", ha="center", fontsize=9, bbox=box)
  ax.set(xlabel="value", ylabel="day", yticks=range(6), title="sixty-three numbers: + to the right, - to the left")
  ax.invert_yaxis()
  ax.spines[["top", "right"]].set_visible(False)
  return figure


def regimes(key: jax.Array):
  """Which term dominates E - E∞ over parameters and tokens, the exact frontier, and optima found on a grid."""
  del key
  from matplotlib.colors import ListedColormap
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  ax = figure.subplots()
  log10 = np.linspace(6, 13, 401)
  log_n, log_d = np.meshgrid(log10 * np.log(10), log10 * np.log(10))
  logs = np.stack([t.log({"N": log_n, "D": log_d}) for t in MODEL.terms])
  ax.pcolormesh(log10, log10, np.argmax(logs, 0), cmap=ListedColormap(["#cfe3f2", "#f9dcc8"]), rasterized=True)
  excess = ax.contour(log10, log10, np.exp(logs).sum(0), levels=[0.1, 0.2, 0.4, 0.8, 1.6], colors="0.4")
  ax.clabel(excess, fmt="%g", fontsize=9)
  exponents = scaling.frontier(MODEL, COMPUTE).exponents
  budgets = np.array([14.0, 16, 18, 20, 22, 24])
  best = np.array([optimum(float(c * np.log(10))) for c in budgets]) / np.log(10)
  line = best[2] + float(exponents["N"]) * (budgets - budgets[2])
  ax.plot(line, budgets - line, color=COLOURS[2], lw=2, label="frontier, exact exponents")
  ax.plot(best, budgets - best, "o", color="0.1", ms=5, label="best on a grid")
  ax.set(xlim=(6, 13), ylim=(6, 13), xlabel="log10 of parameters N", ylabel="log10 of tokens D")
  ax.set(title="which term dominates E - E∞ (contours)")
  ax.text(6.3, 11.3, "N too small", color=COLOURS[0], fontsize=11)
  ax.text(8.3, 6.5, "D too small", color=COLOURS[1], fontsize=11)
  ax.legend(loc="lower right", frameon=False, fontsize=9)
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
  plots=(tree, regimes),
  refs=(
    "Conway 2001",
    "Gonshor 1986",
    "van den Dries, Aschenbrenner, van der Hoeven 2017",
    "Hoffmann et al. 2022, arXiv 2203.15556",
  ),
)
