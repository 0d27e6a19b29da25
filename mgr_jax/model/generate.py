"""Generation: one parallel prefill of the prompts, then one token per row and step inside a compiled loop.

Shapes are bucketed to powers of two and the sampling settings are traced, so a handful of compiled programs serves
every prompt. A row's randomness is folded from its own key and the position of the token, never from its batch mates.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.problems import Problem, raise_if_any

MIN_BUCKET = 16
STOP_MULTIPLE = 8  # stop tokens are padded to a multiple, so that one more seldom means another program
PREFILL_PIECE = 256  # bounds the logits of a prefill to B·256·V floats


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn. The repetition penalty acts first, the others in the order given here.

  Args:
    temperature: divides the logits; 0 takes the most probable token.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: of these, keep the fewest most probable tokens that together have probability `top_p`
      (Holtzman et al., 2020, arXiv 1904.09751); 1 keeps all.
    min_p: of these, keep tokens with at least `min_p` times the probability of the most probable one
      (Nguyen et al., 2024, arXiv 2407.01082); 0 keeps all.
    repetition_penalty: r > 0; logits z of tokens that occurred become z/r where positive and z·r where negative
      (Keskar et al., 2019, arXiv 1909.05858); 1 changes nothing.

  Raises:
    UserError: with every value that is out of range.
  """

  temperature: float = 0.8
  top_k: int = 50
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    rules = (
      ("temperature", 0 <= self.temperature < np.inf, "negative or not finite", "0 (most probable token) or 0.8"),
      ("top_k", self.top_k >= 0, "negative", "0 (all tokens) or 50"),
      ("top_p", 0 < self.top_p <= 1, "not in (0, 1]", "1 (all tokens) or 0.95"),
      ("min_p", 0 <= self.min_p <= 1, "not in [0, 1]", "0 (all tokens) or 0.05"),
      ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "not positive", "1 (no penalty) or 1.2"),
    )
    raise_if_any(
      Problem(f"--{name}={getattr(self, name)} is {what}", f"use --{name}={values.replace(' or ', f' or --{name}=')}")
      for name, ok, what, values in rules
      if not ok
    )

  def traced(self) -> dict[str, np.generic]:
    """The settings as typed scalars, so that other values need no other program."""
    kinds = {"top_k": np.int32}
    return {f.name: kinds.get(f.name, np.float32)(getattr(self, f.name)) for f in dataclasses.fields(self)}


@struct.dataclass
class GenerationState:
  """What a batch of rows needs to go on.

  Attributes:
    model: the decode state of the model.
    logits_BV: float32 logits of each row's next token.
    position_B: int32 index of the next token in the row's text; seeds its randomness.
    seen_BV: tokens that occurred in the row.
    last_B: int32 token each row took last; -1 before the first.
    done_B: rows that took a stop token.
  """

  model: gpt.DecodeState
  logits_BV: jax.Array
  position_B: jax.Array
  seen_BV: jax.Array
  last_B: jax.Array
  done_B: jax.Array


def bucket(n: int) -> int:
  """The smallest power of two that is at least `n` and 16: the lengths that programs are compiled for."""
  return max(MIN_BUCKET, 1 << (n - 1).bit_length())


def row_keys(key: jax.Array, n_rows: int) -> jax.Array:
  """One key per row, fold_in(key, row)."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(n_rows))


@functools.partial(jax.jit, static_argnames=("cfg", "max_len"))
def prefill(params, tokens_BT: jax.Array, valid_BT: jax.Array, cfg: GPTConfig, max_len: int) -> GenerationState:
  """Consumes prompts of different length at once.

  Args:
    tokens_BT: int32 prompts, right-padded to a power of two.
    valid_BT: `False` at padding; every row has at least one `True`.
    max_len: tokens per row that the state can hold, prompt included; at least T.

  Returns:
    The state after each row's last real token. Compiled once per (B, T, max_len); costs one forward pass over B·T
    tokens.
  """
  B, T = tokens_BT.shape
  rows, piece = jnp.arange(B), min(T, PREFILL_PIECE)

  def consume(carry, xs):
    state, logits_BV = carry
    tokens, valid = xs
    piece_logits, state = gpt.decode(params, tokens, state, cfg, valid)
    count = jnp.sum(valid, -1)
    new = piece_logits[rows, jnp.maximum(count - 1, 0)]
    return (state, jnp.where(count[:, None] > 0, new, logits_BV)), None

  in_pieces = lambda a: a.reshape(B, T // piece, piece).swapaxes(0, 1)
  start = gpt.init_state(cfg, B, max_len), jnp.zeros((B, cfg.vocab_size), jnp.float32)
  (model, logits_BV), _ = jax.lax.scan(consume, start, (in_pieces(tokens_BT), in_pieces(valid_BT)))
  seen = jnp.zeros((B, cfg.vocab_size), bool)
  seen = seen.at[rows[:, None], jnp.where(valid_BT, tokens_BT, cfg.vocab_size)].set(True, mode="drop")
  none = jnp.full((B,), -1, jnp.int32)
  return GenerationState(model, logits_BV, model.length_B, seen, none, jnp.zeros((B,), bool))


def extend(
  params,
  state: GenerationState,
  keys_B: jax.Array,
  cfg: GPTConfig,
  n: int,
  sampling: Sampling,
  stop_tokens=(),
  limit: int | None = None,
):
  """Draws `limit` (default `n`) tokens for every row that has not stopped; ends early when all have.

  Args:
    state: from `prefill` or `extend`; donated, so the caller must not use it again.
    keys_B: one key per row, see `row_keys`; the token at position p is drawn with fold_in(key, p).
    n: size of the result, static.
    stop_tokens: ids that end a row. A row that has stopped repeats its stop token and leaves its state alone.
    limit: at most `n`, traced; columns from there on are meaningless.

  Returns:
    (ids_Bn int32, logprobs_Bn float32, state). A log-probability is the model's own, before any sampling setting.
    Compiled once per (B, state size, n).
  """
  stops = np.full(-(-max(1, len(stop_tokens)) // STOP_MULTIPLE) * STOP_MULTIPLE, -1, np.int32)
  stops[: len(stop_tokens)] = stop_tokens
  limit = np.int32(n if limit is None else limit)
  return _extend(params, state, keys_B, sampling.traced(), stops, limit, cfg=cfg, n=n)


@functools.partial(jax.jit, static_argnames=("cfg", "n"), donate_argnames=("state",))
def _extend(params, state, keys_B, sampling, stops, limit, *, cfg, n):
  def go_on(carry):
    i, state, *_ = carry
    return (i < limit) & ~jnp.all(state.done_B)

  def draw(carry):
    i, state, ids, logprobs = carry
    keys = jax.vmap(jax.random.fold_in)(keys_B, state.position_B)
    chosen = sample(keys, state.logits_BV, state.seen_BV, sampling)
    new = jnp.where(state.done_B, state.last_B, chosen)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(state.logits_BV), new[:, None], 1)[:, 0]
    live = ~state.done_B
    logits, model = gpt.decode(params, new[:, None], state.model, cfg, live[:, None])
    state = GenerationState(
      model=model,
      logits_BV=logits[:, 0],
      position_B=state.position_B + live,
      seen_BV=state.seen_BV.at[jnp.arange(len(new)), new].set(True),
      last_B=new,
      done_B=state.done_B | jnp.any(new[:, None] == stops, -1),
    )
    return i + 1, state, ids.at[:, i].set(new), logprobs.at[:, i].set(jnp.where(live, logprob, 0.0))

  B = state.last_B.shape[0]
  start = jnp.int32(0), state, jnp.zeros((B, n), jnp.int32), jnp.zeros((B, n), jnp.float32)
  drawn, state, ids, logprobs = jax.lax.while_loop(go_on, draw, start)
  return jnp.where(jnp.arange(n) < drawn, ids, state.last_B[:, None]), logprobs, state


def sample(keys_B: jax.Array, logits_BV: jax.Array, seen_BV: jax.Array, sampling) -> jax.Array:
  """One token per row, int32 [B], from `sampling` = `Sampling.traced()`; each row uses its own key alone."""
  penalty, temperature = sampling["repetition_penalty"], sampling["temperature"]
  penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  logits_BV = jnp.where(seen_BV, penalised, logits_BV)

  def draw():
    z = filter_logits(logits_BV, temperature, sampling["top_k"], sampling["top_p"], sampling["min_p"])
    return jax.vmap(jax.random.categorical)(keys_B, z)

  return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits_BV, -1)).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, temperature, top_k, top_p, min_p) -> jax.Array:
  """logits / temperature, with -inf at the tokens that `top_k`, then `top_p`, then `min_p` remove; see `Sampling`.

  Tokens as probable as the last one kept are kept too, so the result does not depend on the order of the vocabulary.
  All settings may be traced; temperature > 0. O(V) memory, without sorting.
  """
  keep = lambda z, threshold: jnp.where(z >= threshold, z, -jnp.inf)

  def k_largest(z):
    return keep(z, largest_threshold(z, jnp.ones_like(z), top_k))

  def nucleus(z):
    return keep(z, largest_threshold(z, jax.nn.softmax(z), top_p))

  z = logits_BV / temperature
  z = jax.lax.cond(top_k > 0, k_largest, lambda z: z, z)
  z = jax.lax.cond(top_p < 1, nucleus, lambda z: z, z)
  return keep(z, jnp.max(z, -1, keepdims=True) + jnp.log(min_p))


def largest_threshold(z_BV: jax.Array, weight_BV: jax.Array, target) -> jax.Array:
  """The largest t with Σ_{v: z_v ≥ t} w_v ≥ target, float32 [B, 1]; -inf where even the whole sum falls short.

  Radix selection: t is built bit by bit over the order-preserving integer image of float32, so 32 passes over z give
  the exact threshold.
  """
  bits = jax.lax.bitcast_convert_type(z_BV, jnp.uint32)
  top_bit = jnp.uint32(1 << 31)
  order = jnp.where(bits & top_bit, ~bits, bits | top_bit)

  def add_bit(i, t):
    candidate = t | (top_bit >> i.astype(jnp.uint32))
    reached = jnp.sum(jnp.where(order >= candidate, weight_BV, 0), -1, keepdims=True) >= target
    return jnp.where(reached, candidate, t)

  t = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((z_BV.shape[0], 1), jnp.uint32))
  threshold = jax.lax.bitcast_convert_type(jnp.where(t & top_bit, t ^ top_bit, ~t), jnp.float32)
  return jnp.where(t == 0, -jnp.inf, threshold)


def pad_prompts(prompt_BT, lengths=None) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, valid), both [B, bucket(longest)], from right-padded prompts and the number of real tokens in each row."""
  prompt = np.asarray(prompt_BT, np.int32)
  lengths = np.full(len(prompt), prompt.shape[1]) if lengths is None else np.asarray(lengths)
  longest = int(lengths.max())
  valid = np.arange(bucket(longest)) < lengths[:, None]
  tokens = np.pad(prompt[:, :longest], ((0, 0), (0, bucket(longest) - longest)))
  return np.where(valid, tokens, 0), valid


def generate(
  params,
  prompt_BT,
  cfg: GPTConfig,
  key: jax.Array,
  max_tokens: int,
  *,
  lengths=None,
  temperature: float = 0.8,
  top_k: int = 50,
  top_p: float = 1.0,
  min_p: float = 0.0,
  repetition_penalty: float = 1.0,
  stop_tokens=(),
) -> jax.Array:
  """Continues every prompt by `max_tokens` tokens.

  Args:
    prompt_BT: int32 [B, T] ids, right-padded when prompts differ in length.
    key: one key, from which row b gets fold_in(key, b); or an array of B keys. A row's ids depend on its prompt and
      its key only.
    lengths: [B] real tokens in each prompt, all T by default.
    temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; new values do not recompile.
    stop_tokens: ids that end a row; the loop ends when all rows have ended.

  Returns:
    ids int32 [B, max_tokens], without the prompt. A row that took a stop token repeats it to the end.
    Compiled once per batch size and powers of two above the prompt, the whole text and `max_tokens`.

  Raises:
    UserError: empty prompt, ids outside the vocabulary, more than `cfg.seq_len` tokens in all, bad settings.
  """
  sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
  prompt = np.asarray(prompt_BT)
  raise_if_any(prompt_problems(prompt, lengths, cfg, max_tokens))
  tokens, valid = pad_prompts(prompt, lengths)
  state = prefill(params, tokens, valid, cfg, bucket(int(valid.sum(1).max()) + max_tokens))
  keys = key if key.shape else row_keys(key, len(tokens))
  ids, _, _ = extend(params, state, keys, cfg, bucket(max_tokens), sampling, stop_tokens, limit=max_tokens)
  return ids[:, :max_tokens]


def prompt_problems(prompt_BT: np.ndarray, lengths, cfg: GPTConfig, max_tokens: int) -> list[Problem]:
  """Everything wrong with a batch of prompts."""
  if prompt_BT.ndim != 2 or not prompt_BT.size:
    return [Problem(f"the prompt has shape {prompt_BT.shape}", "give at least one row of at least one token")]
  B, T = prompt_BT.shape
  lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
  if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
    return [Problem(f"lengths={lengths.tolist()} do not fit prompts of shape {(B, T)}", f"give {B} numbers in 1..{T}")]
  found = []
  real = prompt_BT[np.arange(T) < lengths[:, None]]
  if real.min() < 0 or real.max() >= cfg.vocab_size:
    worst = int(real.min()) if real.min() < 0 else int(real.max())
    fix = "encode the prompt with the tokenizer of the run"
    found.append(Problem(f"prompt token {worst} is not in 0..{cfg.vocab_size - 1}", fix))
  if max_tokens < 1:
    found.append(Problem(f"max_tokens={max_tokens} is not positive", "ask for at least 1 token"))
  elif (total := int(lengths.max()) + max_tokens) > cfg.seq_len:
    room = cfg.seq_len - int(lengths.max())
    fix = f"use max_tokens={room} or less" if room > 0 else f"use a prompt of at most {cfg.seq_len - 1} tokens"
    found.append(
      Problem(
        f"prompt and continuation take {total} tokens ({int(lengths.max())} + {max_tokens}), the context is"
        f" {cfg.seq_len}",
        fix,
      )
    )
  return found
