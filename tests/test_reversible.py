"""Reversible stacks: exact reconstruction, gradients, memory, decoding, and options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax import conformance
from mgr_jax.attention import REGISTRY, attention_names, model_problems, resolve, with_options
from mgr_jax.attention.reversible import Options
from mgr_jax.claims import largest_difference, relative_difference, run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt, reversible, stack
from mgr_jax.model.reconstruction import missed
from mgr_jax.model.reversible_claims import CLAIMS, memory_slope, temporary_bytes
from mgr_jax.problems import UserError

WRAPPED = [name for name in attention_names() if not REGISTRY[name].wrapper]


def config(attention, n_layer=2, **fields):
  base = {"vocab_size": 97, "seq_len": 16, "n_layer": n_layer, "n_head": 2, "n_kv_head": 2, "n_embd": 16}
  return GPTConfig(**(base | fields), attention=attention)


def batch_of(cfg, key):
  tokens = conformance.tokens_of(key, 2, cfg.seq_len)
  return {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}


@functools.partial(jax.jit, static_argnums=2)
def loss_and_gradient(params, batch, cfg):
  return jax.value_and_grad(lambda p: gpt.loss(p, batch, cfg)[0])(params)


def gradient_difference(attention, key, **fields):
  cfg = config(f"reversible({attention})", **fields)
  plain = dataclasses.replace(cfg, attention=f"reversible({attention}, backward=autodiff)")
  params, batch = conformance.noisy_params(key, cfg), batch_of(cfg, key)
  value, gradient = loss_and_gradient(params, batch, cfg)
  wanted_value, wanted = loss_and_gradient(params, batch, plain)
  assert abs(value - wanted_value) < 1e-5
  return relative_difference(gradient, wanted)


@pytest.mark.parametrize("name", WRAPPED)
def test_every_mechanism_is_recovered_bit_for_bit(name, key):
  """In the backward pass of training, with bfloat16 inside and 8 layers; float32 streams are not."""
  cfg = config(f"reversible({name})", n_layer=8, compute_dtype="bfloat16", n_embd=32)
  params, tokens = conformance.noisy_params(key, cfg), batch_of(cfg, key)["tokens"]
  assert missed(params, tokens, cfg) == (0, 0)


@pytest.mark.parametrize("options", ["mix=givens", "streams=half", "tied=true", "mode=symplectic, integrator=leapfrog"])
def test_every_kind_of_stack_is_recovered_bit_for_bit(options, key):
  cfg = config(f"reversible({options})", n_layer=4)
  assert missed(conformance.noisy_params(key, cfg), batch_of(cfg, key)["tokens"], cfg) == (0, 0)


def test_float_streams_are_recovered_to_rounding_and_with_bfloat16_inside_not_even_that(key):
  cfg = config("reversible(state=float32)", n_layer=32)
  params, tokens = conformance.noisy_params(key, cfg), batch_of(cfg, key)["tokens"]
  words, deviation = missed(params, tokens, cfg)
  assert words > 0 and deviation < 5e-5
  turned = config("reversible(state=float32, mix=givens)", n_layer=32, compute_dtype="bfloat16")
  assert missed(conformance.noisy_params(key, turned), tokens, turned).deviation > 1e-2


def streams_after(cfg, params, tokens):
  """What `advance` and `retreat` make of the input: the streams before, after, and back again."""
  members = stack.runs(cfg)
  stages, opts = stack.stages_of(cfg, members), members[0].wrap
  params = gpt.cast(params, cfg)
  ctx = gpt.context(jnp.arange(tokens.shape[1])[None, :], cfg)
  before = reversible.enter(gpt.embed(params, tokens, cfg), opts)
  after = reversible.advance(stages, params["runs"], before, ctx, opts)
  return before, after, reversible.retreat(stages, params["runs"], after, ctx, opts)


def test_the_witness_is_the_error_of_a_separate_inverse_program(key):
  """Both invert float32 streams with bfloat16 inside; they are other programs, so they agree in size, not in bits."""
  cfg = config("reversible(state=float32, mix=givens)", n_layer=8, compute_dtype="bfloat16")
  params, tokens = conformance.noisy_params(key, cfg), batch_of(cfg, key)["tokens"]
  before, _, back = jax.jit(streams_after, static_argnums=0)(cfg, params, tokens)
  seen = max(largest_difference(a.value, b.value) for a, b in zip(before, back, strict=True))
  witnessed = missed(params, tokens, cfg).deviation
  assert seen > 0 and 0.2 < witnessed / seen < 5


@pytest.mark.parametrize("name", ["standard", "mix=givens"])
def test_ten_thousand_round_trips_are_bit_exact(name, key):
  """Each from where the last one ended, far beyond the range of int32, around which the streams wrap."""
  cfg = config(f"reversible({name})", n_layer=1, seq_len=4, n_head=1, n_kv_head=1, n_embd=8)
  members = stack.runs(cfg)
  stages, opts = stack.stages_of(cfg, members), members[0].wrap
  params = conformance.noisy_params(key, cfg)["runs"]
  ctx = gpt.context(jnp.arange(4)[None, :], cfg)
  exact = lambda streams: jnp.stack([s.exact for s in streams])

  @jax.jit
  def trips(x):
    def trip(i, carry):
      streams, wrong = carry
      after = reversible.advance(stages, params, streams, ctx, opts)
      back = reversible.retreat(stages, params, after, ctx, opts)
      return after, wrong + jnp.sum(exact(back) != exact(streams))

    streams = reversible.enter(x, opts)
    return jax.lax.fori_loop(0, 10_000, trip, (streams, 0))

  streams, wrong = trips(30.0 * jax.random.normal(key, (1, 4, 8)))
  assert wrong == 0
  assert jnp.max(jnp.abs(exact(streams))) > 2**24, "the streams moved"


@pytest.mark.parametrize(
  ("attention", "tolerance"),
  [
    ("state=float32", 5e-6),
    ("frac_bits=20", 1e-5),
    ("standard", 1e-4),
    ("tropical(beta=8), state=float32, mix=givens", 1e-4),
    ("streams=half, state=float32, mix=cayley, tied=true", 1e-5),
    ("mode=symplectic, integrator=leapfrog, state=float32, h=0.5", 1e-5),
    ("fractal(balance=0.1), state=float32", 1e-5),
  ],
)
def test_reconstructing_gives_the_gradient_of_autodiff(attention, tolerance, key):
  assert gradient_difference(attention, key, n_layer=3) < tolerance


def test_a_backward_pass_that_does_not_undo_the_couplings_is_caught(key, monkeypatch):
  monkeypatch.setattr(reversible, "_subtract", lambda stream, y, opts: stream)
  jax.clear_caches()
  assert gradient_difference("state=float32", key, n_layer=3) > 1e-2
  jax.clear_caches()


@pytest.mark.parametrize("state", ["fixed32", "float32"])
def test_hessian_vector_products_see_through_the_reconstruction(state, key):
  cfg = config(f"reversible(state={state})")
  plain = dataclasses.replace(cfg, attention=f"reversible(state={state}, backward=autodiff)")
  params, batch = conformance.noisy_params(key, cfg), batch_of(cfg, key)
  direction = conformance.noisy_params(jax.random.key(1), cfg)

  def product(cfg):
    return jax.jit(lambda p, v: jax.jvp(jax.grad(lambda p: gpt.loss(p, batch, cfg)[0]), (p,), (v,))[1])(
      params, direction
    )

  found, wanted = product(cfg), product(plain)
  assert relative_difference(found, wanted) < 1e-3
  assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted)) > 1e-3


def test_claims_hold_and_their_controls_fail(key):
  for result in run_claims(CLAIMS, key):
    assert result.holds, result.message or result


def test_memory_of_64_layers_is_that_of_8():
  cfg = config("reversible", seq_len=64, n_head=4, n_kv_head=4, n_embd=64)
  shallow, deep = (temporary_bytes(dataclasses.replace(cfg, n_layer=n)) for n in (8, 64))
  assert deep <= 1.01 * shallow


def test_what_else_grows_with_depth():
  cfg = config("standard", seq_len=64, n_head=4, n_kv_head=4, n_embd=64)
  assert memory_slope(cfg) >= 5
  assert 0.9 <= memory_slope(dataclasses.replace(cfg, remat="full")) <= 3
  assert 0.9 <= memory_slope(dataclasses.replace(cfg, attention="reversible(backward=remat)")) <= 5


def test_half_streams_of_twice_the_width_are_full_streams(key):
  full = config("reversible(state=float32)")
  half = dataclasses.replace(
    full, attention="reversible(state=float32, streams=half)", n_embd=32, n_head=4, n_kv_head=4
  )
  params = conformance.noisy_params(key, full)["runs"]
  x = jax.random.normal(key, (2, 16, 16))
  ctx = gpt.context(jnp.arange(16)[None, :], full)
  y, _ = stack.forward(params, x, ctx, full)
  first, second = jnp.split(stack.forward(params, jnp.concatenate([x, x], -1), ctx, half)[0], 2, -1)
  assert largest_difference((first + second) / 2, y) < 1e-6
  assert largest_difference(first, second) > 1e-3


def test_a_stack_starts_as_the_identity(key):
  for attention in ("reversible(mix=givens)", "reversible(mix=cayley, state=float32)"):
    cfg = config(attention)
    x = jax.random.normal(key, (1, 16, 16))
    y, _ = stack.forward(gpt.init(key, cfg)["runs"], x, gpt.context(jnp.arange(16)[None, :], cfg), cfg)
    assert largest_difference(y, x) < 2.0**-16


def test_tied_layers_have_the_parameters_of_one():
  cfg = config("reversible(tied=true)", n_layer=5)
  assert {leaf.shape[0] for leaf in jax.tree.leaves(gpt.specs(cfg)["runs"], is_leaf=gpt.is_spec)} == {1}


def test_diagnostics_come_with_the_probe_only(key):
  cfg = config("reversible(tropical)")
  params, tokens = conformance.noisy_params(key, cfg), batch_of(cfg, key)["tokens"]
  assert not [name for name in gpt.forward(params, tokens, cfg)[1] if name.startswith("reversible/")]
  aux = gpt.forward(params, tokens, cfg, probe=True)[1]
  assert aux["reversible/stream_cos"].shape == (2,) and jnp.all(jnp.abs(aux["reversible/stream_cos"]) <= 1)
  assert jnp.all((aux["reversible/range_use"] > 0) & (aux["reversible/range_use"] < 0.01))
  assert any(name.startswith("tropical/") for name in aux)


@pytest.mark.parametrize(
  ("attention", "part"),
  [
    ("reversible(state=bfloat16)", "cannot be inverted"),
    ("reversible(mode=adjoint)", "mode=adjoint is not one of additive, symplectic"),
    ("reversible(frac_bits=24)", "frac_bits=24 is not in 8..20"),
    ("reversible(state=float32, frac_bits=12)", "has no effect without state=fixed32"),
    ("reversible(mix=cayley)", "no exact integer form"),
    ("reversible(mix_rank=2)", "has no effect without mix=cayley"),
    ("reversible(mix=cayley, state=float32, mix_rank=20)", "above half the streams' width"),
    ("reversible(h=0.5)", "has no effect without mode=symplectic"),
    ("reversible(mode=symplectic, h=2)", "h=2.0 is not in (0, 1]"),
    ("reversible(braid, mode=symplectic)", "cannot wrap braid"),
    ("reversible(standard(window=4), mode=symplectic)", "cannot wrap standard"),
    ("reversible(reversible)", "wraps a wrapper"),
    ("reversible(nothing)", "unknown attention 'nothing'"),
    ("reversible(tropical(beta=-1))", "beta"),
    ("tropical(standard)", "tropical is not a wrapper"),
  ],
)
def test_bad_options_are_refused_with_a_reason_and_a_way_out(attention, part):
  with pytest.raises(UserError) as caught:
    resolve(config(attention))
  problem = caught.value.problems[0]
  assert part in problem.error and problem.fix


def test_what_does_not_fit_the_model_is_refused_before_compilation():
  odd = config("standard", n_head=1, n_kv_head=1)
  for fields, part in (
    ({"attention": "reversible(streams=half)"}, "streams=half needs even"),
    ({"attention": "reversible", "remat": "full"}, "remat=full"),
    ({"attention": "reversible(mode=symplectic)", "mlp": "gelu"}, "mlp=gelu has no effect"),
  ):
    assert part in model_problems(dataclasses.replace(odd, **fields))[0].error
  assert not model_problems(dataclasses.replace(odd, attention="reversible(backward=autodiff)", remat="none"))


def test_options_are_written_back_around_the_wrapped_item():
  cfg = config("reversible(tropical(beta=8), mix=givens),standard")
  options = [dataclasses.replace(resolve(cfg)[0].options, beta="4"), resolve(cfg)[1].options]
  changed = with_options(cfg, options)
  assert changed.attention == "reversible(tropical(beta=4), mix=givens),standard"
  assert resolve(changed)[0].wrap == Options(mix="givens")


def test_equal_wrappers_form_one_stack_and_others_do_not():
  spans = lambda attention, n: [span for _, span in stack.segments(config(attention, n))]
  assert spans("reversible(tropical),reversible,standard,standard", 4) == [slice(0, 2), slice(2, 3)]
  assert spans("reversible,reversible(mix=givens)", 2) == [slice(0, 1), slice(1, 2)]


def test_a_stack_of_three_mechanisms_is_recovered_and_has_the_gradient_of_autodiff(key):
  items = ("tropical", "standard", "braid")
  stacked = lambda backward: ",".join(f"reversible({item}, state=float32, backward={backward})" for item in items)
  cfg = config(stacked("reconstruct"), n_layer=6)
  exact = config(",".join(f"reversible({item})" for item in items), n_layer=6)
  params, batch = conformance.noisy_params(key, cfg), batch_of(cfg, key)
  _, gradient = loss_and_gradient(params, batch, cfg)
  _, wanted = loss_and_gradient(params, batch, dataclasses.replace(cfg, attention=stacked("autodiff")))
  assert relative_difference(gradient, wanted) < 5e-5
  assert missed(params, batch["tokens"], exact) == (0, 0)
