"""What small models trained in the reversible demo show: a leak of the future, and compression without loss."""

import argparse
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from mgr_jax.algebra import bits
from mgr_jax.attention.mechanism import rms_norm
from mgr_jax.config import GPTConfig
from mgr_jax.model import compress, gpt
from mgr_jax.model import symplectic as kicks
from mgr_jax.model import symplectic_claims as kick_claims
from mgr_jax.params import is_spec

SYMBOLS = 4
LEAK = GPTConfig(vocab_size=SYMBOLS, seq_len=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, mlp_ratio=1)
# Noise of a mean over the last steps is far below this.
LEAK_MARGIN = 0.01

TEXT = GPTConfig(
  vocab_size=128, seq_len=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=64, mlp_ratio=2.0, attention="reversible"
)
HELD_OUT = 4096


def sum_kick(params, q, ctx):
  """∇_q Σ_t V_t, symplectic for all tokens together."""
  options = {"lambda_min": 0.05, "impl": "reference"}
  return jax.grad(lambda q: jnp.sum(kicks.potential(params, q, ctx, LEAK, **options)))(q)


def causal_kick(params, q, ctx):
  """∇_{q_t} V_t with earlier tokens held fixed."""
  return kicks.grad_V(params, q, ctx, LEAK, lambda_min=0.05, impl="reference")


KICKS = {"causal": (kick_claims.causal_kick, causal_kick), "for all tokens": (kick_claims.sum_kick, sum_kick)}


def influences() -> dict[str, np.ndarray]:
  """For both kicks, the largest |∂kick_t/∂q_s| by s - t = -4 .. 4."""
  far = kick_claims.T - 1
  found = {}
  with jax.enable_x64(True):
    case = kick_claims.case(np.random.default_rng(0))
    for name, (kick, _) in KICKS.items():
      size = np.asarray(kick_claims.influence(kick, case.params, case.q))
      found[name] = np.array([np.max(np.diagonal(size, d)) for d in range(-far, far + 1)])
  return found


def _leak_loss(params, tokens, kick):
  """Next-token loss of one symplectic layer, nats per token."""
  ctx = gpt.context(jnp.arange(tokens.shape[1])[None, :], LEAK)
  q = p = rms_norm(params["embed"][tokens])
  p = p - kick(params["attention"], q, ctx)
  q = q + kicks.grad_T(params["mlp"], p, LEAK, lambda_min=0.05)
  logits = rms_norm(q)[:, :-1] @ params["head"]
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def _drawn(rng, specs):
  """Initial parameters by NumPy: random numbers of JAX would be the larger part of the programs below."""
  draw = lambda s: s.normal_std * rng.standard_normal(s.shape) if s.init == "normal" else s.draw(jax.random.key(0))
  return jax.tree.map(lambda spec: np.asarray(draw(spec), np.float32), specs, is_leaf=is_spec)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _train(loss, params, batches, rate: float):
  """Adam with a cosine, one step per batch: (params, losses). All parameters as one vector, which compiles fast."""
  start, tree_of = ravel_pytree(params)
  steps = len(batches)

  def step(carry, xs):
    x, mean, square = carry
    batch, i = xs
    value, gradient = jax.value_and_grad(lambda x: loss(tree_of(x), batch))(x)
    mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
    size = rate * (1 + jnp.cos(jnp.pi * i / steps)) / 2 / (1 - 0.9 ** (i + 1))
    x -= size * mean / (jnp.sqrt(square / (1 - 0.99 ** (i + 1))) + 1e-8)
    return (x, mean, square), value

  zero = jnp.zeros_like(start)
  (x, *_), losses = jax.lax.scan(step, (start, zero, zero), (batches, jnp.arange(steps, dtype=jnp.float32)))
  return tree_of(x), losses


@functools.cache
def leak_losses(name: str) -> np.ndarray:
  """Losses of 150 training steps, each on random tokens never seen before."""
  rng = np.random.default_rng(0)
  params = _drawn(rng, kicks.kick_specs(LEAK))
  params["attention"]["gate"] = params["attention"]["gate"] + np.float32(0.5)
  params["embed"] = rng.standard_normal((SYMBOLS, LEAK.n_embd), np.float32)
  params["head"] = params["embed"].T / 4
  tokens = rng.integers(0, SYMBOLS, (150, 32, LEAK.seq_len), np.int32)
  return np.asarray(_train(functools.partial(_leak_loss, kick=KICKS[name][1]), params, tokens, 0.02)[1])


def leak_lines() -> str:
  lines = []
  for name, size in influences().items():
    loss = leak_losses(name)[-20:].mean()
    verdict = "leaks" if loss < np.log(SYMBOLS) - LEAK_MARGIN else "does not leak"
    future = np.max(size[kick_claims.T :])
    lines.append(f"    symplectic {name:<16}{future:9.2g} from later tokens  {loss:8.3f} nats  {verdict}")
  return "\n".join(lines)


def _text_loss(params, tokens):
  before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
  return gpt.loss(params, {"tokens": before, "targets": tokens}, TEXT)[0]


@jax.jit
def _bits_per_byte(params, rows):
  batch = {"tokens": jnp.pad(rows, ((0, 0), (1, 0)))[:, :-1], "targets": rows}
  return jnp.mean(gpt.nll(params, batch, TEXT)) / np.log(2)


def compression(key) -> str:
  """Trains on Python's own source, compresses bytes that were held out, and decodes random bits."""
  text = np.frombuffer(inspect.getsource(argparse).encode("ascii", "replace"), np.uint8).astype(np.int32)
  train, held_out = text[:-HELD_OUT], text[-HELD_OUT:]
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  windows = rng.integers(0, len(train) - TEXT.seq_len, (200, 12, 1)) + np.arange(TEXT.seq_len)
  params, _ = _train(_text_loss, _drawn(rng, gpt.specs(TEXT)), train[windows], 0.01)
  entropy = float(_bits_per_byte(params, held_out.reshape(-1, TEXT.seq_len)))
  archive = compress.compress(params, held_out, TEXT, start=0)
  restored = compress.decompress(params, archive, TEXT, start=0)
  exact = "every byte comes back" if np.array_equal(restored, held_out) else "NOT every byte comes back"
  noise = bits.Tape.random(HELD_OUT // TEXT.seq_len // compress.ROWS_PER_LANE, 1024, np.random.default_rng(0))
  sample = compress.decode_tokens(params, noise, HELD_OUT, TEXT, start=0)[: 2 * TEXT.seq_len]
  shown = bytes(sample.astype(np.uint8)).decode(errors="replace")
  return f"""\
    {HELD_OUT:,} bytes become {len(archive):,}: {8 * len(archive) / HELD_OUT:.3f} bits per byte with headers, \
cross-entropy {entropy:.3f}; {exact}
    the same decoder on random bits: {shown!r}"""
