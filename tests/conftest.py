"""Fixtures for the whole suite, and a fast compiler: the suite compiles many small programs once each."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest


@pytest.fixture
def key():
  return jax.random.key(0)
