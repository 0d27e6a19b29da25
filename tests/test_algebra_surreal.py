"""Surreal numbers from {L | R}: dyadic values, forms, and the budgets of their recursion."""

from fractions import Fraction

import pytest

from mgr_jax.algebra import surreal, surreal_claims, surreal_dyadic
from mgr_jax.algebra.surreal import Form, form
from mgr_jax.algebra.surreal_dyadic import Dyadic
from mgr_jax.claims import run_claims

CLAIMS = surreal_claims.CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.passed, result.message
  assert result.control_caught, result.message


def test_dyadic_numbers_are_exact_and_refuse_others():
  assert Dyadic(6, 3) == Dyadic(3, 2)
  assert Dyadic.of(0.375) + Dyadic.of(Fraction(5, 8)) == Dyadic(1)
  assert sorted([Dyadic(1, 1), Dyadic(-3), Dyadic(3, 2)]) == [Dyadic(-3), Dyadic(1, 1), Dyadic(3, 2)]
  with pytest.raises(ValueError, match="1/3 is no dyadic number"):
    Dyadic.of(Fraction(1, 3))
  with pytest.raises(ValueError, match="k=-1"):
    Dyadic(1, -1)


@pytest.mark.parametrize("word", ["", "+++", "+-+", "--+-", "+" * 40 + "-+-"])
def test_sign_words_and_numbers_are_inverse(word):
  x = surreal_dyadic.from_signs(word)
  assert surreal_dyadic.signs(x) == word
  assert surreal_dyadic.birthday(x) == len(word)
  if word:
    flipped = word.translate(str.maketrans("+-", "-+"))
    assert surreal_dyadic.from_signs(flipped) == -x != x


def test_the_simplest_number_is_the_earliest():
  assert surreal_dyadic.simplest_between(Dyadic(5, 2), Dyadic(2)) == Dyadic(3, 1)
  assert surreal_dyadic.simplest_between(None, Dyadic(-7, 1)) == Dyadic(-4)
  with pytest.raises(ValueError, match="larger than 1 and smaller than 1"):
    surreal_dyadic.simplest_between(Dyadic(1), Dyadic(1))


def test_inverse_is_exact_on_powers_of_two_and_names_wrong_days():
  assert surreal_dyadic.inverse(Dyadic(-1, 3), 10) == (Dyadic(-8), 0)
  with pytest.raises(ValueError, match="days=3 is less than 6"):
    surreal_dyadic.inverse(Dyadic(1, 2), 3)
  with pytest.raises(ZeroDivisionError):
    surreal_dyadic.inverse(Dyadic(0), 5)


def test_a_form_is_one_object_and_shows_its_options():
  half = Form((form(0),), (form(1),))
  assert half is form(Fraction(1, 2))
  assert repr(Form((form(0), half), (form(1),))) == "{0, 1/2 | 1}"
  assert Form((form(0), half), (form(1),)) is not Form((half,), (form(1),))


def test_budgets_are_refused_before_the_work():
  with pytest.raises(surreal.SurrealBudgetError, match="birthdays 30 and 40"):
    surreal.multiply(form(30), form(40))
  with pytest.raises(surreal.SurrealBudgetError, match="add up to more than 120"):
    surreal.add(form(100), form(100))
  with pytest.raises(surreal.SurrealBudgetError, match="born on day 121"):
    form(121)
  assert str(surreal.add(form(59), form(Fraction(119, 2)))) == "237/2"
