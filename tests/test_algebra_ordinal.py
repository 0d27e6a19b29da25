"""Ordinals below ε₀: arithmetic, text, ranks on a device, lengths of descents, games, and programs with ranks."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.algebra import ordinal_claims, ordinal_descent_claims
from mgr_jax.algebra.ordinal import OMEGA, ONE, ZERO, Ord, natural_product, natural_sum, omega
from mgr_jax.algebra.ordinal_descent import descent_bound, fundamental, hardy, largest_below
from mgr_jax.algebra.ordinal_games import cut, goodstein, heads, hydra_rank, shadow, substitute
from mgr_jax.algebra.ordinal_programs import Choice, Interleave, Sequence, repeat, sequence, task
from mgr_jax.algebra.ordinal_rank import from_rank, lex_cmp, to_rank
from mgr_jax.algebra.ordinal_sampling import RandomChooser
from mgr_jax.claims import run_claims

w = OMEGA
CLAIMS = ordinal_claims.CLAIMS + ordinal_descent_claims.CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_and_its_control_is_caught(claim, key):
  (result,) = run_claims([claim], key)
  assert result.holds, result.message


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (1 + w, "w"),
    (w + 1, "w + 1"),
    (2 * w, "w"),
    (w * 2, "w*2"),
    ((w + 1) * 2, "w*2 + 1"),
    (2 * (w + 1), "w + 2"),
    (2**w, "w"),
    ((w + 1) ** 2, "w^2 + w + 1"),
    (3 ** (w**2), "w^w"),
    (2 ** (w**w), "w^(w^w)"),
    ((w * 3 + 2) ** (w + 1), "w^(w + 1)*3 + w^w*2"),
    (natural_sum(1, w), "w + 1"),
    (natural_product(w + 1, w + 1), "w^2 + w*2 + 1"),
    ((w**2 * 3 + w * 5 + 7) // (w * 2 + 1), "w*3 + 2"),
    ((w**2 * 3 + w * 5 + 7) % (w * 2 + 1), "w + 7"),
    (w - 5, "w"),
    (9 - Ord.of(4), "5"),
    (divmod(7, Ord.of(2))[1], "1"),
    (0 * w, "0"),
  ],
)
def test_values_that_differ_from_those_of_integers(value, text):
  assert str(value) == text
  assert Ord.parse(text) == value
  assert eval(repr(value)) == value


def test_naturals_behave_as_python_integers():
  five = Ord.of(5)
  assert five == 5 and five != 4 and hash(five) == hash(5) and int(five) == 5
  assert 3 < five <= 5 < w and not w < 5
  assert {five: "x"}[5] == "x"
  assert five * 2 - 3 == 7 and five**3 == 125 and divmod(five, 2) == (2, 1)
  assert w != "w" and w != True  # noqa: E712
  with pytest.raises(TypeError):
    w + 1.5
  with pytest.raises(ValueError, match="w is infinite"):
    int(w)


def test_predicates():
  three = w**2 * 3 + w + 4
  assert (three.degree, three.limit_part, three.finite_part) == (2, w**2 * 3 + w, 4)
  assert three.is_successor and not three.is_limit
  assert w.is_limit and not w.is_successor and w.is_additively_indecomposable
  assert not (w * 2).is_additively_indecomposable and ONE.is_additively_indecomposable
  assert ZERO.is_zero and not ZERO.is_limit and not ZERO.is_successor and ZERO.is_finite
  with pytest.raises(ValueError, match="0 has no leading exponent"):
    ZERO.degree  # noqa: B018


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: Ord(((0, 1), (1, 1))), "exponents must strictly decrease, 0 stands before 1"),
    (lambda: Ord(((w, 1), (w, 2))), "exponents must strictly decrease"),
    (lambda: Ord(((1, 0),)), "coefficient 0"),
    (lambda: Ord(((1, 1.5),)), "coefficient 1.5"),
    (lambda: Ord(((1, True),)), "coefficient True"),
    (lambda: Ord(((-1, 1),)), "-1 is no ordinal"),
    (lambda: Ord(5), "terms=5 is no tuple"),
    (lambda: Ord((5,)), "terms: 5 is no pair"),
    (lambda: Ord.of(-2), "-2 is no ordinal"),
    (lambda: Ord.of(2.0), "2.0 is no ordinal"),
    (lambda: w + -1, "-1 is no ordinal"),
    (lambda: 1 - w, "no ordinal added to w gives 1"),
    (lambda: w - (w + 1), "no ordinal added to"),
    (lambda: Ord.parse("w +"), "unexpected the end"),
    (lambda: Ord.parse("w^2)"), r"unexpected '\)' at place 3"),
    (lambda: Ord.parse("w - 1"), "unexpected '-' at place 2"),
    (lambda: Ord.parse("2 w"), "unexpected 'w' at place 2"),
    (lambda: fundamental(w + 1, 2), r"alpha=w \+ 1 is no limit"),
    (lambda: fundamental(w, -1), "n=-1"),
    (lambda: hardy(w**w, 3), "a value of more than 1048576 bits"),
    (lambda: descent_bound(w**3, lambda t: 1), r"alpha=w\^3 is not below w\^3"),
    (lambda: descent_bound(w**2, lambda t: 10**4), "more than 20000 steps"),
    (lambda: largest_below(w**w, 3), r"alpha=w\^w is not below w\^w"),
    (lambda: largest_below(ZERO, 3), "alpha=0"),
    (lambda: shadow(-1, 2), "n=-1, base=2"),
    (lambda: cut(((),), (0, 0), 1), r"path=\(0, 0\) leads to no head"),
    (lambda: to_rank(w**3, 3), r"alpha=w\^3 is not below w\^3"),
    (lambda: to_rank(w * 2**31, 3), "coefficient 2147483648 exceeds"),
    (lambda: from_rank([0, -1, 2]), "no vector of coefficients >= 0"),
    (lambda: repeat(task("nothing", 0), 3), "body=nothing has rank 0"),
  ],
)
def test_mistakes_are_named(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_division_by_zero():
  with pytest.raises(ZeroDivisionError, match="w divided by 0"):
    divmod(w, 0)


def test_expressions_are_evaluated_by_ordinal_arithmetic():
  assert Ord.parse("1 + w") == w
  assert Ord.parse(" (ω + 1) · 2 ") == w * 2 + 1
  assert Ord.parse("2^w^w") == 2 ** (w**w) != (2**w) ** w == Ord.parse("(2^w)**w")
  assert Ord.parse("w*2^3") == w * 8


def test_a_large_patience_does_not_pass_for_a_level():
  a, b = to_rank(9600, 3), to_rank(w, 3)
  assert from_rank(a) < from_rank(b)
  assert lex_cmp(a, b) == -1
  radix = np.array([10**6, 10**3, 1])
  assert a @ radix > b @ radix


def test_comparison_broadcasts_and_has_no_branch():
  ranks = jnp.asarray(np.random.default_rng(0).integers(0, 3, (12, 4)), jnp.int32)
  table = lex_cmp(ranks[:, None], ranks[None])
  ordinals = [from_rank(r) for r in ranks]
  np.testing.assert_array_equal(table, [[(a > b) - (a < b) for b in ordinals] for a in ordinals])
  np.testing.assert_array_equal(table, -table.T)
  used = {e.primitive.name for e in jax.make_jaxpr(lex_cmp)(ranks[0], ranks[1]).eqns}
  assert not used & {"cond", "while", "scan"}
  extremes = jnp.asarray([[2**31 - 1, 0], [-(2**31), 5]], jnp.int32)
  assert lex_cmp(*extremes) == 1


def test_goodstein_from_three_ends_and_from_four_starts():
  steps = list(goodstein(3))
  assert [s.value for s in steps] == [3, 3, 3, 2, 1, 0]
  assert [str(s.shadow) for s in steps] == ["w + 1", "w", "3", "2", "1", "0"]
  after = goodstein(4)
  assert [next(after).value for _ in range(5)] == [4, 26, 41, 60, 83]
  assert substitute(shadow(10**6, 3), 3) == 10**6
  # H_{ω^ω}(3) = f(f(f(3))) with f(n) = n·2^n; the last application is what cannot be written down.
  assert hardy(w**2, hardy(w**2, 3)) == 402653184


def test_a_hydra_dies_and_its_rank_counts_the_worst_case():
  hydra, t = (((), ()),), 0
  assert hydra_rank(hydra) == w**2
  while heads(hydra):
    t += 1
    before, hydra = hydra_rank(hydra), cut(hydra, heads(hydra)[-1], t)
    assert hydra_rank(hydra) < before
  assert hydra_rank(hydra) == 0 and t == 13
  assert cut(((), ()), (0,), 99) == ((),), "a head on the root grows nothing"


def test_lengths_of_controlled_descents():
  assert descent_bound(w, lambda t: 10) == 11
  assert descent_bound(5, lambda t: 10) == 5
  assert descent_bound(5, lambda t: 2) == 3, "the first step must respect the control"
  assert descent_bound(w**2, lambda t: 3) == 16
  assert descent_bound(w, lambda t: 1000) == 1001, "no bound without a control"


class Largest:
  """Lowers every rank as little as coefficients up to `bound` allow."""

  def __init__(self, bound):
    self.bound = bound

  def below(self, rank):
    return largest_below(rank, self.bound)

  def which(self, n):
    return 0


def events(program, chooser):
  n = 0
  while not program.rank.is_zero:
    program, n = program.step(chooser), n + 1
  return n


def test_a_training_program_has_a_rank():
  train, anneal = task("train", w), task("anneal", 5)
  program = sequence(task("warm-up", 10), repeat(sequence(train, anneal), 3), repeat(task("restart", w**2), 2))
  assert str(program) == "warm-up; (train; anneal) * 3; restart * 2"
  assert program.term == "ρ(restart)·2 + (ρ(anneal) + ρ(train))·3 + ρ(warm-up)"
  assert program.rank == w**2 * 2 + w * 3 + 10
  counted = sequence(task("warm-up", 10), repeat(sequence(train, anneal), 3))
  assert events(counted, Largest(9)) == 10 + 3 * (10 + 5)
  assert events(counted, RandomChooser(random.Random(0))) < 10 + 3 * (10 + 5)


def test_composition_rules():
  p, q = task("p", 2), task("q", w)
  assert Sequence(p, q).rank == w + 2 and Sequence(q, p).rank == w
  assert Interleave(p, q).rank == Interleave(q, p).rank == w + 2
  assert Choice(p, q).rank == w
  assert repeat(p, q).rank == w and repeat(q, p).rank == w * 2
  assert str(Choice(repeat(p, repeat(p, 3)), Interleave(p, q))) == "(p * (p * 3) | (p || q))"
  assert Interleave(repeat(p, w), Choice(p, q)).term == "(ρ(p)·w ⊕ max(ρ(p), ρ(q)))"


def test_programs_refuse_to_go_on():
  with pytest.raises(ValueError, match="p has ended"):
    task("p", 0).step(Largest(1))

  class Lazy(Largest):
    def below(self, rank):
      return rank

  with pytest.raises(ValueError, match="p went from rank w to w, which is not smaller"):
    task("p", w).step(Lazy(1))


def test_height_is_no_limit():
  tower = w
  for _ in range(12):
    tower = omega(tower)
  assert Ord.parse(str(tower)) == tower
  assert tower < omega(tower) and fundamental(tower, 2) < tower
