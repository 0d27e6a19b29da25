"""Makes a corpus to train on: shuffled, de-duplicated parquet shards, a tokenizer, a manifest and a report.

python -m train.prepare --input=docs/ --input=mail.csv --text_column=body --out=corpus
python -m train.prepare --download=fineweb-edu --shards=2 --out=fineweb
python -m train.prepare --inspect=corpus
"""

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from mgr_jax.data import corpus, download, manifest, prepare, report
from mgr_jax.data import tokenizer as tokenizer_lib
from mgr_jax.data.cleaning import CleanOptions
from mgr_jax.data.readers import ReadOptions
from mgr_jax.data.vocabulary import Vocabulary, VocabularyOptions
from mgr_jax.problems import Problem, UserError, raise_if_any
from train import cli

FLAGS = flags.FlagValues()


def _define(kind: str, name: str, default: object, help_text: str, *values: str) -> None:
  getattr(flags, f"DEFINE_{kind}")(name, default, *([values] if values else []), help_text, flag_values=FLAGS)


_define(
  "multi_string", "input", [], "File or folder to read (repeatable): txt md json jsonl csv tsv parquet, also .gz."
)
_define("string", "out", "", "Directory to write.")
_define("boolean", "overwrite", False, "Replace the corpus that lies in --out.")
_define("string", "text_column", "text", "Column or key of the text; of a list each file takes the first that it has.")
_define("string", "json_path", "", "Path of the text in a JSON record: a.b, or messages.*.body for every element.")
_define("string", "split_on", "file", "Documents of a text file: file, blankline, line, or a regular expression.")
_define("string", "encoding", "utf-8", "Encoding of text files; of a list each file takes the first that fits.")
_define("enum", "on_bad_bytes", "error", "What to do with bytes that are no text.", "error", "replace", "skip")
_define("integer", "skip_bad_rows", 0, "Malformed JSON or table rows that may be left out.")
_define("integer", "min_chars", 32, "Shorter documents are dropped.")
_define("integer", "max_chars", 1_000_000, "Longer documents are dropped.")
_define("boolean", "strip_html", False, "Keep only the visible text of HTML.")
_define("enum", "unicode", "NFC", "Unicode normalisation.", "NFC", "NFD", "NFKC", "NFKD", "none")
_define("enum", "dedupe", "exact", "Copies to drop; minhash: near copies too, at 1 MB/s.", "exact", "none", "minhash")
_define("integer", "shards", 10, "Files to write, validation included; with --download, files to fetch.")
_define("integer", "rows_per_group", 1024, "Documents of a parquet row group.")
_define("float", "val_frac", 0.01, "Share of documents to validate on; 0: none.")
_define("string", "group_by", "", "Keep documents of one group in one split: a column or key, or file.")
_define("string", "tokenizer", "train", "train, bytes, none, or the path of a tokenizer.json.")
_define("integer", "vocab_size", 32768, "Ids of a trained tokenizer.")
_define("string", "reference_tokenizer", "", "A tokenizer.json to compare with in the report.")
_define("integer", "seed", 0, "Decides the order of documents and what is validated on.")
_define("string", "download", "", f"Fetch a public corpus instead: {', '.join(download.SOURCES)}.")
_define("string", "hf_endpoint", "", "Address of a mirror of the Hugging Face hub, for --download.")
_define("string", "inspect", "", "Only check the corpus in this directory, and report.")

_DOWNLOAD_FLAGS = ("download", "shards", "out", "tokenizer", "vocab_size", "reference_tokenizer", "hf_endpoint")
_INSPECT_FLAGS = ("inspect", "text_column")


def main(argv: list[str]) -> int:
  del argv
  if FLAGS.inspect:
    _allow_only(_INSPECT_FLAGS, f"--inspect={FLAGS.inspect}")
    return _inspect(FLAGS.inspect)
  if FLAGS.download:
    _allow_only(_DOWNLOAD_FLAGS, f"--download={FLAGS.download}")
    return _download()
  return _prepare()


def _prepare() -> int:
  problems = []
  if not FLAGS.input:
    problems.append(Problem("--input is missing", "add --input=FILE_OR_FOLDER; --help shows examples"))
  if not FLAGS.out:
    problems.append(Problem("--out is missing", "add --out=DIR, the directory to write"))
  if FLAGS.hf_endpoint:
    problems.append(Problem("--hf_endpoint has no effect without --download", "leave --hf_endpoint out"))
  options = prepare.PrepareOptions(
    read=ReadOptions(
      text_columns=_list(FLAGS.text_column),
      json_path=FLAGS.json_path,
      split_on=FLAGS.split_on,
      encodings=_list(FLAGS.encoding),
      on_bad_bytes=FLAGS.on_bad_bytes,
      skip_bad_rows=FLAGS.skip_bad_rows,
      group_by=FLAGS.group_by,
    ),
    clean=CleanOptions(FLAGS.min_chars, FLAGS.max_chars, FLAGS.strip_html, FLAGS.unicode),
    vocabulary=_vocabulary_options(),
    dedupe=FLAGS.dedupe,
    shards=FLAGS.shards,
    rows_per_group=FLAGS.rows_per_group,
    val_frac=FLAGS.val_frac,
    seed=FLAGS.seed,
  )
  raise_if_any(problems)
  with _Progress() as progress:
    result = prepare.prepare(FLAGS.input, FLAGS.out, options, FLAGS.overwrite, progress)
  print(report.summary(result))
  print(f"report: {os.path.join(FLAGS.out, report.FILE_NAME)}")
  _finish(FLAGS.out, result.shards, result.vocabulary, result.warnings)
  return 0


def _download() -> int:
  problems = [] if FLAGS.out else [Problem("--out is missing", "add --out=DIR, the directory to write")]
  raise_if_any(problems + download.check(FLAGS.download, FLAGS.shards))
  print(textwrap.fill(download.SOURCES[FLAGS.download].licence, 110))
  with _Progress() as progress:
    result, vocabulary = download.download(
      FLAGS.download, FLAGS.out, FLAGS.shards, _vocabulary_options(), FLAGS.hf_endpoint or None, progress
    )
  print(f"{len(result.files)} shards verified, {sum(f.bytes for f in result.files):,} bytes")
  _finish(FLAGS.out, result.files, vocabulary, vocabulary.warnings)
  return 0


def _inspect(directory: str) -> int:
  """Exit code 2 when anything is wrong with the corpus."""
  try:
    recorded = manifest.read_manifest(directory)
  except UserError:
    recorded = None  # inspect reports it among the other problems
  has_tokenizer = (Path(directory).expanduser() / tokenizer_lib.FILE_NAME).exists() or (recorded and recorded.tokenizer)
  inspection = corpus.inspect(
    directory,
    FLAGS.text_column,
    need_val=recorded is None or any(f.role == "val" for f in recorded.files),
    tokenizer="auto" if has_tokenizer else None,
  )
  if inspection.counts:
    print(report.table(("file", "role", "rows", "documents", "bytes"), [tuple(c) for c in inspection.counts]))
  _warn(inspection.warnings)
  raise_if_any(inspection.problems)
  return 0


def _finish(
  out: str, shards: Sequence[manifest.FileRecord], vocabulary: Vocabulary, warnings: Iterable[Problem]
) -> None:
  print("\n" + report.vocabulary_text(vocabulary))
  _warn(warnings)
  print(f"\nnext: {report.next_command(out, shards, vocabulary)}")


def _warn(warnings: Iterable[Problem]) -> None:
  for warning in warnings:
    print(f"warning: {warning.error}\n  fix: {warning.fix}", file=sys.stderr)


def _vocabulary_options() -> VocabularyOptions:
  return VocabularyOptions(FLAGS.tokenizer, FLAGS.vocab_size, FLAGS.reference_tokenizer)


def _list(value: str) -> tuple[str, ...]:
  return tuple(part.strip() for part in value.split(",") if part.strip()) or ("",)


def _allow_only(names: Sequence[str], mode: str) -> None:
  """Raises when a flag was set that does nothing in this mode."""
  raise_if_any(
    Problem(f"--{flag.name} has no effect with {mode}", f"leave --{flag.name} out")
    for name in FLAGS
    if (flag := FLAGS[name]).name not in (*names, "debug") and flag.value != flag.default
  )


class _Progress:
  """One line on a terminal that says how far the work is; nothing elsewhere."""

  def __enter__(self) -> "_Progress":
    return self

  def __call__(self, stage: str, done: int) -> None:
    if sys.stderr.isatty():
      print(f"\r\x1b[K{stage} {done:,}", end="", file=sys.stderr, flush=True)

  def __exit__(self, *unused) -> None:
    if sys.stderr.isatty():
      print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
  cli.run(main, FLAGS)
