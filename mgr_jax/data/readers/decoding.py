"""Bytes to text: gzip undone, encodings checked over a whole file, and guessed where they fail."""

import codecs
import gzip
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, TextIO

_BLOCK = 1 << 20
_SAMPLE = 1 << 16
MARK = "\udc80"  # stands for bad bytes under on_bad_bytes=skip; no valid text contains it

codecs.register_error("mgr_jax.mark", lambda e: (MARK, e.end))
_ERRORS = {"error": "strict", "replace": "replace", "skip": "mgr_jax.mark"}

# Per encoding: the characters that most of its text consists of, and the share of all non-ASCII characters they have to
# reach. Read in a wrong encoding, text turns into capitals, box drawing and rare letters, and misses the share.
_RUSSIAN = "[оеаинтсрвлкмдпуяыьіїєўґъ]"
_EXPECTED = (
  ("cp1251", _RUSSIAN, 0.5),
  ("koi8-r", _RUSSIAN, 0.5),
  ("cp866", _RUSSIAN, 0.5),
  ("cp1252", "[éèàçêëîïôûùâäöüßñóíáúãõåæøœÉÀÜÖÄ‘’“”–—…€°«»]", 0.8),
  ("euc-kr", "[가-힣]", 0.9),
  ("cp932", "[ぁ-ゖァ-ヺー]", 0.3),
  ("euc-jp", "[ぁ-ゖァ-ヺー]", 0.3),
  (
    "gb18030",
    "[的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后，。]",
    0.2,
  ),
  (
    "big5",
    "[的一是不了人我在有他這中大來上國個到說們為子和你地出道也時年得就那要下以生會自著去之過家學對可她裡後，。]",
    0.2,
  ),
)
_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def open_binary(path: str | os.PathLike) -> BinaryIO:
  """The file's bytes, decompressed when its name ends in .gz."""
  return gzip.open(path, "rb") if Path(path).suffix.lower() == ".gz" else open(path, "rb")


def open_text(path: str | os.PathLike, encoding: str, on_bad_bytes: str, newline: str | None = None) -> TextIO:
  """The file as text, without a byte order mark. Bad bytes raise (error), become U+FFFD (replace) or `MARK` (skip)."""
  return io.TextIOWrapper(open_binary(path), _with_bom(encoding), _ERRORS[on_bad_bytes], newline)


def decode(data: bytes, on_bad_bytes: str) -> str:
  """UTF-8 bytes as text, bad ones treated as by `open_text`."""
  return data.decode("utf-8", _ERRORS[on_bad_bytes])


def first_bad_byte(path: str | os.PathLike, encoding: str) -> tuple[int, int] | None:
  """(offset, value) of the first byte that `encoding` cannot decode, None when there is none.

  The offset counts decompressed bytes. Reads the file up to there.
  """
  decoder = codecs.getincrementaldecoder(_with_bom(encoding))()
  fed = 0
  with open_binary(path) as f:
    while True:
      block = f.read(_BLOCK)
      fed += len(block)
      try:
        decoder.decode(block, final=not block)
      except UnicodeDecodeError as e:
        return fed - len(e.object) + e.start, e.object[e.start]
      if not block:
        return None


def guess_encoding(path: str | os.PathLike) -> str | None:
  """An encoding that decodes the whole file and makes its non-ASCII part look like a language; None when none does."""
  with open_binary(path) as f:
    for bom, encoding in _BOMS:
      if f.read(len(bom)) == bom:
        return encoding if first_bad_byte(path, encoding) is None else None
      f.seek(0)
    sample = _foreign_lines(f)
  scores = sorted(((_score(sample, *row), row[0]) for row in _EXPECTED), reverse=True)
  return next((name for score, name in scores if score >= 1 and first_bad_byte(path, name) is None), None)


def _with_bom(encoding: str) -> str:
  return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def _foreign_lines(lines: Iterable[bytes]) -> bytes:
  """The first lines with bytes above 127, 64 KiB of them: the lines in which encodings differ."""
  picked, size = [], 0
  for line in lines:
    if not line.isascii():
      picked.append(line)
      size += len(line)
      if size > _SAMPLE:
        break
  return b"".join(picked)


def _score(sample: bytes, encoding: str, expected: str, needed: float) -> float:
  """Share of the expected characters among the non-ASCII ones, over the needed share; 0 if it does not decode."""
  try:
    text = sample.decode(encoding)
  except UnicodeDecodeError:
    return 0.0
  foreign = len(re.findall(r"[^\x00-\x7f]", text))
  if not foreign:
    return 0.0
  if encoding == "cp1252" and 2 * sum(map(len, re.findall(r"[^\W\x00-\x7f]{2,}", text))) > foreign:
    return 0.0  # Western text has accented letters one by one; whole words of them are another alphabet
  return len(re.findall(expected, text)) / foreign / needed
