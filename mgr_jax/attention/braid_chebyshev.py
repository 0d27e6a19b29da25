"""Additive sigmoid gates in linear time: σ(a+b) ≈ Σ_m ℓ_m(a) σ(x_m + b) at Chebyshev nodes x_m of [-M, M].

σ has its poles at ±iπ, so for |a| <= M and every b the error falls like ρ^-r, ρ = π/M + √(1 + π²/M²): 4e-8 at M = 4,
r = 24. The sum over past tokens is then linear attention (Katharopoulos et al., 2020, arXiv 2006.16236) with features
ℓ(a) and σ(x + b): a state [r, D+1] per key/value head, whose last column is the mass. Inside a chunk of 128 tokens the
gates stay exact. Cost T·(128·D + 4·r·D) FLOPs per head.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mgr_jax.algebra.additive_gate import chebyshev_features, chebyshev_nodes
from mgr_jax.attention.braid_gates import gated_sum, wide
from mgr_jax.attention.braid_scores import BOUNDED_ADDITIVE
from mgr_jax.attention.mechanism import group_heads, ungroup_heads
from mgr_jax.attention.tiles import pad_to, padded_length

CHUNK = 128


def interpolation_error(rank: int, bound: float) -> float:
  """2·ρ^-rank, above the measured max |σ(a+b) - Σ_m ℓ_m(a) σ(x_m+b)| (1.1 to 1.3 times ρ^-rank) in exact arithmetic."""
  ratio = math.pi / bound
  return 2 * (ratio + math.sqrt(1 + ratio**2)) ** -rank


def key_features(b: jax.Array, rank: int, bound: float) -> jax.Array:
  """σ(x_m + b) [..., rank]."""
  return jax.nn.sigmoid(b[..., None] + chebyshev_nodes(rank, bound).astype(b.dtype))


def with_ones(v: jax.Array) -> jax.Array:
  """[v, 1] in float32 (or wider): the extra column sums the gates themselves."""
  v = v.astype(wide(v.dtype))
  return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def read_state(a_BTH: jax.Array, state_BKME: jax.Array, bound: float) -> tuple[jax.Array, jax.Array]:
  """Gated sum [B, T, H, D] and mass [B, T, H] of the tokens inside the state, for every query alike."""
  B, T, H = a_BTH.shape
  K, rank = state_BKME.shape[1:3]
  features = chebyshev_features(a_BTH.reshape(B, T, K, H // K), rank, bound)
  out = jnp.einsum("btkrm,bkme->btkre", features, state_BKME).reshape(B, T, H, -1)
  return out[..., :-1], out[..., -1]


def write_state(state_BKME: jax.Array, b_BTK: jax.Array, v_BTKD: jax.Array, bound: float, valid_BT=None) -> jax.Array:
  """Adds the tokens to the state; padding leaves it as it was."""
  features = key_features(b_BTK, state_BKME.shape[2], bound)
  if valid_BT is not None:
    features = jnp.where(valid_BT[:, :, None, None], features, 0.0)
  return state_BKME + jnp.einsum("btkm,btke->bkme", features, with_ones(v_BTKD))


def chebyshev_gated_sum(a_BTH, b_BTK, v_BTKD, segment_ids_BT, rank: int, bound: float):
  """Σ_{j≤i} σ(a_i + b_j) v_j [B, T, H, D] and the mass [B, T, H], float32, within `interpolation_error` per gate."""
  T, K = b_BTK.shape[1:]
  length = padded_length(T, CHUNK)
  n_chunks = length // CHUNK
  fold = lambda x: pad_to(x, length, 1).reshape(-1, CHUNK, *x.shape[2:])
  a, b, v = group_heads(fold(a_BTH), K), group_heads(fold(b_BTK), K), fold(v_BTKD).swapaxes(1, 2)
  segments = None if segment_ids_BT is None else fold(segment_ids_BT)
  out, mass = gated_sum(BOUNDED_ADDITIVE, False, a, b, v, segments)
  if n_chunks > 1:
    by_chunk = lambda x: x.reshape(-1, n_chunks, *x.shape[1:])
    past = _past_chunks(
      by_chunk(a), by_chunk(b[:, :, 0]), with_ones(by_chunk(v)), _borders(segments, n_chunks), rank, bound
    )
    past = past.reshape(-1, *past.shape[2:])
    out, mass = out + past[..., :-1], mass + past[..., -1]
  unfold = lambda x: ungroup_heads(x).reshape(-1, length, *ungroup_heads(x).shape[2:])[:, :T]
  return unfold(out), unfold(mass)


def _borders(segments, n_chunks):
  """Which queries continue the document of the past, which keys the future continues, and which chunks pass it on.

  float32 masks [B, n, 1, C, 1] for queries (R axis inserted by the caller) and keys, and [B, n, 1, 1, 1].
  """
  if segments is None:
    return None
  segments = segments.reshape(-1, n_chunks, CHUNK)
  first = segments[:, :, :1]
  following = jnp.roll(first, -1, axis=1)
  shape = lambda mask: mask.astype(jnp.float32)[:, :, None, :, None]
  return shape(segments == first), shape(segments == following), shape(first == following)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _past_chunks(a_bnkrc, b_bnkc, v_bnkce, borders, rank: int, bound: float):
  """What the queries of each chunk collect from all earlier chunks, [b, n, k, r, c, e]."""
  return _past_forward(a_bnkrc, b_bnkc, v_bnkce, borders, rank, bound)


def _past_forward(a, b, v, borders, rank, bound):
  queries, keys, keep = _masked_features(a, b, borders, rank, bound)
  states = _exclusive_scan(jnp.einsum("bnkcm,bnkce->bnkme", keys, v), keep)
  return jnp.einsum("bnkrcm,bnkme->bnkrce", queries, states)


def _masked_features(a, b, borders, rank, bound):
  queries, keys = chebyshev_features(a, rank, bound), key_features(b, rank, bound)
  if borders is None:
    return queries, keys, None
  query_mask, key_mask, keep = borders
  return queries * query_mask[:, :, :, None], keys * key_mask, keep


def _exclusive_scan(x_bn, keep_bn, reverse: bool = False):
  """s_n with s_{n+1} = x_n + keep_n s_n and s_0 = 0 (reversed: s_{n-1} = x_n + keep_n s_n from the right)."""

  def step(state, xs):
    x, keep = xs
    return x + (state if keep is None else keep * state), state

  xs = jax.tree.map(lambda t: t.swapaxes(0, 1), (x_bn, keep_bn))
  return jax.lax.scan(step, jnp.zeros_like(x_bn[:, 0]), xs, reverse=reverse)[1].swapaxes(0, 1)


def _past_fwd_rule(a, b, v, borders, rank, bound):
  return _past_forward(a, b, v, borders, rank, bound), (a, b, v, borders)


def _past_bwd_rule(rank, bound, saved, d_out):
  """With future states Q_n = Σ_{i later} ℓ(a_i) dO_i: dV = σ Q, db = σ' <Q, V>, and da = ℓ <R', dO>.

  R' is the past state of σ' = σ(1-σ): interpolating σ' itself keeps full accuracy, differentiating ℓ would not.
  """
  a, b, v, borders = saved
  queries, keys, keep = _masked_features(a, b, borders, rank, bound)
  gate = key_features(b, rank, bound)
  slopes = keys * (1 - gate)
  future = _exclusive_scan(jnp.einsum("bnkrcm,bnkrce->bnkme", queries, d_out), keep, reverse=True)
  past_slopes = _exclusive_scan(jnp.einsum("bnkcm,bnkce->bnkme", slopes, v), keep)
  dv = jnp.einsum("bnkcm,bnkme->bnkce", keys, future)
  db = jnp.sum(slopes * jnp.einsum("bnkce,bnkme->bnkcm", v, future), -1)
  da = jnp.sum(queries * jnp.einsum("bnkrce,bnkme->bnkrcm", d_out, past_slopes), -1)
  return da, db, dv, jax.tree.map(jnp.zeros_like, borders)


_past_chunks.defvjp(_past_fwd_rule, _past_bwd_rule)
