"""Ultrametric attention: what its options refuse, closed-form gradients, decode pieces, cost, memory, frozen levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from demos import ultrametric as ultrametric_demo
from mgr_jax.attention import ultrametric, ultrametric_digits, ultrametric_features
from mgr_jax.attention.ultrametric_dense import dense_attention
from mgr_jax.attention.ultrametric_features import tree_attention
from mgr_jax.attention.ultrametric_options import Options
from mgr_jax.attention.ultrametric_sort import ball_attention
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt
from mgr_jax.params import init_params

B, G, R, D = 2, 2, 2, 3


CLAIMS = [c for c in ultrametric.MECHANISM.claims if c.name.startswith("ultrametric.")]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claims_hold_and_their_controls_fail(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"p": 1}, ["p=1", "2 to 64"]),
      ({"K": 0}, ["K=0", "1 to 32"]),
      ({"digits": "binary"}, ["digits=binary", "soft, st, hard"]),
      ({"theta": "0"}, ["theta=0", "not positive"]),
      ({"theta": "exp:1"}, ["theta=exp:1", "exp:1.0:0.2"]),
      ({"alpha_init": 1.0}, ["alpha_init=1.0", "above 1"]),
      ({"alpha_init": float("inf")}, ["alpha_init=inf", "above 1"]),
      ({"level_weights": "flat"}, ["level_weights=flat", "geometric, free"]),
      ({"level_weights": "free", "alpha_learn": False}, ["alpha_learn=False", "level_weights=geometric"]),
      ({"decay": "rope"}, ["decay=rope", "alibi, none, learned"]),
      ({"digits_k": 4}, ["digits_k=4", "K = 3"]),
      ({"balance": -1.0}, ["balance=-1.0", "0 or more"]),
      ({"impl": "trie"}, ["impl=trie", "features, sort, reference"]),
      ({"chunk": 4}, ["chunk=4", "8 to 1024"]),
      ({"f_max": 84}, ["85 nodes", "f_max=84", "ste=local"]),
      ({"p": 16, "K": 6}, ["17895697 nodes", "ste=local"]),
      ({"impl": "features", "ste": "local"}, ["ste=local", "impl=features"]),
      ({"impl": "sort"}, ["ste=exact", "ste=local"]),
      ({"impl": "sort", "digits": "soft"}, ["digits=soft", "impl=sort"]),
      ({"digits": "soft", "ste": "local"}, ["ste=local", "digits=st"]),
      ({"digits": "hard", "theta": "2"}, ["theta=2", "digits=st or soft"]),
      ({"digits": "hard", "balance": 0.1}, ["balance=0.1", "digits=st or soft"]),
      ({"digits": "hard", "freeze_levels": 1}, ["freeze_levels=1", "digits=st or soft"]),
      ({"freeze_levels": 4}, ["freeze_levels=4", "K = 3"]),
      ({"decode": "disk"}, ["decode=disk", "auto, table, cache"]),
      ({"p": 16, "K": 6, "ste": "local", "decode": "table"}, ["decode=table", "4194304", "decode=cache"]),
      ({"impl": "sort", "ste": "local", "f_max": 99}, ["f_max=99", "impl=auto or features"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match="ultrametric option") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_a_kernel_beyond_float32_is_refused_before_anything_is_built(self):
    attention = "ultrametric(p=2,K=32,digits_k=32,ste=local,alpha_init=20)"
    with pytest.raises(ValueError, match=r"alpha_init=20.*2\^100.*at most"):
      gpt.specs(GPTConfig(n_layer=1, attention=attention))
    gpt.specs(GPTConfig(n_layer=1, attention=attention.replace("=20", "=4")))

  def test_auto_picks_what_can_serve(self):
    assert Options().implementation == "features"
    assert Options(digits="hard").implementation == "features"
    assert Options(digits="hard", p=16, K=6).implementation == "sort"
    assert Options(ste="local").implementation == "sort"
    assert (Options().decoder, Options(p=16, K=6, ste="local").decoder) == ("table", "cache")
    assert Options(p=16, K=6, digits_k=2).implementation == "features"

  def test_only_scheduled_temperatures_are_annealed(self):
    assert set(ultrametric.annealed(Options())) == {"theta"}
    assert ultrametric.annealed(Options(theta="0.5")) == {} == ultrametric.annealed(Options(digits="hard"))


def layer(seed=0, seq_len=64, n_head=4, **options):
  """Configuration, options and parameters of a small layer whose output projection is not zero."""
  cfg = GPTConfig(vocab_size=97, seq_len=seq_len, n_layer=1, n_head=n_head, n_kv_head=2, n_embd=8 * n_head)
  opts = Options(**options)
  params = init_params(jax.random.key(seed), ultrametric.param_specs(cfg, opts))
  params["wo"] = 0.3 * jax.random.normal(jax.random.key(seed + 1), params["wo"].shape)
  return cfg, opts, params


def tokens(cfg, T, seed=2):
  return jax.random.normal(jax.random.key(seed), (2, T, cfg.n_embd))


def case(soft, p=3, K=2, T=29):
  rng = np.random.default_rng(4)
  logits = rng.standard_normal((B, G, R, K, p, T)), rng.standard_normal((B, G, K, p, T))
  rest = (1 + rng.random((G, R, K + 1)), rng.standard_normal((B, T, G, D)), -rng.random(G) / 9)
  return (
    jax.tree.map(jnp.asarray, (*logits, *rest)),
    np.sort(rng.integers(0, 3, (B, T)), 1),
    Options(digits="soft" if soft else "st"),
  )


class TestClosedForms:
  """Value, gradient and Hessian-vector product against autodiff through all pairs, in float64."""

  def compare(self, fast, exact, args, opts, constant=0):
    """`constant` leading arguments do not move in the Hessian-vector product."""
    tangent = (*jax.tree.map(jnp.zeros_like, args[:constant]), *args[constant:])

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, args):
      def objective(args):
        a, b, *rest = args
        a, b = (ultrametric_digits.digits(jax.nn.softmax(x, -2), opts) for x in (a, b))
        return jnp.sum(jnp.sin(attend(a, b, *rest)))

      gradient = jax.grad(objective)
      return objective(args), gradient(args), jax.jvp(gradient, (args,), (tangent,))[1]

    got, want = run(fast, args), run(exact, args)
    error = lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
    assert max(jax.tree.leaves(jax.tree.map(error, got, want))) < 1e-11
    assert max(jax.tree.leaves(jax.tree.map(error, jax.tree.map(lambda x: 1.001 * x, got), want))) > 1e-11

  @pytest.mark.parametrize("soft", [True, False])
  def test_features(self, soft, monkeypatch):
    monkeypatch.setattr(ultrametric_features, "BLOCK_FEATURES", 2 * 8 * 9)
    with jax.enable_x64(True):
      args, segments, opts = case(soft)
      fast = lambda *x: tree_attention(*x, segments, 8)
      self.compare(fast, lambda *x: dense_attention(*x, segments), args, opts)

  def test_sort(self):
    with jax.enable_x64(True):
      args, segments, opts = case(False)
      fast = lambda *x: ball_attention(*x, segments, 8)
      # The estimator's own derivative by hard digits is not defined: they are constants of the product.
      self.compare(fast, lambda *x: dense_attention(*x, segments, local=True), args, opts, constant=2)


@pytest.mark.parametrize("first", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("options", [{"decay": "learned"}, {"digits": "soft"}, {"ste": "local", "p": 9, "K": 2}])
def test_decode_after_a_long_first_piece(first, options):
  T = 133
  cfg, opts, params = layer(seq_len=T, **options)
  x = tokens(cfg, T)
  context = lambda start, n: gpt.context(start + jnp.arange(n)[None], cfg)
  whole, _ = jax.jit(lambda x: ultrametric.apply(params, x, context(0, T), cfg, opts))(x)
  step = jax.jit(lambda x, state, start: ultrametric.step(params, x, state, context(start, x.shape[1]), cfg, opts))
  state = ultrametric.init_state(cfg, opts, 2, T)
  y, state = step(x[:, :first], state, 0)
  np.testing.assert_allclose(y, whole[:, :first], atol=1e-5)
  for t in range(first, first + 3):
    y, state = step(x[:, t : t + 1], state, t)
    np.testing.assert_allclose(y[:, 0], whole[:, t], atol=1e-5)
  y, _ = step(x[:, t : t + 1], ultrametric.init_state(cfg, opts, 2, T), t)
  assert float(jnp.max(jnp.abs(y[:, 0] - whole[:, t]))) > 1e-3, "an empty state must be noticed"


def test_ties_go_to_the_lowest_digit():
  probability = jnp.array([[0.4, 0.1], [0.4, 0.45], [0.2, 0.45]])[None]
  np.testing.assert_array_equal(ultrametric_digits.class_of(probability), [[0, 1]])
  np.testing.assert_array_equal(ultrametric_digits.one_hot(probability)[0], [[1, 0], [0, 1], [0, 0]])


def test_straight_through_digits_are_exactly_one_hot():
  probability = jax.nn.softmax(jax.random.normal(jax.random.key(0), (50, 4, 9)), -2)
  used = ultrametric_digits.digits(probability, Options())
  assert set(np.unique(used)) == {0.0, 1.0}
  assert len(np.unique(ultrametric_digits.digits(probability, Options(digits="soft")))) > 2


def test_balance_loss_is_zero_for_uniform_use_and_log_p_for_one_class():
  uniform = jnp.tile(jnp.eye(4), (1, 1, 1, 3))
  one = jnp.zeros((1, 1, 1, 4, 12)).at[..., 2, :].set(1)
  assert float(ultrametric_digits.balance_loss(uniform, uniform)) == pytest.approx(0, abs=1e-6)
  assert float(ultrametric_digits.balance_loss(one, one)) == pytest.approx(np.log(4), rel=1e-6)


@pytest.mark.parametrize(("options", "present"), [({}, True), ({"balance": 0.0}, False), ({"digits": "hard"}, False)])
def test_aux_loss_is_there_exactly_when_it_has_a_weight(options, present):
  cfg, opts, params = layer(**options)
  ctx = gpt.context(jnp.arange(9)[None], cfg)
  _, aux = jax.eval_shape(lambda x: ultrametric.apply(params, x, ctx, cfg, opts), tokens(cfg, 9))
  assert ("aux_loss" in aux) == present


def test_digits_start_neither_sharp_nor_uniform():
  cfg, opts, params = layer(seq_len=512, theta="1")
  q, k = (jax.random.normal(jax.random.key(i), (2, 512, h, cfg.head_dim)) for i, h in ((0, 4), (1, 2)))
  for probability in ultrametric_digits.probabilities(q, k, params, gpt.context(jnp.arange(512)[None], cfg), opts):
    entropy = -jnp.mean(jnp.sum(probability * jnp.log(probability), -2)) / jnp.log(opts.p)
    assert 0.55 < float(entropy) < 0.8


def test_temperature_comes_from_the_schedule():
  cfg, opts, params = layer(digits="soft")
  x, ctx = tokens(cfg, 9), gpt.context(jnp.arange(9)[None], cfg)
  out = lambda **annealed: ultrametric.apply(params, x, ctx.replace(annealed=annealed), cfg, opts)[0]
  np.testing.assert_array_equal(out(), out(theta=1.0))
  assert float(jnp.max(jnp.abs(out(theta=jnp.float32(0.2)) - out()))) > 1e-3
  assert float(jax.grad(lambda t: jnp.sum(out(theta=t)))(1.0)) == 0


@pytest.mark.parametrize("frozen", [2, 0])
def test_frozen_levels_keep_tables_and_coarse_digits(frozen):
  """With projections held, the digits of frozen levels stay bit for bit; without freezing they move."""
  cfg, opts, params = layer(freeze_levels=frozen)
  ctx, x = gpt.context(jnp.arange(32)[None], cfg), tokens(cfg, 32)
  target = tokens(cfg, 32, seed=5)
  optimizer = optax.adam(0.05)
  fixed = ("wq", "wk")

  def loss(params):
    return jnp.mean((ultrametric.apply(params, x, ctx, cfg, opts)[0] - target) ** 2)

  @jax.jit
  def train(params):
    def update(carry, _):
      params, state = carry
      gradient = jax.grad(loss)(params)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(params, updates | {name: 0 * params[name] for name in fixed}), state), None

    return jax.lax.scan(update, (params, optimizer.init(params)), None, length=50)[0][0]

  def coarse(params):
    q, k = (jnp.reshape(x @ params[w].reshape(cfg.n_embd, -1), (2, 32, -1, cfg.head_dim)) for w in fixed)
    return [
      np.asarray(ultrametric_digits.class_of(a))[..., :2, :]
      for a in ultrametric_digits.probabilities(q, k, params, ctx, opts)
    ]

  trained = train(params)
  same = [np.array_equal(a, b) for a, b in zip(coarse(params), coarse(trained), strict=True)]
  assert all(same) if frozen else not any(same)
  assert not np.array_equal(trained["dq"][:, :, 2], params["dq"][:, :, 2])


@pytest.mark.parametrize(
  ("options", "T"), [({}, 256), ({"p": 2, "K": 5, "chunk": 32}, 128), ({"ste": "local", "p": 16, "K": 3}, 256)]
)
def test_cost_counts_the_matrix_products_that_run(options, T):
  cfg, opts, params = layer(seq_len=T, **options)
  ctx = gpt.context(jnp.arange(T)[None], cfg)
  counted = matmul_flops(lambda x: ultrametric.apply(params, x, ctx, cfg, opts)[0], tokens(cfg, T)) / (2 * T)
  declared = ultrametric.cost(cfg, opts, T).matmul
  assert declared == pytest.approx(counted, rel=0.02)
  assert declared != pytest.approx(ultrametric.cost(cfg, Options(impl="reference"), T).matmul, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"ste": "local", "p": 16, "K": 4}])
def test_memory_grows_linearly_with_the_sequence(options):
  def temp_bytes(T, **options):
    cfg, opts, params = layer(seq_len=T, **options)
    ctx = gpt.context(jnp.arange(T)[None], cfg)
    objective = lambda params, x: jnp.sum(jnp.sin(ultrametric.apply(params, x, ctx, cfg, opts)[0]))
    program = jax.jit(jax.grad(objective, (0, 1))).lower(params, tokens(cfg, T)).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert temp_bytes(1024, **options) < 2.3 * temp_bytes(512, **options)
  assert temp_bytes(1024, impl="reference") > 2.3 * temp_bytes(512, impl="reference")


class TestDemo:
  def test_story(self, key):
    text = ultrametric_demo.story(key)
    assert max(map(len, text.splitlines())) <= 100
    assert "terms cancel in 20000." in text
    assert "3126121" in text.partition("Hensel")[2], "digits of a square root of 2 in the 7-adic integers"
    series = text.partition("terms  ")[2].splitlines()
    assert series[1].split() == ["4^x", "3^-1", "3^-2", "3^-4", "3^-6", "3^-8"]
    assert "all right" in text

  def test_the_table_is_the_layer(self, key):
    differences = ultrametric_demo.agreement(key).partition(" at ")[0].split(", ")
    assert [x.split()[0] for x in differences] == ["features", "sort", "table"]
    assert all(float(x.split()[1]) < 1e-5 for x in differences)

  def test_write_once_learning_stays_below_the_best_possible(self):
    rows = ultrametric_demo.write_once(0)
    for samples, errors, nodes, right, best in rows:
      assert errors == nodes <= samples
      # The expectation over 256 random labels; four standard deviations of the guesses.
      assert right <= best + 4 * np.sqrt(0.25 * 0.75 * (1 - best) / 0.75 / 256) + 1e-9
    assert rows[-1][3] > 0.99 > rows[0][3]

  def test_two_mahler_series_converge_at_their_own_rate(self):
    for kept in (2, 4, 8):
      assert ultrametric_demo.mahler(lambda x: 4**x, kept) == (kept, kept)
      bound, reached = ultrametric_demo.mahler(lambda x: x % 3, kept)
      assert bound == reached == kept // 2
