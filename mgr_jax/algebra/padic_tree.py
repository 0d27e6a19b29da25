"""Learning a map on the leaves of a p-ary tree by writing every node at most once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_NODES = 2**22


class Tree(NamedTuple):
  """Node vectors [nodes, m] in (ℤ/p)^m and which nodes exist; the nodes of depth d start at (p^d - 1)/(p - 1)."""

  value: jax.Array
  exists: jax.Array


def n_nodes(p: int, depth: int) -> int:
  """Σ_{d <= depth} p^d."""
  return (p ** (depth + 1) - 1) // (p - 1)


def paths(digits: jax.Array, p: int) -> jax.Array:
  """Node numbers of all prefixes, [..., K] -> [..., K + 1], root first.

  >>> paths(jnp.array([1, 0]), 2).tolist()
  [0, 2, 5]
  """
  K = digits.shape[-1]
  code, found = jnp.zeros_like(digits[..., 0]), []
  for d in range(K + 1):
    found.append((p**d - 1) // (p - 1) + code)
    if d < K:
      code = code * p + digits[..., d]
  return jnp.stack(found, -1)


def predict(tree: Tree, path: jax.Array, p: int) -> jax.Array:
  """Sum of the existing node vectors along each path [..., K + 1], mod p: [..., m]."""
  return jnp.sum(jnp.where(tree.exists[path][..., None], tree.value[path], 0), -2, tree.value.dtype) % p


def tree_fit(digits: jax.Array, labels: jax.Array, p: int) -> tuple[Tree, jax.Array]:
  """One pass over samples (digits [N, K], labels [N, m] in (ℤ/p)^m); returns the tree and which samples erred.

  On an error the shallowest missing node of the path takes the residual; no node ever changes. If labels depend on the
  K digits alone, every error creates one node, so errors = nodes <= Σ_{d <= K} p^d, and a leaf's path cannot err again
  once it is complete.

  Raises:
    ValueError: the tree has more than 2^22 nodes.
  """
  total = n_nodes(p, digits.shape[-1])
  if total > MAX_NODES:
    raise ValueError(f"p={p} with {digits.shape[-1]} digits has {total} nodes; at most {MAX_NODES} fit")

  def sample(tree, xs):
    path, label = xs
    residual = (label - predict(tree, path, p)) % p
    missing = ~tree.exists[path]
    erred = jnp.any(residual != 0)
    node = jnp.where(erred & jnp.any(missing), path[jnp.argmax(missing)], total)
    value = tree.value.at[node].set(residual.astype(jnp.int32), mode="drop")
    return Tree(value, tree.exists.at[node].set(True, mode="drop")), erred

  empty = Tree(jnp.zeros((total, labels.shape[-1]), jnp.int32), jnp.zeros(total, bool))
  return jax.lax.scan(sample, empty, (paths(digits, p), labels))
