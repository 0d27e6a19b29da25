"""The experiment harness: tasks mean what they say, statistics and gates decide, programs report what happened."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax import optim, params
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.problems import UserError
from train import cli, experiment
from train.experiments import EXPERIMENTS, find, recall, report, simplicial_triple, ultrametric_routing
from train.experiments.records import Arm, Experiment, Prediction, Task
from train.experiments.training import Cell, configurations, freeze, make_run
from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED, interval, judge


def copy_task(key, rows, data):
  """The target is the token itself: learnt in a few steps by any arm."""
  del data
  tokens = jax.random.randint(key, (rows, 4), 0, 8)
  return {"tokens": tokens, "targets": tokens, "weights": jnp.ones((rows, 4), jnp.float32)}


def coin_task(key, rows, data):
  """Targets that nothing predicts."""
  batch = copy_task(key, rows, data)
  return batch | {"targets": jax.random.randint(jax.random.fold_in(key, 1), (rows, 4), 0, 8)}


def toy(**changes) -> Experiment:
  fields = {
    "name": "toy",
    "question": "does it run?",
    "model": {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 16},
    "tasks": (
      Task(
        "copy", 8, 4, copy_task, {"copy": copy_task, "coin": coin_task}, lambda data: {"copy": 0.125, "coin": 0.125}
      ),
    ),
    "arms": (Arm("softmax", "standard"), Arm("gates", "braid")),
    "predictions": (
      Prediction("copying is learnt by both", "gates", "softmax", "copy", at_least=-0.05),
      Prediction("coins are better guessed by gates", "gates", "softmax", "coin"),
    ),
    "steps": 60,
    "batch_size": 16,
    "test_rows": 64,
    "ladder": ("copy", "coin"),
  }
  return Experiment(**(fields | changes))


@pytest.fixture(scope="module")
def outcome():
  return experiment.run(toy(), seeds=2)


class TestStatistics:
  def test_interval_is_student(self):
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([1.0]).half == math.inf
    assert interval([0.5] * 5) == (0.5, 0.0)

  def test_coverage_of_the_interval(self):
    samples = np.random.default_rng(0).normal(size=(2000, 5))
    covered = [found.low <= 0 <= found.high for found in map(interval, samples)]
    assert 0.93 < np.mean(covered) < 0.97

  @pytest.mark.parametrize(
    ("arm", "baseline", "settings", "word"),
    [
      ([0.80, 0.82, 0.81], [0.50, 0.51, 0.52], {"at_least": 0.2}, SUPPORTED),
      ([0.60, 0.62, 0.61], [0.50, 0.51, 0.52], {"at_least": 0.2}, REFUTED),
      ([0.95, 0.52, 0.75], [0.50, 0.51, 0.52], {"at_least": 0.2}, INCONCLUSIVE),
      ([0.80], [0.50], {"at_least": 0.2}, INCONCLUSIVE),
      ([0.15, 0.14], [0.12, 0.11], {"at_least": 0.0}, INCONCLUSIVE),  # both at chance
      ([0.99, 0.98], [0.97, 0.96], {"at_least": 0.0}, INCONCLUSIVE),  # both at the ceiling
      ([0.99, 0.98], [0.97, 0.96], {"at_least": -0.05}, SUPPORTED),  # no worse, however good
      ([0.99, 0.98], [0.90, 0.89], {"at_least": 0.2}, INCONCLUSIVE),  # no room for 20 points
      ([0.80, 0.81], [0.80, 0.81], {"within": 0.03}, SUPPORTED),
      ([0.80, 0.81], [0.70, 0.71], {"within": 0.03}, REFUTED),
      ([0.80, 0.85], [0.80, 0.79], {"within": 0.03}, INCONCLUSIVE),
      ([0.80, math.nan], [0.50, 0.51], {"at_least": 0.2}, INCONCLUSIVE),
      ([], [0.50, 0.51], {"at_least": 0.2}, INCONCLUSIVE),
    ],
  )
  def test_verdicts_on_accuracy(self, arm, baseline, settings, word):
    prediction = Prediction("", "a", "b", "t", **settings)
    assert judge(prediction, arm, baseline, "accuracy", chance=0.125).word == word

  def test_pairs_are_compared_not_means(self):
    """Seeds differ by more than the arms: only the paired interval sees the gain."""
    baseline = np.array([0.3, 0.5, 0.7, 0.9])
    prediction = Prediction("", "a", "b", "t", at_least=0.04)
    assert judge(prediction, baseline + 0.05, baseline, "accuracy", 0.0).word == SUPPORTED
    assert judge(prediction, (baseline + 0.05)[::-1], baseline, "accuracy", 0.0).word == INCONCLUSIVE

  @pytest.mark.parametrize(
    ("arm", "baseline", "word"),
    [
      ([1.90, 1.91], [2.00, 2.01], SUPPORTED),
      ([2.00, 2.01], [2.00, 2.01], REFUTED),
      ([2.95, 2.96], [3.00, 3.01], INCONCLUSIVE),  # hardly below the loss without context
    ],
  )
  def test_verdicts_on_loss(self, arm, baseline, word):
    prediction = Prediction("", "a", "b", "t", at_least=0.01)
    assert judge(prediction, arm, baseline, "loss", chance=3.0).word == word


class TestTasks:
  def test_recall_stores_what_it_asks_for(self):
    layout = {"room": 6, "queries": 5, "keys": 12, "values": 4}
    batch = jax.tree.map(np.asarray, recall.recall(4, **layout)(jax.random.key(0), 32, None))
    assert batch["tokens"].shape == (32, 6 + 5)
    assert batch["tokens"].max() < recall.vocabulary(12, 4)
    for tokens, targets, weights in zip(*(batch[k] for k in ("tokens", "targets", "weights")), strict=True):
      pairs = {(t - 1) // 4: (t - 1) % 4 for t in tokens[2:6].tolist()}
      assert len(pairs) == 4, "keys are distinct"
      assert not tokens[:2].any(), "empty slots come first"
      assert weights.tolist() == [0] * 6 + [1] * 5
      assert [pairs[t - 1 - 48] for t in tokens[6:].tolist()] == targets[6:].tolist()

  def test_mixed_recall_draws_every_size(self):
    generate = recall.mixed_recall((1, 2, 4), room=4, queries=3, keys=8, values=4)
    filled = np.sum(np.asarray(generate(jax.random.key(0), 64, None)["tokens"][:, :4]) > 0, axis=1)
    assert set(filled.tolist()) == {1, 2, 4}

  @pytest.mark.parametrize("matches", [2, 3])
  def test_planted_matches_are_unique(self, matches):
    generate = simplicial_triple.match3() if matches == 3 else simplicial_triple.match2()
    M, P = simplicial_triple.MODULUS, simplicial_triple.PAYLOADS
    batch = jax.tree.map(np.asarray, generate(jax.random.key(0), 256, None))
    assert batch["tokens"].shape == (256, simplicial_triple.SHAPE["seq_len"])
    assert batch["tokens"].max() < simplicial_triple.SHAPE["vocab_size"]
    assert batch["weights"][:, -1].mean() > 0.97
    assert not batch["weights"][:, :-1].any()
    for tokens, target, weight in zip(batch["tokens"], batch["targets"][:, -1], batch["weights"][:, -1], strict=True):
      x, p, query = tokens[:-1] // P, tokens[:-1] % P, tokens[-1] - M * P
      if matches == 3:
        pairs = [(i, j) for i in range(len(x)) for j in range(i) if (x[i] + x[j] + query) % M == 0]
      else:
        pairs = [(i,) for i in range(len(x)) if (x[i] + query) % M == 0]
      assert (len(pairs) == 1) == bool(weight)
      if weight:
        assert sum(p[i] for i in pairs[0]) % P == target

  def test_text_windows(self):
    data = ultrametric_routing.Text(jnp.arange(1000) % 256, jnp.zeros(500, jnp.int32))
    batch = ultrametric_routing.windows("train")(jax.random.key(0), 3, data)
    np.testing.assert_array_equal(batch["targets"], (batch["tokens"] + 1) % 256)
    assert not ultrametric_routing.windows("validation")(jax.random.key(0), 3, data)["tokens"].any()
    # A byte that makes up 1/250 of the training text.
    assert ultrametric_routing.unigram_loss(data)["validation"] == pytest.approx(math.log(1265 / 5), rel=1e-6)

  @pytest.mark.parametrize("name", EXPERIMENTS)
  def test_generators_have_the_shape_they_declare(self, name):
    for task in EXPERIMENTS[name].tasks:
      data = ultrametric_routing.Text(*2 * [jnp.zeros(1000, jnp.int32)]) if name == "ultrametric_routing" else None
      assert set(task.chance(data)) == set(task.tests)
      for generator in (task.train, *task.tests.values()):
        batch = jax.eval_shape(lambda key, g=generator, d=data: g(key, 3, d), jax.random.key(0))
        rows, length = batch["tokens"].shape
        assert rows == 3 and length <= task.seq_len
        assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
          "tokens": ((3, length), "int32"),
          "targets": ((3, length), "int32"),
          "weights": ((3, length), "float32"),
        }


class TestModels:
  def test_parameters_are_made_equal(self):
    e = toy(
      arms=(Arm("a", "standard"), Arm("b", "braid(mode=word)"), Arm("c", "standard", (("n_layer", 2),), (), False)),
      predictions=(),
    )
    configs = configurations(e, e.tasks[0])
    counts = {name: params.count(gpt.specs(cfg)) for name, cfg in configs.items()}
    assert abs(counts["a"] / counts["b"] - 1) < 0.005
    plain = configurations(toy(arms=(Arm("a", "standard"),), predictions=()), e.tasks[0])["a"]
    assert counts["a"] > params.count(gpt.specs(plain)), "a control: they were not equal before"
    assert configs["c"].mlp_ratio == 4

  def test_frozen_leaves_do_not_move(self):
    cfg = GPTConfig(vocab_size=8, seq_len=4, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    specs = gpt.specs(cfg)
    weights = jax.tree.map(jnp.ones_like, gpt.init(jax.random.key(0), cfg))
    optimizer = freeze(optim.make_optimizer("adamw", specs, cfg), specs, ("wq", "wk"))
    updates, _ = optimizer.update(weights, optimizer.init(weights), weights, scale=jnp.float32(1))
    for name, update in zip(params.leaf_names(specs), jax.tree.leaves(updates), strict=True):
      assert bool(jnp.all(update == 0)) == name.endswith(("wq", "wk"))

  def test_frozen_names_must_exist(self):
    cfg = GPTConfig(vocab_size=8, seq_len=4, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    with pytest.raises(ValueError, match="no parameter is called dq"):
      freeze(optim.make_optimizer("adamw", gpt.specs(cfg), cfg), gpt.specs(cfg), ("dq",))


class TestRun:
  def test_scores(self, outcome):
    assert [cell.arm for cell in outcome.cells] == ["softmax", "gates"]
    for cell in outcome.cells:
      assert not cell.error
      assert min(cell.scores["copy"]) > 0.9
      assert max(cell.scores["coin"]) < 0.3
      assert len(cell.run_s) == len(cell.curves) == 2
      assert cell.curves[0][0] > cell.curves[0][-1] >= 0
      assert cell.skipped == [0, 0]

  def test_verdicts(self, outcome):
    both, coin = report.verdicts(toy(), outcome.cells, outcome.chance)
    assert both.word == SUPPORTED
    assert coin.word == INCONCLUSIVE
    assert coin.reason.startswith("floor")

  def test_report_names_everything(self, outcome):
    text = report.text(toy(limits="a toy"), outcome.cells, outcome.chance)
    for part in ("softmax", "gates", "chance", "0.125", "SUPPORTED", "INCONCLUSIVE", "first rung below 90%", "a toy"):
      assert part in text

  def test_seeds_differ_and_repeat(self, outcome):
    first, second = outcome.cells[0].curves
    assert first != second
    e = toy()
    cfg = configurations(e, e.tasks[0])["softmax"]
    run = jax.jit(make_run(e, e.tasks[0], e.arms[0], cfg, e.steps))
    curve = run(jnp.int32(1), jnp.float32(1), None)["curve"]
    np.testing.assert_allclose(curve, second, rtol=1e-5)
    # The learning rate is an argument of the same program, and 0 learns nothing.
    still = run(jnp.int32(1), jnp.float32(0), None)
    assert still["curve"][-1] == pytest.approx(math.log(8), abs=1e-5)

  def test_arms_see_the_same_first_batch(self):
    """Both models start at zero logits, so the first loss cannot tell; the targets themselves are compared."""
    seen = {}
    e = toy(steps=1)

    def spy(name):
      def generate(key, rows, data):
        batch = copy_task(key, rows, data)
        jax.debug.callback(lambda tokens: seen.setdefault(name, []).append(np.asarray(tokens)), batch["tokens"])
        return batch

      return generate

    for arm in e.arms:
      task = dataclasses.replace(e.tasks[0], train=spy(arm.name), tests={})
      cfg = configurations(e, task)[arm.name]
      jax.block_until_ready(jax.jit(make_run(e, task, arm, cfg, 1))(jnp.int32(3), jnp.float32(1), None))
      jax.effects_barrier()
    np.testing.assert_array_equal(seen["softmax"][0], seen["gates"][0])

  def test_a_failing_arm_is_reported_and_the_others_go_on(self):
    e = toy(arms=(Arm("softmax", "standard", frozen=("nothing",)), Arm("gates", "standard")), steps=2)
    lines = []
    found = experiment.run(e, seeds=2, say=lines.append)
    assert "FAILED ValueError: no parameter is called nothing" in lines[0]
    assert found.cells[1].scores["copy"]
    assert {v.reason for v in report.verdicts(e, found.cells, found.chance)} == {"an arm did not run"}
    text = report.text(e, found.cells, found.chance)
    assert "softmax failed: ValueError" in text

  def test_tuning_prefers_the_rate_that_learns(self):
    found = experiment.run(toy(arms=(Arm("softmax", "standard"),), predictions=(), steps=8), seeds=1, tune=True)
    (cell,) = found.cells
    assert set(cell.tuning) == {"0.3", "1.0", "3.0"}
    assert cell.tuning[str(cell.lr_scale)] == max(cell.tuning.values())

  def test_every_mistake_is_reported_at_once(self):
    e = toy(arms=(Arm("softmax", "standart"), Arm("gates", "braid(mode=nothing)")))
    with pytest.raises(UserError) as error:
      experiment.run(e, seeds=1)
    assert len(error.value.problems) == 2

  def test_json_is_strict(self, outcome):
    broken = dataclasses.replace(outcome.cells[0], scores={"copy": [math.nan, 1.0]})
    data = experiment.as_json(toy(), outcome._replace(cells=[broken, outcome.cells[1]]), {"seeds": 2})
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text)["cells"][0]["scores"]["copy"] == [None, 1.0]
    assert json.loads(text)["predictions"][0]["verdict"] == INCONCLUSIVE


class TestRecords:
  @pytest.mark.parametrize(
    "changes",
    [
      {"metric": "wins"},
      {"arms": (Arm("softmax", "standard"),) * 2},
      {"predictions": (Prediction("", "softmax", "nobody", "copy"),)},
      {"predictions": (Prediction("", "softmax", "gates", "nothing"),)},
      {"ladder": ("nothing",)},
    ],
  )
  def test_mistakes_in_a_definition(self, changes):
    with pytest.raises(ValueError, match=r"metric|one name|does not exist"):
      toy(**changes)

  def test_registry(self):
    for name, e in EXPERIMENTS.items():
      assert find(name) is e
      assert e.name == name
      assert e.predictions
      assert e.limits


def program(*args):
  return cli.execute(experiment.main, ["experiment", *args], experiment.FLAGS, max_args=1)


class TestProgram:
  def test_list(self, capsys):
    assert program("--list") == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)

  @pytest.mark.parametrize(
    ("args", "part"),
    [
      ([], "no experiment named"),
      (["tropical_capasity"], "did you mean tropical_capacity"),
      (["--seeds=0", "tropical_capacity"], "seeds"),
      (["--stepz=3"], "did you mean --steps"),
      (["tropical_capacity", "--json=/nowhere/at/all.json"], "does not exist"),
    ],
  )
  def test_mistakes_get_an_error_and_a_fix(self, args, part, capsys):
    assert program(*args) == 2
    err = capsys.readouterr().err
    assert part in err
    assert "fix:" in err

  def test_run_prints_and_writes(self, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(EXPERIMENTS, "toy", toy(arms=(Arm("softmax", "standard"), Arm("gates", "standard"))))
    path = tmp_path / "toy.json"
    assert program("toy", "--seeds=1", "--steps=2", f"--json={path}") == 0
    assert "predictions" in capsys.readouterr().out
    data = json.loads(path.read_text())
    assert data["settings"]["steps"] == 2
    assert {cell["arm"] for cell in data["cells"]} == {"softmax", "gates"}
    # The same model twice on the same seed: the harness itself adds no difference.
    assert data["cells"][0]["scores"] == data["cells"][1]["scores"]


def test_unequal_parameters_are_said():
  cells = [Cell("t", "a", "standard", 1, 1000, 1.0), Cell("t", "b", "standard", 1, 1015, 1.0)]
  assert report._notes(cells) == []
  cells[1].parameters = 1030
  assert "b has +3.0% parameters" in report._notes(cells)[0]
