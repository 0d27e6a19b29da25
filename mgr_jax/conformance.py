"""Conformance claims: what every mechanism must satisfy, built from its record and a configuration alone.

Each claim runs a tiny copy of the model with the same attention pattern. All parameters get noise, so that
zero-initialised output projections hide nothing.
"""

import dataclasses
import functools

import jax
import numpy as np

from mgr_jax.attention import REGISTRY, model_problems
from mgr_jax.claims import Claim, claim, largest_difference, relative_difference, worst_of
from mgr_jax.config import GPTConfig, Item, parse_attention
from mgr_jax.model import gpt, stack
from mgr_jax.params import ParamSpec, fold_in_name
from mgr_jax.problems import raise_if_any

VOCAB = 97
# Tokens of the claims that need no more than a few; several tiles of the fast implementations hold LONG.
SHORT, LONG = 21, 150


def tiny(cfg: GPTConfig, seq_len: int = SHORT, n_layer: int | None = None) -> GPTConfig:
  """The same attention pattern at toy size: at most two query heads per key/value head, of size 8.

  Heads have size 12 or 24 where the pattern needs that, as blocks of three or six channels do.
  """
  pattern = len(parse_attention(cfg.attention))
  n_head = 2 * min(2, cfg.n_head // cfg.n_kv_head)
  for head_dim in (8, 12, 24):
    small = dataclasses.replace(
      cfg,
      vocab_size=VOCAB,
      seq_len=seq_len,
      n_layer=n_layer or max(pattern, 1),
      n_head=n_head,
      n_kv_head=2,
      n_embd=n_head * head_dim,
      mlp_ratio=2.0,
      compute_dtype="float32",
      remat="none",
      loss_chunk=0,
    )
    if not model_problems(small):
      break
  return small


def _rng(key: jax.Array, name: str) -> np.random.Generator:
  """NumPy noise: drawing many small arrays through JAX would cost a compilation per shape."""
  return np.random.default_rng(np.asarray(jax.random.key_data(fold_in_name(key, name))))


def noisy_params(key: jax.Array, cfg: GPTConfig):
  """Parameters distributed as the initial ones plus N(0, 0.1²), so that no path through the model is switched off."""
  rng = _rng(key, "parameters")

  def draw(spec: ParamSpec) -> np.ndarray:
    if spec.init == "normal":
      initial = spec.normal_std * rng.standard_normal(spec.shape, np.float32)
    else:
      initial = np.asarray(spec.draw(jax.random.fold_in(key, int(rng.integers(2**31)))))
    return initial + 0.1 * rng.standard_normal(spec.shape, np.float32)

  def draw_tree(specs):
    return jax.tree.map(draw, specs, is_leaf=gpt.is_spec)

  def draw_run(run: stack.Run):
    drawn = [draw_tree(stack.layer_specs(cfg, run)) for _ in range(run.n_param_layer)]
    return jax.tree.map(lambda *layers: np.stack(layers), *drawn)

  return draw_tree(gpt.specs(cfg) | {"runs": ()}) | {"runs": tuple(draw_run(run) for run in stack.runs(cfg))}


def tokens_of(key: jax.Array, batch: int, length: int) -> np.ndarray:
  """Uniform random token ids, int32."""
  return _rng(key, "tokens").integers(0, VOCAB, (batch, length), np.int32)


@functools.partial(jax.jit, static_argnums=2)
def _logits(params, tokens, cfg):
  return gpt.forward(params, tokens, cfg)[0]


@functools.partial(jax.jit, static_argnums=(2, 4))
def _decode(params, tokens, cfg, state, padded=False, valid=None):
  return gpt.decode(params, tokens, state, cfg, valid if padded else None)


@functools.partial(jax.jit, static_argnums=4)
def _value_and_gradient(params, tokens, segment_ids, cotangent, cfg):
  """Logits and the gradient of <logits, cotangent>: one random direction that exercises every output."""
  logits, pull = jax.vjp(lambda p: gpt.forward(p, tokens, cfg, segment_ids=segment_ids)[0], params)
  return logits, pull(cotangent)[0]


def _training_logits(params, tokens, cfg):
  """The logits of the program that also computes gradients."""
  return _value_and_gradient(params, tokens, None, np.zeros((*tokens.shape, VOCAB), np.float32), cfg)[0]


def _leaky(logits_fn):
  """A non-causal model: the forward pass over the sequence read backwards."""
  return lambda params, tokens, cfg: np.asarray(logits_fn(params, tokens[:, ::-1], cfg))[:, ::-1]


def causal_values(cfg: GPTConfig, logits_fn):
  """Largest change of any logit before position j when the tokens from j on are replaced; 0 is exact causality."""

  def measure(key, scale):
    worst = 0.0
    for case in range(scale):
      key_case = jax.random.fold_in(key, case)
      params = noisy_params(key_case, cfg)
      tokens = tokens_of(key_case, 2, cfg.seq_len)
      other = tokens_of(fold_in_name(key_case, "other"), 2, cfg.seq_len)
      before = np.asarray(logits_fn(params, tokens, cfg))
      for j in sorted({1, cfg.seq_len // 3, cfg.seq_len - 2} - {0, -1}):
        after = np.asarray(logits_fn(params, np.concatenate([tokens[:, :j], other[:, j:]], 1), cfg))
        worst = worst_of(worst, largest_difference(after[:, :j], before[:, :j]))
    return worst

  return measure


def causal_gradient(cfg: GPTConfig, reverse: bool = False):
  """Largest gradient that outputs before a border send to inputs behind it (must be 0); infinite when none flows back.

  Tokens on the two sides of the border come from two halves of the vocabulary, so that their embeddings tell which
  inputs a gradient reached. `reverse` measures the model that reads the sequence backwards.
  """

  def measure(key, scale):
    del scale
    T, border = cfg.seq_len, cfg.seq_len // 2
    past = np.arange(T) < border
    half = VOCAB // 2
    tokens = tokens_of(key, 2, T) % half + np.where(past, 0, half).astype(np.int32)
    cotangent = past[:, None] * _rng(key, "cotangent").standard_normal((2, T, VOCAB), np.float32)
    _, gradient = _value_and_gradient(noisy_params(key, cfg), tokens, None, cotangent, cfg)
    size = np.max(np.abs(np.asarray(gradient["embed"])), -1)
    reached, forbidden = np.max(size[:half]), np.max(size[half:])
    if reverse:
      reached, forbidden = forbidden, reached
    return float(forbidden) if reached > 1e-8 else float("inf")

  return measure


def prefix_consistency(cfg: GPTConfig, broken: bool = False):
  """Largest difference between f(x[:t]) and f(x)[:t]; catches any use of the total length."""

  def measure(key, scale):
    del scale
    T, t = cfg.seq_len, SHORT
    params, tokens = noisy_params(key, cfg), tokens_of(key, 2, T)
    whole, part = map(np.asarray, (_training_logits(params, tokens, cfg), _logits(params, tokens[:, :t], cfg)))
    return largest_difference(part / np.sqrt(t) ** broken, whole[:, :t] / np.sqrt(T) ** broken)

  return measure


def decode_parity(cfg: GPTConfig, broken: bool = False):
  """Largest difference between `forward` and `decode`, fed rows of different length in pieces, at every position."""

  def measure(key, scale):
    del scale
    T = min(cfg.seq_len, SHORT)
    params, tokens = noisy_params(key, cfg), tokens_of(key, 2, T)
    whole = np.asarray(_logits(params, tokens, cfg))
    # Two pieces of which the rows disagree on how much is real, then single tokens: padding must leave no trace.
    piece = T // 2 - 2
    logits, state, at = None, gpt.init_state(cfg, 2, T), np.zeros(2, int)
    worst = 0.0
    for lengths in (np.array([piece, piece - 3]), np.array([piece - 4, piece - 3])):
      new = np.stack([np.pad(tokens[row, at[row] : at[row] + n], (0, piece - n)) for row, n in enumerate(lengths)])
      valid = np.arange(piece) < (piece if broken else lengths[:, None])
      logits, state = _decode(params, new, cfg, state, True, np.broadcast_to(valid, (2, piece)))
      logits = np.asarray(logits)
      for row, n in enumerate(lengths):
        worst = worst_of(worst, largest_difference(logits[row, :n], whole[row, at[row] : at[row] + n]))
      at += lengths
    while at.max() < T:
      logits, state = _decode(params, tokens[np.arange(2), at][:, None], cfg, state)
      logits = np.asarray(logits)
      worst = worst_of([worst] + [largest_difference(logits[row, 0], whole[row, at[row]]) for row in range(2)])
      at += 1
    return worst

  return measure


def packed_documents(cfg: GPTConfig, broken: bool = False):
  """Largest difference between packed documents and the same documents alone: logits, and relative gradients."""

  def measure(key, scale):
    del scale
    T, cut = cfg.seq_len, cfg.seq_len // 3
    params, tokens = noisy_params(key, cfg), tokens_of(key, 2, T)
    cotangent = _rng(key, "cotangent").standard_normal((2, T, VOCAB), np.float32)
    segments = np.tile(np.where(np.arange(T) < (0 if broken else cut), 1, 2).astype(np.int32), (2, 1))
    packed, packed_grad = jax.device_get(_value_and_gradient(params, tokens, segments, cotangent, cfg))
    # A document alone, followed by padding that causality makes irrelevant.
    fill = lambda a: np.pad(a, [(0, 0), (0, T - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
    alone = [
      jax.device_get(_value_and_gradient(params, fill(tokens[:, part]), None, fill(cotangent[:, part]), cfg))
      for part in (slice(cut), slice(cut, None))
    ]
    (first, first_grad), (second, second_grad) = alone
    return worst_of(
      largest_difference(packed[:, :cut], first[:, :cut]),
      largest_difference(packed[:, cut:], second[:, : T - cut]),
      relative_difference(packed_grad, jax.tree.map(np.add, first_grad, second_grad)),
    )

  return measure


def grouped_heads(cfg: GPTConfig, broken: bool = False):
  """Largest difference between grouped key/value heads and the same heads repeated for every query head."""

  def measure(key, scale):
    del scale
    grouped = dataclasses.replace(cfg, n_head=4, n_kv_head=2, n_embd=4 * cfg.head_dim)
    repeated = dataclasses.replace(grouped, n_kv_head=4)
    params, tokens = noisy_params(key, grouped), tokens_of(key, 2, SHORT)
    axes = jax.tree.map(lambda spec: spec.axes, gpt.specs(grouped), is_leaf=gpt.is_spec)

    def expand(p, names):
      if "kv_heads" not in names:
        return p
      axis = names.index("kv_heads")
      uneven = p + 0.1 * np.cos(np.arange(p.size)).reshape(p.shape) if broken else p
      return np.stack([p, uneven], axis + 1).reshape(*p.shape[:axis], -1, *p.shape[axis + 1 :])

    wide = jax.tree.map(expand, params, axes)
    return largest_difference(_logits(params, tokens, grouped), _logits(wide, tokens, repeated))

  return measure


def reference_pattern(attention: str) -> str:
  """The grammar with `impl=reference` forced on every item, and `backward=autodiff` on every reversible stack."""

  def force(item: Item) -> Item:
    wrapper = REGISTRY[item.name].wrapper
    forced = ("backward", "autodiff") if wrapper else ("impl", "reference")
    options = tuple(o for o in item.options if o[0] != forced[0])
    return Item(item.name, (*options, forced), force(item.inner or Item("standard")) if wrapper else None)

  return ",".join(str(force(item)) for item in parse_attention(attention))


def fast_equals_reference(cfg: GPTConfig, broken: bool = False):
  """Largest difference of fast and reference implementation: logits absolute, parameter gradients relative."""
  reference = dataclasses.replace(cfg, attention=reference_pattern(cfg.attention))

  def measure(key, scale):
    del scale
    params, tokens = noisy_params(key, cfg), tokens_of(key, 2, cfg.seq_len)
    cotangent = _rng(key, "cotangent").standard_normal((2, cfg.seq_len, VOCAB), np.float32)
    other = jax.tree.map(lambda p: p * 1.01, params) if broken else params
    fast, fast_grad = _value_and_gradient(other, tokens, None, cotangent, cfg)
    slow, slow_grad = _value_and_gradient(params, tokens, None, cotangent, reference)
    return worst_of(largest_difference(fast, slow), relative_difference(fast_grad, slow_grad))

  return measure


def quick_claims(cfg: GPTConfig) -> tuple[Claim, ...]:
  """Exact causality and decode parity of `cfg`'s attention pattern on a tiny copy: seconds, for every training run."""
  return _causality_and_decoding(cfg.attention, tiny(cfg), _logits)


def _causality_and_decoding(name: str, small: GPTConfig, logits_fn) -> tuple[Claim, ...]:
  return (
    claim(
      f"{name}.causal_values",
      "logits before j do not change, bit for bit, when tokens from j on are replaced",
      causal_values(small, logits_fn),
      0.0,
      causal_values(small, _leaky(logits_fn)),
    ),
    claim(
      f"{name}.decode_parity",
      "decoding in pieces, rows of different length, gives the logits of the whole forward pass at every position",
      decode_parity(small),
      1e-4,
      decode_parity(small, broken=True),
    ),
  )


def conformance_claims(cfg: GPTConfig, seq_len: int = LONG) -> tuple[Claim, ...]:
  """All conformance claims of `cfg`'s attention pattern on a tiny copy with `seq_len` tokens.

  They share seven compiled programs, because compilation is nearly all of their cost: the training pass (alone, with
  packed documents, and of the reference), the short forward pass (and with repeated heads), and two decode steps.
  """
  small = tiny(cfg, seq_len)
  name = cfg.attention
  return (
    *_causality_and_decoding(name, small, _training_logits),
    claim(
      f"{name}.causal_gradient",
      "∂ output_t / ∂ input_s = 0 for every s > t, and not for all s < t",
      causal_gradient(small),
      0.0,
      causal_gradient(small, reverse=True),
    ),
    claim(
      f"{name}.prefix_consistency",
      "f(x[:t]) = f(x)[:t]",
      prefix_consistency(small),
      1e-4,
      prefix_consistency(small, broken=True),
    ),
    claim(
      f"{name}.packed_documents",
      "packed documents equal separate documents, in value and gradient",
      packed_documents(small),
      5e-4,
      packed_documents(small, broken=True),
    ),
    claim(
      f"{name}.grouped_heads",
      "grouped key/value heads equal the same heads repeated",
      grouped_heads(small),
      1e-4,
      grouped_heads(small, broken=True),
    ),
    claim(
      f"{name}.fast_equals_reference",
      "the fast implementation equals the reference in value and gradient, over several tiles",
      fast_equals_reference(small),
      5e-4,
      fast_equals_reference(small, broken=True),
    ),
  )


def claims_of(attention: str) -> tuple[Claim, ...]:
  """Everything that is claimed of an attention pattern: its mechanisms' own mathematics, then the conformance claims.

  Each claim stands once. Raises `UserError` for what the grammar does not know.

  >>> "standard.decode_parity" in [c.name for c in claims_of("standard")]
  True
  """
  cfg = GPTConfig(vocab_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, attention=attention)
  raise_if_any(model_problems(cfg))
  contract = conformance_claims(cfg)
  items = [part for item in parse_attention(attention) for part in (item, item.inner) if part]
  own = [c for name in dict.fromkeys(item.name for item in items) for c in REGISTRY[name].claims]
  return tuple({c.name: c for c in (*own, *contract)}.values())
