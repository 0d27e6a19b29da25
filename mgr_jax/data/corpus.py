"""A directory of parquet shards as training, validation and test documents, checked before anything is compiled."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mgr_jax.data import checks, files, parquet
from mgr_jax.data import tokenizer as tokenizer_lib
from mgr_jax.data.checks import FileCount
from mgr_jax.data.manifest import ROLES, Manifest, read_manifest, write_manifest
from mgr_jax.problems import Problem, UserError, raise_if_any

__all__ = ["Corpus", "FileCount", "Inspection", "Manifest", "held_out", "inspect", "load_corpus", "write_manifest"]

UNIT_ROWS = 128
HASH_LIMIT = 256 * 2**20  # bytes of shards up to which every start hashes all of them
SCAN_LIMIT = 32 * 2**20  # bytes of shards up to which every start reads all documents


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Where the documents of each split are, and what they hash to.

  `sha256` is the identity of the data: it changes when files, roles, text column or content do. Up to `HASH_LIMIT`
  bytes of shards every file's content enters the identity; beyond that, the sha256 values of the manifest or, without
  one, of the parquet footers do. With `val_from_train` > 0 the validation documents are those of the training files for
  which `held_out` is true, and training leaves them out.
  """

  directory: Path
  text_column: str
  train: tuple[Path, ...]
  val: tuple[Path, ...]
  test: tuple[Path, ...]
  sha256: str
  val_from_train: float = 0.0
  manifest: Manifest | None = dataclasses.field(default=None, repr=False)
  warnings: tuple[Problem, ...] = dataclasses.field(default=(), compare=False)

  def units(self, split: str, rows_per_unit: int = UNIT_ROWS) -> parquet.ParquetUnits:
    """Random access to the documents of `train`, `val` or `test` by unit."""
    keep = None
    if self.val_from_train and split != "test":

      def keep(text: str) -> bool:
        return held_out(text, self.val_from_train) == (split == "val")

    return parquet.ParquetUnits(getattr(self, split), self.text_column, rows_per_unit, keep)


class Inspection(NamedTuple):
  """All that is wrong with a directory, what should be known of it, and its documents per file.

  `corpus` is None when there are problems.
  """

  problems: tuple[Problem, ...]
  warnings: tuple[Problem, ...]
  counts: tuple[FileCount, ...]
  corpus: Corpus | None


def load_corpus(
  directory: str | os.PathLike, text_column: str = "text", val_from_train: float = 0.0, need_val: bool = True
) -> Corpus:
  """The corpus in `directory`, or `UserError` with every problem found.

  `manifest.json` names the role of each file; without it the last shard is validation. A manifest's text column wins
  over the default `text`. `need_val=False` accepts data without validation documents. Cost: all footers; the content of
  all files up to `HASH_LIMIT` bytes, and all documents up to `SCAN_LIMIT` bytes, so that changed data and leaks are
  noticed where it is cheap; `inspect` always does both.
  """
  inspection = _examine(directory, text_column, val_from_train, need_val, thorough=False)
  raise_if_any(inspection.problems)
  return inspection.corpus


def inspect(
  directory: str | os.PathLike,
  text_column: str = "text",
  val_from_train: float = 0.0,
  need_val: bool = True,
  tokenizer: str | None = None,
) -> Inspection:
  """Reads every byte and every document of `directory` and reports all problems and warnings together; raises nothing.

  `tokenizer` is a `--tokenizer` value to check as well (None: do not). Cost: one pass over the data, 8 bytes of memory
  per document.
  """
  inspection = _examine(directory, text_column, val_from_train, need_val, thorough=True)
  if tokenizer is not None:
    try:
      tokenizer_lib.resolve(tokenizer, directory)
    except UserError as e:
      known = set(inspection.problems)
      inspection = inspection._replace(problems=inspection.problems + tuple(p for p in e.problems if p not in known))
  return inspection


def held_out(text: str, fraction: float) -> bool:
  """True for about `fraction` of all documents, chosen by their content: copies of a document fall on the same side."""
  return files.document_hash(text) < _threshold(fraction)


def _threshold(fraction: float) -> int:
  return int(fraction * 2.0**64)


def _examine(
  directory: str | os.PathLike, text_column: str, val_from_train: float, need_val: bool, thorough: bool
) -> Inspection:
  directory = Path(directory).expanduser().absolute()
  if not 0.0 <= val_from_train < 1.0:
    fix = "use a fraction such as --val_from_train=0.01"
    return Inspection((Problem(f"--val_from_train={val_from_train} is not in [0, 1)", fix),), (), (), None)
  present = sorted(p.name for p in directory.glob("*.parquet") if p.name[0] not in "._")
  if not present:
    return Inspection((checks.nothing_there(directory),), (), (), None)

  problems: list[Problem] = []
  warnings: list[Problem] = []
  manifest = None
  try:
    manifest = read_manifest(directory)
  except UserError as e:
    problems += e.problems
  manifest_broken = bool(problems)
  if manifest is not None and text_column == "text":
    text_column = manifest.text_column
  roles = _roles(present, manifest, val_from_train)
  if absent := [name for name in roles if not (directory / name).exists()]:
    problems += [checks.changed(directory / name, "it is missing") for name in absent]
    roles = {name: role for name, role in roles.items() if name not in absent}
  if unlisted := [name for name in present if manifest is not None and name not in roles]:
    warnings.append(checks.unlisted(directory, unlisted))
  if val_from_train and "val" in roles.values():
    error = f"--val_from_train={val_from_train} has no use: the manifest of {directory} names validation files"
    problems.append(Problem(error, "leave --val_from_train out"))
  elif need_val and not val_from_train and "val" not in roles.values() and not manifest_broken:
    problems.append(checks.no_validation(directory, roles, manifest))

  size = sum((directory / name).stat().st_size for name in roles)
  footers, found = checks.check_files(directory, roles, text_column)
  problems += found
  if manifest is not None:
    problems += checks.check_recorded(manifest, directory, footers, hash_all=thorough or size <= HASH_LIMIT)
  corpus = None
  if len(footers) == len(roles) and not absent:
    corpus = _corpus(directory, text_column, val_from_train, manifest, roles, size)

  counts: tuple[FileCount, ...] = ()
  empty: list[str] = []
  if thorough or size <= SCAN_LIMIT:
    counts, hashes, unreadable = _read_all(directory, footers, roles, text_column, val_from_train)
    problems += unreadable
    warnings += checks.repeated_documents(hashes)
    empty = [split for split, found in hashes.items() if not len(found)]
  elif corpus is not None:
    empty = [split for split in ("train", "val") if not any(map(len, corpus.units(split)))]
  if corpus is not None and not problems:
    needed = ("train", "val") if need_val else ("train",)
    problems += [checks.nothing_usable(split, _rows_of(split, corpus, counts)) for split in needed if split in empty]
  if corpus is not None:
    corpus = dataclasses.replace(corpus, warnings=tuple(warnings))
  return Inspection(tuple(problems), tuple(warnings), counts, None if problems else corpus)


def _roles(present: list[str], manifest: Manifest | None, val_from_train: float) -> dict[str, str]:
  if manifest is not None:
    return {record.file: record.role for record in manifest.files}
  roles = dict.fromkeys(present, "train")
  if len(present) > 1 and not val_from_train:
    roles[present[-1]] = "val"
  return roles


def _read_all(
  directory: Path, names: Iterable[str], roles: dict[str, str], column: str, val_from_train: float
) -> tuple[tuple[FileCount, ...], dict[str, np.ndarray], list[Problem]]:
  """Per file its documents, per split their hashes, and the files that cannot be read to their end."""
  counts = []
  problems = []
  hashes = {role: [np.zeros(0, np.uint64)] for role in ROLES}
  for name in sorted(names):
    file, role = directory / name, roles[name]
    found, unreadable = checks.read_documents(file, column)
    problems += unreadable
    counts.append(FileCount(name, role, parquet.read_footer(file).rows, len(found), file.stat().st_size))
    held = (found < np.uint64(_threshold(val_from_train))) & (role == "train")
    hashes["val"].append(found[held])
    hashes[role].append(found[~held])
  return tuple(counts), {role: np.concatenate(parts) for role, parts in hashes.items()}, problems


def _corpus(
  directory: Path, column: str, val_from_train: float, manifest: Manifest | None, roles: dict[str, str], size: int
) -> Corpus:
  files_of = {role: tuple(directory / n for n in sorted(roles) if roles[n] == role) for role in ROLES}
  if val_from_train:
    files_of["val"] = files_of["train"]
  sha256 = _identity(directory, column, val_from_train, manifest, roles, size)
  return Corpus(directory, column, **files_of, sha256=sha256, val_from_train=val_from_train, manifest=manifest)


def _rows_of(split: str, corpus: Corpus, counts: Iterable[FileCount]) -> list[tuple[str, int, int]]:
  """(file, usable documents, rows) of the files of an empty split; a file that was not counted has none."""
  usable = {count.file: count.usable for count in counts}
  return [(f.name, usable.get(f.name, 0), parquet.read_footer(f).rows) for f in getattr(corpus, split)]


def _identity(
  directory: Path, column: str, val_from_train: float, manifest: Manifest | None, roles: dict[str, str], size: int
) -> str:
  recorded = {record.file: record.sha256 for record in manifest.files} if manifest else {}
  contents = []
  for name, role in sorted(roles.items()):
    file = directory / name
    if name in recorded:
      content = recorded[name]
    elif size <= HASH_LIMIT:
      content = files.sha256_file(file)
    else:
      content = f"{file.stat().st_size}:{parquet.footer_sha256(file)}"
    contents.append([name, role, content])
  return hashlib.sha256(json.dumps([column, val_from_train, contents]).encode()).hexdigest()
