"""Stiff quadratics: does an exact macro-step of gradient flow (HOSS) beat tuned first-order methods at equal cost?

F(w) = ½ wᵀHw with H = U diag(l) Uᵀ, U Haar, largest eigenvalue 1, smallest 1/κ; w starts with unit variance in every
direction. Every arm gets the same budget of gradient equivalents. A step of HOSS with rank r is charged 1 + (1 + 2r):
its gradient, and products with the Hessian at what they cost in a network (linearized once, two gradients each). Each
arm has a grid of nine step parameters over four decades around its own natural unit; the best on the mean of the
logarithm over seeds counts. Losses are shares of the initial one, and below `SOLVED` all count alike.

All but AdamW commute with rotations, so they run in the eigenbasis; AdamW sees the rotated problem, and its rate falls
linearly to 0, which helps it on these problems.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgr_jax.optim.hoss_step import scale_by_hoss
from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED, Interval, interval

DIM = 200
BUDGET = 1000  # gradient equivalents
CONDITIONS = (1e2, 1e3, 1e4, 1e5, 1e6)
SPECTRA = ("uniform", "log-uniform", "outliers")
RANKS = (2, 4, 8, 16)
PLATEAU_RANK = 8
GRID = 10.0 ** np.linspace(-2, 2, 9)
DECADES = 4 / (len(GRID) - 1)  # that one point of the grid stands for
MOMENTUM = 0.9
SOLVED, DIVERGED = 1e-10, 1e30
NEAR, CLEAR = 1.05, 1.02  # a plateau is within 5% of the best; a method is worse when 2% behind


def spectrum(kind: str, condition: float, rng: np.random.Generator) -> np.ndarray:
  """DIM eigenvalues in [1/κ, 1], both ends included; `outliers`: ten above √(1/κ), the rest within a decade of 1/κ."""
  low = 1 / condition
  drawn = {
    "uniform": lambda: rng.uniform(low, 1, DIM - 2),
    "log-uniform": lambda: condition ** -rng.uniform(0, 1, DIM - 2),
    "outliers": lambda: np.r_[condition ** -rng.uniform(0, 0.5, 9), low * 10 ** rng.uniform(0, 1, DIM - 11)],
  }
  return np.r_[1.0, low, drawn[kind]()]


def arms() -> dict[str, tuple[float, int]]:
  """(natural unit of the step parameter, cost of one step in gradients) of each arm; l_max = 1, and w has size 1.

  SGD and momentum: their stability limits 2 and 2(1 + β). AdamW: a hundredth of the size of w. HOSS: the macro time
  (r/1.7)² up to which a rank r is accurate on broad spectra.
  """
  found = {"sgd": (2.0, 1), "momentum": (2 * (1 + MOMENTUM), 1), "adamw": (1e-2, 1)}
  return found | {f"hoss {r}": ((r / 1.7) ** 2, 2 + 2 * r) for r in RANKS}


def cases(seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Eigenvalues and start in the eigenbasis, [cases, d] each, and U, [cases, d, d], for all spectra, conditions, seeds.

  A seed has one start and one U for all its problems.
  """
  l, w, U = [], [], []
  for kind in SPECTRA:
    for condition in CONDITIONS:
      for seed in seeds:
        rng = np.random.default_rng([31, seed])
        w.append(rng.standard_normal(DIM))
        q, upper = np.linalg.qr(rng.standard_normal((DIM, DIM)))
        U.append(q * np.sign(np.diag(upper)))
        l.append(spectrum(kind, condition, rng))
  return np.array(l), np.array(w), np.array(U)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_order(arm: str, steps: int, H: jax.Array, w: jax.Array, rates: jax.Array) -> jax.Array:
  """End points [cases, grid, d] of SGD or momentum with H [cases, d], or of AdamW with H [cases, d, d]."""
  tx = {"sgd": optax.identity(), "momentum": optax.trace(MOMENTUM), "adamw": optax.scale_by_adam(0.9, 0.95)}[arm]
  product = (lambda w: jnp.einsum("cgd,cde->cge", w, H)) if H.ndim == 3 else (lambda w: H[:, None] * w)

  def step(carry, t):
    w, state = carry
    updates, state = tx.update(product(w), state)
    decay = 1 - t / steps if arm == "adamw" else 1.0
    return (w - decay * rates[:, None] * updates, state), None

  start = jnp.broadcast_to(w[:, None], (len(w), len(rates), w.shape[-1]))
  return jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))[0][0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hoss(rank: int, steps: int, l: jax.Array, w: jax.Array, times: jax.Array) -> jax.Array:
  """End points [cases, grid, d] of HOSS; the macro time is the schedule's multiplier of δ = 1."""
  tx = scale_by_hoss(1.0, rank=rank, breakdown_tol=1e-12)

  def descend(l, w, time):
    def step(carry, _):
      w, state = carry
      updates, state = tx.update(l * w, state, w, hvp_fn=lambda v: l * v, scale=time)
      return (w + updates, state), None

    return jax.lax.scan(step, (w, tx.init(w)), None, length=steps)[0][0]

  return jax.vmap(jax.vmap(descend, (None, None, 0)), (0, 0, None))(l, w, times)


def losses(seeds: Sequence[int], say: Callable[[str], None]) -> dict[str, np.ndarray]:
  """Final loss over the initial one, [spectra, conditions, seeds, grid] per arm; infinite where it diverged."""
  l, w, U = cases(seeds)
  rotated, dense = np.einsum("cde,ce->cd", U, w), (U * l[:, None]) @ U.swapaxes(1, 2)
  found = {}
  for arm, (unit, cost) in arms().items():
    steps, sizes = BUDGET // cost, unit * GRID
    if arm == "adamw":
      end = np.einsum("cgd,cde->cge", np.asarray(_first_order(arm, steps, dense, rotated, sizes)), U)
    elif arm in ("sgd", "momentum"):
      end = np.asarray(_first_order(arm, steps, l, w, sizes))
    else:
      end = np.asarray(_hoss(int(arm.split()[1]), steps, l, w, sizes))
    with np.errstate(over="ignore", invalid="ignore"):
      loss = np.sum(l[:, None] * end**2, -1) / np.sum(l * w**2, -1)[:, None]
    loss = np.where(np.isfinite(loss), np.maximum(loss, SOLVED), math.inf)
    found[arm] = loss.reshape(len(SPECTRA), len(CONDITIONS), len(seeds), len(GRID))
    say(f"{arm}: {steps} steps")
  return found


def best(loss: np.ndarray) -> np.ndarray:
  """Where on the grid the seeds' mean of the logarithm is lowest, [..., seeds, grid] -> [...]."""
  return np.argmin(np.log10(np.minimum(loss, DIVERGED)).mean(-2), -1)


def tuned(loss: np.ndarray) -> np.ndarray:
  """log10 of the loss at the best step parameter, [..., seeds, grid] -> [..., seeds]."""
  chosen = np.take_along_axis(loss, best(loss)[..., None, None], -1)[..., 0]
  return np.log10(np.minimum(chosen, DIVERGED))


def plateau(loss: np.ndarray) -> np.ndarray:
  """Decades of the grid within `NEAR` of the best of that seed, [..., grid] -> [...]."""
  return DECADES * np.sum(loss <= NEAR * loss.min(-1, keepdims=True), -1)


def _word(holds: bool, fails: bool) -> str:
  return SUPPORTED if holds else REFUTED if fails else INCONCLUSIVE


def _row(kind: str, prediction: str, word: str, found: Interval, unit: str) -> dict[str, Any]:
  return {
    "spectrum": kind,
    "prediction": prediction,
    "verdict": word,
    "mean": found.mean,
    "half": found.half,
    "unit": unit,
  }


def verdicts(loss: dict[str, np.ndarray]) -> list[dict[str, Any]]:
  """Per spectrum: is HOSS faster than AdamW, than momentum, and is its plateau wider and its best no worse?

  Values are means over κ within a seed; intervals are over seeds, of paired differences.
  """
  rows = []
  for i, kind in enumerate(SPECTRA):
    log = {arm: tuned(x[i]).mean(0) for arm, x in loss.items()}
    rank = min(RANKS, key=lambda r: log[f"hoss {r}"].mean())
    for other in ("adamw", "momentum"):
      found = interval(log[f"hoss {rank}"] - log[other])
      text = f"hoss {rank} ends lower than tuned {other}"
      rows.append(_row(kind, text, _word(found.high < 0, found.low > 0), found, "log10 of loss"))
    name = f"hoss {PLATEAU_RANK}"
    wide = interval((plateau(loss[name][i]) - plateau(loss["adamw"][i])).mean(0))
    behind = interval(log[name] - log["adamw"])
    limit = math.log10(CLEAR)
    word = _word(wide.low > 0 and behind.high <= limit, wide.high <= 0 or behind.low > limit)
    worse = ", but its best is worse" if wide.low > 0 and behind.low > limit else ""
    rows.append(_row(kind, f"{name}: plateau wider than AdamW's, best no worse{worse}", word, wide, "decades"))
  return rows


def run(seeds: int, say: Callable[[str], None]) -> dict[str, Any]:
  """All arms on all problems with seeds 0, 1, ...; `say` hears of progress. The result is plain data.

  Cost: about 15 seconds and 0.5 GB for five seeds.
  """
  with jax.enable_x64(True):
    loss = losses(range(seeds), say)
  units = {arm: unit for arm, (unit, _) in arms().items()}
  table = lambda f: {arm: {kind: f(arm, x[i]).tolist() for i, kind in enumerate(SPECTRA)} for arm, x in loss.items()}
  return {
    "seeds": seeds,
    "budget": BUDGET,
    "dim": DIM,
    "conditions": list(CONDITIONS),
    "log10_loss": table(lambda arm, x: tuned(x).mean(-1)),
    "best_step": table(lambda arm, x: units[arm] * GRID[best(x)]),
    "at_edge": table(lambda arm, x: np.isin(best(x), (0, len(GRID) - 1))),
    "plateau_decades": table(lambda arm, x: plateau(x).mean(-1)),
    "verdicts": verdicts(loss),
  }


def report(result: dict[str, Any]) -> str:
  """The result as text of at most 100 columns."""
  lines = [
    f"Quadratics in {result['dim']} dimensions, {result['budget']} gradient equivalents, {result['seeds']} seeds.",
    "log10 of the final loss, as a share of the initial one, at the best step parameter (* at the edge of",
    "its grid); W: decades of the grid within 5% of that seed's best.",
  ]
  for kind in SPECTRA:
    lines += ["", f"{kind:<12}" + "".join(f"  κ = {c:.0e}".replace("e+0", "e") + "   W " for c in result["conditions"])]
    for arm, table in result["log10_loss"].items():
      cells = zip(table[kind], result["plateau_decades"][arm][kind], result["at_edge"][arm][kind], strict=True)
      lines.append(
        f"  {arm:<10}" + "".join(f"{log:8.2f}{'*' if edge else ' '} {width:5.1f} " for log, width, edge in cells)
      )
  units = {arm: unit for arm, (unit, _) in arms().items() if arm.startswith("hoss")}
  beyond = [
    step > 1.01 * unit for arm, unit in units.items() for steps in result["best_step"][arm].values() for step in steps
  ]
  lines += [
    "",
    f"HOSS is best at macro times beyond the reach (r/1.7)²/l_max of its rank in {np.mean(beyond):.0%} of its cells:",
  ]
  lines += ["there it is close to a Newton step in the Krylov space, and no longer the flow.", ""]
  for row in result["verdicts"]:
    lines.append(f"{row['verdict']:<14} {row['spectrum']}: {row['prediction']}")
    lines.append(f"{'':<14} {row['mean']:+.2f} ± {row['half']:.2f} {row['unit']}")
  return "\n".join(lines)
