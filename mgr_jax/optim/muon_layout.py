"""Parameter arrays as batches of matrices, and one call for all matrices of a shape."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.params import ParamSpec, is_spec

SHAPE_SCALES = ("jordan", "spectral", "rms", "none")
HEAD_AXES = ("heads", "kv_heads")


class Layout(NamedTuple):
  """How an array holds `batch` matrices [n_in, n_out]; `perm` brings it to batch, input and output dimensions."""

  shape: tuple[int, ...]
  perm: tuple[int, ...]
  batch: int
  n_in: int
  n_out: int

  @property
  def shape_class(self) -> tuple[int, int]:
    """(rows, columns) after transposing tall matrices."""
    return min(self.n_in, self.n_out), max(self.n_in, self.n_out)

  def pack(self, x: jax.Array) -> jax.Array:
    """The array as [batch, rows, columns]."""
    matrices = x.transpose(self.perm).reshape(self.batch, self.n_in, self.n_out)
    return matrices.mT if self.n_in > self.n_out else matrices

  def unpack(self, matrices: jax.Array) -> jax.Array:
    """Inverse of `pack`."""
    matrices = matrices.mT if self.n_in > self.n_out else matrices
    inverse = sorted(range(len(self.perm)), key=self.perm.__getitem__)
    return matrices.reshape([self.shape[d] for d in self.perm]).transpose(inverse)


def layout(spec: ParamSpec, per_head: bool = False) -> Layout:
  """The matrices in an array of that specification.

  A leading axis `layers` is a batch axis; then the first `fan_in` dimensions are the input and the others the output:
  [L, C, H, D] with fan_in 1 is [L, C, H·D], [L, H, D, C] with fan_in 2 is [L, H·D, C]. With `per_head` the axes `heads`
  and `kv_heads` are batch axes as well.
  """
  ndim = len(spec.shape)
  first = ndim - len(spec.one_layer.shape)
  border = min(first + spec.fan_in, ndim)
  heads = [d for d, name in enumerate(spec.axes) if per_head and name in HEAD_AXES]
  batch = [*range(first), *heads]
  inputs = [d for d in range(first, border) if d not in heads]
  outputs = [d for d in range(border, ndim) if d not in heads]
  sizes = (math.prod(spec.shape[d] for d in dims) for dims in (batch, inputs, outputs))
  return Layout(spec.shape, (*batch, *inputs, *outputs), *sizes)


def is_matrix(spec: ParamSpec) -> bool:
  """False for what has one input or one output: orthogonalising a vector only normalises it."""
  return layout(spec).shape_class[0] >= 2


def shape_factor(n_in: int, n_out: int, shape_scale: str) -> float:
  """The factor of an orthogonalised [in, out] matrix, y = x W.

  `jordan`: sqrt(max(1, out/in)). `spectral`: sqrt(out/in), so that inputs of unit mean square move outputs by at most
  that (Yang, Simon, Bernstein, 2023, arXiv 2310.17813). `rms`: 0.2 sqrt(max(in, out)), which gives entries of root mean
  square 0.2, as in AdamW (Liu et al., 2025, arXiv 2502.16982). `none`: 1.

  >>> shape_factor(64, 256, "jordan"), shape_factor(256, 64, "jordan")
  (2.0, 1.0)
  """
  if shape_scale == "jordan":
    return math.sqrt(max(1.0, n_out / n_in))
  if shape_scale == "spectral":
    return math.sqrt(n_out / n_in)
  return 0.2 * math.sqrt(max(n_in, n_out)) if shape_scale == "rms" else 1.0


def shape_classes(layouts: Sequence[Layout]) -> dict[tuple[int, int], list[int]]:
  """The indices of the layouts of each (rows, columns)."""
  classes: dict[tuple[int, int], list[int]] = {}
  for i, form in enumerate(layouts):
    classes.setdefault(form.shape_class, []).append(i)
  return classes


def map_matrices(
  fn: Callable[[jax.Array], jax.Array],
  arrays: Sequence[jax.Array],
  layouts: Sequence[Layout],
  sharding: jax.sharding.Sharding | None = None,
) -> list[jax.Array]:
  """Applies `fn`, [K, m, n] -> [K, m, n] with m <= n, to all matrices of all arrays: one call per shape class.

  `sharding` divides the first axis over devices: each then holds whole matrices, K/devices of them, rounded up; zero
  matrices fill the last share.
  """
  results = list(arrays)
  for members in shape_classes(layouts).values():
    stack = jnp.concatenate([layouts[i].pack(arrays[i]) for i in members])
    stack = fn(stack) if sharding is None else _by_owners(fn, stack, sharding)
    ends = itertools.accumulate(layouts[i].batch for i in members)
    for i, end in zip(members, ends, strict=True):
      results[i] = layouts[i].unpack(stack[end - layouts[i].batch : end])
  return results


def _by_owners(fn, stack: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  K, *matrix = stack.shape
  devices = sharding.num_devices
  shares = devices // sharding.shard_shape((devices, *matrix))[0]
  stack = jnp.pad(stack, ((0, -K % shares), (0, 0), (0, 0)))
  stack = fn(jax.lax.with_sharding_constraint(stack, sharding))
  # Constrained again, or the partitioner may gather before the last product instead of after it.
  return jax.lax.with_sharding_constraint(stack, sharding)[:K]


def newton_schulz_flops(specs, steps: int) -> float:
  """FLOPs to orthogonalise all leaves of a tree of `ParamSpec`: Σ over matrices of steps · (4 m² n + 2 m³), m <= n."""
  total = 0
  for spec in jax.tree.leaves(specs, is_leaf=is_spec):
    form = layout(spec)
    m, n = form.shape_class
    total += form.batch * steps * (4 * m * m * n + 2 * m**3)
  return float(total)
