"""Max-plus MLPs: the map, its gradient, its limits, memory and cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import tropical_mlp
from mgr_jax.params import init_params

CFG = GPTConfig(vocab_size=7, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)


def case(rational, beta=0.0, gain=1.0):
  cfg = dataclasses.replace(CFG, mlp_beta=beta)
  params = init_params(jax.random.key(0), tropical_mlp.specs(cfg, rational))
  noise = lambda i, p: p + 0.5 * jax.random.normal(jax.random.key(i + 1), p.shape)
  params = {name: noise(i, p) for i, (name, p) in enumerate(params.items())} | {"gain": jnp.full(16, gain)}
  return cfg, params, jax.random.normal(jax.random.key(99), (2, 9, 16))


def dense(params, x, rational):
  """The definition with [..., C, M] arrays."""

  def stack(p):
    h = jnp.max(x[..., :, None] + p["w_in"], -2) + p["b_in"]
    return jnp.max(h[..., :, None] + p["w_out"], -2) + p["b_out"]

  tables = {name: p for name, p in params.items() if name != "gain"}
  if rational:
    return params["gain"] * (stack({n: p[0] for n, p in tables.items()}) - stack({n: p[1] for n, p in tables.items()}))
  return params["gain"] * stack(tables)


@pytest.mark.parametrize("rational", [False, True])
def test_equals_the_definition_in_value_and_gradient(rational):
  cfg, params, x = case(rational)
  g = jax.random.normal(jax.random.key(5), x.shape)

  def both(f):
    y, pull = jax.vjp(f, params, x)
    return y, pull(g)

  got = jax.jit(lambda: both(lambda p, x: tropical_mlp.apply(p, x, cfg, rational)))()
  want = jax.jit(lambda: both(lambda p, x: dense(p, x, rational)))()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
  other = dense(params | {"b_in": params["b_in"] + 0.1}, x, rational)
  assert rational or np.max(np.abs(other - got[0])) > 0.05


@pytest.mark.parametrize("rational", [False, True])
def test_a_block_starts_as_the_identity_and_learns(rational):
  specs = tropical_mlp.specs(CFG, rational)
  assert {s.role for s in specs.values()} == {"scalar"}
  params, (_, _, x) = init_params(jax.random.key(0), specs), case(rational)
  np.testing.assert_array_equal(tropical_mlp.apply(params, x, CFG, rational), 0)
  gradient = jax.grad(lambda p: jnp.sum(jnp.sin(x + tropical_mlp.apply(p, x, CFG, rational))))(params)
  assert np.all(gradient["gain"] != 0)


def test_biases_start_at_the_mean_of_the_maximum():
  draws = np.random.default_rng(0).standard_normal((20000, 16)).max(-1)
  assert abs(tropical_mlp.expected_maximum(16) - draws.mean()) < 0.02
  assert abs(np.sqrt(2 * np.log(16)) - draws.mean()) > 0.4
  np.testing.assert_allclose([tropical_mlp.expected_maximum(n) for n in (1, 2)], [0, np.pi**-0.5], atol=1e-5)


@pytest.mark.parametrize("rational", [False, True])
def test_beta_leads_to_the_hard_maximum_from_above(rational):
  errors = []
  for beta in (1.0, 4.0, 16.0):
    cfg, params, x = case(rational, beta)
    soft = tropical_mlp.apply(params, x, cfg, rational)
    errors.append(float(jnp.max(jnp.abs(soft - dense(params, x, rational)))))
    width = np.log(16) + np.log(cfg.mlp_dim // (2 if rational else 1))
    assert errors[-1] <= width / beta + 1e-5
  assert errors[0] > errors[1] > errors[2]


def test_extreme_inputs_stay_finite():
  for beta in (0.0, 8.0):
    cfg, params, x = case(True, beta)
    for scale in (0.0, 1e-4, 1e4):
      f = lambda x, cfg=cfg, params=params: tropical_mlp.apply(params, x, cfg, True)
      y, pull = jax.vjp(f, (scale * x).astype(jnp.bfloat16))
      assert y.dtype == jnp.bfloat16
      assert np.all(np.isfinite(y.astype(jnp.float32))) and np.all(np.isfinite(pull(y)[0].astype(jnp.float32)))


def test_memory_stays_below_the_dense_form():
  cfg = dataclasses.replace(CFG, n_embd=64)
  params = init_params(jax.random.key(0), tropical_mlp.specs(cfg, False))
  x = jnp.zeros((1, 512, 64))

  def temp_bytes(f):
    gradient = jax.grad(lambda p, x: jnp.sum(jnp.sin(f(p, x))), (0, 1))
    return jax.jit(gradient).lower(params, x).compile().memory_analysis().temp_size_in_bytes

  buffer = 4 * 512 * 64 * cfg.mlp_dim
  assert temp_bytes(lambda p, x: tropical_mlp.apply(p, x, cfg, False)) < buffer / 4
  assert temp_bytes(lambda p, x: dense(p, x, False)) >= buffer


@pytest.mark.parametrize("rational", [False, True])
def test_cost(rational):
  cfg, params, x = case(rational, 4.0)
  cost = tropical_mlp.cost(cfg, rational)
  assert cost.matmul == 2 * 2 * 16 * 64
  counted = matmul_flops(lambda p, x: tropical_mlp.apply(p, x, cfg, rational), params, x) / x[..., 0].size
  assert counted == cost.matmul
  assert tropical_mlp.cost(CFG, rational).matmul == 0
  assert tropical_mlp.cost(CFG, rational).vector >= 2 * cost.matmul / 2
