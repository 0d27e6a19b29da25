"""The claim runner itself: laws, controls and broken checks."""

import math

import jax
import pytest

from mgr_jax.claims import claim, run_claims


def constant(value):
  return lambda key, scale: value


@pytest.mark.parametrize(
  ("residual", "control", "passed", "caught"),
  [(0.5, 2.0, True, True), (2.0, 3.0, False, True), (0.5, 0.7, True, False), (math.nan, 2.0, False, True)],
)
def test_a_claim_holds_only_when_law_passes_and_control_fails(key, residual, control, passed, caught):
  (result,) = run_claims([claim("t.law", "x <= 1", constant(residual), 1.0, constant(control))], key)
  assert (result.passed, result.control_caught) == (passed, caught)
  assert result.holds == (passed and caught)
  assert result.holds == (result.message == "")
  assert (result.residual, result.control_residual) == pytest.approx((residual, control), nan_ok=True)
  if not result.holds:
    assert "t.law" in result.message


def test_the_message_names_residual_and_tolerance(key):
  (result,) = run_claims([claim("t.law", "", constant(2.0), 1.0, constant(9.0))], key)
  assert "2" in result.message
  assert "tolerance 1" in result.message


def test_a_defect_in_the_check_is_not_swallowed(key):
  def broken(key, scale):
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    run_claims([claim("t.law", "", broken, 1.0, constant(2.0))], key)


def test_every_claim_has_its_own_key_whatever_stands_beside_it(key):
  seen = {}

  def record(name):
    def measure(key, scale):
      seen.setdefault(name, []).append(jax.random.key_data(key).tolist())
      return float(scale)

    return measure

  claims = [claim(f"t.{n}", "", record(n), 5.0, constant(9.0)) for n in "ab"]
  run_claims(claims, key, scale=2)
  run_claims(claims[1:], key, scale=2)
  assert seen["a"][0] != seen["b"][0]
  assert seen["b"][0] == seen["b"][1]
