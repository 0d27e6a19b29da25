"""Documents out of text, JSON, table and parquet files, one at a time: memory is that of the largest document."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from mgr_jax.data.readers import inputs, json_files, parquet_files, tables, text_files
from mgr_jax.data.readers.common import BadRows, Document, ReadOptions
from mgr_jax.data.readers.inputs import InputFile, find
from mgr_jax.problems import Problem, UserError

__all__ = ["Document", "InputFile", "ReadOptions", "check", "documents", "find"]

_READ = {
  ".txt": text_files.read,
  ".md": text_files.read,
  ".json": json_files.read,
  ".jsonl": json_files.read_lines,
  ".csv": tables.read,
  ".tsv": tables.read,
  ".parquet": parquet_files.read,
}
_CHECK = {
  ".json": json_files.check,
  ".jsonl": json_files.check,
  ".csv": tables.check,
  ".tsv": tables.check,
  ".parquet": parquet_files.check,
}


def check(files: Sequence[InputFile], options: ReadOptions) -> tuple[list[InputFile], list[Problem]]:
  """The files with the encoding that fits each, and everything found wrong with options and files.

  Reads text files whole for their encoding; of JSON, tables and parquet the first record or the column names.
  """
  problems = inputs.check_encodings(options.encodings)
  if options.split_on not in ("file", "blankline", "line"):
    try:
      re.compile(options.split_on)
    except re.error as e:
      problems.append(
        Problem(
          f"--split_on={options.split_on} is not a regular expression: {e}",
          "use file, blankline, line, or for example '^-{5,}$'",
        )
      )
  if problems:
    return list(files), problems
  checked = []
  for file in files:
    try:
      if file.kind not in inputs.PARQUET:
        encoding, problem = inputs.fitting_encoding(file, options.encodings, options.on_bad_bytes)
        file = dataclasses.replace(file, encoding=encoding)
        if problem is not None:
          problems.append(problem)
          continue
      problems += _CHECK[file.kind](file, options) if file.kind in _CHECK else []
      checked.append(file)
    except (*inputs.DAMAGED, OSError) as e:
      problems.append(inputs.unreadable(file, e))
  return checked, problems


def documents(
  files: Iterable[InputFile], options: ReadOptions, dropped: collections.Counter[str]
) -> Iterator[Document]:
  """The documents of checked `files` in order, empty ones included.

  Adds to `dropped` what is left out, as "malformed row" or "bad bytes". Raises `UserError` when more rows are malformed
  than `options.skip_bad_rows`: after the last file, so that the message holds the number to allow, or 1000 rows later.
  """
  bad = BadRows(options.skip_bad_rows)
  for file in files:
    try:
      for document in _READ[file.kind](file, options, bad):
        text = _well_formed(document.text, options.on_bad_bytes)
        if text is not None:
          yield Document(text, document.group)
        elif options.on_bad_bytes == "skip":
          dropped["bad bytes"] += 1
        else:
          raise UserError(
            Problem(
              f"{file}: a text with half a surrogate pair, which is not Unicode: {document.text[:60]!a}",
              "use --on_bad_bytes=replace (U+FFFD) or --on_bad_bytes=skip (drop such documents)",
            )
          )
    except (*inputs.DAMAGED, OSError) as e:
      raise UserError(inputs.unreadable(file, e)) from e
  bad.raise_if_too_many()
  if bad.count:
    dropped["malformed row"] += bad.count


def _well_formed(text: str, on_bad_bytes: str) -> str | None:
  """The text if it holds no surrogates, which mark bad bytes, or are halves of a pair from a JSON escape."""
  try:
    text.encode("utf-8")
    return text
  except UnicodeEncodeError:
    return re.sub("[\ud800-\udfff]", "\ufffd", text) if on_bad_bytes == "replace" else None
