"""Series over ordered monomials, their values at huge arguments, exact frontiers, and which axis to scale."""

import math
from fractions import Fraction

import numpy as np
import pytest

from mgr_jax.algebra import (
  scaling,
  scaling_claims,
  scaling_probe,
  scaling_probe_claims,
  transseries,
  transseries_claims,
)
from mgr_jax.algebra.scaling import ErrorModel, term
from mgr_jax.algebra.scaling_probe import FULL, halved
from mgr_jax.algebra.transseries import DomainError, Series, Undecidable
from mgr_jax.algebra.transseries_eval import log_eval
from mgr_jax.algebra.transseries_growth import LOG_LOG_X, LOG_X, X, derivative, exp, growth, log
from mgr_jax.algebra.transseries_omega import EPSILON, OMEGA, archimedean_class, is_infinitesimal, omega, standard_part
from mgr_jax.claims import run_claims

CLAIMS = transseries_claims.CLAIMS + scaling_claims.CLAIMS + scaling_probe_claims.CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


def test_normal_forms_read_as_written():
  f = 3 * omega(OMEGA) - OMEGA * OMEGA + omega(Fraction(1, 2)) + 5 - EPSILON
  assert str(f) == "3·ω^ω - ω^2 + ω^(1/2) + 5 - ω^-1"
  assert str(transseries.truncated(1 / (1 + EPSILON), 3)) == "1 - ω^-1 + ω^-2 + O(ω^-3)"
  assert str(archimedean_class(f)) == "ω"
  assert str(OMEGA - OMEGA) == "0"


def test_parts_of_normal_forms():
  f = Fraction(7, 2) + EPSILON * 4
  assert standard_part(f) == Fraction(7, 2)
  assert is_infinitesimal(f - Fraction(7, 2)) and not is_infinitesimal(f)
  with pytest.raises(DomainError, match="infinite"):
    standard_part(OMEGA + 1)
  hidden = Series(f.one, (), f.one)
  with pytest.raises(Undecidable):
    standard_part(f + hidden)
  with pytest.raises(Undecidable):
    is_infinitesimal(hidden)
  with pytest.raises(ValueError, match="nests 5"):
    omega(omega(omega(omega(OMEGA))))


def test_long_series_keep_their_largest_terms_and_say_what_they_lost():
  f = transseries.constant(OMEGA.one, 0)
  for n in range(40):
    f = f + omega(-n)
  assert len(f.terms) == transseries.MAX_TERMS
  assert str(f.tail) == f"ω^-{transseries.MAX_TERMS}"
  with pytest.raises(ZeroDivisionError):
    1 / (f - f if f.tail is None else OMEGA - OMEGA)


def test_relations_between_growth_rates():
  f, g = X * X + X, X * X * 3
  assert transseries.asymptotic(f, g) and not transseries.equivalent(f, g)
  assert transseries.equivalent(f, X * X - LOG_X)
  assert transseries.dominates(exp(X), f) and not transseries.dominates(f, g)


def test_logarithm_and_exponential_keep_to_their_domain():
  assert transseries.truncated(log(X * LOG_X), 2).terms == (LOG_X + LOG_LOG_X).terms
  assert str(transseries.truncated(exp(X + 2 * LOG_X + 1 / X), 2)) == "exp(x) x^2 + exp(x) x + O(exp(x))"
  assert str(derivative(LOG_LOG_X)) == "x^-1 (log x)^-1"
  for f, reason in ((2 * X, "log 2"), (-X, "not positive"), (LOG_LOG_X, "log log log x")):
    with pytest.raises(DomainError, match=reason):
      log(f)
  for f, reason in ((X + 1, "constant 1"), (X * LOG_X, "no monomial")):
    with pytest.raises(DomainError, match=reason):
      exp(f)
  with pytest.raises(ValueError, match="not positive"):
    growth(p=[(-1, 1)])


def test_values_agree_with_floats_where_floats_reach():
  f = 3 * exp(X) / X - LOG_X * X + Fraction(1, 2) * LOG_LOG_X
  x = 20.0
  true = 3 * math.exp(x) / x - math.log(x) * x + 0.5 * math.log(math.log(x))
  found = log_eval(f, math.log(x))
  assert found.sign == 1
  assert float(found.log) == pytest.approx(math.log(true), rel=1e-12)
  assert log_eval(X - exp(X), 10**6).sign == -1
  assert log_eval(X * exp(X) - exp(X), 10**5).sign == 1, "a difference far below the last digit of either"
  with pytest.raises(ValueError, match="log_x=1"):
    log_eval(X, 1)


def test_regimes_and_frontiers_of_three_resources():
  a, b, c = Fraction(1, 3), Fraction(1, 4), Fraction(1, 2)
  model = ErrorModel(1.7, (term(2, N=-a), term(3, D=-b), term(1, S=-c)))
  exponents, rate, shares = scaling.frontier(model, {"N": 1, "D": 1, "S": 2})
  assert rate == -1 / (1 / a + 1 / b + 2 / c)
  assert exponents["N"] + exponents["D"] + 2 * exponents["S"] == 1
  assert sum(shares) == 1 and min(shares) > 0
  assert scaling.regime(model, {"N": 1.0, "D": 100.0, "S": 100.0}) == 0
  assert scaling.regime(model, {"N": 100.0, "D": 1.0, "S": 100.0}) == 1
  assert model.excess({"N": 0.0, "D": 0.0, "S": 0.0}) == pytest.approx(6)


def test_frontiers_that_are_none_are_refused():
  with pytest.raises(ValueError, match="2 terms do not determine 3 resources"):
    scaling.frontier(ErrorModel(0, (term(N=-1), term(D=-1, S=-1))), {"N": 1})
  with pytest.raises(ValueError, match="singular"):
    scaling.frontier(ErrorModel(0, (term(N=-1, D=-1), term(2, N=-1, D=-1))), {"N": 1, "D": 1})
  with pytest.raises(ValueError, match="driven to nothing"):
    scaling.frontier(ErrorModel(0, (term(N=-1), term(N=-3, D=-1))), {"N": 1, "D": 1})
  with pytest.raises(ValueError, match="no N balances"):
    scaling.balance(term(N=-1), term(N=-1, D=-1), "N")


def power_law(x, alpha=0.34):
  return 1.7 + 3 * x**-alpha


def test_a_prediction_without_a_decaying_quarter_is_an_interval():
  fitted = scaling_probe.predict(power_law(1), power_law(0.5), power_law(0.25))
  assert fitted.fitted and float(fitted.alpha) == pytest.approx(0.34)
  assert float(fitted.floor) == pytest.approx(1.7)
  without = scaling_probe.predict(power_law(1), power_law(0.5))
  assert not without.fitted and np.isnan(without.alpha)
  assert (float(without.low), float(without.high)) == (0.0, float(fitted.g))
  rising = scaling_probe.predict(1.0, 1.2, 1.3)
  assert not rising.fitted and float(rising.low) == float(rising.high) == pytest.approx(0.2)
  worse = scaling_probe.predict(1.0, 0.9, 1.3)
  assert float(worse.low) == float(worse.high) == 0


def planted(seed=0, **changes):
  nats = scaling_probe_claims.plant(np.random.default_rng(seed), {"depth": 0.1, "width": 0.01, "data": 0.01} | changes)
  return nats, np.random.default_rng(seed + 1)


def test_interacting_axes_give_a_tentative_verdict_at_most():
  nats, rng = planted()
  assert scaling_probe_claims.probe(nats, rng)[:2] == ("dominant", "depth")
  g = np.mean(nats[halved("depth")] - nats[FULL])
  nats[halved("depth", "data")] = nats[halved("depth")] + nats[halved("data")] - nats[FULL] + 0.6 * g
  found = scaling_probe_claims.probe(nats, rng)
  assert found[:2] == ("tentative", "depth")
  assert found.interaction == pytest.approx(0.6, rel=1e-6)


def test_no_benefit_anywhere_is_a_floor():
  nats, rng = planted()
  flat = {name: nats[FULL] + np.random.default_rng(i).normal(0, 0.1, (1, 200)) for i, name in enumerate(nats)}
  found = scaling_probe_claims.probe(flat, rng)
  assert found.word == "floor" and not found.axis
