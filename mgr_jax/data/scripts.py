"""Which writing system each character, and each UTF-8 byte, of a text belongs to."""

import numpy as np

SCRIPTS = ("latin", "cyrillic", "cjk", "digits", "code", "space", "other")

# First code point of each block of the Unicode standard that matters here, and its label; a block ends where the next
# begins.
_BLOCKS = (
  (0x00, "other"),
  (0x09, "space"),
  (0x0E, "other"),
  (0x20, "space"),
  (0x21, "code"),
  (0x30, "digits"),
  (0x3A, "code"),
  (0x41, "latin"),
  (0x5B, "code"),
  (0x61, "latin"),
  (0x7B, "code"),
  (0x7F, "other"),
  (0xA0, "space"),
  (0xA1, "other"),
  (0xC0, "latin"),
  (0xD7, "other"),
  (0xD8, "latin"),
  (0xF7, "other"),
  (0xF8, "latin"),
  (0x250, "other"),
  (0x400, "cyrillic"),
  (0x530, "other"),
  (0x1C80, "cyrillic"),
  (0x1C90, "other"),
  (0x1E00, "latin"),
  (0x1F00, "other"),
  (0x2000, "space"),
  (0x200B, "other"),
  (0x2DE0, "cyrillic"),
  (0x2E00, "other"),
  (0x2E80, "cjk"),
  (0x2FE0, "other"),
  (0x3000, "space"),
  (0x3001, "cjk"),
  (0xA4D0, "other"),
  (0xA640, "cyrillic"),
  (0xA6A0, "other"),
  (0xAC00, "cjk"),
  (0xD7B0, "other"),
  (0xF900, "cjk"),
  (0xFB00, "other"),
  (0xFF01, "cjk"),
  (0xFFA0, "other"),
  (0x20000, "cjk"),
  (0x40000, "other"),
)
_STARTS = np.array([start for start, _ in _BLOCKS], np.uint32)
_LABELS = np.array([SCRIPTS.index(label) for _, label in _BLOCKS], np.uint8)


def character_scripts(text: str) -> np.ndarray:
  """uint8[len(text)]: the index into `SCRIPTS` of each character.

  `code` is ASCII punctuation and operators; `cjk` includes kana, hangul and full-width forms. O(n log blocks), no
  Python loop.
  """
  codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
  return _LABELS[np.searchsorted(_STARTS, codes, side="right") - 1]


def byte_scripts(text: str) -> np.ndarray:
  """uint8[number of UTF-8 bytes]: the script of the character each byte belongs to."""
  codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
  widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
  return np.repeat(character_scripts(text), widths)


def script_histogram(text: str) -> np.ndarray:
  """int64[len(SCRIPTS)]: characters of each script."""
  return np.bincount(character_scripts(text), minlength=len(SCRIPTS))
