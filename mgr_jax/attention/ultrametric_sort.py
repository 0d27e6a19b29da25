"""LCP attention with hard digits and trees of any size: per level, running sums of the balls that occur.

Σ_s α^lcp λ^(t-s) v_s = Σ_d c_d·S_d(t), S_d(t) the sum over earlier keys in the depth-d ball of query t. Inside a chunk
pairs are compared directly, earlier chunks are one table row per ball. Summing along a sorted order instead would make
the rounding of row t depend on where later tokens sort. O(K·T·(log T + D)) time without gradient, O(T·D) memory.

The gradient of the digits is the local straight-through estimator: deeper agreement is ignored, so that

    dA_j(t)[i] = c_j Σ_{s<=t} E_ts λ^(t-s) 1[first j-1 digits agree] 1[digit_j(k_s) = i],  E_ts = <u_t, v_s> + w_t,

and likewise for keys. It costs p reads per token and level.
"""

import functools

import jax
import jax.numpy as jnp

from mgr_jax.attention import ultrametric_balls as balls
from mgr_jax.attention.ultrametric_chunks import decay_gradient, split, with_ones
from mgr_jax.attention.ultrametric_digits import class_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def ball_attention(a_BGRKpT, b_BGKpT, c_GR, v_BTGD, log_decay_G, segment_ids_BT, chunk: int):
  """Like `ultrametric_features.tree_attention`, for one-hot digits, with the local gradient."""
  return forward(a_BGRKpT, b_BGKpT, c_GR, v_BTGD, log_decay_G, segment_ids_BT, chunk)[0]


class _Case:
  """The flattened problem: Z = B·G rows of N chunks; padding has ball number E, which no table holds."""

  def __init__(self, a, b, c, v_BTGD, log_decay, segment_ids, chunk):
    self.B, self.G, self.R, self.K, self.p, self.T = a.shape
    self.Z, self.chunk, self.n_chunk = self.B * self.G, chunk, -(-self.T // chunk)
    self.E = (self.R + 1) * self.T
    query = jnp.moveaxis(class_of(a), -2, -1).reshape(self.Z, self.R * self.T, self.K)
    key = jnp.moveaxis(class_of(b), -2, -1).reshape(self.Z, self.T, self.K)
    self.digits = jnp.concatenate([key, query], 1)
    document = jnp.zeros((self.B, self.T), jnp.int32)
    if segment_ids is not None:
      document = jnp.cumsum(jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0))), -1, dtype=jnp.int32)
    document = jnp.repeat(document, self.G, axis=0)
    self.numbers = balls.ball_numbers(self.digits, jnp.tile(document, (1, self.R + 1)), self.p)
    self.log_decay = None if log_decay is None else jnp.tile(log_decay, self.B)
    self.c = jnp.tile(c, (self.B, 1, 1))
    self.v = self.cut(with_ones(v_BTGD).swapaxes(1, 2).reshape(self.Z, self.T, -1))
    token = jnp.arange(chunk)
    self.lag = token[:, None] - token
    self.times = jnp.arange(self.n_chunk * chunk, dtype=jnp.int32).reshape(self.n_chunk, chunk)

  def cut(self, x, axis=1, fill=0):
    """Tokens at `axis` into chunks: [Z, T, ...] -> [N, Z, c, ...]."""
    return split(x, axis, self.chunk, self.n_chunk, fill)

  def join(self, x):
    """[N, Z, ..., c, X] -> [Z, ..., T, X]."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., : self.T, :]

  def events(self, x_ZE, fill):
    """Key part [N, Z, c] and query part [N, Z, R, c] of an array over events."""
    queries = x_ZE[:, self.T :].reshape(self.Z, self.R, self.T)
    return self.cut(x_ZE[:, : self.T], 1, fill), self.cut(queries, 2, fill)

  def pairs(self, query_NZRc, key_NZc):
    """λ^(t-s) where token s of the chunk is not after t and in its ball, else 0: [N, Z, R, c, c]."""
    same = (query_NZRc[..., :, None] == key_NZc[:, :, None, None, :]) & (self.lag >= 0)
    return same * self.powers

  @property
  def powers(self):
    if self.log_decay is None:
      return jnp.float32(1)
    return jnp.exp(self.log_decay[:, None, None, None] * jnp.maximum(self.lag, 0))

  def sweep(self, nodes, values, readers, use, reverse=False):
    """Scans the chunks: at each, `use` of what was written before it to the balls `readers`; then the chunk writes.

    Args:
      nodes, values: [N, Z, m] and [N, Z, m, D + 1], m a multiple of c, written after the chunk was read.
      readers: [N, Z, n, ...] numbers, n a multiple of c.
      use: maps (rows [Z, n, ..., D + 1], chunk number) to what is returned, stacked over N.
      reverse: chunks and times run backwards.
    """
    sign = -1 if reverse else 1
    edge = 0 if reverse else -1

    def step(table, xs):
      i, nodes, values, readers = xs
      time = sign * self.times[i]
      at = lambda x: jnp.broadcast_to(jnp.tile(time, x.shape[1] // self.chunk), x.shape[:2])
      now = at(readers).reshape(*readers.shape[:2], *[1] * (readers.ndim - 2))
      found = use(balls.read(table, readers, now, self.log_decay), i)
      end = jnp.broadcast_to(time[edge], (self.Z,))
      return balls.write(table, nodes, values, at(nodes), end, self.log_decay), found

    table = balls.empty(self.Z, self.E, self.v.shape[-1], self.log_decay is not None, self.v.dtype)
    xs = (jnp.arange(self.n_chunk), nodes, values, readers)
    return jax.lax.scan(step, table, xs, reverse=reverse)[1]

  def flat(self, x_NZRc):
    return x_NZRc.reshape(self.n_chunk, self.Z, -1, *x_NZRc.shape[4:])


def forward(a, b, c, v_BTGD, log_decay, segment_ids, chunk):
  """y [B, G, R, T, D] and the normaliser [B, G, R, T, 1]."""
  case = _Case(a, b, c, v_BTGD, log_decay, segment_ids, chunk)

  def level(total, xs):
    number, c_ZR = xs
    key, query = case.events(number, case.E)
    near = jnp.einsum("nzrts,nzsd->nzrtd", case.pairs(query, key), case.v)
    far = case.sweep(key, case.v, case.flat(query), lambda rows, i: rows)
    return total + c_ZR[:, :, None, None] * (near + far.reshape(near.shape)), None

  start = jnp.zeros((case.n_chunk, case.Z, case.R, chunk, case.v.shape[-1]), case.v.dtype)
  total, _ = jax.lax.scan(level, start, (case.numbers, jnp.moveaxis(case.c, -1, 0)))
  total = case.join(total).reshape(case.B, case.G, case.R, case.T, -1)
  return total[..., :-1] / total[..., -1:], total[..., -1:]


def _forward_rule(a, b, c, v, log_decay, segment_ids, chunk):
  y, mass = forward(a, b, c, v, log_decay, segment_ids, chunk)
  return y, (a, b, c, v, log_decay, segment_ids, y, mass)


def _backward_rule(chunk, saved, d_y):
  a, b, c, v, log_decay, segment_ids, y, mass = saved
  case = _Case(a, b, c, v, log_decay, segment_ids, chunk)
  u = d_y / mass
  g = jnp.concatenate([u, -jnp.sum(u * y, -1, keepdims=True)], -1).reshape(case.Z, case.R, case.T, -1)
  g = case.cut(g, 2)
  d_pair = jnp.einsum("nzrtd,nzsd->nzrts", g, case.v)

  def d_values(total, xs):
    number, c_ZR = xs
    key, query = case.events(number, case.E)
    weighted = c_ZR[:, :, None, None] * g
    near = jnp.einsum("nzrts,nzrtd->nzsd", case.pairs(query, key), weighted)
    far = case.sweep(case.flat(query), case.flat(weighted), key, lambda rows, i: rows, reverse=True)
    return total + near + far, None

  levels = (case.numbers, jnp.moveaxis(case.c, -1, 0))
  d_v, _ = jax.lax.scan(d_values, jnp.zeros_like(case.v), levels)

  def d_digits(_, xs):
    parent, number, digit, c_ZR = xs
    (key, query), (key_digit, query_digit) = case.events(number, case.E), case.events(digit, -1)
    key_parent, query_parent = case.events(parent, case.E)
    classes = jnp.arange(case.p)
    key_class, query_class = ((x[..., None] == classes).astype(case.v.dtype) for x in (key_digit, query_digit))
    table = balls.children(parent, digit, number, case.p)
    below = functools.partial(_children_of, case, table)
    pair = d_pair * case.pairs(query_parent, key_parent)
    queries, keys = case.flat(g), case.v
    near = jnp.einsum("nzrts,nzsp->nzrtp", pair, key_class)
    far = case.sweep(
      key, case.v, below(case.flat(query_parent)), lambda rows, i: jnp.sum(rows * queries[i][:, :, None], -1)
    )
    d_a = near + far.reshape(near.shape)
    weighted = c_ZR[:, :, None, None] * g
    near = jnp.einsum("nzrts,nzrtp->nzsp", c_ZR[:, :, None, None] * pair, query_class)
    far = case.sweep(
      case.flat(query),
      case.flat(weighted),
      below(key_parent),
      lambda rows, i: jnp.sum(rows * keys[i][:, :, None], -1),
      reverse=True,
    )
    d_c = jnp.sum(d_a * query_class, (0, 3, 4)), jnp.sum(d_a, (0, 3, 4))
    return None, (case.join(c_ZR[:, :, None, None] * d_a), case.join(near + far), d_c)

  numbers, c_levels = levels
  xs = (numbers[:-1], numbers[1:], jnp.moveaxis(case.digits, -1, 0), c_levels[1:])
  _, (d_a, d_b, (d_c, d_parent)) = jax.lax.scan(d_digits, None, xs)
  d_c = jnp.concatenate([d_parent[:1], d_c]).reshape(-1, case.B, case.G, case.R)
  d_v = case.join(d_v).reshape(case.B, case.G, case.T, -1)
  d_decay = None if log_decay is None else decay_gradient(with_ones(v).swapaxes(1, 2), d_v)
  shape = lambda x, like: jnp.moveaxis(x, (0, -1), (-3, -2)).reshape(like.shape)
  d_values = d_v[..., :-1].swapaxes(1, 2).astype(v.dtype)
  return shape(d_a, a), shape(d_b, b), jnp.moveaxis(jnp.sum(d_c, 1), 0, -1), d_values, d_decay, None


def _children_of(case, table_Zp, parent_NZm):
  """Numbers [N, Z, m, p] of the balls below; padding has none."""
  index = parent_NZm[..., None] * case.p + jnp.arange(case.p)
  row = jnp.arange(case.Z)[None, :, None, None]
  return table_Zp.at[row, index].get(mode="fill", fill_value=case.E)


ball_attention.defvjp(_forward_rule, _backward_rule)
