"""The kernels of max-plus attention, interpreted: the bits of the scan, its gradients, and what compilers are given."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.attention import tropical, tropical_cases, tropical_pallas, tropical_scan
from mgr_jax.attention.tropical_options import Options, implementation
from mgr_jax.attention.tropical_pallas import Target, target
from mgr_jax.attention.tropical_scan import Plan
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt

SLOPES = np.float32([0.0, 0.125])
# Two groups of columns, the second with padding, and three chunks, the last with padding.
SPLIT, PLAN = Target(True, 64), Plan(8, 16)


def case(T=19, D=10, cut=5):
  """Two rows of two documents each, two query heads to each of two key/value heads, and a column for the score."""
  q, k, v = (np.float32(x) for x in tropical_cases.draw(np.random.default_rng(0), T, D, B=2, R=2))
  return q, k, np.asarray(tropical_cases.with_score(v)), SLOPES, tropical_cases.clock(T, 2, cut)


@functools.partial(jax.jit, static_argnums=(5, 6))
def kernels(q, k, v, decay, clock, plan=PLAN, where=SPLIT):
  """(y, s*, r*) of the kernels."""
  y, winner = tropical_pallas._run(q, k, v, decay, clock, plan, where, track=True)
  return y, winner // k.shape[-1], winner % k.shape[-1]


@functools.partial(jax.jit, static_argnums=5)
def scan(q, k, v, decay, clock, plan=PLAN):
  return tropical_scan.winners(q, k, v, decay, clock, plan)


def differences(found, wanted):
  return [int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in zip(found, wanted, strict=True)]


def test_outputs_and_winners_are_those_of_the_scan_bit_for_bit():
  args = case()
  wanted = scan(*args)
  assert differences(kernels(*args), wanted) == [0, 0, 0]
  assert differences(kernels(*case(cut=7)), wanted)[0] > 0, "documents that meet elsewhere are another function"
  faster = (*args[:3], SLOPES + np.float32(0.01), args[4])
  assert differences(kernels(*faster), wanted)[0] > 0, "another decay is another function"


def test_ties_go_to_the_same_winners():
  rng = np.random.default_rng(1)
  *_, decay, clock = case()
  q, k, v = (np.float32(x) for x in tropical_cases.draw(rng, 19, 10, B=2, R=2, integers=True))
  args = q, k, np.asarray(tropical_cases.with_score(v)), decay, clock
  wanted = scan(*args)
  assert differences(kernels(*args), wanted) == [0, 0, 0]
  backwards = q[..., ::-1], k[..., ::-1], *args[2:]
  y, _, r = kernels(*backwards)
  assert differences([y], wanted[:1]) == [0]
  assert np.any(9 - r != wanted[2]), "the lowest coordinate of the reversed ones is the highest: ties exist"


@functools.partial(jax.jit, static_argnums=0)
def derivatives(f, args, clock, weight):
  """y = f(args), the gradient of <weight, sin y>, and its derivative in some direction."""
  gradient = jax.grad(lambda args: jnp.sum(weight * jnp.sin(f(*args, clock))))
  direction = jax.tree.map(lambda x: jnp.cos(7 * x), args)
  return f(*args, clock), *jax.jvp(gradient, (args,), (direction,))


def error(x, y) -> float:
  """Largest difference of two trees over the largest entry of the leaf."""
  ratio = lambda a, b: float(jnp.max(jnp.abs(a - b)) / max(1e-300, jnp.max(jnp.abs(b))))
  return max(jax.tree.leaves(jax.tree.map(ratio, x, y)))


def test_gradients_and_curvature_equal_the_definition_in_float64():
  plan = Plan(8, 16)
  with jax.enable_x64(True):
    q, k, v = (jnp.asarray(x) for x in tropical_cases.draw(np.random.default_rng(0), 20, 4, R=2))
    args, clock = (q, k, v, jnp.array([0.05, 0.2])), tropical_cases.clock(20, cut=9)
    weight = np.random.default_rng(1).normal(size=q.shape)
    found = derivatives(lambda *a: tropical_pallas.maxplus_attention(*a, plan, SPLIT), args, clock, weight)
    wanted = derivatives(tropical_cases.by_definition, args, clock, weight)
    assert error(found, wanted) < 1e-10
    assert error(jax.tree.map(lambda x: 1.001 * x, found), wanted) > 1e-10


def test_the_layer_is_the_same_with_kernels_as_with_the_scan():
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
  options = Options(impl="scan", chunk=8, rebase=16, decay="learned", deterministic=True)
  rng = np.random.default_rng(0)
  draw = lambda spec: np.asarray(spec.draw(jax.random.key(1))) + 0.3 * rng.standard_normal(spec.shape, np.float32)
  params = {name: draw(spec) for name, spec in tropical.param_specs(cfg, options).items()}
  x = rng.standard_normal((2, 21, 16), np.float32)
  segments = np.tile(np.repeat([1, 2], [9, 12]), (2, 1)).astype(np.int32)

  @functools.partial(jax.jit, static_argnums=2)
  def value_and_gradient(params, x, options):
    position = np.where(np.arange(21) < 9, np.arange(21), np.arange(21) - 9)[None]
    ctx = gpt.context(position, cfg, segment_ids_BT=segments)
    f = lambda params, x: tropical.apply(params, x, ctx, cfg, options)[0]
    y, pull = jax.vjp(f, params, x)
    return y, pull(jnp.cos(y))

  scanned, kernelled = (
    value_and_gradient(params, x, Options(**{**vars(options), "impl": impl})) for impl in ("scan", "pallas")
  )
  np.testing.assert_array_equal(kernelled[0], scanned[0])
  for a, b in zip(jax.tree.leaves(kernelled[1]), jax.tree.leaves(scanned[1]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 * np.max(np.abs(b)))
  assert np.max(np.abs(scanned[1][1])) > 1e-2


def lowered(f, args, platform):
  """What a compiler for `platform` is given; no such device is needed."""
  with contextlib.ExitStack() as stack:
    if platform == "cuda" and jax.__version_info__ >= (0, 11):
      device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu")
      axis = jax.sharding.AxisType.Auto
      mesh = jax.sharding.AbstractMesh((1,), ("devices",), (axis,), abstract_device=device)
      stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(("platform", "call"), [("cuda", "triton"), ("tpu", "tpu_custom_call")])
def test_kernels_lower_for(platform, call):
  args, where = case(T=70, D=64), target(platform)
  loss = lambda q, k, v, decay: jnp.sum(
    jnp.sin(tropical_pallas.maxplus_attention(q, k, v, decay, args[4], Plan(32, 256), where))
  )
  text = lowered(jax.value_and_grad(loss, (0, 1, 2, 3)), args[:4], platform)
  assert text.count(call) >= 2, "chunk states, and outputs with winners"
  interpreted = lowered(functools.partial(tropical_pallas.maxplus_attention, plan=PLAN, where=SPLIT), args, platform)
  assert call not in interpreted
  with pytest.raises(ValueError, match="interpret"):
    lowered(functools.partial(tropical_pallas.maxplus_attention, plan=PLAN, where=where), args, "cpu")


def test_refusals_name_option_and_reason():
  with pytest.raises(ValueError, match=r"impl=pallas cannot serve.*beta=none.*impl=streaming"):
    Options(impl="pallas", beta="2")
  with pytest.raises(ValueError, match=r"impl=pallas.*platform METAL.*impl=scan"):
    target("METAL")
  assert target("cpu").interpret and not target("tpu").interpret and not target("gpu").interpret


def test_it_is_never_picked_unasked(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert implementation(Options(), 64) == "scan"
  assert implementation(Options(impl="pallas"), 64) == "pallas"
