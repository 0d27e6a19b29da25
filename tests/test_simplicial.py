"""Simplicial attention: what its options refuse, closed-form gradients, decode states, memory, cost, diagnostics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demos import simplicial as demo
from mgr_jax.algebra.trilinear import FORMS, dense_pair_attention, match3_vectors, pair_mask, rotate_by_charge
from mgr_jax.attention import simplicial, simplicial_hops, simplicial_linear, simplicial_sums
from mgr_jax.attention.simplicial_blocks import Shape, fold, groups, pair_attention, unfold
from mgr_jax.attention.simplicial_decode_claims import pieces_error
from mgr_jax.attention.simplicial_form_claims import planted_mass
from mgr_jax.attention.simplicial_options import Options
from mgr_jax.attention.simplicial_pair_claims import NOT_CYCLIC, draw_pairs
from mgr_jax.attention.simplicial_sweep import solve_resolvent
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt

B, K, R, D = 2, 2, 2, 4


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def config(n_embd=32, n_head=4, n_kv_head=2, **fields):
  base = {"vocab_size": 7, "n_layer": 1, "n_embd": n_embd, "n_head": n_head, "n_kv_head": n_kv_head}
  return GPTConfig(**(base | fields))


class TestOptions:
  @pytest.mark.parametrize(
    ("options", "said"),
    [
      ({"mode": "three_hop"}, ["mode=three_hop", "two_hop", "resolvent"]),
      ({"score": "cubic"}, ["score=cubic", "det3"]),
      ({"w1": -1}, ["w1=-1", "0 for all"]),
      ({"w2": 129}, ["w2=129", "1 to w1=128"]),
      ({"w2": -1}, ["w2=-1"]),
      ({"w2": 0}, ["w2=0", "w1=128"]),
      ({"score": "hadamard", "charges": "cycle"}, ["charges=cycle", "score=hadamard", "charges=none"]),
      ({"score": "det3", "charges": "cycle"}, ["charges=cycle", "score=det3"]),
      ({"mode": "two_hop", "hops": 5}, ["hops=5", "1 to 4"]),
      ({"mode": "two_hop", "hops": 0}, ["hops=0", "1 to 4"]),
      ({"hops": 3}, ["hops=3", "mode=trilinear", "mode=two_hop"]),
      ({"mode": "linear2", "score": "det3"}, ["score=det3", "mode=linear2"]),
      ({"mode": "linear2", "w1": 64}, ["w1=64", "mode=linear2"]),
      ({"mode": "resolvent", "value_mix": "sum"}, ["value_mix=sum", "mode=trilinear or linear2"]),
      ({"mode": "two_hop", "sink": True}, ["sink=True", "mode=trilinear"]),
      ({"order": "increasing"}, ["order=increasing", "mode=linear2"]),
      ({"mode": "linear2", "order": "sorted"}, ["order=sorted", "increasing"]),
      ({"mode": "linear2", "feature": "relu"}, ["feature=relu", "softplus"]),
      ({"mode": "linear2", "decay": "exp"}, ["decay=exp", "alibi"]),
      ({"mode": "two_hop", "measure_mi": True}, ["measure_mi=True", "mode=trilinear"]),
      ({"block": 0}, ["block=0", "1 to 1024"]),
      ({"impl": "tiled"}, ["impl=tiled", "mode=trilinear", "blocked"]),
      ({"mode": "linear2", "impl": "blocked"}, ["impl=blocked", "chunked, scan"]),
    ],
  )
  def test_a_refusal_names_option_value_and_range(self, options, said):
    with pytest.raises(ValueError, match="simplicial option") as error:
      Options(**options)
    for words in said:
      assert words in str(error.value)

  def test_head_size_and_context_are_checked_before_anything_is_built(self):
    with pytest.raises(ValueError, match="divisible by 3, not 8"):
      gpt.specs(config(attention="simplicial(score=det3)"))
    gpt.specs(config(24, attention="simplicial(score=det3)"))
    with pytest.raises(ValueError, match="contexts up to 512, not 1024"):
      gpt.specs(config(attention="simplicial(w1=0)"))
    gpt.specs(config(attention="simplicial(w1=0,w2=0)", seq_len=512))

  def test_parameters_of_each_mode(self):
    extra = lambda **options: set(simplicial.param_specs(config(), Options(**options))) - {"wq", "wk", "wv", "wo"}
    assert extra() == {"wk2", "wv2", "log_tau"}
    assert extra(mode="linear2", decay="alibi") == {"wk2", "wv2", "log_tau", "log_decay"}
    assert extra(mode="two_hop") == {"hop", "log_tau"}
    assert extra(mode="resolvent") == {"rho_raw", "log_tau"}

  def test_initial_values(self):
    drawn = lambda **options: {
      name: spec.draw(jax.random.key(0)) for name, spec in simplicial.param_specs(config(), Options(**options)).items()
    }
    np.testing.assert_allclose(jax.nn.softmax(drawn(mode="two_hop")["hop"]), [[2 / 3, 1 / 3]] * 4, atol=1e-6)
    np.testing.assert_allclose(0.95 * jax.nn.sigmoid(drawn(mode="resolvent")["rho_raw"]), 0.25, atol=1e-6)
    np.testing.assert_allclose(jnp.exp(drawn(mode="linear2", decay="alibi")["log_decay"]), [2**-4, 2**-8], rtol=1e-5)
    params = drawn()
    assert 0.4 < np.std(params["wv2"]) / np.std(params["wv"]) < 0.6
    assert not np.any(params["wo"])


class TestForms:
  @pytest.mark.parametrize("score", FORMS)
  def test_forms_are_cyclic_and_combine_is_their_gradient(self, score):
    q, k, k2 = draw(0, 3, 12)
    form = FORMS[score]
    with jax.enable_x64(True):
      np.testing.assert_allclose(form(q, k, k2), form(k, k2, q), atol=1e-12)
      gradients = jax.grad(form, (0, 1, 2))(*(jnp.asarray(x) for x in (q, k, k2)))
      for got, want in zip((form.combine(k2, k), form.combine(q, k2), form.combine(k, q)), gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
      if score != "det3":
        return
      assert np.max(np.abs(form.combine(k, k2) - gradients[0])) > 0.1, "the order of the arguments counts"

  def test_charges_beyond_two_and_even_moduli_are_refused(self):
    with pytest.raises(ValueError, match="beyond 2"):
      rotate_by_charge(jnp.ones(4), jnp.ones(2), jnp.ones(2), 0, ((-3, 2, 1),))
    with pytest.raises(ValueError, match="modulus=8"):
      match3_vectors(np.arange(3), 8)


class TestBlocks:
  def test_fold_is_the_transpose_of_unfold(self):
    x, y = draw(0, 1, 1, 7 + 3, 2).astype(np.float32), draw(1, 1, 1, 7, 3, 2).astype(np.float32)
    np.testing.assert_allclose(jnp.sum(unfold(x, 3) * y), jnp.sum(x * fold(y)), rtol=1e-5)
    assert abs(jnp.sum(unfold(x, 3) * y[..., ::-1, :]) - jnp.sum(x * fold(y))) > 1e-2
    np.testing.assert_array_equal(unfold(x, 3)[0, 0, 2], x[0, 0, [5, 4, 3]])

  @pytest.mark.parametrize(("T", "w1", "block"), [(16, 4, 8), (128, 100, 8), (256, 128, 16), (64, 1, 16)])
  def test_groups_cover_every_query_once_and_every_key(self, T, w1, block):
    found = groups(T, Shape(w1, 1, block), 0)
    assert [g.start for g in found[1:]] == [g.stop for g in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, T)
    for g in found:
      assert g.keys >= (block + w1 - 1 if g.steady else g.stop)
    assert all(g.steady for g in groups(T, Shape(w1, 1, block), w1)), "with history the first keys exist"

  def test_finite_differences(self):
    with jax.enable_x64(True):
      pairs = draw_pairs(np.random.default_rng(0), 15, "product")
      other = draw_pairs(np.random.default_rng(1), 15, "product")
      segments, form = np.zeros((1, 15), np.int32), FORMS["complex"]
      weight = draw(2, *pairs.q.shape)

      @functools.partial(jax.jit, static_argnums=0)
      def slope(form, pairs):
        energy = lambda p: jnp.sum(weight * pair_attention(form, Shape(9, 5, 8), p, segments)[0])
        gradient = jax.grad(energy)(pairs)
        along = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True))
        at = lambda h: energy(jax.tree.map(lambda a, b: a + h * b, pairs, other))
        return along, (at(1e-5) - at(-1e-5)) / 2e-5

      closed, measured = map(float, slope(form, pairs))
      assert closed == pytest.approx(measured, rel=1e-6)
      closed, measured = map(float, slope(NOT_CYCLIC, pairs))
      assert abs(closed - measured) > 1e-2 * abs(measured)

  def test_hessian_vector_products_and_float32(self):
    shape, form = Shape(9, 5, 16, True), FORMS["hadamard"]
    pairs = draw_pairs(np.random.default_rng(0), 21, "sum")
    segments = np.sort(np.random.default_rng(3).integers(0, 2, (2, 21)), 1)
    masks = pair_mask(21, 21, 9, 5, segments)
    weight = draw(2, *pairs.q.shape)
    functions = (
      lambda p: pair_attention(form, shape, p, segments)[0],
      lambda p: dense_pair_attention(form, p, masks, True)[0],
    )

    @functools.partial(jax.jit, static_argnums=0)
    def second(f, p):
      gradient = jax.grad(lambda p: jnp.sum(weight * f(p)))
      return f(p), jax.jvp(gradient, (p,), (p,))[1]

    with jax.enable_x64(True):
      fast, slow = (second(f, pairs) for f in functions)
      chex.assert_trees_all_close(fast, slow, rtol=1e-9, atol=1e-11)
    single = jax.tree.map(jnp.float32, pairs)
    np.testing.assert_allclose(functions[0](single), slow[0], atol=2e-5)

  def test_extreme_temperatures_stay_finite(self):
    pairs = jax.tree.map(jnp.float32, draw_pairs(np.random.default_rng(0), 21))
    pairs = pairs._replace(q=1e4 * pairs.q)
    energy = lambda p: jnp.sum(jnp.sin(pair_attention(FORMS["complex"], Shape(9, 5, 8), p, np.zeros((1, 21), int))[0]))
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(energy))(pairs))


def compare(fast, slow, args, tolerance):
  """Values, gradients and Hessian-vector products in float64, and a control that scales the result.

  Args:
    fast: functions, each with whether to go beyond the gradient.
  """

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(f, second, args):
    out = f(*args)
    gradient = jax.grad(lambda args: jnp.sum(f(*args) * draw(9, *out.shape)))
    return out, *(jax.jvp(gradient, (args,), (args,)) if second else (gradient(args),))

  def error(a, b):
    ratio = lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-2))
    return max(jax.tree.leaves(jax.tree.map(ratio, a, b[: len(a)])))

  want = run(slow, any(second for _, second in fast), args)
  for f, second in fast:
    got = run(f, second, args)
    assert error(got, want) <= tolerance
    assert error(jax.tree.map(lambda x: 1.001 * x, got), want) > tolerance


class TestChains:
  def inputs(self, T):
    segments = np.sort(np.random.default_rng(5).integers(0, 3, (B, T)), 1)
    return (draw(0, B, K, R, T, D), draw(1, B, K, T, D), draw(2, B, K, T, D)), segments

  @pytest.mark.parametrize(("T", "hops"), [(150, 2), (1, 1)])
  def test_hops(self, T, hops):
    args, segments = self.inputs(T)
    with jax.enable_x64(True):
      fast = lambda *a: simplicial_hops.hop_outputs(*a, segments, hops)[0]
      slow = lambda *a: simplicial_hops.dense_hop_outputs(*a, segments, hops)[0]
      compare([(fast, True)], slow, jax.tree.map(jnp.asarray, args), 1e-12)

  @pytest.mark.parametrize("T", [70, 1])
  def test_resolvent(self, T):
    args, segments = self.inputs(T)
    with jax.enable_x64(True):
      args = jax.tree.map(jnp.asarray, (*args, np.array([[0.0, 0.3], [0.6, 0.95]])))
      fast = lambda *a: simplicial_hops.resolvent(*a, segments)[0]
      slow = lambda *a: simplicial_hops.dense_resolvent(*a, segments)[0]
      compare([(fast, True)], slow, args, 1e-10)

  @pytest.mark.parametrize("transpose", [False, True])
  def test_triangular_systems(self, transpose):
    weight = np.tril(np.random.default_rng(0).dirichlet(np.ones(13), (1, 1, 2, 13)))
    rhs, rho = draw(1, 1, 1, 2, 13, 3), np.array([0.9, 0.4])[:, None, None]
    matrix = np.eye(13) - rho * (weight.mT if transpose else weight)
    with jax.enable_x64(True):
      x = np.asarray(solve_resolvent(rho, weight, jnp.asarray(rhs), transpose))
    np.testing.assert_allclose(matrix @ x, rhs, atol=1e-12)
    assert np.max(np.abs(matrix.mT @ x - rhs)) > 1e-2


class TestLinearSums:
  @pytest.mark.parametrize(("ordered", "T"), [(False, 137), (True, 137)])
  def test_blocks_equal_the_states_of_all_tokens(self, ordered, T):
    """Nine sequences run in two groups, of which one is padded."""
    B = K = 3
    positive = lambda seed, *shape: np.abs(draw(seed, *shape))
    keys = positive(1, B, K, T, D), positive(2, B, K, T, D), draw(3, B, K, T, 5), draw(4, B, K, T, 5)
    segments = np.sort(np.random.default_rng(5).integers(0, 3, (B, T)), 1).astype(np.int32)
    times = simplicial_linear.Times(np.arange(1, T + 1, dtype=np.int32)[None], segments)
    features = lambda a: simplicial_linear.Features(*a[:-1])
    with jax.enable_x64(True):
      state = simplicial_linear.empty_state(B, K, D, 5, ordered, jnp.float64)
      run = lambda impl: lambda *a: simplicial_sums.pair_sums(features(a), a[-1], times, state, impl)[0]
      slow = lambda *a: simplicial_linear.dense_pair_sums(features(a), a[-1], times, ordered)
      args = jax.tree.map(jnp.asarray, (positive(0, B, K, R, T, D), *keys, np.linspace(0.0, 0.3, K)))
      compare([(run("scan"), True), (run("chunked"), False)], slow, args, 1e-11)

  def test_one_sequence_in_many_chunks(self):
    """Products summed over seven axes crash XLA's CPU kernels at run time when the first has size 1."""
    T = 21
    keys = [np.abs(draw(seed, 1, K, T, 9)).astype(np.float32) for seed in range(4)]
    times = simplicial_linear.Times(np.arange(1, T + 1, dtype=np.int32)[None], None)
    state = simplicial_linear.empty_state(1, K, 9, 9, True)
    energy = lambda impl, f: jnp.sum(jnp.sin(1e-2 * simplicial_sums.pair_sums(f, None, times, state, impl)[0]))
    features = simplicial_linear.Features(np.abs(draw(4, 1, K, R, T, 9)).astype(np.float32), *keys)
    fast, slow = (jax.jit(jax.grad(functools.partial(energy, impl)))(features) for impl in ("chunked", "reference"))
    chex.assert_trees_all_close(fast, slow, rtol=1e-4, atol=1e-4)

  def test_a_row_without_pairs_is_zero(self):
    cfg, options = config(), Options(mode="linear2", order="increasing")
    params = layer_params(cfg, options)
    x = draw(1, 2, 9, cfg.n_embd).astype(np.float32)
    y, aux = jax.jit(lambda x: simplicial.apply(params, x, context(cfg, 9, probe=True), cfg, options))(x)
    assert not np.any(y[:, 0])
    assert np.all(np.any(y[:, 1:], -1))
    assert aux["empty_rows"] == pytest.approx(1 / 9)

  def test_auto_is_the_scan_on_cpu(self):
    assert simplicial_sums.implementation(Options(mode="linear2")) == (
      "scan" if jax.default_backend() == "cpu" else "chunked"
    )


def context(cfg, T, start=0, **fields):
  return gpt.context(start + jnp.arange(T)[None], cfg, **fields)


def layer_params(cfg, options, seed=0):
  specs = simplicial.param_specs(cfg, options)
  noise = lambda i, s: 0.3 * draw((seed, i), *s.shape).astype(np.float32)
  return {name: noise(i, spec) for i, (name, spec) in enumerate(specs.items())}


class TestDecode:
  @pytest.mark.parametrize("prefix", [0, 1, 2, 4])
  def test_short_prefixes_of_windows(self, prefix):
    rng = np.random.default_rng(prefix)
    sizes = ([prefix] if prefix else []) + [1] * 4
    assert pieces_error(rng, simplicial.MECHANISM, {"w1": 4, "w2": 2}, sizes) < 1e-5

  @pytest.mark.parametrize(
    "options",
    [Options(w1=12, w2=5, sink=True), Options(mode="two_hop"), Options(mode="resolvent"), Options(mode="linear2")],
    ids=lambda o: o.mode,
  )
  def test_long_ragged_pieces_decode_like_the_whole(self, options):
    cfg, T, piece = config(16), 60, 45
    params = layer_params(cfg, options)
    x = draw(1, 2, T, cfg.n_embd).astype(np.float32)
    lengths = np.array([piece, piece - 17])
    whole = jax.jit(lambda x: simplicial.apply(params, x, context(cfg, T), cfg, options)[0])(x)

    @jax.jit
    def step(x, state, start, valid):
      ctx = gpt.context(start[:, None] + jnp.arange(x.shape[1]), cfg, valid_BT=valid)
      return simplicial.step(params, x, state, ctx, cfg, options)

    state = simplicial.init_state(cfg, options, 2, T)
    valid = np.arange(piece) < lengths[:, None]
    first, after = step(x[:, :piece], state, np.zeros(2, np.int32), valid)
    _, after_all = step(x[:, :piece], state, np.zeros(2, np.int32), np.ones_like(valid))
    new = np.stack([x[row, n : n + 3] for row, n in enumerate(lengths)])
    second, _ = step(new, after, lengths, np.ones((2, 3), bool))
    spoiled, _ = step(new, after_all, lengths, np.ones((2, 3), bool))
    for row, n in enumerate(lengths):
      chex.assert_trees_all_close(first[row, :n], whole[row, :n], atol=2e-5)
      chex.assert_trees_all_close(second[row], whole[row, n : n + 3], atol=2e-5)
    if options.mode in ("trilinear", "linear2"):
      assert jnp.max(jnp.abs(spoiled[1] - second[1])) > 1e-4, "padding would be remembered"

  def test_sizes_of_decode_states(self):
    cfg = config(16)
    size = lambda T, **options: sum(
      x.size for x in jax.tree.leaves(simplicial.init_state(cfg, Options(**options), 1, T))
    )
    for options in ({"w1": 9, "w2": 3}, {"mode": "linear2"}):
      assert size(10, **options) == size(10_000, **options)
    for options in ({"mode": "two_hop"}, {"mode": "resolvent"}):
      assert size(10_000, **options) == 1000 * size(10, **options)
    key, per_head = 2 * 4, 4 * 4
    assert size(1, mode="two_hop", hops=3) == 2 * key + 2 * per_head


def temp_bytes(options, T, cfg):
  params = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in simplicial.param_specs(cfg, options).items()}
  x = jax.ShapeDtypeStruct((1, T, cfg.n_embd), jnp.float32)
  objective = lambda params, x: jnp.sum(jnp.sin(simplicial.apply(params, x, context(cfg, T), cfg, options)[0]))
  compiled = jax.jit(jax.grad(objective, (0, 1))).lower(params, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
  "options",
  [Options(w1=32, w2=4), Options(mode="two_hop"), Options(mode="linear2"), Options(mode="linear2", impl="chunked")],
  ids=lambda o: f"{o.mode}-{o.impl}",
)
def test_training_memory_grows_linearly(options):
  cfg = config(16, 2, 2)
  short, long = (temp_bytes(options, T, cfg) for T in (256, 1024))
  assert long < 5 * short
  assert long < 4 * cfg.n_head * 1024**2, "less than one score matrix"


def test_dense_memory_does_not():
  options = Options(mode="two_hop", impl="reference")
  short, long = (temp_bytes(options, T, config(16, 2, 2)) for T in (128, 512))
  assert long > 10 * short


def hand_count(options, cfg, T):
  """Matrix FLOPs per token of one layer at T = 96, H = 4, K = 2, D = 8, C = 32: projections and what the mode does."""
  H, K, width, C = cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.n_embd
  projections = 2 * C * width * (2 * H + 2 * K)
  second = 2 * C * width * 2 * K
  if options.mode == "trilinear":  # Blocks of 16: heads see 16 and 32 keys, then 16 + 32 each.
    keys = (16 * 16 + 16 * 32 + 64 * 48) / T
    return projections + second + H * keys * width * (4 * options.w2 + 2)
  tiles = (64 * 64 + 64 * 128) / T
  if options.mode == "two_hop":
    return projections + 6 * H * tiles * width
  system = 128 / T * (5 * 2 * 64**2 + 6 * 2 * 64 * width + 2 * 64 * width)
  if options.mode == "resolvent":
    return projections + H * (4 * tiles * width + system)
  return projections + second


@pytest.mark.parametrize(
  "options",
  [Options(w1=32, w2=4), Options(mode="two_hop"), Options(mode="resolvent"), Options(mode="linear2", impl="scan")],
  ids=lambda o: o.mode,
)
def test_cost_equals_a_hand_count_and_the_program(options):
  cfg, T = config(), 96
  params = layer_params(cfg, options)
  cost = simplicial.cost(cfg, options, T)
  assert cost.matmul == pytest.approx(hand_count(options, cfg, T), rel=1e-9)
  x = draw(0, 1, T, cfg.n_embd).astype(np.float32)
  counted = matmul_flops(lambda x: simplicial.apply(params, x, context(cfg, T), cfg, options)[0], x) / T
  assert cost.matmul == pytest.approx(counted, rel=0.15)
  assert cost.matmul != pytest.approx(2 * counted, rel=0.15)


@pytest.mark.parametrize("order", ["all", "increasing"])
def test_cost_of_chunks_equals_the_program(order):
  cfg, T, options = config(), 256, Options(mode="linear2", order=order, impl="chunked")
  params, x = layer_params(cfg, options), draw(0, 1, 256, 32).astype(np.float32)
  counted = matmul_flops(lambda x: simplicial.apply(params, x, context(cfg, T), cfg, options)[0], x) / T
  assert simplicial.cost(cfg, options, T).matmul == pytest.approx(counted, rel=0.15)


def test_diagnostics_appear_only_when_asked_for():
  cfg = config(24, 4, 2)
  x = draw(1, 2, 90, cfg.n_embd).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(options, probe):
    return simplicial.apply(layer_params(cfg, options), x, context(cfg, 90, probe=probe), cfg, options)[1]

  options = Options(w1=12, w2=5, score="det3", sink=True, measure_mi=True)
  assert run(options, False) == {}
  aux = run(options, True)
  chex.assert_tree_all_finite(aux)
  assert np.all(aux["mutual_information"] > 0)
  assert np.all(aux["mutual_information_share"] < 1)
  assert 0 < aux["unspent"] < 1
  assert 0 < aux["degenerate"] < 1
  assert np.all(aux["lag"] > 0) and aux["lag"][0] < 12 and aux["lag"][1] < 5
  assert aux["entropy"][0] <= aux["entropy"][1] + aux["entropy"][2] + 1e-5
  assert "mutual_information" not in run(Options(w1=12, w2=5), True)
  assert set(run(Options(mode="two_hop"), True)) == {"hop_weights", "effective_hops", "tau", "logsumexp"}
  rho = run(Options(mode="resolvent"), True)
  np.testing.assert_allclose(rho["effective_hops"], 1 / (1 - rho["rho"]), rtol=1e-6)


@pytest.mark.parametrize("claims", [simplicial.LAYER_CLAIMS[:8], simplicial.LAYER_CLAIMS[8:]], ids=["forms", "layers"])
def test_claims_of_the_layer_hold(claims, key):
  for result in run_claims(claims, key):
    assert result.holds, result.message or result


def test_demo_counts_cost_by_its_growth():
  """Slopes of work per token against T: softmax and hops linear, windows and sums of bounded size."""
  slopes = {line.split()[0]: float(line.rpartition("^")[2]) for line in demo.cost_lines().splitlines()[1:]}
  assert slopes["standard"] == pytest.approx(1, abs=0.01) and slopes["two_hop"] == pytest.approx(1, abs=0.05)
  assert slopes["trilinear"] < 0.1 and slopes["linear2"] == 0


def test_the_nearest_pairs_share_their_mass_between_right_and_wrong(key):
  """The product of the marginals of a symmetric planted pair puts half of the mass on (i, i) and (j, j)."""
  pairs, weights = demo.heads(key)
  three, product = weights["three-way"], weights["its marginals"]
  for axis in (1, 2):
    np.testing.assert_allclose(product.sum(axis), three.sum(axis), atol=1e-6)
  assert planted_mass(three, pairs).min() > 0.99
  np.testing.assert_allclose(planted_mass(product, pairs), 0.5, atol=0.01)
