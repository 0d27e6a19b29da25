"""Finding and loading trained runs."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.data import tokenizer as tokenizers
from mgr_jax.model import gpt
from mgr_jax.params import is_spec
from tests.test_checkpoint import CFG, DATA, make_state, make_tokenizer, meta_of, refusal, same
from train.checkpoint import Checkpoints
from train.runs import find_run, load_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Runs `good` with steps 1 and 2, and `empty` without a checkpoint."""
  workdir = tmp_path_factory.mktemp("artifacts")
  checkpoints = Checkpoints(workdir / "good" / "checkpoints")
  for step in (1, 2):
    checkpoints.save(step, make_state(step, model_params(step)), DATA, meta_of())
  checkpoints.close()
  tokenizers.save(make_tokenizer(), workdir / "good" / "tokenizer.json")
  (workdir / "empty" / "checkpoints").mkdir(parents=True)
  return workdir


def model_params(step: int):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), gpt.specs(CFG), is_leaf=is_spec)


def test_load_run_needs_the_directory_alone(workdir):
  run = load_run("good", workdir)
  assert (run.cfg, run.step, run.meta["lineage"]) == (CFG, 2, ["first"])
  assert same(run.params, jax.tree.map(jnp.asarray, model_params(2)))
  assert run.tokenizer.sha256 == make_tokenizer().sha256
  assert load_run("good@1", workdir).step == 1
  assert same(load_run(workdir / "good").params, run.params)
  assert same(load_run(f"{workdir / 'good'}@1").params, jax.tree.map(jnp.asarray, model_params(1)))


def test_find_run(workdir):
  assert find_run("good@2", workdir) == (workdir / "good", 2)
  assert find_run(workdir / "good", "elsewhere") == (workdir / "good", None)
  message = refusal(find_run, "god", workdir)
  for part in ("no run 'god'", "did you mean good?", "empty", str(workdir)):
    assert part in message
  assert "'good@last'" in refusal(find_run, "good@last", workdir)
  assert "train one first" in refusal(find_run, "good", workdir / "nowhere")


def test_a_run_without_checkpoint_or_step(workdir):
  assert "no finished checkpoint" in refusal(load_run, "empty", workdir)
  assert "use one of 1, 2" in refusal(load_run, "good@3", workdir)


@pytest.fixture
def copy(workdir, tmp_path):
  shutil.copytree(workdir / "good", tmp_path / "copy")
  return tmp_path / "copy"


def test_the_tokenizer_must_be_the_one_trained_with(copy):
  other = tokenizers.train_bpe(["to be or not to be"] * 4, 300)
  tokenizers.save(other, copy / "tokenizer.json")
  message = refusal(load_run, copy)
  for part in (other.sha256, make_tokenizer().sha256, str(other.vocab_size), "265 ids"):
    assert part in message
  (copy / "tokenizer.json").unlink()
  message = refusal(load_run, copy)
  assert "has no tokenizer.json" in message
  assert make_tokenizer().sha256 in message


def test_a_tokenizer_larger_than_the_model_does_not_fit(tmp_path):
  cfg = dataclasses.replace(CFG, vocab_size=64)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(1, make_state(1), DATA, meta_of(cfg))
  checkpoints.close()
  tokenizers.save(make_tokenizer(), tmp_path / "tokenizer.json")
  message = refusal(load_run, tmp_path)
  assert "ids up to 264" in message
  assert "ids up to 63" in message


def test_a_model_of_another_version(tmp_path):
  meta = meta_of()
  meta["model"]["moon_phase"] = 3
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(1, make_state(1), DATA, meta)
  checkpoints.close()
  message = refusal(load_run, tmp_path)
  assert "moon_phase" in message
  assert "the version that trained it" in message
