"""Claims about limits, descents, their lengths, games that end, and ranks of programs, each with a broken twin."""

import functools
import itertools
import operator

from mgr_jax.algebra.ordinal import OMEGA, ONE, ZERO, Ord, natural_product, natural_sum, omega
from mgr_jax.algebra.ordinal_descent import descent_bound, fundamental, hardy, largest_below
from mgr_jax.algebra.ordinal_games import cut, goodstein, heads, hydra_rank, shadow
from mgr_jax.algebra.ordinal_programs import Choice, Interleave, Program, Repeat, Sequence, task
from mgr_jax.algebra.ordinal_rank import from_rank, to_rank
from mgr_jax.algebra.ordinal_sampling import RandomChooser, draw, draw_below, rng_of, tuples
from mgr_jax.claims import Check, claim

CAP = 1000


def _reaches(member, beta: Ord) -> bool:
  """Whether member(n) exceeds β for some n <= 50."""
  return any(beta < member(n) for n in range(51))


def _limits(sequence) -> Check:
  """Limits whose sequence does not increase, leaves the limit, or stays below some smaller ordinal."""

  def measure(key, scale):
    rng, wrong = rng_of(key), 0
    for _ in range(400 * scale):
      limit = draw(rng).limit_part + omega(draw(rng, 1) + 1)
      members = [sequence(limit, n) for n in range(4)]
      holds = all(low < high < limit for low, high in itertools.pairwise(members))
      wrong += not (holds and _reaches(lambda n, limit=limit: sequence(limit, n), draw_below(rng, limit)))
    return float(wrong)

  return measure


def _counted_from_below(limit: Ord, n: int) -> Ord:
  """γ + ω^{e-1} + n in place of γ + ω^{e-1}·n: it increases, but not to γ + ω^e."""
  return fundamental(limit, 1) + n


def _recursion(add, multiply, power) -> Check:
  """Violations of the definitions by recursion: value at 0, at successors, and as the limit at limits."""

  def measure(key, scale):
    rng, wrong = rng_of(key), 0
    for a, b in tuples(key, 150 * scale, 2):
      a, limit = a + 2, b + omega(draw(rng, 1) + 1)
      for operation, start, then in ((add, a, lambda x, a: x + 1), (multiply, ZERO, add), (power, ONE, multiply)):
        value = operation(a, limit)
        member = lambda n, operation=operation, a=a, limit=limit: operation(a, fundamental(limit, n))
        wrong += operation(a, ZERO) != start or operation(a, b + 1) != then(operation(a, b), a)
        wrong += not (member(3) < value and _reaches(member, draw_below(rng, value)))
    return float(wrong)

  return measure


def _descents(start, below) -> Check:
  """Runs not over after `CAP` steps. `below` gives None where nothing smaller is left."""

  def measure(key, scale):
    rng, endless = rng_of(key), 0
    for run in range(200 * scale):
      at, steps = start(rng, slowly := run % 2), 0
      while at is not None and steps < CAP:
        lower = below(rng, at, slowly)
        assert lower is None or lower < at
        at, steps = lower, steps + 1
      endless += at is not None
    return float(endless)

  return measure


def _start(rng, slowly: bool) -> Ord:
  """Slow descents from larger ordinals end too, but not within anybody's patience."""
  return draw(rng, 1, terms=4) if slowly else draw(rng)


def _below(rng, at: Ord, slowly: bool) -> Ord | None:
  return None if at.is_zero else draw_below(rng, at, slowly)


def _triple_below(rng, at: tuple[int, int, int], slowly: bool) -> tuple[int, int, int]:
  """A lexicographically smaller triple of integers of either sign."""
  del slowly
  a, b, c = at
  refill = rng.randint(0, 5), rng.randint(0, 5)
  return (a, b, c - 1) if c > 0 else (a, b - 1, refill[0]) if b > 0 else (a - 1, *refill)


def _longest(start: Ord, control) -> int:
  """The length of the longest controlled descent, by trying all."""

  @functools.cache
  def longest(rank: tuple[int, ...], t: int) -> int:
    allowed = itertools.product(range(control(t + 1) + 1), repeat=3)
    return max((1 + longest(lower, t + 1) for lower in allowed if lower < rank), default=0)

  return longest(tuple(to_rank(start, 3).tolist()), 0)


def _bounds(bound) -> Check:
  """Cases in which the bound is no maximum over all descents, falls below a random one, or differs from H_α(3) - 3."""

  def measure(key, scale):
    rng, wrong = rng_of(key), 0
    for _ in range(6 * scale):
      table = [rng.randint(0, 2) for _ in range(200)]
      start = from_rank([rng.randint(0, 1), rng.randint(0, 2), rng.randint(0, 3)])
      wrong += bound(start, table.__getitem__) != _longest(start, table.__getitem__)
    for _ in range(100 * scale):
      start = from_rank([rng.randint(0, 2) for _ in range(3)])
      table = [rng.randint(0, 3) for _ in range(500)]
      at, steps = start, 0
      while not at.is_zero:
        at, steps = largest_below(at, rng.randint(0, table[steps + 1])), steps + 1
      wrong += bound(start, table.__getitem__) < steps
    for alpha in (ONE, OMEGA, OMEGA + 1, OMEGA * 2, OMEGA * 2 + 2, OMEGA**2, OMEGA**2 + OMEGA):
      wrong += bound(alpha, lambda t: t + 1) != hardy(alpha, 3) - 3
    return float(wrong)

  return measure


def _goodstein(shade) -> Check:
  """Steps at which the shadow does not descend, and starts whose length is not H_α(3) - 3."""

  def measure(key, scale):
    del key
    wrong = 0
    for n in range(4, 12):
      steps = [shade(step.value, step.base) for step in itertools.islice(goodstein(n), 30 * scale)]
      wrong += sum(not b < a for a, b in itertools.pairwise(steps))
    for n in range(1, 4):
      wrong += len(list(goodstein(n))) - 1 != hardy(shade(n, 2), 3) - 3
    return float(wrong)

  return measure


def _flat_shadow(n: int, base: int) -> Ord:
  """ω in place of the base, exponents left as integers: 4 = 2² becomes ω²."""
  digits = [n // base**i % base for i in range(64) if base**i <= n]
  return Ord(tuple((Ord.of(i), d) for i, d in reversed(list(enumerate(digits))) if d))


def _hydra(rank) -> Check:
  """Random cuts that do not lower the rank; the t-th cut grows t copies, 25 cuts a battle."""

  def measure(key, scale):
    rng, wrong = rng_of(key), 0
    for _ in range(8 * scale):
      hydra, t = _random_hydra(rng, 3), 0
      while heads(hydra) and t < 25:
        t += 1
        after = cut(hydra, rng.choice(heads(hydra)), min(t, 3))
        wrong += not rank(after) < rank(hydra)
        hydra = after
    return float(wrong)

  return measure


def _random_hydra(rng, height: int):
  return tuple(_random_hydra(rng, height - 1) for _ in range(rng.randint(1, 2))) if height else ()


class EarlierOnTheLeft(Sequence):
  """A sequence ranked p + ρ_Q: a decrease of p is absorbed."""

  @property
  def rank(self) -> Ord:
    return self.first.rank + self.second.rank


def random_program(rng, depth: int, sequence=Sequence) -> Program:
  """A program of up to 2^depth tasks, each of rank below ω²."""
  if depth == 0:
    return task("task", from_rank([rng.randint(0, 1), rng.randint(0, 2), 1 + rng.randint(0, 2)][rng.randint(0, 1) :]))
  parts = [random_program(rng, rng.randrange(depth), sequence) for _ in range(2)]
  return rng.choice((sequence, Repeat, Interleave, Choice))(*parts)


def _programs(sequence) -> Check:
  """Events that do not lower the rank of a random program under random choices, and programs that do not end."""

  def measure(key, scale):
    rng, wrong = rng_of(key), 0
    for _ in range(150 * scale):
      program, events = random_program(rng, 3, sequence), 0
      while not program.rank.is_zero and events < CAP:
        after = program.step(RandomChooser(rng))
        wrong += not after.rank < program.rank
        program, events = after, events + 1
      wrong += events == CAP
    return float(wrong)

  return measure


CLAIMS = (
  claim(
    "ordinal.fundamental",
    "λ[n] < λ[n+1] < λ, and every β < λ is below some λ[n]; γ + ω^(e-1) + n does not lead to γ + ω^e",
    _limits(fundamental),
    0.0,
    _limits(_counted_from_below),
  ),
  claim(
    "ordinal.recursion",
    "+, ·, ^ take their values from the predecessor and at limits continuously; ⊕ and ⊗ are not continuous",
    _recursion(operator.add, operator.mul, operator.pow),
    0.0,
    _recursion(natural_sum, natural_product, operator.pow),
    refs=("Cantor 1897",),
  ),
  claim(
    "ordinal.descent",
    "any descent by arbitrary choices ends at 0; lexicographic triples of integers of either sign go on for ever",
    _descents(_start, _below),
    0.0,
    _descents(lambda rng, slowly: (rng.randint(0, 3), rng.randint(0, 3), 3), _triple_below),
  ),
  claim(
    "ordinal.descent_bound",
    "the bound of controlled descents is their maximum over all, and H_α(3) - 3 for control t + 1; not for control t",
    _bounds(descent_bound),
    0.0,
    _bounds(lambda alpha, control: descent_bound(alpha, lambda t: max(control(t) - 1, 0))),
    refs=("Hardy 1904", "Wainer 1972"),
  ),
  claim(
    "ordinal.goodstein",
    "the shadows of a Goodstein sequence descend, in H_α(3) - 3 steps; with integer exponents they do not",
    _goodstein(shadow),
    0.0,
    _goodstein(_flat_shadow),
    refs=("Goodstein 1944", "Kirby, Paris 1982"),
  ),
  claim(
    "ordinal.hydra",
    "every cut lowers the rank of a hydra, though heads grow back; the number of heads is no such rank",
    _hydra(hydra_rank),
    0.0,
    _hydra(lambda hydra: len(heads(hydra))),
    refs=("Kirby, Paris 1982",),
  ),
  claim(
    "ordinal.programs",
    "ρ_Q + p, ρ_P·b + p, p ⊕ q and max descend at every event of a composed program; p + ρ_Q does not",
    _programs(Sequence),
    0.0,
    _programs(EarlierOnTheLeft),
    refs=("Floyd 1967", "Dershowitz, Manna 1979"),
  ),
)
