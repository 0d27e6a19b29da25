"""What can be wrong with the files of a corpus, and what to do about each: one function per kind of mistake."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgr_jax.data import files, parquet
from mgr_jax.data.manifest import Manifest
from mgr_jax.problems import Problem, UserError

_PREPARE = "python -m train.prepare --input={} --out=corpus"


class FileCount(NamedTuple):
  """Documents of one file: rows, those neither null nor empty, and file bytes."""

  file: str
  role: str
  rows: int
  usable: int
  bytes: int


def check_files(directory: Path, names: Iterable[str], column: str) -> tuple[dict[str, parquet.Footer], list[Problem]]:
  """The footers of the usable files, and the problems of the others.

  Files with the same problem of columns share one message.
  """
  footers: dict[str, parquet.Footer] = {}
  problems: list[Problem] = []
  missing: dict[tuple[str, ...], list[str]] = {}
  not_text: dict[str, list[str]] = {}
  for name in names:
    file = directory / name
    try:
      footer = parquet.read_footer(file)
    except (OSError, pa.ArrowException) as e:
      reason = str(e).split("\n")[0][:200]
      error = f"{file} ({file.stat().st_size} bytes) is truncated or not parquet: {reason}"
      problems.append(Problem(error, "delete it, then download or prepare it again"))
      continue
    if column not in footer.types:
      missing.setdefault(tuple(footer.types), []).append(name)
    elif not parquet.is_text(footer.types[column]):
      not_text.setdefault(str(footer.types[column]), []).append(name)
    else:
      footers[name] = footer
  for columns, shards in missing.items():
    guess = _guess_column(parquet.read_footer(directory / shards[0]), column)
    fix = f"use --text_column={guess}" if guess else "no column holds text: prepare the data with train.prepare"
    error = f"{_some(shards)} in {directory}: no column {column!r}, the columns are {', '.join(columns)}"
    problems.append(Problem(error, fix))
  for type_, shards in not_text.items():
    samples = ", ".join(_samples(directory / shards[0], column))
    guess = _guess_column(parquet.read_footer(directory / shards[0]), column)
    other = f"use --text_column={guess}, or " if guess else ""
    error = f"{_some(shards)} in {directory}: column {column!r} holds {type_}, not strings, such as {samples}"
    problems.append(Problem(error, other + "convert the column to strings"))
  return footers, problems


def check_recorded(
  manifest: Manifest, directory: Path, footers: dict[str, parquet.Footer], hash_all: bool
) -> list[Problem]:
  """The files that are not what the manifest says, by size and rows and, with `hash_all`, by content."""
  problems = []
  for record in manifest.files:
    if record.file not in footers:
      continue
    file = directory / record.file
    size, rows = file.stat().st_size, footers[record.file].rows
    if (size, rows) != (record.bytes, record.rows):
      recorded = f"{record.bytes} bytes and {record.rows} rows"
      problems.append(changed(file, f"it has {size} bytes and {rows} rows, the manifest says {recorded}"))
    elif hash_all and (digest := files.sha256_file(file)) != record.sha256:
      problems.append(changed(file, f"its sha256 is {digest}, the manifest says {record.sha256}"))
  return problems


def read_documents(file: Path, column: str) -> tuple[np.ndarray, list[Problem]]:
  """uint64[usable documents]: the hash of each, and the problem that the file cannot be read to its end."""
  hashes: list[int] = []
  try:
    hashes.extend(map(files.document_hash, parquet.iter_texts(file, column)))
  except UserError as e:
    return np.array(hashes, np.uint64), list(e.problems)
  return np.array(hashes, np.uint64), []


def repeated_documents(hashes: dict[str, np.ndarray]) -> list[Problem]:
  """Warnings about training documents that occur again, among themselves (above 1%) or in another split.

  `hashes` holds the uint64 hashes of the documents of each split.
  """
  warnings = []
  train = hashes["train"]
  unique, repeats = np.unique(train, return_counts=True)
  copies = len(train) - len(unique)
  if copies > 0.01 * len(train):
    error = (
      f"{copies} of {len(train)} training documents are exact copies of another (one occurs {repeats.max()} times)"
    )
    warnings.append(Problem(error, "python -m train.prepare --dedupe=exact"))
  for split in ("val", "test"):
    if leaked := int(np.isin(hashes[split], unique).sum()):
      error = f"{leaked} of {len(hashes[split])} {split} documents are also training documents"
      warnings.append(Problem(error, "python -m train.prepare --dedupe=exact"))
  return warnings


def nothing_there(directory: Path) -> Problem:
  """No such directory, or no shard in it."""
  if directory.is_dir():
    entries = sorted(p.name for p in directory.iterdir())
    found = f"there is no .parquet file in {directory}, which holds {_some(entries) or 'nothing'}"
    return Problem(found, _PREPARE.format(directory))
  if directory.exists():
    return Problem(f"{directory} is a file, not a directory of parquet shards", _PREPARE.format(directory))
  parent = next(p for p in directory.parents if p.is_dir())
  entries = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
  found = f"there is no directory {directory}; {parent} holds {_some(entries) or 'nothing'}"
  return Problem(found, _PREPARE.format("FILE_OR_FOLDER").replace("--out=corpus", f"--out={directory}"))


def no_validation(directory: Path, roles: dict[str, str], manifest: Manifest | None) -> Problem:
  """No file has the role of validation."""
  held = (
    f"its manifest names no validation file ({len(roles)} in all)"
    if manifest
    else f"it holds one shard only, {_some(roles)}"
  )
  return Problem(
    f"{directory} has no validation documents: {held}",
    f"re-shard with {_PREPARE.format(directory)}; or hold out 1% of the documents with --val_from_train=0.01;"
    " or train without validation with --val_every=-1",
  )


def unlisted(directory: Path, names: list[str]) -> Problem:
  """A warning about shards without a role."""
  error = f"{len(names)} files in {directory} are not in its manifest and are not used: {_some(names)}"
  return Problem(error, "prepare the data again, or delete manifest.json to use every file")


def changed(file: Path, how: str) -> Problem:
  """A file is not the one that the manifest describes."""
  error = f"{file}: data changed since preparation: {how}"
  return Problem(error, "prepare the data again with python -m train.prepare, or delete manifest.json beside it")


def nothing_usable(split: str, counts: list[tuple[str, int, int]]) -> Problem:
  """A split is empty; `counts` holds (file, usable documents, rows)."""
  held = ", ".join(f"{file} {usable} of {rows} rows" for file, usable, rows in counts[:10]) or "no file has this role"
  return Problem(
    f"the {split} split has 0 usable documents (usable per file, nulls and empty strings left out: {held})",
    "add documents and prepare again with python -m train.prepare"
    + ("; or hold out more with --val_from_train" if split == "val" else ""),
  )


def _guess_column(footer: parquet.Footer, asked: str) -> str | None:
  texts = [name for name, type_ in footer.types.items() if parquet.is_text(type_) and name != asked]
  close = difflib.get_close_matches(asked, texts, n=1)
  return close[0] if close else max(texts, key=footer.column_bytes.__getitem__, default=None)


def _samples(file: Path, column: str) -> list[str]:
  with pq.ParquetFile(file) as shard:
    for batch in shard.iter_batches(batch_size=3, columns=[column]):
      return [repr(value)[:60] for value in batch.column(0).to_pylist()]
  return ["no rows"]


def _some(names: Iterable[str]) -> str:
  names = list(names)
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
