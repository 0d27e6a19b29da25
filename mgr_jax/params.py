"""Parameter tables: one `ParamSpec` per array drives init, sharding, optimizer group and decay.

A specification tree is a nested dict whose leaves are `ParamSpec`; the parameter tree has the same structure.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

ROLES = ("matrix", "embedding", "head", "scalar")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """Shape, axes, role and initial distribution of one parameter array.

  Args:
    shape: the array's shape; dimension `i` has the logical name `axes[i]`.
    axes: logical axis names (`"embed"`, `"heads"`, `"head_dim"`, `"vocab"`, `"mlp"`, `"layers"`, ...), for sharding.
    role: optimizer group: `matrix` (hidden weights, decayed), `embedding`, `head`, or `scalar` (gains, biases, tables;
      never decayed).
    init: `"normal"` draws N(0, std²); `"zeros"`; `"constant"` fills with `std`; or a function `(key, shape) -> f32`.
    std: see `init`. `None` with `"normal"` means fan-in scaling, std = min(1, sqrt(out/in)) / sqrt(in).
    fan_in: number of leading dimensions (after any stacking) that are contracted with the input.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  role: str = "matrix"
  init: str | Callable = "normal"
  std: float | None = None
  fan_in: int = 1

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
    if self.role not in ROLES:
      raise ValueError(f"role={self.role!r} is not one of {ROLES}")

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def draw(self, key: jax.Array) -> jax.Array:
    """Draws one float32 array from the initial distribution."""
    if callable(self.init):
      return jnp.asarray(self.init(key, self.shape), jnp.float32)
    if self.init == "zeros":
      return jnp.zeros(self.shape, jnp.float32)
    if self.init == "constant":
      return jnp.full(self.shape, self.std, jnp.float32)
    if self.init != "normal":
      raise ValueError(f"unknown init {self.init!r}")
    return self.normal_std * jax.random.normal(key, self.shape, jnp.float32)

  @property
  def normal_std(self) -> float:
    """Standard deviation of the `"normal"` distribution."""
    if self.std is not None:
      return self.std
    n_in, n_out = math.prod(self.shape[: self.fan_in]), math.prod(self.shape[self.fan_in :])
    return min(1.0, math.sqrt(n_out / n_in)) / math.sqrt(n_in)


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
  """Derives a key from a name, the same on every machine and in every process."""
  word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
  return jax.random.fold_in(key, np.uint32(word))


def leaf_names(tree) -> list[str]:
  """The `/`-joined path of every leaf, in `jax.tree.leaves` order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda s: isinstance(s, ParamSpec))
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]


def is_spec(leaf) -> bool:
  """The `is_leaf` predicate for specification trees."""
  return isinstance(leaf, ParamSpec)


def init_params(key: jax.Array, specs):
  """Draws a parameter tree. Every leaf's key is folded from its path, so adding a leaf changes no other."""
  names = leaf_names(specs)
  leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  return jax.tree.unflatten(treedef, [s.draw(fold_in_name(key, n)) for n, s in zip(names, leaves, strict=True)])


def stack_specs(specs, n_layer: int):
  """Adds a leading `layers` axis of length `n_layer` to every specification."""

  def stack(spec: ParamSpec) -> ParamSpec:
    def draw(key, shape):
      return jax.vmap(spec.draw)(jax.random.split(key, shape[0]))

    return dataclasses.replace(spec, shape=(n_layer, *spec.shape), axes=("layers", *spec.axes), init=draw)

  return jax.tree.map(stack, specs, is_leaf=is_spec)


def count(specs) -> int:
  """Number of scalars in a specification tree."""
  return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec))
