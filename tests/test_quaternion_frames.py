"""The frame transport task: a group of rotations, answers by matrices, and a split that no frame gives away."""

import jax
import numpy as np
import pytest

from train.experiments import quaternion_frames as frames


def test_the_rotations_of_the_cube_are_a_group():
  group = frames.rotations()
  assert len(group) == 24
  key = lambda m: tuple(m.reshape(-1))
  members = {key(m) for m in group}
  assert len(members) == 24
  assert {key(a @ b) for a in group for b in group} == members
  assert {key(a @ np.diag([1, 1, -1])) for a in group}.isdisjoint(members), "reflections are not among them"


def test_directions_turn_as_vectors_do():
  axis = lambda d: np.eye(3, dtype=int)[d // 2] * (1 - 2 * (d % 2))
  for m, images in zip(frames.rotations(), frames.turned(), strict=True):
    for d in range(6):
      np.testing.assert_array_equal(axis(images[d]), m @ axis(d))


def test_every_frame_meets_as_many_others():
  pairs = frames.trained_pairs()
  np.testing.assert_array_equal(pairs.sum(0), frames.KEPT)
  np.testing.assert_array_equal(pairs.sum(1), frames.KEPT)


@pytest.mark.parametrize("new", [False, True])
def test_targets_are_the_vectors_in_the_frames_of_queries(new):
  batch = jax.jit(frames.frame_transport(new), static_argnums=1)(jax.random.key(3), 40, None)
  tokens, targets, weights = (np.asarray(batch[name]) for name in ("tokens", "targets", "weights"))
  group, pairs = frames.rotations(), frames.trained_pairs()
  axis = lambda d: np.eye(3, dtype=int)[d // 2] * (1 - 2 * (d % 2))
  n_items = frames.NAMES * frames.FRAMES * frames.DIRECTIONS
  assert np.all(weights[:, : frames.NAMES] == 0)
  for row in range(40):
    held = {}
    for token in tokens[row, : frames.NAMES]:
      name, rest = divmod(token, frames.FRAMES * frames.DIRECTIONS)
      held[name] = divmod(rest, frames.DIRECTIONS)
    for at in range(frames.NAMES, tokens.shape[1]):
      name, asked = divmod(tokens[row, at] - n_items, frames.FRAMES)
      frame, vector = held[name]
      np.testing.assert_array_equal(axis(targets[row, at]), group[asked].T @ group[frame] @ axis(vector))
      assert weights[row, at] == (pairs[frame, asked] != new)
  assert 0.1 < np.mean(weights[:, frames.NAMES :]) < 0.9
