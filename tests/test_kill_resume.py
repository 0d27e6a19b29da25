"""A run killed with SIGKILL and started again computes the same losses, bit for bit, and logs each step once."""

import numpy as np
from kill_resume import differences, experiment


def test_two_kills_leave_no_trace(tmp_path):
  said = []
  assert experiment(tmp_path, kills=2, seed=0, say=said.append) == []
  assert len(said) == 3 and said[-1].endswith("2 resumed")


def test_the_comparison_notices_every_kind_of_difference():
  whole = [{"step": s, "loss": float(np.float32(1 / s))} for s in (1, 2, 3)] + [{"step": 3, "val_bpb": 2.0}]
  assert differences(whole, whole) == []
  assert differences(whole, whole[1:]) == ["loss of step 1: undisturbed 1.0, killed 'missing'"]
  assert differences(whole, [*whole, whole[1]]) == ["killed: loss of step 2 stands there more than once"]
  next_float = float(np.nextafter(np.float32(whole[2]["loss"]), np.float32(1)))
  assert len(differences(whole, [*whole[:2], {"step": 3, "loss": next_float}, whole[3]])) == 1
  assert len(differences(whole, [*whole[:3], {"step": 3, "val_bpb": 2.0000001}])) == 1
