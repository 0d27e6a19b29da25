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

ROLES = ("matrix", "router", "embedding", "head", "scalar", "direction", "log_scale", "gate")
# Roles that stay in float32 when matrices are cast to the compute dtype: small, and exponentiated or compared.
FLOAT32_ROLES = ("scalar", "log_scale", "gate")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """Shape, axes, role and initial distribution of one parameter array.

  Args:
    shape: the array's shape; dimension `i` has the logical name `axes[i]`.
    axes: logical axis names (`"embed"`, `"heads"`, `"head_dim"`, `"vocab"`, `"mlp"`, `"layers"`, ...), for sharding.
    role: optimizer group: `matrix` (hidden weights, decayed), `router` (weights of the logits of gates and routes:
      decayed, never orthogonalised), `embedding`, `head`, `scalar` (gains, biases, tables; never decayed), or a part
      of a factored weight: `direction` (a matrix of which only the direction matters), `log_scale` and `gate` (its
      size, as a logarithm or with a sign; never decayed).
    init: `"normal"` draws N(0, std²); `"zeros"`; `"constant"` fills with `std`; or a function `(key, shape) -> f32`.
    std: see `init`. `None` with `"normal"` means fan-in scaling, std = min(1, sqrt(out/in)) / sqrt(in).
    fan_in: number of leading dimensions (after any stacking) that are contracted with the input.
    unit_axes: of a direction: the names of the axes over which it has the norm `radius`.
    renorm: of a direction: optimizers restore that norm after every step.
    drawn_with: name of a sibling whose key this array is drawn with too, so that both see the same random numbers.
    frozen: no optimizer changes it.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  role: str = "matrix"
  init: str | Callable = "normal"
  std: float | None = None
  fan_in: int = 1
  unit_axes: tuple[str, ...] = ()
  renorm: bool = False
  drawn_with: str = ""
  frozen: bool = False

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
    if self.role not in ROLES:
      raise ValueError(f"role={self.role!r} is not one of {ROLES}")
    if (self.role == "direction") != bool(self.unit_axes) or set(self.unit_axes) - set(self.axes):
      raise ValueError(f"role={self.role!r} does not go with unit_axes={self.unit_axes} of axes {self.axes}")

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def one_layer(self) -> "ParamSpec":
    """The specification of one layer of a stacked array, and any other one itself."""
    if self.axes[:1] != ("layers",):
      return self
    return dataclasses.replace(self, shape=self.shape[1:], axes=self.axes[1:])

  @property
  def unit_dims(self) -> tuple[int, ...]:
    """The dimensions that `unit_axes` names."""
    return tuple(self.axes.index(name) for name in self.unit_axes)

  @property
  def radius(self) -> float:
    """The norm of a direction over `unit_axes`: that of columns (over the `fan_in` dimensions) of mean square 1."""
    n_in = math.prod(self.one_layer.shape[: self.fan_in])
    return math.sqrt(math.prod(self.shape[d] for d in self.unit_dims) / n_in)

  def draw(self, key: jax.Array) -> jax.Array:
    """Draws one float32 array from the initial distribution; the layers of a stacked array independently."""
    if self.one_layer is not self:
      return jax.vmap(self.one_layer.draw)(jax.random.split(key, self.shape[0]))
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
    shape = self.one_layer.shape
    n_in, n_out = math.prod(shape[: self.fan_in]), math.prod(shape[self.fan_in :])
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


def key_names(specs) -> list[str]:
  """The name that the key of every leaf is folded from, in `jax.tree.leaves` order: its path, or its sibling's."""
  leaves = jax.tree.leaves(specs, is_leaf=is_spec)
  sibling = lambda name, spec: name[: name.rfind("/") + 1] + spec.drawn_with if spec.drawn_with else name
  return [sibling(name, spec) for name, spec in zip(leaf_names(specs), leaves, strict=True)]


def init_params(key: jax.Array, specs):
  """Draws a parameter tree. Every leaf's key is folded from its path, so adding a leaf changes no other."""
  names = key_names(specs)
  leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  return jax.tree.unflatten(treedef, [s.draw(fold_in_name(key, n)) for n, s in zip(names, leaves, strict=True)])


def stack_specs(specs, n_layer: int):
  """Adds a leading `layers` axis of length `n_layer` to every specification."""

  def stack(spec: ParamSpec) -> ParamSpec:
    return dataclasses.replace(spec, shape=(n_layer, *spec.shape), axes=("layers", *spec.axes))

  return jax.tree.map(stack, specs, is_leaf=is_spec)


def count(specs) -> int:
  """Number of scalars in a specification tree."""
  return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec))
