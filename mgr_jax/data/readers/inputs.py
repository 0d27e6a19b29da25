"""Which files to read: found, ordered, and checked as a whole before any of them is read for good."""

import codecs
import collections
import dataclasses
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mgr_jax.data.readers import decoding
from mgr_jax.problems import Problem, raise_if_any

TEXT = (".txt", ".md")
JSON = (".json", ".jsonl")
TABLE = (".csv", ".tsv")
PARQUET = (".parquet",)
SUPPORTED = TEXT + JSON + TABLE + PARQUET
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)

_BESIDE_SHARDS = ("manifest.json", "tokenizer.json", "prepare.md")

CONVERTERS = {
  ".pdf": "pdftotext",
  ".docx": "pandoc",
  ".doc": "LibreOffice",
  ".odt": "pandoc",
  ".rtf": "pandoc",
  ".epub": "pandoc",
  ".html": "pandoc",
  ".htm": "pandoc",
  ".xlsx": "LibreOffice",
  ".xls": "LibreOffice",
}


@dataclasses.dataclass(frozen=True)
class InputFile:
  """A file to read: `kind` is its extension without .gz, `encoding` the one that fits it (text formats only)."""

  path: Path
  kind: str
  encoding: str = "utf-8"

  def __str__(self) -> str:
    return str(self.path)


def find(inputs: Sequence[str], exclude: str | os.PathLike | None = None) -> tuple[list[InputFile], dict[str, int]]:
  """The readable files among `inputs`, sorted by path, each once; and how many others the folders hold, by extension.

  Folders are searched recursively; hidden entries and the folder `exclude` (the output) are passed over. Raises
  `UserError` for a path that does not exist, for a file of an unsupported type, and when nothing readable is found.
  """
  problems: list[Problem] = []
  found: dict[Path, InputFile] = {}
  others: collections.Counter[str] = collections.Counter()
  for name in inputs:
    path = Path(name)
    if path.is_dir():
      for file in _walk(path, Path(exclude).resolve() if exclude else None):
        if kind(file) in SUPPORTED:
          found.setdefault(file.resolve(), InputFile(file, kind(file)))
        else:
          others[kind(file) or "(no extension)"] += 1
    elif not path.exists():
      problems.append(Problem(f"--input={name} does not exist ({path.absolute()})", "give an existing file or folder"))
    elif kind(path) not in SUPPORTED:
      problems.append(Problem(f"--input={name}: type {kind(path)!r} is not supported", conversion(kind(path))))
    else:
      found.setdefault(path.resolve(), InputFile(path, kind(path)))
  if not found and not problems:
    searched = ", ".join(str(Path(i).absolute()) for i in inputs) or "nothing (no --input given)"
    held = ", ".join(f"{n} {ext}" for ext, n in sorted(others.items())) or "no files"
    fix = next((conversion(ext) for ext in sorted(others) if ext in CONVERTERS), None)
    problems.append(
      Problem(
        f"no readable input in {searched}: found {held}",
        fix or f"give --input files or folders with {' '.join(SUPPORTED)}, each optionally .gz",
      )
    )
  raise_if_any(problems)
  return sorted(found.values(), key=lambda f: os.fspath(f.path)), dict(sorted(others.items()))


def kind(path: Path) -> str:
  """The lower-case extension, looked for before a final .gz."""
  return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def conversion(extension: str) -> str:
  """What to do with a file that is not read: the tool that turns it into text, when it is a known document format."""
  if extension in CONVERTERS:
    return f"convert to text first, for {extension} with {CONVERTERS[extension]}, and give the .txt"
  return f"give {' '.join(SUPPORTED)}, each optionally .gz"


def check_encodings(names: Iterable[str]) -> list[Problem]:
  """The names that are no text encoding of this Python."""
  problems = []
  for name in names:
    try:
      "".encode(codecs.lookup(name).name)
    except LookupError:
      problems.append(
        Problem(
          f"--encoding={name} is not a known text encoding",
          "use for example --encoding=utf-8, cp1251, cp1252 or utf-16",
        )
      )
  return problems


def fitting_encoding(file: InputFile, encodings: Sequence[str], on_bad_bytes: str) -> tuple[str, Problem | None]:
  """The first of `encodings` that decodes the whole file; where none does, the first one, under `error` with a problem.

  Reads the file whole when there is more than one encoding or on_bad_bytes is `error`.
  """
  if len(encodings) == 1 and on_bad_bytes != "error":
    return encodings[0], None
  bad = [decoding.first_bad_byte(file.path, encoding) for encoding in encodings]
  if None in bad:
    return encodings[bad.index(None)], None
  return encodings[0], _bad_bytes(file, encodings, bad[0]) if on_bad_bytes == "error" else None


def unreadable(file: InputFile, e: Exception) -> Problem:
  """The problem that reading `file` failed with `e`, one of `DAMAGED` or an `OSError`."""
  if isinstance(e, DAMAGED):
    return Problem(f"{file}: damaged gzip ({e})", "copy or download the file again, or leave it out")
  return Problem(f"{file} cannot be read: {getattr(e, 'strerror', None) or e}", "check the file and its permissions")


def _bad_bytes(file: InputFile, encodings: Sequence[str], bad: tuple[int, int]) -> Problem:
  offset, value = bad
  what = f"{file}: byte 0x{value:02x} at offset {offset} is not valid {encodings[0]}"
  if len(encodings) > 1:
    what += f", and the file is not valid {' or '.join(encodings[1:])}"
  guess = decoding.guess_encoding(file.path)
  if guess is None:
    return Problem(what, "use --on_bad_bytes=replace (U+FFFD) or --on_bad_bytes=skip (drop such documents)")
  return Problem(
    what,
    f"use --encoding={guess} when every file is in it, or --encoding={','.join(encodings)},{guess}"
    " to read each file with the first that fits",
  )


def _walk(folder: Path, exclude: Path | None) -> Iterator[Path]:
  for root, folders, names in os.walk(folder):
    folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(root) / f).resolve() != exclude)
    # What lies beside the shards of a prepared corpus describes them.
    beside = _BESIDE_SHARDS if any(name.endswith(PARQUET) for name in names) else ()
    yield from (Path(root) / name for name in sorted(names) if not name.startswith(".") and name not in beside)
