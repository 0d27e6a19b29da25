"""What the readers of all formats share: options, documents, and messages about columns and malformed rows."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mgr_jax.data.readers.inputs import InputFile
from mgr_jax.problems import Problem, UserError

_PATIENCE = 1000  # malformed rows beyond the allowed ones after which reading on is pointless
_USUAL_NAMES = ("text", "content", "body", "document", "article", "message", "raw_content")


class Document(NamedTuple):
  """A text as read, and the group that must stay in one split ("" for a document on its own)."""

  text: str
  group: str


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """How files become documents.

  `text_columns`: names of the column or key, the first that a file has. `json_path`: dotted path inside a JSON record
  instead (`a.b`, `*` for every element). `split_on`: for text files, `file`, `blankline`, `line`, or a regular
  expression whose matches inside a line separate documents and are removed. `encodings`: each text file is read with
  the first that fits. `on_bad_bytes`: `error`, `replace` or `skip`. `skip_bad_rows`: malformed rows that may be left
  out. `group_by`: "", `file`, or a column or key; a text file is then one group.
  """

  text_columns: tuple[str, ...] = ("text",)
  json_path: str = ""
  split_on: str = "file"
  encodings: tuple[str, ...] = ("utf-8",)
  on_bad_bytes: str = "error"
  skip_bad_rows: int = 0
  group_by: str = ""

  @property
  def group_key(self) -> str | None:
    """The column or key to group by, None when documents are grouped by file or not at all."""
    return None if self.group_by in ("", "file") else self.group_by

  def file_group(self, file: InputFile) -> str:
    """The group of documents that have no column to group by."""
    return str(file) if self.group_by else ""


class BadRows:
  """Malformed rows met so far: how many there may be, and examples of those there are."""

  def __init__(self, allowed: int):
    self.allowed, self.count = allowed, 0
    self._examples: list[str] = []

  def add(self, file: InputFile, line: int, why: str, excerpt: str) -> None:
    self.count += 1
    if len(self._examples) < 5:
      self._examples.append(f"{file}, line {line}: {why}: {excerpt.strip()[:80]!r}")
    if self.count > self.allowed + _PATIENCE:
      self.raise_if_too_many()

  def raise_if_too_many(self) -> None:
    """Raises `UserError` with the number that would have to be allowed."""
    if self.count > self.allowed:
      rows = "rows" if self.count > 1 else "row"
      raise UserError(
        Problem(
          f"{self.count} malformed {rows}, --skip_bad_rows={self.allowed} allowed\n    "
          + "\n    ".join(self._examples),
          f"correct the {rows}, or leave out as many with --skip_bad_rows={self.count}",
        )
      )


def pick(names: Iterable[str], wanted: Sequence[str]) -> str | None:
  """The first of `wanted` that is among `names`."""
  return next((name for name in wanted if name in names), None)


def wanted(options: ReadOptions) -> str:
  return " or ".join(map(repr, options.text_columns))


def check_columns(
  file: InputFile, columns: Sequence[str], options: ReadOptions, samples: dict[str, str]
) -> list[Problem]:
  """Problems of a file whose `columns` lack the text or the group.

  `samples` holds a text, or "", of each column that could be the one meant.
  """
  problems = []
  there = ", ".join(map(repr, columns)) or "none"
  if pick(columns, options.text_columns) is None:
    problems.append(Problem(f"{file}: no column {wanted(options)}; its columns: {there}", column_fix(samples)))
  if options.group_key is not None and options.group_key not in columns:
    problems.append(
      Problem(
        f"{file}: no column {options.group_key!r} to group by; its columns: {there}",
        "use --group_by=file or one of them",
      )
    )
  return problems


def column_fix(samples: dict[str, str]) -> str:
  """Names the likeliest place of the text, given a sample of each: a usual name, else the longest sample."""
  if not samples:
    return "leave the file out: it holds no text"
  usual = [name for name in _USUAL_NAMES if name in samples]
  best = usual[0] if usual else max(samples, key=lambda name: len(samples[name]))
  if "." in best:
    return f"use --json_path={best}"
  return f"use --text_column={best} (of a list of names each file takes the first that it has)"
