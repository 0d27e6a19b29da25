"""Fixtures for the whole suite, and a fast compiler: the suite compiles many small programs once each."""

import importlib.metadata
import itertools
import os
from pathlib import Path

# The second flag halves the compile time once more; newer versions refuse it.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_backend_optimization_level=0"
  + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.11" else "")
)

import jax
import pytest

_finished = itertools.count()


@pytest.fixture(autouse=True)
def few_memory_maps():
  """Drops compiled programs before a worker holds so many that the kernel refuses to map another one (65530)."""
  yield
  maps = Path("/proc/self/maps")
  if next(_finished) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
    jax.clear_caches()


@pytest.fixture
def key():
  return jax.random.key(0)
