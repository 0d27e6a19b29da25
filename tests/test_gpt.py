"""The model: loss, masks, decode, mixed precision, recomputation, hybrids."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.conformance import noisy_params
from mgr_jax.model import gpt, stack
from mgr_jax.model.cross_entropy import capped_logits, chunk_size, cross_entropy, token_nll
from train import plain

CFG = GPTConfig(vocab_size=97, seq_len=24, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


def batch_of(key, cfg=CFG, batch=2):
  tokens = jax.random.randint(key, (batch, cfg.seq_len + 1), 0, cfg.vocab_size)
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


@functools.partial(jax.jit, static_argnums=2)
def value_and_grad(params, batch, cfg, normalizer=None):
  return jax.value_and_grad(lambda p: gpt.loss(p, batch, cfg, normalizer)[0])(params)


@pytest.fixture
def params(key):
  return noisy_params(key, CFG)


def test_initial_loss_is_log_vocabulary(key):
  loss, _ = gpt.loss(gpt.init(key, CFG), batch_of(key), CFG)
  assert float(loss) == pytest.approx(math.log(97), abs=1e-4)


def test_loss_equals_log_softmax_of_forward(key, params):
  batch = batch_of(key)
  logits, _ = gpt.forward(params, batch["tokens"], CFG)
  assert logits.shape == (2, 24, 97)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  assert float(gpt.loss(params, batch, CFG)[0]) == pytest.approx(float(jnp.mean(expected)), abs=1e-5)
  np.testing.assert_allclose(gpt.nll(params, batch, CFG), expected, atol=1e-5)


def test_the_plain_yardstick_computes_the_same_loss_and_gradient(key):
  cfg = dataclasses.replace(CFG, n_kv_head=4, vocab_size=128)
  params, batch = noisy_params(key, cfg), batch_of(key, cfg)
  ours = value_and_grad(params, batch, cfg)
  yardstick = jax.jit(jax.value_and_grad(lambda p: plain.loss(p, batch, cfg)))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, yardstick)


def test_normalizer_makes_micro_batches_add_up(key, params):
  batch = batch_of(key, batch=4)
  batch["weights"] = jax.random.uniform(key, (4, 24)) * (jax.random.uniform(key, (4, 24)) > 0.3)
  whole = value_and_grad(params, batch, CFG)[1]
  halves = [jax.tree.map(lambda a, i=i: a[i : i + 2], batch) for i in (0, 2)]
  total = jnp.sum(batch["weights"])
  summed = jax.tree.map(jnp.add, *(value_and_grad(params, h, CFG, total)[1] for h in halves))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, summed)
  mean_of_means = jax.tree.map(lambda a, b: (a + b) / 2, *(value_and_grad(params, h, CFG)[1] for h in halves))
  assert float(jnp.max(jnp.abs(mean_of_means["head"] - whole["head"]))) > 1e-5


def test_weights_of_zero_remove_positions(key, params):
  batch = batch_of(key)
  batch["weights"] = jnp.ones((2, 24)).at[:, 10:].set(0.0)
  other = batch | {"targets": batch["targets"].at[:, 10:].set(0)}
  assert float(gpt.loss(params, batch, CFG)[0]) == float(gpt.loss(params, other, CFG)[0])
  empty = batch | {"weights": jnp.zeros((2, 24))}
  assert float(gpt.loss(params, empty, CFG)[0]) == 0.0


def test_doc_mask_uses_segment_ids_and_only_then(key, params):
  batch = batch_of(key) | {"segment_ids": jnp.repeat(jnp.array([[1, 2]]), 12, 1).repeat(2, 0)}
  masked = dataclasses.replace(CFG, doc_mask=True)
  open_, closed = (float(gpt.loss(params, batch, c)[0]) for c in (CFG, masked))
  assert open_ != closed
  halves = [gpt.nll(params, {k: v[:, s] for k, v in batch.items()}, CFG) for s in (slice(0, 12), slice(12, 24))]
  assert closed == pytest.approx(float(jnp.mean(jnp.concatenate(halves, 1))), abs=1e-5)


def test_positions_restart_with_every_document():
  segments = jnp.array([[1, 1, 1, 2, 2, 3], [4, 5, 5, 5, 5, 5]])
  expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
  np.testing.assert_array_equal(gpt.positions_in_documents(segments), expected)


@pytest.mark.parametrize("changed", [{"remat": "every_2"}, {"loss_chunk": 7}, {"remat": "dots"}, {"remat": "full"}])
def test_memory_options_change_no_number(key, changed):
  cfg = dataclasses.replace(CFG, n_layer=3)
  params, batch = noisy_params(key, cfg), batch_of(key)
  base, other = (value_and_grad(params, batch, c) for c in (cfg, dataclasses.replace(cfg, **changed)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), base, other)


def test_what_each_remat_policy_keeps(key):
  """Temporaries of sixteen layers: groups of four keep least, then the inputs of layers, then products with weights."""
  cfg = GPTConfig(vocab_size=97, seq_len=64, n_layer=16, n_head=2, n_kv_head=2, n_embd=64)

  def temporaries(remat):
    changed = dataclasses.replace(cfg, remat=remat)
    params, batch = (
      jax.eval_shape(lambda: gpt.init(key, changed)),
      dict.fromkeys(("tokens", "targets"), jnp.zeros((4, 64), int)),
    )
    step = jax.jit(jax.grad(lambda p: gpt.loss(p, batch, changed)[0]))
    return step.lower(params).compile().memory_analysis().temp_size_in_bytes / (4 * 64 * 64 * 4)

  every, full, dots, none = map(temporaries, ("every_4", "full", "dots", "none"))
  assert every + 5 < full and full + 60 < dots and dots + 150 < none


def test_bfloat16_compute_keeps_float32_gradients_and_is_close(key, params):
  half = dataclasses.replace(CFG, compute_dtype="bfloat16")
  batch = batch_of(key)
  loss, grads = value_and_grad(params, batch, half)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  exact, _ = gpt.loss(params, batch, CFG)
  assert float(loss) != float(exact)
  assert float(loss) == pytest.approx(float(exact), rel=0.02)


def test_padded_vocabulary_never_gets_probability(key, params):
  head = jnp.asarray(params["head"]).at[:, 97:].set(100.0)
  batch = batch_of(key)
  assert float(gpt.loss(params | {"head": head}, batch, CFG)[0]) == float(gpt.loss(params, batch, CFG)[0])
  grads = value_and_grad(params, batch, CFG)[1]
  assert np.all(np.asarray(grads["head"])[:, 97:] == 0)
  assert np.any(np.asarray(grads["head"])[:, :97] != 0)


def test_a_hybrid_has_one_run_per_change_of_mechanism():
  cfg = dataclasses.replace(CFG, n_layer=5, attention="standard*2,standard(window=4)")
  assert [(r.first, r.n_layer) for r in stack.runs(cfg)] == [(0, 2), (2, 1), (3, 2)]
  shapes = [tree["attention"]["wq"].shape[0] for tree in gpt.specs(cfg)["runs"]]
  assert shapes == [2, 1, 2]


def test_decode_drops_tokens_beyond_the_cache_without_touching_others(key, params):
  tokens = batch_of(key)["tokens"]
  state = gpt.init_state(CFG, 2, 8)
  _, state = gpt.decode(params, tokens[:, :8], state, CFG)
  before = jax.tree.map(np.asarray, state.runs)
  _, state = gpt.decode(params, tokens[:, 8:9], state, CFG)
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.runs))


@pytest.mark.parametrize(("softcap", "n"), [(15.0, 10), (15.0, 1), (0.0, 16), (60.0, 10)])
def test_cross_entropy_gradient_equals_autodiff(key, softcap, n):
  x, head = jax.random.normal(key, (n, 8)), 2 * jax.random.normal(key, (8, 128))
  targets, weights = jax.random.randint(key, (n,), 0, 100), jax.random.uniform(key, (n,))

  def naive(x, head):
    z = capped_logits(x, head, softcap, 100)
    return jnp.sum(weights * (jax.nn.logsumexp(z, -1) - z[jnp.arange(n), targets]))

  chunked = lambda x, h: cross_entropy(x, h, targets, weights, softcap, 100, 4)
  fast = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, head)
  slow = jax.jit(jax.value_and_grad(naive, (0, 1)))(x, head)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), fast, slow)
  undifferentiated = jax.jit(chunked)(x, head)
  assert float(undifferentiated) == pytest.approx(float(slow[0]), rel=1e-5)
  assert token_nll(x, head, targets, softcap, 100, 4).shape == (n,)


def test_cross_entropy_memory_is_one_chunk_of_logits():
  n, c, v = 1024, 16, 2048
  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((n, c), "float32"), ((c, v), "float32"), ((n,), "int32"))]

  def temp(chunk):
    f = lambda x, h, t: cross_entropy(x, h, t, jnp.ones(n), 15.0, v, chunk)
    return jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  assert temp(64) < 4 * n * v / 2
  assert temp(n) > 4 * n * v
  assert chunk_size(8192, 50304, 0) * 50304 <= 1 << 22
  assert chunk_size(100, 128, 0) == 100


def test_cost_of_a_model_counted_by_hand():
  cfg = GPTConfig(vocab_size=128, seq_len=16, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, attention="standard")
  projections = 2 * 8 * (8 + 4 + 4 + 8)
  scores_and_values = 2 * 2 * (16 / 2) * 8
  mlp, head = 2 * 8 * 32 * 2, 2 * 8 * 128
  assert gpt.cost(cfg).matmul == projections + scores_and_values + mlp + head
