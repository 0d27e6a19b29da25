"""Routing: every token chooses a path in the m-ary tree, one distribution over m branches per level.

The probability that two independent draws agree on all levels is Π_l <q_l, k_l> = <φ(q), φ(k)>, φ = ⊗_l p_l: m^depth
non-negative features that sum to one. Digits of one token lie in one axis, [..., depth·m], coarsest level first.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.attention.fractal_options import Options
from mgr_jax.params import ParamSpec

GROUP = 16  # Levels are compared in groups of at most this many joint branches: one product of inner size 16 each.

exact_einsum = functools.partial(jnp.einsum, precision="highest")


def router_specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """wr [K, D, depth, m] and br [K, depth, m], shared by queries and keys, so that both speak of the same tree."""
  K, D = cfg.n_kv_head, cfg.head_dim
  return {
    "wr": ParamSpec(
      (K, D, opts.depth, opts.m), ("kv_heads", "head_dim", None, None), role="scalar", std=cfg.head_dim**-0.5
    ),
    "br": ParamSpec((K, opts.depth, opts.m), ("kv_heads", None, None), role="scalar", init="zeros"),
  }


def digits(params, x, opts: Options) -> jax.Array:
  """softmax over branches of wr·x + br at every level, float32 [B, K, ..., T, depth·m].

  Args:
    x: [B, K, ..., T, D], RMS-normalised.
  """
  wr, br = params["wr"], params["br"]
  wide = jnp.promote_types(x.dtype, jnp.float32)
  logits = exact_einsum("bk...d,kdf->bk...f", x.astype(wide), wr.reshape(*wr.shape[:2], -1).astype(wide))
  logits += br.reshape(len(br), *[1] * (x.ndim - 3), -1).astype(wide)
  by_level = logits.reshape(*logits.shape[:-1], opts.depth, opts.m)
  top = jnp.repeat(jax.lax.stop_gradient(jnp.max(by_level, -1)), opts.m, axis=-1)
  unnormalised = jnp.exp(logits - top)
  # Sums over a level as a product with a 0/1 matrix: reductions over a short inner axis are slow on every backend.
  same_level = np.kron(np.eye(opts.depth), np.ones((opts.m, opts.m)))
  return unnormalised / jnp.matmul(unnormalised, same_level.astype(wide), precision="highest")


def address(p: jax.Array, opts: Options) -> jax.Array:
  """What is compared: (1-ε)p + ε/m, or one-hot choices whose gradient is that of log p of the chosen branch."""
  if opts.address == "soft":
    return (1 - opts.floor_eps) * p + opts.floor_eps / opts.m
  chosen = jax.nn.one_hot(choices(p, opts), opts.m, dtype=p.dtype).reshape(p.shape)
  # Divided by itself the chosen probability is exactly one, and only it has a gradient: unchosen branches would need
  # the sums of all neighbouring leaves.
  return chosen * (p / jax.lax.stop_gradient(p))


def choices(p: jax.Array, opts: Options) -> jax.Array:
  """The most likely branch of every level, int32 [..., depth]."""
  return jnp.argmax(p.reshape(*p.shape[:-1], opts.depth, opts.m), -1).astype(jnp.int32)


def confidence(p: jax.Array, opts: Options) -> jax.Array:
  """Π_{j≤l} of the chosen digits of a hard address for l = 1 .. depth: ones that carry the gradient [..., depth]."""
  chosen = jnp.sum(p.reshape(*p.shape[:-1], opts.depth, opts.m), -1)
  return jnp.cumprod(chosen, -1)


def node_ids(choice: jax.Array, opts: Options) -> list[jax.Array]:
  """Index of the chosen node within each level 0 .. depth, Σ_j i_j m^{l-j}: the leaf's is the last."""
  ids = [jnp.zeros(choice.shape[:-1], jnp.int32)]
  for level in range(opts.depth):
    ids.append(ids[-1] * opts.m + choice[..., level])
  return ids


def level_groups(opts: Options) -> list[range]:
  """The levels of each group, as even as possible."""
  longest = max(1, int(math.log(GROUP, opts.m) + 1e-9))
  n = -(-opts.depth // longest)
  cuts = [round(i * opts.depth / n) for i in range(n + 1)]
  return [range(a, b) for a, b in itertools.pairwise(cuts)]


@functools.lru_cache
def _expansion(m: int, depth: int, levels: range) -> np.ndarray:
  """0/1 matrices [len(levels), depth·m, m^len]: digit of level r of every joint branch of the group."""
  n = len(levels)
  joint = np.arange(m**n)
  out = np.zeros((n, depth * m, m**n), np.float32)
  for r, level in enumerate(levels):
    out[r, level * m + joint // m ** (n - 1 - r) % m, joint] = 1
  return out


def joint_digits(p: jax.Array, levels: range, opts: Options) -> jax.Array:
  """Kronecker product of the levels' distributions, [..., m^len(levels)], first level most significant."""
  parts = [jnp.matmul(p, e.astype(p.dtype), precision="highest") for e in _expansion(opts.m, opts.depth, levels)]
  return functools.reduce(jnp.multiply, parts)


def pair_features(p: jax.Array, opts: Options, alpha_K: jax.Array | None = None) -> tuple[jax.Array, ...]:
  """Feature arrays whose pairwise products are what `fractal_overlap.combine` turns into the kernel.

  leaf: one array per group of levels. prefix: [P_1, X_1, P_2, ..., P_n] with X_g the whole group and P_g the mixture of
  its prefixes, weighted by α when `alpha_K` [K, depth+1] is given (queries) and by one otherwise (keys).
  """
  groups = level_groups(opts)
  if opts.kernel == "leaf":
    return tuple(joint_digits(p, levels, opts) for levels in groups)
  weight = lambda level: 1.0 if alpha_K is None else _per_head(alpha_K[:, level], p)
  found = []
  for levels in groups:
    partial = [joint_digits(p, range(levels.start, end), opts) for end in range(levels.start + 1, levels.stop + 1)]
    mixed = [weight(levels.start + 1 + i) * x for i, x in enumerate(partial)]
    if levels.start == 0:
      mixed.insert(0, weight(0) * jnp.ones_like(p[..., :1]))
    found += [jnp.concatenate(mixed, -1), partial[-1]]
  return tuple(found[:-1])


def table_features(p: jax.Array, opts: Options, alpha_K: jax.Array | None = None) -> jax.Array:
  """φ [..., m^depth], or with prefixes the nodes of all levels, coarsest first, weighted as in `pair_features`."""
  groups = level_groups(opts)
  if opts.kernel == "leaf":
    return functools.reduce(_outer, (joint_digits(p, levels, opts) for levels in groups))
  weight = lambda level: 1.0 if alpha_K is None else _per_head(alpha_K[:, level], p)
  return jnp.concatenate([weight(level) * x for level, x in enumerate(level_features(p, opts))], -1)


def write_features(p: jax.Array, opts: Options) -> jax.Array:
  """φ of a key over all rows of the table [..., nodes]."""
  return jnp.concatenate(level_features(p, opts), -1) if opts.nodes > opts.leaves else table_features(p, opts)


def level_features(p: jax.Array, opts: Options) -> list[jax.Array]:
  """Probabilities of the nodes of every level 0 .. depth, each [..., m^level]."""
  found = [jnp.ones_like(p[..., :1])]
  for levels in level_groups(opts):
    base = found[-1]
    found += [_outer(base, joint_digits(p, range(levels.start, end + 1), opts)) for end in levels]
  return found


def _outer(a, b):
  return (a[..., :, None] * b[..., None, :]).reshape(*a.shape[:-1], -1)


def _per_head(x_K, p):
  return x_K.astype(p.dtype).reshape(1, -1, *[1] * (p.ndim - 2))


def level_entropy(p: jax.Array, opts: Options) -> jax.Array:
  """Entropy in nats of each level's distribution, [..., depth]."""
  by_level = p.reshape(*p.shape[:-1], opts.depth, opts.m)
  return -jnp.sum(by_level * jnp.log(jnp.maximum(by_level, 1e-30)), -1)
