"""The dominance benchmark: systems, held-out documents, branches that equal shorter runs, masks, and the program."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.data import parquet, tokenizer
from mgr_jax.data.corpus import load_corpus
from mgr_jax.problems import UserError
from train import bench, cli
from train.dominance import ablate, claims, documents, program, systems
from train.dominance.systems import Recipe, recipes, shrunk
from train.dominance.training import Setting, Trainer

TOK = tokenizer.bytes_tokenizer()
FIELDS = {"vocab_size": TOK.vocab_size, "seq_len": 16, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
WORDS = ["tropical", "braid", "octonion", "simplex", "fractal", "surreal", "gauge", "ordinal"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(WORDS, int(rng.integers(2, 30)))) + f" {i}." for i in range(600)]
  parquet.write_shard(directory / "shard_00000.parquet", texts[:580], 32)
  parquet.write_shard(directory / "shard_00001.parquet", texts[580:], 32)
  return directory


def run(*args):
  return cli.execute(program.main, ["bench", "dominance", *args], program.FLAGS, max_args=1)


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


def test_systems_divide_one_axis_and_keep_the_size_of_heads():
  found, problems = recipes(FIELDS, systems.AXES, quarters=True)
  assert not problems
  by_name = {name: (recipe.cfg, share) for recipe in found for name, share in recipe.systems.items()}
  assert set(by_name) == {
    *("full", "depth/2", "depth/4", "width/2", "width/4", "data/2", "data/4"),
    *("depth/2 width/2", "data/2 depth/2", "data/2 width/2"),
  }
  assert {cfg.head_dim for cfg, _ in by_name.values()} == {8}
  assert by_name["width/4"][0].n_head == 1 and by_name["depth/4"][0].n_layer == 1
  assert by_name["data/4"] == (by_name["full"][0], 0.25)
  grouped = shrunk(FIELDS, "width", 2)
  assert (grouped["n_head"], grouped["n_kv_head"]) == (2, 2), "query heads go before groups do"
  assert shrunk(FIELDS | {"n_kv_head": 4}, "width", 2)["n_kv_head"] == 2


def test_doubling_costs_what_the_cost_model_says():
  cfg = GPTConfig(**FIELDS | {"n_embd": 512, "n_head": 4, "n_layer": 8})
  multipliers = systems.cost_multipliers(cfg, systems.AXES)
  assert 1.9 < multipliers["depth"] < 2 == multipliers["data"]
  assert 3.7 < multipliers["width"] < 4
  branched = Recipe(cfg, {"full": 1.0, "data/2": 0.5, "data/4": 0.25})
  assert systems.relative_cost(branched, cfg, 0.2) == pytest.approx(1.15)


def test_held_out_documents_are_not_trained_on(data):
  corpus = documents.holding_out(load_corpus(data), 200)
  units = {split: corpus.units(split) for split in ("train", "val")}
  texts = {split: {text for i in range(len(u)) for text in u[i]} for split, u in units.items()}
  assert len(texts["val"]) >= 200 and not texts["val"] & texts["train"]
  read = documents.read(corpus, TOK, 200, 16)
  assert read.tokens.shape == (200, 16)
  assert read.lengths.max() == 16 and read.lengths.min() < 16, "short documents are padded"
  with pytest.raises(UserError, match="too few to hold out 500"):
    documents.holding_out(load_corpus(data), 500)


def test_a_branch_is_a_shorter_run(data):
  corpus = documents.holding_out(load_corpus(data), 200)
  cfg = GPTConfig(**FIELDS | {"n_layer": 1, "n_head": 2, "n_embd": 16})
  held_out = documents.read(corpus, TOK, 32, cfg.seq_len)
  setting = Setting(corpus, TOK, steps=20, batch_size=2, warmdown_frac=0.25, data_threads=0)
  found = Trainer(Recipe(cfg, {"full": 1.0, "data/2": 0.5}), setting, held_out).run(3).nats
  alone = Trainer(Recipe(cfg, {"full": 1.0}), setting._replace(steps=10), held_out).run(3).nats
  np.testing.assert_allclose(found["data/2"], alone["full"], rtol=1e-6)
  assert np.max(np.abs(found["full"] - alone["full"])) > 1e-2


def test_without_layers_nothing_but_the_embedding_is_left(key):
  cfg = GPTConfig(**FIELDS | {"n_layer": 2, "attention": "standard,tropical"})
  masks = ablate.Masks(jnp.zeros(2), jnp.ones(4), jnp.ones(cfg.mlp_dim))
  params = ablate.gpt.init(key, cfg)
  params = jax.tree.map(lambda p: p + 0.1, params)
  runs = ablate.masked(params, masks, cfg)["runs"]
  assert len(runs) == 2
  for tree in runs:
    assert not np.any(tree["attention"]["wo"]) and not np.any(tree["mlp"]["w_out"])
    assert np.all(tree["attention"]["wq"])


def test_random_halves_are_halves_of_every_group():
  cfg = GPTConfig(**FIELDS)
  halves = ablate.half_masks(cfg, np.random.default_rng(0), 5)
  assert np.all(halves["depth"].layer.sum(-1) == 2) and np.all(halves["depth"].head == 1)
  assert np.all(halves["width"].head.reshape(5, 2, 2).sum(-1) == 1), "one query head of each group of two"
  np.testing.assert_allclose(halves["width rescaled"].hidden.mean(-1), 1)
  assert len({tuple(row) for row in halves["width"].hidden}) == 5


def test_models_that_cannot_be_masked_say_why():
  cfg = GPTConfig(**FIELDS)
  assert not ablate.problems(cfg)
  assert "not linear" in ablate.problems(dataclasses.replace(cfg, mlp="tropical"))[0].error
  assert "no plain matrix wo" in ablate.problems(dataclasses.replace(cfg, attention="surreal"))[0].error
  assert "also have mix" in ablate.problems(dataclasses.replace(cfg, attention="reversible(standard)"))[0].error
  assert "have no half" in ablate.problems(dataclasses.replace(cfg, n_layer=1))[0].error


TINY = ["--n_head=2", "--n_embd=16", "--seq_len=16", "--batch_size=2", "--max_steps=20", "--eval_documents=200"]


def test_ladder_prints_a_verdict_and_writes_json(data, tmp_path, capsys):
  path = tmp_path / "ladder.json"
  shape = ["--n_layer=1", "--axes=width,data", "--quarters=false", "--seeds=0,1", "--bootstrap=100"]
  assert run(*TINY, *shape, f"--data={data}", f"--json={path}") == 0
  report = json.loads(path.read_text())
  assert set(report["losses"]) == {"full", "width/2", "data/2", "data/2 width/2"}
  assert report["verdict"]["word"] in ("dominant", "balanced", "floor", "tentative")
  assert set(report["axes"]) == {"width", "data"}
  assert not report["axes"]["data"]["fitted"] and report["axes"]["data"]["low"] == 0
  assert report["kind"] == "ladder"
  out = capsys.readouterr().out
  assert "verdict: " in out and "learning rates: " in out and "not fitted: width, data" in out


def test_ablate_prints_no_verdict(data, tmp_path, capsys):
  path = tmp_path / "ablate.json"
  shape = ["--kind=ablate", "--n_layer=2", "--seeds=0", "--masks=2"]
  assert run(*TINY, *shape, f"--data={data}", f"--json={path}") == 0
  report = json.loads(path.read_text())
  assert set(report["fragility_depth"][0]) == {"raw", "raw_spread", "rescaled", "rescaled_spread"}
  assert "verdict" not in report
  assert "no verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("args", "part", "fix"),
  [
    (["--n_layer=2"], "not divisible by 4, so its quarter", "--quarters=false"),
    (["--n_layer=3", "--quarters=false"], "its half cannot be built", "--n_layer=4"),
    (["--kind=ablate", "--axes=depth,width"], "--axes has no effect with --kind=ablate", "leave it out"),
    (["--masks=4"], "--masks has no effect with --kind=ladder", "leave it out"),
    (["--kind=ablate", "--ckpt=x", "--n_layer=8"], "--n_layer has no effect with --kind=ablate with --ckpt", "leave"),
    (["--axes=depth"], "does not name two axes", "depth,width,data"),
    (["--seeds=0,0"], "no list of distinct numbers", "--seeds=0,1,2"),
    (["--attention=standart"], "did you mean standard", "fix:"),
    (["--eval_documents=10"], "fewer than 200", "--eval_documents=200"),
  ],
)
def test_mistakes_get_an_error_and_a_fix(args, part, fix, capsys, data):
  rest = [] if any(a.startswith("--ckpt") for a in args) else [f"--data={data}"]
  assert run(*args, *rest) == 2
  err = capsys.readouterr().err
  assert part in err
  assert fix in err


def test_the_benchmark_hands_over():
  assert bench.program(["bench", "--seeds=0", "dominance"]) == (program.main, program.FLAGS)
  assert bench.program(["bench", "speed"]) == (bench.main, bench.FLAGS)
