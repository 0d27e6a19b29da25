"""Softmax attention by cuDNN's fused kernel, through `jax.nn.dot_product_attention`; NVIDIA GPUs only.

It never holds a T×T array, skips what causality and the window hide, and reads grouped keys and values without copies.
What it cannot serve exactly is refused. Gradients can be taken once: it has no derivative of its derivative, and
asking for one raises.
"""

import jax
import jax.numpy as jnp

from mgr_jax.problems import Problem, UserError, raise_if_any

HEAD_DIM_MULTIPLE = 8
LARGEST_HEAD_DIM = 256
LARGEST_HEAD_DIM_BEFORE_HOPPER = 128
INSTEAD = "standard(impl=tiled)"


def problems(cfg) -> list[Problem]:
  """What of a configuration cuDNN cannot serve, wherever it runs."""
  found = []
  if cfg.compute_dtype != "bfloat16":
    found.append(_dtype_problem(cfg.compute_dtype))
  D = cfg.head_dim
  if D % HEAD_DIM_MULTIPLE or D > LARGEST_HEAD_DIM:
    reason = f"the head size {D} is not a multiple of {HEAD_DIM_MULTIPLE} up to {LARGEST_HEAD_DIM}"
    found.append(Problem(_refusal(reason), f"change --n_embd or --n_head, or use {INSTEAD}"))
  if cfg.doc_mask:
    found.append(_segment_problem())
  return found


def device_problems(head_dim: int) -> list[Problem]:
  """What the devices of this process cannot do; starts the backend."""
  device = jax.devices()[0]
  capability = getattr(device, "compute_capability", "")
  if device.platform != "gpu" or "cuda" not in device.client.platform_version:
    return [Problem(_refusal(f"it runs on NVIDIA GPUs only, and this is {device.device_kind}"), f"use {INSTEAD}")]
  if float(capability) < 8:
    return [Problem(_refusal(f"it needs compute capability 8.0, and this GPU has {capability}"), f"use {INSTEAD}")]
  if float(capability) < 9 and head_dim > LARGEST_HEAD_DIM_BEFORE_HOPPER:
    reason = f"compute capability {capability} takes heads up to {LARGEST_HEAD_DIM_BEFORE_HOPPER}, not {head_dim}"
    return [Problem(_refusal(reason), f"change --n_embd or --n_head, or use {INSTEAD}")]
  return []


def attention(
  q_BTHD, k_BTKD, v_BTKD, segment_ids_BT=None, window: int = 0, probe: bool = False, implementation="cudnn"
):
  """o_i = Σ_{j≤i} softmax_j(⟨q_i, k_j⟩/√D) v_j over the last `window` tokens (0: all); weights in float32.

  Args:
    segment_ids_BT: must be `None`: the interface knows one document per row, and a mask would cost T² numbers.
    probe: also return the logsumexp, a diagnostic without a gradient.
    implementation: as `jax.nn.dot_product_attention` takes it; `xla` holds T×T scores and runs anywhere.

  Returns:
    (o [B, T, H, D], logsumexp [B, T, H] or `None`).

  Raises:
    UserError: naming what cannot be served and why.
  """
  found = []
  if segment_ids_BT is not None:
    found.append(_segment_problem())
  if implementation == "cudnn":
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
      found.append(_dtype_problem(q_BTHD.dtype))
    found += device_problems(q_BTHD.shape[-1])
  raise_if_any(found)
  try:
    out = jax.nn.dot_product_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      scale=q_BTHD.shape[-1] ** -0.5,
      is_causal=True,
      local_window_size=(window - 1, 0) if window else None,
      implementation=implementation,
      return_residual=probe,
    )
  except (RuntimeError, NotImplementedError) as e:
    raise UserError(Problem(_refusal(f"the library says {e}"), f"use {INSTEAD}")) from e
  return (out[0], jax.lax.stop_gradient(out[1])) if probe else (out, None)


def _refusal(reason: str) -> str:
  return f"standard option impl=cudnn cannot serve: {reason}"


def _dtype_problem(dtype) -> Problem:
  fix = f"use --compute_dtype=bfloat16 with --certify=off (claims are measured in float32), or {INSTEAD}"
  return Problem(_refusal(f"it computes in bfloat16 or float16, not in {dtype}"), fix)


def _segment_problem() -> Problem:
  return Problem(_refusal("packed documents need a mask that it does not take"), f"use --nodoc_mask, or {INSTEAD}")
