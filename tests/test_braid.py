"""Braid attention: what its options refuse, closed-form gradients, ties, decode states, memory, exported schedules."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra.additive_gate import execute_schedule
from mgr_jax.attention import (
  braid,
  braid_bins,
  braid_chebyshev,
  braid_gated,
  braid_gates,
  braid_sorted,
  braid_strands,
  braid_sweep,
  mechanism,
)
from mgr_jax.attention.braid_options import Options
from mgr_jax.attention.braid_scores import ADDITIVE, BILINEAR, BOUNDED_ADDITIVE, RAPIDITY
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt

B, K, R, D = 2, 2, 2, 3
H = K * R


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"mode": "sharp"}, ["mode=sharp", "monodromy"]),
      ({"score": "rapidity"}, ["score=rapidity", "mode=soft", "additive, bilinear"]),
      ({"mode": "word", "score": "additive"}, ["score=additive", "mode=word"]),
      ({"norm": "max"}, ["norm=max", "sqrt_mass"]),
      ({"cheb_rank": 65}, ["cheb_rank=65", "8 to 64"]),
      ({"bound_M": 17.0}, ["bound_M=17", "(0, 16]"]),
      ({"mode": "discrete", "tau": 8.0}, ["tau=8.0", "|tau| < 2*bound_M = 8"]),
      ({"mode": "discrete", "bins": 12}, ["bins=12", "0, 2, 4, 8"]),
      ({"mode": "word", "strands": 1}, ["strands=1", "2 to 64"]),
      ({"mode": "word", "word_law": "restricted"}, ["word_law=restricted", "(y2, y1 - y3, -y2)", "burau, perm"]),
      ({"mode": "word", "word_law": "stochastic"}, ["word_law=stochastic", "3e-3"]),
      ({"mode": "word", "word_law": "swap"}, ["word_law=swap", "without bound"]),
      ({"mode": "word", "word_gate": "none"}, ["word_gate=none", "soft, hard"]),
      ({"impl": "flash"}, ["impl=flash", "tiled, chebyshev, sorted"]),
      ({"impl": "chebyshev", "score": "bilinear"}, ["impl=chebyshev", "score=bilinear"]),
      ({"impl": "chebyshev", "recency": True}, ["impl=chebyshev", "recency=true"]),
      ({"impl": "chebyshev", "cheb_rank": 8}, ["cheb_rank=8", "bound_M=4", "at least 11"]),
      ({"impl": "chebyshev", "mode": "monodromy"}, ["impl=chebyshev", "mode=monodromy"]),
      ({"impl": "sorted"}, ["impl=sorted", "mode=soft"]),
      ({"impl": "sorted", "mode": "discrete", "score": "bilinear"}, ["impl=sorted", "score=bilinear"]),
      ({"impl": "tiled", "mode": "word"}, ["impl=tiled", "mode=word"]),
      ({"recency": True, "score": "bilinear"}, ["recency=True", "score=additive"]),
      ({"tau": 1.0}, ["tau=1.0", "mode=discrete"]),
      ({"mode": "monodromy", "norm": "none"}, ["norm=none", "mode=monodromy"]),
      ({"mode": "monodromy", "bound_M": 2.0}, ["bound_M=2.0", "score=bilinear"]),
      ({"bins": 16}, ["bins=16", "mode=discrete"]),
      ({"strands": 5}, ["strands=5", "mode=word"]),
      ({"word_gate": "hard"}, ["word_gate=hard", "mode=word"]),
      ({"recency": True, "cheb_rank": 16}, ["cheb_rank=16", "recency=false"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match="braid option") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_the_grammar_raises_the_same_before_anything_is_built(self):
    with pytest.raises(ValueError, match="impl=sorted"):
      gpt.specs(GPTConfig(n_layer=1, attention="braid(impl=sorted)"))

  def test_only_scores_that_need_them_have_query_and_key_projections(self):
    cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
    for options, has in (
      (Options(), True),
      (Options(mode="monodromy"), True),
      (Options(mode="monodromy", score="rapidity"), False),
      (Options(mode="word"), False),
    ):
      specs = braid.param_specs(cfg, options)
      assert ("wq" in specs, "wk" in specs) == (has, has)
      tables = {"w_a", "w_b", "beta", "eta", "increments", "v_null", "strands", "t"} & set(specs)
      assert {specs[name].role for name in tables} <= {"scalar"}
      np.testing.assert_array_equal(specs["wo"].draw(jax.random.key(0)), 0)

  def test_auto_picks_only_what_is_proven(self):
    assert braid_gated.implementation(Options(), 256) == "tiled"
    assert braid_gated.implementation(Options(), 4096) == "chebyshev"
    assert braid_gated.implementation(Options(bound_M=8.0), 4096) == "tiled", "24 nodes leave 2e-4 at M = 8"
    assert braid_gated.implementation(Options(recency=True), 4096) == "tiled"
    assert braid_gated.implementation(Options(score="bilinear"), 4096) == "tiled"
    assert braid_gated.implementation(Options(mode="discrete", recency=True), 10**6) == "sorted"


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def segments(T):
  return np.sort(np.random.default_rng(5).integers(0, 4, (B, T)), 1)


def compare(fast, exact, args, value_tol, gradient_tol):
  """Values, gradients and Hessian-vector products of two functions of the same float64 arrays."""

  @functools.partial(jax.jit, static_argnums=0)
  def run(f, args):
    def objective(args):
      return sum(jnp.sum(x * draw(9, *x.shape)) for x in jax.tree.leaves(f(*args)))

    gradient = jax.grad(objective)
    return f(*args), gradient(args), jax.jvp(gradient, (args,), (args,))[1]

  def error(a, b):
    ratio = lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-12))
    return max(jax.tree.leaves(jax.tree.map(ratio, a, b)))

  got, want = run(fast, args), run(exact, args)
  assert error(got[0], want[0]) <= value_tol
  assert error(got[1], want[1]) <= gradient_tol
  assert error(got[2], want[2]) <= gradient_tol
  assert error(jax.tree.map(lambda x: 1.001 * x, got[1]), want[1]) > gradient_tol


def sides(score, T):
  """Grouped query and key side of a score, [B, K, R, T, ...] and [B, K, 1 or R, T, ...]."""
  if score is BILINEAR:
    return {"q": draw(0, B, K, R, T, D), "bias": draw(1, B, K, R, T)}, draw(2, B, K, 1, T, D)
  if score is RAPIDITY:
    inside = np.minimum(np.arange(T), 20)
    table = np.cumsum(np.exp(0.3 * draw(0, 1, K, R, 21)) * 0.1, -1)[..., inside]
    tail = np.broadcast_to(np.arange(T) - inside, table.shape).astype(float)
    keys = {"table": table, "tail": tail}
    return keys | {"increment": np.full(table.shape, 0.05), "log_sinh_eta": np.full(table.shape, 0.2)}, keys
  return draw(0, B, K, R, T), draw(1, B, K, 1, T)


class TestClosedForms:
  @pytest.mark.parametrize(
    ("score", "hard", "T"),
    [(BOUNDED_ADDITIVE, False, 70), (ADDITIVE, True, 70), (BILINEAR, False, 70), (BILINEAR, True, 1)],
  )
  def test_tiled_gates(self, score, hard, T):
    with jax.enable_x64(True):
      q, k = sides(score, T)
      fast = lambda q, k, v: braid_gates.gated_sum(score, hard, q, k, v, segments(T))
      mask = braid_gates.causal_mask(T, segments(T))
      exact = lambda q, k, v: braid_gates.dense_gated_sum(score, hard, q, k, v, mask)
      compare(fast, exact, jax.tree.map(jnp.asarray, (q, k, draw(3, B, K, T, D))), 1e-13, 1e-12)

  @pytest.mark.parametrize("score", [BILINEAR, RAPIDITY])
  def test_sweep(self, score):
    T = 70
    with jax.enable_x64(True):
      q, k = sides(score, T)
      fast = lambda q, k, v: braid_sweep.sweep(score, q, k, v, segments(T))
      mask = braid_gates.causal_mask(T, segments(T), score.strict)
      exact = lambda q, k, v: braid_sweep.dense_sweep(score, q, k, v, mask)
      compare(fast, exact, jax.tree.map(jnp.asarray, (q, k, draw(3, B, K, T, D))), 1e-13, 1e-12)

  def ungrouped(self, hard, T):
    mask = braid_gates.causal_mask(T, segments(T))

    def exact(a, b, v):
      a, b = (mechanism.group_heads(x, K) for x in (a, b))
      sums = braid_gates.dense_gated_sum(ADDITIVE, hard, a, b, v.swapaxes(1, 2), mask)
      return jax.tree.map(mechanism.ungroup_heads, sums)

    return exact

  def test_chebyshev_within_its_error(self):
    T, rank = 300, 24
    with jax.enable_x64(True):
      args = 4 * np.tanh(draw(0, B, T, H)), 4 * np.tanh(draw(1, B, T, K)), draw(2, B, T, K, D)
      fast = lambda a, b, v: braid_chebyshev.chebyshev_gated_sum(a, b, v, segments(T), rank, 4.0)
      tolerance = braid_chebyshev.interpolation_error(rank, 4.0)
      compare(fast, self.ungrouped(False, T), jax.tree.map(jnp.asarray, args), tolerance, 2 * rank**2 * tolerance)

  def test_sorted_with_ties(self):
    T = 150
    with jax.enable_x64(True):
      args = np.round(draw(0, B, T, H), 1), np.round(draw(1, B, T, K), 1), draw(2, B, T, K, D)
      soft = lambda a, b, v, ids: self.ungrouped(False, T)(a, b, v)
      fast = lambda a, b, v: braid_sorted.sorted_gated_sum(soft, a, b, v, segments(T))
      compare(fast, self.ungrouped(True, T), jax.tree.map(jnp.asarray, args), 1e-12, 1e-12)

  def test_strands(self):
    n, T = 3, 23
    with jax.enable_x64(True):
      lower, diag, upper, write, read = (0.4 * draw(i, B, K, R, T, n) for i in range(5))
      restart = np.zeros((B, 1, 1, T))
      restart[0, ..., 0] = restart[1, ..., 9] = restart[1, ..., 12] = 1

      def letters(lower, diag, upper, write, read):
        return braid_strands.Letters(lower.at[..., 0].set(0), diag, upper.at[..., -1].set(0), write, read, restart)

      def with_scan(scan):
        return lambda bands, v, initial, state: scan(letters(*bands), v, initial, state)

      bands = (lower, diag, upper, write, read)
      args = bands, draw(6, B, K, T, D), draw(7, K, R, n, D), draw(8, B, K, R, n, D)
      fast, exact = with_scan(braid_strands.strand_scan), with_scan(braid_strands.token_scan)
      compare(fast, exact, jax.tree.map(jnp.asarray, args), 1e-13, 1e-12)


def test_ties_are_not_selected():
  count = jax.jit(lambda a, b: braid_sorted.dominance_sum(a, b, jnp.ones((1, 100, 1)))[0, 0, :, 0])
  queries, keys = np.ones((1, 1, 100), np.float32), -np.ones((1, 100), np.float32)
  np.testing.assert_array_equal(count(queries, keys), 0)
  np.testing.assert_array_equal(count(np.nextafter(queries, 2), keys), np.arange(1, 101))


@pytest.mark.parametrize("tau", [0.0, -1.25])
def test_fenwick_table_equals_the_masked_sum(tau):
  bins, M, T = 16, 4.0, 40
  a = 3 * draw(0, B, T, H).clip(-1, 1).astype(np.float32)
  a[:, 0] = tau - np.asarray(braid_bins.levels(bins, M))[3]
  b = braid_bins.quantise(4 * np.tanh(draw(1, B, T, K)).astype(np.float32), bins, M)
  v = draw(2, B, T, K, D).astype(np.float32)
  valid = np.arange(T) < np.array([[T], [T - 9]])
  table = jax.jit(lambda b, v: braid_bins.write_table(jnp.zeros((B, K, bins, D + 1)), b, v, M, valid))(b, v)
  read = jax.jit(lambda a, table: braid_bins.read_table(a, table, M, tau))
  out, count = read(a, table)
  key_scores = np.repeat(np.asarray(b) - np.float32(tau), R, axis=2)
  gate = (a[:, :, None] + key_scores[:, None] > 0) & valid[:, None, :, None]
  np.testing.assert_array_equal(count, gate.sum(2))
  np.testing.assert_allclose(out, np.einsum("btsh,bshd->bthd", gate, np.repeat(v, R, axis=2)), atol=1e-5)
  off_by_one = read(a, np.roll(table, 1, axis=2))[1]
  assert np.max(np.abs(off_by_one - count)) >= 1


def layer(options, seed=0):
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
  specs = braid.param_specs(cfg, options)
  noise = lambda i, s: 0.5 * draw((seed, i), *s.shape).astype(np.float32)
  params = {name: np.asarray(s.draw(jax.random.key(i))) + noise(i, s) for i, (name, s) in enumerate(specs.items())}
  return cfg, params


@pytest.mark.parametrize(
  "options",
  [Options(), Options(mode="discrete", bins=32, tau=0.5), Options(mode="word", strands=3)],
  ids=["nodes", "bins", "strands"],
)
def test_long_ragged_pieces_decode_like_the_whole(options):
  cfg, params = layer(options)
  T, piece = 90, 70
  x = draw(1, 2, T, cfg.n_embd).astype(np.float32)
  lengths = np.array([piece, piece - 6])
  whole = jax.jit(lambda x: braid.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, options)[0])(x)

  @jax.jit
  def step(x, state, start, valid):
    ctx = gpt.context(start[:, None] + jnp.arange(x.shape[1]), cfg, valid_BT=valid)
    return braid.step(params, x, state, ctx, cfg, options)

  state = braid.init_state(cfg, options, 2, T)
  valid = np.arange(piece) < lengths[:, None]
  first, after = step(x[:, :piece], state, np.zeros(2, np.int32), valid)
  _, after_all = step(x[:, :piece], state, np.zeros(2, np.int32), np.ones_like(valid))
  new = np.stack([x[row, n : n + 3] for row, n in enumerate(lengths)])
  second, _ = step(new, after, lengths, np.ones((2, 3), bool))
  spoiled, _ = step(new, after_all, lengths, np.ones((2, 3), bool))
  for row, n in enumerate(lengths):
    chex.assert_trees_all_close(first[row, :n], whole[row, :n], atol=2e-5)
    chex.assert_trees_all_close(second[row], whole[row, n : n + 3], atol=2e-5)
  assert jnp.max(jnp.abs(spoiled[1] - second[1])) > 1e-4


def test_linear_decode_states_do_not_grow():
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
  size = lambda options, T: sum(x.size for x in jax.tree.leaves(braid.init_state(cfg, options, 1, T)))
  for options in (Options(), Options(mode="discrete", bins=8), Options(mode="word")):
    assert size(options, 10) == size(options, 10_000)
  for options in (Options(impl="tiled"), Options(mode="discrete"), Options(mode="monodromy")):
    assert size(options, 10_000) == 1000 * size(options, 10)
  assert size(Options(mode="monodromy", score="rapidity"), 9) == 9 * cfg.n_kv_head * cfg.head_dim, "values alone"


def test_training_memory_stays_below_one_score_matrix():
  T, cfg = 2048, GPTConfig(vocab_size=7, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)

  def temp_bytes(options):
    params = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in braid.param_specs(cfg, options).items()}

    def objective(params, x):
      ctx = gpt.context(jnp.arange(T)[None], cfg)
      return jnp.sum(jnp.sin(braid.apply(params, x, ctx, cfg, options)[0]))

    x = jax.ShapeDtypeStruct((1, T, cfg.n_embd), jnp.float32)
    compiled = jax.jit(jax.grad(objective, (0, 1))).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  score_matrix = 4 * cfg.n_head * T * T
  assert temp_bytes(Options(impl="tiled")) < score_matrix / 2
  assert temp_bytes(Options(mode="monodromy")) < score_matrix / 2
  assert temp_bytes(Options(impl="reference")) > score_matrix


@pytest.mark.parametrize("recency", [False, True])
def test_executing_the_exported_schedule_gives_the_layers_sum(recency):
  options = Options(mode="discrete", norm="none", tau=-0.5, recency=recency)
  cfg, params = layer(options)
  params["wo"] = np.eye(16, dtype=np.float32).reshape(4, 4, 16)
  x, t = draw(1, 12, cfg.n_embd).astype(np.float32), 9
  order, k = jax.jit(lambda x: braid.schedule(params, x, t, cfg, options))(x)
  assert 0 < int(jnp.min(k)) <= t + 1
  values = np.einsum("tc,ckd->ktd", x, params["wv"])[np.arange(4) // 2, : t + 1]
  execute = jax.jit(jax.vmap(execute_schedule))
  executed = execute(order, k, values)
  y = jax.jit(lambda x: braid.apply(params, x, gpt.context(jnp.arange(12)[None], cfg), cfg, options)[0][0, t])(x[None])
  np.testing.assert_allclose(executed.reshape(-1), y, atol=1e-5)
  one_less = execute(order, k - 1, values)
  assert np.max(np.abs(one_less.reshape(-1) - y)) > 1e-2


def test_a_schedule_needs_additive_discrete_gates():
  cfg, params = layer(Options())
  with pytest.raises(ValueError, match="mode=soft"):
    braid.schedule(params, np.zeros((3, 16)), 2, cfg, Options())


def test_diagnostics_appear_only_when_asked_for():
  options = Options(mode="discrete", tau=0.5)
  cfg, params = layer(options)
  x = draw(1, 2, 9, cfg.n_embd).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def run(probe):
    ctx = gpt.context(jnp.arange(9)[None], cfg, probe=probe)
    return braid.apply(params, x, ctx, cfg, options)[1]

  assert run(False) == {}
  aux = run(True)
  assert set(aux) == {"gate_mean", "gate_variance", "mass", "selected_quantiles", "saturation"}
  assert 0 < aux["gate_mean"] < 1
  chex.assert_trees_all_close(aux["gate_variance"], aux["gate_mean"] * (1 - aux["gate_mean"]), atol=1e-6)


LAYER_CLAIMS = braid.MECHANISM.claims[len(braid.algebra_claims.CLAIMS) :]


@pytest.mark.parametrize("claims", [LAYER_CLAIMS[:5], LAYER_CLAIMS[5:]], ids=["sums", "layers"])
def test_claims_of_the_layer_hold(claims, key):
  for result in run_claims(claims, key):
    assert result.holds, result.message or result
