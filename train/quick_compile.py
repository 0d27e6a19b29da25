"""Compiling fast instead of well, for processes that compile many small programs and run each once or twice."""

import importlib.metadata
import os


def compile_quickly() -> bool:
  """Turns off the compiler's back-end optimisation, unless XLA_FLAGS already says something of it.

  Only effective before JAX has touched a device. Returns whether it was turned off here. Programs give the same results
  up to rounding and run slower.
  """
  given = os.environ.get("XLA_FLAGS", "")
  if "xla_backend_optimization_level" in given:
    return False
  # The second flag halves the compile time once more; newer versions refuse it.
  fusion = " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.11" else ""
  os.environ["XLA_FLAGS"] = f"{given} --xla_backend_optimization_level=0{fusion}".strip()
  return True
