"""LCP attention in linear time: y_t = Σ_{s<=t} κ_ts λ^(t-s) v_s / Σ_{s<=t} κ_ts λ^(t-s) with κ = E[α^lcp].

Inside a chunk the kernel is evaluated pair by pair; what lies before is one sum per leaf of the digit tree (linear
attention: Katharopoulos et al., 2020, arXiv 2006.16236). All chunks of a block run as one batch. Arrays of a block are
[N, B, G, ...]: chunk number, batch, key/value head; R query heads share a key/value head, digits are [..., K, p, c].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra import padic_kernel
from mgr_jax.attention.ultrametric_chunks import decay_gradient, join, links, running, split, with_ones

# Feature values per batch row and head that one block may hold; a longer sequence is scanned block by block.
BLOCK_FEATURES = 2**14


class Inputs(NamedTuple):
  """Digits of queries [N, B, G, R, K, p, c] and keys [N, B, G, K, p, c]; values with a column of ones [.., c, D+1]."""

  a: jax.Array
  b: jax.Array
  v: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def tree_attention(a_BGRKpT, b_BGKpT, c_GR, v_BTGD, log_decay_G, segment_ids_BT, chunk: int):
  """LCP attention of a whole sequence.

  Args:
    a_BGRKpT, b_BGKpT: digit probabilities of queries and keys.
    c_GR: level weights [G, R, K + 1].
    log_decay_G: logarithms of the recency decay, or `None`.
    segment_ids_BT: documents, or `None`.

  Returns:
    y [B, G, R, T, D], float32. O(T·(p^K + chunk)·D) time, O(T·(D + p^K·D/chunk)) memory. The gradient is closed form.
  """
  return forward(a_BGRKpT, b_BGKpT, c_GR, v_BTGD, log_decay_G, segment_ids_BT, chunk)[0]


class _Plan(NamedTuple):
  chunk: int
  n_chunk: int
  n_block: int

  @property
  def per_block(self) -> int:
    return self.n_chunk // self.n_block


def _plan(T: int, leaves: int, chunk: int) -> _Plan:
  n_chunk = -(-T // chunk)
  n_block = -(-n_chunk // max(1, BLOCK_FEATURES // (leaves * chunk)))
  return _Plan(chunk, -(-n_chunk // n_block) * n_block, n_block)


def _inputs(a, b, v_BTGD, plan: _Plan) -> Inputs:
  cut = lambda x, axis: split(x, axis, plan.chunk, plan.n_chunk)
  return Inputs(cut(a, 5), cut(b, 4), cut(with_ones(v_BTGD).swapaxes(1, 2), 2))


def _scan(body, carry, xs, plan: _Plan, reverse: bool = False):
  """`body` over blocks; leaves of `xs` with a leading 1 belong to every chunk."""
  if plan.n_block == 1:
    return body(carry, xs)
  full = lambda x: jnp.broadcast_to(x, (plan.n_chunk, *x.shape[1:]))
  blocks = jax.tree.map(lambda x: full(x).reshape(plan.n_block, plan.per_block, *x.shape[1:]), xs)
  carry, out = jax.lax.scan(body, carry, blocks, reverse=reverse)
  return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _times(x, factor):
  return x if factor is None else x * factor


def _read(psi, state):
  return jnp.einsum("nbgrft,nbgfd->nbgrtd", psi, state)


def forward(a, b, c, v, log_decay, segment_ids, chunk):
  """y, the normaliser, and the sums before each chunk (`None` when there is only one)."""
  T = v.shape[1]
  leaves = b.shape[-2] ** b.shape[-3]
  plan = _plan(T, leaves, chunk)
  link = links(log_decay, segment_ids, plan.chunk, plan.n_chunk)
  inputs = _inputs(a, b, v, plan)

  def block(state, xs):
    inputs, link = xs
    weight = padic_kernel.kernel_tile(inputs.a, inputs.b[:, :, :, None], c) * link.pair
    out = jnp.einsum("nbgrts,nbgsd->nbgrtd", weight, inputs.v)
    if plan.n_chunk == 1:
      return state, (out, None)
    phi = _times(padic_kernel.key_features(inputs.b), link.write)
    states, state = running(jnp.einsum("nbgfs,nbgsd->nbgfd", phi, inputs.v), link.carry, state)
    psi = _times(padic_kernel.query_features(inputs.a, c), link.read)
    return state, (out + _read(psi, states), states)

  start = jnp.zeros((*inputs.b.shape[1:3], leaves, inputs.v.shape[-1]), inputs.v.dtype)
  _, (out, states) = _scan(block, start, (inputs, link), plan)
  out = join(out, 3, T)
  mass = out[..., -1:]
  return out[..., :-1] / mass, mass, states


def _forward_rule(a, b, c, v, log_decay, segment_ids, chunk):
  y, mass, states = forward(a, b, c, v, log_decay, segment_ids, chunk)
  return y, (a, b, c, v, log_decay, segment_ids, y, mass, states)


def _backward_rule(chunk, saved, d_y):
  """With u = dy/mass, w = -<u, y> and E_ts = <u_t, v_s> + w_t: dκ = E∘λ^(t-s), and the same through the leaf sums."""
  a, b, c, v, log_decay, segment_ids, y, mass, states = saved
  T = v.shape[1]
  plan = _plan(T, b.shape[-2] ** b.shape[-3], chunk)
  link = links(log_decay, segment_ids, plan.chunk, plan.n_chunk)
  u = d_y / mass
  g = jnp.concatenate([u, -jnp.sum(u * y, -1, keepdims=True)], -1)
  inputs = _inputs(a, b, v, plan)

  def block(d_state, xs):
    inputs, link, g, states = xs
    weight = padic_kernel.kernel_tile(inputs.a, inputs.b[:, :, :, None], c) * link.pair
    d_weight = jnp.einsum("nbgrtd,nbgsd->nbgrts", g, inputs.v) * link.pair
    phi = padic_kernel.key_features(inputs.b)
    psi = padic_kernel.query_features(inputs.a, c)
    d_v = jnp.einsum("nbgrts,nbgrtd->nbgsd", weight, g)
    d_psi = jnp.einsum("nbgrts,nbgfs->nbgrft", d_weight, phi)
    d_phi = jnp.einsum("nbgrts,nbgrft->nbgfs", d_weight, psi)
    if plan.n_chunk > 1:
      d_read = jnp.einsum("nbgrft,nbgrtd->nbgfd", _times(psi, link.read), g)
      d_states, d_state = running(d_read, link.carry, d_state, reverse=True)
      d_v += jnp.einsum("nbgfs,nbgfd->nbgsd", _times(phi, link.write), d_states)
      d_psi += _times(jnp.einsum("nbgrtd,nbgfd->nbgrft", g, states), link.read)
      d_phi += _times(jnp.einsum("nbgsd,nbgfd->nbgfs", inputs.v, d_states), link.write)
    d_a, d_c = padic_kernel.query_features_pullback(inputs.a, c, d_psi)
    return d_state, (d_a, padic_kernel.key_features_pullback(inputs.b, d_phi), d_v, jnp.sum(d_c, (1, 5)))

  start = jnp.zeros((*inputs.b.shape[1:3], b.shape[-2] ** b.shape[-3], inputs.v.shape[-1]), inputs.v.dtype)
  xs = (inputs, link, split(g, 3, plan.chunk, plan.n_chunk), states)
  _, (d_a, d_b, d_v, d_c) = _scan(block, start, xs, plan, reverse=True)
  d_v = join(d_v, 2, T)
  d_decay = None if log_decay is None else decay_gradient(with_ones(v).swapaxes(1, 2), d_v)
  d_values = d_v[..., :-1].swapaxes(1, 2).astype(v.dtype)
  return join(d_a, 5, T), join(d_b, 4, T), jnp.sum(d_c, 0), d_values, d_decay, None


tree_attention.defvjp(_forward_rule, _backward_rule)
