"""Rule `sum` for long sequences: pairs inside chunks of 128 tokens, a table of leaves between them.

With i = 0 .. C-1 counting inside a chunk, γ = e^{-slope}, and M the table before the chunk,

  o_i = Σ_{j≤i} γ^{i-j} K_ij [v_j, 1] + γ^{i+1} φ(q_i)ᵀ M        M' = γ^C M + Σ_i φ(k_i) (γ^{C-1-i} [v_i, 1])ᵀ.

Per head T·(C·(Σ f + D)/2 + 2·L·D) multiply-adds. The gradient is in closed form, last chunk first, with dM in the role
of M; it keeps the tables at the chunk borders, and forms joint features again from the addresses.
"""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.attention.fractal_groups import map_groups
from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_overlap import Pairs
from mgr_jax.attention.fractal_routing import table_features
from mgr_jax.attention.fractal_table import Chunk, Sides, chunk_size, cut_chunks, empty_table, last_document, with_ones
from mgr_jax.attention.fractal_table import read as read_table
from mgr_jax.attention.fractal_tiles import features, forward_tiles, gradient_tiles, slope_gradient

_exact = functools.partial(jnp.einsum, precision="highest")


def table_sum(sides: Sides, segment_ids_BT, opts: Options) -> jax.Array:
  """o [B, K, R, T, D+1] of a whole sequence; the last column is the mass."""
  return _table_sum(sides._replace(gate_BKT=None), segment_ids_BT, opts)


def continue_sum(sides: Sides, table, opts: Options, segment_ids_BT=None, valid_BT=None):
  """`table_sum` for T more tokens after those in `table`. Returns (o_BKRTE, table)."""
  chunks = cut_chunks(sides._replace(gate_BKT=None), segment_ids_BT, valid_BT, chunk_size(sides.v.shape[2]))
  out, (table, _), _ = _forward_chunks(chunks, table, sides.alpha_K, sides.slope_KG, opts, segment_ids_BT is not None)
  return _join(out, sides.v.shape[2]), table


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _table_sum(sides, segment_ids_BT, opts):
  return _fwd_rule(sides, segment_ids_BT, opts)[0]


def _cells(sides, opts):
  return sides.q.shape[2] * chunk_size(sides.v.shape[2]) * opts.nodes


def _fwd_rule(sides, segment_ids, opts):
  T = sides.v.shape[2]

  def group(tokens, heads, segment_ids):
    part = Sides(*tokens, *heads)
    chunks = cut_chunks(part, segment_ids, None, chunk_size(T))
    groups = 1 if part.slope_KG is None else part.slope_KG.shape[1]
    empty = empty_table(*part.v.shape[:2], groups, opts.nodes, part.v.shape[3], chunks.real.dtype)
    out, _, borders = _forward_chunks(chunks, empty, *heads, opts, segment_ids is not None)
    return (_join(out, T), jnp.moveaxis(borders, 0, 2)), ()

  tokens, heads = (sides.q, sides.k, sides.v), (sides.alpha_K, sides.slope_KG)
  (out, borders), _ = map_groups(group, _cells(sides, opts), tokens, heads, segment_ids)
  return out, (sides, segment_ids, out, borders)


def _join(out, T):
  """[n, B, K, R, C, E] to [B, K, R, T, E]."""
  out = jnp.moveaxis(out, 0, 3)
  return out.reshape(*out.shape[:3], -1, out.shape[-1])[:, :, :, :T]


def _forward_chunks(chunks: Chunk, table, alpha_K, slope_KG, opts, documents: bool):
  """(o by chunk, (last table, its document), tables before each chunk)."""

  def step(carry, chunk):
    table, document = carry
    to_read, to_write, passes, last = _factors(chunk, document, slope_KG)
    pairs = Pairs(*features(chunk.q, chunk.k, alpha_K, opts), slope_KG)
    inside, mass = forward_tiles(pairs, chunk.v, chunk.document if documents else None, _prefix(opts))
    past = read_table(table, table_features(chunk.q, opts, alpha_K)) * to_read[..., None]
    rows = to_write[..., None] * with_ones(chunk.v)[:, :, None]
    new = passes[..., None] * table + _exact("bktl,bkgte->bkgle", table_features(chunk.k, opts), rows)
    return (new, last), (jnp.concatenate([inside, mass[..., None]], -1) + past, table)

  end, (out, borders) = jax.lax.scan(step, (table, chunks.document[0, :, 0]), chunks)
  return out, end, borders


def _prefix(opts):
  return opts.kernel == "prefix"


def _factors(chunk: Chunk, document_B, slope_KG):
  """What a read [B, K, G, C], a write [B, K, G, C] and the table itself [B, K, G, 1] are multiplied by, and the last
  document; documents other than the table's read nothing, and only the last one writes."""
  last = last_document(chunk, document_B)
  dtype = chunk.real.dtype
  to_read = (chunk.document == document_B[:, None]).astype(dtype)[:, None, None]
  to_write = (chunk.real * (chunk.document == last[:, None]))[:, None, None]
  passes = (last == document_B).astype(dtype)[:, None, None, None]
  if slope_KG is None:
    return to_read, to_write, passes, last
  slope, position = slope_KG[..., None], jnp.arange(chunk.real.shape[1], dtype=dtype)
  count = jnp.sum(chunk.real, 1)[:, None, None, None]
  to_read = to_read * jnp.exp(-slope * (position + 1))
  to_write = to_write * jnp.exp(-slope * jnp.maximum(count - 1 - position, 0))
  return to_read, to_write, passes * jnp.exp(-slope * count), last


def _bwd_rule(opts, saved, d_out):
  sides, segment_ids, out, borders = saved

  def group(tokens, heads, segment_ids):
    *given, out, d_out, borders = tokens
    part = Sides(*given, *heads)
    T = part.v.shape[2]
    chunks = cut_chunks(part, segment_ids, None, chunk_size(T))
    d_chunks = cut_chunks(part._replace(q=d_out), segment_ids, None, chunk_size(T)).q
    dq, dk, d_values, d_alpha = _gradient_chunks(
      chunks, d_chunks, jnp.moveaxis(borders, 2, 0), *heads, opts, segment_ids is not None
    )
    d_values = jnp.moveaxis(d_values, 0, -2)
    d_values = d_values.reshape(*d_values.shape[:-2], -1)[..., :T]
    d_slope = None
    if part.slope_KG is not None:
      d_slope = slope_gradient(jnp.sum(d_out * out, -1), d_values, part.v)
    dv = jnp.sum(d_values, 2)[:, :, :-1].swapaxes(2, 3).astype(part.v.dtype)
    return (_join(dq, T), _join(dk[:, :, :, None], T)[:, :, 0], dv), (d_alpha, d_slope)

  tokens, heads = (sides.q, sides.k, sides.v, out, d_out, borders), (sides.alpha_K, sides.slope_KG)
  d_tokens, d_heads = map_groups(group, _cells(sides, opts), tokens, heads, segment_ids)
  return Sides(*d_tokens, *d_heads), None


_table_sum.defvjp(_fwd_rule, _bwd_rule)


def _gradient_chunks(chunks: Chunk, d_out, borders, alpha_K, slope_KG, opts, documents: bool):
  """By chunk: gradients of the addresses of both sides and of [v, 1] under each slope [n, B, K, G, D+1, C]; of α."""
  first = chunks.document[:1, :, 0]
  # Without padding in between, the document before a chunk is that of the token before it.
  before = jnp.concatenate([first, chunks.document[:-1, :, -1]])

  def step(carry, xs):
    d_table, d_alpha = carry
    chunk, d_out, table, document = xs
    to_read, to_write, passes, _ = _factors(chunk, document, slope_KG)
    G = d_table.shape[2]
    grouped = lambda x: x.reshape(*x.shape[:2], G, -1, x.shape[-1])

    queries, to_query = jax.vjp(lambda q, alpha: table_features(q, opts, alpha), chunk.q, alpha_K)
    d_read = grouped(d_out * to_read[..., None])
    d_queries = _exact("bkgxe,bkgle->bkgxl", d_read, table).reshape(queries.shape)
    d_before = passes[..., None] * d_table + _exact("bkgxl,bkgxe->bkgle", grouped(queries), d_read)
    dq, d_alpha_past = to_query(d_queries)

    keys, to_key = jax.vjp(lambda k: table_features(k, opts), chunk.k)
    rows = to_write[..., None] * with_ones(chunk.v)[:, :, None]
    (dk,) = to_key(_exact("bkgte,bkgle->bktl", rows, d_table))
    d_values = to_write[..., None, :] * _exact("bktl,bkgle->bkget", keys, d_table)

    pairs, to_addresses = jax.vjp(functools.partial(features, opts=opts), chunk.q, chunk.k, alpha_K)
    dq_pairs, dk_pairs, d_values_inside, _ = gradient_tiles(
      Pairs(*pairs, slope_KG), chunk.v, chunk.document if documents else None, _prefix(opts), d_out
    )
    dq_inside, dk_inside, d_alpha_inside = to_addresses((dq_pairs, dk_pairs))
    d_alpha = jax.tree.map(lambda a, b, c: a + b + c, d_alpha, d_alpha_past, d_alpha_inside)
    return (d_before, d_alpha), (dq + dq_inside, dk + dk_inside, d_values + d_values_inside)

  start = jnp.zeros_like(borders[0]), jax.tree.map(jnp.zeros_like, alpha_K)
  (_, d_alpha), (dq, dk, d_values) = jax.lax.scan(step, start, (chunks, d_out, borders, before), reverse=True)
  return dq, dk, d_values, d_alpha
