"""The program of a whole training step: no T×T arrays, nothing computed ahead, no repeated heads, no host calls."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from mgr_jax.algebra import tropical_matmul
from mgr_jax.attention import attention_names, standard, tiles, tropical_margins, tropical_scan
from mgr_jax.attention.mechanism import Context
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim import make_optimizer
from mgr_jax.schedules import make_schedule
from mgr_jax.step import init_train_state, make_train_step

T, HEADS, HEAD_DIM = 512, 4, 16

FROM_HOST = re.compile("callback|infeed|outfeed|debug_print")
COPIES = ("broadcast_in_dim", "gather", "concatenate", "tile")
REARRANGES = ("reshape", "transpose", "convert_element_type", "squeeze", "slice", "pad", "rev", "optimization_barrier")
# Elementwise operations read a broadcast array in place; these need it in memory.
STORES = ("dot_general", "scan", "while", "cond", "sort", "gather", "pallas_call")


def step_and_inputs(attention):
  """The training step of one layer in which four query heads share one key/value head, and shapes of what it takes."""
  sizes = {"n_layer": 1, "n_head": HEADS, "n_kv_head": 1, "n_embd": HEADS * HEAD_DIM}
  cfg = GPTConfig(vocab_size=97, seq_len=T, attention=attention, **sizes)
  optimizer, schedule = make_optimizer("adamw", gpt.specs(cfg), cfg), make_schedule("constant", 10)
  state = jax.eval_shape(lambda: init_train_state(cfg, optimizer, schedule, 0))
  tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
  return make_train_step(cfg, optimizer, schedule), state, {"tokens": tokens, "targets": tokens}


@functools.cache
def program(attention):
  step, *inputs = step_and_inputs(attention)
  return jax.make_jaxpr(step)(*inputs).jaxpr


def inner(equation):
  """The programs inside an equation: loop bodies, branches, called functions."""
  values = [x for v in equation.params.values() for x in (v if isinstance(v, (tuple, list)) else (v,))]
  return [x for x in (getattr(v, "jaxpr", v) for v in values) if hasattr(x, "eqns")]


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for body in inner(equation):
      yield from equations(body)


def shape(v):
  return getattr(v.aval, "shape", ())


def size(v):
  return math.prod(shape(v))


def squares(jaxpr):
  """Values with two dimensions of T or more, or with as many numbers."""
  results = (v for equation in equations(jaxpr) for v in equation.outvars)
  return {str(v.aval) for v in results if sum(d >= T for d in shape(v)) > 1 or size(v) >= T * T}


def computed_ahead(jaxpr):
  """Results of loops that are many times what goes in: masks or indices of all tiles, or of all tokens, at once."""
  loops = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
  large = lambda e: [v for v in e.outvars if size(v) >= max(T * 128, 6 * sum(map(size, e.invars)))]
  return {str(v.aval) for e in loops for v in large(e)}


def host_calls(jaxpr):
  return {equation.primitive.name for equation in equations(jaxpr) if FROM_HOST.search(equation.primitive.name)}


def repeats(jaxpr):
  """Numbers of all heads that are one head's, copied, where the copies must be in memory."""
  found = set()
  _follow(jaxpr, (), found)
  return found


def _follow(jaxpr, copied, found):
  """Adds to `found`; returns which variables hold copies, rearranged or not. `copied` are those at the start."""
  copied = set(copied)
  for equation in jaxpr.eqns:
    name, bodies = equation.primitive.name, inner(equation)
    hits = [v for v in equation.invars if not hasattr(v, "val") and v in copied]
    if name in STORES:
      found |= {f"{name} {v.aval}" for v in hits}
      for body in bodies:
        _follow(body, (), found)
    elif bodies:
      for body in bodies:
        given = equation.invars[len(equation.invars) - len(body.invars) :]
        entering = [i for i, v in zip(body.invars, given, strict=True) if v in hits]
        leaving = _follow(body, entering, found)
        if len(body.outvars) == len(equation.outvars):
          copied |= {
            v for v, o in zip(equation.outvars, body.outvars, strict=True) if not hasattr(o, "val") and o in leaving
          }
    if name in COPIES and _is_copy(equation):
      copied.add(equation.outvars[0])
    elif name in REARRANGES and hits:
      copied.update(equation.outvars)
  return copied


def _is_copy(equation):
  source, result = equation.invars[0], equation.outvars[0]
  if equation.primitive.name == "concatenate" and any(v is not source for v in equation.invars):
    return False
  whole = max(shape(source), default=0) >= T and size(source) >= T * HEAD_DIM
  return whole and size(result) >= HEADS * size(source) and jnp.issubdtype(source.aval.dtype, jnp.inexact)


TROPICAL = ("score=hilbert", "score=dot,agg=route", "margins=true", "impl=pallas", "impl=pallas,score=hilbert")


@pytest.mark.parametrize("attention", [*attention_names(), *(f"tropical({options})" for options in TROPICAL)])
def test_a_step_holds_nothing_it_need_not_and_never_asks_the_host(attention):
  jaxpr = program(attention)
  assert not squares(jaxpr)
  assert not computed_ahead(jaxpr)
  assert not repeats(jaxpr)
  assert not host_calls(jaxpr)


def test_dense_scores_are_found():
  assert any("512,512" in found for found in squares(program("standard(impl=reference)")))


@pytest.mark.parametrize(
  "repeat",
  [
    lambda k: jnp.repeat(k, HEADS, 2),
    lambda k: jnp.tile(k, (1, 1, HEADS, 1)),
    lambda k: jnp.concatenate([k] * HEADS, 2),
    lambda k: k[:, :, jnp.zeros(HEADS, int)],
    lambda k: jnp.broadcast_to(k, (1, T, HEADS, HEAD_DIM)),
    lambda k: k,
  ],
  ids=["repeat", "tile", "concatenate", "gather", "broadcast", "none"],
)
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_repeated_keys_and_values_are_found(repeat, impl):
  ctx, opts = Context(jnp.arange(T)[None]), standard.Options(impl=impl)
  mix = lambda q, k, v: jnp.sum(standard.mix(q, repeat(k), repeat(v), {}, ctx, None, opts)[0])
  q, k = (jax.ShapeDtypeStruct((1, T, heads, HEAD_DIM), jnp.float32) for heads in (HEADS, 1))
  found = repeats(jax.make_jaxpr(jax.grad(mix, (0, 1, 2)))(q, k, k).jaxpr)
  assert bool(found) == (jax.eval_shape(repeat, k).shape[2] == HEADS)


def test_calls_to_the_host_are_found():
  def noisy(x):
    jax.debug.print("{}", x)
    return jax.lax.map(lambda x: jax.pure_callback(jnp.sin, x, x), x)

  assert len(host_calls(jax.make_jaxpr(jax.jit(noisy))(jnp.zeros(3)).jaxpr)) == 2


@pytest.mark.parametrize("attention", ["standard", "tropical", "tropical(score=hilbert)", "tropical(margins=true)"])
def test_masks_and_indices_computed_ahead_are_found(attention, monkeypatch):
  for module in (tiles, tropical_matmul, tropical_scan, tropical_margins):
    monkeypatch.setattr(module, "tied", lambda numbers, data: numbers)
  assert computed_ahead(program.__wrapped__(attention))


@pytest.mark.parametrize("attention", dict.fromkeys(["standard", "tropical", *attention_names()]))
def test_the_compiled_program_is_as_small(attention):
  step, *inputs = step_and_inputs(attention)
  text = step.lower(*inputs).compile().as_text()
  assert not squares_in(text)
  assert not FROM_HOST.search(text)


def squares_in(text):
  """Shapes in a compiled program with two dimensions of T or more."""
  shapes = set(re.findall(r"\w+\[([\d,]+)\]", text))
  return {s for s in shapes if sum(int(d) >= T for d in s.split(",")) > 1}


def test_squares_and_calls_to_the_host_are_found_in_compiled_programs():
  scores = jax.jit(lambda q, k: jax.nn.softmax(q @ k.T) @ k)
  text = scores.lower(*[jax.ShapeDtypeStruct((T, 8), jnp.float32)] * 2).compile().as_text()
  assert f"{T},{T}" in squares_in(text) and not FROM_HOST.search(text)
  noisy = jax.jit(lambda x: jax.pure_callback(jnp.sin, x, x))
  assert FROM_HOST.search(noisy.lower(jnp.zeros(3)).compile().as_text())
