"""Checkpoints: exactness, pruning, what is refused and how it is said, and survival of kill -9."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mgr_jax.config import GPTConfig
from mgr_jax.data import tokenizer as tokenizers
from mgr_jax.problems import UserError
from mgr_jax.step import TrainState
from train.checkpoint import Checkpoints
from train.identity import make_meta

CFG = GPTConfig(vocab_size=265, seq_len=8, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
FLAGS = {"n_layer": 2, "matrix_lr": 0.003, "max_steps": 100, "n_kv_head": 0, "doc_mask": False}
DATA = {"unit": 3, "offset": 17}


def make_state(step: int, params=None) -> TrainState:
  """A state whose every leaf depends on the step; no program of its own is compiled for it."""
  rng = np.random.default_rng(step)
  if params is None:
    params = {
      "embed": rng.normal(size=(70, 50)).astype(np.float32),
      "runs": ({"w": rng.normal(size=(2, 5, 3)).astype(np.float32)},),
    }
  params = jax.tree.map(jnp.asarray, params)
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params=params,
    opt_state=(optax.ScaleByAdamState(jnp.asarray(step, jnp.int32), params, params), optax.EmptyState()),
    schedule_state={"done": jnp.asarray(step % 2 == 0), "half": jnp.asarray(rng.normal(size=4), jnp.bfloat16)},
    key=jax.random.key(step),
    tokens_seen=jnp.asarray([2**32 - 1 - step, 1], jnp.uint32),
    skipped=jnp.asarray(0, jnp.int32),
    nonfinite_streak=jnp.asarray(0, jnp.int32),
  )


def abstract(state: TrainState):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def bits(tree) -> list[bytes]:
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.asarray(jax.random.key_data(x) if is_key(x) else x).tobytes() for x in jax.tree.leaves(tree)]


def same(a, b) -> bool:
  return jax.tree.structure(a) == jax.tree.structure(b) and bits(a) == bits(b)


def make_tokenizer():
  return tokenizers.bytes_tokenizer()


def meta_of(cfg=CFG, **changes):
  given = FLAGS | changes
  return make_meta(cfg, given, tokenizer_sha256=make_tokenizer().sha256, data_sha256="d" * 64, run_id="first")


@pytest.fixture
def checkpoints(tmp_path):
  made = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
  yield made
  made.close()


@pytest.fixture
def two_steps(checkpoints):
  """Steps 1 and 2, finished."""
  for step in (1, 2):
    checkpoints.save(step, make_state(step), DATA, meta_of())
  checkpoints.wait()
  return checkpoints


def refusal(f, *args, **kwargs) -> str:
  with pytest.raises(UserError) as e:
    f(*args, **kwargs)
  assert all(p.error and p.fix for p in e.value.problems)
  return str(e.value)


# Exactness


def test_restores_every_bit_with_typed_keys(checkpoints):
  state = make_state(7)
  odd = np.array(state.params["embed"])
  odd[0, :4] = [-0.0, np.nan, np.inf, 1e-45]
  state = state.replace(params=state.params | {"embed": jnp.asarray(odd)})
  checkpoints.save(7, state, {"unit": 3, "list": [1, 2]}, meta_of(), {"val_bpb": 2.5})
  checkpoints.wait()
  assert checkpoints.failures == []
  restored, data, meta = Checkpoints(checkpoints.directory).restore(abstract(state))
  assert same(restored, state)
  assert not same(make_state(7), state)
  assert jnp.issubdtype(restored.key.dtype, jax.dtypes.prng_key)
  assert jax.random.bits(restored.key) == jax.random.bits(jax.random.key(7))
  assert data == {"unit": 3, "list": [1, 2]}
  assert meta == json.loads(json.dumps(meta_of()))
  assert Checkpoints(checkpoints.directory).read_meta() == meta


def test_a_donated_state_is_saved_as_it_was(checkpoints):
  @functools.partial(jax.jit, donate_argnums=0)
  def train(params):
    return jax.tree.map(lambda x: 1.5 * x + 1, params)

  params = {"embed": jnp.asarray(np.random.default_rng(0).normal(size=(600, 500)).astype(np.float32))}
  saved = {}
  for step in (1, 2):
    saved[step] = bits(params)
    checkpoints.save(step, make_state(step, params), DATA, meta_of())
    for _ in range(3):
      params = train(params)
  target = abstract(make_state(0, params))
  for step in (1, 2):
    checkpoints.wait()
    assert bits(checkpoints.restore(target, step)[0].params) == saved[step]
  assert saved[1] != saved[2]


def test_keeps_the_newest_and_the_best_also_after_reopening(tmp_path):
  directory = tmp_path / "checkpoints"
  for part in ({1: 3.0, 2: 1.0, 3: None, 4: float("nan")}, {5: 2.0, 6: None, 7: 1.5, 8: 2.0}):
    checkpoints = Checkpoints(directory, keep=2)
    for step, bpb in part.items():
      checkpoints.save(step, make_state(step), DATA, {}, None if bpb is None else {"val_bpb": bpb})
    checkpoints.close()
    assert checkpoints.steps() == ([2, 3, 4] if 1 in part else [2, 7, 8])
    assert checkpoints.latest_step() == max(part)


def test_keeps_the_newest_alone_when_nothing_was_validated(checkpoints):
  for step in range(1, 5):
    checkpoints.save(step, make_state(step), DATA, {})
  checkpoints.wait()
  assert checkpoints.steps() == [3, 4]


def test_a_step_is_written_once_and_none_before_the_newest(two_steps):
  before = bits(two_steps.restore(abstract(make_state(0)))[0])
  two_steps.save(2, make_state(9), DATA, meta_of())
  two_steps.wait()
  assert bits(two_steps.restore(abstract(make_state(0)))[0]) == before
  message = refusal(two_steps.save, 1, make_state(1), DATA, meta_of())
  assert "already has step 2, newer than 1" in message
  assert "--run_id" in message


# The writes of the other leaves outlive the event loop that started them, which Python mentions.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_write_is_reported_and_training_goes_on(checkpoints):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints.save(1, make_state(1), DATA, meta_of())
  checkpoints.wait()
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # no file may grow larger, as on a full disk
    checkpoints.save(2, make_state(2), DATA, meta_of())
    checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoints.latest_step() == 1
  assert len(checkpoints.failures) == 1
  assert str(checkpoints.directory) in checkpoints.failures[0].error
  assert "--workdir" in checkpoints.failures[0].fix
  checkpoints.save(3, make_state(3), DATA, meta_of())
  checkpoints.wait()
  assert same(checkpoints.restore(abstract(make_state(3)))[0], make_state(3))
  assert len(checkpoints.failures) == 1


_CHILD = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, {tests!r})
from test_checkpoint import DATA, big_params, make_state
from train.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 1000):
  params = jax.device_put(big_params(step), NamedSharding(mesh, P("fsdp")))
  checkpoints.save(step, make_state(step, params), DATA, {{}})
  print("writing", step, flush=True)
"""


def big_params(step: int):
  return {"embed": np.random.default_rng(step).normal(size=(1024, 1024)).astype(np.float32)}


def test_kill_in_the_middle_of_a_save_leaves_the_last_finished_step(tmp_path):
  """The state was sharded over four devices there, and is restored on one here."""
  directory = tmp_path / "checkpoints"
  program = textwrap.dedent(_CHILD).format(tests=str(Path(__file__).parent))
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(Path(__file__).parents[1]),
  }
  child = subprocess.Popen(
    [sys.executable, "-c", program, str(directory)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    lines = [child.stdout.readline() for _ in range(3)]
  finally:
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
  assert lines[-1] == "writing 3\n", errors
  torn = [p.name for p in directory.iterdir() if not p.name.isdecimal()]
  checkpoints = Checkpoints(directory, keep=2)
  newest = checkpoints.latest_step()
  assert newest >= 2  # save 3 began when save 2 was complete
  expected = make_state(newest, big_params(newest))
  assert same(checkpoints.restore(abstract(expected))[0], expected)
  checkpoints.save(newest + 1, make_state(newest + 1), DATA, {})
  checkpoints.close()
  assert checkpoints.latest_step() == newest + 1
  assert [p.name for p in directory.iterdir() if not p.name.isdecimal()] == [], torn


# Refusals: what is on disk


def test_no_finished_step_says_what_is_there(checkpoints):
  message = refusal(checkpoints.restore, abstract(make_state(0)))
  assert str(checkpoints.directory) in message
  assert "does not exist" in message
  (checkpoints.directory / "7.orbax-checkpoint-tmp").mkdir(parents=True)
  (checkpoints.directory / "notes.txt").write_text("x")
  assert checkpoints.latest_step() is None
  message = refusal(checkpoints.restore, abstract(make_state(0)))
  assert "unfinished: 7.orbax-checkpoint-tmp" in message
  assert "notes.txt" in message
  assert "--resume=none" in message


def test_a_torn_step_is_ignored_and_swept_by_the_next_save(two_steps):
  two_steps.close()
  torn = two_steps.directory / "3.orbax-checkpoint-tmp"
  shutil.copytree(two_steps.directory / "2", torn)
  again = Checkpoints(two_steps.directory)
  assert again.latest_step() == 2
  assert same(again.restore(abstract(make_state(0)))[0], make_state(2))
  assert torn.exists()  # reading changes nothing: another process may still be writing
  again.save(3, make_state(3), DATA, meta_of())
  again.close()
  assert not torn.exists()
  assert again.steps() == [1, 2, 3]


def test_no_such_step_lists_the_steps(two_steps):
  message = refusal(two_steps.restore, abstract(make_state(0)), 5)
  assert "no step 5" in message
  assert "use one of 1, 2" in message


def test_numbered_directories_of_others_are_refused(tmp_path):
  (tmp_path / "2024").mkdir()
  (tmp_path / "2024" / "thesis.tex").write_text("x")
  message = refusal(Checkpoints, tmp_path)
  assert "2024" in message
  assert "--workdir" in message


@pytest.mark.parametrize("content", [{"mine": 1}, [1, 2], {"schema": "mgr_jax.checkpoint.v0"}])
def test_a_checkpoint_of_another_program_is_refused(tmp_path, content):
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(1, args=ocp.args.Composite(meta=ocp.args.JsonSave(content)))
  message = refusal(Checkpoints(tmp_path).read_meta)
  assert str(tmp_path / "1") in message
  assert "this program reads 'mgr_jax.checkpoint.v1'" in message


def largest_file(directory: Path) -> Path:
  return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path: Path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(bytes(content))


def halve(path: Path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, halve, flip_a_bit])
@pytest.mark.parametrize("item", ["params", "state", "meta"])
def test_a_damaged_step_is_refused_and_the_one_before_it_named(two_steps, item, damage, capfd):
  directory = two_steps.directory
  damage(largest_file(directory / "2" / item))
  message = refusal(two_steps.restore, abstract(make_state(0)))
  assert f"{directory / '2'} is damaged: " in message
  assert f"use the one before it, {directory.parent}@1" in message
  assert "Traceback" not in capfd.readouterr().err
  assert same(two_steps.restore(abstract(make_state(0)), 1)[0], make_state(1))


def test_damage_to_the_only_step(checkpoints):
  checkpoints.save(1, make_state(1), DATA, meta_of())
  checkpoints.wait()
  flip_a_bit(largest_file(checkpoints.directory / "1" / "params"))
  message = refusal(checkpoints.restore_params, abstract(make_state(0)).params)
  assert "wrong checksum of params/embed" in message
  assert "--resume=none" in message


def test_the_tree_must_match(two_steps):
  state = make_state(2)
  params = {"embed": jnp.zeros((70, 51)), "runs": ({"gate": jnp.zeros((2,))},)}
  message = refusal(two_steps.restore, abstract(state.replace(params=params)))
  assert "missing params/runs/0/gate float32[2]" in message
  assert "unexpected params/runs/0/w float32[2,5,3]" in message
  assert "changed params/embed: float32[70,50] -> float32[70,51]" in message
  assert "config.cfg" in message
  narrow = state.replace(tokens_seen=jnp.zeros((2,), jnp.int32))
  assert "changed state/tokens_seen: uint32[2] -> int32[2]" in refusal(two_steps.restore, abstract(narrow))
