"""A real corpus that every machine already has: documentation and standard library of the running Python."""

import contextlib
import importlib
import os
import secrets
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mgr_jax.data import parquet, tokenizer
from mgr_jax.data.corpus import held_out
from mgr_jax.data.manifest import FileRecord, Manifest, TokenizerRecord, read_manifest, write_manifest
from mgr_jax.data.order import random_words
from mgr_jax.problems import Problem, UserError

VOCAB_SIZE = 4096
LICENCE = "Python Software Foundation License Version 2, https://docs.python.org/3/license.html"

_VERSION = 1  # changes when the same Python would give other shards
_SHARDS = 8
_VAL_FRACTION = 0.06
_ROWS_PER_GROUP = 16  # documents are mostly whole source files, ten times a web page
_MIN_CHARS = 64
_MIN_TOTAL_CHARS = 2_000_000
_STALE_SECONDS = 86_400
# Tests, other people's packages, and tables of code points that are data rather than text.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}


def cache_dir() -> Path:
  """Where data made or downloaded by this package is kept: `$MGR_BASE_DIR`, or `~/.cache/mgr_jax`."""
  base = os.environ.get("MGR_BASE_DIR")
  return Path(base).expanduser().absolute() if base else Path.home() / ".cache" / "mgr_jax"


def builtin_corpus(
  cache: str | os.PathLike | None = None, documents: Sequence[str] | None = None, vocab_size: int = VOCAB_SIZE
) -> Path:
  """The directory of this Python's corpus in `cache` (default `cache_dir()`), built on first use in a few seconds.

  8 shuffled training shards, one validation shard of the documents a hash of their content selects, a manifest, and a
  BPE trained on the training shards alone. The directory appears whole or not at all: a killed build leaves nothing
  that is used, and of several processes that build at once one wins. `documents` replaces the Python's own texts.
  Raises `UserError` when the cache cannot be written or this Python has no sources.
  """
  cache = Path(cache) if cache is not None else cache_dir()
  python = sys.implementation
  target = cache / f"builtin-{_VERSION}-{python.name}-{'.'.join(map(str, python.version[:3]))}"
  if _complete(target):
    return target
  documents = python_documents() if documents is None else documents
  building = cache / f".{target.name}.{secrets.token_hex(4)}.tmp"
  try:
    building.mkdir(parents=True)
    _build(building, documents, vocab_size)
    if target.exists() and not _complete(target):  # damaged after it was built
      target.rename(building / "damaged")
      shutil.rmtree(building / "damaged")
    try:
      building.rename(target)
    except OSError:
      if not _complete(target):
        raise
  except OSError as e:
    fix = "free some disk space, or set MGR_BASE_DIR to a directory you can write to"
    raise UserError(Problem(f"cannot build the builtin corpus in {cache}: {e.strerror or e}", fix)) from e
  finally:
    shutil.rmtree(building, ignore_errors=True)
    _remove_stale(cache)
  return target


def python_documents() -> list[str]:
  """The documentation topics and standard-library sources of the running Python, in an order that depends on them
  alone.

  Raises `UserError` when there are hardly any, as in a Python whose library is a zip file of compiled modules.
  """
  root = Path(sysconfig.get_path("stdlib"))
  sources = {}
  for path in root.rglob("*.py"):
    parts = path.relative_to(root).parts
    if _LEFT_OUT.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
      try:
        sources["/".join(parts)] = path.read_text("utf-8")
      except (OSError, UnicodeDecodeError):
        continue
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
  except ImportError:
    topics = {}
  documents = [topics[name] for name in sorted(topics)] + [sources[name] for name in sorted(sources)]
  if sum(map(len, documents)) < _MIN_TOTAL_CHARS:
    raise UserError(
      Problem(
        f"this Python comes without the sources of its standard library (looked in {root}), so --data=builtin is empty",
        "use a Python that has them, or your own text: python -m train.prepare --input=FILE_OR_FOLDER --out=DIR",
      )
    )
  return documents


def _build(directory: Path, documents: Sequence[str], vocab_size: int) -> None:
  texts = list(dict.fromkeys(text for text in documents if len(text) >= _MIN_CHARS))
  texts = [texts[i] for i in np.argsort(random_words(len(texts), 0), kind="stable")]
  train = [text for text in texts if not held_out(text, _VAL_FRACTION)]
  val = [text for text in texts if held_out(text, _VAL_FRACTION)]
  records = []
  for number in range(_SHARDS + 1):
    role, shard = ("train", train[number::_SHARDS]) if number < _SHARDS else ("val", val)
    info = parquet.write_shard(directory / f"shard_{number:05d}.parquet", shard, _ROWS_PER_GROUP)
    records.append(FileRecord(info.file, role, info.rows, info.bytes, info.sha256))
  tok = tokenizer.train_bpe(train, vocab_size)
  tokenizer.save(tok, directory / tokenizer.FILE_NAME)
  record = TokenizerRecord(tokenizer.FILE_NAME, tok.sha256, tok.vocab_size)
  source = f"documentation topics and standard-library sources of {sys.implementation.name} {sys.version.split()[0]}"
  write_manifest(directory, Manifest(tuple(records), tokenizer=record, source=source, licence=LICENCE))


def _complete(directory: Path) -> bool:
  try:
    manifest = read_manifest(directory)
    if manifest is None or not (directory / tokenizer.FILE_NAME).is_file():
      return False
    return all((directory / f.file).stat().st_size == f.bytes for f in manifest.files)
  except (OSError, UserError):
    return False


def _remove_stale(cache: Path) -> None:
  """Removes what builds killed long ago have left in the cache."""
  for path in cache.glob(".builtin-*.tmp"):
    # Another process may be giving its finished build the final name just now.
    with contextlib.suppress(FileNotFoundError):
      if time.time() - path.stat().st_mtime > _STALE_SECONDS:
        shutil.rmtree(path, ignore_errors=True)
