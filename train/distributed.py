"""Several processes that train one model, each with devices of its own, on one host or on many.

Every process runs the same program on the same sequence of steps. Process 0 leads: it alone writes logs and reports.
Whatever decides what happens next (a signal, the clock, a record that exists) is agreed on here, because a process that
takes another branch would wait for the others for ever. In a single process nothing here costs anything.
"""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgr_jax.problems import Problem, UserError


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


def _gather(data: bytes) -> list[bytes]:
  length = largest(len(data))
  padded = np.zeros(4 + length, np.uint8)
  padded[:4] = np.frombuffer(np.uint32(len(data)).tobytes(), np.uint8)
  padded[4 : 4 + len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [row[4 : 4 + int(np.frombuffer(row[:4].tobytes(), np.uint32)[0])].tobytes() for row in np.asarray(rows)]
