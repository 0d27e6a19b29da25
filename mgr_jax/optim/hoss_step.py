"""One higher-order shadow step: gradient flow, or its noisy version, run for a finite time on a frozen quadratic model.

It is solved exactly in the Krylov space of the gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mgr_jax.optim import hoss_noise
from mgr_jax.optim import hoss_spectrum as macro
from mgr_jax.optim.lanczos import combine, lanczos

NOISES = ("none", "krylov", "krylov+tail", "full", "minibatch")
METRICS = ("none", "adam")
DELTA_POLICIES = ("fixed", "krylov_cap", "lm")
# `lm` keeps the macro time within this factor of its start, so that it can neither die nor overflow.
DELTA_RANGE = 1e6
# Steps between two estimates of the trace of the curvature, for `krylov+tail`.
TRACE_EVERY = 50


class HossDiag(NamedTuple):
  """What one step saw. Scalars unless stated, in the metric where there is one; see `hoss_spectrum`.

  Args:
    ritz: [r], eigenvalues of the curvature in the Krylov space, before any treatment of negative ones; 0 beyond it.
    active: int32, dimension of the Krylov space.
    residual: estimated error of the mean step over that of a gradient step; above 0.1 the rank is too small for delta.
    pred_decrease: decrease of the frozen model by the mean step.
    step_norm: norm of the mean step.
    cos_grad: cosine between the mean step and -g.
    delta_used: macro time after the schedule and step control.
    neg_mass: share of |g|² along negative curvature.
    krylov_time: delta_used · max|ritz|; gradient descent covers that time in half as many stable steps, at best.
    ratio: actual over predicted decrease; 0 unless the policy is `lm`.
  """

  ritz: jax.Array
  active: jax.Array
  residual: jax.Array
  pred_decrease: jax.Array
  step_norm: jax.Array
  cos_grad: jax.Array
  delta_used: jax.Array
  neg_mass: jax.Array
  krylov_time: jax.Array
  ratio: jax.Array


class HossState(NamedTuple):
  """State of `scale_by_hoss`; no key is in it, the noise of a step is a function of the key that `update` is given.

  Args:
    count: int32, updates so far.
    delta: macro time; changes under `lm` only.
    nu: second moments of the gradient, None without metric.
    trace: last estimate of the trace of the curvature, 0 unless the noise is `krylov+tail`.
    diag: `HossDiag` of the last step.
  """

  count: jax.Array
  delta: jax.Array
  nu: Any
  trace: jax.Array
  diag: HossDiag


def scale_by_hoss(
  delta: float,
  *,
  rank: int = 8,
  neg: str = "abs",
  noise: str = "none",
  temperature: float = 0.0,
  metric: str = "none",
  trust_radius: float = 0.0,
  delta_policy: str = "fixed",
  reorth: int = 2,
  breakdown_tol: float = 1e-5,
  weight_decay: float = 0.0,
  decay_mask=None,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
  """One exact step of time δ of dw = -(H·w + g) dt + √τ dB, w(0) = 0, with gradient g and curvature H frozen.

      mean -Φ_δ(H)·g,  covariance τ·Ψ_δ(H);  Φ_δ(l) = (1 - e^{-δl})/l,  Ψ_δ(l) = (1 - e^{-2δl})/(2l)

  in the Krylov space of (H, g) of dimension `rank`. δ -> 0 is gradient descent with rate δ, δ -> inf a Newton step. On
  a quadratic, steps of δ_1 and δ_2 make one of δ_1 + δ_2. For other losses the mean is the exponential Rosenbrock-Euler
  method, error O(δ³) against gradient flow (Hochbruck & Ostermann, 2010, Acta Numerica 19). One percent of accuracy on
  a broad spectrum takes δ·l_max <= (rank/1.7)²: there it advances no further per gradient than gradient descent does.
  It pays when few eigenvalues stand out, or when products are cheaper than gradients.

  Args:
    delta: macro time; the schedule's `scale` multiplies it, since a rescaled update would not be a flow.
    rank: r, curvature products per step.
    neg: treatment of negative curvature, see `hoss_spectrum.transformed`; the same for mean and noise.
    noise: `none`; `krylov`, inside the Krylov space only; `krylov+tail`, isotropic outside of it; `full`, by a second
      Krylov space, exact for large rank; `minibatch`, with the covariance of the per-example gradients in place of I.
    temperature: τ, positive exactly when there is noise. Gradient noise of micro-steps η on batches of b is η/b.
    metric: `adam` works in y = D^{1/2}·w, D = sqrt(nu/(1 - b2^t)) + eps, on D·dw = -(H·w + g) dt + √τ D^{1/2} dB.
    trust_radius: largest norm of the mean, kept by shortening δ; 0 for none.
    delta_policy: `fixed`; `krylov_cap`, δ at most what `rank` resolves; `lm`, δ·1.5 (·0.5) when the loss falls by more
      than 3/4 (less than 1/4) of the prediction, no step when it rises.
    reorth, breakdown_tol: see `lanczos`.
    weight_decay: λ; the loss becomes F + λ|w|²/2, in gradient and curvature.
    decay_mask: tree of bools like the parameters; None decays all.
    b2, eps: of the metric.

  Returns:
    A transformation whose update is the step itself, in the parameters' dtype. Extra arguments of `update`: `hvp_fn`,
    v -> H·v; `scale`; `key` with noise; `value` and `loss_fn`, params -> loss on the same batch, for `lm`;
    `example_jvp_fn`, v -> [b] derivatives of the per-example losses along v, for `minibatch`. Their trees are like
    `params`. A leaf whose gradient and products are zero is left exactly alone by the mean. State: three scalars and
    diagnostics, with a metric one copy of the parameters. Cost: see `hoss.hoss_cost`; r + 2 copies of the parameters.

  Raises:
    ValueError: naming the settings out of range; in `init`, for leaves that are not floating point and a rank above the
      number of scalars; in `update`, for a missing argument.
  """
  _check(locals())

  def init(params) -> HossState:
    leaves = jax.tree.leaves(params)
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
      raise ValueError(f"parameters have dtypes {sorted({str(x.dtype) for x in leaves})}; all must be floating point")
    if rank > sum(x.size for x in leaves):
      raise ValueError(f"rank={rank} exceeds the number of scalars, {sum(x.size for x in leaves)}")
    zero = jnp.zeros((), float)
    diag = HossDiag(*[zero] * len(HossDiag._fields))._replace(ritz=jnp.zeros(rank, float), active=jnp.int32(0))
    nu = jax.tree.map(lambda x: jnp.zeros_like(_float(x)), params) if metric == "adam" else None
    return HossState(jnp.int32(0), jnp.asarray(delta, float), nu, zero, diag)

  def update(
    grads,
    state: HossState,
    params=None,
    *,
    hvp_fn: Callable | None = None,
    scale=1.0,
    key=None,
    value=None,
    loss_fn: Callable | None = None,
    example_jvp_fn: Callable | None = None,
    **extra_args,
  ):
    del extra_args
    needed = {"hvp_fn": hvp_fn}
    needed |= {"params": params} if weight_decay or delta_policy == "lm" else {}
    needed |= {"key": key} if noise != "none" else {}
    needed |= {"value": value, "loss_fn": loss_fn} if delta_policy == "lm" else {}
    needed |= {"example_jvp_fn": example_jvp_fn} if noise == "minibatch" else {}
    if missing := [name for name, given in needed.items() if given is None]:
      raise ValueError(f"update of hoss needs {', '.join(missing)}")

    like = grads if params is None else params
    as_given = lambda v: jax.tree.map(lambda x, p: x.astype(p.dtype), v, like)
    mask = jax.tree.map(lambda x: True, like) if decay_mask is None else decay_mask
    decayed = lambda v, w: jax.tree.map(lambda x, y, m: x + weight_decay * y if m and weight_decay else x, v, w, mask)
    grads = jax.tree.map(_float, grads)
    nu, to_w = _metric(state, grads, b2, eps) if metric == "adam" else (None, lambda v: v)

    def product(v):
      w = to_w(v)
      return to_w(decayed(jax.tree.map(_float, hvp_fn(as_given(w))), w))

    g = grads if params is None else decayed(grads, jax.tree.map(_float, params))
    krylov = lanczos(product, to_w(g), rank, reorth=reorth, breakdown_tol=breakdown_tol)
    s = macro.spectrum(krylov)
    time = state.delta * scale
    if delta_policy == "krylov_cap":
      time = macro.resolved_time(s, time)
    if trust_radius:
      time = macro.trusted_time(s, time, neg, trust_radius)
    mean = macro.mean_coefficients(s, time, neg)

    coefficients, outside, trace = mean, None, state.trace
    if noise != "none":
      draw_key, trace_key = jax.random.split(key)
      law = s, time, neg, temperature
      if noise == "krylov":
        drawn = hoss_noise.krylov_noise(draw_key, *law)
      elif noise == "krylov+tail":
        estimate = lambda: hoss_noise.hutchinson_trace(trace_key, product, g).astype(trace.dtype)
        trace = jax.lax.cond(state.count % TRACE_EVERY == 0, estimate, lambda: state.trace)
        drawn, outside = hoss_noise.tail_noise(draw_key, krylov, *law, trace)
      elif noise == "full":
        settings = {"reorth": reorth, "breakdown_tol": breakdown_tol}
        drawn, outside = 0.0, hoss_noise.full_noise(draw_key, product, g, *law[1:], rank, **settings)
      else:
        slopes_rb = jax.lax.map(lambda q: example_jvp_fn(as_given(to_w(q))), krylov.basis)
        drawn = hoss_noise.minibatch_noise(draw_key, slopes_rb, *law)
      coefficients = mean + drawn
    step = combine(krylov.basis, coefficients)
    step = to_w(step if outside is None else jax.tree.map(jnp.add, step, outside))

    predicted = macro.decrease(s, time, neg)
    ratio, new_delta = jnp.zeros_like(predicted), state.delta
    if delta_policy == "lm":
      mean_step = step if noise == "none" else to_w(combine(krylov.basis, mean))
      moved = jax.tree.map(jnp.add, params, as_given(mean_step))
      penalty = lambda w: _penalty(weight_decay, mask, w)
      ratio = _ratio(value + penalty(params), loss_fn(moved) + penalty(moved), predicted)
      step = jax.tree.map(lambda x: jnp.where(ratio >= 0, x, 0), step)
      factor = jnp.where(ratio > 0.75, 1.5, jnp.where(ratio >= 0.25, 1.0, 0.5))
      new_delta = jnp.clip(state.delta * factor, delta / DELTA_RANGE, delta * DELTA_RANGE)

    mean_norm = macro.step_norm(s, time, neg)
    diag = HossDiag(
      ritz=s.theta,
      active=jnp.sum(s.active),
      residual=macro.residual(s, time, neg),
      pred_decrease=predicted,
      step_norm=mean_norm,
      cos_grad=-mean[0] / jnp.maximum(mean_norm, jnp.finfo(mean_norm.dtype).tiny),
      delta_used=time,
      neg_mass=macro.negative_mass(s),
      krylov_time=time * jnp.max(jnp.abs(s.theta)),
      ratio=ratio,
    )
    new = HossState(state.count + 1, new_delta, nu, trace, diag)
    return as_given(step), jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, state)

  return optax.GradientTransformationExtraArgs(init, update)


def _float(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _metric(state: HossState, grads, b2: float, eps: float):
  """Second moments after this gradient, and the map y -> D^{-1/2}·y."""
  nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, state.nu, grads)
  debias = 1 - b2 ** (state.count + 1).astype(state.delta.dtype)
  scales = jax.tree.map(lambda n: jax.lax.rsqrt(jnp.sqrt(n / debias) + eps).astype(n.dtype), nu)
  return nu, lambda v: jax.tree.map(jnp.multiply, scales, v)


def _penalty(weight_decay: float, mask, w):
  """λ|w|²/2 over the decayed leaves."""
  squares = jax.tree.map(lambda x, m: jnp.sum(_float(x) ** 2) if m else 0.0, w, mask)
  return 0.5 * weight_decay * sum(jax.tree.leaves(squares)) if weight_decay else 0.0


def _ratio(before, after, predicted):
  """Actual over predicted decrease; 1/2, which changes nothing, where rounding of the loss decides; -1 for NaN."""
  actual = before - after
  visible = predicted > 8 * jnp.finfo(predicted.dtype).eps * jnp.abs(before)
  ratio = jnp.where(visible, actual / jnp.where(visible, predicted, 1), 0.5)
  return jnp.where(jnp.isfinite(actual), ratio, -1.0)


def _check(settings) -> None:
  """Raises `ValueError` with everything out of range in the arguments of `scale_by_hoss`."""
  choices = {"neg": macro.NEGATIVE, "noise": NOISES, "metric": METRICS, "delta_policy": DELTA_POLICIES}
  found = [f"{k}={settings[k]!r} is not one of {known}" for k, known in choices.items() if settings[k] not in known]
  least = {"rank": 1, "reorth": 0, "breakdown_tol": 0, "weight_decay": 0, "trust_radius": 0, "temperature": 0, "b2": 0}
  found += [f"{k}={settings[k]} is below {low}" for k, low in least.items() if not settings[k] >= low]
  found += [f"{k}={settings[k]} is not positive" for k in ("delta", "eps") if not settings[k] > 0]
  found += [f"b2={settings['b2']} is not below 1"] if settings["b2"] >= 1 else []
  if (settings["noise"] != "none") != (settings["temperature"] > 0):
    found.append(f"noise={settings['noise']!r} does not go with temperature={settings['temperature']}")
  if found:
    raise ValueError("; ".join(found))
