"""What optimizers share: groups, frozen leaves, restricted products, cleared moments, diagnostics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim import OPTIMIZERS, curvature, make_optimizer, optimizer_settings, reset_moments
from mgr_jax.optim.diagnostics import diagnostics
from mgr_jax.optim.groups import by_group, freeze, group_labels, select
from mgr_jax.params import ROLES, ParamSpec, is_spec

CFG = GPTConfig(vocab_size=64, seq_len=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
SHAPES = {"matrix": (2, 5, 3), "embedding": (7, 3), "head": (3, 7), "scalar": ()}
SPECS = {role: ParamSpec(shape, (None,) * len(shape), role=role) for role, shape in SHAPES.items()}
GROUPS = {"blocks": ("matrix",), "rest": tuple(r for r in ROLES if r != "matrix")}
LABELS = group_labels(SPECS, GROUPS)


def tree(seed: int, specs=SPECS, scale: float = 1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: np.float32(scale * rng.standard_normal(s.shape)), specs, is_leaf=is_spec)


def equal(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


class TestGroups:
  def test_each_transformation_sees_its_own_leaves(self):
    optimizer = by_group(LABELS, {"blocks": optax.sgd(1.0), "rest": optax.scale_by_sign()})
    grads = tree(0)
    updates, state = optimizer.update(grads, optimizer.init(tree(1)), tree(1), scale=0.5)
    assert list(select(grads, LABELS, "blocks")) == ["matrix"]
    np.testing.assert_array_equal(updates["matrix"], -grads["matrix"])
    for role in ("embedding", "head", "scalar"):
      np.testing.assert_array_equal(updates[role], np.sign(grads[role]))
    assert set(state) == {"blocks", "rest"}

  def test_products_are_the_diagonal_block_of_a_group(self):
    sizes = jax.tree.map(np.size, tree(0))
    n = sum(jax.tree.leaves(sizes))
    A = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    _, unravel = jax.flatten_util.ravel_pytree(tree(0))
    product = lambda v: unravel(A @ jax.flatten_util.ravel_pytree(v)[0])

    def ask(updates, state, params=None, *, hvp_fn, **extra):
      return hvp_fn(updates), state

    asking = optax.GradientTransformationExtraArgs(lambda params: (), ask)
    optimizer = by_group(LABELS, {"blocks": asking, "rest": optax.identity()})
    grads = tree(2)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads, hvp_fn=product)
    outside = jax.tree.map(np.zeros_like, grads)
    want = product(outside | {"matrix": grads["matrix"]})["matrix"]
    np.testing.assert_allclose(updates["matrix"], want, rtol=1e-6)
    np.testing.assert_array_equal(updates["head"], grads["head"])
    assert not np.allclose(updates["matrix"], product(grads)["matrix"]), "the unrestricted product is another one"

  @pytest.mark.parametrize("groups", [("blocks",), ("blocks", "rest", "spare")])
  def test_a_group_without_leaves_or_without_optimizer_is_an_error(self, groups):
    with pytest.raises(ValueError, match=r"the groups with parameters are \['blocks', 'rest'\]"):
      by_group(LABELS, dict.fromkeys(groups, optax.identity()))

  def test_frozen_leaves_keep_every_bit(self):
    specs = SPECS | {"matrix": ParamSpec((2, 5, 3), ("layers", None, None), frozen=True)}
    free = {**specs, "matrix": ParamSpec((2, 5, 3), ("layers", None, None))}
    params, grads = tree(0), tree(1)
    for held, s in ((True, specs), (False, free)):
      optimizer = make_optimizer("adamw", s, CFG, weight_decay=0.5)
      updates, _ = optimizer.update(grads, optimizer.init(params), params)
      assert np.any(np.asarray(updates["matrix"])) != held
      assert np.all(np.asarray(updates["head"]))
    noisy = optax.GradientTransformationExtraArgs(lambda p: (), lambda u, s, p=None, **e: (tree(3), s))
    updates, _ = freeze(noisy, jax.tree.map(lambda s: s.frozen, specs, is_leaf=is_spec)).update(grads, (), params)
    assert not np.any(updates["matrix"])


@pytest.fixture(scope="module")
def updates():
  """The first update of every optimizer on one model and one gradient."""
  specs = gpt.specs(CFG)
  params = jax.tree.map(np.asarray, gpt.init(jax.random.key(0), CFG))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: p + np.float32(0.1 * rng.standard_normal(p.shape)), params)
  grads = jax.tree.map(lambda p: np.float32(0.1 * rng.standard_normal(p.shape)), params)
  stretched = lambda v: jax.tree.map(lambda x: jnp.linspace(1, 100, x.size).reshape(x.shape) * x, v)
  found = {}
  for name in OPTIMIZERS:
    optimizer = make_optimizer(name, specs, CFG)
    update = jax.jit(lambda g, s, p, o=optimizer: o.update(g, s, p, hvp_fn=stretched, key=jax.random.key(0))[0])
    found[name] = jax.device_get(update(grads, optimizer.init(params), params))
  return found


class TestFirstUpdates:
  def test_all_optimizers_are_different(self, updates):
    """Distance of the directions in which hidden matrices move; of embeddings, where HOSS on matrices is AdamW."""

    def distance(a, b, part):
      flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates[name][part])]) for name in (a, b)]
      unit = [x / np.linalg.norm(x) for x in flat]
      return np.linalg.norm(unit[0] - unit[1])

    for a, b in itertools.combinations(OPTIMIZERS, 2):
      part = "embed" if {a, b} == {"hoss", "hoss_hidden"} else "runs"
      assert distance(a, b, part) > 0.1, (a, b)
      assert distance(a, a, part) == 0

  def test_muon_and_hoss_hidden_leave_the_rest_to_adamw(self, updates):
    for name in {"muon", "hoss_hidden"} & set(updates):
      np.testing.assert_array_equal(updates[name]["embed"], updates["adamw"]["embed"])
      np.testing.assert_array_equal(updates[name]["head"], updates["adamw"]["head"])


def test_only_hoss_asks_for_products():
  assert curvature("adamw") is curvature("muon") is curvature("sgd") is None
  for name in {"hoss", "hoss_hidden"} & set(OPTIMIZERS):
    assert curvature(name) == ("ggn", 0.25)
    assert curvature(name, hoss_curvature="hessian", hoss_hvp_frac=1.0) == ("hessian", 1.0)


class TestReset:
  @pytest.mark.parametrize("name", OPTIMIZERS)
  def test_a_reset_state_makes_the_first_step_again(self, name):
    """Moments, and the counters that debias them; what is not a memory of gradients stays."""
    settings = {"hoss_metric": "adam"} if "hoss_metric" in optimizer_settings(name) else {}
    optimizer = make_optimizer(name, SPECS, CFG, **settings)
    params = tree(0)
    given = {"hvp_fn": lambda v: jax.tree.map(lambda x: 2 * x, v), "key": jax.random.key(0)}
    update = jax.jit(lambda g, s: optimizer.update(g, s, params, **given))
    fresh = optimizer.init(params)
    state = fresh
    for t in range(3):
      _, state = update(tree(t + 1), state)
    reset = jax.jit(lambda s, flag: reset_moments(optimizer, s, params, flag))
    assert equal(reset(state, False), state)
    cleared = reset(state, True)
    assert equal(update(tree(9), cleared)[0], update(tree(9), fresh)[0])
    assert not equal(update(tree(9), state)[0], update(tree(9), fresh)[0])

  def test_keeping_the_counter_makes_the_first_step_too_long(self):
    optimizer = make_optimizer("adamw", SPECS, CFG, adam_b1=0.9, adam_b2=0.999, weight_decay=0)
    params, grads = tree(0), tree(1)
    first, state = optimizer.update(grads, optimizer.init(params), params)
    for t in range(2000):
      count = jnp.int32(t + 1)
    zero = jax.tree.map(jnp.zeros_like, state[0].mu)
    moments_only = (state[0]._replace(mu=zero, nu=zero, count=count), *state[1:])
    wrong, _ = optimizer.update(grads, moments_only, params)
    ratio = np.median(np.asarray(wrong["matrix"]) / np.asarray(first["matrix"]))
    assert ratio == pytest.approx(0.1 / 0.001**0.5, rel=0.1)

  def test_an_unknown_state_is_refused(self):
    optimizer = optax.scale_by_belief()
    with pytest.raises(ValueError, match="an optimizer state holds"):
      reset_moments(optimizer, optimizer.init(tree(0)), tree(0), True)


def test_diagnostics_equal_their_definitions():
  params, grads = tree(0), tree(1)
  updates = jax.tree.map(lambda g: -0.5 * g, grads)
  updates["head"] = -updates["head"]
  found = jax.jit(lambda *trees: diagnostics(SPECS, *trees))(grads, updates, params)
  assert found["grad_norm/matrix"] == pytest.approx(np.linalg.norm(grads["matrix"]), rel=1e-6)
  assert found["update_norm/matrix"] == pytest.approx(0.5 * np.linalg.norm(grads["matrix"]), rel=1e-6)
  ratio = 0.5 * np.linalg.norm(grads["embedding"]) / np.linalg.norm(params["embedding"])
  assert found["update_to_param_rms/embedding"] == pytest.approx(ratio, rel=1e-6)
  assert found["cosine/matrix"] == pytest.approx(1.0, rel=1e-6)
  assert found["cosine/head"] == pytest.approx(-1.0, rel=1e-6)
  zero = diagnostics(SPECS, grads, jax.tree.map(np.zeros_like, updates), jax.tree.map(np.zeros_like, params))
  assert zero["cosine/matrix"] == zero["update_to_param_rms/matrix"] == zero["nonfinite_count"] == 0
  broken = grads | {"scalar": np.float32(np.nan)}
  assert diagnostics(SPECS, broken, updates, params)["nonfinite_count"] == 1
