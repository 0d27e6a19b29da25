"""Reversible stacks: forward, decoding, and a backward pass that reconstructs the inputs of each layer.

A layer is a sequence of couplings, x_target <- x_target + f(x_source), and then an orthogonal map of the channels of
both streams. Read backwards, each coupling needs f once: the primal output of `jax.vjp` is the very number to subtract,
and its pull-back gives the cotangents of the source and of the parameters (Gomez et al., 2017, arXiv 1707.04585).
Nothing of size L·B·T·C is stored; the executed work is that of two forward passes and one backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import mixers
from mgr_jax.algebra.fixed_point import add, from_fixed, subtract, to_fixed, with_gradient_of
from mgr_jax.attention import Context
from mgr_jax.params import ParamSpec

Aux = dict[str, jax.Array]


class Coupling(NamedTuple):
  """One half of a layer, x_target <- x_target + f(x_source) with source = 1 - target.

  Attributes:
    target: 0 or 1.
    apply: `(layer_params, x_BTw, ctx) -> (y_BTw, aux)`, y in the dtype of x; `aux` holds small arrays only.
    init_state: `(batch, max_len) -> state`, `()` when f looks at one token at a time.
    step: `(layer_params, x_Btw, state, ctx) -> (y_Btw, state)`.
  """

  target: int
  apply: Callable[..., tuple[jax.Array, Aux]]
  init_state: Callable[[int, int], Any]
  step: Callable[..., tuple[jax.Array, Any]]


class Stage(NamedTuple):
  """`n_layer` layers of the same couplings, starting at layer `first`; `params` are stacked over them unless tied."""

  couplings: tuple[Coupling, ...]
  first: int
  n_layer: int


class Stream(NamedTuple):
  """x1 or x2: the integer that is exact, and a float that carries derivatives. In floating point only the latter."""

  exact: jax.Array | None
  value: jax.Array


def enter(x_BTC: jax.Array, opts) -> tuple[Stream, Stream]:
  """The streams that a stack starts from: twice the input, or its two halves."""
  x = x_BTC.astype(jnp.promote_types(x_BTC.dtype, jnp.float32))
  halves = (x, x) if opts.streams == "full" else jnp.split(x, 2, axis=-1)
  return tuple(Stream(to_fixed(h, opts.frac_bits) if opts.state == "fixed32" else None, h) for h in halves)


def _leave(streams, opts, dtype) -> jax.Array:
  first, second = (_read(s, opts) for s in streams)
  merged = (first + second) / 2 if opts.streams == "full" else jnp.concatenate([first, second], -1)
  return merged.astype(dtype)


def _enter_transposed(cotangents, opts) -> jax.Array:
  return sum(cotangents) if opts.streams == "full" else jnp.concatenate(cotangents, -1)


def _leave_transposed(cotangent, opts):
  if opts.streams == "full":
    return (cotangent / 2, cotangent / 2)
  return tuple(jnp.split(cotangent, 2, axis=-1))


def _read(stream: Stream, opts) -> jax.Array:
  """The exact value with the derivative of the carrier."""
  if stream.exact is None:
    return stream.value
  exact = from_fixed(stream.exact, opts.frac_bits, stream.value.dtype)
  if opts.backward == "reconstruct":
    return with_gradient_of(exact, stream.value)
  # Exact as well, since the bracket is zero. Differentiating a scan drops custom_jvp rules before a second derivative.
  return exact + (stream.value - jax.lax.stop_gradient(stream.value))


def _add(stream: Stream, y: jax.Array, opts) -> Stream:
  exact = None if stream.exact is None else add(stream.exact, to_fixed(y, opts.frac_bits))
  return Stream(exact, stream.value + y)


def _subtract(stream: Stream, y: jax.Array, opts) -> Stream:
  exact = None if stream.exact is None else subtract(stream.exact, to_fixed(y, opts.frac_bits))
  return Stream(exact, stream.value - y)


def _replaced(pair, at: int, item):
  return (item, pair[1]) if at == 0 else (pair[0], item)


def mix_specs(width: int, opts) -> dict[str, ParamSpec]:
  """Parameters of the channel map of one layer, identity at the start; the same map turns both streams."""
  if opts.mix == "givens":
    return {"angle": ParamSpec((width // 2,), ("embed",), role="scalar", init="zeros")}
  if opts.mix == "cayley":
    shape, axes = (width, opts.mix_rank), ("embed", None)
    return {
      "u": ParamSpec(shape, axes, role="scalar", init="normal", std=width**-0.5),
      "v": ParamSpec(shape, axes, role="scalar", init="zeros"),
    }
  return {}


def _mix_constants(params, stage: Stage, opts):
  """What forward and inverse must share bit for bit: lifting coefficients, and the pairs of every layer; or `None`."""
  if opts.mix != "givens":
    return None
  angle = params["mix"]["angle"]
  width = 2 * angle.shape[-1]
  pairs = np.stack([mixers.pairing(width, stage.first + i) for i in range(stage.n_layer)])
  coefficients = mixers.lifting(mixers.bounded_angle(angle))
  return jax.tree.map(lambda c: jnp.broadcast_to(c, (stage.n_layer, width // 2)), coefficients), pairs


def _mix_real(params, x, constants, opts):
  """The channel map in floating point; the integer form has its derivative."""
  if opts.mix == "givens":
    return mixers.givens(x, mixers.bounded_angle(params["mix"]["angle"]).astype(x.dtype), constants[1])
  return mixers.cayley(x, params["mix"]["u"].astype(x.dtype), params["mix"]["v"].astype(x.dtype))


def _mix(params, stream: Stream, constants, opts) -> Stream:
  if opts.mix == "none":
    return stream
  exact = None if stream.exact is None else mixers.givens_fixed(stream.exact, *constants)
  return Stream(exact, _mix_real(params, _read(stream, opts), constants, opts))


def _unmix(params, stream: Stream, constants, opts) -> Stream:
  y = _read(stream, opts)
  if opts.mix == "givens":
    exact = None if stream.exact is None else mixers.givens_fixed_inverse(stream.exact, *constants)
    return Stream(exact, mixers.givens(y, -mixers.bounded_angle(params["mix"]["angle"]).astype(y.dtype), constants[1]))
  return Stream(None, mixers.cayley_inverse(y, params["mix"]["u"].astype(y.dtype), params["mix"]["v"].astype(y.dtype)))


def _layer(stage: Stage, params, streams, constants, ctx: Context, opts):
  """One layer forwards: (streams, aux)."""
  aux = {}
  for coupling in stage.couplings:
    y, found = coupling.apply(params, _read(streams[1 - coupling.target], opts), ctx)
    streams = _replaced(streams, coupling.target, _add(streams[coupling.target], y, opts))
    aux |= found
  streams = tuple(_mix(params, s, constants, opts) for s in streams)
  return streams, aux | (_diagnostics(streams, opts) if ctx.probe else {})


def _diagnostics(streams, opts) -> Aux:
  x1, x2 = (jax.lax.stop_gradient(_read(s, opts)) for s in streams)
  rms = lambda x: jnp.sqrt(jnp.mean(x * x))
  found = {
    "stream_cos": jnp.mean(x1 * x2) / jnp.maximum(rms(x1) * rms(x2), 1e-30),
    "stream_rms_1": rms(x1),
    "stream_rms_2": rms(x2),
  }
  if opts.state == "fixed32":
    found["range_use"] = jnp.maximum(jnp.max(jnp.abs(x1)), jnp.max(jnp.abs(x2))) * 2.0 ** (opts.frac_bits - 31)
  return {f"reversible/{name}": value for name, value in found.items()}


def _unlayer(stage: Stage, params, streams, cotangents, constants, floats, rebuild, aux_cotangent, opts):
  """One layer backwards: its inputs, their cotangents, and those of the parameters and of the context's floats."""
  d_params, d_floats = jax.tree.map(jnp.zeros_like, (params, floats))
  plus = lambda total, new: jax.tree.map(jnp.add, total, new)
  if opts.mix != "none":
    streams = tuple(_unmix(params, s, constants, opts) for s in streams)
    for at in (0, 1):
      real = lambda p, x: _mix_real(p, x, constants, opts)
      _, pull = jax.vjp(real, params, _read(streams[at], opts))
      d, dx = pull(cotangents[at])
      d_params, cotangents = plus(d_params, d), _replaced(cotangents, at, dx)
  for coupling in reversed(stage.couplings):
    target, source = coupling.target, 1 - coupling.target
    f = lambda p, x, fl, coupling=coupling: coupling.apply(p, x, rebuild(fl))
    (y, aux), pull = jax.vjp(f, params, _read(streams[source], opts), floats)
    streams = _replaced(streams, target, _subtract(streams[target], y, opts))
    d, dx, dfl = pull((cotangents[target], {name: aux_cotangent[name] for name in aux}))
    d_params, d_floats = plus(d_params, d), plus(d_floats, dfl)
    cotangents = _replaced(cotangents, source, cotangents[source] + dx)
  return streams, cotangents, d_params, d_floats


def _is_tied(stage: Stage, params) -> bool:
  """Whether one layer's parameters serve the whole stage."""
  return jax.tree.leaves(params)[0].shape[0] != stage.n_layer


def _run_stage(stage: Stage, params, streams, constants, ctx: Context, opts, remat: bool, unroll: int):
  """All layers of a stage: (streams, aux stacked over layers)."""
  tied = _is_tied(stage, params)

  def body(streams, xs):
    layer_params, layer_constants = xs
    layer_params = jax.tree.map(lambda p: p[0], params) if tied else layer_params
    return _layer(stage, layer_params, streams, layer_constants, ctx, opts)

  body = jax.checkpoint(body, prevent_cse=False) if remat else body
  xs = (None if tied else params, constants)
  return jax.lax.scan(body, streams, xs, length=stage.n_layer, unroll=min(unroll, stage.n_layer))


def _unrun_stage(stage: Stage, params, streams, cotangents, constants, floats, rebuild, aux_cotangents, opts):
  """All layers of a stage backwards: (streams, cotangents, d_params, d_floats)."""
  tied = _is_tied(stage, params)

  def body(carry, xs):
    streams, cotangents, d_shared, d_floats = carry
    layer_params, layer_constants, aux_cotangent = xs
    layer_params = jax.tree.map(lambda p: p[0], params) if tied else layer_params
    streams, cotangents, d, dfl = _unlayer(
      stage, layer_params, streams, cotangents, layer_constants, floats, rebuild, aux_cotangent, opts
    )
    d_floats = jax.tree.map(jnp.add, d_floats, dfl)
    if tied:
      return (streams, cotangents, jax.tree.map(jnp.add, d_shared, d), d_floats), None
    return (streams, cotangents, None, d_floats), d

  zeros = jax.tree.map(jnp.zeros_like, floats)
  d_shared = jax.tree.map(lambda p: jnp.zeros_like(p[0]), params) if tied else None
  xs = (None if tied else params, constants, aux_cotangents)
  carry, d = jax.lax.scan(body, (streams, cotangents, d_shared, zeros), xs, length=stage.n_layer, reverse=True)
  streams, cotangents, d_shared, d_floats = carry
  return streams, cotangents, jax.tree.map(lambda p: p[None], d_shared) if tied else d, d_floats


def _run(stages, params, x_BTC, constants, ctx, opts, unroll: int):
  """All stages forwards: (streams, one aux per stage)."""
  streams, auxes = enter(x_BTC, opts), []
  for stage, p, c in zip(stages, params, constants, strict=True):
    streams, aux = _run_stage(stage, p, streams, c, ctx, opts, opts.backward == "remat", unroll)
    auxes.append(aux)
  return streams, auxes


def forward(stages: Sequence[Stage], params, x_BTC: jax.Array, ctx: Context, opts, unroll: int = 1):
  """Applies a reversible stack.

  Args:
    stages: runs of layers; nothing is stored between them.
    params: one tree per stage, leaves stacked over its layers (or of length 1 when tied), with `mix` from `mix_specs`.
    ctx: float arrays in it receive their cotangents, summed over layers.
    opts: `attention.reversible.Options`.
    unroll: layers per iteration of the forward scan.

  Returns:
    (y_BTC, one aux dict per stage, stacked over its layers). `ctx.shared["witness"]`, float32 [2], if there, changes
    nothing, and its gradient is what the backward pass of this very step failed to reconstruct: the number of differing
    integers (or floats) of the input, and their largest deviation.
  """
  constants = [_mix_constants(p, stage, opts) for stage, p in zip(stages, params, strict=True)]
  if opts.backward != "reconstruct":
    streams, auxes = _run(stages, params, x_BTC, constants, ctx, opts, unroll)
    return _leave(streams, opts, x_BTC.dtype), auxes

  floats, ints, tree, kinds = _split(ctx)
  # Constants are residuals, not inputs: their gradient reaches the angles through the floating-point form.
  constants = jax.lax.stop_gradient(constants)

  @jax.custom_vjp
  def apply(params, x, floats, ints, constants):
    streams, auxes = _run(stages, params, x, constants, _join(floats, ints, tree, kinds), opts, unroll)
    return _leave(streams, opts, x.dtype), auxes

  def apply_forward(params, x, floats, ints, constants):
    ctx = _join(floats, ints, tree, kinds)
    streams, auxes = _run([_by_rule(stage) for stage in stages], params, x, constants, ctx, opts, unroll)
    witnessed = x if "witness" in ctx.shared else None
    residuals = (params, streams, floats, ints, constants, witnessed)
    return (_leave(streams, opts, x.dtype), auxes), residuals

  def apply_backward(residuals, cotangent):
    params, streams, floats, ints, constants, witnessed = residuals
    dy, d_auxes = cotangent
    cotangents = _leave_transposed(dy.astype(streams[0].value.dtype), opts)
    rebuild = lambda floats: _join(floats, ints, tree, kinds)
    d_params, d_floats = [], jax.tree.map(jnp.zeros_like, floats)
    for stage, p, c, d_aux in reversed(list(zip(stages, params, constants, d_auxes, strict=True))):
      streams, cotangents, d, dfl = _unrun_stage(stage, p, streams, cotangents, c, floats, rebuild, d_aux, opts)
      d_params.insert(0, d)
      d_floats = jax.tree.map(jnp.add, d_floats, dfl)
    if witnessed is not None:
      d_ctx = rebuild(d_floats)
      missed = _mismatch(streams, enter(witnessed, opts), opts)
      d_floats = _split(d_ctx.replace(shared=d_ctx.shared | {"witness": missed}))[0]
    nothing = jax.tree.map(lambda _: None, (ints, constants))
    return tuple(d_params), _enter_transposed(cotangents, opts).astype(dy.dtype), d_floats, *nothing

  apply.defvjp(apply_forward, apply_backward)
  return apply(tuple(params), x_BTC, floats, ints, constants)


def advance(stages: Sequence[Stage], params, streams, ctx: Context, opts):
  """The bijection itself, from streams to streams, without gradient of its own."""
  for stage, p in zip(stages, params, strict=True):
    streams, _ = _run_stage(stage, p, streams, _mix_constants(p, stage, opts), ctx, opts, False, 1)
  return streams


def retreat(stages: Sequence[Stage], params, streams, ctx: Context, opts):
  """The inverse of `advance`: bit for bit in fixed point, up to rounding in float32."""
  for stage, p in reversed(list(zip(stages, params, strict=True))):
    tied = _is_tied(stage, p)

    def body(streams, xs, stage=stage, p=p, tied=tied):
      layer_params, constants = xs
      layer_params = jax.tree.map(lambda a: a[0], p) if tied else layer_params
      if opts.mix != "none":
        streams = tuple(_unmix(layer_params, s, constants, opts) for s in streams)
      for coupling in reversed(stage.couplings):
        y, _ = coupling.apply(layer_params, _read(streams[1 - coupling.target], opts), ctx)
        streams = _replaced(streams, coupling.target, _subtract(streams[coupling.target], y, opts))
      return streams, None

    xs = (None if tied else p, _mix_constants(p, stage, opts))
    streams, _ = jax.lax.scan(body, streams, xs, length=stage.n_layer, reverse=True)
  return streams


def _by_rule(stage: Stage) -> Stage:
  """The same stage, each f evaluated as its own differentiation rule does it.

  That is how the backward pass evaluates it, and it lets `jax.jvp` see through mechanisms with a `custom_vjp`, so that
  Hessian-vector products work.
  """

  def by_rule(coupling: Coupling) -> Coupling:
    return coupling._replace(apply=lambda params, x, ctx: jax.vjp(lambda *a: coupling.apply(*a, ctx), params, x)[0])

  return stage._replace(couplings=tuple(map(by_rule, stage.couplings)))


def _mismatch(streams, wanted, opts) -> jax.Array:
  exact = lambda s: s.value if s.exact is None else s.exact
  words = sum(jnp.sum(exact(a) != exact(b)) for a, b in zip(streams, wanted, strict=True))
  worst = [jnp.max(jnp.abs(_read(a, opts) - _read(b, opts))) for a, b in zip(streams, wanted, strict=True)]
  return jnp.stack([words.astype(jnp.float32), jnp.maximum(*worst).astype(jnp.float32)])


def _split(ctx: Context):
  """The floats of a context, everything else, and what `_join` needs."""
  leaves, tree = jax.tree.flatten(ctx)
  kinds = tuple(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves)
  pick = lambda kind: [leaf for leaf, k in zip(leaves, kinds, strict=True) if k == kind]
  return pick(True), pick(False), tree, kinds


def _join(floats, ints, tree, kinds) -> Context:
  queues = {True: iter(floats), False: iter(ints)}
  return jax.tree.unflatten(tree, [next(queues[kind]) for kind in kinds])


def init_state(stages: Sequence[Stage], batch: int, max_len: int):
  """Per stage, one state per coupling, stacked over layers."""

  def stacked(stage: Stage):
    states = tuple(coupling.init_state(batch, max_len) for coupling in stage.couplings)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (stage.n_layer, *a.shape)), states)

  return tuple(stacked(stage) for stage in stages)


def step(stages: Sequence[Stage], params, x_BtC: jax.Array, states, ctx: Context, opts, unroll: int = 1):
  """`forward` at t >= 1 new tokens: (y_BtC, states). The same integer updates, with each coupling's own `step`."""
  streams, new_states = enter(x_BtC, opts), []
  for stage, p, state in zip(stages, params, states, strict=True):
    tied = _is_tied(stage, p)

    def body(streams, xs, stage=stage, p=p, tied=tied):
      layer_params, constants, layer_state = xs
      layer_params = jax.tree.map(lambda a: a[0], p) if tied else layer_params
      after = []
      for coupling, s in zip(stage.couplings, layer_state, strict=True):
        y, s = coupling.step(layer_params, _read(streams[1 - coupling.target], opts), s, ctx)
        streams = _replaced(streams, coupling.target, _add(streams[coupling.target], y, opts))
        after.append(s)
      return tuple(_mix(layer_params, s, constants, opts) for s in streams), tuple(after)

    xs = (None if tied else p, _mix_constants(p, stage, opts), state)
    streams, state = jax.lax.scan(body, streams, xs, length=stage.n_layer, unroll=min(unroll, stage.n_layer))
    new_states.append(state)
  return _leave(streams, opts, x_BtC.dtype), tuple(new_states)
