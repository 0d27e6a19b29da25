"""The counter of matrix FLOPs: against hand counts, and against the compiler where the compiler sees everything."""

import jax
import jax.numpy as jnp
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops, peak_flops
from mgr_jax.model import gpt

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))
PRODUCT = 2 * 3 * 5 * 7


def looped(a, b):
  return jax.lax.scan(lambda total, _: (total + a @ b, None), jnp.zeros((3, 7)), length=4)[0]


def branched(a, b):
  return jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ b.T @ b, lambda: a @ b)


@jax.custom_vjp
def ruled(a, b):
  return a @ b


ruled.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize(
  ("f", "products"),
  [
    (lambda a, b: a @ b, 1),
    (lambda a, b: jnp.einsum("ij,jk->ik", a, b) + 1, 1),
    (looped, 4),
    (jax.jit(looped), 4),
    (branched, 3),
    (ruled, 1),
    (lambda a, b: jax.grad(lambda a: jnp.sum(ruled(a, b) ** 2))(a), 3),
    (lambda a, b: jax.vmap(lambda row: row @ b)(a), 1),
  ],
)
def test_products_counted_by_hand(f, products):
  assert matmul_flops(f, A, B) == products * PRODUCT


def test_the_compiler_agrees_where_it_counts_every_loop():
  """Its own analysis counts elementwise work too, and a loop body once, so: wide layers, dense scores, no loop."""
  cfg = GPTConfig(
    vocab_size=128, seq_len=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, attention="standard(impl=reference)"
  )
  params = jax.eval_shape(lambda: gpt.init(jax.random.key(0), cfg))
  tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
  forward = lambda params, tokens: gpt.forward(params, tokens, cfg)[0]
  analysis = jax.jit(forward).lower(params, tokens).compile().cost_analysis()
  assert analysis["flops"] == pytest.approx(matmul_flops(forward, params, tokens), rel=0.05)
  loop = jax.jit(looped).lower(A, B).compile().cost_analysis()["flops"]
  assert loop < 2 * PRODUCT, "what the analysis misses"


@pytest.mark.parametrize(
  ("device", "dtype", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
    ("NVIDIA H100 PCIe", "bfloat16", 756e12),
    ("NVIDIA L40S", "bfloat16", 362e12),
    ("NVIDIA L4", "bfloat16", 121e12),
    ("NVIDIA L400", "bfloat16", None),
    ("TPU v5 lite", "bfloat16", 197e12),
    ("TPU v5", "bfloat16", 459e12),
    ("NVIDIA H100 80GB HBM3", "float32", None),
    ("cpu", "bfloat16", None),
  ],
)
def test_peaks_are_of_that_device_or_none(device, dtype, peak):
  assert peak_flops(device, dtype) == peak
