"""Races of optimizers and schedules: targets, verdicts, flags; the runs themselves are in their own files."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from mgr_jax import optim, params
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt
from mgr_jax.problems import UserError
from mgr_jax.schedules import make_schedule
from mgr_jax.step import init_train_state, make_train_step, optimizer_flops
from train import bench, cli
from train.experiments.verdict import INCONCLUSIVE, REFUTED, SUPPORTED
from train.races import language, program, step_cost


def race(**finals):
  """Judged synthetic curves: every arm falls in a line from 4 to its own loss after 100 steps; seeds differ."""
  size = language.default_size(100)
  steps = np.arange(1, 101, dtype=np.float64)[size.every - 1 :: size.every]
  rows = {}
  for name, final in finals.items():
    curves = [(4 - (4 - final) * steps / 100 + 0.01 * seed).tolist() for seed in range(3)]
    rows[name] = {"curves": curves, "step_ratio": 3.0 if name == "muon" else 1.0}
  return language.judged(rows, size)


def words(result) -> dict[str, str]:
  return {v["claim"].removesuffix(" than adamw"): v["word"] for v in result["verdicts"]}


def test_fewer_steps_may_cost_more_seconds():
  result = race(adamw=2.0, muon=1.0, sgd=3.5)
  assert result["target"] == pytest.approx(3.02, abs=0.05)
  assert words(result) == {
    "muon needs fewer steps": SUPPORTED,
    "muon needs fewer seconds": REFUTED,
    "muon ends at a lower loss": SUPPORTED,
    "sgd needs fewer steps": REFUTED,
    "sgd needs fewer seconds": REFUTED,
    "sgd ends at a lower loss": REFUTED,
  }
  assert all(math.isinf(s) for s in result["steps_to_target"]["sgd"])


def test_equal_arms_are_inconclusive():
  assert set(words(race(adamw=2.0, hoss=2.0)).values()) == {INCONCLUSIVE}


def test_first_validation_at_the_target_counts():
  curves = np.array([[3.0, 2.0, 1.0, 0.5], [3.0, 3.0, 3.0, 3.0]])
  assert language._steps_to(curves, 1.0, 10) == [30.0, math.inf]


def test_counted_costs():
  cfg = language.default_size(10).cfg
  counted = {arm: optimizer_flops(name, cfg, 8, **settings) for arm, (name, settings) in step_cost.ARMS.items()}
  assert counted["adamw"] == counted["sgd"] == 0
  # A single row cannot be divided: curvature of 1/100 of the batch costs that of one row.
  assert optimizer_flops("hoss", cfg, 8, hoss_hvp_frac=0.01) == counted["hoss, 1/8 of the batch"]
  assert 0 < counted["muon"] < counted["hoss, 1/8 of the batch"] < counted["hoss"] < counted["hoss, hessian"]


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_a_hoss_step_multiplies_what_was_counted(kind):
  """Traced, not timed: affine in the rank, and within 15% of the count."""
  cfg = dataclasses.replace(language.default_size(10).cfg, vocab_size=1024)
  batch = {name: np.zeros((8, cfg.seq_len), np.int32) for name in ("tokens", "targets")}
  schedule = make_schedule("constant", 10)

  def traced(rank: int) -> float:
    optimizer = optim.make_optimizer("hoss", gpt.specs(cfg), cfg, hoss_rank=rank)
    step = make_train_step(cfg, optimizer, schedule, products=optim.Curvature(kind, 0.25))
    return matmul_flops(step, jax.eval_shape(lambda: init_train_state(cfg, optimizer, schedule, 0)), batch)

  plain = optim.make_optimizer("adamw", gpt.specs(cfg), cfg)
  state = jax.eval_shape(lambda: init_train_state(cfg, plain, schedule, 0))
  gradient = matmul_flops(make_train_step(cfg, plain, schedule), state, batch)
  flops = {rank: traced(rank) - gradient for rank in (1, 2, 5)}
  # The passes over the basis, 4·r² vectors, are products as well, of a size that does not depend on the batch.
  passes = lambda rank: 2 * params.count(gpt.specs(cfg)) * 4 * rank**2
  net = {rank: flops[rank] - passes(rank) for rank in flops}
  slope = net[2] - net[1]
  assert (net[5] - net[2]) / 3 == pytest.approx(slope, rel=0.05)
  assert slope <= 3.3 * 0.25 * gradient
  counted = {
    rank: optim.flops("hoss", gpt.specs(cfg), gradient, hoss_curvature=kind, hoss_rank=rank) for rank in (1, 5)
  }
  assert net[5] == pytest.approx(counted[5], rel=0.15)
  assert net[5] != pytest.approx(counted[1], rel=0.15)


@pytest.mark.parametrize("name", program.RACES)
def test_flags_of_every_race(name):
  _, fv = bench.program(["bench", name])
  assert set(program.RACES[name].flags) | {"json"} <= set(fv)


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (("optimizers", "--arms=mun"), ("unknown arm 'mun'", "did you mean muon?")),
    (("optimizers", "--seeds=1"), ("seeds",)),
    (("step", "--n_head=5"), ("--n_embd=128", "--n_head=5")),
    (("stiff", "--json=nowhere/x.json"), ("its folder does not exist",)),
  ],
)
def test_mistakes(arguments, parts, capsys):
  main, fv = bench.program(["bench", *arguments])
  assert cli.execute(main, ["bench", *arguments], fv, max_args=1) == 2
  said = capsys.readouterr().err
  assert all(part in said for part in parts), said
  assert "Traceback" not in said


def test_unknown_benchmark():
  with pytest.raises(UserError, match=r"speed one of dominance, throughput, overhead, optimizers, step, stiff, regime"):
    bench.main(["bench", "race"])
