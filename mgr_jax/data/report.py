"""The account of a preparation: what was read, kept and dropped, what it is made of, and what to do next."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from mgr_jax.data import files
from mgr_jax.data.manifest import FileRecord
from mgr_jax.data.vocabulary import Vocabulary
from mgr_jax.problems import Problem

FILE_NAME = "prepare.md"


@dataclasses.dataclass(frozen=True)
class Report:
  """Counts are documents. `ignored`: files passed over, by extension; `scripts`: characters kept, by writing system."""

  inputs: tuple[str, ...]
  files: int
  ignored: dict[str, int]
  read: int
  dropped: dict[str, int]
  scripts: dict[str, int]
  shards: tuple[FileRecord, ...]
  vocabulary: Vocabulary
  warnings: tuple[Problem, ...] = ()

  @property
  def characters(self) -> int:
    return sum(self.scripts.values())

  def kept(self, role: str | None = None) -> int:
    return sum(shard.rows for shard in self.shards if role in (None, shard.role))


def next_command(out: str, shards: Sequence[FileRecord], vocabulary: Vocabulary) -> str:
  """The training command that works on this corpus as it is."""
  command = f"python -m train.main --data={shlex.quote(out)}"
  if vocabulary.record is None:
    command += " --tokenizer=bytes"
  return command if any(s.role == "val" for s in shards) else command + " --val_every=-1"


def write(directory: Path, report: Report, out: str) -> None:
  files.write_text(directory / FILE_NAME, markdown(report, out))


def summary(report: Report) -> str:
  """What went in and what came out, as a few lines."""
  total = max(1, report.characters)
  sizes = [s.bytes for s in report.shards]
  lines = [
    f"read {report.read:,} documents from {report.files:,} files",
    *(f"dropped {n:,}: {reason}" for reason, n in report.dropped.items()),
    f"kept {report.kept():,}: {report.kept('train'):,} to train on, {report.kept('val'):,} to validate on",
    f"{report.characters:,} characters: " + ", ".join(f"{s} {n / total:.1%}" for s, n in report.scripts.items() if n),
    f"{len(sizes)} shards of {min(sizes):,} to {max(sizes):,} bytes",
  ]
  return "\n".join(lines)


def markdown(report: Report, out: str) -> str:
  """The whole report as a Markdown page."""
  total = max(1, report.characters)
  documents = [
    ("read", report.read),
    *((f"dropped: {reason}", n) for reason, n in report.dropped.items()),
    ("kept to train on", report.kept("train")),
    ("kept to validate on", report.kept("val")),
  ]
  characters = [(s, n, f"{n / total:.1%}") for s, n in report.scripts.items() if n]
  shards = [(s.file, s.role, s.rows, s.bytes, s.sha256[:16]) for s in report.shards]
  parts = [
    f"# Corpus {Path(out).name}",
    "Prepared from " + ", ".join(f"`{name}`" for name in report.inputs) + f" ({report.files} files).",
    "## Documents",
    table(("", "documents"), documents),
    "## Characters",
    table(("script", "characters", "share"), [*characters, ("all", report.characters, "100.0%")]),
    "## Shards",
    table(("file", "role", "documents", "bytes", "sha256"), shards),
    "## Tokenizer",
    vocabulary_text(report.vocabulary),
  ]
  if report.warnings:
    parts += ["## Warnings", "\n".join(f"- {w.error}. Fix: {w.fix}." for w in report.warnings)]
  parts += ["## Next", f"```\n{next_command(out, report.shards, report.vocabulary)}\n```"]
  return "\n\n".join(parts) + "\n"


def vocabulary_text(vocabulary: Vocabulary) -> str:
  """The quality of a tokenizer beside the byte tokenizer and a reference, as a table."""
  record, quality = vocabulary.record, vocabulary.quality
  if record is None or quality is None:
    return "no tokenizer"
  subjects = [name for name in ("tokenizer", "byte_tokenizer", "reference") if name in quality]
  measures = [quality[name] for name in subjects]
  rows = [
    ("vocabulary", *(m["vocab_size"] for m in measures)),
    ("bytes per token", *(f"{m['bytes_per_token']:.2f}" for m in measures)),
    ("tokens per word", *(f"{m['tokens_per_word']:.2f}" for m in measures)),
    (f"documents over {quality['seq_len']} tokens", *(f"{m['share_over_seq_len']:.1%}" for m in measures)),
  ]
  for script in measures[0]["scripts"]:
    found = (m["scripts"].get(script) for m in measures)
    rows.append((f"bytes per token, {script}", *(f"{s['bytes_per_token']:.2f}" if s else "-" for s in found)))
  head = f"tokenizer `{record.file}`: {record.kind}, {record.vocab_size:,} ids, sha256 {record.sha256[:16]};"
  head += f" measured on {quality['documents']:,} documents, {quality['bytes']:,} bytes"
  return head + "\n\n" + table(("", *(s.replace("_", " ") for s in subjects)), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """A Markdown table that is also readable as it stands: text to the left, numbers to the right."""
  texts = [list(header)] + [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
  numeric = [bool(re.fullmatch(r"[\d,.]+%?", text)) for text in texts[-1]]
  lines = [[c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)] for row in texts]
  rule = ["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)]
  return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
