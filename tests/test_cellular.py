"""Cellular automata: known rows, initial weights of unchanged variance, degenerate rules, and the flags."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import cellular
from mgr_jax.config import GPTConfig
from mgr_jax.data import parquet
from mgr_jax.model import gpt
from mgr_jax.model.cellular_init import cellular_problems, cellular_specs
from mgr_jax.params import init_params, leaf_names
from mgr_jax.problems import UserError
from mgr_jax.step import init_key
from train import loop
from train.flags import Settings, setting_problems
from train.plan import make_plan
from train.runs import load_run

CFG = GPTConfig(vocab_size=64, seq_len=8, n_layer=2, n_head=4, n_kv_head=2, n_embd=128)
# Rows of rule 30 below a single cell, read as binary numbers.
RULE_30 = (1, 7, 25, 111, 401, 1783, 6409, 28479, 102849, 456263)


def numbers(rows) -> tuple[int, ...]:
  """The row after n steps spans 2n+1 cells around the middle: that part as a binary number."""
  middle = rows.shape[1] // 2
  text = lambda n, row: "".join(str(int(x)) for x in row[middle - n : middle + n + 1])
  return tuple(int(text(n, row), 2) for n, row in enumerate(np.asarray(rows)))


def by_table(rule: int, row, rows: int, border: str):
  """The definition, cell by cell."""
  found, row = [], list(row)
  for _ in range(rows):
    found.append(row)
    ends = (row[-1], row[0]) if border == "periodic" else (0, 0)
    wide = [ends[0], *row, ends[1]]
    row = [rule >> (4 * wide[i] + 2 * wide[i + 1] + wide[i + 2]) & 1 for i in range(len(row))]
  return np.array(found)


@pytest.mark.parametrize("border", cellular.BORDERS)
def test_rule_30_below_a_single_cell(border):
  first = (jnp.arange(41) == 20).astype(jnp.int32)
  assert numbers(cellular.evolve(30, first, len(RULE_30), border)) == RULE_30
  assert numbers(cellular.evolve(86, first, len(RULE_30), border)) != RULE_30, "its mirror image is another rule"


@pytest.mark.parametrize("rule", [30, 110, 45])
@pytest.mark.parametrize("border", cellular.BORDERS)
def test_rows_follow_the_rule_up_to_the_border(rule, border):
  first = np.random.default_rng(0).integers(0, 2, 19)
  other = {"periodic": "dead", "dead": "periodic"}[border]
  got = cellular.evolve(rule, first, 12, border)
  np.testing.assert_array_equal(got, by_table(rule, first, 12, border))
  assert np.any(np.asarray(got) != by_table(rule, first, 12, other))


def test_no_such_rule_or_border():
  with pytest.raises(ValueError, match="rule=256 is outside 0 to 255"):
    cellular.evolve(256, jnp.zeros(8, jnp.int32), 2)
  with pytest.raises(ValueError, match="border='open' is not one of periodic, dead"):
    cellular.evolve(30, jnp.zeros(8, jnp.int32), 2, "open")


def test_a_pattern_has_mean_0_and_variance_1_and_two_values(key):
  drawn = np.asarray(cellular.pattern(key, 30, (37, 41)))
  assert drawn.shape == (37, 41)
  assert abs(np.mean(drawn)) < 1e-6
  assert np.std(drawn) == pytest.approx(1, abs=1e-5)
  assert len(np.unique(drawn)) == 2
  assert len(np.unique(cellular.pattern(key, 0, (64, 64))[1:])) == 1, "rule 0 leaves nothing below its first row"


def test_monotony_tells_rules_apart(key):
  found = {rule: float(cellular.monotony(key, rule, 4096)) for rule in (30, 110, 0, 255, 204, 51)}
  assert max(found[30], found[110]) < 0.7
  assert min(found[0], found[255], found[204], found[51]) > 0.95


@pytest.fixture(scope="module")
def drawn():
  """The ordinary parameters and those of several shares of rule 30, each flat by name."""
  specs = gpt.specs(CFG)

  @jax.jit
  def draw(key):
    tables = [specs, *(cellular_specs(specs, 30, alpha) for alpha in (0.0, 0.3, 1.0))]
    return [init_params(key, table) for table in tables]

  named = lambda tree: dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
  return [named(tree) for tree in jax.device_get(draw(jax.random.key(0)))]


def test_weights_keep_mean_and_deviation(drawn):
  ordinary, *shares = drawn
  specs = dict(zip(leaf_names(gpt.specs(CFG)), jax.tree.leaves(gpt.specs(CFG), is_leaf=gpt.is_spec), strict=True))
  matrices = [name for name in ordinary if name.rsplit("/")[-1] in ("wq", "wk", "wv", "w_in")]
  assert len(matrices) == 4
  for name in matrices:
    std = specs[name].normal_std
    for params in shares:
      assert abs(np.mean(params[name])) < 0.02 * std
      assert np.std(params[name]) == pytest.approx(std, rel=0.02)
    cells = shares[2][name]
    linear = 0.3 * cells + 0.7 * ordinary[name]
    assert np.std(linear) < 0.8 * std, "weights that add up to 1 lose variance"
    np.testing.assert_allclose(shares[1][name], 0.3**0.5 * cells + 0.7**0.5 * ordinary[name], atol=1e-6)
    assert all(len(np.unique(layer.round(5))) == 2 for layer in cells)
    assert np.mean(cells[0].round(4) != cells[1].round(4)) > 0.3, "layers differ"


def test_all_other_weights_are_the_ordinary_ones(drawn):
  ordinary, none, some, _ = drawn
  for name, value in ordinary.items():
    np.testing.assert_allclose(none[name], value, atol=1e-7)
    same = np.array_equal(some[name], value)
    assert same == (name.rsplit("/")[-1] in ("embed", "head", "wo", "w_out"))


def test_a_degenerate_rule_is_named_with_its_seed():
  specs = gpt.specs(CFG)
  assert not cellular_problems(init_key(3), specs, 30, 3)
  for rule in (0, 204):
    (problem,) = cellular_problems(init_key(3), specs, rule, 3)
    assert f"--ca_rule={rule} with --seed=3 is degenerate" in problem.error
    assert "runs/0/" in problem.error
    assert "--ca_rule=30" in problem.fix
  (problem,) = cellular_problems(init_key(3), {"head": specs["head"]}, 30, 3)
  assert "has no effect" in problem.error


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ({"ca_rule": "256"}, "--ca_rule=256 is not none or a rule from 0 to 255"),
    ({"ca_rule": "life"}, "--ca_rule=life is not none or a rule"),
    ({"ca_rule": "30", "ca_alpha": 1.5}, "--ca_alpha=1.5 is outside 0 to 1"),
    ({"ca_rule": "30", "ca_alpha": float("nan")}, "--ca_alpha=nan is outside"),
    ({"ca_alpha": 0.5}, "--ca_alpha has no effect: --ca_rule=none"),
    ({"ca_rule": "30", "ca_alpha": 0.0}, "--ca_rule has no effect: --ca_alpha=0"),
  ],
)
def test_flags_are_checked(flags, said):
  (problem,) = setting_problems(Settings(**flags))
  assert said in problem.error
  assert problem.fix
  assert not setting_problems(Settings(ca_rule="30", ca_alpha=0.5))


def test_a_run_starts_from_the_automaton_and_only_it_resumes(tmp_path):
  texts = [f"a line of text, number {i}, and a few more words." for i in range(40)]
  for number, part in enumerate((texts[:30], texts[30:])):
    parquet.write_shard(tmp_path / f"shard_0000{number}.parquet", part, 8)
  shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16, "batch_size": 2}
  quiet = {"val_every": -1, "sample_every": -1, "certify": "off", "progress": "none"}
  where = {"data": str(tmp_path), "tokenizer": "bytes", "workdir": str(tmp_path / "runs"), "run_id": "a"}
  settings = Settings(**shape, **quiet, **where, max_steps=1, lr_scale=1e-9, ca_rule="30")
  assert loop.run(settings).status == "finished"
  params = load_run("a", settings.workdir).params
  assert len(np.unique(np.asarray(params["runs"][0]["mlp"]["w_in"]).round(4))) == 2
  with pytest.raises(UserError, match="ca_rule: 30 -> 110"):
    loop.run(dataclasses.replace(settings, ca_rule="110", max_steps=2))
  with pytest.raises(UserError, match="--ca_rule=0 with --seed=42 is degenerate"):
    make_plan(dataclasses.replace(settings, ca_rule="0", run_id="b"))
