"""Tropical attention: refusals, closed-form gradients, schedules, decode states, diagnostics, memory and cost."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demos import tropical as tropical_demo
from mgr_jax.algebra.tropical_claims import CLAIMS as ALGEBRA_CLAIMS
from mgr_jax.attention import tropical, tropical_cases, tropical_heads
from mgr_jax.attention.tropical_options import Options, implementation, matrix_beta, snapped
from mgr_jax.attention.tropical_scan import Plan, maxplus_attention
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"score": "cosine"}, ["score=cosine", "maxplus, hilbert, dot"]),
      ({"decay": "linear"}, ["decay=linear", "alibi, learned, none"]),
      ({"score_groups": 0}, ["score_groups=0", "divisor of the head size"]),
      ({"score_groups": 2, "score": "dot"}, ["score_groups=2", "score=maxplus"]),
      ({"beta": "-1"}, ["beta=-1", "not positive"]),
      ({"beta": "inf"}, ["beta=inf", "finite"]),
      ({"beta": "warm"}, ["beta=warm", "none, a number > 0, or a schedule"]),
      ({"beta": "linear:0:4"}, ["beta=linear:0:4", "not positive"]),
      ({"beta": "coverage:1:8:1.5", "margins": True}, ["floor 1.5", "(0, 1)"]),
      ({"beta": "coverage:1:8:0.5"}, ["beta=coverage:1:8:0.5", "margins=true"]),
      ({"beta": "2", "score": "hilbert"}, ["beta=2", "score=maxplus"]),
      ({"final": "snap"}, ["final=snap", "scheduled beta"]),
      ({"impl": "flash"}, ["impl=flash", "auto, scan, tiled"]),
      ({"impl": "scan", "score": "hilbert"}, ["impl=scan", "score=maxplus"]),
      ({"impl": "scan", "score_groups": 2}, ["impl=scan", "score_groups=1"]),
      ({"impl": "scan", "beta": "2"}, ["impl=scan", "beta=none"]),
      ({"impl": "tiled", "beta": "2"}, ["impl=tiled", "beta=none"]),
      ({"impl": "matrix"}, ["impl=matrix", "finite beta"]),
      ({"impl": "matrix", "beta": "1", "qk_norm": "none"}, ["impl=matrix", "qk_norm=rms"]),
      ({"impl": "streaming"}, ["impl=streaming", "finite beta"]),
      ({"chunk": -1}, ["chunk=-1", "0 (automatic)"]),
      ({"chunk": 48}, ["chunk=48", "rebase=256"]),
      ({"chunk": 32, "impl": "tiled"}, ["chunk=32", "impl=scan"]),
      ({"rebase": 0}, ["rebase=0", "1 or more"]),
      ({"rebase": 64, "decay": "none"}, ["rebase=64", "a decay"]),
      ({"center_q": True}, ["center_q=True", "center_score=false"]),
      ({"center_q": True, "score": "hilbert"}, ["center_q=True", "score=dot"]),
      ({"center_k": True, "score": "hilbert"}, ["center_k=True", "maxplus or dot"]),
      ({"center_score": False, "agg": "route"}, ["center_score=False", "agg=maxplus"]),
      ({"margins": True, "score": "hilbert"}, ["margins=True", "score=maxplus"]),
      ({"deterministic": True, "impl": "tiled"}, ["deterministic=True", "impl=scan"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match=r"tropical option|floor") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_options_that_do_not_fit_the_head_are_refused_before_tracing(self):
    cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
    with pytest.raises(ValueError, match=r"score_groups=3.*head size 8.*1, 2, 4, 8"):
      tropical.param_specs(cfg, Options(score_groups=3))
    with pytest.raises(ValueError, match=r"impl=matrix.*beta=8.*up to 3\.54"):
      tropical.param_specs(cfg, Options(impl="matrix", beta="8"))
    with pytest.raises(ValueError, match="odd"):
      tropical.check_head(Options(rope=True), 7)

  def test_auto_picks_only_what_is_proven(self):
    assert implementation(Options(), 32) == "scan"
    assert implementation(Options(score="hilbert"), 32) == "tiled"
    assert implementation(Options(score_groups=4), 32) == "tiled"
    assert implementation(Options(beta="1"), 32) == "matrix"
    assert implementation(Options(beta="8"), 32) == "streaming"
    assert implementation(Options(beta="exp:0.5:64"), 32) == "streaming", "the last value of a schedule counts"
    assert implementation(Options(beta="1", qk_norm="none"), 32) == "streaming"
    assert 1.7 < matrix_beta(32) < 1.8

  def test_slopes(self):
    assert tropical_heads.slopes(1) == [2**-6]
    assert tropical_heads.slopes(4) == [0, 2**-4, 0, 2**-8]
    specs = tropical.param_specs(GPTConfig(n_layer=1, n_head=4, n_kv_head=4, n_embd=32), Options(decay="learned"))
    np.testing.assert_allclose(np.exp(specs["log_decay"].draw(jax.random.key(0)))[[0, 3]], [0.5, 2**-8], rtol=1e-5)


def layer(options, seed=0, n_embd=16):
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=n_embd)
  specs = tropical.param_specs(cfg, options)
  rng = np.random.default_rng(seed)
  noise = lambda s: (0.1 if s.role == "scalar" else 0.5) * rng.standard_normal(s.shape, np.float32)
  return cfg, {name: np.asarray(s.draw(jax.random.key(i))) + noise(s) for i, (name, s) in enumerate(specs.items())}


@functools.partial(jax.jit, static_argnums=(2, 3, 5))
def run(params, x, cfg, options, beta=None, probe=False):
  annealed = {} if beta is None else {"beta": beta}
  ctx = gpt.context(jnp.arange(x.shape[1])[None], cfg, annealed=annealed, probe=probe)
  return tropical.apply(params, x, ctx, cfg, options)


class TestClosedForms:
  """Values, gradients and Hessian-vector products against the definition in float64, over two documents."""

  def compare(self, fast, exact, T=40, R=2, broken=1.001):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      args = (*(jnp.asarray(x) for x in tropical_cases.draw(rng, T, R=R)), jnp.array([0.05, 0.2]))
      clock = tropical_cases.clock(T, cut=15)
      weight = rng.normal(size=args[0].shape)

      @functools.partial(jax.jit, static_argnums=0)
      def derivatives(f, args):
        gradient = jax.grad(lambda args: jnp.sum(weight * jnp.sin(f(*args, clock))))
        direction = jax.tree.map(lambda x: jnp.cos(7 * x), args)
        return f(*args, clock), gradient(args), jax.jvp(gradient, (args,), (direction,))[1]

      def error(x, y):
        ratio = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        return max(jax.tree.leaves(jax.tree.map(ratio, x, y)))

      got, want = derivatives(fast, args), derivatives(exact, args)
      assert error(got, want) < 1e-10
      assert error(jax.tree.map(lambda x: broken * x, got), want) > 1e-10

  @pytest.mark.parametrize("deterministic", [False, True])
  def test_scan(self, deterministic):
    plan = Plan(16, 16, deterministic)
    self.compare(lambda *a: maxplus_attention(*a, plan), tropical_cases.by_definition)

  @pytest.mark.parametrize("opts", [Options(score="hilbert"), Options(score_groups=2)])
  def test_tiles(self, opts):
    exact = lambda *a: tropical_cases.by_definition(*a, None, opts)
    self.compare(lambda *a: tropical_cases.by_tiles(*a, opts), exact, T=70, R=1)

  @pytest.mark.parametrize("form", [tropical_cases.by_streaming, tropical_cases.by_matrix])
  def test_finite_beta(self, form):
    self.compare(lambda *a: form(*a, 1.5), lambda *a: tropical_cases.by_definition(*a, 1.5))


def test_float32_forms_of_finite_beta_agree():
  rng = np.random.default_rng(0)
  args = (*(np.float32(x) for x in tropical_cases.draw(rng, 40)), np.float32([0.0, 0.1]), tropical_cases.clock(40))
  for beta in (0.5, 2.0, 8.0):
    want = tropical_cases.by_definition(*args, beta)
    for form in (tropical_cases.by_streaming, tropical_cases.by_matrix):
      np.testing.assert_allclose(form(*args, beta), want, atol=1e-4)
    assert np.max(np.abs(tropical_cases.by_streaming(*args, 1.1 * beta) - want)) > 1e-3


def test_streaming_holds_ranges_that_the_matrix_unit_cannot():
  rng = np.random.default_rng(0)
  q, k, v = (np.float32(100 * x) for x in tropical_cases.draw(rng, 40))
  args = q, k, v, np.float32([0.0, 0.1]), tropical_cases.clock(40)
  want = tropical_cases.by_definition(*args, 8.0)
  np.testing.assert_allclose(tropical_cases.by_streaming(*args, 8.0), want, rtol=1e-5, atol=1e-3)
  saturated = tropical_cases.by_matrix(*args, 8.0)
  assert np.all(np.isfinite(saturated))
  assert np.max(np.abs(saturated - want)) > 1


class TestSchedules:
  options = Options(beta="exp:1:64", final="snap", margins=True)

  def test_the_live_value_is_used_and_costs_no_compilation(self):
    cfg, params = layer(self.options)
    x = np.random.default_rng(1).standard_normal((1, 20, 16), np.float32)
    traces = []

    @jax.jit
    def out(params, beta):
      traces.append(1)
      ctx = gpt.context(jnp.arange(20)[None], cfg, annealed={"beta": beta})
      return tropical.apply(params, x, ctx, cfg, self.options)[0]

    start, _ = run(params, x, cfg, self.options)
    np.testing.assert_array_equal(out(params, jnp.float32(1.0)), start)
    fixed = dataclasses.replace(self.options, beta="5", final="hold", impl="streaming")
    np.testing.assert_allclose(out(params, jnp.float32(5.0)), run(params, x, cfg, fixed)[0], atol=1e-6)
    assert np.max(np.abs(out(params, jnp.float32(5.0)) - start)) > 1e-3
    assert len(traces) == 1
    sensitivity = jax.grad(lambda beta: jnp.sum(jnp.sin(out(params, beta))))(jnp.float32(2.0))
    assert sensitivity == 0, "no gradient flows into the schedule"

  def test_the_options_after_the_snap_are_the_limit(self):
    cfg, params = layer(self.options)
    x = np.random.default_rng(1).standard_normal((1, 20, 16), np.float32)
    hard, aux = run(params, x, cfg, snapped(self.options))
    assert 0 <= aux["coverage"] <= 1
    gaps = [np.max(np.abs(run(params, x, cfg, self.options, jnp.float32(b))[0] - hard)) for b in (1, 64, 4096)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.02

  def test_record_names_what_changes(self):
    assert tropical.annealed(Options()) == {} == tropical.annealed(Options(beta="4"))
    assert tropical.annealed(self.options)["beta"].stop == 64

  def test_only_snap_changes_the_options_at_the_end(self):
    assert snapped(Options(beta="exp:1:64")) == Options(beta="exp:1:64")
    assert snapped(self.options) == Options(margins=True)
    assert snapped(Options(beta="1", final="snap", impl="matrix", chunk=16)) == Options(chunk=16)


def test_coverage_is_emitted_on_every_call_and_grows_with_beta():
  options = Options(beta="coverage:1:64:0.5", margins=True)
  cfg, params = layer(options)
  x = np.random.default_rng(1).standard_normal((3, 20, 16), np.float32)
  found = [run(params, x, cfg, options, jnp.float32(beta))[1] for beta in (1, 8, 1e6)]
  assert all(set(aux) == {"coverage"} for aux in found)
  values = [float(aux["coverage"]) for aux in found]
  assert values[0] < values[1] < values[2] <= 1 and values[2] > 0.95


def test_diagnostics_appear_only_when_asked_for():
  options = Options(margins=True, beta="2")
  cfg, params = layer(options)
  x = np.random.default_rng(1).standard_normal((3, 20, 16), np.float32)
  assert run(params, x, cfg, Options(beta="2"))[1] == {}
  aux = run(params, x, cfg, options, None, True)[1]
  assert set(aux) == {
    *("coverage", "tau", "decay", "input_range", "beta", "exponent_range", "margin_mean", "margin_min", "margin_p10"),
    *("ties", "coverage_conservative", "candidate_use", "coherence", "lag_histogram", "silent_keys", "drift"),
    "score_spread_over_value_spread",
  }
  chex.assert_tree_all_finite(aux)
  assert aux["coverage_conservative"] <= aux["coverage"]
  assert 0 <= aux["margin_min"] <= aux["margin_p10"] <= aux["margin_mean"]
  np.testing.assert_allclose(jnp.sum(aux["lag_histogram"]), 1, rtol=1e-6)
  assert 0 < aux["silent_keys"] < 1 and 0 < aux["candidate_use"] <= 1 and 0 < aux["coherence"] <= 1
  chex.assert_tree_all_finite(run(params, x[:, :1], cfg, options, None, True)[1])


@pytest.mark.parametrize(
  "options", [Options(rebase=16, chunk=8), Options(beta="4", rebase=16), Options(score="hilbert")]
)
def test_long_ragged_pieces_decode_like_the_whole(options):
  cfg, params = layer(options)
  T, piece = 60, 50
  x = np.random.default_rng(1).standard_normal((2, T, cfg.n_embd), np.float32)
  lengths = np.array([piece, piece - 6])
  whole = run(params, x, cfg, options)[0]

  @jax.jit
  def step(x, state, start, valid):
    ctx = gpt.context(start[:, None] + jnp.arange(x.shape[1]), cfg, valid_BT=valid)
    return tropical.step(params, x, state, ctx, cfg, options)

  state = tropical.init_state(cfg, options, 2, T)
  valid = np.arange(piece) < lengths[:, None]
  first, after = step(x[:, :piece], state, np.zeros(2, np.int32), valid)
  _, after_all = step(x[:, :piece], state, np.zeros(2, np.int32), np.ones_like(valid))
  new = np.stack([x[row, n : n + 3] for row, n in enumerate(lengths)])
  second, _ = step(new, after, lengths, np.ones((2, 3), bool))
  for row, n in enumerate(lengths):
    chex.assert_trees_all_close(first[row, :n], whole[row, :n], atol=2e-5)
    chex.assert_trees_all_close(second[row], whole[row, n : n + 3], atol=2e-5)
  if options.factors:
    assert np.max(np.abs(step(new, after_all, lengths, np.ones((2, 3), bool))[0][1] - second[1])) > 1e-4
    # A row that is nothing but padding stays empty.
    _, empty = step(x[:, :3], state, np.zeros(2, np.int32), np.zeros((2, 3), bool))
    chex.assert_trees_all_equal(empty, state)


def test_decode_states_do_not_grow_where_the_score_factors():
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
  size = lambda options, T: sum(x.size for x in jax.tree.leaves(tropical.init_state(cfg, options, 1, T)))
  assert size(Options(), 10) == size(Options(), 10_000) == 2 * 4 * 5
  assert size(Options(beta="4"), 10_000) == 2 * size(Options(), 10)
  assert size(Options(score="hilbert"), 1000) == 1000 * 2 * 4 * 2


def test_fixed_slopes_and_beta_receive_no_gradient():
  cfg, params = layer(Options())
  x = np.random.default_rng(1).standard_normal((1, 20, 16), np.float32)
  loss = lambda options: lambda params: jnp.sum(jnp.sin(run(params, x, cfg, options)[0]))
  np.testing.assert_array_equal(jax.grad(loss(Options()))(params)["slopes"], 0)
  learned = Options(decay="learned")
  cfg, params = layer(learned)
  assert np.all(jax.grad(loss(learned))(params)["log_decay"] != 0)


@pytest.mark.parametrize(
  "options",
  [Options(), Options(chunk=32), Options(beta="1"), Options(beta="8"), Options(margins=True)],
  ids=["scan", "chunks", "matrix", "streaming", "margins"],
)
def test_training_memory_grows_linearly(options):
  cfg, params = layer(options)

  def temp_bytes(options, T):
    objective = lambda params, x: jnp.sum(jnp.sin(run(params, x, cfg, options)[0]))
    x = jax.ShapeDtypeStruct((1, T, 16), jnp.float32)
    return jax.jit(jax.grad(objective, (0, 1))).lower(params, x).compile().memory_analysis().temp_size_in_bytes

  assert temp_bytes(options, 2048) < 2.2 * temp_bytes(options, 1024)
  if options == Options():
    assert temp_bytes(Options(impl="reference"), 512) > 3.5 * temp_bytes(Options(impl="reference"), 256)


@pytest.mark.parametrize("options", [Options(), Options(beta="1"), Options(beta="8"), Options(score="dot")])
def test_cost_counts_the_products_that_run(options):
  T = 512
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=64)
  params = {name: jnp.zeros(s.shape) for name, s in tropical.param_specs(cfg, options).items()}
  counted = matmul_flops(lambda x: run(params, x, cfg, options)[0], jnp.zeros((1, T, 64))) / T
  assert abs(tropical.cost(cfg, options, T).matmul / counted - 1) < 0.1


def test_cost_by_hand():
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=64)
  H, K, D, E, C = 4, 2, 16, 17, 64
  projections = 2 * C * D * (2 * H + 2 * K)
  scan = tropical.cost(cfg, Options(), 256)
  assert scan.matmul == projections and scan.vector == 2 * (H + K) * D * E and scan.exp == 0
  assert scan.bytes == 4 * K * D * E and scan == tropical.cost(cfg, Options(), 4096)
  assert tropical.cost(cfg, Options(beta="8"), 256).bytes == 2 * scan.bytes
  matrix = tropical.cost(cfg, Options(beta="1"), 256)
  assert matrix.matmul == projections + 2 * (H * (64 * (D + E) + D * E) + K * D * E)
  tiled = tropical.cost(cfg, Options(score="hilbert"), 256)
  assert tiled.vector == 2 * H * (256 * 9 / 16) * (2 * D + E)


LAYER_CLAIMS = tropical.MECHANISM.claims[len(ALGEBRA_CLAIMS) :]


@pytest.mark.parametrize("part", range(3))
def test_claims_of_the_layer_hold(part, key):
  for result in run_claims(LAYER_CLAIMS[part::3], key):
    assert result.holds, result.message or result


class TestDemo:
  def test_story(self, key):
    text = tropical_demo.story(key)
    assert max(map(len, text.splitlines())) <= 100
    assert "has the roots -3 (×1), -1 (×1), 2 (×3)" in text
    assert "in chunks of 16 tokens the same bits" in text
    assert "1.001 of it flips and 0.999 does not in 300 of 300 outputs" in text
    assert "re-added they give the maximum's own bits" in text
    assert "300 certified steps: own loss fell as counted in 300" in text

  def test_the_cliff_lies_where_the_theorem_says(self):
    share = tropical_demo.retrievable(0)
    n = np.array(tropical_demo.ITEMS)
    assert np.all(share["one group"] <= np.minimum(1, tropical_demo.D / n))
    assert np.all(share["one group"][-3:] > 0.9 * tropical_demo.D / n[-3:])
    assert np.all(share["one group"][2:] < share["4 groups"][2:]) and share["4 groups"][-1] < 0.5
    assert np.all(share["Hilbert"] == 1) and np.all(share["softmax"] == 1)

  def test_nothing_dilutes_while_the_lead_exceeds_the_spread(self, monkeypatch):
    weight, exact, pooled = tropical_demo.pivot(0)
    np.testing.assert_allclose(weight, 1 / (1 + (tropical_demo.DECOYS - 1) * np.exp(-tropical_demo.GAP)))
    assert np.all(exact == 1) and pooled[-1] < 0.1
    monkeypatch.setattr(tropical_demo, "GAP", 0.5)
    assert tropical_demo.pivot.__wrapped__(0)[1][-1] < 0.5, "values decide once they spread more than the lead"
