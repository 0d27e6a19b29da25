"""Fractal attention: what its options refuse, closed-form gradients, documents, decoding, memory, cost, diagnostics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.attention import (
  fractal,
  fractal_chunks,
  fractal_groups,
  fractal_latest,
  fractal_overlap,
  fractal_routing,
  fractal_table,
  fractal_tiles,
)
from mgr_jax.attention.fractal_options import Options
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt

B, K, R, D = 2, 2, 2, 3


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"mode": "store"}, ["mode=store", "attend, memory"]),
      ({"kernel": "suffix"}, ["kernel=suffix", "leaf, prefix"]),
      ({"impl": "flash"}, ["impl=flash", "tiled, chunked, sorted"]),
      ({"m": 1}, ["m=1", "2 or more"]),
      ({"depth": 0}, ["depth=0", "1 or more"]),
      ({"m": 64, "depth": 17}, ["m*depth up to 1024", "1088"]),
      ({"floor_eps": 0.5}, ["floor_eps=0.5", "1e-4 to 0.2"]),
      ({"balance": -1.0}, ["balance=-1", "at least 0"]),
      ({"mode": "memory", "depth": 9}, ["depth=9", "65536"]),
      ({"impl": "chunked", "depth": 9}, ["depth=9", "impl=chunked"]),
      ({"rule": "overwrite"}, ["rule=overwrite", "mode=memory"]),
      ({"address": "hard", "floor_eps": 0.02}, ["floor_eps=0.02", "address=soft"]),
      ({"address": "hard", "beta": "learned"}, ["beta=learned", "address=soft"]),
      ({"mode": "memory", "beta": "learned"}, ["beta=learned", "mode=attend"]),
      ({"mode": "memory", "rule": "overwrite", "backoff": True}, ["backoff=True", "address=hard"]),
      ({"mode": "memory", "rule": "overwrite", "position": "none"}, ["position=none", "no effect"]),
      ({"beta": "learned", "depth": 12}, ["depth=12", "beta=learned", "1e-30"]),
      ({"beta": "learned", "impl": "chunked"}, ["impl=chunked", "beta=learned"]),
      ({"impl": "sorted"}, ["impl=sorted", "address=soft"]),
      ({"mode": "memory", "rule": "overwrite", "impl": "tiled"}, ["impl=tiled", "rule=overwrite"]),
      ({"mode": "memory", "rule": "overwrite", "address": "hard", "impl": "chunked"}, ["impl=chunked", "sorted"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match="fractal option") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_the_grammar_raises_the_same_before_anything_is_built(self):
    with pytest.raises(ValueError, match="impl=sorted"):
      gpt.specs(GPTConfig(n_layer=1, attention="fractal(impl=sorted)"))

  def test_parameters_follow_the_options(self):
    cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
    base = {"wq", "wk", "wv", "wo", "wr", "br", "v_null"}
    for options, more in (
      (Options(), {"null_logit", "slope"}),
      (Options(position="none", kernel="prefix"), {"null_logit", "alpha_raw"}),
      (Options(beta="learned"), {"null_logit", "slope", "beta_raw"}),
      (Options(mode="memory", rule="overwrite"), {"w_gate", "b_gate"}),
      (Options(mode="memory", rule="overwrite", address="hard"), set()),
    ):
      assert set(fractal.param_specs(cfg, options)) == base | more
    assert fractal.param_specs(cfg, Options())["slope"].shape == (4,)
    assert fractal.param_specs(cfg, Options(mode="memory"))["slope"].shape == (2,), "query heads share one table"
    slopes = jax.nn.softplus(fractal.param_specs(cfg, Options())["slope"].draw(jax.random.key(0)))
    np.testing.assert_allclose(slopes, 0.25 / np.array([4, 16, 64, 256]), rtol=1e-5)

  def test_auto_leaves_the_tiles_where_a_table_is_cheaper(self):
    cfg = GPTConfig(n_layer=1, n_head=4, n_kv_head=4, n_embd=128)
    for options, T, expected in (
      (Options(), 256, "tiled"),
      (Options(), 4096, "chunked"),
      (Options(beta="learned"), 4096, "tiled"),
      (Options(depth=16), 4096, "tiled"),
      (Options(mode="memory", rule="overwrite"), 16, "chunked"),
      (Options(mode="memory", rule="overwrite", address="hard"), 16, "sorted"),
    ):
      assert fractal.implementation(cfg, options, T) == expected


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def paths(seed, *shape, opts):
  p = np.random.default_rng(seed).dirichlet(np.full(opts.m, 0.7), (*shape, opts.depth))
  return p.reshape(*shape, -1)


def segments(T):
  return np.sort(np.random.default_rng(5).integers(0, 4, (B, T)), 1)


def compare(fast, exact, args, tolerance, second_order=True):
  """Values, gradients and Hessian-vector products of two functions of the same float64 arrays."""

  @functools.partial(jax.jit, static_argnums=0)
  def run(f, args):
    def objective(args):
      return sum(jnp.sum(x * draw(9, *x.shape)) for x in jax.tree.leaves(f(*args)))

    gradient = jax.grad(objective)
    first = f(*args), gradient(args)
    return (*first, jax.jvp(gradient, (args,), (args,))[1]) if second_order else first

  def error(a, b):
    ratio = lambda x, y: np.max(np.abs(x - y)) / np.maximum(np.max(np.abs(y)), 1e-12)
    return max(jax.tree.leaves(jax.tree.map(ratio, a, b)))

  got, want = jax.tree.map(np.asarray, (run(fast, args), run(exact, args)))
  chex.assert_tree_all_finite((got, want))
  for a, b in zip(got, want, strict=True):
    assert error(a, b) <= tolerance
  assert error(jax.tree.map(lambda x: 1.001 * x, got[1]), want[1]) > tolerance


def mask_and_lag(T):
  lag = np.arange(T)[:, None] - np.arange(T)
  same = segments(T)[:, :, None] == segments(T)[:, None]
  return (lag >= 0) & same[:, None, None], lag


def arrays(opts, T, slopes=R):
  alpha = np.random.default_rng(3).dirichlet(np.ones(opts.depth + 1), K) if opts.kernel == "prefix" else None
  slope = np.abs(draw(4, K, slopes)) * 0.1 if slopes else None
  return paths(0, B, K, R, T, opts=opts), paths(1, B, K, T, opts=opts), draw(2, B, K, T, D), alpha, slope


def dense(opts, T):
  def run(q, k, v, alpha, slope, beta=None):
    q, k = (fractal_routing.address(p, opts) for p in (q, k))
    kernel = fractal_overlap.path_overlap(q, k, opts.m, alpha)
    return fractal_overlap.dense_sum(kernel, v, *mask_and_lag(T), slope, beta)

  return run


class TestClosedForms:
  @pytest.mark.parametrize(
    ("options", "slopes", "beta"),
    [
      ({"m": 3, "depth": 5, "kernel": "prefix", "beta": "learned"}, R, True),
      ({"m": 2, "depth": 5}, 1, False),
      ({"m": 2, "depth": 2, "address": "hard"}, R, False),
      ({"m": 5, "depth": 3, "kernel": "prefix"}, 0, False),
    ],
  )
  def test_tiles(self, options, slopes, beta, monkeypatch):
    T, opts = 70, Options(**options)
    if slopes != 1:
      monkeypatch.setattr(fractal_groups, "budget", lambda: 1)  # One head of one row at a time.

    def fast(q, k, v, alpha, slope, beta):
      q, k = (fractal_routing.address(p, opts) for p in (q, k))
      return fractal_tiles.tiled_sum(fractal_table.Sides(q, k, v, alpha, slope), beta, segments(T), opts)

    with jax.enable_x64(True):
      args = *arrays(opts, T, slopes), 1 + 0.2 * draw(6, K, R) if beta else None
      compare(fast, dense(opts, T), jax.tree.map(jnp.asarray, args), 1e-12)

  @pytest.mark.parametrize(
    ("options", "slopes"), [({"kernel": "prefix", "m": 2, "depth": 3}, 1), ({"m": 3, "depth": 2}, R), ({"m": 2}, 0)]
  )
  def test_chunks_with_documents(self, options, slopes, monkeypatch):
    monkeypatch.setattr(fractal_table, "CHUNK", 32)
    if slopes == 1:
      monkeypatch.setattr(fractal_groups, "budget", lambda: 1)
    T, opts = 70, Options(**options)

    def fast(q, k, v, alpha, slope):
      q, k = (fractal_routing.address(p, opts) for p in (q, k))
      out = fractal_chunks.table_sum(fractal_table.Sides(q, k, v, alpha, slope), segments(T), opts)
      return out[..., :-1], out[..., -1]

    with jax.enable_x64(True):
      compare(fast, dense(opts, T), jax.tree.map(jnp.asarray, arrays(opts, T, slopes)), 1e-11)

  def test_overwriting_in_blocks(self, monkeypatch):
    monkeypatch.setattr(fractal_table, "CHUNK", 32)
    T, opts = 70, Options(mode="memory", rule="overwrite", m=2, depth=3)
    soft_read = lambda table, q: fractal_table.read(table, fractal_routing.table_features(q, opts)[..., None, :])[
      ..., 0, :
    ]

    def run(one_by_one, q, k, v, gate):
      sides = fractal_table.Sides(q, k, v, gate_BKT=jax.nn.sigmoid(gate))
      if one_by_one:
        return fractal_table.token_by_token(sides, None, opts, soft_read, segments(T))[0]
      return fractal_table.table_overwrite(sides, None, opts, segments(T))[0]

    with jax.enable_x64(True):
      args = jax.tree.map(jnp.asarray, (*arrays(opts, T)[:3], draw(7, B, K, T)))
      compare(functools.partial(run, False), functools.partial(run, True), args, 1e-11)

  @pytest.mark.parametrize("options", [{}, {"backoff": True}, {"kernel": "prefix"}])
  def test_latest_token_of_a_leaf(self, options):
    T, opts = 40, Options(mode="memory", rule="overwrite", address="hard", m=2, depth=3, **options)
    null = draw(8, K, R, 1, D)

    def run(one_by_one, q, k, v, alpha):
      sides = fractal_table.Sides(*(fractal_routing.address(p, opts) for p in (q, k)), v, alpha)
      if not one_by_one:
        return fractal_latest.merge_levels(fractal_latest.read_latest(sides, opts, segments(T)), null, alpha, opts)

      def read(table, q):
        reads = [x[..., None, :] for x in fractal_latest.read_levels(table, q, opts)]
        return fractal_latest.merge_levels(reads, null, alpha, opts)[..., 0, :]

      return fractal_table.token_by_token(sides, None, opts, read, segments(T))[0]

    with jax.enable_x64(True):
      args = jax.tree.map(jnp.asarray, arrays(opts, T)[:4])
      # The gradient through a choice is an estimate, not the derivative of anything: it has no second order to compare.
      compare(functools.partial(run, False), functools.partial(run, True), args, 1e-12, second_order=False)

  def test_the_latest_equals_a_dictionary(self):
    query, key = np.random.default_rng(0).integers(0, 7, (2, 3, 50))[:, :2], np.random.default_rng(1).integers(0, 7, 50)
    found = jax.jit(fractal_latest.find_latest)(jnp.asarray(query[0], jnp.int32), jnp.asarray(key, jnp.int32))
    latest, last = np.full((2, 50), -1), {}
    for t in range(50):
      assert found.overwritten[t] == last.get(key[t], -1)
      last[key[t]] = t
      latest[:, t] = [last.get(leaf, -1) for leaf in query[0][:, t]]
    np.testing.assert_array_equal(found.latest, latest)
    assert (latest[:, :10] == -1).any(), "some queries find nothing"


def layer(attention, T, n_embd=32, n_head=4, n_kv_head=2):
  cfg = GPTConfig(
    vocab_size=8, seq_len=T, n_layer=1, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, attention=attention
  )
  return cfg, fractal.MECHANISM, gpt.stack.runs(cfg)[0].options


def measured(attention, **fixed):
  """Readings of a freshly drawn layer of one row of 64 tokens, with some parameters replaced."""
  cfg, record, opts = layer(attention, 64)
  params = draw_params(cfg, record, opts) | fixed
  ctx = gpt.context(jnp.arange(64)[None], cfg, probe=True)
  x = draw(0, 1, 64, 32).astype(np.float32)
  return jax.jit(lambda params: record.apply(params, x, ctx, cfg, opts)[1])(params)


def draw_params(cfg, record, opts):
  return {n: s.draw(jax.random.key(1)) for n, s in record.param_specs(cfg, opts).items()}


def abstract(cfg, record, opts):
  return {name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for name, s in record.param_specs(cfg, opts).items()}


@pytest.mark.parametrize(
  ("attention", "T"),
  [
    ("fractal", 256),
    ("fractal(kernel=prefix)", 1024),
    ("fractal(impl=chunked)", 1024),
    ("fractal(impl=chunked,position=none,kernel=prefix,depth=3)", 1024),
    ("fractal(mode=memory)", 4096),
    ("fractal(mode=memory,rule=overwrite)", 512),
    ("fractal(mode=memory,rule=overwrite,address=hard)", 512),
  ],
)
def test_cost_counts_the_matrix_products_of_the_program(attention, T):
  cfg, record, opts = layer(attention, T, n_embd=128)
  run = lambda params, x: record.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, opts)[0]
  counted = matmul_flops(run, abstract(cfg, record, opts), jax.ShapeDtypeStruct((1, T, 128), jnp.float32)) / T
  claimed = record.cost(cfg, opts, T).matmul
  assert 0.85 <= claimed / counted <= 1.15, (claimed, counted)


@pytest.mark.parametrize(
  "attention",
  [
    "fractal(impl=tiled)",
    "fractal(impl=chunked)",
    "fractal(mode=memory,rule=overwrite)",
    "fractal(mode=memory,rule=overwrite,address=hard)",
  ],
)
def test_training_memory_grows_linearly_with_length(attention):
  def temp_bytes(attention, T):
    cfg, record, opts = layer(attention, T, n_embd=64)

    def objective(params, x):
      return jnp.sum(jnp.sin(record.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, opts)[0]))

    x = jax.ShapeDtypeStruct((1, T, 64), jnp.float32)
    compiled = jax.jit(jax.grad(objective, (0, 1))).lower(abstract(cfg, record, opts), x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temp_bytes(attention, 1024), temp_bytes(attention, 2048)
  assert long < 2.2 * short
  if "tiled" in attention:
    assert long < 4 * 4 * 2048**2, "less than the scores of four heads"
    assert temp_bytes("fractal(impl=reference)", 2048) > 4 * 4 * 2048**2


@pytest.mark.parametrize("piece", [1, 16, 40])
@pytest.mark.parametrize(
  "attention",
  [
    "fractal(mode=memory,kernel=prefix,depth=2)",
    "fractal(mode=memory,rule=overwrite,depth=2)",
    "fractal(kernel=prefix,beta=learned)",
  ],
)
def test_decoding_in_pieces_of_any_size_gives_the_whole(attention, piece):
  T = 80
  cfg, record, opts = layer(attention, T)
  params = {
    n: 0.5 * draw(i, *s.shape).astype(np.float32) for i, (n, s) in enumerate(record.param_specs(cfg, opts).items())
  }
  x = draw(50, 2, T, 32).astype(np.float32)
  whole, _ = jax.jit(lambda x: record.apply(params, x, gpt.context(jnp.arange(T)[None], cfg), cfg, opts))(x)
  step = jax.jit(lambda x, state, at: record.step(params, x, state, gpt.context(at[None], cfg), cfg, opts))
  state, parts = record.init_state(cfg, opts, 2, T), []
  for start in range(0, T, piece):
    y, state = step(x[:, start : start + piece], state, jnp.arange(start, start + piece))
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)
  assert np.max(np.abs(np.concatenate(parts[::-1], 1) - whole)) > 1e-2


def test_state_of_the_memory_does_not_grow():
  cfg, record, opts = layer("fractal(mode=memory)", 64)
  size = lambda max_len: sum(x.size for x in jax.tree.leaves(record.init_state(cfg, opts, 1, max_len)))
  assert size(64) == size(4096) == 2 * 256 * 9
  _, _, attend = layer("fractal", 64)
  cache = record.init_state(cfg, attend, 1, 64)
  assert cache.k_BSKF.shape == (1, 64, 2, 16)


def test_balance_is_least_when_all_branches_are_used_alike():
  cfg, record, opts = layer("fractal(balance=0.5,m=3,depth=2)", 24)
  params = draw_params(cfg, record, opts)
  x = draw(0, 2, 24, 32).astype(np.float32)
  aux = lambda params, opts: record.apply(params, x, gpt.context(jnp.arange(24)[None], cfg), cfg, opts)[1]

  @jax.jit
  @jax.value_and_grad
  def loss(pull):
    br = jnp.zeros_like(params["br"]).at[:, :, 0].set(pull)
    return aux(params | {"br": br}, opts)["aux_loss"]

  (even, _), (skewed, _), (_, slope) = loss(0.0), loss(5.0), loss(1.0)
  assert -0.5 * 2 * np.log(3) - 1e-6 <= even < skewed
  assert slope > 1e-3, "towards more balance"
  assert "aux_loss" not in jax.eval_shape(lambda params: aux(params, Options(m=3, depth=2)), params)


def test_diagnostics_describe_the_table():
  # A router that ignores its input: every token has one address.
  attention = "fractal(mode=memory,rule=overwrite,address=hard,m=2,depth=3)"
  specs = layer(attention, 64)[1].param_specs(*layer(attention, 64)[::2])
  br = np.zeros(specs["br"].shape, np.float32)
  br[..., 1] = 3
  aux = measured(attention, wr=np.zeros(specs["wr"].shape, np.float32), br=br)
  np.testing.assert_allclose([aux["utilisation"], aux["perplexity"], aux["fragmentation"]], [1 / 8, 1, 1], atol=1e-5)
  np.testing.assert_allclose([aux["same_leaf"], aux["hits"], aux["staleness"]], [1, 1, 0])
  np.testing.assert_allclose(aux["collisions"], 63 / 64, rtol=1e-6)
  aux = measured("fractal(kernel=prefix,beta=learned)")
  assert 0 < aux["null_share"] < 1
  assert 0 < aux["largest_weight"] < 1
  assert aux["least_mass"] >= 1
  np.testing.assert_allclose(aux["beta"], 1, rtol=1e-5)
  np.testing.assert_allclose(aux["alpha"], 0.2, rtol=1e-6)


LAYER_CLAIMS = [c for c in fractal.MECHANISM.claims if c not in fractal.ifs_claims.CLAIMS]


@pytest.mark.parametrize("claim", LAYER_CLAIMS, ids=lambda c: c.name)
def test_claims_of_the_layer_hold(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message or result
