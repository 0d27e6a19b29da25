"""Exotic-mathematics attention as pure JAX functions over PyTrees. `from mgr_jax import GPTConfig, attention_names`."""

from importlib import import_module

_NAMES = {"GPTConfig": "mgr_jax.config", "attention_names": "mgr_jax.attention", "generate": "mgr_jax.model.generate"}
__all__ = list(_NAMES)


def __getattr__(name: str):
  # Looked up on first use, so that a program can refuse a wrong flag without importing JAX.
  if name not in _NAMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(import_module(_NAMES[name]), name)
