"""From files of text to a corpus: read, clean, drop copies, shuffle, split, shard, train a tokenizer."""

import collections
import contextlib
import dataclasses
import itertools
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mgr_jax.data import cleaning, dedupe, manifest, parquet, readers, report, scripts, shuffle, vocabulary
from mgr_jax.data.cleaning import CleanOptions
from mgr_jax.data.readers import ReadOptions, inputs
from mgr_jax.data.vocabulary import VocabularyOptions
from mgr_jax.problems import Problem, UserError, raise_if_any

_OURS = ("shard_*.parquet", manifest.FILE_NAME, "tokenizer.json", report.FILE_NAME, ".cache")


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
  """How a corpus is made.

  `dedupe` drops copies: `exact`, `minhash` (near copies too) or `none`. `shards` counts the validation shard too, which
  holds the share `val_frac` of the documents; 0 makes none.
  """

  read: ReadOptions = dataclasses.field(default_factory=ReadOptions)
  clean: CleanOptions = dataclasses.field(default_factory=CleanOptions)
  vocabulary: VocabularyOptions = dataclasses.field(default_factory=VocabularyOptions)
  dedupe: str = "exact"
  shards: int = 10
  rows_per_group: int = 1024
  val_frac: float = 0.01
  seed: int = 0


def prepare(
  input_names: Sequence[str],
  out: str | os.PathLike,
  options: PrepareOptions,
  overwrite: bool = False,
  on_progress: Callable[[str, int], None] = lambda stage, done: None,
) -> report.Report:
  """Writes the corpus `out` and returns the report that lies in it as `prepare.md`.

  Everything is built in a hidden directory beside `out`, which takes its place at the end: `out` is complete or not
  there. The order of documents and the split depend on `options.seed` and the documents, not on files. Memory: one
  row group and about 2 bytes per document (42 with `minhash`); disk: the text twice. Raises `UserError` with every
  problem that can be known beforehand together.
  """
  shown, out = os.fspath(out), Path(out).expanduser().absolute()
  problems = check_options(options) + check_target(out, overwrite)
  files: list[readers.InputFile] = []
  ignored: dict[str, int] = {}
  try:
    files, ignored = readers.find(input_names, exclude=out)
  except UserError as e:
    problems += e.problems
  problems += _without_effect(files, options.read) if files else []
  files, found = readers.check(files, options.read)
  raise_if_any(problems + found)
  with _staging(out) as staging:
    spool_dir = staging / "spool"
    spool_dir.mkdir()
    spool, dropped = _collect(files, options, spool_dir, on_progress)
    split = spool.split(options.val_frac)
    raise_if_any(_check_counts(split, spool.documents, dropped, options))
    histogram = np.zeros(len(scripts.SCRIPTS), np.int64)
    records = _write_shards(staging, spool, split, options, histogram, on_progress)
    shutil.rmtree(spool_dir)
    on_progress("tokenizer", 0)
    by_role = {role: [staging / r.file for r in records if r.role == role] for role in ("train", "val")}
    vocab = vocabulary.provide(staging, by_role["train"], by_role["val"], options.vocabulary)
    result = report.Report(
      inputs=tuple(input_names),
      files=len(files),
      ignored=ignored,
      read=spool.documents + sum(n for reason, n in dropped.items() if "duplicate" not in reason),
      dropped=dict(sorted(dropped.items())),
      scripts=dict(zip(scripts.SCRIPTS, histogram.tolist(), strict=True)),
      shards=records,
      vocabulary=vocab,
      warnings=vocab.warnings + _ignored_warning(ignored) + _leftover_warning(out, staging),
    )
    report.write(staging, result, shown)
    source = "train.prepare: " + ", ".join(Path(name).resolve().name for name in input_names)
    manifest.write_manifest(staging, manifest.Manifest(records, tokenizer=vocab.record, source=source))
    _take_place(staging, out)
  return result


def check_options(options: PrepareOptions) -> list[Problem]:
  """Values out of range, by themselves or together."""
  problems = vocabulary.check(options.vocabulary)
  if not 0 <= options.val_frac < 1:
    problems.append(Problem(f"--val_frac={options.val_frac} is not in [0, 1)", "use for example --val_frac=0.01"))
  if options.shards < 1 or options.rows_per_group < 1:
    error = f"--shards={options.shards} and --rows_per_group={options.rows_per_group} must be at least 1"
    problems.append(Problem(error, "use --shards=10 --rows_per_group=1024"))
  elif options.shards == 1 and options.val_frac > 0:
    error = f"--shards=1 has no room for a shard of validation documents (--val_frac={options.val_frac})"
    problems.append(Problem(error, "use --shards=2 or more, or --val_frac=0"))
  if not 0 <= options.clean.min_chars <= options.clean.max_chars:
    error = f"--min_chars={options.clean.min_chars} and --max_chars={options.clean.max_chars} leave no length"
    problems.append(Problem(error, "use for example --min_chars=32 --max_chars=1000000"))
  if options.read.skip_bad_rows < 0:
    problems.append(Problem(f"--skip_bad_rows={options.read.skip_bad_rows} is negative", "use 0 or a number of rows"))
  return problems


def check_target(out: Path, overwrite: bool) -> list[Problem]:
  """Whether the absolute path `out` can be written or replaced."""
  parent = next(p for p in out.parents if p.exists())
  if not os.access(parent, os.W_OK) or not parent.is_dir():
    return [Problem(f"--out={out} cannot be written: {parent} is no writable directory", "use another --out")]
  if out.is_file():
    return [Problem(f"--out={out} is a file", "use the path of a directory that does not exist")]
  if not out.exists() or not any(out.iterdir()):
    return []
  if not overwrite:
    return [Problem(f"--out={out} exists and is not empty", "use another --out, or --overwrite to replace it")]
  foreign = sorted(p.name for p in out.iterdir() if not any(p.match(pattern) for pattern in _OURS))
  if foreign:
    error = f"--overwrite would delete what is no prepared corpus: {out} holds {', '.join(foreign[:3])}"
    return [Problem(error, "use another --out, or remove the directory yourself")]
  return []


def _without_effect(files: Sequence[readers.InputFile], options: ReadOptions) -> list[Problem]:
  """Options for kinds of files of which there are none."""
  kinds = {f.kind for f in files}
  uses = {
    "text_columns": ("text_column", inputs.JSON + inputs.TABLE + inputs.PARQUET),
    "json_path": ("json_path", inputs.JSON),
    "split_on": ("split_on", inputs.TEXT),
    "encodings": ("encoding", inputs.TEXT + inputs.JSON + inputs.TABLE),
  }
  return [
    Problem(f"--{flag} has no effect: there are no {' '.join(needed)} files among the input", f"leave --{flag} out")
    for field, (flag, needed) in uses.items()
    if getattr(options, field) != getattr(ReadOptions(), field) and not kinds & set(needed)
  ]


def _collect(
  files: Sequence[readers.InputFile], options: PrepareOptions, directory: Path, on_progress: Callable[[str, int], None]
) -> tuple[shuffle.Spool, collections.Counter[str]]:
  dropped: collections.Counter[str] = collections.Counter()
  with contextlib.ExitStack() as stack:
    spool = stack.enter_context(contextlib.closing(shuffle.Spool(directory, options.seed, options.dedupe != "none")))
    near = None
    if options.dedupe == "minhash":
      near = stack.enter_context(contextlib.closing(dedupe.NearDuplicates(directory, options.seed)))
    for number, document in enumerate(readers.documents(files, options.read, dropped)):
      if number % 1000 == 0:
        on_progress("documents", number)
      text = cleaning.clean(document.text, options.clean)
      reason = cleaning.reason_to_drop(text, options.clean)
      if reason is not None:
        dropped[reason] += 1
        continue
      spool.add(text, document.group)
      if near is not None:
        near.add(text)
    on_progress("copies", spool.documents)
    spool.finish(near.later_copies() if near is not None else None)
  dropped["duplicate"] = spool.exact_copies
  dropped["near duplicate"] = spool.near_copies
  return spool, +dropped


def _check_counts(
  split: shuffle.Split, collected: int, dropped: collections.Counter[str], options: PrepareOptions
) -> list[Problem]:
  kept = split.train + split.val
  reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "there were none"
  if kept == 0:
    advice = {
      "shorter than min_chars": "use --min_chars=1",
      "longer than max_chars": "use --split_on=blankline, or a larger --max_chars",
      "bad bytes": "use --on_bad_bytes=replace, or the right --encoding",
    }
    top = dropped.most_common(1)[0][0] if dropped else ""
    return [Problem(f"no documents left: {reasons}", advice.get(top, "check the text column and the files"))]
  train_shards = options.shards - (options.val_frac > 0)
  if options.val_frac > 0 and not (split.train and split.val):
    if options.read.group_by and kept > 1:
      error = f"all {kept} documents are one group by --group_by={options.read.group_by}: none is left to validate on"
      return [Problem(error, "leave --group_by out, or use --val_frac=0")]
    error = f"documents left to train and to validate on: {kept} (dropped: {reasons})"
    return [Problem(error, "use --split_on=blankline for smaller documents, or --val_frac=0 --shards=1")]
  if split.train < train_shards:
    error = f"{kept} documents, {split.val} of them to validate on, are fewer than --shards={options.shards} needs"
    error += f" (dropped: {reasons})"
    return [Problem(error, f"use --shards={split.train + (options.val_frac > 0)}, or smaller documents by --split_on")]
  return []


def _write_shards(
  directory: Path,
  spool: shuffle.Spool,
  split: shuffle.Split,
  options: PrepareOptions,
  histogram: np.ndarray,
  on_progress: Callable[[str, int], None],
) -> tuple[manifest.FileRecord, ...]:
  def counted(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
      histogram[:] += scripts.script_histogram(text)
      yield text

  train_shards = options.shards - (options.val_frac > 0)
  train = counted(spool.texts(split.border, validation=False))
  records = []
  for number in range(options.shards):
    on_progress("shards", number)
    if number < train_shards:
      end, start = (split.train * n // train_shards for n in (number + 1, number))
      role, texts = "train", itertools.islice(train, end - start)
    else:
      role, texts = "val", counted(spool.texts(split.border, validation=True))
    info = parquet.write_shard(directory / f"shard_{number:05d}.parquet", texts, options.rows_per_group)
    records.append(manifest.FileRecord(info.file, role, info.rows, info.bytes, info.sha256))
  return tuple(records)


def _ignored_warning(ignored: dict[str, int]) -> tuple[Problem, ...]:
  if not ignored:
    return ()
  held = ", ".join(f"{n} {extension}" for extension, n in ignored.items())
  known = [inputs.conversion(extension) for extension in ignored if extension in inputs.CONVERTERS]
  fix = known[0] if known else "nothing, if they hold no text"
  return (Problem(f"files of other types were passed over: {held}", fix),)


def _leftover_warning(out: Path, staging: Path) -> tuple[Problem, ...]:
  found = {p for purpose in ("partial", "old") for p in out.parent.glob(f".{out.name}.{purpose}-*")} - {staging}
  error = "a run that was killed, or is still at work, left {}"
  return tuple(Problem(error.format(path), f"rm -r {shlex.quote(str(path))}") for path in sorted(found))


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
  """A directory beside `out` that is gone when the block is left. Failing to write there is the user's to mend."""
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = _hidden_sibling(out, "partial")
    directory.mkdir()
    try:
      yield directory
    finally:
      shutil.rmtree(directory, ignore_errors=True)
  except OSError as e:
    raise UserError(
      Problem(f"{out} cannot be written: {e.strerror or e}", "free space for the text twice over, or use another --out")
    ) from e


def _take_place(staging: Path, out: Path) -> None:
  """Moves `staging` to `out`; what was there before is set aside first, and removed last."""
  if out.exists():
    old = _hidden_sibling(out, "old")
    os.replace(out, old)
    os.replace(staging, out)
    shutil.rmtree(old, ignore_errors=True)
  else:
    os.replace(staging, out)


def _hidden_sibling(out: Path, purpose: str) -> Path:
  return out.with_name(f".{out.name}.{purpose}-{secrets.token_hex(4)}")
