"""A parser for expressions in natural numbers and ω: `w^2*3 + w*5 + 7`, `(w + 1)*2`, `2^w`."""

import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_TOKEN = re.compile(r"\s*(\d+|\*\*|[wω+*·^()])")


def evaluate(text: str, number: Callable[[int], T], omega: T) -> T:
  """The value of an expression, by the operators `+`, `*`, `**` of T.

  `^` binds strongest and groups from the right, `+` binds weakest. `ω`, `·` and `**` stand for `w`, `*` and `^`.

  Raises:
    ValueError: not an expression, with the place of the first mistake.
  """
  return _Parser(text, number, omega).whole()


class _Parser:
  """Recursive descent; `at` is the first token not read yet."""

  def __init__(self, text: str, number: Callable[[int], T], omega: T):
    self.text, self.number, self.omega, self.at = text, number, omega, 0
    self.tokens, self.places, place = [], [], 0
    end = len(text.rstrip())
    while place < end:
      match = _TOKEN.match(text, place)
      if match is None:
        self.fail(place + len(text[place:]) - len(text[place:].lstrip()))
      self.tokens.append({"ω": "w", "·": "*", "**": "^"}.get(match[1], match[1]))
      self.places.append(match.start(1))
      place = match.end()

  def whole(self) -> T:
    value = self.sum()
    if self.at < len(self.tokens):
      self.fail(self.places[self.at])
    return value

  def sum(self) -> T:
    value = self.product()
    while self.took("+"):
      value = value + self.product()
    return value

  def product(self) -> T:
    value = self.power()
    while self.took("*"):
      value = value * self.power()
    return value

  def power(self) -> T:
    base = self.atom()
    return base ** self.power() if self.took("^") else base

  def atom(self) -> T:
    if self.took("w"):
      return self.omega
    if self.took("("):
      value = self.sum()
      if self.took(")"):
        return value
    elif self.at < len(self.tokens) and self.tokens[self.at].isdigit():
      self.at += 1
      return self.number(int(self.tokens[self.at - 1]))
    self.fail(self.places[self.at] if self.at < len(self.tokens) else len(self.text))

  def took(self, token: str) -> bool:
    found = self.at < len(self.tokens) and self.tokens[self.at] == token
    self.at += found
    return found

  def fail(self, place: int):
    found = f"{self.text[place]!r} at place {place}" if place < len(self.text) else "the end"
    raise ValueError(f"{self.text!r} is no ordinal expression: unexpected {found}; e.g. w^2*3 + w*5 + 7")
