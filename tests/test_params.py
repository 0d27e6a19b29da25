"""Parameter tables."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.params import ParamSpec, count, fold_in_name, init_params, leaf_names, stack_specs


def test_fan_in_scaling_matches_its_formula(key):
  for n_in, n_out in ((64, 256), (256, 64)):
    spec = ParamSpec((n_in, n_out), ("embed", "mlp"))
    expected = min(1.0, math.sqrt(n_out / n_in)) / math.sqrt(n_in)
    assert np.std(spec.draw(key)) == pytest.approx(expected, rel=0.05)
  merged = ParamSpec((4, 16, 64), ("heads", "head_dim", "embed"), fan_in=2)
  assert np.std(merged.draw(key)) == pytest.approx(1 / 8, rel=0.05)


def test_constant_zeros_and_functions(key):
  assert np.all(ParamSpec((3,), (None,), init="zeros").draw(key) == 0)
  assert np.all(ParamSpec((3,), (None,), init="constant", std=0.5).draw(key) == 0.5)
  ramp = ParamSpec((3,), (None,), init=lambda key, shape: jnp.arange(shape[0]))
  np.testing.assert_array_equal(ramp.draw(key), [0.0, 1.0, 2.0])
  with pytest.raises(ValueError, match="unknown init"):
    ParamSpec((3,), (None,), init="ones").draw(key)


def test_adding_a_leaf_changes_no_other(key):
  specs = {"a": ParamSpec((8,), (None,), std=1.0), "b": {"c": ParamSpec((8,), (None,), std=1.0)}}
  more = specs | {"aa": ParamSpec((8,), (None,), std=1.0)}
  before, after = init_params(key, specs), init_params(key, more)
  np.testing.assert_array_equal(before["b"]["c"], after["b"]["c"])
  assert not np.array_equal(before["a"], before["b"]["c"])
  assert leaf_names(specs) == ["a", "b/c"]


def test_stacking_draws_every_layer_independently(key):
  spec = stack_specs({"w": ParamSpec((64, 64), ("embed", "mlp"))}, 3)["w"]
  drawn = spec.draw(key)
  assert drawn.shape == (3, 64, 64)
  assert spec.axes == ("layers", "embed", "mlp")
  assert np.std(drawn) == pytest.approx(1 / 8, rel=0.05)
  assert not np.array_equal(drawn[0], drawn[1])
  assert count({"w": spec}) == 3 * 64 * 64


def test_names_fold_to_different_keys(key):
  assert not np.array_equal(*(jax.random.key_data(fold_in_name(key, n)) for n in ("a", "b")))


def test_siblings_draw_from_one_key(key):
  spec = ParamSpec((8,), (None,), std=1.0)
  tree = {"a": {"v": spec, "s": dataclasses.replace(spec, drawn_with="v"), "u": spec}, "v": spec}
  drawn = init_params(key, stack_specs(tree, 2))
  np.testing.assert_array_equal(drawn["a"]["v"], drawn["a"]["s"])
  assert not np.array_equal(drawn["a"]["v"], drawn["a"]["u"])
  assert not np.array_equal(drawn["a"]["s"], drawn["v"]), "the sibling, not any leaf of that name"


def test_stacking_keeps_what_a_spec_says():
  spec = ParamSpec((4, 16, 64), ("heads", "head_dim", "embed"), fan_in=2)
  stacked = stack_specs(spec, 3)
  assert stacked.init == "normal"
  assert stacked.normal_std == spec.normal_std == 1 / 8
  assert stacked.one_layer == spec


@pytest.mark.parametrize(
  ("unit_axes", "dims", "radius"),
  [(("heads", "head_dim"), (0, 1), 1), (("heads", "head_dim", "embed"), (0, 1, 2), 8), (("embed",), (2,), 1)],
)
def test_the_radius_is_that_of_columns_of_mean_square_one(unit_axes, dims, radius):
  spec = ParamSpec((4, 16, 64), ("heads", "head_dim", "embed"), role="direction", fan_in=2, unit_axes=unit_axes)
  assert spec.unit_dims == dims
  assert spec.radius == pytest.approx(radius)
  stacked = stack_specs(spec, 3)
  assert stacked.unit_dims == tuple(d + 1 for d in dims)
  assert stacked.radius == spec.radius


@pytest.mark.parametrize(
  "wrong",
  [
    {"axes": ("a",)},
    {"role": "bias"},
    {"role": "direction"},
    {"unit_axes": ("a",)},
    {"role": "direction", "unit_axes": ("c",)},
  ],
)
def test_malformed_specs_are_refused(wrong):
  with pytest.raises(ValueError, match=r"axes|role"):
    ParamSpec(**({"shape": (2, 3), "axes": ("a", "b")} | wrong))
