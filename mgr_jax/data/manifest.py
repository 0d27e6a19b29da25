"""`manifest.json`: what each file of a prepared corpus is for, how large it is, and what its bytes hash to."""

import dataclasses
import json
import os
from pathlib import Path

from mgr_jax.data import files
from mgr_jax.problems import Problem, UserError

FILE_NAME = "manifest.json"
SCHEMA = "mgr_jax.corpus.v1"
ROLES = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class FileRecord:
  """One shard: `file` relative to the manifest, its role, documents, file bytes and sha256 of the file."""

  file: str
  role: str
  rows: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
  """The tokenizer prepared with the corpus: `file` relative to the manifest, identity, size, kind (`bpe`, `bytes`)."""

  file: str
  sha256: str
  vocab_size: int
  kind: str = "bpe"


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The content of `manifest.json`. `source` and `licence` are free text for people."""

  files: tuple[FileRecord, ...]
  text_column: str = "text"
  tokenizer: TokenizerRecord | None = None
  source: str = ""
  licence: str = ""
  schema: str = SCHEMA

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

  @staticmethod
  def from_json(text: str) -> "Manifest":
    """Raises `ValueError` with the reason when `text` is not a manifest of this schema."""
    try:
      content = json.loads(text)
      if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(
          f"its schema is {content.get('schema') if isinstance(content, dict) else None!r}, not {SCHEMA!r}"
        )
      records = tuple(FileRecord(**f) for f in content.pop("files"))
      tokenizer = content.pop("tokenizer", None)
      manifest = Manifest(records, tokenizer=TokenizerRecord(**tokenizer) if tokenizer else None, **content)
    except (KeyError, TypeError) as e:
      raise ValueError(f"bad or missing field: {e}") from e
    for record in records:
      if record.role not in ROLES:
        raise ValueError(f"{record.file} has role {record.role!r}, expected one of {', '.join(ROLES)}")
      if Path(record.file).is_absolute() or ".." in Path(record.file).parts:
        raise ValueError(f"{record.file} lies outside the corpus directory")
    return manifest


def write_manifest(directory: str | os.PathLike, manifest: Manifest) -> None:
  """Writes `manifest.json`, atomically. Write it last: a directory that has one is complete."""
  files.write_text(Path(directory) / FILE_NAME, manifest.to_json())


def read_manifest(directory: str | os.PathLike) -> Manifest | None:
  """The manifest of `directory`, None when it has none. Raises `UserError` when it cannot be used."""
  path = Path(directory).absolute() / FILE_NAME
  try:
    return Manifest.from_json(path.read_text("utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as e:
    raise UserError(
      Problem(
        f"{path} cannot be used: {e}",
        "prepare the data again with python -m train.prepare, or delete it (then the last shard is validation)",
      )
    ) from e
