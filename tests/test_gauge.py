"""Gauge attention: what its options refuse, every block size, documents, decoding, memory, cost, diagnostics, story."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demos import gauge as demo
from mgr_jax.attention import gauge, gauge_claims, gauge_connection, gauge_fibres
from mgr_jax.attention.gauge_chain import Chain, Setting
from mgr_jax.attention.gauge_options import Options
from mgr_jax.claims import relative_difference, run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"b": 5}, ["b=5", "2, 3, 4, 6, 8"]),
      ({"rank": -1}, ["rank=-1", "0 for a full matrix"]),
      ({"theta_max": 0.0}, ["theta_max=0", "positive"]),
      ({"context": "pair"}, ["context=pair", "token, edge"]),
      ({"rope": "inner"}, ["rope=inner", "outer, base, none"]),
      ({"rope": "base", "b": 3}, ["rope=base", "b=3", "odd"]),
      ({"values": "none"}, ["values=none", "transport, plain"]),
      ({"mixer": "heat"}, ["mixer=heat", "softmax, poisson"]),
      ({"mixer": "poisson", "m_max": 17.0}, ["m_max=17", "up to 16"]),
      ({"mixer": "poisson", "terms": 65}, ["terms=65", "up to 64"]),
      ({"mixer": "poisson", "reach": 31}, ["reach=31", "up to 30"]),
      ({"m_max": 2.0}, ["m_max=2", "no effect", "mixer=poisson"]),
      ({"terms": 3}, ["terms=3", "no effect"]),
      ({"reach": 3}, ["reach=3", "no effect"]),
      ({"b": 2, "scan": "serial"}, ["scan=serial", "no effect", "sum of angles"]),
      ({"b": 2, "reorth": "off"}, ["reorth=off", "no effect"]),
      ({"scan": "chunk:1"}, ["scan=chunk:1", "assoc, serial"]),
      ({"reorth": "qr"}, ["reorth=qr", "auto, off"]),
      ({"share": "model"}, ["share=model", "kv, layer"]),
      ({"impl": "fused"}, ["impl=fused", "auto, reference"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match="gauge option") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_a_block_must_divide_the_head(self):
    with pytest.raises(ValueError, match="b=6 does not divide the head size 8; use b of 2, 4, 8"):
      gpt.specs(GPTConfig(n_layer=1, n_head=4, n_kv_head=4, n_embd=32, attention="gauge(b=6)"))

  def test_transports_outside_the_rotations_do_not_exist(self):
    with pytest.raises(ValueError, match="gauge has no option 'transport'"):
      gpt.specs(GPTConfig(n_layer=1, attention="gauge(transport=spd)"))

  def test_parameters_follow_the_options(self):
    cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=128, seq_len=100)
    shapes = lambda **options: {
      n: s.shape for n, s in gauge.param_specs(cfg, Options(**options)).items() if n[0] != "w"
    }
    assert shapes() == {"gen_in": (128, 32), "gen_out": (32, 2, 6, 8)}
    assert shapes(b=2, rank=0) == {"gen_full": (128, 2, 1, 16)}
    assert shapes(b=8, share="layer", context="edge") == {"gen_in": (256, 32), "gen_out": (32, 1, 28, 4)}
    assert shapes(mixer="poisson")["off_bias"] == (4, 8), "staying and hops of 1, 2, ..., 64"
    assert shapes(mixer="poisson", reach=3)["off_bias"] == (4, 5)
    specs = gauge.param_specs(cfg, Options())
    assert specs["gen_out"].role == "scalar", "never decayed, so that decay cannot pull towards commuting transports"
    np.testing.assert_array_equal(specs["gen_out"].draw(jax.random.key(0)), 0)

  def test_poisson_series_are_as_long_as_the_tail_asks(self):
    assert [Options(mixer="poisson", m_max=m).n_terms for m in (0.2, 1, 4, 8, 16)] == [5, 10, 18, 27, 41]
    assert Options(mixer="poisson", m_max=0.01).n_terms == 3, "and a single term leaves a tail of 5e-5"
    assert Options(mixer="poisson", terms=7).n_terms == 7


def layer(attention, T, n_embd=64, n_head=4, n_kv_head=2):
  cfg = GPTConfig(
    vocab_size=8, seq_len=T, n_layer=1, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, attention=attention
  )
  return cfg, gpt.stack.runs(cfg)[0].options


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noisy(cfg, opts):
  return {n: 0.2 * draw(i, *s.shape) for i, (n, s) in enumerate(gauge.param_specs(cfg, opts).items())}


@functools.partial(jax.jit, static_argnums=(3, 4))
def run(params, x, segments, cfg, opts):
  """Outputs, and the gradient of a scalar of them with respect to parameters and inputs."""

  def objective(params, x):
    ctx = gpt.context(jnp.arange(x.shape[1])[None], cfg, segment_ids_BT=segments)
    y = gauge.apply(params, x, ctx, cfg, opts)[0]
    return jnp.sum(jnp.sin(3 * y)), y

  (_, y), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)
  return y, grads


@pytest.mark.parametrize(
  "attention",
  [
    "gauge(b=3,scan=chunk:8)",
    "gauge(b=6,context=edge,scan=assoc)",
    "gauge(b=6,rope=base,share=layer,reorth=off,values=plain)",
  ],
)
def test_blocks_of_three_and_six_equal_the_reference(attention):
  """Head size 12; two documents in a row, with the reference's autodiff through serial products."""
  cfg, opts = layer(attention, 40, n_embd=48)
  _, slow = layer(attention[:-1] + ",impl=reference)", 40, n_embd=48)
  params, x = noisy(cfg, opts), draw(9, 2, 40, 48)
  segments = np.repeat([[0, 1], [0, 0]], 20, axis=1)
  fast, want = run(params, x, segments, cfg, opts), run(params, x, segments, cfg, slow)
  assert relative_difference(fast, want) < 2e-4
  assert relative_difference(run(params, x, 0 * segments, cfg, opts), want) > 1e-2, "documents do matter"


def test_scans_agree():
  a = draw(0, 2, 50, 2, 6, 3)
  frames = lambda scan: jax.jit(lambda a: gauge_fibres.fibre(4).frames(a, Chain(), Setting(9.0, scan, True)))(a)
  want = frames("serial").rotation
  for scan in ("assoc", "chunk:8"):
    np.testing.assert_allclose(frames(scan).rotation, want, atol=2e-5)
  other = jax.jit(lambda a: gauge_fibres.fibre(4).frames(a[:, ::-1], Chain(), Setting(9.0, "serial", True)))(a)
  assert np.max(np.abs(np.asarray(other.rotation)[:, :, :, -1] - np.asarray(want)[:, :, :, -1])) > 0.1


def test_generators_are_capped_and_cross_the_sphere_of_angles():
  r = 10.0 ** np.array([-9, -2, 0, 5])[:, None, None] * draw(1, 4, 6, 100)
  a = np.asarray(gauge_connection.capped(r, 4.0))
  length = np.linalg.norm(a, axis=-2)
  assert np.all(length <= 4.0 * (1 + 1e-6))
  np.testing.assert_allclose(a[0], r[0], rtol=1e-5)
  assert length[3].min() > 3.99
  zero = jnp.zeros((1, 6, 2))
  np.testing.assert_allclose(jax.grad(lambda r: jnp.sum(gauge_connection.capped(r, 4.0)))(zero), 1)


@pytest.mark.parametrize("b", [2, 4, 8])
def test_a_base_alone_is_rotary_position(b):
  """With generators of zero, U is constant and T_t turns queries as RoPE does."""
  cfg, opts = layer(f"gauge(b={b},rope=base)", 16)
  a = jnp.zeros((1, 16, 2, b * (b - 1) // 2, 16 // b))
  F = gauge_connection.connect(a, cfg, opts)
  (w,) = gauge_connection.pull(F, (jnp.asarray(draw(3, 1, 16, 4, 16)),), cfg, opts)
  rope = gpt.context(1 + jnp.arange(16)[None], cfg).shared["rope"]
  np.testing.assert_allclose(w, gauge.rotate(draw(3, 1, 16, 4, 16), rope), atol=1e-5)


@pytest.mark.parametrize(
  "attention", ["gauge(context=edge)", "gauge(b=2,share=layer)", "gauge(mixer=poisson,terms=4,rope=none)"]
)
def test_decoding_in_pieces_gives_the_whole_and_a_rewound_cache_gives_nothing(attention):
  T, cuts = 64, [*range(0, 60, 5), *range(60, 65)]
  cfg, opts = layer(attention, T)
  params, x = noisy(cfg, opts), draw(50, 2, T, 64)
  whole = jax.jit(lambda x: gauge.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, opts)[0])(x)
  step = jax.jit(lambda x, state, at: gauge.step(params, x, state, gpt.context(at[None], cfg), cfg, opts))
  state, parts = gauge.MECHANISM.init_state(cfg, opts, 2, T), []
  for start, stop in itertools.pairwise(cuts):
    y, state = step(x[:, start:stop], state, jnp.arange(start, stop))
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)
  stale, _ = step(x[:, 5:10], state, jnp.arange(5, 10))
  assert np.isnan(stale).all(), "the frame of token 63 does not belong to a cache cut back to 5"


def test_order_matters_only_between_blocks_larger_than_two():
  """R from the first to the last token, with the tokens between in two orders."""
  order = np.array([0, 3, 1, 4, 2, 5])
  for b, least, most in ((2, 0.0, 1e-5), (3, 1e-2, 9.0), (4, 1e-2, 9.0), (6, 1e-2, 9.0)):
    fibre = gauge_fibres.fibre(b)
    a = draw(b, 1, 6, 1, b * (b - 1) // 2, 2)

    def transport(a, fibre=fibre):
      T = fibre.matrix(fibre.rotation(fibre.frames(a, Chain(), Setting(9.0, "serial", True))))
      return np.asarray(T[:, -1] @ T[:, 0].swapaxes(-1, -2))

    change = np.max(np.abs(transport(a) - transport(a[:, order])))
    assert least <= change <= most, (b, change)


def test_covariance_needs_the_law_of_the_group():
  assert gauge_claims.covariance_error(np.random.default_rng(0), "group") < 1e-12
  assert gauge_claims.covariance_error(np.random.default_rng(0), "algebra") > 1e-2, "right to first order only"


def test_gradients_can_be_differentiated():
  cfg, opts = layer("gauge", 12, n_embd=16, n_head=2, n_kv_head=1)
  params, x = noisy(cfg, opts), draw(2, 1, 12, 16)
  direction = noisy(cfg, opts)

  def objective(params):
    ctx = gpt.context(jnp.arange(12)[None], cfg)
    return jnp.sum(jnp.sin(3 * gauge.apply(params, x, ctx, cfg, opts)[0]))

  gradient = jax.jit(jax.grad(objective))
  product = jax.jit(lambda p: jax.jvp(jax.grad(objective), (p,), (direction,))[1])(params)
  step = lambda h: gradient({n: p + h * direction[n] for n, p in params.items()})
  numeric = jax.tree.map(lambda a, b: (a - b) / 2e-2, step(1e-2), step(-1e-2))
  assert relative_difference(product, numeric) < 3e-2
  assert relative_difference(jax.tree.map(lambda x: 1.1 * x, product), numeric) > 3e-2


def test_training_memory_grows_linearly_with_length():
  def temp_bytes(attention, T):
    cfg, opts = layer(attention, T)

    def objective(params, x):
      return jnp.sum(jnp.sin(gauge.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, opts)[0]))

    specs = gauge.param_specs(cfg, opts)
    params = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in specs.items()}
    compiled = (
      jax.jit(jax.grad(objective, (0, 1))).lower(params, jax.ShapeDtypeStruct((1, T, 64), jnp.float32)).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temp_bytes("gauge", 1024), temp_bytes("gauge", 2048)
  assert long < 2.2 * short
  assert long < 4 * 4 * 2048**2 < temp_bytes("gauge(impl=reference)", 2048), "less than the scores of four heads"


@pytest.mark.parametrize("options", ["b=3", "b=6", "b=6,scan=chunk:16,rope=base,context=edge", "b=6,reorth=off,rank=0"])
def test_cost_counts_the_matrix_products_of_the_program(options):
  T = 256
  cfg, opts = layer(f"gauge({options})", T, n_embd=48)
  specs = gauge.param_specs(cfg, opts)
  params = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in specs.items()}
  forward = lambda params, x: gauge.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, opts)[0]
  counted = matmul_flops(forward, params, jax.ShapeDtypeStruct((1, T, 48), jnp.float32)) / T
  assert 0.85 <= gauge.cost(cfg, opts, T).matmul / counted <= 1.15


@pytest.mark.parametrize("b", [2, 4])
def test_diagnostics_see_what_does_not_commute(b):
  cfg, opts = layer(f"gauge(b={b})", 24)
  params, x = noisy(cfg, opts), draw(4, 2, 24, 64)
  measure = jax.jit(
    lambda params: gauge.apply(params, x, gpt.context(jnp.arange(24)[None], cfg, probe=True), cfg, opts)[1]
  )
  aux = measure(params)
  assert 0 < aux["angle_mean"] < aux["angle_max"] < 4
  assert 0 < aux["cap_frac"] < 1
  assert aux["drift"] < 2e-6
  order = [aux["commutator"], aux["abelian_gap"], aux["bch2_ratio"]]
  assert max(order) < 1e-5 if b == 2 else min(order) > 0.1
  still = measure(params | {"gen_out": 0 * params["gen_out"]})
  assert still["angle_max"] == still["abelian_gap"] == still["bch2_ratio"] == 0


@pytest.mark.parametrize("claim", gauge.MECHANISM.claims, ids=lambda c: c.name)
def test_claims_hold(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message or result


class TestStory:
  def test_two_quarter_turns_in_the_other_order_are_a_third_of_a_turn_apart(self):
    np.testing.assert_allclose(demo.two_turns(90, plane=False), 120)
    assert demo.two_turns(90, plane=True) < 1e-12

  def test_only_the_rule_of_the_group_is_covariant(self):
    group, algebra, none = demo.covariance(np.random.default_rng(0), 0.03).values()
    assert group < 1e-12 < 1e-3 < algebra < none
