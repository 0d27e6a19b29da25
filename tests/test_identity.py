"""What a checkpoint says of its run, and which runs may continue it."""

import dataclasses
import json

import pytest

from tests.test_checkpoint import CFG, make_tokenizer, meta_of
from train import flags
from train.identity import MAY_DIFFER, compare_meta, make_meta, tree_problems


def test_only_twenty_leaves_are_listed():
  saved = {f"params/{i}": "float32[1]" for i in range(30)}
  (problem,) = tree_problems(saved, {}, "here")
  assert problem.error.count("unexpected") == 20
  assert "and 10 more" in problem.error
  assert tree_problems(saved, dict(saved), "here") == []


def test_equal_runs_have_no_problem_and_json_changes_nothing():
  saved = json.loads(json.dumps(meta_of(sample_prompt=("a",))))
  assert compare_meta(saved, meta_of(sample_prompt=("a",))) == []
  moved = meta_of() | {"packages": {}, "device_count": 8, "backend": "tpu", "lineage": ["x"]}
  assert compare_meta(saved, moved | {"flags": saved["flags"]}) == []


def test_every_changed_setting_is_listed():
  now = meta_of(dataclasses.replace(CFG, n_layer=3, n_embd=32), n_layer=3, matrix_lr=0.01, doc_mask=True, rank=8)
  (problem,) = compare_meta(meta_of(), now)
  for line in ("n_layer: 2 -> 3", "n_embd: 16 -> 32", "matrix_lr: 0.003 -> 0.01", "rank: absent -> 8"):
    assert f"\n    {line}" in problem.error
  assert problem.error.count("n_layer") == 1
  for part in ("--n_layer=2", "--matrix_lr=0.003", "--resume_strict=false"):
    assert part in problem.fix
  assert compare_meta(meta_of(), now, strict=False) == []


def test_two_ways_to_say_the_same_are_no_difference():
  assert compare_meta(meta_of(n_kv_head=0), meta_of(n_kv_head=2)) == []


@pytest.mark.parametrize("name", sorted(MAY_DIFFER))
def test_settings_that_may_differ(name):
  assert compare_meta(meta_of(**{name: 1}), meta_of(**{name: 2})) == []


def test_no_setting_of_optimizer_or_schedule_may_differ():
  parts = {name: field.metadata["part"] for name, field in flags.FIELDS.items()}
  assert [name for name in MAY_DIFFER if parts.get(name)] == []
  assert "optimizer" in parts.values()


@pytest.mark.parametrize(
  ("key", "now", "parts"),
  [
    ("tokenizer_sha256", "e" * 64, ("the tokenizer", make_tokenizer().sha256, "e" * 64, "--tokenizer")),
    ("data_sha256", "f" * 64, ("the data", "d" * 64, "f" * 64, "--data")),
    ("data_shards", 4, ("from 1 data shards, now there are 4", "--data_shards=1")),
  ],
)
def test_another_tokenizer_data_or_number_of_shards(key, now, parts):
  (problem,) = compare_meta(meta_of(), meta_of() | {key: now})
  for part in (*parts, "--resume_strict=false"):
    assert part in str(problem)
  assert compare_meta(meta_of(), meta_of() | {key: now}, strict=False) == []


def test_lineage_is_the_line_of_runs():
  meta = make_meta(CFG, {}, tokenizer_sha256="", data_sha256="", run_id="b", lineage=("a",))
  assert meta["lineage"] == ["a", "b"]
  assert {"jax", "orbax-checkpoint", "python"} <= set(meta["packages"])
