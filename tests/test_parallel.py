"""One device, meshes under jit, and pmap take the same steps; and what does not fit devices is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mgr_jax.attention import attention_names
from mgr_jax.params import ParamSpec
from mgr_jax.problems import UserError
from train import parallel

MESH, COPIES = ("jit", "data=2,fsdp=2"), ("pmap", "data=4")
MORE = (("jit", "data=1"), ("jit", "data=2"), ("jit", "data=4"), ("jit", "fsdp=4"), ("pmap", "data=2"))
OPTIMIZERS = ("muon", "hoss", "adamw", "sgd", "hoss_hidden")
REVERSIBLE = "reversible(tropical),reversible(fractal),reversible(gauge)"


def on_four_devices(*cases) -> list:
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-m", "tests.parallel_program", json.dumps(cases)],
    env=env,
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
  ("optimizer", "placements"),
  [*((optimizer, (MESH, COPIES)) for optimizer in OPTIMIZERS), *((optimizer, MORE) for optimizer in OPTIMIZERS)],
)
def test_the_same_twenty_steps_everywhere(optimizer, placements):
  shared = {"optimizer": optimizer} | ({"attention": "standard*2"} if optimizer == "muon" else {})
  found = on_four_devices(*(("losses", shared | {"kind": k, "mesh": m}) for k, m in [("single", ""), *placements]))
  one = np.array(found[0])
  assert len(one) == 21 and one[-2] < one[0] - 0.01, "it learns"
  for case, other in zip(placements, found[1:], strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-5, err_msg=str(case))


@pytest.mark.parametrize(
  "attention", dict.fromkeys(["tropical", *attention_names(), REVERSIBLE, "tropical(impl=pallas)"])
)
def test_every_mechanism_takes_the_same_steps_on_a_mesh(attention):
  """Also: no row is sent to another device."""
  case = {"attention": attention, "steps": 5}
  one, mesh, sent = on_four_devices(
    ("losses", case), ("losses", case | {"kind": MESH[0], "mesh": MESH[1]}), ("sends", {"attention": attention})
  )
  np.testing.assert_allclose(mesh, one, rtol=1e-5)
  assert sent == 0


def test_rows_that_are_sent_and_sums_that_are_missing_are_found():
  case = {"steps": 5, "kind": COPIES[0], "mesh": COPIES[1]}
  sums, broken, sent = on_four_devices(
    ("losses", case), ("losses", case | {"broken": True}), ("sends", {"attention": "tropical", "by_rows": False})
  )
  assert np.max(np.abs(np.divide(broken, sums) - 1)) > 1e-3
  assert sent > 0, "the compiler cuts tropical scans across rows"


@pytest.mark.parametrize(
  ("shape", "axes", "n", "expected"),
  [
    ((4, 512, 1024), ("layers", "embed", "mlp"), 2, 2),
    ((4096, 16), ("vocab", "embed"), 4, 0),
    ((512, 511), ("embed", "x"), 2, 0),
    ((511, 513), ("embed", "x"), 2, None),
    ((1024, 1024), ("embed", "x"), 1, None),
    ((64, 64), ("embed", "x"), 2, None),
    ((2, 511, 513), ("layers", "embed", "x"), 2, None),
  ],
)
def test_which_dimension_is_split(shape, axes, n, expected):
  assert parallel.sharded_dim(ParamSpec(shape, axes), n) == expected


def test_the_text_of_a_mesh():
  assert parallel.parse_mesh("data=2, fsdp=-1") == {"data": 2, "fsdp": -1}
  for text in ("data", "data=0", "tensor=2", "data=1,data=2", "data=2;fsdp=2"):
    with pytest.raises(UserError, match=r"--mesh=.*is not understood"):
      parallel.parse_mesh(text)


@pytest.mark.parametrize(
  ("asked", "error", "fix"),
  [
    (("jit", "data=2", 8), "takes 2 devices, there are 1", "--mesh=data=1"),
    (("single", "data=1", 8), "no effect with --parallel=single", "--parallel=jit"),
    (("pmap", "fsdp=2", 8), "pmap copies the state", "--parallel=jit"),
  ],
)
def test_what_does_not_fit_is_refused(asked, error, fix):
  with pytest.raises(UserError) as e:
    parallel.make_placement(*asked)
  assert error in str(e.value) and fix in str(e.value)


def test_rows_that_do_not_divide_name_a_batch_that_does():
  (problem,) = parallel._row_problems("jit", 4, 6, 1, None)
  assert "6 rows" in problem.error and "--batch_size=8" in problem.fix and "--mesh=data=2" in problem.fix
  (problem,) = parallel._row_problems("pmap", 4, 8, 1, 0.25)
  assert "--hoss_hvp_frac=0.25 of 8 rows" in problem.error
  assert parallel._row_problems("jit", 4, 8, 1, 0.25) == []


def test_one_device_is_the_default():
  placement = parallel.make_placement("auto", "", 3)
  assert placement.kind == "single" and placement.owners is None and placement.axis_name is None
  batch = {"tokens": np.zeros((3, 2), np.int32)}
  assert placement.put(batch) is batch and placement.spread(batch) is batch
