"""Several processes that train one model, each with devices of its own, on one host or on many.

Every process runs the same program on the same sequence of steps. Process 0 leads: it alone writes logs and reports.
Whatever decides what happens next (a signal, the clock, a record that exists) is agreed on here, because a process that
takes another branch would wait for the others for ever. In a single process nothing here costs anything.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgr_jax.problems import Problem, UserError, raise_if_any


def start(coordinator: str, num_processes: int, process_id: int) -> None:
  """Joins the other processes; must come before JAX looks at its devices. Does nothing for a single process.

  Args:
    coordinator: `host:port` of process 0; empty takes JAX_COORDINATOR_ADDRESS, or what a cluster (Slurm, Open MPI, a
      TPU pod) says, if there is one.
    num_processes, process_id: of this run; 0 and -1 take JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what the cluster
      says.

  Raises:
    UserError: a part of the three is missing, or the others do not come.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  num_processes = num_processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
  process_id = process_id if process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
  given = (bool(coordinator), num_processes > 0, process_id >= 0)
  if not any(given) and not _in_cluster():
    return
  if any(given) and not all(given) and not _in_cluster():
    flags = [f for f, g in zip(("--coordinator", "--num_processes", "--process_id"), given, strict=True) if not g]
    fix = "give all three, e.g. --coordinator=localhost:1234 --num_processes=2 --process_id=0"
    raise UserError(Problem(f"{' and '.join(flags)} of this process is not given", fix))
  if all(given) and process_id >= num_processes:
    raise UserError(Problem(f"--process_id={process_id} of {num_processes} processes", "number them from 0"))
  try:
    jax.distributed.initialize(
      coordinator or None, num_processes or None, process_id if process_id >= 0 else None, initialization_timeout=120
    )
  except (RuntimeError, ValueError) as e:
    why = next(iter(str(e).splitlines()), "")
    fix = "start every process with the same --coordinator and --num_processes, and its own --process_id"
    raise UserError(Problem(f"the processes did not find each other: {why}", fix)) from e


def _in_cluster() -> bool:
  """True where a launcher has started several tasks, and JAX can ask it who is who."""
  count = lambda name: int(os.environ.get(name) or 1)
  workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
  return count("SLURM_STEP_NUM_TASKS") > 1 or count("OMPI_COMM_WORLD_SIZE") > 1 or len(workers) > 1


def leads() -> bool:
  """Whether this process writes what a run leaves behind."""
  return jax.process_index() == 0


def meet() -> None:
  """Returns when all processes have come here."""
  largest(0)


def largest(value: int) -> int:
  """The largest of the values that the processes give. A meeting point of all of them."""
  return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))


def total(values: np.ndarray) -> np.ndarray:
  """The sum of the float64 arrays that the processes give."""
  if jax.process_count() == 1:
    return values
  # Sent as bytes: without double precision JAX would round them.
  return np.sum([np.frombuffer(b) for b in _gather(values.tobytes())], axis=0).reshape(values.shape)


def gather_json(value: Any) -> list[Any]:
  """The JSON values of all processes, in order of their numbers."""
  return [value] if jax.process_count() == 1 else [json.loads(b) for b in _gather(json.dumps(value).encode())]


def leaders(value: Any) -> Any:
  """The JSON value of process 0."""
  return gather_json(value)[0]


def together(make: Callable[[], Any], same: Callable[[Any], Mapping[str, Any]]) -> Any:
  """`make()`, in all processes or in none: those that wait for one that cannot start would wait for ever.

  Args:
    make: what this process needs to go on; may raise `UserError`, must not meet the others.
    same: of what was made, all that every process must have alike, JSON-able, by name.

  Raises:
    UserError: in every process, with the problems of all of them, or with what differs from process 0.
  """
  made, problems = None, ()
  try:
    made = make()
  except UserError as e:
    problems = e.problems
  theirs = gather_json([problems, {} if problems else dict(same(made))])
  where: dict[Problem, list[int]] = {}
  for number, (found, _) in enumerate(theirs):
    for problem in found:
      where.setdefault(Problem(*problem), []).append(number)
  first = theirs[0][1]
  for number, (_, other) in enumerate(() if where else theirs):
    differ = [f"{name} is {other[name]} instead of {first[name]}" for name in first if other[name] != first[name]]
    if differ:
      fix = "give all processes the same flags and data, and a --workdir that all of them see"
      where.setdefault(Problem(f"not as in process 0: {', '.join(differ)}", fix), []).append(number)
  told = lambda numbers: "" if len(numbers) == len(theirs) else f"process {', '.join(map(str, numbers))}: "
  raise_if_any(Problem(told(numbers) + problem.error, problem.fix) for problem, numbers in where.items())
  return made


def all_see(directory: Path) -> None:
  """Raises `UserError` in every process, unless a file that process 0 makes in `directory` is there for all."""
  if jax.process_count() == 1:
    return
  probe = directory / f".seen-by-all-{leaders(os.getpid())}"
  if leads():
    directory.mkdir(parents=True, exist_ok=True)
    probe.touch()
  meet()
  blind = [str(number) for number, seen in enumerate(gather_json(probe.exists())) if not seen]
  if leads():
    probe.unlink()
  if blind:
    what = f"process {', '.join(blind)} does not see what process 0 writes to --workdir={directory}"
    raise UserError(Problem(what, "use a directory on a file system that all hosts share"))


def _gather(data: bytes) -> list[bytes]:
  length = largest(len(data))
  padded = np.zeros(4 + length, np.uint8)
  padded[:4] = np.frombuffer(np.uint32(len(data)).tobytes(), np.uint8)
  padded[4 : 4 + len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [row[4 : 4 + int(np.frombuffer(row[:4].tobytes(), np.uint32)[0])].tobytes() for row in np.asarray(rows)]
