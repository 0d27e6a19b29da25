"""Kicks of the causal symplectic layer: tiles, packed documents, decoding, extreme inputs, costs and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import symplectic as integrators
from mgr_jax.algebra.symplectic_claims import order
from mgr_jax.attention.mechanism import Context, rope_tables
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import stack, symplectic, symplectic_claims
from mgr_jax.params import count, init_params

CFG = GPTConfig(vocab_size=128, seq_len=70, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
LAMBDA_MIN = 0.05


@pytest.mark.parametrize("claim", symplectic_claims.CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


def context(positions_BT, segments=None, valid=None) -> Context:
  rope = rope_tables(positions_BT, CFG.head_dim, CFG.rope_base)
  return Context(positions_BT, segments, valid, shared={"rope": rope})


def line(T: int) -> jax.Array:
  return jnp.arange(T)[None, :]


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  drawn = init_params(jax.random.key(0), symplectic.kick_specs(CFG))
  return jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(np.float32), drawn)


@pytest.fixture(scope="module")
def x():
  return jnp.asarray(np.random.default_rng(1).standard_normal((2, 70, 16)), jnp.float32)


@jax.jit
def tiled(params, x, ctx):
  return symplectic.grad_V(params["attention"], x, ctx, CFG, lambda_min=LAMBDA_MIN)


@jax.jit
def dense(params, x, ctx):
  return symplectic.grad_V(params["attention"], x, ctx, CFG, lambda_min=LAMBDA_MIN, impl="reference")


@jax.jit
def stepped(params, x, state, ctx):
  return symplectic.grad_V_step(params["attention"], x, state, ctx, CFG, lambda_min=LAMBDA_MIN)


SEGMENTS = np.repeat([[0, 0, 1, 2, 2, 2, 3], [0, 1, 1, 1, 4, 4, 4]], 10, axis=1)


def test_tiles_equal_dense_scores_in_value_and_gradient(params, x):
  for segments in (None, jnp.asarray(SEGMENTS)):
    ctx = context(line(70), segments)
    np.testing.assert_allclose(tiled(params, x, ctx), dense(params, x, ctx), atol=3e-6)
  gradient = lambda kick: jax.grad(lambda p, x: jnp.sum(jnp.sin(kick(p, x, ctx))), (0, 1))(params, x)
  for a, b in zip(jax.tree.leaves(gradient(tiled)), jax.tree.leaves(gradient(dense)), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5 * (1 + np.max(np.abs(b))))


def test_packed_documents_are_separate_documents(params, x):
  whole = tiled(params, x, context(line(70), jnp.asarray(SEGMENTS)))
  np.testing.assert_allclose(
    whole[:1, 30:60], dense(params, x[:1, 30:60], context(line(70)[:, 30:60], None)), atol=3e-6
  )
  assert not np.allclose(whole, tiled(params, x, context(line(70))), atol=1e-2)


def test_the_first_token_sees_only_the_null_key(params, x):
  gates_off = jax.tree.map(lambda a: a, params)
  gates_off["attention"] = {**params["attention"], "gate": jnp.zeros(4)}
  on, off = (tiled(p, x, context(line(70))) for p in (params, gates_off))
  np.testing.assert_allclose(on[:, 0], off[:, 0], atol=1e-7)
  assert np.max(np.abs(on[:, 1] - off[:, 1])) > 1e-3


def test_no_kick_reads_its_own_key_or_a_later_token(params, x):
  ctx = context(line(70))
  before = tiled(params, x, ctx)
  after = tiled(params, x.at[:, 40:].add(1.0), ctx)
  np.testing.assert_array_equal(before[:, :40], after[:, :40])
  assert np.max(np.abs(before[:, 41:] - after[:, 41:])) > 1e-3


def test_steps_equal_the_whole_with_ragged_rows_and_padding(params, x):
  whole = tiled(params, x, context(line(70)))
  state = symplectic.init_state(CFG, 2, 70)
  found = [np.zeros((70, 16), np.float32) for _ in range(2)]
  lengths = np.zeros(2, int)
  for take in ((7, 3), (1, 7), (0, 5), (7, 7)):
    width = max(take)
    piece = jnp.stack(
      [jnp.pad(x[b, n : n + k], ((0, width - k), (0, 0))) for b, (n, k) in enumerate(zip(lengths, take, strict=True))]
    )
    valid = np.arange(width) < np.array(take)[:, None]
    g, state = stepped(params, piece, state, context(jnp.asarray(lengths[:, None] + np.arange(width)), None, valid))
    for b in range(2):
      found[b][lengths[b] : lengths[b] + take[b]] = g[b, : take[b]]
    lengths += take
  for b in range(2):
    np.testing.assert_allclose(found[b][: lengths[b]], whole[b, : lengths[b]], atol=3e-6)
  assert list(lengths) == [15, 22]


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_extreme_inputs_stay_finite(params, x, dtype):
  p = jax.tree.map(lambda a: a.astype(dtype) if a.ndim > 1 else a, params)

  @jax.jit
  def both(p, x):
    options = {"lambda_min": LAMBDA_MIN}
    total = lambda p, x: sum(
      jnp.sum(g.astype(jnp.float32))
      for g in (
        symplectic.grad_V(p["attention"], x, context(line(5)), CFG, **options),
        symplectic.grad_T(p["mlp"], x, CFG, **options),
      )
    )
    return jax.value_and_grad(total, (0, 1))(p, x)

  for inputs in (0 * x[:, :5], 1e-4 * x[:, :5], 1e4 * x[:, :5], jnp.ones((2, 5, 16))):
    assert all(
      np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(both(p, inputs.astype(dtype)))
    )


def test_energies_of_tiles_and_dense_scores_agree(params, x):
  energy = lambda impl: symplectic.potential(
    params["attention"], x, context(line(70)), CFG, lambda_min=LAMBDA_MIN, impl=impl
  )
  np.testing.assert_allclose(energy("auto"), energy("reference"), rtol=1e-5)


def test_a_layer_has_the_parameters_of_a_standard_one_and_starts_as_confined_free_motion():
  for kv in (4, 2):
    cfg = dataclasses.replace(CFG, n_kv_head=kv, n_embd=64)
    ours, standard = count(symplectic.kick_specs(cfg)), count(stack.specs(cfg))
    assert abs(ours / standard - 1) < 0.04  # amplitudes, biases, temperatures and gates
  drawn = init_params(jax.random.key(0), symplectic.kick_specs(CFG))
  x = jax.random.normal(jax.random.key(1), (1, 5, 16))
  np.testing.assert_allclose(symplectic.grad_T(drawn["mlp"], x, CFG, lambda_min=0.05), 0.1 * x, rtol=1e-5)
  kick = symplectic.grad_V(drawn["attention"], x, context(line(5)), CFG, lambda_min=0.0)
  np.testing.assert_allclose(kick, 0.05 * x, rtol=1e-5)


def test_another_mlp_is_refused():
  with pytest.raises(ValueError, match="mlp=gelu has no effect"):
    symplectic.kick_specs(dataclasses.replace(CFG, mlp="gelu"))


def test_declared_cost_is_what_the_program_multiplies(params):
  T = 256
  x, ctx = jax.ShapeDtypeStruct((1, T, 16), jnp.float32), context(line(T))
  kick = lambda p, x: symplectic.grad_V(p["attention"], x, ctx, CFG, lambda_min=LAMBDA_MIN)
  drift = lambda p, x: symplectic.grad_T(p["mlp"], x, CFG, lambda_min=LAMBDA_MIN)
  assert abs(matmul_flops(kick, params, x) / T / symplectic.potential_cost(CFG, T).matmul - 1) < 0.15
  assert matmul_flops(drift, params, x) / T == symplectic.kinetic_cost(CFG).matmul


def test_memory_grows_linearly_with_length(params):
  def temp_bytes(T):
    x = jax.ShapeDtypeStruct((1, T, 16), jnp.float32)
    loss = lambda p, x: jnp.sum(symplectic.grad_V(p["attention"], x, context(line(T)), CFG, lambda_min=0.0) ** 2)
    return jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis().temp_size_in_bytes

  short, long = temp_bytes(1024), temp_bytes(4096)
  assert long < 4.5 * short


@pytest.mark.parametrize("step, expected", ((integrators.euler, 1), (integrators.leapfrog, 2)))
def test_energy_of_the_first_token_stays_in_a_band_of_the_integrators_order(step, expected):
  claims = symplectic_claims
  sizes = np.array([0.1, 0.05, 0.025])

  @jax.jit
  @jax.vmap
  def band(h):
    alone = lambda q: jnp.zeros_like(case.q).at[0].set(q)
    kinetic = lambda p: symplectic.kinetic(case.params["mlp"], p[None, None], claims.CFG, lambda_min=0.05)[0, 0]
    energy = lambda q, p: claims.potential(case.params, alone(q))[0] + kinetic(p)
    kick, drift = lambda q: claims.grad_V(case, alone(q))[0], lambda p: claims.grad_T(case, p[None])[0]

    def layer(i, state):
      q, p, worst = state
      q, p = step(q, p, kick, drift, h)
      change = jnp.abs(energy(q, p) - energy(*start))
      return q, p, jnp.where(i * h <= 200, jnp.maximum(worst, change), worst)  # the same time for all steps

    return jax.lax.fori_loop(0, 8000, layer, (*start, 0.0 * h))[2]

  with jax.enable_x64(True):
    case = claims.case(np.random.default_rng(0))
    for part in case.params.values():
      part["amplitude"] *= 0.1
    # An orbit with angular momentum stays away from zero, where a potential of the direction alone is stiff.
    start = jnp.array([4.0, 0.0, 1.0, 0.0]), jnp.array([0.0, 4.0, 0.0, 1.0])
    bands = np.asarray(band(jnp.asarray(sizes)))
  assert abs(order(bands, sizes) - expected) < 0.1
