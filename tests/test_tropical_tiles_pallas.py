"""Max-plus attention with any score: tiles and the kernel, interpreted, and what compilers are given."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.attention import tropical, tropical_cases, tropical_tiles, tropical_tiles_pallas
from mgr_jax.attention.tropical_options import Options, implementation
from mgr_jax.attention.tropical_pallas import Target, target
from mgr_jax.attention.tropical_tiles_pallas import Tile
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from tests.test_tropical_pallas import derivatives, error, lowered

SLOPES = np.float32([0.0, 0.125])
# As for Triton: pieces of powers of two, 8 of 38 queries at a time. As for Mosaic: 16 of them, 8 of 19 keys at a time.
PIECES, TILES = (Target(True, 128), None), (Target(True), Tile(16, 8))
SCORES = [
  Options(score="hilbert"),
  Options(score_groups=2),
  Options(score="dot"),
  Options(score="dot", agg="route"),
]
name = lambda opts: f"{opts.score}-{opts.score_groups}-{opts.agg}"


def case(T=19, D=12, cut=5, B=2, integers=False):
  """Rows of two documents each, two query heads to each of two key/value heads, and a column for the score."""
  draw = tropical_cases.draw(np.random.default_rng(0), T, D, B=B, R=2, integers=integers)
  q, k, v = tropical_cases._batch_first(*(np.float32(x) for x in draw))
  return q, k, tropical_cases.with_score(v), SLOPES, tropical_cases.clock(T, B, cut)


def tiles(q, k, v, decay, clock, opts):
  segments = tropical_cases._segments(clock)
  return tropical_tiles.tiled_attention(q, k, v, decay, clock.position.T, segments, opts)


def definition(q, k, v, decay, clock, opts):
  segments = tropical_cases._segments(clock)
  return tropical_tiles.reference_attention(q, k, v, decay, clock.position.T, segments, opts)


def kernel(q, k, v, decay, clock, opts, where=TILES):
  return tropical_tiles_pallas.tiled_attention(q, k, v, decay, clock.starts.T, opts, *where)


@pytest.mark.parametrize("opts", SCORES, ids=name)
def test_outputs_are_those_of_tiles(opts):
  @jax.jit
  def three(*args):
    return tiles(*args, opts), kernel(*args, opts, PIECES), kernel(*args, opts, TILES)

  def largest_difference(found, wanted):
    return float(np.max(np.abs(np.asarray(found) - wanted)))

  wanted, *both = three(*case())
  tolerance = 2e-6 if opts.score == "dot" and opts.agg == "maxplus" else 0
  for found in both:
    assert largest_difference(found, wanted) <= tolerance
  for other in (case(cut=7), (*case()[:3], SLOPES + np.float32(0.25), case()[4])):
    assert largest_difference(three(*other)[1], wanted) > 1e-2, "other documents or another decay are other functions"


def test_ties_go_to_the_same_winners():
  """Small integers tie often, and their sums are exact in any order."""
  *_, clock = args = case(integers=True)
  opts = Options(score_groups=2)
  cotangent = np.random.default_rng(1).integers(-3, 4, args[0].shape[:-1] + args[2].shape[-1:]).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(f, q, k, v):
    return jax.vjp(lambda *x: f(*x, np.float32([0.0, 1.0]), clock, opts), q, k, v)[1](cotangent)

  wanted = gradient(definition, *args[:3])
  for found in (gradient(kernel, *args[:3]), gradient(tiles, *args[:3])):
    for a, b in zip(found, wanted, strict=True):
      np.testing.assert_array_equal(a, b)
  backwards = gradient(kernel, args[0][..., ::-1], args[1][..., ::-1], args[2])
  assert np.any(backwards[0][..., ::-1] != wanted[0]), "of reversed coordinates the highest wins: ties exist"


@pytest.mark.parametrize("opts", SCORES, ids=name)
def test_gradients_and_curvature_equal_the_definition_in_float64(opts):
  T = 70
  with jax.enable_x64(True):
    draw = tropical_cases.draw(np.random.default_rng(0), T, 4, R=2)
    args = (*tropical_cases._batch_first(*draw), np.array([0.05, 0.2]))
    clock = tropical_cases.clock(T, cut=30)
    weight = np.random.default_rng(1).normal(size=args[0].shape)
    wanted = derivatives(functools.partial(definition, opts=opts), args, clock, weight)
    for f in (kernel, tiles):
      found = derivatives(functools.partial(f, opts=opts), args, clock, weight)
      assert error(found, wanted) < 1e-10
    assert error(jax.tree.map(lambda x: 1.001 * x, found), wanted) > 1e-10


def test_the_layer_is_the_same_with_the_kernel_as_with_tiles():
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
  options = Options(impl="tiled", score_groups=2, decay="learned")
  rng = np.random.default_rng(0)
  draw = lambda spec: np.asarray(spec.draw(jax.random.key(1))) + 0.3 * rng.standard_normal(spec.shape, np.float32)
  params = {name: draw(spec) for name, spec in tropical.param_specs(cfg, options).items()}
  x = rng.standard_normal((2, 21, 16), np.float32)
  segments = np.tile(np.repeat([1, 2], [9, 12]), (2, 1)).astype(np.int32)

  @functools.partial(jax.jit, static_argnums=1)
  def output(params, options):
    ctx = gpt.context(gpt.positions_in_documents(segments), cfg, segment_ids_BT=segments)
    return tropical.apply(params, x, ctx, cfg, options)[0]

  wanted = output(params, options)
  np.testing.assert_allclose(output(params, Options(**{**vars(options), "impl": "pallas"})), wanted, atol=1e-5)
  slower = params | {"log_decay": params["log_decay"] - np.float32(0.01)}
  assert np.max(np.abs(output(slower, options) - wanted)) > 1e-3


def squares(text, T):
  """Shapes of a program with two dimensions of T or more, or with as many numbers."""
  shapes = {s: [int(d) for d in s.split("x")] for s in re.findall(r"tensor<(\d+(?:x\d+)*)x\w+>", text)}
  return {s for s, dims in shapes.items() if sum(d >= T for d in dims) > 1 or math.prod(dims) >= T * T}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(("platform", "call"), [("cuda", "triton"), ("tpu", "tpu_custom_call")])
@pytest.mark.parametrize("opts", [SCORES[0], Options(score_groups=3), *SCORES[2:]], ids=name)
def test_the_kernel_lowers_without_square_arrays_for(platform, call, opts):
  T = 700
  args = case(T, D=48, B=1)

  def gradient(f, opts=opts):
    loss = lambda q, k, v, decay: jnp.sum(jnp.sin(f(q, k, v, decay, args[4], opts)))
    return jax.value_and_grad(loss, (0, 1, 2, 3))

  text = lowered(gradient(functools.partial(kernel, where=(target(platform),))), args[:4], platform)
  assert text.count(call) == 1 and not squares(text, T)
  assert call not in lowered(functools.partial(kernel, opts=opts, clock=args[4]), args[:4], platform)
  with pytest.raises(ValueError, match="interpret"):
    lowered(functools.partial(kernel, opts=opts, clock=args[4], where=(target(platform),)), args[:4], "cpu")


def test_square_arrays_are_found():
  q, k, v, decay, clock = case(700, D=4, B=1)
  dense = lambda *x: tropical_tiles.reference_attention(*x, clock.position.T, None, SCORES[2])
  assert any("700x700" in found for found in squares(lowered(dense, (q, k, v, decay), "cuda"), 700))


def test_it_is_never_picked_unasked_and_refuses_what_it_cannot_serve(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert implementation(Options(score="hilbert"), 64) == "tiled"
  assert implementation(Options(score="hilbert", impl="pallas"), 64) == "pallas"
  with pytest.raises(ValueError, match=r"deterministic=True.*score that factors"):
    Options(score="hilbert", impl="pallas", deterministic=True)
  with pytest.raises(ValueError, match=r"chunk=64.*score that factors"):
    Options(score="hilbert", impl="pallas", chunk=64)


def test_its_cost_counts_visible_pairs_and_no_matrix_products():
  cfg = GPTConfig(vocab_size=7, n_layer=1, n_head=4, n_kv_head=2, n_embd=64)
  D, T = 16, 255
  common = tropical.cost(cfg, Options(score="dot", agg="route", impl="pallas"), T)
  assert common.matmul == tropical.cost(cfg, Options(impl="pallas"), T).matmul
  assert common.vector == 2 * 4 * 128 * D
  assert tropical.cost(cfg, Options(score="hilbert", impl="pallas"), T).vector == 2 * 4 * 128 * (3 * D + 1)
  assert tropical.cost(cfg, Options(score="dot", agg="route", impl="tiled"), T).matmul > common.matmul
