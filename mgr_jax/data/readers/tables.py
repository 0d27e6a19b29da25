"""Comma- and tab-separated tables with a header line."""

import csv
from collections.abc import Iterable, Iterator

from mgr_jax.data.readers import decoding
from mgr_jax.data.readers.common import BadRows, Document, ReadOptions, check_columns, pick
from mgr_jax.data.readers.inputs import InputFile
from mgr_jax.problems import Problem

_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
_LARGEST_FIELD = 1 << 27


def read(file: InputFile, options: ReadOptions, bad: BadRows) -> Iterator[Document]:
  csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))  # can only be set for the whole process
  delimiter, header = _header(file, options)
  if not delimiter:
    return
  text_at = header.index(pick(header, options.text_columns))
  group_at = None if options.group_key is None else header.index(options.group_key)
  with decoding.open_text(file.path, file.encoding, options.on_bad_bytes, newline="") as stream:
    lines = _Remembering(stream)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    next(rows)
    while True:
      try:
        row = next(rows)
      except StopIteration:
        return
      except csv.Error as e:
        bad.add(file, rows.line_num, f"malformed {file.kind[1:]} ({e})", lines.last)
        continue
      if row and len(row) != len(header):
        bad.add(file, rows.line_num, f"{len(row)} fields, the header has {len(header)}", lines.last)
      elif row:
        group = options.file_group(file) if group_at is None else f"{options.group_key}={row[group_at]}"
        yield Document(row[text_at], group)


def check(file: InputFile, options: ReadOptions) -> list[Problem]:
  delimiter, header = _header(file, options)
  if not delimiter:
    return []
  if not header:
    return [Problem(f"{file}: its first line holds no column names", "write a header line, or leave the file out")]
  return check_columns(file, header, options, dict.fromkeys(header, ""))


def _header(file: InputFile, options: ReadOptions) -> tuple[str, list[str]]:
  """(delimiter, column names), ("", []) for an empty file.

  The delimiter is the first under which the header holds the text column, else the one that gives most columns.
  """
  headers = [(d, _first_row(file, options, d)) for d in _DELIMITERS[file.kind]]
  if headers[0][1] is None:
    return "", []
  named = [pair for pair in headers if pick(pair[1], options.text_columns) is not None]
  return named[0] if named else max(headers, key=lambda pair: len(pair[1]))


def _first_row(file: InputFile, options: ReadOptions, delimiter: str) -> list[str] | None:
  with decoding.open_text(file.path, file.encoding, options.on_bad_bytes, newline="") as stream:
    try:
      return next(csv.reader(stream, delimiter=delimiter, strict=True), None)
    except csv.Error:
      return []


class _Remembering:
  """The lines of a stream, the last one kept for messages."""

  def __init__(self, lines: Iterable[str]):
    self._lines, self.last = iter(lines), ""

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    self.last = next(self._lines)
    return self.last
