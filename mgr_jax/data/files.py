"""Files that appear whole or not at all, and hashes of files and of texts."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
  """Yields a temporary path beside `path`; on success it is synced to disk and renamed to `path`, on error removed.

  A reader therefore sees the old file or the new one, never a part, whatever moment the process is killed at.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
  try:
    yield temporary
    with temporary.open("rb+") as f:
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes `text` as UTF-8 with "\\n" line ends on every system, atomically."""
  with atomic_path(path) as temporary:
    temporary.write_bytes(text.encode("utf-8"))


def sha256_file(path: str | os.PathLike) -> str:
  """Hex sha256 of the file's bytes, read once in blocks."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def document_hash(text: str) -> int:
  """64 bits of the BLAKE2b hash of the text: equal for copies, and as good as random between different texts."""
  return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
