"""The reversible demo: memory that does not grow with depth, exact inversion, one leak, and bits that are not lost."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from demos.reversible_training import SYMBOLS, compression, influences, leak_lines, leak_losses
from mgr_jax.algebra import bits, bits_claims, bits_valve, reversible_claims, symplectic, symplectic_claims
from mgr_jax.claims import largest_difference, relative_difference
from mgr_jax.model import gpt, reversible, stack
from mgr_jax.model import reversible_claims as stacks
from mgr_jax.model import symplectic_claims as kick_claims

CLAIMS = stacks.CLAIMS + reversible_claims.CLAIMS + symplectic_claims.CLAIMS + kick_claims.CLAIMS + bits_claims.CLAIMS

# Streams and what is inside F and G.
PAIRS = (
  ("int32", "float32"),
  ("int32", "bfloat16"),
  ("float32", "float32"),
  ("float32", "bfloat16"),
  ("bfloat16", "bfloat16"),
)
LAYERS = (1, 4, 16, 64)


def memory_table() -> str:
  """Temporary bytes of the compiled gradient by plan and depth, in tensors B·T·C, and how they grow."""
  unit = 4 * stacks.BATCH * stacks.BLOCKS.seq_len * stacks.BLOCKS.n_embd
  lines = []
  for plan in stacks.PLANS:
    sizes = "".join(f"{stacks.depth_bytes(plan, depth) / unit:9.1f}" for depth in stacks.DEPTHS)
    lines.append(f"    {plan:<12}{sizes}   {growth(plan)}")
  return "\n".join(lines)


def growth(plan: str) -> str:
  """How many tensors B·T·C a layer adds, or for groups of √L layers a unit of √L."""
  if plan != "√L remat":
    return f"{stacks.depth_slope(plan):.2f} per layer"
  rise = np.sqrt(stacks.DEPTHS[-1]) - np.sqrt(stacks.DEPTHS[0])
  return f"{stacks.depth_slope(plan) * (stacks.DEPTHS[-1] - stacks.DEPTHS[0]) / rise:.2f} times √L"


@functools.partial(jax.jit, static_argnums=(2, 3))
def _round_trips(params, x, cfg, state):
  """Largest deviation of the input after a stack and its inverse, for each of `LAYERS`; layers differ."""
  (run,) = stack.runs(dataclasses.replace(cfg, n_layer=1))
  stages, opts = stack.stages_of(cfg, (run,)), run.wrap
  ctx = gpt.context(jnp.arange(x.shape[1])[None, :], cfg)
  params = gpt.cast(params, cfg)["runs"]
  layer = lambda i: jax.tree.map(lambda p: jax.lax.dynamic_slice_in_dim(p, i, 1), params)
  streams = reversible.enter(x, opts)
  if state == "bfloat16":
    streams = tuple(s._replace(value=s.value.astype(jnp.bfloat16)) for s in streams)
  number = lambda s: s.value.astype(jnp.float32) if s.exact is None else s.exact * 2.0**-opts.frac_bits

  def trip(depth):
    forth = lambda i, s: reversible.advance(stages, layer(i), s, ctx, opts)
    back = lambda i, s: reversible.retreat(stages, layer(depth - 1 - i), s, ctx, opts)
    found = jax.lax.fori_loop(0, depth, back, jax.lax.fori_loop(0, depth, forth, streams))
    return jnp.max(jnp.abs(jnp.stack([number(a) - number(b) for a, b in zip(found, streams, strict=True)])))

  return jax.lax.map(trip, jnp.array(LAYERS))


@functools.cache
def round_trips() -> dict[tuple[str, str], np.ndarray]:
  """Largest deviation of the reconstructed input after 1 to 64 layers, by streams and what is inside.

  Streams in bfloat16, which the library refuses, are made here by hand.
  """
  cfg = dataclasses.replace(stacks.BLOCKS, n_layer=LAYERS[-1], attention="reversible")
  case = stacks.stack_case(jax.random.key(0), cfg)
  errors = {}
  for state, inside in PAIRS:
    options = "" if state == "int32" else ", state=float32"
    arm = dataclasses.replace(cfg, attention=f"reversible({stacks.DENSE}{options})", compute_dtype=inside)
    errors[state, inside] = np.asarray(_round_trips(*case, arm, state))
  return errors


def round_trip_table() -> str:
  shown = lambda error: f"{error:9.0e}" if error else f"{'0':>9}"
  return "\n".join(
    f"    {state:<10}{inside:<10}" + "".join(map(shown, errors)) for (state, inside), errors in round_trips().items()
  )


def gradient_table(key) -> str:
  """How far gradients by reconstruction are from those of a stack that stores its layers."""
  rows = (
    ("float32", "float32", stacks.FLOAT, stacks.FLOAT),
    ("int32", "float32", dataclasses.replace(stacks.FLOAT, attention=stacks.EXACT.attention), stacks.FLOAT),
  )
  lines = []
  for state, inside, cfg, other in rows:
    case = stacks.stack_case(key, cfg)
    off = relative_difference(*(stacks.stack_gradient(*case, c)[:2] for c in (cfg, stacks.stored(other))))
    lines.append(f"    {state:<10}{inside:<10}{cfg.n_layer:6d} layers {off:9.0e}")
  return "\n".join(lines)


@functools.partial(jax.jit, static_argnums=2)
def _stack(params, x, cfg):
  return stacks.run_stack(params, x, jnp.zeros(2), cfg)


def half_and_full(key) -> tuple[float, float]:
  """Difference of a full stack at C from the half stack at 2C with the same parameters, and the size of the output."""
  full = dataclasses.replace(stacks.SMALL, n_layer=2, attention=f"reversible({stacks.DENSE}, state=float32)")
  twice = {name: 2 * getattr(full, name) for name in ("n_embd", "n_head", "n_kv_head")}
  half = dataclasses.replace(full, attention=f"reversible({stacks.DENSE}, state=float32, streams=half)", **twice)
  params, x = stacks.stack_case(key, full)
  y = np.asarray(_stack(params, x, full))
  first, second = np.split(np.asarray(_stack(params, np.concatenate([x, x], -1), half)), 2, -1)
  return largest_difference((first + second) / 2, y), float(np.max(np.abs(y)))


@functools.cache
def energies() -> dict[str, np.ndarray]:
  """|H - H_0| after 1 to 1000 layers by step size, [layers, sizes]; 256 layers for equal signs."""
  rng = np.random.default_rng(0)
  system, (q, p) = symplectic_claims.Pendulum(rng), rng.uniform(0.5, 1, (2, 2))
  path = functools.partial(symplectic_claims.energy_path, system, q=q, p=p)
  found = {step.__name__: path(step, layers=1000) for step in (symplectic.euler, symplectic.leapfrog)}
  return found | {"equal signs": path(symplectic_claims.equal_signs, layers=256)}


def ledger() -> str:
  """The valve under the true conditional and under one eight times too wide, bits per entry."""
  lines = []
  for name, scale in (("true conditional", 2.0**22), ("eight times too wide", 2.0**25)):
    rng = np.random.default_rng(0)
    a, b, _ = bits_claims.valve_state(rng, 16, 60)
    tape, reservoir = bits.Tape(16), bits.Tape.random(16, 120, rng)
    q = lambda column, scale=scale: bits_valve.discretized_logistic(column, scale, 20)
    _, book = bits_valve.valve(a, b, q, 20, tape, reservoir)
    written, consumed, net = (np.mean(x) / 60 for x in (book.written, book.consumed, book.net))
    off = np.max(np.abs(tape.bits() - book.written))
    lines.append(f"    {name:<22}{written:7.2f} written{consumed:7.2f} consumed{net:+7.2f} net   tape off by {off:.2f}")
  return "\n".join(lines)


def story(key: jax.Array) -> str:
  # Compiling releases Python's lock, and this table needs nothing else: it is made beside the other parts.
  with ThreadPoolExecutor(1) as beside:
    memory = beside.submit(memory_table)
    errors, gradients, leaks = round_trip_table(), gradient_table(key), leak_lines()
    apart, size = half_and_full(key)
    bits_text = compression(key)
  paths = energies()
  order = {name: symplectic_claims.order(path.max(axis=0)) for name, path in paths.items()}
  depths = lambda numbers, width: "".join(f"{n:{width}d}" for n in numbers)
  return f"""\
What it is. Two streams, x1 <- x1 + F(x2) and x2 <- x2 + G(x1). Any F and G give a bijection; the
backward pass computes the inputs of a layer from its outputs instead of storing them, at the price
of one more forward pass. It is a property of the stack and wraps any mechanism.

What it is not. Determinant one bounds no gradient, and the stack is no density model. Recomputing
each layer from a stored input (remat) costs as much time and stores one tensor per layer, groups of
√L layers store 2√L: those, not the plain stack, are what reversibility competes with.

Temporary memory of the compiled gradient, in tensors B·T·C
    layers      {depths(stacks.DEPTHS, 9)}
{memory.result()}

Largest error of the reconstructed input
    streams   inside    {depths(LAYERS, 9)} layers
{errors}
    In floating point an error of one bit flips a rounding inside; integers make no error.

Gradients by reconstruction, relative difference from float streams that are stored
    streams   inside
{gradients}

Half streams at twice the width are full streams: outputs up to {size:.1f} differ by {apart:.0e}

A leak. On random tokens no causal model gets below log {SYMBOLS} = {np.log(SYMBOLS):.3f} nats on fresh data
{leaks}
    A causal kick is symplectic for each token given its past, and no more can be had.

Energy of one token, layers that share parameters: the band narrows with the step h
    symplectic Euler as h^{order["euler"]:.2f}, leapfrog as h^{order["leapfrog"]:.2f}
    At h = 0.2 it is {paths["euler"][:, 0].max():.2f} for Euler; equal signs of both kicks make it \
{paths["equal signs"][:, 0].max():.0e} in 256 layers.

Bits. A small byte model on a reversible stack, trained on a Python module
{bits_text}
    A valve replaces half a state by fresh draws; what it forgets is on the tape, bits per entry:
{ledger()}
"""


def memory_and_error(key: jax.Array):
  """Temporary memory and reconstruction error against depth."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.9), layout="constrained")
  left, right = figure.subplots(1, 2)
  looks = ((ORANGE, "s-"), (PINK, "D--"), (GREEN, "^-."), (BLUE, "o-"))
  for plan, (colour, look) in zip(stacks.PLANS, looks, strict=True):
    sizes = [stacks.depth_bytes(plan, depth) / 2**20 for depth in stacks.DEPTHS]
    left.loglog(stacks.DEPTHS, sizes, look, color=colour, label=f"{plan}, {growth(plan)}")
  left.set_ylim(top=20 * left.get_ylim()[1])
  styled(left, "memory of the gradient", "layers", "temporaries, MiB", "upper left")
  _depth_axis(left, stacks.DEPTHS)
  looks = ((BLUE, "o-"), (BLUE, "s--"), (GREEN, "^-"), (ORANGE, "D--"), (PINK, "v--"))
  floor = 1e-8
  for (state, inside), (colour, look) in zip(PAIRS, looks, strict=True):
    errors = np.maximum(round_trips()[state, inside], floor)
    right.loglog(LAYERS, errors, look, color=colour, label=f"{state}, {inside} inside", clip_on=False, zorder=3)
  right.set(ylim=(floor, 1e8), yticks=[floor, 1e-6, 1e-4, 1e-2, 1], yticklabels=["0", "1e-6", "1e-4", "0.01", "1"])
  styled(right, "error of the reconstructed input", "layers", "largest deviation", "upper left")
  _depth_axis(right, LAYERS)
  return figure


def _depth_axis(ax, depths):
  ax.set_xticks(depths, map(str, depths))
  ax.minorticks_off()


def leak(key: jax.Array):
  """What tokens do to kicks before and after them, and training on random tokens, where only a leak pays."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.7), layout="constrained")
  bars, training = figure.subplots(1, 2)
  far = kick_claims.T - 1
  for (name, size), colour, shift in zip(influences().items(), (BLUE, ORANGE), (-0.2, 0.2), strict=True):
    bars.bar(np.arange(-far, far + 1) + shift, size, 0.4, color=colour, label=name)
    training.plot(leak_losses(name), "-" if colour == BLUE else "--", color=colour, lw=1.8, label=f"symplectic {name}")
  bars.axvline(0.5, color="0.3", lw=1, ls=":")
  bars.text(0.65, 0.95 * bars.get_ylim()[1], "the future", fontsize=11, va="top")
  styled(bars, "what reaches the kick at t", "token s - t", "largest |∂ kick / ∂ q|", "upper left")
  training.axhline(np.log(SYMBOLS), color="0.3", ls=":", lw=1.5)
  training.text(150, np.log(SYMBOLS) + 0.04, f"log {SYMBOLS}", fontsize=11, ha="right")
  styled(training, "training on random tokens", "step", "loss, nats per token", "upper right")
  return figure


def energy(key: jax.Array):
  """Change of the energy along depth at h = 0.2, and its largest against the step."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.7), layout="constrained")
  left, right = figure.subplots(1, 2)
  steps, names = symplectic_claims.STEPS, {"euler": "symplectic Euler", "leapfrog": "leapfrog"}
  looks = {"euler": (GREEN, "s-"), "leapfrog": (BLUE, "o-."), "equal signs": (ORANGE, "--")}
  for name, path in energies().items():
    colour, look = looks[name]
    left.semilogy(np.arange(1, 257), path[:256, 0], look.strip("so"), color=colour, lw=1.5, label=names.get(name, name))
    if name in names:
      band = path.max(axis=0)
      label = f"{names[name]}, slope {symplectic_claims.order(band):.2f}"
      right.loglog(steps, band, look, color=colour, label=label)
  left.set_ylim(bottom=1e-5)
  styled(left, f"one orbit, h = {steps[0]:g}", "layers", "change of energy", "center right")
  right.set_ylim(top=8 * right.get_ylim()[1])
  styled(right, "1000 layers", "step h", "largest change of energy", "upper left")
  right.set_xticks(steps, [f"{h:g}" for h in steps])
  right.minorticks_off()
  return figure


DEMO = Demo(
  name="reversible",
  summary="stacks that are inverted instead of stored, and what symplectic layers can and cannot be",
  story=story,
  claims=CLAIMS,
  plots=(memory_and_error, leak, energy),
  refs=(
    "Gomez et al., 2017, arXiv 1707.04585",
    "Kitaev et al., 2020, arXiv 2001.04451",
    "Chen et al., 2016, arXiv 1604.06174 (groups of √L layers)",
  ),
  not_shown=(
    (
      "time per step beside memory",
      "needs a quiet machine; python -m train.bench speed --attention=reversible measures it",
    ),
    ("every mechanism inside the wrapper, and three in one stack", "checked by tests/test_reversible.py"),
    (
      "ten thousand round trips, and steps that equal the whole pass in every mode",
      "checked by tests/test_reversible.py",
    ),
    ("the witness against a separate inverse program", "checked by tests/test_reversible.py"),
    ("a valve that is cut short, damaged archives", "checked by tests/test_bits.py"),
    ("quality against a plain stack", "needs an hour; python -m train.experiment reversible_quality trains it"),
  ),
)
