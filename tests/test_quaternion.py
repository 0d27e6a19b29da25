"""Quaternion attention: what its options refuse, closed-form gradients, decoding, memory, diagnostics, claims."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import hypercomplex
from mgr_jax.attention import quaternion, standard
from mgr_jax.attention.mechanism import rope_tables
from mgr_jax.attention.quaternion_options import Options
from mgr_jax.attention.quaternion_transport import blocks, rotate_by_position, strengthen, turn
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"rotor_action": "right"}, ["rotor_action=right", "left, sandwich, none"]),
      ({"rope_mode": "left_rotor"}, ["rope_mode=left_rotor", "right_rotor, score_only, standard"]),
      ({"rotor_strength": "0.5"}, ["rotor_strength=0.5", "fixed, learned"]),
      ({"impl": "flash"}, ["impl=flash", "auto, tiled, reference"]),
      ({"rotor_action": "none", "rotor_strength": "learned"}, ["rotor_strength=learned", "rotor_action=none"]),
      ({"rotor_action": "none", "rope_mode": "standard"}, ["rope_mode=standard", "score_only"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match="quaternion option") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_a_head_is_a_whole_number_of_quaternions(self):
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
      gpt.specs(GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=12, attention="quaternion"))

  def test_strength_is_one_number_per_key_value_head(self):
    cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
    assert set(quaternion.param_specs(cfg, Options())) == {"wq", "wk", "wv", "wo"}
    spec = quaternion.param_specs(cfg, Options(rotor_strength="learned"))["lam_raw"]
    np.testing.assert_allclose(jax.nn.sigmoid(spec.draw(jax.random.key(0))), [0.05, 0.05], rtol=1e-5)


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def plain_turn(rotor, x, action, inverse):
  """The definition, block by block, differentiated by the library."""
  u = hypercomplex.unit(blocks(rotor), -2)
  u = hypercomplex.conjugate(u, -2) if inverse else u
  turned = hypercomplex.hamilton(u, blocks(x), -2)
  if action == "sandwich":
    turned = hypercomplex.hamilton(turned, hypercomplex.conjugate(u, -2), -2)
  return turned.reshape(x.shape)


@pytest.mark.parametrize("action", ["left", "sandwich"])
def test_gradients_of_a_turn_in_closed_form(action):
  @functools.partial(jax.jit, static_argnums=0)
  def run(f, args):
    objective = lambda args: sum(
      jnp.sum(jnp.sin(f(*args, action, inverse) + n)) for n, inverse in enumerate((False, True))
    )
    gradient = jax.grad(objective)
    return f(*args, action, True), gradient(args), jax.jvp(gradient, (args,), (args[::-1],))[1]

  with jax.enable_x64(True):
    args = tuple(jnp.asarray(draw(n, 2, 5, 12)) for n in range(2))
    got, want = run(turn, args), run(plain_turn, args)
    chex.assert_trees_all_close(got, want, atol=1e-12)
    off = run(lambda r, x, action, inverse: turn(r, x, action, not inverse), args)
    assert np.max(np.abs(off[0] - want[0])) > 0.1


@pytest.mark.parametrize("action", ["left", "sandwich"])
def test_a_rotor_without_direction_does_nothing_and_gets_no_gradient(action):
  rotor, x = np.zeros((1, 8), np.float32), draw(0, 1, 8).astype(np.float32)
  rotor[0, [1, 3]] = 1e-7, 2.0
  out, pull = jax.vjp(lambda r: turn(r, x, action, False), rotor)
  (gradient,) = pull(jnp.ones_like(out))
  first, second = [0, 2, 4, 6], [1, 3, 5, 7]
  np.testing.assert_array_equal(out[0, first], x[0, first])
  np.testing.assert_array_equal(gradient[0, first], 0)
  assert np.max(np.abs(out[0, second] - x[0, second])) > 0.1
  assert np.max(np.abs(gradient[0, second])) > 0.1


def test_positions_are_products_on_the_right():
  T, N = 9, 3
  x, positions = draw(0, 1, T, 2, 4 * N).astype(np.float32), np.arange(T)[None]
  angle = positions[0][:, None] * 100.0 ** (-np.arange(N) / N)
  p = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], 1)[None, :, None]
  got = blocks(rotate_by_position(x, rope_tables(positions, 4 * N, 100.0)))
  np.testing.assert_allclose(got, hypercomplex.hamilton(blocks(x), jnp.asarray(p, jnp.float32), -2), atol=1e-5)
  assert np.max(np.abs(got - hypercomplex.hamilton(jnp.asarray(p, jnp.float32), blocks(x), -2))) > 0.1


def test_strength_is_a_fraction_of_the_rotation():
  rotor = jnp.asarray(draw(0, 1, 50, 3, 8), jnp.float32)
  whole = hypercomplex.unit(blocks(rotor), -2)
  parts = blocks(strengthen(rotor, jnp.array([0.0, 0.5, 1.0])))
  np.testing.assert_allclose(parts[:, :, 0], np.broadcast_to([[1], [0], [0], [0]], (1, 50, 4, 2)), atol=1e-6)
  half = parts[:, :, 1]
  np.testing.assert_allclose(hypercomplex.hamilton(half, half, -2), whole[:, :, 1], atol=1e-5)
  np.testing.assert_allclose(parts[:, :, 2], whole[:, :, 2], atol=1e-5)
  # At the identity, at nothing, at a half turn and next to one, where the logarithm has no direction.
  hard = jnp.zeros((1, 4, 1, 4)).at[0, :, 0, 0].set(jnp.array([1.0, 0.0, -1.0, -1.0])).at[0, 3, 0, 1].set(1e-7)
  chex.assert_tree_all_finite(jax.vjp(strengthen, hard, jnp.array([0.3]))[1](jnp.ones_like(hard)))


def layer(attention, T, n_head=4, n_kv_head=2, n_embd=32, dtype="float32"):
  cfg = GPTConfig(
    vocab_size=8,
    seq_len=T,
    n_layer=1,
    n_head=n_head,
    n_kv_head=n_kv_head,
    n_embd=n_embd,
    attention=attention,
    compute_dtype=dtype,
  )
  return cfg, gpt.stack.runs(cfg)[0].options


def draw_params(cfg, opts):
  specs = quaternion.param_specs(cfg, opts)
  return {n: (s.shape[0] ** -0.5 * draw(i, *s.shape)).astype(np.float32) for i, (n, s) in enumerate(specs.items())}


def whole(params, x, cfg, opts, probe=False):
  context = gpt.context(jnp.arange(x.shape[1])[None], cfg, probe=probe)
  return quaternion.MECHANISM.apply(params, x, context, cfg, opts)


@pytest.mark.parametrize(
  ("attention", "dtype", "tolerance"),
  [
    ("quaternion", "float32", 2e-5),
    ("quaternion(rotor_action=sandwich,rope_mode=score_only,rotor_strength=learned)", "bfloat16", 2e-2),
  ],
)
def test_decoding_in_pieces_of_any_size_gives_the_whole(attention, dtype, tolerance):
  T = 24
  cfg, opts = layer(attention, T, dtype=dtype)
  params = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, draw_params(cfg, opts))
  x = jnp.asarray(draw(50, 2, T, 32), dtype)
  expected = np.asarray(jax.jit(lambda x: whole(params, x, cfg, opts)[0])(x), np.float32)
  step = jax.jit(lambda x, state, at: quaternion.step(params, x, state, gpt.context(at[None], cfg), cfg, opts))
  for piece in (1, 3, 8):
    state, parts = quaternion.init_state(cfg, opts, 2, T), []
    for start in range(0, T, piece):
      y, state = step(x[:, start : start + piece], state, jnp.arange(start, start + piece))
      parts.append(np.asarray(y, np.float32))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=tolerance, atol=tolerance)
  assert np.max(np.abs(np.concatenate(parts[::-1], 1) - expected)) > 0.1


@pytest.mark.parametrize("repeats", [2, 4])
def test_query_heads_share_keys_and_values(repeats):
  cfg, opts = layer("quaternion(rotor_strength=learned)", 20, n_head=4, n_kv_head=4 // repeats)
  wide, _ = layer("quaternion(rotor_strength=learned)", 20, n_head=4, n_kv_head=4)
  params, x = draw_params(cfg, opts), draw(50, 2, 20, 32).astype(np.float32)
  expand = lambda order: (
    params
    | {
      "wk": params["wk"][:, order],
      "wv": params["wv"][:, order],
      "lam_raw": params["lam_raw"][order],
    }
  )
  run = jax.jit(lambda params, cfg: whole(params, x, cfg, opts)[0], static_argnums=1)
  grouped, order = run(params, cfg), np.arange(4) // repeats
  np.testing.assert_allclose(run(expand(order), wide), grouped, atol=2e-5)
  if repeats == 2:
    assert np.max(np.abs(run(expand(order[[0, 2, 1, 3]]), wide) - grouped)) > 0.1


@pytest.mark.parametrize("attention", quaternion.MECHANISM.variants)
def test_nothing_in_gives_nothing_out(attention):
  cfg, opts = layer(attention, 7)
  params = draw_params(cfg, opts)

  @jax.jit
  def run(params, x):
    value, pull = jax.vjp(lambda params, x: whole(params, x, cfg, opts)[0], params, x)
    return value, pull(jnp.ones_like(value))

  value, gradients = run(params, np.zeros((1, 7, 32), np.float32))
  np.testing.assert_array_equal(value, 0)
  chex.assert_tree_all_finite(gradients)


def test_the_cache_is_as_large_as_that_of_softmax_attention():
  cfg, opts = layer("quaternion", 64)
  size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))
  plain = standard.MECHANISM.init_state(cfg, standard.Options(), 2, 64)
  assert size(quaternion.init_state(cfg, opts, 2, 64)) == size(plain)


def test_training_memory_grows_linearly_with_length():
  def temp_bytes(attention, T):
    cfg, opts = layer(attention, T, n_head=2, n_embd=16)
    params = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in quaternion.param_specs(cfg, opts).items()}
    x = jax.ShapeDtypeStruct((1, T, 16), jnp.float32)
    gradient = jax.grad(lambda params, x: jnp.sum(jnp.sin(whole(params, x, cfg, opts)[0])), (0, 1))
    return jax.jit(gradient).lower(params, x).compile().memory_analysis().temp_size_in_bytes

  short, long = temp_bytes("quaternion", 1024), temp_bytes("quaternion", 2048)
  assert long < 2.2 * short
  scores = 4 * 2 * 1024**2
  assert short < scores < temp_bytes("quaternion(impl=reference)", 1024)


class TestDiagnostics:
  @staticmethod
  def read(params, x, cfg, opts):
    return jax.jit(lambda params, x: whole(params, x, cfg, opts, probe=True)[1])(params, x)

  def test_equal_tokens_without_positions_agree(self):
    cfg, opts = layer("quaternion(rope_mode=score_only)", 70)
    params = draw_params(cfg, opts)
    params["wq"] = np.repeat(params["wk"], 2, axis=1)
    aux = self.read(params, np.ones((1, 70, 32), np.float32), cfg, opts)
    np.testing.assert_allclose(aux["alignment"], 1, atol=1e-5)
    np.testing.assert_allclose(aux["coherence"], 1, atol=1e-4)
    np.testing.assert_allclose(aux["angle"], 0, atol=2e-3)
    assert aux["degenerate"] == 0

  def test_random_tokens_do_not(self):
    cfg, opts = layer("quaternion(rotor_strength=learned)", 70)
    x = draw(9, 1, 70, 32).astype(np.float32)
    params = draw_params(cfg, opts)
    strong = self.read(params | {"lam_raw": np.full(2, 20, np.float32)}, x, cfg, opts)
    weak = self.read(params | {"lam_raw": np.full(2, -20, np.float32)}, x, cfg, opts)
    assert 0.05 < strong["coherence"] < 0.8
    assert strong["angle"][0] < strong["angle"][1] < strong["angle"][2]
    # The score is the sum of the real parts, so what is attended to is turned by less than a right angle.
    assert 0.8 < strong["angle"][1] < np.pi / 2
    assert strong["alignment"] > 0.1
    np.testing.assert_allclose([weak["alignment"], *weak["strength"]], [1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(strong["real_share"], 0.25, atol=0.1)

  def test_no_direction_is_counted(self):
    cfg, opts = layer("quaternion", 5)
    aux = self.read(draw_params(cfg, opts), np.zeros((1, 5, 32), np.float32), cfg, opts)
    assert aux["degenerate"] == 1
    assert aux["output_rms"] == 0


@pytest.mark.parametrize("claim", quaternion.MECHANISM.claims, ids=lambda c: c.name)
def test_claims_hold(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message or result
