"""Parquet tables made elsewhere, read in batches."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from mgr_jax.data.parquet import is_text
from mgr_jax.data.readers import decoding, inputs
from mgr_jax.data.readers.common import BadRows, Document, ReadOptions, check_columns, column_fix, pick
from mgr_jax.data.readers.inputs import InputFile
from mgr_jax.problems import Problem, UserError

_ROWS = 1024


def read(file: InputFile, options: ReadOptions, bad: BadRows) -> Iterator[Document]:
  try:
    yield from _read(file, options)
  except (pa.ArrowException, OSError) as e:
    raise UserError(_unreadable(file, e)) from e


def _read(file: InputFile, options: ReadOptions) -> Iterator[Document]:
  with _open(file) as table:
    text_column = pick(table.schema_arrow.names, options.text_columns)
    columns = [text_column] if options.group_key is None else [text_column, options.group_key]
    for batch in table.iter_batches(_ROWS, columns=columns):
      texts = _strings(file, batch.column(text_column), options.on_bad_bytes)
      if options.group_key is None:
        groups = [options.file_group(file)] * len(texts)
      else:
        groups = [f"{options.group_key}={value}" for value in batch.column(options.group_key).to_pylist()]
      yield from (Document(text or "", group) for text, group in zip(texts, groups, strict=True))


def check(file: InputFile, options: ReadOptions) -> list[Problem]:
  try:
    with _open(file) as table:
      schema = table.schema_arrow
      texts = {field.name: "" for field in schema if is_text(field.type)}
      problems = check_columns(file, schema.names, options, texts)
      name = pick(schema.names, options.text_columns)
      if name is not None and name not in texts:
        batch = next(table.iter_batches(3, columns=[name]), None)
        values = ", ".join(map(repr, batch.column(0).to_pylist())) if batch else "no values"
        problems.append(
          Problem(f"{file}: column {name!r} is {schema.field(name).type}, not text: {values}", column_fix(texts))
        )
      return problems
  except (pa.ArrowException, OSError) as e:
    return [_unreadable(file, e)]


def _unreadable(file: InputFile, e: Exception) -> Problem:
  if isinstance(e, inputs.DAMAGED) or getattr(e, "errno", None):
    return inputs.unreadable(file, e)
  size = file.path.stat().st_size  # Arrow reports damage as ArrowInvalid or as an OSError without a number
  return Problem(f"{file} ({size} bytes) is truncated or not parquet: {e}", "copy or download the file again")


@contextlib.contextmanager
def _open(file: InputFile) -> Iterator[pq.ParquetFile]:
  """The table; one inside .gz is unpacked to a temporary file first, since the footer with the column names stands at
  the end."""
  with contextlib.ExitStack() as stack:
    source = file.path
    if source.suffix.lower() == ".gz":
      source = stack.enter_context(tempfile.TemporaryFile())
      with decoding.open_binary(file.path) as packed:
        shutil.copyfileobj(packed, source)
    yield stack.enter_context(pq.ParquetFile(source))


def _strings(file: InputFile, column: pa.Array, on_bad_bytes: str) -> list[str | None]:
  """The strings of a column. Arrow does not check that they are UTF-8, Python does."""
  try:
    return column.to_pylist()
  except UnicodeDecodeError as e:
    if on_bad_bytes == "error":
      raise UserError(
        Problem(
          f"{file}: byte 0x{e.object[e.start]:02x} at offset {e.start} of {e.object[:60]!r} is not valid utf-8",
          "use --on_bad_bytes=replace (U+FFFD) or --on_bad_bytes=skip (drop such documents)",
        )
      ) from e
    if pa.types.is_dictionary(column.type):
      column = column.dictionary_decode()
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else decoding.decode(value, on_bad_bytes) for value in values]
