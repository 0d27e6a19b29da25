"""Two tasks for braid attention with answers that can be checked: sums over selected tokens, and products in S₅."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demos.figures import BLUE, GREEN, ORANGE, PINK, styled
from mgr_jax.algebra import additive_gate
from mgr_jax.attention.braid import MECHANISM
from mgr_jax.attention.mechanism import Context
from mgr_jax.config import GPTConfig

STEPS, BATCH, RATE = 1000, 64, 0.05
SHORTEST, LONGEST = 4, 10
LENGTHS = (5, 10, 20, 50, 100, 200, 400)
HIDDEN = 32
STRANDS = 5


class Sums(NamedTuple):
  """Sequences of tokens (tag, value), [N, n] each, and the sum of the values whose tag is positive, [N].

  `real` is 0 where a sequence has ended; values are 0 there.
  """

  tag: np.ndarray
  value: np.ndarray
  real: np.ndarray
  target: np.ndarray


def draw_sums(rng: np.random.Generator, count: int, shortest: int, longest: int) -> Sums:
  """Tags of ±0.5 to ±1.5, values N(0, 1); the share of positive tags differs from sequence to sequence, 0.1 to 0.9."""
  shape = count, longest
  real = np.arange(longest) < rng.integers(shortest, longest + 1, (count, 1))
  chosen = rng.uniform(size=shape) < rng.uniform(0.1, 0.9, (count, 1))
  value = rng.standard_normal(shape) * real
  found = np.where(chosen, 1, -1) * rng.uniform(0.5, 1.5, shape), value, real, np.sum(value * chosen, -1)
  return Sums(*(np.float32(x) for x in found))


def initial(rng: np.random.Generator) -> dict:
  """No arm starts at a solution: gates look at the tag a little and are open."""
  table = {"hard gates": [0.1, 1, 0.5], "soft gates": [0.1, 1, 0.5], "softmax and count": [0.1, 0, 0.5]}
  table |= {"into": rng.standard_normal((3, HIDDEN)), "out": rng.standard_normal(HIDDEN) / HIDDEN, "rest": np.zeros(3)}
  return {name: np.float32(x) for name, x in table.items()}


def answers(p: dict, tokens: Sums, xp=np) -> dict:
  """What each arm returns, [N].

  Gates: c·Σ φ(w·tag + b)·value, φ a step or a sigmoid. Softmax: one head with scores w·tag, its output times (c + d·n).
  DeepSets: Σ of a network of one hidden layer of (tag, value).
  """
  tag, value, real, _ = tokens
  sigmoid = lambda z: 1 / (1 + xp.exp(-z))
  score = {name: p[name][0] * tag + p[name][1] for name in ("hard gates", "soft gates")}
  gate = (score["hard gates"] > 0) * 1.0
  if xp is jnp:  # straight through: the gradient of a sigmoid
    soft = sigmoid(score["hard gates"])
    gate = soft + jax.lax.stop_gradient(gate - soft)
  weight = xp.exp(p["softmax and count"][0] * tag) * real
  mean = xp.sum(weight * value, -1) / xp.sum(weight, -1)
  hidden = xp.maximum(tag[..., None] * p["into"][0] + value[..., None] * p["into"][1] + p["into"][2], 0)
  each = hidden @ p["out"] + p["rest"][0] * value + p["rest"][1] * tag + p["rest"][2]
  return {
    "hard gates": p["hard gates"][2] * xp.sum(gate * value, -1),
    "soft gates": p["soft gates"][2] * xp.sum(sigmoid(score["soft gates"]) * value, -1),
    "DeepSets": xp.sum(each * real, -1),
    "softmax and count": (p["softmax and count"][1] + p["softmax and count"][2] * xp.sum(real, -1)) * mean,
  }


@jax.jit
def _train(p, batches: Sums):
  """Adam with a falling rate on all arms at once; they share no parameter."""

  def loss(p, tokens):
    return sum(jnp.mean(jnp.square(y - tokens.target)) for y in answers(p, tokens, jnp).values())

  def step(carry, xs):
    p, m, v = carry
    i, tokens = xs
    gradient = jax.grad(loss)(p, tokens)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, v, gradient)
    rate = RATE * (1 - i / STEPS)
    move = lambda p, m, v: p - rate * (m / (1 - 0.9 ** (i + 1))) / (jnp.sqrt(v / (1 - 0.99 ** (i + 1))) + 1e-8)
    return (jax.tree.map(move, p, m, v), m, v), None

  zeros = jax.tree.map(jnp.zeros_like, p)
  return jax.lax.scan(step, (p, zeros, zeros), (jnp.arange(STEPS, dtype=jnp.float32), batches))[0][0]


def trained(rng: np.random.Generator) -> dict:
  """Parameters of all arms after the same batches of sequences of 4 to 10 tokens."""
  tokens = draw_sums(rng, STEPS * BATCH, SHORTEST, LONGEST)
  batches = jax.tree.map(lambda x: x.reshape(STEPS, BATCH, *x.shape[1:]), tokens)
  return jax.tree.map(np.asarray, _train(initial(rng), batches))


def sum_errors(rng: np.random.Generator, p: dict, length: int, count: int = 300) -> dict[str, float]:
  """Root of the mean squared error over that of the target, on new sequences."""
  tokens = draw_sums(rng, count, length, length)
  size = np.sqrt(np.mean(tokens.target**2))
  return {name: float(np.sqrt(np.mean((y - tokens.target) ** 2)) / size) for name, y in answers(p, tokens).items()}


@jax.jit
def _executed(score, b, values):
  def one(score, b, values):
    order, k = additive_gate.prefix_schedule(b[None], score)
    return k[0], additive_gate.execute_schedule(order, k[0], values)

  return jax.vmap(one)(score, b, values)


def as_words(rng: np.random.Generator, p: dict, length: int, count: int = 8) -> tuple[np.ndarray, float]:
  """Executes the words σ₁···σₖ that the trained hard gates stand for: every k, and how far off the masked sums are."""
  tokens = draw_sums(rng, count, length, length)
  w, b, _ = p["hard gates"]
  k, sums = _executed(w * tokens.tag, np.full(count, b), tokens.value)
  masked = np.sum(tokens.value * (w * tokens.tag + b > 0), -1)
  return np.asarray(k), float(np.max(np.abs(sums - masked)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _apply(params, x, cfg, opts):
  return MECHANISM.apply(params, x, Context(jnp.arange(x.shape[1])[None]), cfg, opts)[0]


def tracked(rng: np.random.Generator, count: int, length: int, ts=(1.0,)) -> np.ndarray:
  """Which labels one layer with hard letters reads right, [count, length, len(ts), 5], on random words in S₅.

  The layer reads the letter that its one-hot input names and writes nothing; one head for every t and position. Labels
  are carried by the strands and compared with the product of the permutations.
  """
  heads = STRANDS * len(ts)
  cfg = GPTConfig(vocab_size=2, n_layer=1, n_head=heads, n_kv_head=1, n_embd=2 * heads)
  opts = MECHANISM.options(mode="word", word_gate="hard", strands=STRANDS, impl="reference")
  to_strands = lambda x: np.float32(np.broadcast_to(x, (2 * heads, heads, STRANDS)))
  t = np.repeat(ts, STRANDS)
  params = {
    "wv": np.zeros((2 * heads, 1, 2), np.float32),
    "wo": np.stack([np.eye(heads, 2 * heads), np.zeros((heads, 2 * heads))], 1).astype(np.float32),
    "w_letter": to_strands(50 * np.eye(2 * heads, STRANDS)[:, None]),
    "w_write": to_strands(0),
    "w_gate": np.full((2 * heads, heads), -200, np.float32),
    "w_read": to_strands(200 * np.tile(np.eye(STRANDS), (len(ts), 1))),
    "strands": np.float32(np.broadcast_to(np.arange(STRANDS)[:, None], (heads, STRANDS, 2))),
    "t": np.float32(np.where(t < 1, np.log(t) - np.log1p(-np.minimum(t, 0.9999)), 100)),  # its sigmoid is t
  }
  words = rng.integers(0, STRANDS, (count, length))
  read = np.asarray(_apply(params, np.eye(2 * heads, dtype=np.float32)[words], cfg, opts))[..., :heads]
  return np.round(read).reshape(count, length, len(ts), STRANDS) == products(words)[:, :, None]


def products(words: np.ndarray) -> np.ndarray:
  """The label at every position after every letter, [count, length, 5], by multiplying transpositions one by one."""
  labels, rows = np.tile(np.arange(STRANDS), (len(words), 1)), np.arange(len(words))
  after = []
  for letter in words.T:
    left = np.maximum(letter - 1, 0)
    labels[rows, left], labels[rows, letter] = labels[rows, letter], labels[rows, left].copy()
    after.append(labels.copy())
  return np.stack(after, 1)


def tasks(key: jax.Array):
  """Sums over selected tokens, trained on 4 to 10 of them; labels tracked by words in S₅, by the t of the letters."""
  from matplotlib.figure import Figure

  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  figure = Figure(figsize=(7, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  p = trained(rng)
  errors = [sum_errors(rng, p, n) for n in LENGTHS]
  for name, colour, marker in zip(errors[0], (BLUE, ORANGE, GREEN, PINK), "osD^", strict=True):
    left.loglog(LENGTHS, [e[name] for e in errors], marker=marker, ms=6, lw=1.5, color=colour, label=name)
  left.axvspan(SHORTEST, LONGEST, color="0.92", lw=0)
  left.text(6.3, 1e-5, "trained on", fontsize=11, ha="center", va="center", rotation=90)
  left.set(xlim=(3.5, 500), ylim=(1e-8, 6), xticks=(10, 100), xticklabels=("10", "100"))
  left.minorticks_off()
  styled(left, "sum of selected values", "tokens n", "error / size of the sum", legend=(0.28, 0.2))
  ts = (1.0, 0.99, 0.9)
  share = tracked(rng, 8, 2000, ts).mean((0, 3))
  for t, row, colour, style in zip(ts, share.T, (BLUE, ORANGE, PINK), ("-", "--", ":"), strict=True):
    right.semilogx(np.arange(1, len(row) + 1), row, style, lw=2, color=colour)
    # Left of the curve where it has fallen, each a little lower, or below the end of the one that never falls.
    height = 0.75 - 4 * (1 - t)
    fallen = np.flatnonzero(row < height)
    at = (0.8 * fallen[0], height) if len(fallen) else (len(row), 0.94)
    right.text(*at, f"t = {t:g}", color=colour, fontsize=12, ha="right", va="center")
  right.axhline(1 / STRANDS, color="0.5", lw=1)
  right.text(1.2, 1 / STRANDS + 0.03, "chance", color="0.4", fontsize=12, va="center")
  styled(right, "words in S₅, one layer", "letters", "share of labels right", legend=None)
  return figure
