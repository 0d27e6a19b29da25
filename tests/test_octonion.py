"""Octonion attention: options it refuses, closed-form gradients, head groups, decoding, memory, diagnostics, story."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demos import octonion as demo
from mgr_jax.algebra import octonions
from mgr_jax.attention import octonion, octonion_mixing, standard
from mgr_jax.attention.octonion_options import Options
from mgr_jax.claims import relative_difference, run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"bracketing": "middle"}, ["bracketing=middle", "early, late, mix"]),
      ({"rope_mode": "right_rotor"}, ["rope_mode=right_rotor", "score_only", "associate"]),
      ({"rope_mode": "none"}, ["rope_mode=none", "score_only, standard"]),
      ({"feature_dtype": "bf16"}, ["feature_dtype=bf16", "compute, fp32"]),
      ({"impl": "flash"}, ["impl=flash", "auto, reference, tiled"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match="octonion option") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_heads_hold_whole_octonions(self):
    with pytest.raises(ValueError, match=r"multiple of 8, not 12.*n_embd=64"):
      gpt.specs(GPTConfig(n_layer=1, n_head=4, n_kv_head=4, n_embd=48, attention="octonion"))

  def test_a_share_per_key_value_head_for_mix_alone(self):
    cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
    assert "lam_raw" not in octonion.param_specs(cfg, Options())
    spec = octonion.param_specs(cfg, Options(bracketing="mix"))["lam_raw"]
    np.testing.assert_allclose(jax.nn.sigmoid(spec.draw(jax.random.key(0))), [0.05, 0.05], rtol=1e-6)


PLAIN = {
  "multiply": octonions.multiply,
  "divide": lambda a, b: octonions.multiply(octonions.conjugate(a), b),
  "operator": lambda a, b: octonions.operator(octonions.wedge(a, b)),
  "act": octonions.act,
}


class TestProducts:
  @pytest.mark.parametrize("name", PLAIN)
  def test_closed_form_gradients_of_first_and_second_order(self, name):
    n = octonion_mixing.OPERATOR if name == "act" else 8

    def compare(fast):
      f = getattr(octonion_mixing, name)
      if not fast:
        f = lambda a, b: jnp.concatenate(PLAIN[name](jnp.split(a, n, -1), jnp.split(b, 8, -1)), -1)
      objective = lambda ab: jnp.sum(jnp.sin(f(*ab)))
      return lambda ab, to: (f(*ab), jax.grad(objective)(ab), jax.jvp(jax.grad(objective), (ab,), (to,))[1])

    with jax.enable_x64(True):
      args, tangents = ((draw(i, 3, n * 2), draw(i + 1, 3, 16)) for i in (1, 3))
      fast, slow = (jax.jit(compare(which))(args, tangents) for which in (True, False))
      assert relative_difference(fast, slow) < 1e-12
      wrong = jax.tree.map(lambda x: -x, slow[1])
      assert relative_difference(fast[1], wrong) > 1

  def test_zero_counts_as_one_with_a_finite_gradient(self):
    x = jnp.stack([jnp.zeros(8), jnp.full(8, 1e-30), jnp.arange(8.0)])
    y, pull = jax.vjp(octonions.unit, x)
    np.testing.assert_array_equal(y[:2], np.eye(8)[[0, 0]])
    np.testing.assert_allclose(jnp.sum(y * y, -1), 1, rtol=1e-6)
    assert np.isfinite(pull(jnp.ones_like(y))[0]).all()
    naive = jax.vjp(lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), x)[1](jnp.ones_like(y))[0]
    assert not np.isfinite(naive).all()

  def test_products_of_arrays_put_components_where_asked(self):
    x, y = draw(0, 5, 8), draw(1, 5, 8)
    xy = octonions.product(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(octonions.product(jnp.asarray(x.T), jnp.asarray(y.T), axis=0), xy.T, rtol=1e-6)
    e1, e2, e4, e7 = np.eye(8)[[1, 2, 4, 7]]
    assert np.array_equal(octonions.product(octonions.product(e1, e2), e4), e7)
    assert np.array_equal(octonions.product(e1, octonions.product(e2, e4)), -e7)


def test_tiles_take_values_of_another_width_and_dtype():
  q, k, v = (draw(i, *s).astype(np.float32) for i, s in enumerate([(1, 2, 2, 70, 4), (1, 2, 70, 4), (1, 2, 70, 9)]))

  @functools.partial(jax.jit, static_argnums=0)
  def run(tiled, q, k, v):
    def f(q, k, v):
      if tiled:
        return standard.tiled_attention(q, k, v, None, 0, False)[0]
      return standard.dense_attention(q, k, v)[0]

    out, pull = jax.vjp(f, q, k, v)
    return out, pull(jnp.cos(out))

  np.testing.assert_allclose(*(run(tiled, q, k, v)[0] for tiled in (True, False)), atol=1e-5)
  assert relative_difference(*(run(tiled, q, k, v)[1] for tiled in (True, False))) < 1e-5
  out, (dq, _, dv) = run(True, q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v)
  assert (out.dtype, dq.dtype, dv.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


def layer(attention, T, n_embd=32, n_head=4, n_kv_head=2, **fields):
  cfg = GPTConfig(
    vocab_size=8,
    seq_len=T,
    n_layer=1,
    n_head=n_head,
    n_kv_head=n_kv_head,
    n_embd=n_embd,
    attention=attention,
    **fields,
  )
  opts = gpt.stack.runs(cfg)[0].options
  specs = octonion.param_specs(cfg, opts)
  params = {n: 0.3 * draw(i, *s.shape).astype(np.float32) for i, (n, s) in enumerate(specs.items())}
  return cfg, opts, params


def run(params, x, cfg, opts, probe=False):
  ctx = gpt.context(jnp.arange(x.shape[1])[None], cfg, probe=probe)
  return octonion.apply(params, x, ctx, cfg, opts)


def test_one_pass_equals_two_products_per_pair():
  cfg, opts, params = layer("octonion(bracketing=mix)", 70, n_head=4, n_kv_head=1)
  x = draw(9, 2, 70, 32).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradient(opts, params):
    out, pull = jax.vjp(lambda params: run(params, x, cfg, opts)[0], params)
    return out, pull(jnp.cos(out))[0]

  reference = dataclasses.replace(opts, impl="reference")
  found, expected = value_and_gradient(opts, params), value_and_gradient(reference, params)
  assert relative_difference(found, expected) < 2e-5
  early = value_and_gradient(dataclasses.replace(reference, bracketing="early"), params)[0]
  assert np.max(np.abs(early - expected[0])) > 1e-2, "another share is another function"


def test_wide_features_reduce_the_rounding_of_bfloat16():
  cfg, opts, params = layer("octonion", 70)
  x = draw(9, 2, 70, 32).astype(np.float32)
  exact = jax.jit(lambda: run(params, x, cfg, opts)[0])()
  half = dataclasses.replace(cfg, compute_dtype="bfloat16")

  @functools.partial(jax.jit, static_argnums=0)
  def error(opts):
    params_16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    out = run(params_16, x.astype(jnp.bfloat16), half, opts)[0]
    return jnp.sqrt(jnp.mean(jnp.square(out.astype(jnp.float32) - exact)) / jnp.mean(jnp.square(exact)))

  narrow, wide = error(opts), error(dataclasses.replace(opts, feature_dtype="fp32"))
  assert 1e-4 < wide < narrow < 3e-2


@pytest.mark.parametrize("attention", ["octonion", "octonion(bracketing=late)"])
def test_memory_and_loops_do_not_grow_with_pairs(attention):
  def compiled(attention, T):
    cfg, opts, params = layer(attention, T, n_embd=64, n_kv_head=4)
    x = jax.ShapeDtypeStruct((1, T, 64), jnp.float32)
    objective = lambda params, x: jnp.sum(jnp.sin(run(params, x, cfg, opts)[0]))
    return jax.jit(jax.grad(objective, (0, 1))).trace(params, x)

  temp = lambda *args: compiled(*args).lower().compile().memory_analysis().temp_size_in_bytes
  short, long = temp(attention, 1024), temp(attention, 2048)
  assert long < 2.2 * short
  assert long < 4 * 4 * 2048**2, "less than the scores of four heads"
  lengths = {int(n) for n in re.findall(r"\blength=(\d+)", str(compiled(attention, 1024).jaxpr))}
  assert lengths == {2}, "loops over the tiles of a span, none over queries"


def test_reference_holds_all_pairs():
  cfg, opts, params = layer("octonion(impl=reference)", 256)
  x = jax.ShapeDtypeStruct((1, 256, 32), jnp.float32)
  program = jax.jit(lambda params, x: run(params, x, cfg, opts)[0]).lower(params, x).compile()
  assert program.memory_analysis().temp_size_in_bytes > 4 * 256**2 * 32


@pytest.mark.parametrize("piece", [1, 16])
@pytest.mark.parametrize("attention", ["octonion(bracketing=mix)", "octonion(bracketing=late,rope_mode=standard)"])
def test_decoding_in_pieces_gives_the_whole(attention, piece):
  T = 32
  cfg, opts, params = layer(attention, T)
  x = draw(50, 2, T, 32).astype(np.float32)
  whole, _ = jax.jit(lambda x: run(params, x, cfg, opts))(x)
  step = jax.jit(lambda x, state, at: octonion.step(params, x, state, gpt.context(at[None], cfg), cfg, opts))
  state, parts = octonion.init_state(cfg, opts, 2, T), []
  for start in range(0, T, piece):
    y, state = step(x[:, start : start + piece], state, jnp.arange(start, start + piece))
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)
  assert np.max(np.abs(np.concatenate(parts[::-1], 1) - whole)) > 1e-2


def test_diagnostics_tell_octonions_from_quaternions():
  cfg, opts, params = layer("octonion(bracketing=mix)", 40)
  x = draw(9, 8, 40, 32).astype(np.float32)
  probe = jax.jit(lambda params: run(params, x, cfg, opts, probe=True)[1])
  aux = probe(params)
  np.testing.assert_allclose(aux["associator_energy"], 21 / 16, rtol=0.1)
  assert aux["degenerate"] == 0
  assert 0 < aux["coherence"] <= 1
  assert 0 < aux["entropy"] < np.log(40)
  assert 1e-4 < aux["feature_error"] < 2**-8
  np.testing.assert_allclose(aux["share"], jax.nn.sigmoid(params["lam_raw"]))
  # Components 4 to 7 of every octonion switched off: quaternions, which associate.
  keep = (np.arange(8) < 4).astype(np.float32)
  aux = probe(params | {w: params[w] * keep for w in ("wq", "wk", "wv")})
  assert aux["associator_energy"] < 1e-10


@pytest.mark.parametrize("claim", octonion.MECHANISM.claims, ids=lambda c: c.name)
def test_claims_hold(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message or result


class TestStory:
  def test_pairs_and_64_and_29_sums_give_the_same(self):
    rng = np.random.default_rng(0)
    p, x = demo.weights(24), rng.standard_normal((3, 8, 24, 2))
    pairs, *others = (demo.mixed(way, p, *x) for way in demo.WIDTHS)
    *same, late = others
    for y in same:
      np.testing.assert_allclose(y, pairs, atol=1e-13)
    assert np.max(np.abs(late - pairs)) > 0.1

  def test_the_ladder_of_symmetries(self):
    holds = [
      tuple(bool(r < 1e-12) for r in row if not np.isnan(r)) for row in demo.ladder(np.random.default_rng(0)).values()
    ]
    assert holds == [(True,), (True, True), (True, False), (False, True), (False, False), (False, False)]

  def test_lines_of_the_fano_plane(self):
    assert demo.oriented_lines() == [(1, 2, 3), (1, 4, 5), (1, 7, 6), (2, 4, 6), (2, 5, 7), (3, 4, 7), (3, 6, 5)]
