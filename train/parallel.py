"""Where a training step runs: one device, a mesh of devices under `jit`, or one program per device under `pmap`.

The step is the same function everywhere, and the state is one tree of global arrays everywhere: what validates, samples
and saves need not know of devices.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mgr_jax.model.rows import AXES
from mgr_jax.params import ParamSpec, is_spec
from mgr_jax.problems import Problem, UserError, raise_if_any

KINDS = ("auto", "single", "jit", "pmap")
PMAP_AXIS = "data"
# Elements below which every device holds an array whole: gathering it would cost more than it saves.
MIN_SHARDED = 65_536


@dataclasses.dataclass(frozen=True)
class Placement:
  """How one training step lies on devices.

  Args:
    kind: `single`, `jit` or `pmap`.
    mesh: axes `data` and `fsdp`. Batches are split over both, parameters and optimizer state over `fsdp`.
  """

  kind: str
  mesh: Mesh

  @property
  def n_devices(self) -> int:
    return self.mesh.size

  def __str__(self) -> str:
    """E.g. `jit, data=2, fsdp=2`; empty for one device."""
    axes = [f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1]
    return ", ".join([self.kind, *axes]) if self.kind != "single" else ""

  @property
  def axis_name(self) -> str | None:
    """Of the sums that the step itself must take; the compiler knows those of `jit`."""
    return PMAP_AXIS if self.kind == "pmap" else None

  @property
  def rows(self) -> NamedSharding:
    """Rows of a batch, or whole matrices of a stack, over all devices."""
    return NamedSharding(self.mesh, PartitionSpec(AXES))

  @property
  def everywhere(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def owners(self) -> NamedSharding | None:
    """Who orthogonalises which matrix: each device whole ones. None where every device does all of them."""
    return self.rows if self.kind == "jit" and self.n_devices > 1 else None

  def shardings(self, state, specs) -> Any:
    """The sharding of every leaf of a `TrainState`, or of an abstract one.

    An array of the shape of a parameter (a moment of it) lies like the parameter, anything else everywhere.
    """
    fsdp = self.mesh.shape["fsdp"]
    dims = {spec.shape: sharded_dim(spec, fsdp) for spec in jax.tree.leaves(specs, is_leaf=is_spec)}

    def place(leaf) -> NamedSharding:
      dim = dims.get(tuple(leaf.shape))
      return self.everywhere if dim is None else NamedSharding(self.mesh, PartitionSpec(*[None] * dim, "fsdp"))

    return jax.tree.map(place, state)

  def abstract(self, init: Callable[[], Any], specs) -> Any:
    """Shapes, types and shardings of what `init` returns: the target of a restore."""
    state = jax.eval_shape(init)
    if self.kind == "single":
      return state
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(placed, state, self.shardings(state, specs))

  def init(self, init: Callable[[], Any], specs) -> Any:
    """Runs `init`; every array appears where it will stay."""
    if self.kind == "single":
      return jax.jit(init)()
    return jax.jit(init, out_shardings=self.shardings(jax.eval_shape(init), specs))()

  def compile(self, step: Callable, state, batch: dict[str, jax.ShapeDtypeStruct], specs):
    """Compiles a jitted `step(state, batch) -> (state, metrics)` for this placement; `state` is donated.

    `batch` has the rows of all processes. The result is called with `put(rows of this process)`.
    """
    if self.kind == "single":
      return step.lower(state, batch).compile()
    if self.kind == "pmap":
      mapped = jax.pmap(
        step.__wrapped__,
        axis_name=PMAP_AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        donate_argnums=0,
        devices=list(self.mesh.devices.flat),
      )
      fold = lambda x: jax.ShapeDtypeStruct((self.n_devices, x.shape[0] // self.n_devices, *x.shape[1:]), x.dtype)
      return mapped.lower(state, jax.tree.map(fold, batch)).compile()
    placed = self.shardings(state, specs)
    program = jax.jit(
      step.__wrapped__,
      in_shardings=(placed, self.rows),
      out_shardings=(placed, self.everywhere),
      donate_argnums=0,
    )
    with self.by_rows():
      return program.lower(state, batch).compile()

  def by_rows(self) -> contextlib.AbstractContextManager:
    """Programs traced inside keep the rows of a batch on their devices, see `mgr_jax.model.rows`."""
    return contextlib.nullcontext() if self.kind == "single" else jax.set_mesh(self.mesh)

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """This process's rows, as the compiled step takes them."""
    if self.kind == "single":
      return batch
    if self.kind == "pmap":
      return {name: x.reshape(self.n_devices, -1, *x.shape[1:]) for name, x in batch.items()}
    return {name: jax.make_array_from_process_local_data(self.rows, x) for name, x in batch.items()}

  def spread(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """This process's rows for a program that knows nothing of placements, split over the devices where they divide."""
    rows = len(next(iter(batch.values()))) * jax.process_count()
    if self.kind == "single" or rows % self.n_devices:
      return batch
    return {name: jax.make_array_from_process_local_data(self.rows, x) for name, x in batch.items()}

  def whole(self, tree):
    """The arrays of `tree`, all of each on every device."""
    return tree if self.kind == "single" else jax.jit(lambda x: x, out_shardings=self.everywhere)(tree)


def sharded_dim(spec: ParamSpec, n: int) -> int | None:
  """The dimension that `n` devices share: the largest that `n` divides, never that of layers.

  Every layer is then on every device, a share of it each, and is gathered when the scan over layers reaches it. None
  for arrays below `MIN_SHARDED` elements and where nothing divides.
  """
  if n == 1 or spec.size < MIN_SHARDED:
    return None
  sizes = {d: size for d, (size, axis) in enumerate(zip(spec.shape, spec.axes, strict=True)) if axis != "layers"}
  fitting = [d for d, size in sizes.items() if size % n == 0]
  return max(fitting, key=sizes.__getitem__, default=None)


def peak_bytes(compiled) -> int:
  """Arguments, results and temporaries of a compiled program on one device; what is donated counts once."""
  m = compiled.memory_analysis()
  return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def parse_mesh(text: str) -> dict[str, int]:
  """Sizes by axis of `data=4,fsdp=2`; an axis that is left out is 1, -1 takes the devices that are left.

  Raises:
    UserError: an unknown axis, a size that is none, an axis twice.
  """
  sizes = {}
  for item in filter(None, text.split(",")):
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", item)
    if not match or match.group(1) not in AXES or match.group(1) in sizes:
      raise UserError(Problem(f"--mesh={text} is not understood at {item!r}", "use e.g. --mesh=data=2,fsdp=2"))
    sizes[match.group(1)] = int(match.group(2))
  return sizes


def make_placement(
  kind: str, mesh: str, batch_size: int, grad_accum: int = 1, curvature_fraction: float | None = None
) -> Placement:
  """The placement that the flags ask for, on the devices of all processes.

  Args:
    kind: `auto` is `single` on one device and `jit` on several.
    mesh: see `parse_mesh`; empty gives all devices to `data`.
    batch_size: rows of an update in all.
    curvature_fraction: share of the rows that curvature is measured on, if it is.

  Raises:
    UserError: with what does not fit the devices or the batch.
  """
  devices, processes = jax.devices(), jax.process_count()
  sizes = parse_mesh(mesh)
  if kind == "auto":
    kind = "jit" if len(devices) > 1 or mesh else "single"
  if kind == "single":
    found = [Problem(f"--mesh={mesh} has no effect with --parallel=single", "use --parallel=jit")] if mesh else []
    if processes > 1:
      found.append(Problem(f"--parallel=single in {processes} processes", "use --parallel=jit"))
    raise_if_any(found)
    return Placement(kind, Mesh(np.array(devices[:1]).reshape(1, 1), AXES))
  if kind == "pmap" and processes > 1:
    what = f"--parallel=pmap in {processes} processes: jax.pmap would give each one a state of its own"
    raise UserError(Problem(what, "use --parallel=jit"))
  if kind == "pmap" and sizes.get("fsdp", 1) != 1:
    raise UserError(Problem(f"--mesh={mesh}: pmap copies the state to every device", "use --parallel=jit"))
  sizes = {"data": -1, "fsdp": 1} | sizes if sizes.get("fsdp") != -1 else {"data": 1} | sizes
  taken = math.prod(n for n in sizes.values() if n > 0)
  sizes = {axis: n if n > 0 else max(1, len(devices) // taken) for axis, n in sizes.items()}
  n = math.prod(sizes.values())
  # Every process has to take part in every step.
  if n > len(devices) or (processes > 1 and n != len(devices)):
    there = f"there are {len(devices)}" + (
      f" in {processes} processes, all of which must work" if processes > 1 else ""
    )
    what = f"--mesh={mesh or 'data=-1'} takes {n} devices, {there}"
    raise UserError(Problem(what, f"use --mesh=data={len(devices)}, or --mesh=fsdp={len(devices)}"))
  raise_if_any(_row_problems(kind, n, batch_size, max(1, grad_accum), curvature_fraction))
  return Placement(kind, Mesh(np.array(devices[:n]).reshape(sizes["data"], sizes["fsdp"]), AXES))


def _row_problems(kind: str, n: int, batch_size: int, grad_accum: int, fraction: float | None) -> list[Problem]:
  micro = batch_size // grad_accum
  if micro % n:
    fewer = math.gcd(micro, n)
    up = -(-micro // n) * n * grad_accum
    what = f"micro-batches of {micro} rows cannot be split evenly over {n} devices"
    return [Problem(what, f"use --batch_size={up}, or --mesh=data={fewer}")]
  if kind == "pmap" and fraction and round(fraction * batch_size) % n:
    what = f"--hoss_hvp_frac={fraction:g} of {batch_size} rows cannot be split evenly over {n} devices"
    return [Problem(what, "use --hoss_hvp_frac=1, or --parallel=jit")]
  return []
