"""HOSS: its claims, noise and step control, errors, determinism, cost, and the factories over a model's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax.algebra.phi import phi_delta, psi_delta
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.flops import matmul_flops
from mgr_jax.optim import hoss_claims, hoss_krylov_claims, hoss_noise
from mgr_jax.optim import hoss_spectrum as macro
from mgr_jax.optim.adamw import adamw
from mgr_jax.optim.hoss import hoss, hoss_cost, hoss_hidden, scale_by_hoss
from mgr_jax.optim.lanczos import lanczos
from mgr_jax.params import ParamSpec
from mgr_jax.problems import UserError

RNG = np.random.default_rng(0)
CFG = GPTConfig(vocab_size=64, seq_len=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
PARAMS = {"w": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32), "b": jnp.zeros(2), "s": jnp.float32(1.0)}
CURVATURE = {"w": jnp.linspace(-1, 8, 12).reshape(4, 3), "b": jnp.array([0.5, 2.0]), "s": jnp.float32(3.0)}
GRADS = jax.tree.map(lambda x: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32), PARAMS)


def product(v):
  return jax.tree.map(jnp.multiply, CURVATURE, v)


def model(w):
  """The quadratic with `GRADS` and `CURVATURE` at `PARAMS`."""
  away = jax.tree.map(jnp.subtract, w, PARAMS)
  parts = jax.tree.map(lambda u, g, c: jnp.sum(u * g + 0.5 * c * u * u), away, GRADS, CURVATURE)
  return sum(jax.tree.leaves(parts))


def run(tx, state=None, **given):
  state = tx.init(PARAMS) if state is None else state
  return tx.update(GRADS, state, PARAMS, hvp_fn=product, **given)


def norm(tree) -> float:
  return float(optax.tree.norm(tree))


def close(a, b, tol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tol, rtol=tol), a, b)


def equal(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("claim", hoss_krylov_claims.CLAIMS + hoss_claims.CLAIMS, ids=lambda c: c.name)
def test_claims_hold_and_their_controls_fail(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


def test_flow_maps_have_finite_derivatives_of_every_order():
  third = jax.jit(jax.vmap(jax.grad(jax.grad(jax.grad(phi_delta)), argnums=0), (0, None)))
  z = jnp.array([0.0, 1e-8, -1e-3, 0.99, 1.01, -3.0])
  exact = [float(np.mean(-(s**3) * np.exp(-s * x))) for x in np.asarray(z) for s in [(np.arange(20000) + 0.5) / 20000]]
  np.testing.assert_allclose(third(z, 1.0), exact, rtol=2e-3)


@pytest.fixture(scope="module")
def space():
  return macro.spectrum(jax.jit(lambda g: lanczos(product, g, 4))(GRADS))


class TestStepControl:
  @pytest.mark.parametrize("neg", macro.NEGATIVE)
  def test_the_trust_radius_bounds_the_step_and_only_shortens_time(self, space, neg):
    size = jax.jit(lambda delta: macro.step_norm(space, delta, neg))
    trusted = jax.jit(lambda delta, radius: macro.trusted_time(space, delta, neg, radius))
    full = float(size(2.0))
    for radius in (1e-6 * full, 0.3 * full, 0.999 * full):
      time = trusted(2.0, radius)
      assert float(size(time)) <= radius * (1 + 1e-4)
      assert float(size(1.001 * time)) > radius * (1 - 1e-4)
    for radius in (1.001 * full, 1e9):
      assert float(trusted(2.0, radius)) == 2.0
    assert float(trusted(0.0, 1.0)) == 0.0

  def test_the_cap_is_what_the_rank_resolves_unless_the_space_is_invariant(self, space):
    largest = float(jnp.max(jnp.abs(space.theta)))
    assert float(macro.resolved_time(space, 100.0)) == pytest.approx((4 / 1.7) ** 2 / largest, rel=1e-5)
    assert float(macro.resolved_time(space, 0.01)) == pytest.approx(0.01)
    assert float(macro.resolved_time(space._replace(residual=jnp.float32(0)), 100.0)) == 100.0

  def test_lm_trusts_the_model_as_far_as_it_holds(self):
    tx = scale_by_hoss(0.1, rank=4, neg="flow", delta_policy="lm")
    step = jax.jit(lambda s, value, slope, bias: run(tx, s, value=value, loss_fn=lambda w: slope * model(w) + bias))
    init = tx.init(PARAMS)
    cases = {1.0: (1.5, True), 0.5: (1.0, True), 0.1: (0.5, True), -1.0: (0.5, False), np.nan: (0.5, False)}
    for slope, (factor, moves) in cases.items():
      update, state = step(init, 0.0, slope, 0.0)
      assert float(state.delta) == pytest.approx(0.1 * factor)
      assert bool(norm(update) > 0) == moves
      if np.isfinite(slope):
        assert float(state.diag.ratio) == pytest.approx(slope, rel=1e-3)
    # A decrease that the float32 loss cannot resolve says nothing of the model.
    update, state = step(init, 1e9, 1.0, 1e9)
    assert float(state.delta) == pytest.approx(0.1) and norm(update) > 0


class TestNoise:
  def test_minibatch_noise_has_the_covariance_of_the_examples(self):
    with jax.enable_x64(True):
      find = jax.jit(lambda g: macro.spectrum(lanczos(lambda v: jnp.linspace(-1, 3, 9) * v, g, 4)))
      s = find(RNG.standard_normal(9))
      slopes = RNG.standard_normal((4, 12))
      sampler = jax.jit(jax.vmap(lambda k: hoss_noise.minibatch_noise(k, slopes, s, 0.7, "flat", 0.3)))
      x = np.asarray(sampler(jax.random.split(jax.random.key(1), 20000)))
      theta, V = np.maximum(s.theta, 0), np.asarray(s.vectors)
      pairs = theta[:, None] + theta
      kernel = np.where(pairs == 0, 0.7, -np.expm1(-0.7 * pairs) / np.where(pairs == 0, 1, pairs))
    exact = 0.3 * V @ ((V.T @ np.cov(slopes) @ V) * kernel) @ V.T
    distance = lambda C: np.linalg.norm(x.T @ x / len(x) - C) / np.linalg.norm(exact)
    assert distance(exact) < 0.05
    assert distance(0.3 * np.cov(slopes)) > 0.2

  def test_the_tail_has_the_mean_curvature_of_what_the_space_leaves_out(self):
    """Curvature 4 along the gradient and 1 elsewhere: the space is one direction, the tail isotropic, both exact."""
    l = jnp.ones(6).at[0].set(4.0)
    tx = scale_by_hoss(0.8, rank=1, noise="krylov+tail", temperature=0.2)
    g = jnp.zeros(6).at[0].set(2.0)
    draw = jax.jit(jax.vmap(lambda k: tx.update(g, tx.init(g), None, hvp_fn=lambda v: l * v, key=k)))
    x, state = draw(jax.random.split(jax.random.key(0), 20000))
    np.testing.assert_allclose(state.trace, 9.0)
    np.testing.assert_allclose(np.var(x, 0), 0.2 * psi_delta(l, 0.8), rtol=0.05)
    np.testing.assert_allclose(np.mean(x, 0), -phi_delta(l, 0.8) * g, atol=0.01)
    assert abs(np.var(x[:, 1]) / (0.2 * psi_delta(4.0, 0.8)) - 1) > 0.2

  def test_a_step_is_a_function_of_its_key_and_resumes_bitwise(self):
    tx = scale_by_hoss(0.3, rank=3, noise="full", temperature=0.01, metric="adam")
    update = jax.jit(lambda g, s, p, k: tx.update(g, s, p, hvp_fn=product, key=k))

    def train(steps, seed, start=None, constant=False):
      params, state, first = start or (PARAMS, tx.init(PARAMS), 0)
      for t in range(first, steps):
        key = jax.random.key(0) if constant else jax.random.fold_in(jax.random.key(seed), t)
        grads = jax.tree.map(jnp.add, GRADS, product(jax.tree.map(jnp.subtract, params, PARAMS)))
        updates, state = update(grads, state, params, key)
        params = optax.apply_updates(params, updates)
      return params, state, steps

    whole = train(4, 7)
    saved = jax.tree.map(np.asarray, train(2, 7))
    assert equal(train(4, 7, saved), whole)
    assert not equal(train(4, 8), whole)
    assert equal(train(4, 8, constant=True), train(4, 7, constant=True)), "what the clause above must catch"

  def test_leaves_draw_independent_numbers(self):
    z = hoss_noise.normal_like(jax.random.key(0), {"a": jnp.zeros(500), "b": jnp.zeros(500)})
    assert abs(np.corrcoef(z["a"], z["b"])[0, 1]) < 0.2


class TestUpdate:
  def test_decay_belongs_to_gradient_and_curvature(self):
    """On leaves with decay the step is that of the loss F + λ|w|²/2."""
    exact = lambda g, p, c, m: -phi_delta(c + 0.5 * m, 0.2) * (g + 0.5 * m * p)
    mask = {"w": True, "b": False, "s": True}
    tx = scale_by_hoss(0.1, rank=15, neg="flow", weight_decay=0.5, decay_mask=mask, breakdown_tol=1e-9)
    update, state = jax.jit(lambda scale: run(tx, scale=scale))(2.0)
    close(update, jax.tree.map(exact, GRADS, PARAMS, CURVATURE, mask))
    assert float(state.diag.delta_used) == pytest.approx(0.2)
    assert 0 < float(state.diag.neg_mass) < 1 and float(state.diag.pred_decrease) > 0

  def test_the_metric_is_adams_and_a_change_of_units_changes_nothing(self):
    """In the units of the first gradient a step is the flow of D·w' = -(H·w + g); w -> 2w rescales it."""
    tx = scale_by_hoss(0.7, rank=15, neg="flow", metric="adam", eps=1e-12, breakdown_tol=1e-9)
    update, _ = jax.jit(lambda: run(tx))()
    exact = lambda g, c: -phi_delta(c / jnp.abs(g), 0.7) * g / jnp.abs(g)
    close(update, jax.tree.map(exact, GRADS, CURVATURE), 1e-4)

  def test_zero_gradients_and_dead_leaves_stay_exactly_where_they_are(self):
    tx = scale_by_hoss(0.5, rank=3)
    dead = lambda v: v | {"b": 0 * v["b"]}
    update = jax.jit(lambda g: tx.update(dead(g), tx.init(g), hvp_fn=lambda v: dead(product(v)))[0])
    moved = update(GRADS)
    assert not np.any(moved["b"]) and np.all(moved["w"])
    assert norm(update(jax.tree.map(jnp.zeros_like, GRADS))) == 0

  def test_bfloat16_parameters_get_bfloat16_updates(self):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (GRADS, PARAMS))
    tx = scale_by_hoss(0.1, rank=2, metric="adam")
    update, state = jax.eval_shape(lambda g, p: tx.update(g, tx.init(p), p, hvp_fn=lambda v: v), *half)
    assert {x.dtype for x in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}
    assert state.nu["w"].dtype == jnp.float32

  def test_settings_and_arguments_out_of_range_are_named(self):
    wrong = {"rank": 0, "neg": "no", "noise": "full", "b2": 1.0, "delta_policy": "no", "eps": 0.0, "trust_radius": -1.0}
    with pytest.raises(ValueError) as caught:
      scale_by_hoss(0.0, **wrong)
    for name in (*wrong, "delta", "temperature"):
      assert f"{name}=" in str(caught.value)
    with pytest.raises(ValueError, match="rank=16 exceeds the number of scalars, 15"):
      scale_by_hoss(0.1, rank=16).init(PARAMS)
    with pytest.raises(ValueError, match="floating point"):
      scale_by_hoss(0.1, rank=1).init({"n": jnp.arange(3)})
    for settings, missing in (
      ({}, "hvp_fn"),
      ({"noise": "krylov", "temperature": 1.0}, "hvp_fn, key"),
      ({"weight_decay": 1.0, "delta_policy": "lm"}, "hvp_fn, params, value, loss_fn"),
      ({"noise": "minibatch", "temperature": 1.0}, "hvp_fn, key, example_jvp_fn"),
    ):
      tx = scale_by_hoss(0.1, rank=2, **settings)
      with pytest.raises(ValueError, match=f"needs {missing}$"):
        tx.update(GRADS, tx.init(PARAMS))


def test_the_counted_cost_is_that_of_the_traced_step_and_it_compiles_once():
  """On a network of matrix products alone, in gradients of the same batch; vector work of the basis is not counted."""
  width, batch = 64, 96
  params = {name: jnp.asarray(RNG.standard_normal((width, width)) / 8, jnp.float32) for name in "abc"}
  x = jnp.asarray(RNG.standard_normal((batch, width)), jnp.float32)
  forward = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
  loss = lambda p, x: 0.5 * jnp.mean(jnp.square(forward(p, x)))

  def products(kind, p, x):
    if kind == "hessian":
      return jax.linearize(lambda p: jax.grad(loss)(p, x), p)[1]
    y, push = jax.linearize(lambda p: forward(p, x), p)
    pull = jax.linear_transpose(push, p)
    return lambda v: pull(push(v) / y.size)[0]

  def step(kind, rank, share=1.0):
    tx = scale_by_hoss(0.1, rank=rank)

    def update(state, p, x):
      grads = jax.grad(loss)(p, x)
      part = x[: int(share * batch)]
      return tx.update(grads, state, p, hvp_fn=products(kind, p, part))

    return update, tx.init(params)

  def counted(kind, rank, share=1.0):
    """Gradients per step without the basis, whose passes are matrix products of their own."""
    update, state = step(kind, rank, share)
    n = 3 * width**2
    basis = 2 * n * rank * (4 * rank + 1) + 2 * n * (rank + 1) + 2 * n * rank
    return (matmul_flops(update, state, params, x) - basis) / matmul_flops(jax.grad(loss), params, x)

  # The first layer has no derivative by its input: all counts are a little below those of deep networks.
  for kind in ("ggn", "hessian"):
    costs = {r: counted(kind, r) for r in (2, 4, 8)}
    slope = (costs[8] - costs[2]) / 6
    assert costs[4] - costs[2] == pytest.approx(2 * slope, rel=0.01)
    assert slope == pytest.approx({"ggn": 4 / 3, "hessian": 2.0}[kind], rel=0.15)
    assert slope <= 3.3
    assert costs[8] == pytest.approx(hoss_cost(0, rank=8, curvature=kind, hvp_frac=1.0).gradients, rel=0.15)
    quarter = counted(kind, 8, 0.25)
    assert quarter == pytest.approx(hoss_cost(0, rank=8, curvature=kind, hvp_frac=0.25).gradients, rel=0.15)

  update, state = step("ggn", 4)
  compiled = jax.jit(update)
  for _ in range(3):
    updates, state = compiled(state, params, x)
    params = optax.apply_updates(params, updates)
  assert compiled._cache_size() == 1
  assert int(state.count) == 3


SHAPES = {"matrix": (2, 5, 3), "router": (3, 4), "embedding": (7, 3), "head": (3, 7), "scalar": (2,)}
SPECS = {role: ParamSpec(shape, (None,) * len(shape), role=role) for role, shape in SHAPES.items()}


class TestFactories:
  def step(self, tx, specs):
    draw = lambda seed: {
      k: np.random.default_rng(seed).standard_normal(s.shape).astype(np.float32) for k, s in specs.items()
    }
    # Coupled leaves: the sum of all entries enters every one of them.
    coupled = lambda v: jax.tree.map(lambda x: x + 0.1 * sum(jnp.sum(y) for y in jax.tree.leaves(v)), v)
    update = lambda: tx.update(draw(1), tx.init(draw(0)), draw(0), hvp_fn=coupled, key=jax.random.key(0))
    return jax.jit(update)()[0]

  def test_hidden_matrices_by_hoss_and_the_rest_by_adamw(self):
    hidden = self.step(hoss_hidden(SPECS, CFG, weight_decay=0.1), SPECS)
    baseline = self.step(adamw(SPECS, CFG, weight_decay=0.1), SPECS)
    everything = self.step(hoss(SPECS, CFG, weight_decay=0.1), SPECS)
    for role in SHAPES:
      assert np.array_equal(hidden[role], baseline[role]) == (role != "matrix"), role
      assert not np.array_equal(hidden[role], everything[role])

  def test_frozen_leaves_take_no_part(self):
    """Neither moved nor in the Krylov space: without them the others get the same step."""
    specs = SPECS | {"fixed": ParamSpec((4,), (None,), role="matrix", frozen=True)}
    with_frozen = self.step(hoss(specs, CFG, hoss_noise="krylov", hoss_temperature=1e-3), specs)
    without = self.step(hoss(SPECS, CFG, hoss_noise="krylov", hoss_temperature=1e-3), SPECS)
    assert not np.any(with_frozen.pop("fixed"))
    assert equal(with_frozen, without)

  @pytest.mark.parametrize("factory", [hoss, hoss_hidden])
  def test_all_problems_are_reported_together(self, factory):
    wrong = {"hoss_rank": 0, "hoss_curvature": "no", "hoss_metric": "no", "hoss_neg": "no", "hoss_noise": "minibatch"}
    wrong |= {"hoss_temperature": -1.0, "hoss_trust_radius": -1.0, "hoss_hvp_frac": 0.0, "matrix_lr": 0.0}
    with pytest.raises(UserError) as caught:
      factory({}, CFG, weight_decay=-1.0, **wrong)
    for name, value in (wrong | {"weight_decay": -1.0}).items():
      assert f"--{name}={value}" in str(caught.value)
    for useless in ({"hoss_noise": "full"}, {"hoss_temperature": 1.0}):
      with pytest.raises(UserError, match="has no effect"):
        factory({}, CFG, **useless)
    factory({}, CFG)
    with pytest.raises(UserError, match=r"hoss_rank=500 exceeds the \d+ scalars"):
      factory(SPECS, CFG, hoss_rank=500)

  def test_a_model_without_matrices_has_nothing_for_hoss(self):
    with pytest.raises(ValueError, match="nothing to do"):
      hoss_hidden({"scalar": ParamSpec((20,), (None,), role="scalar")}, CFG)
