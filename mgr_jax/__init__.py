"""Exotic-mathematics attention as pure JAX functions over PyTrees: `import mgr_jax as mgr`.

>>> import jax, numpy as np
>>> import mgr_jax as mgr
>>> cfg = mgr.GPTConfig(vocab_size=256, seq_len=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, attention="tropical")
>>> text = np.frombuffer(b"the cat sat on the mat. " * 9, np.uint8)
>>> params, losses, cfg = mgr.fit(cfg, mgr.windows(text, batch_size=4, seq_len=16), steps=8)
>>> bool(losses[-1] < losses[0])
True
>>> logits, _ = mgr.forward(params, text[None, :16], cfg)
>>> logits.shape
(1, 16, 256)
>>> mgr.generate(params, text[None, :4], cfg, jax.random.key(0), max_tokens=8).shape
(1, 8)
"""

from importlib import import_module

_NAMES = {
  "GPTConfig": "mgr_jax.config",
  "attention_names": "mgr_jax.attention",
  "register": "mgr_jax.attention",
  "init": "mgr_jax.model.gpt",
  "forward": "mgr_jax.model.gpt",
  "loss": "mgr_jax.model.gpt",
  "generate": "mgr_jax.model.generate",
  "fit": "mgr_jax.fitting",
  "windows": "mgr_jax.fitting",
  "claims_of": "mgr_jax.conformance",
  "run_claims": "mgr_jax.claims",
  "claims_table": "mgr_jax.claims",
}
__all__ = list(_NAMES)


def __getattr__(name: str):
  # Looked up on first use, so that a program can refuse a wrong flag without importing JAX.
  if name not in _NAMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(import_module(_NAMES[name]), name)


def __dir__():
  return sorted((*globals(), *_NAMES))
