"""Muon: claims, layouts, groups by mechanism, updates against their formulas, sharding, settings and errors."""

import functools
import os
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax.attention import REGISTRY
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim.adamw import adamw
from mgr_jax.optim.groups import select
from mgr_jax.optim.muon import ADAMW, GROUPS, MUON, muon, muon_diagnostics, muon_labels, scale_by_muon
from mgr_jax.optim.muon_claims import CLAIMS, haar
from mgr_jax.optim.muon_layout import SHAPE_SCALES, layout, newton_schulz_flops, shape_factor
from mgr_jax.optim.newton_schulz import METHODS, orthogonalise
from mgr_jax.params import ParamSpec, stack_specs
from mgr_jax.problems import UserError

CFG = GPTConfig(vocab_size=64, seq_len=8, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
STACKED = ("layers", "embed", "mlp")

MLP = ("mlp/w_in", "mlp/w_out")
BASE = ("attention/wk", "attention/wo", "attention/wq", "attention/wv", *MLP)
# The leaves that Muon takes, for every mechanism, and for those of its variants that differ.
PARTITION = {
  **dict.fromkeys(("standard", "tropical", "ultrametric", "quaternion", "octonion", "braid", "fractal"), BASE),
  **dict.fromkeys(("surreal", "reversible"), BASE),
  "simplicial": (
    "attention/wk",
    "attention/wk2",
    "attention/wo",
    "attention/wq",
    "attention/wv",
    "attention/wv2",
    *MLP,
  ),
  "simplicial(mode=two_hop,hops=3)": BASE,
  "simplicial(mode=resolvent)": BASE,
  "braid(mode=monodromy,score=rapidity)": ("attention/wo", "attention/wv", *MLP),
  "reversible(mode=symplectic)": ("attention/w", "attention/wk", "attention/wq", "mlp/w"),
  "reversible(mode=symplectic, integrator=leapfrog, h=0.5, lambda_min=0.1)": (
    "attention/w",
    "attention/wk",
    "attention/wq",
    "mlp/w",
  ),
  "gauge": ("attention/gen_in", *BASE),
  "gauge(b=2,rank=0,context=edge,values=plain,rope=none)": BASE,
  **dict.fromkeys(
    ("braid(mode=word)", "braid(mode=word,word_law=perm,word_gate=hard,strands=5)"),
    ("attention/wo", "attention/wv", *MLP),
  ),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claims_hold_and_their_controls_fail(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


def normal(seed: int, specs):
  rng = np.random.default_rng(seed)
  return {name: np.float32(rng.normal(size=spec.shape)) for name, spec in specs.items()}


def muon_leaves(attention: str, **fields) -> tuple[str, ...]:
  cfg = GPTConfig(vocab_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, attention=attention, **fields)
  specs = gpt.specs(cfg)
  return tuple(name.removeprefix("runs/0/") for name in select(specs, muon_labels(specs), MUON))


@pytest.mark.parametrize("mechanism", REGISTRY)
def test_every_mechanism_gives_muon_exactly_its_matrices(mechanism):
  for attention in (mechanism, *REGISTRY[mechanism].variants):
    assert muon_leaves(attention) == PARTITION.get(attention, PARTITION[mechanism]), attention


def test_the_partition_lists_only_what_exists_and_max_plus_weights_are_not_in_it():
  known = {v for name, record in REGISTRY.items() for v in (name, *record.variants)}
  assert set(PARTITION) <= known
  for mlp, leaves in (("gelu", MLP), ("swiglu", ("mlp/w_gate", *MLP)), ("none", ()), ("tropical", ())):
    assert muon_leaves("standard", mlp=mlp) == (*BASE[:4], *leaves), mlp


def test_a_role_without_group_is_an_error(monkeypatch):
  monkeypatch.setitem(GROUPS, ADAMW, tuple(role for role in GROUPS[ADAMW] if role != "scalar"))
  with pytest.raises(ValueError, match=r"block/gain \(role scalar\) is in no group"):
    muon(everything(), CFG)


def test_layers_stay_apart_and_heads_come_apart_on_request():
  wq = ParamSpec((2, 6, 3, 4), ("layers", "embed", "heads", "head_dim"))
  wo = ParamSpec((2, 3, 4, 6), ("layers", "heads", "head_dim", "embed"), fan_in=2)
  x = np.float32(np.random.default_rng(0).normal(size=wq.shape))
  assert layout(wq)[2:] == (2, 6, 12)
  assert layout(wo)[2:] == (2, 12, 6)
  assert layout(wq, per_head=True)[2:] == (6, 6, 4)
  assert layout(wo, per_head=True)[2:] == (6, 4, 6)
  np.testing.assert_array_equal(layout(wq).pack(x), x.reshape(2, 6, 12))
  y = np.float32(np.random.default_rng(1).normal(size=wo.shape))
  np.testing.assert_array_equal(layout(wo).pack(y), y.reshape(2, 12, 6).swapaxes(1, 2))
  heads = layout(wq, per_head=True).pack(x)
  np.testing.assert_array_equal(heads[4], x[1, :, 1].T)
  for spec, array in ((wq, x), (wo, y)):
    for per_head in (False, True):
      form = layout(spec, per_head)
      np.testing.assert_array_equal(form.unpack(form.pack(array)), array)


def test_one_call_per_shape_class():
  specs = {
    "a": ParamSpec((3, 4, 8), STACKED),
    "b": ParamSpec((2, 8, 4), STACKED),
    "c": ParamSpec((4, 4), ("embed", "mlp")),
    "d": ParamSpec((8, 2, 2), ("embed", "heads", "head_dim")),
  }
  seen = []

  def ns_fn(M):
    seen.append(M.shape)
    return 2 * M

  tx = scale_by_muon(specs, momentum=0.0, nesterov=False, momentum_warmup=0, ns_fn=ns_fn, shape_scale="none")
  g = normal(0, specs)
  updates, state = tx.update(g, tx.init(g))
  assert seen == [(6, 4, 8), (1, 4, 4)]
  for name in specs:
    np.testing.assert_array_equal(updates[name], 2 * g[name])
  assert int(state.count) == 1


def test_stacked_layers_are_orthogonalised_one_by_one():
  specs = {"w": ParamSpec((3, 8, 5), STACKED)}
  tx = scale_by_muon(specs, ns_fn=functools.partial(orthogonalise, ns="svd"))
  g = normal(0, specs)
  u = np.asarray(tx.update(g, tx.init(g))[0]["w"])
  np.testing.assert_allclose(u.mT @ u, np.broadcast_to(np.eye(5), (3, 5, 5)), atol=1e-5)
  assert np.max(np.abs(u.reshape(24, 5).T @ u.reshape(24, 5) - np.eye(5))) > 1


def test_batches_give_the_same_bits_on_cpu():
  M = np.float32(np.random.default_rng(0).normal(size=(3, 8, 5)))
  run = jax.jit(functools.partial(orthogonalise, dtype=jnp.float32))
  with jax.default_device(jax.devices("cpu")[0]):
    np.testing.assert_array_equal(run(M), np.stack([run(x) for x in M]))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_and_its_warm_up(nesterov):
  specs = {"w": ParamSpec((4, 6), ("embed", "mlp"))}
  tx = scale_by_muon(specs, nesterov=nesterov, momentum_warmup=4, ns_fn=lambda M: M, shape_scale="none")
  state, b = tx.init(normal(0, specs)), np.zeros((4, 6))
  for t, mu in enumerate((0.85, 0.875, 0.9, 0.925, 0.95, 0.95)):
    g = normal(t, specs)
    updates, state = tx.update(g, state)
    b = mu * b + (1 - mu) * g["w"]
    np.testing.assert_allclose(updates["w"], mu * b + (1 - mu) * g["w"] if nesterov else b, rtol=1e-5, atol=1e-7)
  assert state.mu["w"].dtype == jnp.float32


@pytest.mark.parametrize("shape_scale", SHAPE_SCALES)
def test_shape_factors(shape_scale):
  want = {"jordan": (2, 1), "spectral": (2, 0.5), "rms": (3.2, 3.2), "none": (1, 1)}[shape_scale]
  assert (shape_factor(64, 256, shape_scale), shape_factor(256, 64, shape_scale)) == pytest.approx(want, rel=1e-12)
  if shape_scale == "rms":
    semi_orthogonal = haar(np.random.default_rng(0), 48)[:16]
    assert np.sqrt(np.mean(np.square(shape_factor(16, 48, "rms") * semi_orthogonal))) == pytest.approx(0.2)


@pytest.mark.parametrize("ns", METHODS)
def test_zero_and_low_rank_matrices(ns):
  rng = np.random.default_rng(0)
  rank_2 = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 20))
  X = np.asarray(orthogonalise(jnp.asarray(np.stack([0 * rank_2, rank_2]), jnp.float32), ns))
  assert not np.any(X[0])
  s = np.linalg.svd(X[1], compute_uv=False)
  assert np.all(s[:2] > 0.68) and np.all(s[:2] < 1.135)
  assert s[2] < 1e-3, "rounding is not a direction"


def test_bfloat16_stays_near_float32():
  M = jnp.asarray(np.random.default_rng(0).normal(size=(24, 96)), jnp.float32)
  for ns in ("ns5", "polar_express"):
    exact, short = orthogonalise(M, ns, dtype=jnp.float32), orthogonalise(M, ns, dtype=jnp.bfloat16)
    assert short.dtype == jnp.float32
    assert 1e-3 < jnp.linalg.norm(short - exact) / jnp.linalg.norm(exact) < 0.15
  u = jnp.asarray(np.random.default_rng(1).normal(size=(24, 1)), jnp.float32)
  assert jnp.linalg.norm(orthogonalise(u @ u.T, dtype=jnp.bfloat16), 2) < 1.124, "no overshoot above the interval"


def test_orthogonalise_names_what_is_wrong():
  for arguments, message in (({"ns": "qr"}, "ns='qr'"), ({"steps": 0}, "steps=0")):
    with pytest.raises(ValueError, match=message):
      orthogonalise(jnp.eye(3), **arguments)
  with pytest.raises(ValueError, match=r"shape \(3,\)"):
    orthogonalise(jnp.ones(3))


def test_flops():
  specs = {"a": ParamSpec((3, 8, 4), STACKED), "b": ParamSpec((4, 4), ("embed", "mlp"))}
  assert newton_schulz_flops(specs, 5) == 3 * 5 * (4 * 16 * 8 + 2 * 64) + 5 * 6 * 64


def everything():
  """One leaf of each kind, as a nested tree."""
  block = {
    "w": ParamSpec((8, 6), ("embed", "mlp")),
    "v": ParamSpec((8, 2, 3), ("embed", "heads", "head_dim"), "direction", unit_axes=("embed",), renorm=True),
    "size": ParamSpec((2, 3), ("heads", "head_dim"), "log_scale"),
    "gate": ParamSpec((8,), ("embed",), "gate"),
    "gain": ParamSpec((8,), ("embed",), "scalar"),
    "route": ParamSpec((8, 2), ("embed", "heads"), "router"),
    "column": ParamSpec((8, 1), ("embed", "mlp")),
  }
  return {
    "embed": ParamSpec((10, 8), ("vocab", "embed"), "embedding"),
    "head": ParamSpec((8, 10), ("embed", "vocab"), "head"),
    "block": stack_specs(block, 2),
  }


def flat_run(make, specs, steps=3, **settings):
  """Flat parameters after some steps on fixed gradients, from a fixed start on the spheres."""
  tx = make(specs, CFG, **settings)
  is_leaf = lambda s: isinstance(s, ParamSpec)

  def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape)), specs, is_leaf=is_leaf)

  params = draw(0)
  direction, spec = params["block"]["v"], specs["block"]["v"]
  params["block"]["v"] = spec.radius * direction / np.linalg.norm(direction, axis=1, keepdims=True)
  state, start = tx.init(params), params
  others = {"value": 1.0, "hvp_fn": None, "key": None, "unknown": 3}
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, scale=jnp.float32(0.5), **others))
  for t in range(steps):
    updates, state = update(draw(t + 1), state, params)
    params = optax.apply_updates(params, updates)
  return start, params, state


def test_what_is_not_a_matrix_learns_as_with_adamw():
  specs = everything()
  labels = muon_labels(specs)
  assert set(select(specs, labels, MUON)) == {"block/w", "block/v"}
  start, ours, state = flat_run(muon, specs, weight_decay=0.1, matrix_lr=0.5)
  _, theirs, _ = flat_run(adamw, specs, weight_decay=0.1, matrix_lr=3e-3)
  chex.assert_trees_all_equal(*(select(tree, labels, ADAMW) for tree in (ours, theirs)))
  moved = select(jax.tree.map(lambda a, b: np.max(np.abs(a - b)), start, ours), labels, MUON)
  assert min(moved.values()) > 0.05
  np.testing.assert_allclose(np.linalg.norm(ours["block"]["v"], axis=1), specs["block"]["v"].radius, rtol=1e-6)
  assert state[0][MUON][0].mu.keys() == {"block/w", "block/v"}


def test_the_step_of_a_matrix_is_rate_times_schedule_times_polar_factor():
  specs = everything()
  start, after, _ = flat_run(muon, specs, 1, lr_scale=0.5, matrix_lr=0.4, muon_ns="svd", weight_decay=0.3)
  step = np.float64(after["block"]["w"] - start["block"]["w"]) + 0.5 * 0.5 * 0.4 * 0.3 * start["block"]["w"]
  np.testing.assert_allclose(np.linalg.svd(step, compute_uv=False), 0.5 * 0.5 * 0.4, rtol=1e-4)
  _, spectral, _ = flat_run(muon, specs, 1, matrix_lr=0.4, muon_ns="svd", muon_scale="spectral")
  s = np.linalg.svd(spectral["block"]["w"] - start["block"]["w"], compute_uv=False)
  np.testing.assert_allclose(s, 0.5 * 0.4 * np.sqrt(6 / 8), rtol=1e-4)


def test_one_compilation_for_any_multiplier():
  specs = {"w": ParamSpec((4, 6), ("embed", "mlp"))}
  tx, g = muon(specs, CFG), normal(0, specs)
  update = lambda s, scale: tx.update(g, s, g, scale=scale)

  def three_steps(step, number):
    chex.clear_trace_counter()
    state, sizes = tx.init(g), []
    for scale in (1.0, 0.5, 0.25):
      updates, state = step(state, number(scale))
      sizes.append(float(jnp.linalg.norm(updates["w"])))
    return sizes

  sizes = three_steps(jax.jit(chex.assert_max_traces(update, n=1)), jnp.float32)
  assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2]
  with pytest.raises(AssertionError):
    three_steps(jax.jit(chex.assert_max_traces(update, n=1), static_argnums=1), float)


def test_all_bad_settings_are_reported_together():
  with pytest.raises(UserError) as e:
    muon(
      {},
      CFG,
      lr_scale=0,
      weight_decay=-1,
      momentum=1.0,
      muon_ns="qr",
      muon_ns_steps=0,
      muon_scale="big",
      adam_b1=2,
      adam_eps=0,
    )
  named = [p.error.split("=")[0].removeprefix("--") for p in e.value.problems]
  assert named == [
    *("lr_scale", "weight_decay", "momentum", "muon_ns", "muon_scale", "muon_ns_steps", "adam_b1", "adam_eps")
  ]
  assert all(p.fix for p in e.value.problems)
  muon({}, CFG)


def test_a_model_without_matrices_is_an_error():
  with pytest.raises(ValueError, match="Muon has nothing to do"):
    muon({"gain": ParamSpec((8,), ("embed",), "scalar")}, CFG)
  with pytest.raises(ValueError, match="Muon has nothing to do"):
    muon({"w": ParamSpec((2, 8, 1), STACKED)}, CFG)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    (ParamSpec((3, 8), ("layers", "mlp"), "scalar"), r"block/x of shape \(3, 8\) holds 8 by 1"),
    (ParamSpec((), (), "scalar"), r"block/x of shape \(\) holds 1 by 1"),
    (ParamSpec((3, 8, 1), STACKED), r"block/x of shape \(3, 8, 1\) holds 8 by 1"),
  ],
)
def test_a_vector_is_refused_by_name(spec, message):
  with pytest.raises(ValueError, match=message):
    scale_by_muon({"block": {"w": ParamSpec((4, 4), ("embed", "mlp")), "x": spec}})


@pytest.mark.parametrize(
  "setting",
  [
    {"momentum": -0.1},
    {"shape_scale": "big"},
    {"bias_correction": "adam"},
    {"momentum_warmup": -1},
    {"bias_correction": "optax"},
  ],
  ids=str,
)
def test_bad_arguments_are_named(setting):
  with pytest.raises(ValueError, match=next(iter(setting))):
    scale_by_muon({}, **setting)


def test_diagnostics_are_those_of_the_singular_values():
  specs = {"a": ParamSpec((2, 6, 16), STACKED), "b": ParamSpec((6, 6), ("embed", "mlp"))}
  rng = np.random.default_rng(0)
  s = np.array([1, 0.5, 0.2, 0.1, 0.05, 1e-4])
  M = (haar(rng, 6) * s) @ haar(rng, 16)[:6]
  momentum = {"a": np.float32([M, 0 * M]), "b": np.zeros((6, 6), np.float32)}
  ns_fn = functools.partial(orthogonalise, ns="ns5", dtype=jnp.float32)
  found = jax.jit(lambda momentum: muon_diagnostics(specs, momentum, ns_fn))(momentum)
  assert found["6x16/stable_rank"] == pytest.approx(np.sum(s**2), rel=1e-4)
  assert found["6x16/small_mass"] == pytest.approx(s[-1] / s.sum(), rel=1e-2)
  x = s / np.linalg.norm(s)
  for _ in range(5):
    x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
  for name, want in (("min", x.min()), ("median", np.median(x)), ("max", x.max())):
    assert found[f"6x16/sigma_{name}"] == pytest.approx(want, rel=1e-2)
  assert found["6x16/orthogonality_defect"] == pytest.approx(np.sqrt(np.mean((x**2 - 1) ** 2)), rel=1e-3)
  assert found["6x6/stable_rank"] == found["6x6/small_mass"] == 0
  assert found["6x6/orthogonality_defect"] == 1


SHARDED = """
  import functools, jax, jax.numpy as jnp, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from mgr_jax.optim.muon import scale_by_muon
  from mgr_jax.optim.newton_schulz import orthogonalise
  from mgr_jax.params import ParamSpec

  assert jax.device_count() == 8
  mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  axes = ("layers", "embed", "mlp")
  specs = {"a": ParamSpec((6, 16, 48), axes), "b": ParamSpec((5, 48, 16), axes), "c": ParamSpec((16, 16), axes[1:])}
  rng = np.random.default_rng(0)
  g = {name: np.float32(rng.normal(size=spec.shape)) for name, spec in specs.items()}
  held = {name: P(*([None] * (len(spec.shape) - 2)), "fsdp", "data") for name, spec in specs.items()}
  placed = {name: jax.device_put(g[name], NamedSharding(mesh, held[name])) for name in specs}
  # Until it has converged, a polynomial of high degree turns rounding into differences of 1e-5.
  ns = lambda sharding: scale_by_muon(specs, ns_fn=functools.partial(orthogonalise, steps=8), sharding=sharding)

  def run(tx):
    step = jax.jit(tx.update, out_shardings=({name: NamedSharding(mesh, held[name]) for name in specs}, None))
    compiled = step.lower(placed, tx.init(placed)).compile()
    return compiled(placed, tx.init(placed))[0], compiled.cost_analysis()["flops"]

  alone = ns(None)
  plain, _ = alone.update(g, alone.init(g))
  owned, own_flops = run(ns(NamedSharding(mesh, P(("data", "fsdp"), None, None))))
  everywhere, all_flops = run(ns(NamedSharding(mesh, P(None, None, None))))
  for name in specs:
    assert owned[name].sharding.spec == held[name], owned[name].sharding
    for other in (owned, everywhere):
      np.testing.assert_allclose(np.asarray(other[name]), plain[name], atol=1e-5)
  # 11 wide matrices in shares of 2, and one square matrix for one of the devices.
  assert 0.1 < own_flops / all_flops < 0.3, (own_flops, all_flops)
"""


def test_devices_share_the_matrices_of_a_class():
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(SHARDED)], env=env, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-3000:]
