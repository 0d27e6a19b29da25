"""Fixtures for the whole suite, and a fast compiler: the suite compiles many small programs once each."""

import importlib.metadata
import os

# The second flag halves the compile time once more; newer versions refuse it.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_backend_optimization_level=0"
  + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.11" else "")
)

import jax
import pytest


@pytest.fixture
def key():
  return jax.random.key(0)
