"""JSON files record by record, without holding the file in memory, and values inside a record by path."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_BLOCK = 1 << 16
_SPACE = re.compile(r"\s*")


class Malformed(ValueError):
  """Text that is not JSON: its line number (from 1), the reason, and the characters there."""

  def __init__(self, line: int, why: str, excerpt: str):
    super().__init__(why)
    self.line, self.why, self.excerpt = line, why, excerpt


def records(stream: TextIO) -> Iterator[tuple[int, Any]]:
  """(line, value) of each element when the file is one list, else of each of its top-level values (one, or many in
  sequence).

  Memory: the largest record, and one block. Raises `Malformed`.
  """
  text = _Window(stream)
  if text.skip_space() != "[":
    while text.skip_space():
      yield text.line, text.value()
    return
  text.at += 1
  mark = text.skip_space()
  while mark != "]":
    text.skip_space()
    yield text.line, text.value()
    mark = text.skip_space()
    if mark not in ("]", ","):
      raise text.malformed("expected ',' or ']'" if mark else "the list is not closed")
    text.at += mark == ","
  text.at += 1
  if text.skip_space():
    raise text.malformed("more text after the list")


def at_path(record: Any, path: str) -> list[Any]:
  """The values at a dotted path: `a.b` is `record["a"]["b"]`; `*` stands for every element of a list or every value
  of an object.

  Raises `KeyError` naming the part that is absent, and what is there instead.
  """
  values = [record]
  for part in path.split(".") if path else ():
    below: list[Any] = []
    for value in values:
      if part == "*" and isinstance(value, list):
        below += value
      elif part == "*" and isinstance(value, dict):
        below += value.values()
      elif isinstance(value, dict) and part in value:
        below.append(value[part])
      else:
        raise KeyError(f"no {part!r} in {described(value)}")
    values = below
  return values


def described(value: Any) -> str:
  """A short account of a JSON value for messages: the keys of an object, the length of a list, the type of anything
  else."""
  if isinstance(value, dict):
    return "an object with the keys " + ", ".join(map(repr, list(value)[:20])) if value else "an empty object"
  return f"a list of {len(value)}" if isinstance(value, list) else f"the {type(value).__name__} {str(value)[:40]!r}"


def text_paths(record: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(path, text) of every string inside a record, lists by `*` and their first element."""
  if isinstance(record, str):
    yield prefix, record
  children = (
    record.items() if isinstance(record, dict) else [("*", record[0])] if isinstance(record, list) and record else ()
  )
  for name, value in children:
    yield from text_paths(value, f"{prefix}.{name}" if prefix else name)


class _Window:
  """The unread part of a stream, from which whole JSON values are taken."""

  def __init__(self, stream: TextIO):
    self._stream, self._decoder = stream, json.JSONDecoder()
    self._text, self._ended = "", False
    self._line, self._counted = 1, 0  # line number at the position `_counted`
    self.at = 0

  @property
  def line(self) -> int:
    self._line += self._text.count("\n", self._counted, self.at)
    self._counted = self.at
    return self._line

  def skip_space(self) -> str:
    """Moves to the next character that is no white space and returns it, "" at the end."""
    while True:
      self.at = _SPACE.match(self._text, self.at).end()
      if self.at < len(self._text):
        return self._text[self.at]
      if not self._read():
        return ""

  def value(self) -> Any:
    while True:
      try:
        value, end = self._decoder.raw_decode(self._text, self.at)
        length = end - self.at
        if end < len(self._text) or not self._read():  # a number at the end of the window may have more digits
          self.at += length
          return value
      except json.JSONDecodeError as e:
        # An error near the end of the window, or a string without its end, may be a value that has not been read whole.
        length = e.pos - self.at
        cut = e.pos >= len(self._text) - 16 or e.msg.startswith("Unterminated string")
        if not cut or not self._read():
          self.at = min(self.at + length, len(self._text))
          raise self.malformed(e.msg) from e
      except (ValueError, RecursionError) as e:  # a number of too many digits, or nesting too deep
        raise self.malformed(str(e)) from e

  def malformed(self, why: str) -> Malformed:
    start = max(self._text.rfind("\n", 0, self.at) + 1, self.at - 40)
    return Malformed(self.line, why, self._text[start : start + 80].split("\n")[0])

  def _read(self) -> bool:
    """Drops what has been consumed and reads as much again as is left; False at the end of the stream."""
    if self._ended:
      return False
    self._line = self.line
    self._text = self._text[self.at :]
    self.at = self._counted = 0
    block = self._stream.read(max(_BLOCK, len(self._text)))
    self._ended = not block
    self._text += block
    return not self._ended
