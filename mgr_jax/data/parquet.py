"""Documents in parquet shards: written whole or not at all, read in sequence or by unit."""

import collections
import dataclasses
import functools
import hashlib
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgr_jax.data import files as files_lib
from mgr_jax.problems import Problem, UserError

_CACHED_GROUPS = 2


class ShardInfo(NamedTuple):
  """A written shard: its file name, documents, file bytes and sha256 of the file."""

  file: str
  rows: int
  bytes: int
  sha256: str


class Footer(NamedTuple):
  """What a parquet file says of itself: rows per row group; per column its type and its bytes before compression."""

  group_rows: tuple[int, ...]
  types: dict[str, pa.DataType]
  column_bytes: dict[str, int]

  @property
  def rows(self) -> int:
    return sum(self.group_rows)


def write_shard(
  path: str | os.PathLike, texts: Iterable[str], rows_per_group: int = 1024, column: str = "text"
) -> ShardInfo:
  """Writes `texts` as one parquet file with row groups of `rows_per_group`, atomically. Memory: one row group."""
  path = Path(path)
  schema = pa.schema([pa.field(column, pa.large_string())])
  rows = 0
  with files_lib.atomic_path(path) as temporary:
    with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer:
      for group in _groups(texts, rows_per_group):
        writer.write_table(
          pa.table({column: pa.array(group, pa.large_string())}, schema=schema), row_group_size=rows_per_group
        )
        rows += len(group)
    info = ShardInfo(path.name, rows, temporary.stat().st_size, files_lib.sha256_file(temporary))
  return info


def is_text(type_: pa.DataType) -> bool:
  """True for string, large_string, string_view and dictionaries of them."""
  if pa.types.is_dictionary(type_):
    type_ = type_.value_type
  return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def read_footer(file: str | os.PathLike) -> Footer:
  """The footer of a file, read again only when its size or modification time has changed.

  Raises `OSError` or `pyarrow.ArrowInvalid` when the file is missing, cut off, or not parquet.
  """
  status = os.stat(file)
  return _read_footer(os.fspath(file), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _read_footer(file: str, size: int, mtime_ns: int) -> Footer:
  metadata = pq.read_metadata(file)
  schema = metadata.schema.to_arrow_schema()
  groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
  column_bytes = dict.fromkeys(schema.names, 0)
  for group in groups:
    for column in (group.column(c) for c in range(group.num_columns)):
      name = column.path_in_schema
      name = name if name in column_bytes else name.split(".")[0]
      column_bytes[name] = column_bytes.get(name, 0) + column.total_uncompressed_size
  types = {field.name: field.type for field in schema}
  return Footer(tuple(group.num_rows for group in groups), types, column_bytes)


def footer_sha256(file: str | os.PathLike) -> str:
  """sha256 of the footer alone, a cheap stand-in for the data.

  A footer holds the sizes, offsets and extreme values of every column chunk.
  """
  with open(file, "rb") as f:
    f.seek(-8, os.SEEK_END)
    length = int.from_bytes(f.read(4), "little")
    f.seek(-8 - length, os.SEEK_END)
    return hashlib.sha256(f.read(length)).hexdigest()


def iter_texts(file: str | os.PathLike, column: str = "text") -> Iterator[str]:
  """The documents of one file in order, without nulls and empty strings. Raises as `ParquetUnits`.

  Memory: one row group.
  """
  for group in range(len(read_footer(file).group_rows)):
    yield from usable_texts(_read_group(file, group, column))


class ParquetUnits:
  """Random access to documents by unit: item i is the list of usable texts of a run of rows of one row group.

  A unit has at most `rows_per_unit` rows. Units are numbered file by file, group by group, row by row, so the numbering
  depends on the files alone; `group_of[i]` is the number of the row group unit i lies in. With `keep`, only texts for
  which it is true are given. Reading a unit decodes its row group; the last two decoded groups are kept, so units of
  one group should be read close together. Safe to call from several threads. Construction reads footers only. An item
  that cannot be read raises `UserError` with file, row group and reason.
  """

  def __init__(
    self,
    files: Sequence[str | os.PathLike],
    column: str = "text",
    rows_per_unit: int = 1024,
    keep: Callable[[str], bool] | None = None,
  ):
    self._files = [os.fspath(f) for f in files]
    self._column = column
    self._keep = keep
    groups = [(f, g, rows) for f, file in enumerate(self._files) for g, rows in enumerate(read_footer(file).group_rows)]
    self._groups = np.array(groups, np.int64).reshape(-1, 3)
    units_per_group = -(-self._groups[:, 2] // rows_per_unit)
    self.group_of = np.repeat(np.arange(len(groups)), units_per_group)
    first_unit = np.cumsum(units_per_group) - units_per_group
    self._start = (np.arange(len(self.group_of)) - first_unit[self.group_of]) * rows_per_unit
    self.rows = np.minimum(rows_per_unit, self._groups[self.group_of, 2] - self._start)
    self._lock = threading.Lock()
    self._cache: collections.OrderedDict[int, _Decoded] = collections.OrderedDict()
    self._dropped: dict[int, int] = {}

  def __len__(self) -> int:
    return len(self.group_of)

  def __getitem__(self, index: SupportsIndex) -> list[str]:
    index = operator.index(index)
    group = int(self.group_of[index])
    rows = int(self.rows[index])
    texts = usable_texts(self._decoded(group).slice(int(self._start[index]), rows))
    self._dropped[index] = rows - len(texts)
    return texts if self._keep is None else [text for text in texts if self._keep(text)]

  def __repr__(self) -> str:
    return f"ParquetUnits({len(self._files)} files, {len(self)} units, column={self._column!r})"

  @property
  def dropped(self) -> int:
    """Nulls and empty strings in the units read so far, each unit counted once however often it is read."""
    return sum(self._dropped.values())

  def _decoded(self, group: int) -> pa.ChunkedArray:
    with self._lock:
      entry = self._cache.setdefault(group, _Decoded())
      self._cache.move_to_end(group)
      while len(self._cache) > _CACHED_GROUPS:
        self._cache.popitem(last=False)
    with entry.lock:  # a second thread that wants this group waits for the first instead of decoding it again
      if entry.column is None:
        file, number, _ = self._groups[group]
        entry.column = _read_group(self._files[file], int(number), self._column)
    return entry.column


@dataclasses.dataclass(eq=False)
class _Decoded:
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
  column: pa.ChunkedArray | None = None


def usable_texts(column: pa.ChunkedArray | pa.Array) -> list[str]:
  """The non-null, non-empty strings of a text column, in order."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  return [text for text in column.to_pylist() if text]


def _read_group(file: str | os.PathLike, group: int, column: str) -> pa.ChunkedArray:
  try:
    with pq.ParquetFile(file) as parquet:
      texts = parquet.read_row_group(group, columns=[column]).column(0)
    texts.validate(full=True)  # also that the strings are UTF-8
    return texts
  except (OSError, pa.ArrowException) as e:
    reason = str(e).split("\n")[0][:200]
    error = f"{os.path.abspath(file)}: row group {group} of column {column} cannot be read: {reason}"
    fix = "the file is truncated or corrupt: delete it and download or prepare it again"
    raise UserError(Problem(error, fix)) from e


def _groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
  group: list[str] = []
  for text in texts:
    group.append(text)
    if len(group) == size:
      yield group
      group = []
  if group:
    yield group
