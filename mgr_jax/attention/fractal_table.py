"""The memory as a table: one row [v, 1] per node of the address tree, read with φ(q) and written with φ(k).

sum:        M_t = γ M_{t-1} + φ(k_t) [v_t, 1]ᵀ            o_t = φ(q_t)ᵀ M_t, γ = e^{-slope}
overwrite:  M_t = (1 - u_t) ∘ M_{t-1} + u_t [v_t, 1]ᵀ,    u_t = min(g_t φ(k_t), 0.99)

The first is linear attention with the features φ (Katharopoulos et al., 2020, arXiv 2006.16236), hence equal to the
pairwise sum of overlaps; the second is gated linear attention with a decay per leaf (Yang et al., 2023, arXiv
2312.06635; the chunk scheme with logarithms, not its kernel). Tables are [B, K, G, L, D+1] with G = 1, or one table per
query head of a key/value head where slopes differ. Queries are [B, K, R, T, L], keys [B, K, T, L].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_routing import table_features, write_features
from mgr_jax.attention.tiles import pad_to, padded_length

CHUNK = 128
ERASE_CHUNK = 16  # 16 times -log(1 - MAX_WRITE) = 74 stays below the exponent range of float32, 87.
MAX_WRITE = 0.99

_exact = functools.partial(jnp.einsum, precision="highest")


class Sides(NamedTuple):
  """What a table is read and written with: addresses q [B, K, R, T, ·] and k [B, K, T, ·], values v [B, K, T, D]; where
  they apply α [K, depth+1], slopes [K, G] and write gates [B, K, T]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  alpha_K: jax.Array | None = None
  slope_KG: jax.Array | None = None
  gate_BKT: jax.Array | None = None


def with_ones(v: jax.Array) -> jax.Array:
  """[v, 1] in float32 (or wider)."""
  v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
  return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def read(table, q_BKRTL) -> jax.Array:
  """φ(q)ᵀ M [B, K, R, T, D+1]."""
  B, K, G = table.shape[:3]
  out = _exact("bkgxl,bkgle->bkgxe", q_BKRTL.reshape(B, K, G, -1, q_BKRTL.shape[-1]), table)
  return out.reshape(*q_BKRTL.shape[:4], -1)


def empty_table(batch: int, n_kv_head: int, groups: int, nodes: int, head_dim: int, dtype=jnp.float32) -> jax.Array:
  """A table without a write."""
  return jnp.zeros((batch, n_kv_head, groups, nodes, head_dim + 1), dtype)


class Chunk(NamedTuple):
  """One chunk of every per-token input. `real` is 1 at tokens, 0 at padding; `document` is -1 without documents."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  gate: jax.Array | None
  real: jax.Array
  document: jax.Array


def chunk_size(T: int) -> int:
  """Tokens per chunk: 128, or fewer for a short sequence."""
  return min(CHUNK, padded_length(T, ERASE_CHUNK))


def cut_chunks(sides: Sides, segment_ids_BT, valid_BT, size: int) -> Chunk:
  """All inputs cut into chunks, chunk axis first."""
  B, _, T, _ = sides.v.shape
  length = padded_length(T, size)
  real = jnp.ones((B, T), sides.q.dtype) if valid_BT is None else valid_BT.astype(sides.q.dtype)
  document = jnp.full((B, T), -1) if segment_ids_BT is None else segment_ids_BT
  no_document = -1 if segment_ids_BT is None else -2

  def cut(x, axis, value=0):
    x = pad_to(x, length, axis, value)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

  gate = None if sides.gate_BKT is None else cut(sides.gate_BKT, 2)
  q, k, v = cut(sides.q, 3), cut(sides.k, 2), cut(sides.v, 2)
  return Chunk(q, k, v, gate, cut(real, 1), cut(document, 1, no_document))


def _rows(mask_BT):
  """A mask or factor per token of a row, shaped for [B, K, T, L]."""
  return mask_BT[:, None, :, None]


def last_document(chunk: Chunk, document_B):
  """The document of a chunk's last real token [B], or the one before the chunk where it has none."""
  count = jnp.sum(chunk.real, 1).astype(jnp.int32)
  last = jnp.take_along_axis(chunk.document, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
  return jnp.where(count > 0, last, document_B)


def table_overwrite(sides: Sides, table, opts: Options, segment_ids_BT=None, valid_BT=None):
  """Rule `overwrite` with soft addresses for T more tokens. Returns (o_BKRTE, table), E = D+1; the
  last column of o is the mass.

  Blocks of 16 tokens: inside, pairs are weighted by Σ_w φ(q_i)_w e^{c_i - c_j} u_j with c the running sum of log(1-u)
  since the block began; nothing before that is needed, so both factors stay in range and no later token takes part.
  T·L·(16 + 2·D) multiply-adds per head.
  """
  B, K, T, D = sides.v.shape
  R = sides.q.shape[2]
  if table is None:
    table = empty_table(B, K, 1, opts.nodes, D, sides.q.dtype)
  chunks = cut_chunks(sides, segment_ids_BT, valid_BT, chunk_size(T))
  alpha = sides.alpha_K

  # One checkpoint per chunk of 128 tokens, features and tables of its blocks are formed again.
  @jax.checkpoint
  def chunk_step(carry, chunk):
    def cut(x, axis):
      return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, ERASE_CHUNK, *x.shape[axis + 1 :]), axis, 0)

    axes = Chunk(3, 2, 2, 2, 1, 1)
    blocks = Chunk(*(cut(x, axis) for x, axis in zip(chunk, axes, strict=True)))
    return jax.lax.scan(functools.partial(_erase_block, opts, alpha), carry, blocks)

  start = (table[:, :, 0], chunks.document[0, :, 0])
  (table, _), out = jax.lax.scan(chunk_step, start, chunks)
  out = out.reshape(-1, *out.shape[2:])
  return jnp.moveaxis(out, 0, 3).reshape(B, K, R, -1, D + 1)[:, :, :, :T], table[:, :, None]


def write_strength(keys, gate) -> jax.Array:
  """u = min(gφ, 0.99): the share of a leaf that a write replaces."""
  return jnp.minimum(gate * keys, MAX_WRITE)


def _erase_block(opts, alpha, carry, block: Chunk):
  table, document = carry
  last = last_document(block, document)
  queries = table_features(block.q, opts, alpha)
  written = write_strength(table_features(block.k, opts), block.gate[..., None]) * _rows(block.real)
  kept = jnp.cumsum(jnp.log1p(-written), axis=2)
  values = with_ones(block.v)
  position = jnp.arange(kept.shape[2])
  same = (block.document[:, :, None] == block.document[:, None]) & (position[:, None] >= position)
  queries = queries * jnp.exp(kept)[:, :, None]
  weight = _exact("bkrtl,bksl->bkrts", queries, written * jnp.exp(-kept))
  weight = jnp.where(same[:, None, None], weight, 0.0)
  past = queries * _rows((block.document == document[:, None]).astype(table.dtype))[:, :, None]
  out = _exact("bkrts,bkse->bkrte", weight, values) + _exact("bkrtl,bkle->bkrte", past, table)
  end = kept[:, :, -1:]
  fresh = written * jnp.exp(end - kept) * _rows((block.document == last[:, None]).astype(table.dtype))
  passes = (last == document).astype(table.dtype)[:, None, None, None]
  table = passes * jnp.exp(end).swapaxes(2, 3) * table + _exact("bktl,bkte->bkle", fresh, values)
  return (table, last), out


def token_by_token(sides: Sides, table, opts: Options, read_nodes, segment_ids_BT=None, valid_BT=None):
  """The obvious form of both rules: one token at a time, write then read.

  Args:
    read_nodes: `(table_BKGLE, q_BKR·) -> o_BKRE`, what a query makes of the table.
  """
  B, K, T, D = sides.v.shape
  if table is None:
    groups = 1 if sides.slope_KG is None else sides.slope_KG.shape[1]
    table = empty_table(B, K, groups, opts.nodes, D, sides.q.dtype)
  document = jnp.zeros((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
  starts = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
  valid = jnp.ones((B, T), bool) if valid_BT is None else valid_BT

  def step(table, xs):
    q, k, v, gate, start, real = xs
    per_row = lambda x: x[:, None, None, None, None]
    keys, row = write_features(k, opts)[:, :, None, :, None], with_ones(v)[:, :, None, None, :]
    if opts.rule == "overwrite":
      strength = keys if opts.address == "hard" else write_strength(keys, gate[..., None, None, None])
      kept = 1 - strength
    else:
      strength = keys
      kept = 1.0 if sides.slope_KG is None else jnp.exp(-sides.slope_KG)[:, :, None, None]
    written = kept * jnp.where(per_row(start), 0.0, table) + strength * row
    table = jnp.where(per_row(real), written, table)
    return table, read_nodes(table, q)

  by_token = lambda x, axis: None if x is None else jnp.moveaxis(x, axis, 0)
  xs = (
    by_token(sides.q, 3),
    by_token(sides.k, 2),
    by_token(sides.v, 2),
    by_token(sides.gate_BKT, 2),
    starts.T,
    valid.T,
  )
  table, out = jax.lax.scan(step, table, xs)
  return jnp.moveaxis(out, 0, 3), table
