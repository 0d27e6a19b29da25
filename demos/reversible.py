"""The reversible demo: memory that does not grow with depth, exact inversion, one leak, and bits that are not lost."""

import argparse
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demos.demo import Demo
from mgr_jax.algebra import bits, bits_claims, bits_valve, reversible_claims, symplectic, symplectic_claims
from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.claims import relative_difference
from mgr_jax.config import GPTConfig
from mgr_jax.model import compress, gpt, stack
from mgr_jax.model import reversible_claims as stack_claims
from mgr_jax.model import symplectic as kicks
from mgr_jax.model import symplectic_claims as kick_claims
from mgr_jax.params import init_params

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
CLAIMS = (
  stack_claims.CLAIMS + reversible_claims.CLAIMS + symplectic_claims.CLAIMS + kick_claims.CLAIMS + bits_claims.CLAIMS
)

BLOCK = GPTConfig(vocab_size=128, seq_len=64, n_layer=32, n_head=2, n_kv_head=2, n_embd=32)
BATCH = 4
DEPTHS = (8, 32)
PLANS = {"plain": {}, "remat": {"remat": "full"}, "reversible": {"attention": "reversible"}}

SYMBOLS = 4
LEAK = GPTConfig(vocab_size=SYMBOLS, seq_len=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, mlp_ratio=1)

TEXT = GPTConfig(vocab_size=256, seq_len=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, attention="reversible")


_block = functools.partial(dataclasses.replace, BLOCK)


def _objective(params, x_BTC, witness, cfg):
  """Mean square of a stack's output. The gradient in `witness` is what the backward pass failed to reconstruct."""
  ctx = gpt.context(jnp.arange(x_BTC.shape[1])[None, :], cfg)
  y, _ = stack.forward(params, x_BTC, ctx.replace(shared=ctx.shared | {"witness": witness}), cfg)
  return jnp.mean(jnp.square(y.astype(jnp.float32) - 1))


def _inputs(key, cfg):
  """Parameters (none zero) and input of a stack."""
  params = init_params(key, stack.specs(cfg))
  params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(key, p.shape), params)
  return params, jax.random.normal(key, (BATCH, cfg.seq_len, cfg.n_embd)), jnp.zeros(2)


def _compiled(function, *args):
  """Compiles for arguments like these, quickly: buffers are laid out as always, but machine code is not optimised."""
  return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})


@functools.cache
def _gradient(cfg):
  """The compiled gradient in parameters, input and witness."""
  shapes = jax.eval_shape(functools.partial(_inputs, cfg=cfg), jax.random.key(0))
  return _compiled(jax.grad(functools.partial(_objective, cfg=cfg), (0, 1, 2)), *shapes)


def temp_bytes(plan: str, depth: int) -> int:
  """Temporary memory of the gradient of a stack, in bytes, as the compiler states it."""
  return _gradient(_block(n_layer=depth, **PLANS[plan])).memory_analysis().temp_size_in_bytes


def memory_slopes() -> dict[str, float]:
  """Per layer, in tensors of B·T·C float32 numbers."""
  unit = 4 * BATCH * BLOCK.seq_len * BLOCK.n_embd * (DEPTHS[1] - DEPTHS[0])
  return {plan: (temp_bytes(plan, DEPTHS[1]) - temp_bytes(plan, DEPTHS[0])) / unit for plan in PLANS}


def reconstruction(key) -> tuple[str, float]:
  """A table of reconstruction errors after 32 layers, and how far gradients differ from automatic differentiation."""
  run = lambda **fields: _gradient(_block(**fields))(*_inputs(key, _block(**fields)))
  gradients, lines = {}, []
  arms = ("reversible", "float32"), ("reversible", "bfloat16"), ("reversible(state=float32)", "bfloat16")
  for attention, dtype in arms:
    gradients[dtype] = run(attention=attention, compute_dtype=dtype)
    words, worst = gradients[dtype][2]
    lines.append(f"    {attention:<26}{dtype:<9} inside{int(words):8,} numbers differ, by at most {worst:.0e}")
  automatic = run(attention="reversible(state=float32, backward=autodiff)")
  return "\n".join(lines), relative_difference(gradients["float32"][:2], automatic[:2])


def sum_kick(params, q, ctx):
  """∇_q Σ_t V_t, symplectic for all tokens together."""
  options = {"lambda_min": 0.05, "impl": "reference"}
  return jax.grad(lambda q: jnp.sum(kicks.potential(params, q, ctx, LEAK, **options)))(q)


def causal_kick(params, q, ctx):
  """∇_{q_t} V_t with earlier tokens held fixed."""
  return kicks.grad_V(params, q, ctx, LEAK, lambda_min=0.05)


def _leak_loss(params, tokens, kick):
  """Next-token loss of one symplectic layer, nats per token."""
  ctx = gpt.context(jnp.arange(tokens.shape[1])[None, :], LEAK)
  q = p = rms_norm(params["embed"][tokens])
  p = p - kick(params["attention"], q, ctx)
  q = q + kicks.grad_T(params["mlp"], p, LEAK, lambda_min=0.05)
  logits = rms_norm(q)[:, :-1] @ params["head"]
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def _train(loss, params, key, draw, steps: int, rate: float):
  """Adam with a cosine, on a fresh batch `draw(key)` per step."""
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)

  def step(carry, key):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params, draw(key))
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
  return params, losses


def _leak_training(key, kick):
  keys = jax.random.split(key, 3)
  shape = (LEAK.n_embd, SYMBOLS)
  params = init_params(keys[0], kicks.kick_specs(LEAK))
  params |= {"head": jax.random.normal(keys[1], shape) / 4, "embed": jax.random.normal(keys[1], shape).T}
  params["attention"]["gate"] += 0.5
  draw = lambda key: jax.random.randint(key, (32, LEAK.seq_len), 0, SYMBOLS)
  return _train(functools.partial(_leak_loss, kick=kick), params, keys[2], draw, 150, 0.02)[1]


@functools.cache
def leak_losses(kick) -> np.ndarray:
  """Losses of 150 training steps, each on random tokens never seen before."""
  key = jax.random.key(0)
  return np.asarray(_compiled(functools.partial(_leak_training, kick=kick), key)(key))


@functools.cache
def energies() -> dict[str, np.ndarray]:
  """Largest change of energy in 1000 layers, by step size; in 256 layers for equal signs."""
  rng = np.random.default_rng(0)
  system, (q, p) = symplectic_claims.Pendulum(rng), rng.uniform(0.5, 1, (2, 2))
  band = functools.partial(symplectic_claims.energy_bands, system, q=q, p=p)
  found = {step.__name__: band(step, layers=1000) for step in (symplectic.euler, symplectic.leapfrog)}
  return found | {"equal signs": band(symplectic_claims.equal_signs, layers=256)}


def _train_bytes(key, text):
  starts = lambda key: jax.random.randint(key, (16, 1), 0, len(text) - TEXT.seq_len)
  windows = lambda key: text[starts(key) + jnp.arange(TEXT.seq_len)]

  def loss(params, tokens):
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    return gpt.loss(params, {"tokens": before, "targets": tokens}, TEXT)[0]

  return _train(loss, gpt.init(key, TEXT), key, windows, 200, 0.01)[0]


def compression(key) -> str:
  """Trains on Python's own source, compresses 2,048 bytes that were held out, and decodes random bits."""
  text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)
  train, held_out = text[:-2048], text[-2048:]
  params = _compiled(_train_bytes, key, train)(key, train)
  rows = held_out.reshape(-1, TEXT.seq_len)
  batch = {"tokens": np.pad(rows, ((0, 0), (1, 0)))[:, :-1], "targets": rows}
  entropy = float(jnp.mean(gpt.nll(params, batch, TEXT))) / np.log(2)
  archive = compress.compress(params, held_out, TEXT, start=0)
  restored = compress.decompress(params, archive, TEXT, start=0)
  exact = "every byte" if np.array_equal(restored, held_out) else "NOT every byte"
  noise = bits.Tape.random(2, 1024, np.random.default_rng(0))
  sample = compress.decode_tokens(params, noise, 2048, TEXT, start=0)[: TEXT.seq_len]
  shown = bytes(sample.astype(np.uint8)).decode(errors="replace")
  return f"""\
    cross-entropy {entropy:.3f} bits per byte; archive {8 * len(archive) / 2048:.3f}, header and lanes included; \
{exact} restored
    the same decoder on random bits: {shown!r}"""


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
  slopes = memory_slopes()
  table, gradient = reconstruction(key)
  losses = {kick: leak_losses(kick)[-20:].mean() for kick in (causal_kick, sum_kick)}
  bands = energies()
  order = {name: symplectic_claims.order(band) for name, band in bands.items()}
  blown_up = bands["equal signs"][0]
  memory = "\n".join(
    f"    {plan:<12}{temp_bytes(plan, DEPTHS[0]):12,}{temp_bytes(plan, DEPTHS[1]):12,}{slopes[plan]:10.2f}"
    for plan in PLANS
  )
  return f"""\
What it is. Two streams, x1 <- x1 + F(x2) and x2 <- x2 + G(x1). Any F and G give a bijection; the
backward pass computes the inputs of a layer from its outputs instead of storing them, at the price
of one more forward pass. It is a property of the stack and wraps any mechanism.

What it is not. Determinant one bounds no gradient, and the stack is no density model. Recomputing
each layer from a stored input (remat) costs as much time and stores one tensor per layer: that,
not the plain stack, is what reversibility competes with.

Temporary bytes of the compiled gradient     {DEPTHS[0]:>3} and {DEPTHS[1]:>3} layers    B·T·C tensors per layer
{memory}

Reconstruction after {BLOCK.n_layer} layers, read from the backward pass itself
{table}
    In floating point an error of one bit flips a rounding inside; integers make no error.
    Gradients along them differ from automatic differentiation in float32 by {gradient:.0e}, relatively.

A leak. On uniformly random tokens no causal model gets below log {SYMBOLS} = {np.log(SYMBOLS):.3f} nats
    causal kicks                          {losses[causal_kick]:.3f} on fresh tokens
    kicks symplectic for all tokens       {losses[sum_kick]:.3f}, for they read the token they predict
    A causal kick is symplectic for each token given its past, and no more can be had.

Energy of one token, layers that share parameters: the band narrows with the step h
    symplectic Euler as h^{order["euler"]:.2f}, leapfrog as h^{order["leapfrog"]:.2f}
    At h = 0.2 it is {bands["euler"][0]:.2f} for Euler; equal signs of both kicks make it {blown_up:.0e} in 256 layers.

Bits. A small byte model on a reversible stack, trained on a Python module
{compression(key)}
    A valve replaces half a state by fresh draws; what it forgets is on the tape, bits per entry:
{ledger()}
"""


def memory_and_energy(key: jax.Array):
  """Temporary memory against depth; energy bands against the step, with lines of slope one and two."""
  del key
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 3.6), layout="constrained")
  left, right = figure.subplots(1, 2)
  slopes = memory_slopes()
  megabytes_of_plain = temp_bytes("plain", DEPTHS[-1]) / 2**20
  for plan, colour, marker in zip(PLANS, (RED, ORANGE, BLUE), "sDo", strict=True):
    megabytes = [temp_bytes(plan, depth) / 2**20 for depth in DEPTHS]
    left.plot(DEPTHS, megabytes, marker + "-", color=colour, label=f"{plan}, {slopes[plan]:.2f} per layer")
  left.set(xlabel="layers", ylabel="temporary memory, MiB", ylim=(0, 1.5 * megabytes_of_plain), xticks=DEPTHS)
  left.set_title("gradient of a stack", fontsize=13)
  for name, colour, marker in (("euler", GREEN, "s"), ("leapfrog", BLUE, "o")):
    right.loglog(symplectic_claims.STEPS, energies()[name], marker + "-", color=colour, label=name)
  right.set(xlabel="step h", ylabel="largest change of energy", xticks=symplectic_claims.STEPS)
  right.xaxis.set_major_formatter("{x:g}")
  right.minorticks_off()
  right.set_title("1000 layers, one token", fontsize=13)
  _tidy(left, right)
  return figure


def leak(key: jax.Array):
  """Influence of tokens on kicks, and training on random tokens: below the dashed line there is only leakage."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 3.4), layout="constrained")
  first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
  arms = (("causal kick", kick_claims.causal_kick, causal_kick), ("sum kick", kick_claims.sum_kick, sum_kick))
  with jax.enable_x64(True):
    case = kick_claims.case(np.random.default_rng(0))
    for ax, (name, kick, _) in zip((first, second), arms, strict=True):
      ax.imshow(np.asarray(kick_claims.influence(kick, case.params, case.q)), cmap="Blues", vmin=0)
      ax.set(xlabel="token s", ylabel="kick t")
      ax.set_title(name, fontsize=13)
  for (name, _, kick), colour in zip(arms, (BLUE, RED), strict=True):
    third.plot(leak_losses(kick), color=colour, lw=1.5, label=name)
  third.axhline(np.log(SYMBOLS), color="0.3", ls="--", lw=1.5)
  third.set(xlabel="step", ylabel="loss on random tokens, nats")
  _tidy(third)
  return figure


def _tidy(*axes):
  for ax in axes:
    ax.legend(frameon=False, fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=12)
    ax.xaxis.label.set_size(13)
    ax.yaxis.label.set_size(13)


DEMO = Demo(
  name="reversible",
  summary="stacks that are inverted instead of stored, and what symplectic layers can and cannot be",
  story=story,
  claims=CLAIMS,
  plots=(memory_and_energy, leak),
  refs=("Gomez et al., 2017, arXiv 1707.04585", "Kitaev et al., 2020, arXiv 2001.04451"),
)
