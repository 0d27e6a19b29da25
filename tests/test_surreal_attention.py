"""Surreal attention: options, roles, factors and their fold, floating values, training, memory, diagnostics."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax import schedules
from mgr_jax.attention import standard, surreal, surreal_probe
from mgr_jax.attention.mechanism import project_qkv, rms_norm
from mgr_jax.attention.surreal_linear import MAX_TEMPERATURE, linear_specs, norms
from mgr_jax.attention.surreal_options import Options
from mgr_jax.attention.surreal_values import MAX_GROWTH, log_magnitudes, written
from mgr_jax.claims import largest_difference, run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim import make_optimizer
from mgr_jax.params import init_params
from mgr_jax.step import init_train_state, make_train_step
from train.experiments import surreal_param

CFG = GPTConfig(vocab_size=32, seq_len=16, n_layer=1, n_head=4, n_kv_head=2, n_embd=32)


def noisy(opts: Options, cfg=CFG, seed: int = 0):
  rng = np.random.default_rng(seed)
  specs = surreal.param_specs(cfg, opts)
  start = init_params(jax.random.key(seed), specs)
  return {n: np.asarray(p) + np.float32(0.2) * rng.standard_normal(p.shape, np.float32) for n, p in start.items()}


def tokens(T: int = 13, C: int = CFG.n_embd):
  return np.random.default_rng(7).standard_normal((2, T, C), np.float32)


def run(params, x, opts, cfg=CFG, probe=False, mechanism=surreal.MECHANISM):
  ctx = gpt.context(jnp.arange(x.shape[1])[None], cfg, probe=probe)
  return jax.jit(lambda p, x: mechanism.apply(p, x, ctx, cfg, opts))(params, x)


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"qk": "none"}, ["qk=none", "direction, full"]),
    ({"values": "double"}, ["values=double", "plain, float"]),
    ({"granularity": "row"}, ["granularity=row", "column, matrix"]),
    ({"impl": "pallas"}, ["impl=pallas", "auto, reference"]),
    ({"s_max": 0.0}, ["s_max=0", "(0, 20]", "bfloat16"]),
    ({"s_max": 21.0}, ["s_max=21", "(0, 20]"]),
    ({"qk": "full", "granularity": "matrix"}, ["qk=full", "granularity=matrix", "cancels"]),
    ({"values": "float", "s_max": 4.0}, ["s_max=4.0", "no effect", "values=float"]),
  ],
)
def test_a_refusal_names_option_value_and_range(options, said):
  with pytest.raises(ValueError, match="surreal option") as error:
    Options(**options)
  for words in said:
    assert words in str(error.value)


def test_a_range_that_does_not_hold_the_initial_sizes_is_refused_before_anything_is_built():
  cfg = dataclasses.replace(CFG, n_head=8, n_kv_head=1)
  with pytest.raises(ValueError, match=r"s_max=1.5 .* n_head=8, n_kv_head=1; use 2.04 to 20"):
    gpt.specs(dataclasses.replace(cfg, attention="surreal(s_max=1.5)"))
  specs = surreal.param_specs(cfg, Options(s_max=2.1))
  raw = specs["wv_scale"].draw(jax.random.key(0))
  assert np.all(np.abs(2.1 * np.tanh(raw / 2.1) + 0.5 * math.log(8)) < 0.6)


def test_roles_and_shapes_follow_the_options():
  roles = lambda opts: {name: spec.role for name, spec in surreal.param_specs(CFG, opts).items()}
  directions = dict.fromkeys(("wq", "wk", "wv", "wo"), "direction") | {"wo_gate": "gate"}
  assert roles(Options()) == directions | {"wv_scale": "log_scale", "tau": "log_scale"}
  assert roles(Options(qk="full")) == directions | dict.fromkeys(("wq_scale", "wk_scale", "wv_scale"), "log_scale")
  assert roles(Options(values="float")) == directions | {"tau": "log_scale", "wl": "scalar", "b": "scalar"}
  column, matrix = (surreal.param_specs(CFG, Options(granularity=g)) for g in ("column", "matrix"))
  assert (column["wv_scale"].shape, column["wo_gate"].shape) == ((2, 8), (32,))
  assert (matrix["wv_scale"].shape, matrix["wo_gate"].shape) == ((2, 1), (1,))
  extra = lambda specs: sum(s.size for n, s in specs.items() if n not in ("wq", "wk", "wv", "wo"))
  assert extra(column) == 2 * 8 + 32 + 4, "a number per output"
  assert column["wq"].renorm
  assert not surreal.param_specs(CFG, Options(renorm=False))["wq"].renorm


@pytest.mark.parametrize("opts", [Options(), Options(qk="full"), Options(granularity="matrix")])
def test_initial_directions_have_their_radius_and_the_layer_is_silent(opts):
  specs = surreal.param_specs(CFG, opts)
  params = init_params(jax.random.key(0), specs)
  for name in ("wq", "wk", "wv", "wo"):
    np.testing.assert_allclose(norms(params[name], specs[name]), specs[name].radius, rtol=1e-6)
  assert not np.any(run(params, tokens(), opts)[0])


@pytest.mark.parametrize("claim", surreal.MECHANISM.claims, ids=lambda c: c.name)
def test_claims_hold(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message or result


class TestTemperature:
  def test_a_learned_temperature_is_the_gain_of_folded_queries(self):
    params, x = noisy(Options()), tokens()
    plain, gain = surreal.fold(params, CFG, Options())
    assert np.max(np.abs(gain - 1)) > 0.1

    def mixed(gain_H):
      ctx = gpt.context(jnp.arange(13)[None], CFG)
      q, k, v = project_qkv(plain, x, ctx, rope=True, qk_norm=True)
      out, _ = standard.mix(q * gain_H[:, None], k, v, {}, ctx, CFG, standard.Options(qk_norm=False))
      return np.asarray(out.reshape(2, 13, -1) @ plain["wo"].reshape(-1, 32))

    want = run(params, x, Options())[0]
    np.testing.assert_allclose(mixed(gain), want, atol=1e-5)
    assert largest_difference(mixed(jnp.ones(4)), want) > 1e-2

  def test_it_starts_at_root_of_the_head_size_and_stays_below_its_bound(self):
    gain = lambda tau: surreal.query_gain({"tau": tau}, CFG, Options())
    start = surreal.param_specs(CFG, Options())["tau"].draw(jax.random.key(0))
    np.testing.assert_allclose(gain(start), 1.0, rtol=1e-6)
    assert float(gain(jnp.float32(50.0))) * 8**0.5 == pytest.approx(MAX_TEMPERATURE)
    slope = jax.grad(lambda t: jnp.log(gain(t)))(jnp.float32(7.0))
    assert 0.01 < slope < 0.2, "near the bound a gradient is left that leads back"

  def test_the_hottest_heads_give_finite_gradients(self):
    opts, x = Options(), tokens()
    params = noisy(opts) | {"tau": np.full(4, 50.0, np.float32)}
    found = jax.grad(lambda p: jnp.sum(run(p, x, opts)[0] ** 2))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(found))


class TestFold:
  def test_what_is_learned_last_is_folded_too(self):
    opts = Options(qk="full", granularity="column")
    plain, gain = surreal.fold(noisy(opts), CFG, opts)
    assert set(plain) == {"wq", "wk", "wv", "wo"}
    assert {n: w.shape for n, w in plain.items()} == {
      n: s.shape for n, s in standard.MECHANISM.param_specs(CFG, standard.Options()).items()
    }
    assert np.all(gain == 1)

  def test_floating_values_have_no_ordinary_form(self):
    opts = Options(values="float")
    with pytest.raises(ValueError, match="values=float cannot be folded"):
      surreal.fold(noisy(opts), CFG, opts)


class TestFloatingValues:
  def test_without_magnitudes_it_is_attention_to_normalised_values(self):
    opts, x = Options(values="float"), tokens()
    params = noisy(opts) | {"wl": np.zeros((32, 2), np.float32)}
    plain = surreal.weights(params, CFG, opts)
    ctx = gpt.context(jnp.arange(13)[None], CFG)
    q, k, v = project_qkv(plain, x, ctx, rope=True, qk_norm=True)
    gain = surreal.query_gain(params, CFG, opts)[:, None]

    def through(v):
      out, _ = standard.mix(q * gain, k, v, {}, ctx, CFG, standard.Options(qk_norm=False))
      return np.asarray(out.reshape(2, 13, -1) @ plain["wo"].reshape(-1, 32))

    got = run(params, x, opts)[0]
    np.testing.assert_allclose(got, through(rms_norm(v)), atol=1e-5)
    assert largest_difference(got, through(v)) > 1e-2

  def test_magnitudes_are_cut_off_and_enter_the_output_by_their_logarithm(self):
    z = np.array([[[-1e9, 3.0, 1e9]]], np.float32)
    np.testing.assert_array_equal(log_magnitudes({"wl": np.eye(3, dtype=np.float32)}, z), [[[-20, 3, 20]]])
    u, b = np.full((1, 1, 1, 2), 0.5, np.float32), np.full((1, 2), 0.25, np.float32)
    for size, growth in ((1.0, 1.0), (20.0, MAX_GROWTH), (-20.0, -MAX_GROWTH)):
      mixed = np.exp(np.float32(size)) * np.concatenate([u, np.ones((1, 1, 1, 1), np.float32)], -1)
      np.testing.assert_allclose(written(mixed, b), 0.5 * np.exp(growth) + 0.25 * size, rtol=1e-5)

  @pytest.mark.parametrize("scale", [1e3, 1e9])
  def test_extreme_magnitudes_stay_finite_in_value_and_gradient(self, scale):
    opts, x = Options(values="float"), tokens()
    params = noisy(opts)
    params["wl"] = np.float32(scale) * params["wl"]
    value, pull = jax.vjp(lambda p: run(p, x, opts)[0], params)
    assert np.all(np.isfinite(value))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(pull(jnp.ones_like(value))))

  def test_decoding_in_bfloat16_keeps_magnitudes_in_float32(self):
    cfg = dataclasses.replace(CFG, compute_dtype="bfloat16")
    state = surreal.init_state(cfg, Options(values="float"), 2, 5)
    assert (state.k_BSKD.dtype, state.v_BSKD.dtype, state.v_BSKD.shape) == (jnp.bfloat16, jnp.float32, (2, 5, 2, 9))
    opts = Options(values="float")
    params, x = noisy(opts), jnp.asarray(tokens(5), jnp.bfloat16)
    ctx = gpt.context(jnp.arange(5)[None], cfg)
    got, _ = jax.jit(lambda *args: surreal.step(*args, ctx, cfg, opts))(params, x, state)
    want = run(params, x, opts, cfg)[0]
    assert got.dtype == jnp.bfloat16
    assert largest_difference(got, want) < 0.05 * float(jnp.max(jnp.abs(want)))


def test_second_derivatives_go_forward_over_reverse():
  opts, x = Options(values="float"), tokens(5)
  params = jax.tree.map(jnp.asarray, noisy(opts))
  ctx = gpt.context(jnp.arange(5)[None], CFG)
  loss = lambda p: jnp.sum(jnp.sin(surreal.apply(p, x, ctx, CFG, opts)[0]))
  direction = jax.tree.map(jnp.ones_like, params)
  product = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (direction,))[1])(params)
  slope = lambda e: jax.grad(loss)(jax.tree.map(lambda p: p + e, params))
  step = 1e-2
  numeric = jax.jit(lambda: jax.tree.map(lambda a, b: (a - b) / (2 * step), slope(step), slope(-step)))()
  for name, got in product.items():
    assert largest_difference(got, numeric[name]) < 0.02 * float(jnp.max(jnp.abs(numeric[name]))) + 1e-3


def test_training_keeps_directions_on_their_sphere_or_lets_them_drift():
  cfg = dataclasses.replace(CFG, n_layer=2, attention="surreal,surreal(renorm=false)")
  optimizer = make_optimizer("adamw", gpt.specs(cfg), cfg)
  schedule = schedules.make_schedule("constant", 4)
  step = make_train_step(cfg, optimizer, schedule)
  state = init_train_state(cfg, optimizer, schedule, seed=0)
  batch = {n: jax.random.randint(jax.random.key(i), (2, 16), 0, 32) for i, n in enumerate(("tokens", "targets"))}
  first = jax.device_get(state.params["runs"])
  for _ in range(4):
    state, _ = step(state, batch)
  specs = linear_specs(cfg, Options())
  kept, free = (run["attention"] for run in state.params["runs"])
  for name in ("wq", "wk", "wv", "wo"):
    size = lambda params, name=name: np.asarray(norms(params[name][0], specs[name])) / specs[name].radius
    np.testing.assert_allclose(size(kept), 1.0, rtol=1e-6)
    assert np.mean(size(free)) > 1 + 1e-6
    assert largest_difference(kept[name], first[0]["attention"][name]) > 1e-3
  assert np.any(np.asarray(kept["wo_gate"]) != 0)


def test_training_memory_of_floating_values_grows_with_the_length_not_its_square():
  def temp_bytes(T, opts):
    cfg = dataclasses.replace(CFG, seq_len=T)
    params = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in surreal.param_specs(cfg, opts).items()}
    x = jax.ShapeDtypeStruct((1, T, cfg.n_embd), jnp.float32)
    ctx = gpt.context(jnp.arange(T)[None], cfg)
    loss = lambda p, x: jnp.sum(jnp.sin(surreal.apply(p, x, ctx, cfg, opts)[0]))
    return jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile().memory_analysis().temp_size_in_bytes

  fast, dense = Options(values="float"), Options(values="float", impl="reference")
  short, long = temp_bytes(512, fast), temp_bytes(1024, fast)
  assert long < 2.5 * short
  assert temp_bytes(1024, dense) > 5 * long


def test_diagnostics_of_the_start_and_of_one_loud_token():
  opts = Options(values="float")
  params = init_params(jax.random.key(0), surreal.param_specs(CFG, opts))
  _, aux = run(params, tokens(70), opts, probe=True)
  for name in ("wq", "wk", "wv", "wo"):
    assert float(aux[f"{name}_v_norm"]) == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(aux["tau"], 0.5 * math.log(8), rtol=1e-5)
  assert float(aux["gate"]) == 0
  assert np.max(np.abs([aux[f"lambda_{n}"] for n in ("mean", "p01", "p99")])) < 1e-5
  q, k = np.zeros((1, 70, 4, 8), np.float32), np.zeros((1, 70, 2, 8), np.float32)
  loud = np.where(np.arange(70)[None, :, None] == 35, 20.0, 0.0) * np.ones((1, 1, 2))
  tops = surreal_probe.top_weights(q, k, np.float32(loud))
  np.testing.assert_allclose(tops[0, 0, 0, :35], 1 / (1 + np.arange(35)), rtol=1e-5)
  assert np.all(np.asarray(tops)[..., 35:] > 0.99)
  segments = np.where(np.arange(70) < 36, 0, 1)[None]
  assert np.all(np.asarray(surreal_probe.top_weights(q, k, np.float32(loud), segments))[..., 40:] < 0.5)

  _, plain = run(noisy(Options(qk="full")), tokens(), Options(qk="full"), probe=True)
  assert {f"{n}_{what}" for n in ("wq_s", "wk_s", "wv_s") for what in ("mean", "std", "min", "max")} < set(plain)
  assert {"wq_sat_frac", "wk_sat_frac", "wv_sat_frac"} < set(plain)
  assert "tau" not in plain
  assert plain["wv_s_min"] < plain["wv_s_mean"] < plain["wv_s_max"]


def test_cost_by_hand():
  cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=128)
  plain = surreal.cost(cfg, Options(), 256)
  assert plain.matmul == standard.MECHANISM.cost(cfg, standard.Options(), 256).matmul
  floating = surreal.cost(cfg, Options(values="float"), 256)
  assert floating.matmul - plain.matmul == 2 * 128 * 4 + 2 * 128 * 2  # a channel of T/2 keys; log-magnitudes
  assert plain.bytes == 2 * 2 * 32 * 4 * 128
  assert floating.bytes == 2 * 128 * (32 + 33) * 4


class TestExperimentRows:
  def test_answers_compare_the_numbers_that_are_shown(self):
    for lengths in (surreal_param.TRAINED, surreal_param.LONGER):
      batch = jax.device_get(surreal_param.compare(lengths)(jax.random.key(0), 200, None))
      shown = batch["tokens"][:, :-1]
      assert np.all(batch["tokens"][:, -1] == surreal_param.ASK)
      read = lambda digits: [int("".join(str(d) for d in row if d != surreal_param.BLANK)) for row in digits]
      a, b = read(shown // 11), read(shown % 11)
      assert {len(str(n)) for n in (*a, *b)} == set(lengths)
      assert np.array_equal(batch["targets"][:, -1], np.greater(a, b))
      assert np.array_equal(batch["weights"][:, -1], np.not_equal(a, b))
      assert not np.any(batch["weights"][:, :-1])
      assert 0.3 < np.mean(batch["targets"][:, -1]) < 0.7

  def test_a_coin_decides_the_placebo(self):
    args = jax.random.key(0), 400, None
    real, placebo = (
      jax.device_get(surreal_param.compare(surreal_param.TRAINED, coin=coin)(*args)) for coin in (False, True)
    )
    assert np.array_equal(real["tokens"], placebo["tokens"])
    assert 0.4 < np.mean(real["targets"][:, -1] == placebo["targets"][:, -1]) < 0.6

  def test_one_item_is_the_largest_and_its_payload_the_answer(self):
    batch = jax.device_get(surreal_param.largest(12, 24)(jax.random.key(0), 200, None))
    shown = batch["tokens"][:, :-1]
    empty = shown == surreal_param.MAGNITUDES * surreal_param.PAYLOADS
    assert set(np.sum(~empty, 1)) == {12, 24}
    size = np.where(empty, -1, shown // surreal_param.PAYLOADS)
    top = np.max(size, 1, keepdims=True)
    assert np.all(np.sum(size == top, 1) == 1)
    payload = np.take_along_axis(shown, np.argmax(size, 1)[:, None], 1)[:, 0] % surreal_param.PAYLOADS
    assert np.array_equal(batch["targets"][:, -1], payload)
