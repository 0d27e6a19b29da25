"""Parameter tables."""

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


@pytest.mark.parametrize("wrong", [{"axes": ("a",)}, {"role": "bias"}])
def test_malformed_specs_are_refused(wrong):
  with pytest.raises(ValueError, match=r"axes|role"):
    ParamSpec(**({"shape": (2, 3), "axes": ("a", "b")} | wrong))
