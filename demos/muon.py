"""Muon: what replacing a gradient by its polar factor does to singular values, to noise, and to the loss."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.optim.muon import scale_by_muon
from mgr_jax.optim.muon_claims import CLAIMS, PAPERS, haar
from mgr_jax.optim.muon_layout import shape_factor
from mgr_jax.optim.newton_schulz import orthogonalise, quintics
from mgr_jax.params import ParamSpec

M, N = 64, 96
RANK = 4
NOISE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STARTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
METHODS = ("ns5", "polar_express", "svd")
IN, OUT, TOKENS, STEPS, DECAY = 32, 48, 8, 200, 1.5
RATES = 10.0 ** np.linspace(-1.5, 0.5, 9)
LAYER = {"w": ParamSpec((IN, OUT), ("embed", "mlp"))}
OPTIMIZERS = {
  "SGD": optax.trace(0.9),
  "Adam": optax.scale_by_adam(0.9, 0.95),
  "Muon": scale_by_muon(LAYER, momentum_warmup=0),
}
COLOURS = {"SGD": ORANGE, "Adam": PINK, "Muon": BLUE, "gradient": ORANGE, "ns5": GREEN, "polar_express": BLUE}
COLOURS["svd"] = "0.3"
STYLES = {"gradient": "-.", "ns5": "--", "polar_express": "-", "svd": ":"}

run = jax.jit(functools.partial(orthogonalise, dtype=jnp.float32), static_argnames=("ns", "steps"))


def rng_of(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def scalar_map(ns: str, steps: int, s: np.ndarray) -> np.ndarray:
  """Where a singular value s·|M|_F ends."""
  for a, b, c in quintics(ns, steps):
    s = a * s + b * s**3 + c * s**5
  return s


def steepness(key: jax.Array) -> dict[str, float]:
  """<G, X>/|G|_* for a Gaussian gradient G and steps X of spectral norm 1: 1 is the most that any step reaches."""
  G = np.float32(rng_of(key).normal(size=(M, N)))
  singular = lambda x: np.linalg.svd(np.float64(x), compute_uv=False)
  steps = {"gradient": G, "sign(G)": np.sign(G)} | {ns: np.asarray(run(G, ns)) for ns in METHODS}
  return {name: float(np.sum(G * x) / singular(x)[0] / singular(G).sum()) for name, x in steps.items()}


def spectra(key: jax.Array) -> dict[str, np.ndarray]:
  """Singular values of a square Gaussian matrix, over the largest, and those of its orthogonalisations."""
  G = np.float32(rng_of(key).normal(size=(2 * M, 2 * M)))
  found = {name: np.asarray(run(G, name)) for name in METHODS}
  found = {name: np.linalg.svd(x, compute_uv=False) for name, x in ({"gradient": G} | found).items()}
  return found | {"gradient": found["gradient"] / found["gradient"][0]}


def signal_share(key: jax.Array) -> dict[str, np.ndarray]:
  """Share of the step's squared norm along `RANK` signal directions, for noise of every size in `NOISE`."""
  rng = rng_of(key)
  u, v = haar(rng, M)[:, :RANK], haar(rng, N)[:, :RANK]
  noise = rng.normal(size=(M, N))
  noise *= np.sqrt(RANK) / np.linalg.norm(noise)
  G = np.float32([u @ v.T + size * noise for size in NOISE])
  steps = {"gradient": G} | {ns: np.asarray(run(G, ns)) for ns in METHODS}
  share = lambda x: np.sum((u.T @ np.float64(x) @ v) ** 2, (1, 2)) / np.sum(np.float64(x) ** 2, (1, 2))
  return {name: share(x) for name, x in steps.items()}


@functools.partial(jax.jit, static_argnums=0)
def losses(optimizer: str, key: jax.Array, rotation: jax.Array) -> jax.Array:
  """One linear layer learns another from fresh tokens: loss over the first loss, [rates, steps].

  Coordinate k of an input has standard deviation k^-1.5, before `rotation` mixes them; rates fall linearly to 0.
  """
  scales = jnp.arange(1.0, IN + 1) ** -DECAY
  target = jax.random.normal(key, (IN, OUT))
  loss = lambda error: jnp.sum((scales[:, None] * (rotation @ error)) ** 2)
  tx = OPTIMIZERS[optimizer]

  def train(rate):
    def step(carry, t):
      w, state = carry
      x = (jax.random.normal(jax.random.fold_in(key, t), (TOKENS, IN)) * scales) @ rotation
      u, state = tx.update({"w": x.T @ (x @ (w - target)) / TOKENS}, state)
      w = w - rate * (1 - t / STEPS) * u["w"]
      return (w, state), loss(w - target) / loss(target)

    w = jnp.zeros((IN, OUT))
    return jax.lax.scan(step, (w, tx.init({"w": w})), jnp.arange(STEPS))[1]

  return jax.vmap(train)(jnp.asarray(RATES))


def race(key: jax.Array, rotation: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
  """The best of `RATES` for every optimizer, and its losses."""
  found = {}
  for name in OPTIMIZERS:
    curves = np.nan_to_num(np.asarray(losses(name, key, jnp.float32(rotation))), nan=np.inf)
    best = int(np.argmin(curves[:, -1]))
    found[name] = float(RATES[best]), curves[best]
  return found


def races(key: jax.Array) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
  """`race` with inputs along the coordinate axes, and turned."""
  return {"along the axes": race(key, np.eye(IN)), "turned": race(key, haar(rng_of(key), IN))}


def response(key: jax.Array, n_in: int, n_out: int) -> tuple[float, float]:
  """Largest and typical root mean square of x X for inputs x of root mean square 1; X is an orthogonalised kernel."""
  rng = rng_of(key)
  U, _, Vt = np.linalg.svd(rng.normal(size=(n_in, n_out)), full_matrices=False)
  X = U @ Vt
  largest = np.linalg.norm(X, 2) * np.sqrt(n_in / n_out)
  return float(largest), float(np.sqrt(np.mean((rng.normal(size=(1000, n_in)) @ X) ** 2)))


def milliseconds(key: jax.Array) -> dict[str, float]:
  """Time to orthogonalise 8 matrices [128, 512]; the faster of two runs, interleaved."""
  G = np.float32(rng_of(key).normal(size=(8, 128, 512)))
  times: dict[str, list[float]] = {"polar_express": [], "svd": []}
  for _ in range(3):
    for ns, found in times.items():
      start = time.perf_counter()
      jax.block_until_ready(run(G, ns))
      found.append(1e3 * (time.perf_counter() - start))
  return {ns: min(found[1:]) for ns, found in times.items()}


def story(key: jax.Array) -> str:
  steep = steepness(key)
  steepest = "\n".join(f"    {name:<15}{share:6.1%}" for name, share in steep.items())
  at = np.array(STARTS)
  maps = "\n".join(
    f"    {ns:<14}{steps:2d}" + "".join(f"{s:9.4f}" for s in scalar_map(ns, steps, at))
    for ns, steps in (("ns5", 5), ("ns5", 8), ("polar_express", 5), ("polar_express", 8))
  )
  above = {name: f"{np.mean(s > 0.5):.0%}" for name, s in spectra(key).items()}
  shares = signal_share(key)
  noise = "\n".join(f"    {name:<15}" + "".join(f"{x:9.2%}" for x in shares[name]) for name in shares)
  results = races(key)
  cell = lambda rate, curve: f"{curve[-1]:10.1e} (rate {rate:.2f})"
  table = "\n".join(f"    {name:<8}" + "".join(cell(*found[name]) for found in results.values()) for name in OPTIMIZERS)
  turned = {name: results["turned"][name][1][-1] / results["along the axes"][name][1][-1] for name in OPTIMIZERS}
  behind = results["along the axes"]["Muon"][1][-1] / results["along the axes"]["Adam"][1][-1]
  rows = []
  for n_in, n_out in ((64, 256), (64, 64), (256, 64)):
    largest, typical = response(key, n_in, n_out)
    right, wrong = shape_factor(n_in, n_out, "jordan"), shape_factor(n_out, n_in, "jordan")
    rows.append(
      f"    [{n_in:3d}, {n_out:3d}]   factor {right:g}: {right * typical:5.2f} typical,{right * largest:5.2f} at most"
      f"   inverted, factor {wrong:g}: {wrong * largest:5.2f} at most"
    )
  kernels = "\n".join(rows)
  ms = milliseconds(key)
  return f"""\
The steepest step. Among steps X of spectral norm 1, <G, X> is largest for the polar factor U Vᵀ of
the gradient G = U S Vᵀ, where it is the sum of the singular values. Share of that sum reached:
{steepest}

Without a decomposition. X <- a X + (b A + c A²) X with A = X Xᵀ applies a s + b s³ + c s⁵ to every
singular value at once. Where singular values s end, as shares of |M|_F before:
    s             steps{STARTS[0]:7g}{"".join(f"{s:9g}" for s in STARTS[1:])}
{maps}
ns5 is steep and never settles; polar_express converges. Of the singular values of a Gaussian matrix
[{2 * M}, {2 * M}], {above["gradient"]} exceed half of the largest.
Orthogonalised, {above["ns5"]} exceed 1/2 with ns5 and {above["polar_express"]} with polar_express.

A low-rank gradient. {RANK} directions of equal strength in [{M}, {N}], and noise of a given size
(Frobenius norms, noise over signal). Share of the squared step that follows the signal:
    noise          {"".join(f"{size:9g}" for size in NOISE)}
{noise}
All {M} directions count alike in U Vᵀ, so noise takes {1 - RANK / M:.0%} of it as soon as it exceeds rounding. A
few steps of iteration leave what is far below 1e-3 small. Averaging noise away is left to momentum.

Turning the inputs. A linear layer [{IN}, {OUT}] sees {TOKENS} tokens per step, whose coordinates have standard
deviations k^-{DECAY:g}. Loss after {STEPS} steps over the first loss, each at the best of {len(RATES)} learning rates:
    {"":<8}{"along the axes":^23}{"turned":^23}
{table}
Adam scales coordinates, and profits while they are the right ones: turned, it ends {turned["Adam"]:.0f} times as
high. Muon commutes with rotations: {turned["Muon"]:.1f} times.
Along the axes it ends {behind:.0f} times as high as Adam.

Orientation. y = x W with W [in, out]. What a unit step does to inputs of mean square 1, as root
mean square of the output; the factor is sqrt(max(1, out/in)), inverted if rows and columns swap:
{kernels}

Cost. Five iterations on 8 matrices [128, 512] take {ms["polar_express"]:.0f} ms here, their SVD {ms["svd"]:.0f} ms.
"""


def singular_values(key: jax.Array):
  """Where singular values end, and the spectrum of a Gaussian matrix before and after."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  # Further right polar_express turns too often to be drawn, between the same bounds.
  s = np.logspace(-5, -1.5, 2000)
  for ns in ("ns5", "polar_express"):
    left.semilogx(s, scalar_map(ns, 5, s), STYLES[ns], color=COLOURS[ns], lw=2, label=ns)
  left.axhline(1, color=COLOURS["svd"], lw=1, ls="--", label="polar factor")
  left.axvline(1e-3, color="0.6", lw=1, ls=":")
  left.set(ylim=(0, 1.75), xticks=[1e-5, 1e-4, 1e-3, 1e-2], yticks=[0, 0.5, 1])
  styled(left, "singular values", r"before, over $|M|_F$", "after 5 steps", "upper left", 12)
  for name, values in spectra(key).items():
    right.plot(np.arange(1, len(values) + 1), values, STYLES[name], color=COLOURS[name], lw=2, label=name)
  right.set(ylim=(0, 1.75), yticks=[0, 0.5, 1])
  styled(right, f"Gaussian matrix [{2 * M}, {2 * M}]", "its number", "singular value", None, 12)
  right.legend(frameon=False, fontsize=11, ncols=2, handlelength=1.2, columnspacing=1, loc="upper center")
  return figure


def steps(key: jax.Array):
  """How much of a step follows the signal under noise, and the loss of one layer with axes turned or not."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  for (name, share), marker in zip(signal_share(key).items(), "^osD", strict=True):
    left.semilogx(NOISE, share, STYLES[name], color=COLOURS[name], marker=marker, ms=6, lw=2, label=name)
  left.axhline(RANK / M, color="0.6", lw=1, ls=":")
  left.set(ylim=(0, 1.6), yticks=[0, 0.25, 0.5, 0.75, 1])
  styled(left, f"signal of rank {RANK} in noise", "noise over signal", "share of squared step", None, 12)
  left.legend(frameon=False, fontsize=11, ncols=2, handlelength=1.2, columnspacing=1, loc="upper center")
  for results, style in zip(races(key).values(), (":", "-"), strict=True):
    for (name, (_, curve)), marker in zip(results.items(), "^so", strict=True):
      right.semilogy(
        *(np.arange(1, STEPS + 1), curve, style),
        **{"color": COLOURS[name], "lw": 2, "marker": marker, "ms": 5, "markevery": (20, 45)},
        label=name if style == "-" else None,
      )
  right.set_ylim(top=100)
  styled(right, "one layer; dotted: along axes", "step", "loss over first loss", None, 12)
  right.legend(frameon=False, fontsize=11, ncols=3, handlelength=1, columnspacing=0.8, loc="upper center")
  return figure


def orientation(key: jax.Array):
  """What a unit step does to outputs, for inputs of mean square 1: with the factor of [in, out] and of [out, in]."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 3.2), layout="constrained")
  axes, ratios = figure.subplots(1, 2, sharey=True), 2.0 ** np.arange(-3, 4)
  shapes = [(int(64 / r), 64) if r < 1 else (64, int(64 * r)) for r in ratios]
  changes = np.array([response(key, *shape) for shape in shapes])
  right = np.array([shape_factor(*shape, "jordan") for shape in shapes])
  wrong = np.array([shape_factor(*shape[::-1], "jordan") for shape in shapes])
  for ax, change, title in zip(axes, changes.T, ("largest change", "typical change"), strict=True):
    ax.axhline(1, color="0.6", lw=1)
    ax.loglog(ratios, right * change, "-", color=BLUE, marker="o", ms=6, lw=2, label="[in, out]")
    ax.loglog(ratios, wrong * change, "--", color=ORANGE, marker="s", ms=6, lw=2, label="rows and columns swapped")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(ratios, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    ax.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
    ax.set_ylim(0.2, 30)
    styled(ax, title, "out / in", "rms of the output", "upper center", 12)
    ax.label_outer()
  return figure


DEMO = Demo(
  name="muon",
  summary="an optimizer that follows the polar factor of momentum: singular values, noise, rotations, orientation",
  story=story,
  timed=True,
  claims=CLAIMS,
  plots=(singular_values, steps, orientation),
  refs=(*PAPERS, "Bernstein, Newhouse, 2024, arXiv 2409.20325", "Liu et al., 2025, arXiv 2502.16982"),
  not_shown=(
    ("Muon against AdamW on language", "minutes; python -m train.bench optimizers --arms=muon,muon-ns5"),
    ("which parameters of each mechanism get Muon", "checked by tests/test_muon.py"),
    ("the sharded iteration", "needs several devices; tests/test_muon.py simulates eight"),
    ("one compilation while the rate changes, and bfloat16", "checked by tests/test_muon.py"),
    ("shape scales, and Muon on max-plus weights, on language", "hours of training, not run"),
  ),
)
