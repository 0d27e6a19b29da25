"""The training step: accumulation, clipping, the non-finite guard, donation, precision."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgr_jax import step as step_module
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.optim import make_optimizer
from mgr_jax.problems import UserError
from mgr_jax.schedules import make_schedule
from mgr_jax.step import init_train_state, make_train_step, split_batch

CFG = GPTConfig(vocab_size=64, seq_len=8, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
OPTIMIZER = make_optimizer("adamw", gpt.specs(CFG), CFG, embed_lr=0.01)
SCHEDULE = make_schedule("wsd", 100)
FREED = ("params", "opt_state", "schedule_state")


@jax.jit
def make_state(seed):
  return init_train_state(CFG, OPTIMIZER, SCHEDULE, seed)


@jax.jit
def model_gradient(params, batch):
  return jax.value_and_grad(gpt.loss, has_aux=True)(params, batch, CFG)


@pytest.fixture(scope="module")
def initial():
  """One state; tests donate copies of it."""
  state = make_state(0)
  # The head starts at zero, where most gradients vanish; move away from it.
  head = 0.3 * jax.random.normal(jax.random.key(1), state.params["head"].shape)
  return state.replace(params=state.params | {"head": head})


@pytest.fixture
def state(initial):
  return jax.tree.map(jnp.copy, initial)


@pytest.fixture(scope="module")
def step():
  return make_train_step(CFG, OPTIMIZER, SCHEDULE)


def make_batch(seed: int = 0, rows: int = 8, weights=None):
  rng = np.random.default_rng(seed)
  windows = rng.integers(0, CFG.vocab_size, (rows, CFG.seq_len + 1)).astype(np.int32)
  weights = np.ones((rows, CFG.seq_len)) if weights is None else weights
  return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "weights": weights.astype(np.float32)}


def uneven_weights(rows: int = 8):
  weights = np.ones((rows, CFG.seq_len))
  weights[0] = 0
  weights[1, 3:] = 0
  weights[5] = 0.25
  return weights


def host(tree):
  """The leaves as NumPy arrays that outlive donation."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def assert_same(a, b):
  for x, y in zip(host(a), host(b), strict=True):
    np.testing.assert_array_equal(x, y)


def distance(a, b) -> float:
  pairs = zip(host(a), host(b), strict=True)
  return max(float(np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)))) for x, y in pairs)


@pytest.fixture
def toy(monkeypatch):
  """Replaces the model by a loss on one column of the embedding, with an auxiliary term; compiles at once."""

  def loss(params, batch, cfg, normalizer, annealed):
    column = params["embed"][batch["tokens"], 0]
    weight = jnp.sum(batch["weights"])
    nll = jnp.sum(batch["weights"] * jnp.square(column - 1)) / normalizer
    aux_loss = 3 * jnp.sum(batch["weights"] * column) / weight
    return nll + aux_loss, {"nll_sum": nll * normalizer, "weight": weight, "aux_loss": aux_loss, "readings": {}}

  monkeypatch.setattr(step_module, "gpt", types.SimpleNamespace(loss=loss, init=gpt.init))


def test_accumulated_gradient_is_that_of_the_whole_batch(initial):
  batch = make_batch(weights=uneven_weights())
  (loss, metrics), grads = model_gradient(initial.params, batch)
  parts, summed = jax.jit(lambda p, b: step_module._gradient(p, b, CFG, 4, {}))(initial.params, batch)
  assert distance(grads, summed) < 1e-6
  assert metrics.pop("readings") == {}
  for name, want in ({"loss": loss} | metrics).items():
    np.testing.assert_allclose(parts[name], want, rtol=1e-6, err_msg=name)
  odd_rows = np.arange(8)[:, None] % 2
  halves = [batch | {"weights": batch["weights"] * (odd_rows == i)} for i in range(2)]
  mean_of_means = jax.tree.map(lambda a, b: (a + b) / 2, *(model_gradient(initial.params, h)[1] for h in halves))
  assert distance(grads, mean_of_means) > 1e-3


@pytest.mark.usefixtures("toy")
def test_accumulated_steps_are_those_of_the_whole_batch(state):
  batch = make_batch(weights=uneven_weights())
  batch["weights"][0] = 0.5
  other = jax.tree.map(jnp.copy, state)
  steps = [make_train_step(CFG, OPTIMIZER, SCHEDULE, grad_accum=n) for n in (1, 4)]
  for _ in range(3):
    state, metrics = steps[0](state, batch)
    other, parts = steps[1](other, batch)
    chex.assert_trees_all_close(parts, metrics, rtol=1e-5)
  assert distance(state.params, other.params) < 1e-6
  np.testing.assert_array_equal(state.tokens_seen, other.tokens_seen)


@pytest.mark.usefixtures("toy")
def test_auxiliary_losses_are_averaged_over_micro_batches(initial):
  weights = uneven_weights()
  weights[0] = 0.5  # no micro-batch without weight, where the mean has no meaning
  batch, part = make_batch(weights=weights), make_batch(weights=weights)
  whole, grads = step_module._gradient(initial.params, batch, CFG, 1, {})
  parts, summed = step_module._gradient(initial.params, part, CFG, 4, {})
  column = np.asarray(initial.params["embed"], np.float64)[batch["tokens"], 0]
  mean = lambda values: np.sum(batch["weights"] * values) / weights.sum()
  for metrics in (whole, parts):
    assert float(metrics["aux_loss"]) == pytest.approx(3 * mean(column), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(mean((column - 1) ** 2), rel=1e-5)  # without the auxiliary part
  want = np.zeros(initial.params["embed"].shape)
  np.add.at(want[:, 0], batch["tokens"], batch["weights"] * (2 * (column - 1) + 3) / weights.sum())
  for got in (grads, summed):
    np.testing.assert_allclose(got["embed"], want, atol=1e-6)


def test_micro_batches_partition_the_rows():
  batch = make_batch(rows=6)
  parts = split_batch(batch, 3)
  assert parts["tokens"].shape == (3, 2, CFG.seq_len)
  np.testing.assert_array_equal(parts["tokens"][1], batch["tokens"][1::3])
  with pytest.raises(UserError, match=r"--batch_size=6 is not divisible by --grad_accum=4\n.*--batch_size=8"):
    split_batch(batch, 4)


def test_metrics(state, step):
  batch = make_batch(weights=uneven_weights())
  (want, model), grads = model_gradient(state.params, batch)
  norm = float(optax.tree.norm(grads))
  state, metrics = step(state, batch)
  assert set(metrics) == {
    "loss", "nll_sum", "weight", "aux_loss", "grad_norm", "multiplier", "event", "nonfinite",
    "annealed", "schedule", "optimizer",
  }  # fmt: skip
  assert metrics.pop("annealed") == metrics.pop("schedule") == metrics.pop("optimizer") == {}
  assert all(isinstance(m, jax.Array) and m.shape == () for m in metrics.values())
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
  np.testing.assert_allclose(metrics["nll_sum"], model["nll_sum"], rtol=1e-6)
  assert float(metrics["weight"]) == uneven_weights().sum()
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  assert float(metrics["multiplier"]) == 0.5  # first of two warm-up steps
  assert not metrics["nonfinite"]
  _, metrics = step(state, batch)
  assert float(metrics["multiplier"]) == 1.0


def test_untrained_loss_is_that_of_a_uniform_guess(step):
  _, metrics = step(make_state(3), make_batch())
  assert float(metrics["loss"]) == pytest.approx(np.log(64), abs=1e-5)


@pytest.mark.usefixtures("toy")
def test_the_gradient_is_clipped_but_its_norm_reported_unclipped(initial):
  keep_gradient = optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None, **extra: (jax.tree.map(jnp.zeros_like, grads), grads),
  )
  fresh = init_train_state(CFG, keep_gradient, SCHEDULE, 0)
  clipped, reported = {}, {}
  for clip in (0.0, 0.01, 1e6):
    step = make_train_step(CFG, keep_gradient, SCHEDULE, grad_clip=clip)
    state, metrics = step(jax.tree.map(jnp.copy, fresh), make_batch(weights=uneven_weights()))
    clipped[clip], reported[clip] = float(optax.tree.norm(state.opt_state)), float(metrics["grad_norm"])
  assert clipped[0.01] == pytest.approx(0.01, rel=1e-5)
  assert clipped[0.0] == clipped[1e6] == pytest.approx(reported[0.0], rel=1e-5)
  assert reported[0.01] == reported[0.0] > 0.1


def poisoned():
  return make_batch(weights=np.full((8, CFG.seq_len), np.nan))


@pytest.mark.usefixtures("toy")
def test_a_nonfinite_step_keeps_the_state_bitwise_and_counts(state):
  step = make_train_step(CFG, OPTIMIZER, SCHEDULE, on_nonfinite="skip:2")
  good, before = make_batch(weights=uneven_weights()), None
  state, _ = step(state, good)
  before = [host(getattr(state, name)) for name in FREED]
  state, metrics = step(state, poisoned())
  assert metrics["nonfinite"]
  for name, old in zip(FREED, before, strict=True):
    assert_same(getattr(state, name), old)
  assert (int(state.step), int(state.skipped), int(state.nonfinite_streak)) == (2, 1, 1)
  state, metrics = step(state, good)
  assert not metrics["nonfinite"]
  assert (int(state.step), int(state.skipped), int(state.nonfinite_streak)) == (3, 1, 0)
  assert distance(state.params, before[0]) > 0


@pytest.mark.usefixtures("toy")
def test_a_finite_gradient_with_an_update_that_is_not_finite_is_dropped_too():
  """Curvature that breaks down must not reach the parameters."""
  broken = optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros(()), lambda grads, s, params=None, **extra: (jax.tree.map(lambda g: g / 0, grads), s + 1)
  )
  state = init_train_state(CFG, broken, SCHEDULE, 0)
  before = host(state.params)
  state, metrics = make_train_step(CFG, broken, SCHEDULE, on_nonfinite="skip:2")(state, make_batch())
  assert metrics["nonfinite"] and np.isfinite(metrics["grad_norm"])
  assert_same(state.params, before)
  assert int(state.opt_state) == 0 and int(state.skipped) == 1


@pytest.mark.usefixtures("toy")
def test_a_finite_loss_with_an_infinite_gradient_is_dropped_too(state, monkeypatch):
  finite_loss = step_module.gpt.loss

  def loss(params, batch, cfg, normalizer, annealed):
    total, metrics = finite_loss(params, batch, cfg, normalizer, annealed)
    return total + jnp.sqrt(jnp.sum(params["head"] * 0)), metrics  # the derivative of the root at 0 is infinite

  monkeypatch.setattr(step_module.gpt, "loss", loss)
  before = host(state.params)
  state, metrics = make_train_step(CFG, OPTIMIZER, SCHEDULE)(state, make_batch(weights=uneven_weights()))
  assert np.isfinite(metrics["loss"])
  assert not np.isfinite(metrics["grad_norm"])
  assert metrics["nonfinite"]
  assert_same(state.params, before)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("mode", "limit"), [("raise", 1), ("skip:2", 2)])
def test_after_the_limit_everything_is_dropped(state, mode, limit):
  step = make_train_step(CFG, OPTIMIZER, SCHEDULE, on_nonfinite=mode)
  good, bad = make_batch(weights=uneven_weights()), poisoned()
  dropped = []
  for batch in [bad] * (limit - 1) + [good] + [bad] * limit:
    state, metrics = step(state, batch)
    dropped.append(bool(metrics["nonfinite"]))
  assert dropped == [True] * (limit - 1) + [False] + [True] * limit
  broken = host(state.params)
  state, metrics = step(state, good)
  assert metrics["nonfinite"]
  assert_same(state.params, broken)
  _, metrics = step(state.replace(nonfinite_streak=jnp.int32(0)), good)
  assert not metrics["nonfinite"]


def test_state_is_donated_and_compiled_once(state, step):
  step(jax.tree.map(jnp.copy, state), make_batch())
  compiled = step._cache_size()
  for i in range(4):
    old, (state, _) = state, step(state, make_batch(i))
  assert step._cache_size() == compiled
  assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)))
  with pytest.raises(RuntimeError, match="deleted"):
    np.asarray(old.params["head"])


def test_the_key_never_changes_and_depends_on_the_seed(state, step):
  before = host(state.key)
  state, _ = step(state, make_batch())
  assert_same(jnp.asarray(before[0]), jax.random.key_data(state.key))
  assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
  other = make_state(1)
  assert not np.array_equal(host(other.key)[0], before[0])
  assert distance(other.params, make_state(0).params) > 0.1
  assert_same(other, make_state(1))


def test_tokens_are_counted_in_64_bits(state, step):
  state = state.replace(tokens_seen=jnp.array([2**32 - 10, 3], jnp.uint32))
  state, _ = step(state, make_batch())
  low, high = (int(w) for w in state.tokens_seen)
  assert high * 2**32 + low == 3 * 2**32 + 2**32 - 10 + 8 * CFG.seq_len
  before = low
  state, _ = step(state, make_batch(weights=uneven_weights()))
  assert int(state.tokens_seen[0]) - before == np.count_nonzero(uneven_weights())
  assert int(state.tokens_seen[1]) == 4


def test_memorises_one_batch(state, step):
  batch, losses = make_batch(), []
  for _ in range(60):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.3 * losses[0]


def test_bfloat16_keeps_float32_parameters_and_nearly_the_loss(initial, step):
  weighted, losses = make_batch(), {}
  bfloat16 = make_train_step(dataclasses.replace(CFG, compute_dtype="bfloat16"), OPTIMIZER, SCHEDULE)
  no_weights = {name: weighted[name] for name in ("tokens", "targets")}  # the same: every target counts once
  for dtype, update, batch in (("float32", step, weighted), ("bfloat16", bfloat16, no_weights)):
    state = jax.tree.map(jnp.copy, initial)
    for _ in range(20):
      state, metrics = update(state, batch)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state[0].mu))} == {np.dtype("float32")}
    assert int(state.tokens_seen[0]) == 20 * 8 * CFG.seq_len
    losses[dtype] = float(metrics["loss"])
  assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
  assert losses["bfloat16"] != losses["float32"]


def test_abstract_state_needs_no_arrays(state):
  abstract = jax.eval_shape(lambda: init_train_state(CFG, OPTIMIZER, SCHEDULE, 0))
  assert jax.tree.structure(abstract) == jax.tree.structure(state)
  assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def test_bad_settings_are_reported_together():
  with pytest.raises(UserError) as e:
    make_train_step(CFG, OPTIMIZER, SCHEDULE, grad_accum=0, grad_clip=-1, on_nonfinite="skip:0")
  assert [p.error.split(" is ")[0] for p in e.value.problems] == [
    "--grad_accum=0",
    "--grad_clip=-1",
    "--on_nonfinite=skip:0",
  ]
