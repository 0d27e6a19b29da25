"""Programs with ranks: what runs after, inside, beside or instead of what, and an ordinal that each event lowers.

A program of rank ω runs finitely long, but how long is settled only at its first event; a program of rank n has at most
n events. Composed programs end because their rank descends, whoever makes the choices:

  P; Q        ρ_Q + p while P runs at rank p, then q. The later program stands left: + is strict on the right only.
  P * B       ρ_P·b + p: a copy of P for every event of B, which is at rank b; ρ_P·ρ_B at the start.
  P || Q      p ⊕ q: interleaved in any order.
  P | Q       max(ρ_P, ρ_Q): one of them, chosen when it starts.
(Floyd, 1967, Assigning meanings to programs; Dershowitz & Manna, 1979, Proving termination with multiset orderings.)
"""

import abc
import dataclasses
import functools
from typing import Protocol

from mgr_jax.algebra.ordinal import Ord, natural_sum


class Chooser(Protocol):
  """Whoever settles at run time what a program leaves open."""

  def below(self, rank: Ord) -> Ord:
    """The rank of a task after its next event: any ordinal < `rank`."""

  def which(self, n: int) -> int:
    """One of 0, ..., n-1."""


class Program(abc.ABC):
  """An immutable state of a program; it has ended when its rank is 0."""

  @property
  @abc.abstractmethod
  def rank(self) -> Ord:
    """What every event lowers."""

  @property
  @abc.abstractmethod
  def term(self) -> str:
    """`rank` before the start as a term in the ranks ρ(name) of the tasks."""

  @abc.abstractmethod
  def _after(self, chooser: Chooser) -> "Program": ...

  def step(self, chooser: Chooser) -> "Program":
    """The program after its next event.

    Raises:
      ValueError: the program has ended, or `chooser` did not lower a task's rank.
    """
    if self.rank.is_zero:
      raise ValueError(f"{self} has ended; no event is left")
    return self._after(chooser)


@dataclasses.dataclass(frozen=True)
class Task(Program):
  """A single activity. Its rank at an event is replaced by any smaller one."""

  name: str
  left: Ord

  @property
  def rank(self) -> Ord:
    return self.left

  @property
  def term(self) -> str:
    return self.name if self.name == str(self.left) else f"ρ({self.name})"

  def _after(self, chooser: Chooser) -> Program:
    lower = chooser.below(self.left)
    if not lower < self.left:
      raise ValueError(f"chooser: {self.name} went from rank {self.left} to {lower}, which is not smaller")
    return Task(self.name, lower)

  def __str__(self) -> str:
    return self.name


@dataclasses.dataclass(frozen=True)
class Sequence(Program):
  """`first; second`."""

  first: Program
  second: Program

  @property
  def rank(self) -> Ord:
    return self.second.rank + self.first.rank

  @property
  def term(self) -> str:
    return f"{self.second.term} + {self.first.term}"

  def _after(self, chooser: Chooser) -> Program:
    if self.first.rank.is_zero:
      return self.second.step(chooser)
    return dataclasses.replace(self, first=self.first.step(chooser))

  def __str__(self) -> str:
    return f"{self.first}; {self.second}"


@dataclasses.dataclass(frozen=True)
class Repeat(Program):
  """`body * counter`: every event of `counter` is also the first event of a new copy of `body`, `running`.

  Raises:
    ValueError: a body without events.
  """

  body: Program
  counter: Program
  running: Program | None = None

  def __post_init__(self):
    if self.body.rank.is_zero:
      raise ValueError(f"body={self.body} has rank 0; repeating it has no event to count")

  @property
  def rank(self) -> Ord:
    between = self.body.rank * self.counter.rank
    return between if self.running is None else between + self.running.rank

  @property
  def term(self) -> str:
    return f"{_factor(self.body)}·{_factor(self.counter)}"

  def _after(self, chooser: Chooser) -> Program:
    if self.running is not None and not self.running.rank.is_zero:
      return dataclasses.replace(self, running=self.running.step(chooser))
    return dataclasses.replace(self, counter=self.counter.step(chooser), running=self.body.step(chooser))

  def __str__(self) -> str:
    return " * ".join(f"({p})" if isinstance(p, Sequence | Repeat) else str(p) for p in (self.body, self.counter))


@dataclasses.dataclass(frozen=True)
class Interleave(Program):
  """`left || right`: every event is of one or the other, as the chooser likes."""

  left: Program
  right: Program

  @property
  def rank(self) -> Ord:
    return natural_sum(self.left.rank, self.right.rank)

  @property
  def term(self) -> str:
    return f"({self.left.term} ⊕ {self.right.term})"

  def _after(self, chooser: Chooser) -> Program:
    open_ones = [side for side in ("left", "right") if not getattr(self, side).rank.is_zero]
    side = open_ones[chooser.which(len(open_ones))]
    return dataclasses.replace(self, **{side: getattr(self, side).step(chooser)})

  def __str__(self) -> str:
    return f"({self.left} || {self.right})"


@dataclasses.dataclass(frozen=True)
class Choice(Program):
  """`left | right`: the event that decides is also the first of the chosen one."""

  left: Program
  right: Program

  @property
  def rank(self) -> Ord:
    return max(self.left.rank, self.right.rank)

  @property
  def term(self) -> str:
    return f"max({self.left.term}, {self.right.term})"

  def _after(self, chooser: Chooser) -> Program:
    chosen = (self.left, self.right)[chooser.which(2)]
    return chosen if chosen.rank.is_zero else chosen.step(chooser)

  def __str__(self) -> str:
    return f"({self.left} | {self.right})"


def _factor(program: Program) -> str:
  return f"({program.term})" if isinstance(program, Sequence) else program.term


def task(name: str, rank: Ord | int) -> Task:
  """A task of that rank: n for at most n events, `OMEGA` for a number of events settled at the first."""
  return Task(name, Ord.of(rank))


def sequence(*programs: Program) -> Program:
  """One after the other; at least one.

  >>> sequence(task("warm-up", 10), task("train", Ord.parse("w"))).rank
  Ord.parse('w + 10')
  """
  return functools.reduce(lambda later, earlier: Sequence(earlier, later), reversed(programs))


def repeat(body: Program, times: Program | Ord | int) -> Repeat:
  """`body` once per event of `times`; an ordinal stands for a task of that rank.

  >>> repeat(task("train", Ord.parse("w")), 3).rank
  Ord.parse('w*3')
  """
  return Repeat(body, times if isinstance(times, Program) else task(str(times), times))
