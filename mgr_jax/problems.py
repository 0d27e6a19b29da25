"""Mistakes a user can fix, as data: what is wrong, and what to do about it."""

from collections.abc import Iterable
from typing import NamedTuple


class Problem(NamedTuple):
  """One mistake. `error` names the offending value, `fix` a command or a value that works."""

  error: str
  fix: str

  def __str__(self) -> str:
    return f"error: {self.error}\n  fix: {self.fix}"


class UserError(ValueError):
  """One or more `Problem`s, all of them found before anything was compiled or overwritten.

  Programs print `str(e)` and exit with code 2, without a traceback.
  """

  def __init__(self, *problems: Problem):
    self.problems = tuple(problems)
    super().__init__("\n".join(str(p) for p in self.problems))


def raise_if_any(problems: Iterable[Problem]) -> None:
  """Raises one `UserError` with all `problems`, or returns when there are none."""
  problems = tuple(problems)
  if problems:
    raise UserError(*problems)
