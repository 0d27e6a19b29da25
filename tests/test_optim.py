"""Optimizers: the update against float64 and against optax, the role table, settings and their errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim import make_optimizer, optimizer_settings
from mgr_jax.optim.groups import group_labels, role_rates, stay_on_spheres
from mgr_jax.params import ROLES, ParamSpec, stack_specs
from mgr_jax.problems import UserError

CFG = GPTConfig(vocab_size=64, seq_len=8, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
SHAPES = {"matrix": (2, 5, 3), "embedding": (7, 3), "head": (3, 7), "scalar": ()}
SPECS = {role: ParamSpec(shape, (None,) * len(shape), role=role) for role, shape in SHAPES.items()}
SETTINGS = {"lr_scale": 0.5, "matrix_lr": 0.03, "embed_lr": 0.2, "head_lr": 0.04, "scalar_lr": 0.01}
RATES = {  # 16 wide: sqrt(768/16) = sqrt(48)
  "matrix": 0.5 * 0.03,
  "embedding": 0.5 * 0.2 * math.sqrt(48),
  "head": 0.5 * 0.04 * math.sqrt(48),
  "scalar": 0.5 * 0.01,
}


def random_tree(seed: int, scale: float = 1.0):
  rng = np.random.default_rng(seed)
  return {role: (scale * rng.normal(size=shape)).astype(np.float32) for role, shape in SHAPES.items()}


def run(optimizer, steps: int, scales=None):
  """Parameters after each step on a fixed sequence of gradients."""
  params = jax.tree.map(jnp.asarray, random_tree(0))
  state = optimizer.init(params)
  update = jax.jit(lambda g, s, p, scale: optimizer.update(g, s, p, scale=scale))
  history = []
  for t in range(steps):
    scale = 1.0 if scales is None else scales[t]
    updates, state = update(random_tree(t + 1, 0.1), state, params, jnp.float32(scale))
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history


def numpy_adamw(steps: int, scales, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
  """The same in float64, from the formula."""
  params = {k: v.astype(np.float64) for k, v in random_tree(0).items()}
  m = {k: np.zeros(s) for k, s in SHAPES.items()}
  v = {k: np.zeros(s) for k, s in SHAPES.items()}
  history = []
  for t in range(1, steps + 1):
    for role, g in random_tree(t, 0.1).items():
      g = g.astype(np.float64)
      m[role] = b1 * m[role] + (1 - b1) * g
      v[role] = b2 * v[role] + (1 - b2) * g**2
      step = (m[role] / (1 - b1**t)) / (np.sqrt(v[role] / (1 - b2**t)) + eps)
      wd = decay if role == "matrix" else 0.0
      params[role] = params[role] - scales[t - 1] * RATES[role] * (step + wd * params[role])
    history.append(dict(params))
  return history


def distance(a, b) -> float:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs)


def test_adamw_follows_the_formula_in_float64():
  scales = np.linspace(0.1, 1.0, 20)
  got = run(make_optimizer("adamw", SPECS, CFG, **SETTINGS), 20, scales)
  want = numpy_adamw(20, scales)
  assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < 2e-6
  for wrong in ({"b2": 0.951}, {"decay": 0.0}, {"b1": 0.901}):
    assert distance(got[-1], numpy_adamw(20, scales, **wrong)[-1]) > 1e-5


def test_adamw_is_optax_adamw_when_all_groups_learn_alike():
  cfg = GPTConfig(vocab_size=64, n_head=6, n_embd=768)  # the width at which no rate is rescaled
  rates = dict.fromkeys(("matrix_lr", "embed_lr", "head_lr", "scalar_lr"), 0.01)
  got = run(make_optimizer("adamw", SPECS, cfg, **rates), 20)
  mask = {role: role == "matrix" for role in SHAPES}
  oracle = optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mask)
  want = run(optax.with_extra_args_support(oracle), 20)
  assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < 1e-7
  changed = optax.with_extra_args_support(optax.adamw(0.01, 0.9, 0.951, 1e-8, weight_decay=0.1, mask=mask))
  assert distance(got[-1], run(changed, 20)[-1]) > 1e-5


def test_first_step_has_the_length_of_the_learning_rate():
  rng = np.random.default_rng(0)
  grads = {k: (10 ** rng.uniform(-3, 3, s) * rng.choice([-1, 1], s)).astype(np.float32) for k, s in SHAPES.items()}

  def first(**settings):
    optimizer = make_optimizer("adamw", SPECS, CFG, weight_decay=0, **SETTINGS, **settings)
    params = random_tree(0)
    return optimizer.update(grads, optimizer.init(params), params)[0]

  for role, update in first().items():
    np.testing.assert_allclose(np.asarray(update), -RATES[role] * np.sign(grads[role]), rtol=1e-4)
  smallest = np.min(np.abs(np.asarray(first(adam_eps=1.0)["matrix"])))
  assert smallest < 0.5 * RATES["matrix"]


def test_update_is_invariant_to_the_scale_of_the_gradient():
  def first(c, eps):
    optimizer = make_optimizer("adamw", SPECS, CFG, adam_eps=eps, **SETTINGS)
    params = random_tree(0)
    return optimizer.update(random_tree(1, 1e-4 * c), optimizer.init(params), params)[0]

  base = first(1.0, 1e-4)
  for c in (1e-3, 1e3):
    for a, b in zip(jax.tree.leaves(first(c, 1e-4 * c)), jax.tree.leaves(base), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5)
  assert distance(first(1e-3, 1e-4), base) > 1e-3


def test_only_matrices_decay_and_the_schedule_scales_the_decay():
  optimizer = make_optimizer("adamw", SPECS, CFG, **SETTINGS)
  params = random_tree(0)
  zero = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params, scale=0.25)
  new = optax.apply_updates(params, updates)
  np.testing.assert_allclose(new["matrix"], params["matrix"] * (1 - 0.25 * RATES["matrix"] * 0.1), atol=1e-7)
  for role in ("embedding", "head", "scalar"):
    np.testing.assert_array_equal(new[role], params[role])


def test_scale_multiplies_every_group_and_defaults_to_one():
  optimizer = make_optimizer("adamw", SPECS, CFG, **SETTINGS)
  params, grads = random_tree(0), random_tree(1)
  state = optimizer.init(params)
  plain, half, none = (optimizer.update(grads, state, params, **e)[0] for e in ({}, {"scale": 0.5}, {"scale": 0.0}))
  for a, b, z in zip(*map(jax.tree.leaves, (plain, half, none)), strict=True):
    np.testing.assert_array_equal(0.5 * np.asarray(a), b)
    assert not np.any(np.asarray(z))
    assert np.any(np.asarray(a))


def test_default_rates_by_role():
  defaults = optimizer_settings("adamw")
  rates = {k: v for k, v in defaults.items() if k.endswith("_lr") or k == "lr_scale"}
  got = role_rates(CFG, **rates)
  assert got == pytest.approx(
    dict.fromkeys(ROLES, 3e-3) | {"embedding": 0.2 * 48**0.5, "head": 0.004 * 48**0.5}, rel=1e-12
  )
  slow = role_rates(CFG, **(rates | {"matrix_lr": 1.0}))
  assert {role for role, rate in slow.items() if rate == 1.0} == {"matrix", "router", "direction"}
  assert (defaults["weight_decay"], defaults["adam_b1"], defaults["adam_b2"], defaults["adam_eps"]) == (
    0.1,
    0.9,
    0.95,
    1e-8,
  )


def test_zero_matrix_lr_and_minus_one_decay_mean_the_default():
  own = run(make_optimizer("adamw", SPECS, CFG), 2)[-1]
  asked = run(make_optimizer("adamw", SPECS, CFG, matrix_lr=0, weight_decay=-1), 2)[-1]
  assert distance(own, asked) == 0
  other = run(make_optimizer("adamw", SPECS, CFG, weight_decay=0), 2)[-1]
  assert distance(own, other) > 0


def test_the_whole_model_is_in_the_role_table():
  specs = gpt.specs(CFG)
  labels = group_labels(specs, {role: (role,) for role in ROLES})
  assert labels["embed"] == "embedding"
  assert labels["head"] == "head"
  assert set(jax.tree.leaves(labels["runs"])) <= {"matrix", "scalar"}
  params = gpt.init(jax.random.key(0), CFG)
  assert jax.tree.structure(labels) == jax.tree.structure(params)
  state = make_optimizer("adamw", specs, CFG).init(params)
  assert jax.tree.structure(state[0].mu) == jax.tree.structure(params)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state[0].mu, state[0].nu)))


@pytest.mark.parametrize(
  ("groups", "message"),
  [
    ({"a": ("matrix", "embedding", "scalar")}, r"head \(role head\) is in no group"),
    ({"a": ("matrix", "head", "scalar"), "b": ("embedding", "matrix")}, r"matrix \(role matrix\) is in a and b"),
  ],
)
def test_a_leaf_in_no_group_or_in_two_is_an_error(groups, message):
  with pytest.raises(ValueError, match=message):
    group_labels(SPECS, groups)


def test_unknown_names_give_the_nearest():
  with pytest.raises(UserError, match=r"unknown --optimizer=adam\n.*did you mean adamw\?"):
    make_optimizer("adam", SPECS, CFG)
  with pytest.raises(UserError, match=r"--momentum=0.9 has no effect with --optimizer=adamw\n.*--adam_b1"):
    make_optimizer("adamw", SPECS, CFG, momentum=0.9)


def test_all_bad_settings_are_reported_together():
  with pytest.raises(UserError) as e:
    make_optimizer(
      "adamw", SPECS, CFG, lr_scale=0, head_lr=-1.0, embed_lr=math.nan, adam_b2=1.0, adam_eps=0.0, weight_decay=-0.5
    )
  named = [p.error.split("=")[0] for p in e.value.problems]
  assert named == ["--lr_scale", "--embed_lr", "--head_lr", "--adam_b2", "--adam_eps", "--weight_decay"]
  assert all(p.fix for p in e.value.problems)


def factored(renorm: bool):
  """Three stacked layers of a direction with columns over two axes, its sizes, and a matrix."""
  v = ParamSpec((5, 2, 4), ("embed", "heads", "head_dim"), "direction", unit_axes=("embed", "head_dim"), renorm=renorm)
  sizes = {role: ParamSpec((2,), ("heads",), role=role) for role in ("log_scale", "gate")}
  return stack_specs({"v": v, "w": ParamSpec((5, 4), ("embed", "mlp"))} | sizes, 3)


def on_sphere(specs, seed: int = 0):
  rng = np.random.default_rng(seed)
  params = {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}
  spec = specs["v"]
  size = np.sqrt(np.sum(params["v"] ** 2, axis=spec.unit_dims, keepdims=True))
  return params | {"v": params["v"] * np.float32(spec.radius) / size}


@pytest.mark.parametrize("renorm", [True, False])
def test_directions_move_along_their_sphere(renorm):
  specs = factored(renorm)
  params, spec = on_sphere(specs), specs["v"]
  updates = {name: 0.3 * p for name, p in on_sphere(specs, 1).items()}
  got, _ = stay_on_spheres(specs).update(updates, optax.EmptyState(), params)
  v, u = (np.float64(tree["v"]) for tree in (params, updates))
  along = lambda x, y: np.sum(x * y, axis=spec.unit_dims, keepdims=True)
  tangent = u - v * along(v, u) / along(v, v)
  assert np.max(np.abs(along(v, tangent))) < 1e-6 < np.max(np.abs(along(v, u)))
  moved = v + tangent
  want = spec.radius * moved / np.sqrt(along(moved, moved)) if renorm else moved
  np.testing.assert_allclose(v + got["v"], want, atol=1e-6)
  norm = np.sqrt(along(v + got["v"], v + got["v"]))
  if renorm:
    np.testing.assert_allclose(norm, spec.radius, rtol=1e-6)
  else:
    assert np.all(norm > spec.radius * 1.01), "a tangent step leads outwards"
  for name in ("w", "log_scale", "gate"):
    np.testing.assert_array_equal(got[name], updates[name])


def test_adamw_keeps_directions_on_their_sphere_and_decays_none_of_their_parts():
  specs = factored(renorm=True)
  optimizer = make_optimizer("adamw", specs, CFG, matrix_lr=0.1, weight_decay=0.5)
  update = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
  params = start = on_sphere(specs)
  state = optimizer.init(params)
  for t in range(20):
    updates, state = update(on_sphere(specs, t + 1), state, params)
    params = optax.apply_updates(params, updates)
  norms = np.sqrt(np.sum(np.square(params["v"]), axis=specs["v"].unit_dims))
  np.testing.assert_allclose(norms, specs["v"].radius, rtol=1e-6)
  assert distance(params["v"], start["v"]) > 0.1
  still, _ = optimizer.update(jax.tree.map(np.zeros_like, start), optimizer.init(start), start)
  assert max(np.max(np.abs(still[name])) for name in ("v", "log_scale", "gate")) < 1e-6 < np.max(np.abs(still["w"]))


def test_a_direction_that_vanished_stays_finite():
  specs = factored(renorm=True)
  zero = jax.tree.map(np.zeros_like, on_sphere(specs))
  for updates in (zero, on_sphere(specs)):
    got, _ = stay_on_spheres(specs).update(updates, optax.EmptyState(), zero)
    assert np.all(np.isfinite(got["v"]))
