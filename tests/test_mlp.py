"""Every kind of MLP against its formula, its parameter count and its declared cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.config import MLP_KINDS, GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt, layers
from mgr_jax.params import count, init_params

FORMULAS = {
  "relu2": lambda p, x: np.maximum(x @ p["w_in"], 0) ** 2 @ p["w_out"],
  "gelu": lambda p, x: np.asarray(jax.nn.gelu(x @ p["w_in"])) @ p["w_out"],
  "swiglu": lambda p, x: (x @ p["w_gate"] / (1 + np.exp(-(x @ p["w_gate"]))) * (x @ p["w_in"])) @ p["w_out"],
  "none": lambda p, x: np.zeros_like(x),
}
MATRIX_KINDS = tuple(FORMULAS)


def config(kind, **fields):
  base = {"vocab_size": 64, "seq_len": 8, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 48}
  return GPTConfig(**(base | fields), mlp=kind)


def noisy(key, cfg):
  params = init_params(key, layers.mlp_specs(cfg))
  return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), params)


def test_every_kind_is_known_to_the_configuration():
  assert tuple(layers.KINDS) == MLP_KINDS


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_kinds_compute_their_formula(kind, key):
  cfg = config(kind)
  params, x = noisy(key, cfg), jax.random.normal(key, (2, 3, 48))
  want = FORMULAS[kind](jax.tree.map(np.asarray, params), np.asarray(x))
  np.testing.assert_allclose(layers.mlp(params, x, cfg), want, rtol=1e-4, atol=1e-4)
  if kind != "none":
    assert (
      np.max(np.abs(want - FORMULAS[kind](jax.tree.map(lambda p: 1.1 * np.asarray(p), params), np.asarray(x)))) > 1e-2
    )


@pytest.mark.parametrize("kind", MLP_KINDS)
def test_a_layer_starts_as_the_identity_and_learns(kind, key):
  cfg = config(kind)
  params = init_params(key, layers.mlp_specs(cfg))
  x = jax.random.normal(key, (2, 3, 48))
  assert float(jnp.max(jnp.abs(layers.mlp(params, x, cfg)))) == 0
  grads = jax.grad(lambda p: jnp.sum(jnp.sin(x) * layers.mlp(p, x, cfg)))(params)
  assert kind == "none" or max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads)) > 0


@pytest.mark.parametrize("kind", [k for k in MLP_KINDS if k != "none"])
@pytest.mark.parametrize("width", [48, 128, 768])
def test_all_kinds_have_as_many_parameters(kind, width):
  heads = {"n_head": 2, "n_kv_head": 2}
  numbers = {k: count(layers.mlp_specs(config(k, n_embd=width, **heads))) for k in (kind, "relu2")}
  assert numbers[kind] == pytest.approx(numbers["relu2"], rel=0.02)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_cost_is_what_the_program_multiplies(kind, key):
  cfg = config(kind)
  params, x = noisy(key, cfg), jnp.zeros((2, 5, 48))
  counted = matmul_flops(lambda p, x: layers.mlp(p, x, cfg), params, x) / 10
  assert counted == layers.mlp_cost(cfg).matmul
  by_hand = {"relu2": 4 * 48 * 192, "gelu": 4 * 48 * 192, "swiglu": 6 * 48 * 128, "none": 0}
  assert counted == by_hand[kind]


@pytest.mark.parametrize("kind", MLP_KINDS)
def test_a_model_trains_with_it(kind, key):
  cfg = config(kind, compute_dtype="bfloat16")
  params = gpt.init(key, cfg)
  tokens = jax.random.randint(key, (2, 8), 0, 64)
  loss, grads = jax.value_and_grad(lambda p: gpt.loss(p, {"tokens": tokens, "targets": tokens}, cfg)[0])(params)
  assert float(loss) == pytest.approx(np.log(64), abs=1e-4)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
