"""Options that change during training: their courses, the values in the training state, and configurations without."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax import homotopy
from mgr_jax.attention import REGISTRY, resolve
from mgr_jax.attention.mechanism import qkv_mechanism
from mgr_jax.config import GPTConfig
from mgr_jax.flops import Cost
from mgr_jax.model import annealing, gpt, stack
from mgr_jax.optim import make_optimizer
from mgr_jax.schedules import make_schedule
from mgr_jax.step import init_train_state, make_train_step
from train.flags import Settings
from train.loop import run
from train.metrics import read_records
from train.runs import load_run

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Options:
  """`beta` scales the values; `none` stands for 3."""

  beta: str = "none"
  final: str = "hold"
  impl: str = "auto"


def course(opts):
  return homotopy.parse("3" if opts.beta == "none" else opts.beta)


def scaled(v, ctx, opts):
  return ctx.annealed.get("beta", course(opts).start) * v, {"coverage": jnp.float32(1.0)}


TOY = qkv_mechanism(
  name="toy",
  options=Options,
  mix=lambda q, k, v, params, ctx, cfg, opts: scaled(v, ctx, opts),
  mix_cached=lambda q, k, v, params, ctx, cfg, opts: jnp.zeros_like(q),
  mix_cost=lambda cfg, opts, T: Cost(),
  annealed=lambda opts: {} if course(opts).is_constant else {"beta": course(opts)},
  snapped=lambda opts: dataclasses.replace(opts, beta="none", final="hold") if opts.final == "snap" else opts,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
  monkeypatch.setitem(REGISTRY, "toy", TOY)


def config(attention, n_layer=2):
  return GPTConfig(vocab_size=64, seq_len=8, n_layer=n_layer, n_head=2, n_kv_head=2, n_embd=8, attention=attention)


class TestCourses:
  @pytest.mark.parametrize(
    ("text", "want"), [("linear:1:3", np.linspace(1, 3, STEPS)), ("exp:2:32", np.geomspace(2, 32, STEPS)), ("8", 8)]
  )
  def test_open_loops_run_from_the_first_to_the_last_value(self, text, want):
    h = homotopy.parse(text)
    values = [homotopy.init(h)]
    for step in range(STEPS - 1):
      values.append(homotopy.update(h, values[-1], jnp.int32(step), STEPS, jnp.nan, False))
    np.testing.assert_allclose(values, np.broadcast_to(want, STEPS), rtol=1e-5)
    assert homotopy.update(h, values[-1], jnp.int32(10 * STEPS), STEPS, jnp.nan, False) == values[-1]

  def test_the_closed_loop_rises_only_above_the_floor_and_stays_in_its_bounds(self):
    h = homotopy.parse("coverage:1:4:0.5")
    rng = np.random.default_rng(0)
    value = homotopy.init(h)
    for reading in rng.choice([math.nan, 0.2, 0.5, 0.9], 300):
      new = homotopy.update(h, value, 0, STEPS, jnp.float32(reading), False)
      assert 1 <= new <= 4
      assert not new > value or reading >= 0.5
      assert not math.isnan(reading) or new == value
      value = new
    for _ in range(100):
      value = homotopy.update(h, value, 0, STEPS, jnp.float32(1.0), False)
    assert value == 4

  def test_time_at_the_floor_balances_the_two_factors(self):
    """A reading that is covered exactly when the value is small settles where rises and falls cancel."""
    h, rises = homotopy.parse("coverage:1:1000:0.5"), 0
    value = jnp.float32(10.0)
    for _ in range(2000):
      new = homotopy.update(h, value, 0, STEPS, jnp.where(value < 20, 1.0, 0.0), False)
      rises, value = rises + bool(new > value), new
    assert rises / 2000 == pytest.approx(math.log(1.05) / (math.log(1.02) + math.log(1.05)), abs=0.02)

  def test_the_ladder_climbs_at_limit_events_alone(self):
    h = homotopy.parse("ordinal:1:10")
    values = [homotopy.init(h)]
    for event in (False, True, False, True, True, True, True):
      values.append(homotopy.update(h, values[-1], 0, STEPS, jnp.nan, event))
    assert [float(v) for v in values] == [1, 1, 2, 2, 4, 8, 10, 10]

  @pytest.mark.parametrize(
    ("text", "part"),
    [
      ("exp:1", "takes 2 numbers"),
      ("exp", "not a number"),
      ("-1", "not positive"),
      ("inf", "not positive and finite"),
      ("coverage:4:1:0.5", "below the first"),
      ("coverage:1:4:1", "outside (0, 1)"),
      ("cosine:1:4", "not one of linear"),
    ],
  )
  def test_what_cannot_be_parsed_is_refused(self, text, part):
    with pytest.raises(ValueError) as e:
      homotopy.parse(text)
    assert part in str(e.value)


class TestValuesReachTheirLayers:
  CFG = config("toy(beta=exp:1:64)*2,toy,toy(beta=linear:5:6)", n_layer=4)

  def outputs(self, cfg, annealed):
    """Every layer's output for a one-hot input, by the size of what it adds."""
    params = jax.tree.map(jnp.ones_like, gpt.init(jax.random.key(0), cfg)["runs"])
    added = []
    for layers, tree in zip(stack.runs(cfg), params, strict=True):
      ctx = stack._context_of(layers, gpt.context(jnp.arange(1)[None, :], cfg, annealed=annealed))
      first = jax.tree.map(lambda a: a[0], tree["attention"])
      y, _ = layers.mechanism.apply(first, jnp.ones((1, 1, 8)), ctx, cfg, layers.options)
      added.append(float(y[0, 0, 0]) / 64)
    return added

  def test_each_run_sees_its_own_value(self):
    values = annealing.init(self.CFG)
    assert len(values) == 2
    moved = {key: 10.0 * value for key, value in values.items()}
    assert self.outputs(self.CFG, {}) == [1, 3, 5]
    assert self.outputs(self.CFG, moved) == [10, 3, 50]

  def test_frozen_means_the_same_without_values(self):
    values = {key: np.float32(value / 3) for key, value in annealing.init(self.CFG).items()}
    frozen = annealing.frozen(self.CFG, values)
    assert frozen.attention == "toy(beta=0.33333334)*2,toy,toy(beta=1.6666666)"
    assert not annealing.courses(frozen)
    assert self.outputs(frozen, {}) == self.outputs(self.CFG, values)

  def test_snapped_options_hold_at_the_end(self):
    cfg = config("toy(beta=exp:1:2,final=snap),standard")
    assert annealing.snapped(cfg).attention == "toy,standard"
    assert annealing.snap_step(cfg, 200) == 190
    assert annealing.snap_step(cfg, 4) == 3
    assert annealing.snapped(self.CFG) is self.CFG
    assert annealing.snap_step(self.CFG, 200) == 200

  def test_contradictions_are_named(self):
    problem = lambda text, schedule="wsd": [p.error for p in annealing.problems(config(text), schedule)]
    assert problem("toy(beta=exp:1:2)") == []
    assert "--schedule=wsd" in problem("toy(beta=ordinal:1:2)")[0]
    assert problem("toy(beta=ordinal:1:2)", "ordinal") == []
    assert "differ only in the course" in problem("toy(beta=exp:1:2),toy(beta=exp:1:4)")[0]

  def test_rewritten_options_keep_their_types(self):
    cfg = config("standard(qk_norm=false,window=4),toy(beta=exp:1:2)")
    frozen = annealing.frozen(cfg, annealing.init(cfg))
    assert resolve(frozen)[0].options == resolve(cfg)[0].options


def test_a_step_moves_the_values_and_reports_those_it_used():
  cfg = config("toy(beta=linear:1:3),toy(beta=coverage:1:9:0.5)")
  optimizer = make_optimizer("adamw", gpt.specs(cfg), cfg)
  schedule = make_schedule("constant", 3)
  state = init_train_state(cfg, optimizer, schedule, 0)
  step = make_train_step(cfg, optimizer, schedule, total_steps=3, grad_accum=2)
  batch = {name: jnp.zeros((4, 8), jnp.int32) for name in ("tokens", "targets")}
  used = []
  for _ in range(3):
    state, metrics = step(state, batch)
    used.append([float(v) for _, v in sorted(metrics["annealed"].items(), reverse=True)])
  np.testing.assert_allclose(used, [[1, 1], [2, 1.02], [3, 1.02**2]], rtol=1e-6)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  data = tmp_path_factory.mktemp("data")
  import pyarrow as pa
  import pyarrow.parquet as pq

  for name in ("a", "b"):
    pq.write_table(pa.table({"text": [f"{name} {i} some text " * 20 for i in range(50)]}), data / f"{name}.parquet")
  return Settings(
    attention="toy(beta=exp:1:64,final=snap)",
    n_layer=2, n_head=2, n_embd=16, seq_len=16, batch_size=2, max_steps=STEPS, data=str(data), tokenizer="bytes",
    certify="off", progress="none", log_every=1, ckpt_every=6, probe_every=7, sample_every=-1, val_tokens=64,
    workdir=str(tmp_path_factory.mktemp("runs")), run_id="whole",
  )  # fmt: skip


def test_a_run_logs_probes_snaps_and_loads_without_a_schedule(settings):
  result = run(settings)
  records = read_records(result.directory / "metrics.jsonl")
  key = "toy.beta:exp:1.0:64.0:0.0"
  logged = {r["step"]: r.get(key) for r in records if "loss" in r}
  assert logged[1] == 1
  assert logged[10] == pytest.approx(64 ** (9 / 19), rel=1e-4)
  assert logged[20] is None, "snapped"
  assert [r["step"] for r in records if r.get("event") == "snap"] == [19]
  probes = [r for r in records if r.get("event") == "probe"]
  assert [r["step"] for r in probes] == [7, 14]
  norms = probes[0]["diagnostics"]["grad_norm/runs/0/attention/wv"]
  assert len(norms) == 2
  assert min(norms) > 0
  assert result.summary["results"]["aux"] == probes[1]["diagnostics"]
  assert load_run(result.directory).cfg.attention == "toy"
  loaded = load_run(f"{result.directory}@18").cfg.attention
  assert float(loaded.partition("beta=")[2].partition(",")[0]) == pytest.approx(64 ** (18 / 19), rel=1e-4)


def test_values_survive_an_interruption_bitwise(settings):
  whole = run(settings)
  records = lambda result: [r["loss"] for r in read_records(result.directory / "metrics.jsonl") if "loss" in r]
  first = dataclasses.replace(settings, run_id="split", max_seconds=1e-9)
  assert run(first).status == "stopped_time"
  second = run(dataclasses.replace(first, max_seconds=0.0))
  assert second.status == "finished"
  assert records(second) == records(whole)
  assert json.loads((second.directory / "summary.json").read_text())["status"] == "finished"


def test_an_ordinal_run_logs_what_it_does(settings, capsys):
  """The rate that is logged is the one that updates see: it falls when the schedule says so and comes back."""
  ordinal = {"schedule": "ordinal", "ord_patience": 1, "ord_levels": 1, "ord_restarts": 1, "lr_warmup_steps": 0}
  ordinal |= {"attention": "toy(beta=ordinal:1:64)", "optimizer": "muon", "optimizer_stats": True, "lr_scale": 1e-6}
  quiet = {"ckpt_every": 0, "probe_every": 0, "progress": "plain", "run_id": "ordinal"}
  # Hardly moving parameters never improve on their first loss.
  still = dataclasses.replace(settings, **ordinal, **quiet)
  result = run(still)
  rows = [r for r in read_records(result.directory / "metrics.jsonl") if "loss" in r]
  rates = [r["lr"] for r in rows]
  events = {e["step"]: e["what"] for e in result.summary["results"]["schedule_events"]}
  anneal, restart = (next(step for step, what in events.items() if what == name) for name in ("anneal", "restart"))
  assert rates[anneal - 1] == pytest.approx(0.5 * rates[anneal - 2])
  assert rates[restart - 1] == pytest.approx(rates[0]) == pytest.approx(0.02 * 1e-6, rel=1e-6)
  assert [r["ord/a"] for r in rows] == sorted((r["ord/a"] for r in rows), reverse=True)
  # The live value doubles at limit events, from the next step on.
  beta = [r["toy.beta:ordinal:1.0:64.0:0.0"] for r in rows]
  assert [after / before for before, after in itertools.pairwise(beta)].count(2.0) == sum(
    what in ("anneal", "restart") for step, what in events.items() if step < len(rows)
  )
  assert rows[-1]["ord/done"] == ("exhausted" in events.values())
  # Behind a zero head hidden matrices have no gradient at first.
  assert rows[0]["update_norm/matrix"] == 0
  assert all(r["update_norm/matrix"] > 0 and abs(r["cosine/matrix"]) < 1.001 for r in rows[2:])
  assert f"| {anneal} | anneal |" in (result.directory / "run.md").read_text()
  patient = dataclasses.replace(still, ord_patience=50, run_id="patient")
  run(patient)
  said = capsys.readouterr().out
  assert "the ordinal schedule changed nothing: --ord_patience=50\n    fix: --ord_patience=" in said
