"""Products of the Hessian and the Gauss-Newton matrix: symmetry, agreement of the modes, definition, curvature."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.attention import attention_names
from mgr_jax.config import GPTConfig
from mgr_jax.model import curvature, gpt
from mgr_jax.params import leaf_names

CFG = GPTConfig(vocab_size=32, seq_len=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, loss_chunk=3)


def noise(seed: int, params, scale: float = 1.0):
  """A tree of normal numbers."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: np.float32(scale * rng.standard_normal(p.shape)), params)


def make(cfg):
  """Parameters away from their zeros, and a batch whose tokens do not all count alike."""
  params = gpt.init(jax.random.key(0), cfg)
  params = jax.tree.map(jnp.add, params, noise(0, params, 0.1))
  tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, cfg.seq_len + 1)).astype(np.int32)
  weights = np.float32(np.arange(2 * cfg.seq_len).reshape(2, -1) % 3)
  return params, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def dot(a, b) -> float:
  return float(sum(np.vdot(np.float64(x), np.float64(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)))


def relative(a, b) -> float:
  difference = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)
  return (dot(difference, difference) / dot(b, b)) ** 0.5


@pytest.mark.parametrize("attention", attention_names())
def test_products_are_symmetric_and_the_modes_agree(attention):
  cfg = dataclasses.replace(CFG, attention=attention)
  params, batch = make(cfg)
  u, v = noise(2, params), noise(3, params)

  @jax.jit
  def products(params, u, v):
    found = {mode: curvature.hessian(params, batch, cfg, mode=mode)(v) for mode in curvature.MODES}
    hessian, ggn = (curvature.product(kind, params, batch, cfg) for kind in ("hessian", "ggn"))
    return found, hessian(u), ggn(u), ggn(v)

  modes, hessian_u, ggn_u, ggn_v = products(params, u, v)
  size = lambda x: dot(x, x) ** 0.5
  hessian_v = modes["jvp"]
  assert relative(modes["linearize"], hessian_v) < 1e-5
  assert relative(modes["reverse"], hessian_v) < 1e-5
  for name, a, b in (("hessian", hessian_u, hessian_v), ("ggn", ggn_u, ggn_v)):
    scale = size(a) * size(v)
    assert abs(dot(v, a) - dot(u, b)) < 1e-5 * scale, name
    assert abs(dot(u, a) - dot(u, b)) > 1e-3 * scale, "another vector's product passes the same check"
  assert dot(v, ggn_v) > 0
  assert relative(ggn_v, hessian_v) > 1e-3, "the two matrices differ"


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gauss_newton_is_the_variance_of_the_logits_tangent(softcap):
  """vᵀGv = Σ_n w_n Var_{p_n}(J_n v), with J·v by central differences in float64."""
  cfg = dataclasses.replace(CFG, attention="standard(impl=reference)", logit_softcap=softcap)
  params, batch = make(cfg)
  v = noise(4, params)
  with jax.enable_x64(True):
    wide = dataclasses.replace(cfg, compute_dtype="float32")
    step = 1e-3
    logits = jax.jit(lambda p: gpt.forward(p, batch["tokens"], wide)[0])
    at = lambda s: np.float64(logits(jax.tree.map(lambda p, x: jnp.float64(p) + s * x, params, v)))
    tangent, z = (at(step) - at(-step)) / (2 * step), at(0.0)
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  variance = (p * tangent**2).sum(-1) - (p * tangent).sum(-1) ** 2
  weights = np.float64(batch["weights"]) / batch["weights"].sum()
  product = jax.jit(lambda p, v: curvature.gauss_newton(p, batch, cfg)(v))(params, v)
  assert dot(v, product) == pytest.approx((weights * variance).sum(), rel=2e-3)
  assert dot(v, product) != pytest.approx(variance.mean(), rel=2e-2), "equal weights give another number"


def test_hessian_is_the_derivative_of_the_gradient():
  cfg = dataclasses.replace(CFG, mlp="gelu")  # twice differentiable
  params, batch = make(cfg)
  v = noise(5, params)
  gradient = jax.jit(jax.grad(lambda p: gpt.loss(p, batch, cfg)[0]))
  step = 3e-3
  ends = [gradient(jax.tree.map(lambda p, x, s=s: p + s * x, params, v)) for s in (step, -step)]
  want = jax.tree.map(lambda a, b: (a - b) / (2 * step), *ends)
  got = jax.jit(lambda p, v: curvature.hessian(p, batch, cfg)(v))(params, v)
  assert relative(got, want) < 5e-3
  assert relative(jax.jit(lambda p, v: curvature.gauss_newton(p, batch, cfg)(v))(params, v), want) > 5e-2


def test_padded_vocabulary_and_unused_rows_have_no_curvature():
  params, batch = make(CFG)
  product = jax.jit(lambda p, v: curvature.gauss_newton(p, batch, CFG)(v))(params, noise(6, params))
  named = dict(zip(leaf_names(product), jax.tree.leaves(product), strict=True))
  assert not np.any(np.asarray(named["head"][:, CFG.vocab_size :]))
  unused = np.setdiff1d(np.arange(CFG.vocab_size), batch["tokens"])
  assert len(unused) > 0
  assert not np.any(np.asarray(named["embed"][unused]))
  assert np.any(np.asarray(named["embed"][batch["tokens"][0, 0]]))


def test_unknown_mode():
  params, batch = make(CFG)
  with pytest.raises(ValueError, match="mode='forward' is not one of"):
    curvature.hessian(params, batch, CFG, mode="forward")
