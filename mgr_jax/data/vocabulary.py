"""The tokenizer that goes with a corpus: trained on it or given, tested, measured, and saved beside it."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from mgr_jax.data import parquet, tokenizer
from mgr_jax.data.manifest import TokenizerRecord
from mgr_jax.problems import Problem, UserError

TRAIN_CHARS = 2_000_000_000
DOCUMENT_CHARS = 10_000
_TEST_DOCUMENTS = 1000
_QUALITY_CHARS = 5_000_000


@dataclasses.dataclass(frozen=True)
class VocabularyOptions:
  """Which tokenizer: `train`, `bytes`, `none`, or the path of a `tokenizer.json`.

  `reference` is the path of another one to compare with, or "".
  """

  tokenizer: str = "train"
  vocab_size: int = 32768
  reference: str = ""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The tokenizer that was saved, if any, and its `tokenizer.quality_report` on held-out text."""

  record: TokenizerRecord | None = None
  quality: dict | None = None
  warnings: tuple[Problem, ...] = ()


def check(options: VocabularyOptions) -> list[Problem]:
  """What is wrong with the options, the given tokenizer files included."""
  problems = []
  if options.tokenizer == "train":
    if options.vocab_size < tokenizer.MIN_VOCAB:
      problems.append(
        Problem(
          f"--vocab_size={options.vocab_size} is below the {tokenizer.MIN_VOCAB} ids that 256 bytes and"
          f" {len(tokenizer.SPECIALS)} specials need",
          "use --vocab_size=4096 or more, or --tokenizer=bytes",
        )
      )
  elif options.vocab_size != VocabularyOptions.vocab_size:
    problems.append(
      Problem(
        f"--vocab_size={options.vocab_size} has no effect with --tokenizer={options.tokenizer}",
        "leave one of the two flags out",
      )
    )
  if options.tokenizer == "none" and options.reference:
    problems.append(
      Problem("--reference_tokenizer has no effect with --tokenizer=none", "leave one of the two flags out")
    )
  for path in (options.tokenizer, options.reference):
    if path not in ("", "train", "bytes", "none"):
      try:
        tokenizer.load(path)
      except UserError as e:
        problems += e.problems
  return problems


def provide(directory: Path, train: list[Path], val: list[Path], options: VocabularyOptions) -> Vocabulary:
  """Trains or loads the tokenizer, saves it as `tokenizer.json` in `directory`, and measures it on `val` or `train`.

  Training reads at most `TRAIN_CHARS` characters of `train` and of each document at most `DOCUMENT_CHARS`, or an
  equal share of `TRAIN_CHARS` where that is more. Raises `UserError` when up to 1000 documents do not survive
  encoding and decoding.
  """
  if options.tokenizer == "none":
    return Vocabulary()
  warnings = []
  if options.tokenizer == "train":
    tok = tokenizer.train_bpe(_training_texts(train), options.vocab_size)
    if (problem := tokenizer.shortfall(tok, options.vocab_size)) is not None:
      warnings.append(problem)
  else:
    tok = tokenizer.bytes_tokenizer() if options.tokenizer == "bytes" else tokenizer.load(options.tokenizer)
  _test_round_trip(tok, _cut(itertools.islice(_texts(train + val), _TEST_DOCUMENTS), DOCUMENT_CHARS))
  reference = tokenizer.load(options.reference) if options.reference else None
  quality = tokenizer.quality_report(tok, _until(_texts(val or train), _QUALITY_CHARS), reference)
  tokenizer.save(tok, directory / tokenizer.FILE_NAME)
  record = TokenizerRecord(tokenizer.FILE_NAME, tok.sha256, tok.vocab_size, tok.kind)
  return Vocabulary(record, quality, tuple(warnings))


def _training_texts(files: list[Path]) -> Iterator[str]:
  documents = sum(parquet.read_footer(f).rows for f in files)
  return _until(_cut(_texts(files), max(DOCUMENT_CHARS, TRAIN_CHARS // max(1, documents))), TRAIN_CHARS)


def _texts(files: Iterable[Path]) -> Iterator[str]:
  return itertools.chain.from_iterable(map(parquet.iter_texts, files))


def _cut(texts: Iterable[str], chars: int) -> Iterator[str]:
  return (text[:chars] for text in texts)


def _until(texts: Iterable[str], chars: int) -> Iterator[str]:
  """The texts up to the one that fills `chars` characters, at least one."""
  for text in texts:
    yield text
    chars -= len(text)
    if chars <= 0:
      return


def _test_round_trip(tok: tokenizer.Tokenizer, texts: Iterable[str]) -> None:
  texts = list(texts)
  for text, ids in zip(texts, tok.encode_batch(texts), strict=True):
    back = tok.decode(ids)
    if back != text:
      at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
      raise UserError(
        Problem(
          f"the tokenizer loses text: {text[at : at + 40]!r} comes back as {back[at : at + 40]!r}",
          "use another tokenizer file, --tokenizer=train or --tokenizer=bytes",
        )
      )
