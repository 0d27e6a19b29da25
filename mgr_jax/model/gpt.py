"""A decoder-only transformer as pure functions over PyTrees.

Pre-norm blocks with gain-free RMS norm, norm after the embedding and before the head, no biases, untied embedding and
head, zero-initialised output projections and head, softcapped logits. Parameters are float32:
`{"embed": [V, C], "head": [C, V], "runs": (per-run stacked layers, ...)}`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mgr_jax.attention import Context
from mgr_jax.attention.mechanism import rms_norm, rope_tables
from mgr_jax.config import GPTConfig
from mgr_jax.flops import Cost
from mgr_jax.model import annealing, stack
from mgr_jax.model.cross_entropy import capped_logits, chunk_size, cross_entropy, token_nll
from mgr_jax.model.rows import by_rows
from mgr_jax.params import FLOAT32_ROLES, ParamSpec, init_params, is_spec


def specs(cfg: GPTConfig):
  """The parameter table of the whole model."""
  return {
    "embed": ParamSpec((cfg.padded_vocab, cfg.n_embd), ("vocab", "embed"), role="embedding", std=1.0),
    "head": ParamSpec((cfg.n_embd, cfg.padded_vocab), ("embed", "vocab"), role="head", init="zeros"),
    "runs": stack.specs(cfg),
  }


def init(key: jax.Array, cfg: GPTConfig):
  """Draws float32 parameters; every leaf's key is folded from its path."""
  return init_params(key, specs(cfg))


def cast(params, cfg: GPTConfig):
  """Matrices and tables in the compute dtype, scalars in float32; differentiable, so gradients come back in float32."""
  cast = lambda spec, p: p if spec.role in FLOAT32_ROLES else p.astype(cfg.compute_dtype)
  return jax.tree.map(cast, specs(cfg), params, is_leaf=is_spec)


def positions_in_documents(segment_ids_BT: jax.Array) -> jax.Array:
  """Position of each token since its document began, int32 [B, T]."""
  index = jnp.arange(segment_ids_BT.shape[1])
  border = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  start = jnp.where(jnp.pad(border, ((0, 0), (1, 0))), index, 0)
  return index - jax.lax.cummax(start, axis=1)


def context(positions_BT: jax.Array, cfg: GPTConfig, **fields) -> Context:
  """The context of one call: positions and what is computed once for all layers."""
  rope = rope_tables(positions_BT, cfg.head_dim, cfg.rope_base)
  return Context(positions_BT, shared={"rope": rope}, **fields)


def embed(params, tokens: jax.Array, cfg: GPTConfig) -> jax.Array:
  """Normalised embeddings in the compute dtype, the input of the stack."""
  return rms_norm(params["embed"][tokens].astype(cfg.compute_dtype))


def hidden(params, tokens_BT: jax.Array, cfg: GPTConfig, segment_ids=None, annealed=None, probe: bool = False):
  """Normalised activations before the head, [B, T, C] in the compute dtype, and `aux`. `params` already cast."""
  if segment_ids is None:
    positions = jnp.arange(tokens_BT.shape[1])[None, :]
  else:
    positions = positions_in_documents(segment_ids)
  ctx = context(positions, cfg, segment_ids_BT=segment_ids, annealed=annealed or {}, probe=probe)
  x, aux = stack.forward(params["runs"], embed(params, tokens_BT, cfg), ctx, cfg)
  return rms_norm(x), aux


def forward(params, tokens_BT: jax.Array, cfg: GPTConfig, segment_ids=None, annealed=None, probe: bool = False):
  """Logits of the next token at every position.

  Args:
    tokens_BT: int32 ids below `cfg.vocab_size`.
    segment_ids: int32 [B, T] document numbers; documents of one row then do not see each other.
    annealed: live values of annealed options, see `model.annealing`; without them options stand at their first value.
    probe: also return the mechanisms' diagnostics.

  Returns:
    (logits_BTV float32, aux). Materialises B·T·V logits; training uses `loss`, which does not.
  """
  params = cast(params, cfg)
  x, aux = hidden(params, tokens_BT, cfg, segment_ids, annealed, probe)
  logits = capped_logits(x, params["head"], cfg.logit_softcap, cfg.padded_vocab)
  return logits[..., : cfg.vocab_size], aux


def loss(params, batch, cfg: GPTConfig, normalizer=None, annealed=None):
  """Weighted mean negative log-likelihood in nats per token, plus `aux_loss` of the mechanisms.

  Args:
    batch: dict with `tokens`, `targets` int32 [B, T]; optional `weights` float32 [B, T]; `segment_ids`, used when
      `cfg.doc_mask` is set.
    normalizer: divides the weighted sum; the batch's own weight by default. Gradient accumulation passes the weight of
      the whole accumulated batch, which makes micro-batch gradients add up exactly.

  Returns:
    (loss, metrics) with `nll_sum`, `weight` and `aux_loss`, float32 scalars, and `readings` for annealed options.
  """
  params = cast(params, cfg)
  segment_ids = batch["segment_ids"] if cfg.doc_mask else None
  x, aux = hidden(params, batch["tokens"], cfg, segment_ids, annealed)
  weights = batch.get("weights")
  weights = jnp.ones(x.shape[:2], jnp.float32) if weights is None else weights
  weight = jnp.sum(weights)
  normalizer = jnp.maximum(weight, 1.0) if normalizer is None else normalizer

  def summed(head, x, ctx):
    targets, weights = (a.reshape(-1) for a in ctx)
    chunk = chunk_size(len(targets), cfg.padded_vocab, cfg.loss_chunk)
    x = x.reshape(-1, cfg.n_embd)
    return (), cross_entropy(x, head, targets, weights, cfg.logit_softcap, cfg.vocab_size, chunk)

  _, nll = by_rows(summed, params["head"], x, (batch["targets"], weights / normalizer), jnp.sum)
  metrics = {"nll_sum": nll * normalizer, "weight": weight, "aux_loss": aux["aux_loss"]}
  metrics["readings"] = annealing.readings(aux, cfg)
  return nll + aux["aux_loss"], metrics


def nll(params, batch, cfg: GPTConfig, annealed=None) -> jax.Array:
  """Negative log-likelihood of every target in nats, float32 [B, T]; for evaluation, without gradient."""
  params = cast(params, cfg)
  segment_ids = batch["segment_ids"] if cfg.doc_mask else None
  x, _ = hidden(params, batch["tokens"], cfg, segment_ids, annealed)

  def of_rows(head, x, targets):
    chunk = chunk_size(targets.size, cfg.padded_vocab, cfg.loss_chunk)
    flat = x.reshape(-1, cfg.n_embd), head, targets.reshape(-1)
    return token_nll(*flat, cfg.logit_softcap, cfg.vocab_size, chunk).reshape(targets.shape), ()

  return by_rows(of_rows, params["head"], x, batch["targets"])[0]


@struct.dataclass
class DecodeState:
  """Per-row number of tokens consumed, int32 [B], and one stacked mechanism state per run."""

  length_B: jax.Array
  runs: tuple


def init_state(cfg: GPTConfig, batch: int, max_len: int) -> DecodeState:
  """An empty decode state for at most `max_len` tokens per row."""
  return DecodeState(jnp.zeros((batch,), jnp.int32), stack.init_state(cfg, batch, max_len))


def decode(params, tokens_Bt: jax.Array, state: DecodeState, cfg: GPTConfig, valid_Bt=None):
  """Consumes t >= 1 new tokens per row; a long first piece is the prefill.

  Args:
    valid_Bt: `False` marks right padding, which leaves the row's state and length as they were; its logits are
      meaningless.

  Returns:
    (logits_BtV float32, state); equal to `forward` on the whole prefix at the same positions.
  """
  params = cast(params, cfg)
  t = tokens_Bt.shape[1]
  positions = state.length_B[:, None] + jnp.arange(t)
  ctx = context(positions, cfg, valid_BT=valid_Bt)
  x, run_states = stack.step(params["runs"], embed(params, tokens_Bt, cfg), state.runs, ctx, cfg)
  logits = capped_logits(rms_norm(x), params["head"], cfg.logit_softcap, cfg.padded_vocab)
  consumed = t if valid_Bt is None else jnp.sum(valid_Bt, -1, dtype=jnp.int32)
  return logits[..., : cfg.vocab_size], DecodeState(state.length_B + consumed, run_states)


def cost(cfg: GPTConfig, T: int | None = None) -> Cost:
  """Forward cost per token at context T (default `cfg.seq_len`): blocks and head, the real vocabulary."""
  head = Cost(matmul=2.0 * cfg.n_embd * cfg.vocab_size, exp=2.0 * cfg.vocab_size)
  return stack.cost(cfg, cfg.seq_len if T is None else T) + head
