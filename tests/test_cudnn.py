"""The fused kernel of `standard`: what it refuses, what it is given, and that this is the same attention."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.attention import model_problems, standard, standard_cudnn
from mgr_jax.attention.mechanism import group_heads, ungroup_heads
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.problems import UserError
from train.flags import Settings
from train.loop import run

FIELDS = {"vocab_size": 7, "n_layer": 1, "n_head": 4, "n_kv_head": 1, "n_embd": 64, "attention": "standard(impl=cudnn)"}
T = 21


def qkv(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(jax.random.normal(key, (2, T, heads, 16), dtype) for key, heads in zip(keys, (4, 1, 1), strict=True))


def found(**fields):
  return [p.error for p in model_problems(SimpleNamespace(**(vars(GPTConfig()) | FIELDS | fields)))]


def test_a_configuration_it_cannot_serve_is_refused_with_every_reason():
  assert found(compute_dtype="bfloat16") == []
  assert found(compute_dtype="bfloat16", attention="standard(impl=cudnn,window=7,qk_norm=false)") == []
  errors = found(n_embd=48, doc_mask=True)
  for words in ("not in float32", "head size 12", "packed documents"):
    assert sum(words in error and "impl=cudnn" in error for error in errors) == 1
  assert "head size 264" in found(compute_dtype="bfloat16", n_embd=264 * 4)[0]
  assert found(n_embd=48, doc_mask=True, attention="standard") == []


def device(capability, platform="gpu", version="cuda 12090"):
  client = SimpleNamespace(platform_version=version)
  return SimpleNamespace(platform=platform, device_kind="some device", compute_capability=capability, client=client)


@pytest.mark.parametrize(
  ("of", "head_dim", "said"),
  [
    (device("", "cpu", "cpu"), 64, "NVIDIA GPUs only, and this is some device"),
    (device("9.4", version="rocm 60000"), 64, "NVIDIA GPUs only"),
    (device("7.5"), 64, "needs compute capability 8.0, and this GPU has 7.5"),
    (device("8.9"), 256, "heads up to 128, not 256"),
    (device("8.0"), 128, ""),
    (device("9.0"), 256, ""),
    (device("10.0"), 256, ""),
  ],
)
def test_a_device_it_cannot_use_is_refused(monkeypatch, of, head_dim, said):
  monkeypatch.setattr(jax, "devices", lambda: [of])
  errors = [p.error for p in standard_cudnn.device_problems(head_dim)]
  assert len(errors) == bool(said) and all(said in error for error in errors)


def test_a_call_it_cannot_serve_is_refused(monkeypatch):
  segments = jnp.ones((2, T), jnp.int32)
  monkeypatch.setattr(jax, "devices", lambda: [device("", "cpu", "cpu")])
  with pytest.raises(UserError, match=r"(?s)packed documents.*not in float32.*NVIDIA GPUs only.*impl=tiled"):
    standard_cudnn.attention(*qkv(), segments)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_what_is_asked_for_is_the_reference(window, dtype, tolerance):
  args = qkv(dtype)
  weight = jax.random.normal(jax.random.key(1), args[0].shape)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradient(f, *args):
    objective = lambda *args: (jnp.sum(weight * (out := f(*args))[0].astype(jnp.float32)), out)
    (_, out), gradient = jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(*args)
    return out, gradient

  def reference(window, q, k, v):
    exact = (x.astype(jnp.float32) for x in (group_heads(q, 1), k.swapaxes(1, 2), v.swapaxes(1, 2)))
    out, lse = standard.dense_attention(*exact, None, window)
    return ungroup_heads(out), jnp.moveaxis(lse[:, 0], 1, 2)

  def error(a, b):
    gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)), a, b)
    return max(jax.tree.leaves(gaps))

  asked = lambda *args: standard_cudnn.attention(*args, None, window, probe=True, implementation="xla")
  exact = tuple(x.astype(jnp.float32) for x in args)
  got = value_and_gradient(asked, *args)
  assert error(got, value_and_gradient(functools.partial(reference, window), *exact)) < tolerance
  assert error(got, value_and_gradient(functools.partial(reference, window + 3), *exact)) > 5 * tolerance


@pytest.fixture
def calls(monkeypatch):
  """Runs the library's portable implementation instead, and keeps what it was called with."""
  seen, library = [], jax.nn.dot_product_attention

  def portable(q, k, v, **settings):
    seen.append({"shapes": (q.shape, k.shape, v.shape), "dtype": q.dtype, **settings})
    return library(q, k, v, **(settings | {"implementation": "xla"}))

  monkeypatch.setattr(jax, "devices", lambda: [device("9.0")])
  monkeypatch.setattr(jax.nn, "dot_product_attention", portable)
  return seen


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_layer_passes_normalised_grouped_heads_without_copies(calls, qk_norm):
  cfg = GPTConfig(**FIELDS, compute_dtype="bfloat16")
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(0.3 * rng.standard_normal(spec.shape), jnp.bfloat16)
    for name, spec in standard.MECHANISM.param_specs(cfg, standard.Options(impl="cudnn")).items()
  }
  x = jnp.asarray(rng.standard_normal((2, T, 64)), jnp.bfloat16)
  ctx = gpt.context(jnp.arange(T)[None], cfg, probe=True)

  def run(**options):
    opts = standard.Options(qk_norm=qk_norm, **options)
    return jax.jit(lambda params, x: standard.MECHANISM.apply(params, x, ctx, cfg, opts))(params, x)

  (fused, aux), (exact, exact_aux) = run(impl="cudnn", window=5), run(impl="reference", window=5)
  assert calls == [
    {
      "shapes": ((2, T, 4, 16), (2, T, 1, 16), (2, T, 1, 16)),
      "dtype": jnp.bfloat16,
      "scale": 0.25,
      "is_causal": True,
      "local_window_size": (4, 0),
      "implementation": "cudnn",
      "return_residual": True,
    }
  ]
  gap = lambda a, b: float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / jnp.max(jnp.abs(b)))
  assert gap(fused, exact) < 2e-2 < gap(run(impl="cudnn", window=3)[0], exact)
  np.testing.assert_allclose(aux["logsumexp"], exact_aux["logsumexp"], rtol=1e-2)


def test_it_is_never_picked_unasked(calls, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  q, k, v = qkv(jnp.bfloat16)
  cfg = GPTConfig(**(FIELDS | {"attention": "standard"}), compute_dtype="bfloat16")
  ctx = gpt.context(jnp.arange(T)[None], cfg)
  standard.mix(q, k, v, {}, ctx, cfg, standard.Options())
  assert calls == []
  standard.mix(q, k, v, {}, ctx, cfg, standard.Options(impl="cudnn"))
  assert len(calls) == 1


def test_a_derivative_it_does_not_have_is_refused(calls, monkeypatch):
  def without_derivative(*args, **settings):
    raise NotImplementedError("Differentiation rule not implemented")

  monkeypatch.setattr(jax.nn, "dot_product_attention", without_derivative)
  with pytest.raises(UserError, match=r"(?s)impl=cudnn cannot serve.*Differentiation rule.*impl=tiled"):
    standard_cudnn.attention(*qkv(jnp.bfloat16))


@pytest.mark.parametrize(("certify", "said"), [("auto", "--certify=off"), ("off", "NVIDIA GPUs only")])
def test_a_run_is_refused_before_anything_is_written(tmp_path, certify, said):
  attention = "standard(impl=cudnn)"
  settings = Settings(attention=attention, compute_dtype="bfloat16", certify=certify, workdir=str(tmp_path / "runs"))
  with pytest.raises(UserError, match=said):
    run(settings)
  assert not (tmp_path / "runs").exists()
