"""Near duplicates by MinHash: documents that share most of their word sequences, found without comparing all pairs.

The share of equal minima of two documents under random hash functions estimates the Jaccard similarity of their sets
of five-word shingles (Broder, 1997, "On the resemblance and containment of documents"); pairs to compare come from
bands of minima that agree entirely (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4).
"""

import os
import re
import tempfile
import zlib

import numpy as np

BANDS, ROWS = 16, 8
SHINGLE = 5
THRESHOLD = 0.7  # pairs of similarity s share a band with probability 1 - (1 - s^ROWS)^BANDS: 0.61 at 0.7, 0.95 at 0.8

# Scripts written without spaces have no words to find; each of their characters counts as one.
_SPACELESS = r"\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_SPACELESS}]|[^\\W{_SPACELESS}]+")
_CHUNK = 4096


def signature(text: str, coefficients: np.ndarray) -> np.ndarray:
  """uint32[BANDS * ROWS]: for each hash function the least value over the shingles of `text`.

  Case and punctuation are ignored. `coefficients` is uint64[2, BANDS * ROWS] from `hash_functions`. Cost: BANDS *
  ROWS multiplications per word.
  """
  words = np.array([zlib.crc32(w.encode()) for w in _WORD.findall(text.lower())] or [0], np.uint64)
  count = max(1, len(words) - SHINGLE + 1)
  shingles = np.zeros(count, np.uint64)
  for n in range(min(SHINGLE, len(words))):
    shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + words[n : n + count] + np.uint64(1)
  # The top bits of a 64-bit product depend on all bits below, so mix them down before the functions multiply again.
  shingles = np.unique((shingles ^ (shingles >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9))
  least = np.full(BANDS * ROWS, np.iinfo(np.uint32).max, np.uint32)
  for start in range(0, len(shingles), _CHUNK):
    part = shingles[start : start + _CHUNK, None] * coefficients[0] + coefficients[1]
    least = np.minimum(least, (part >> np.uint64(32)).astype(np.uint32).min(axis=0))
  return least


def hash_functions(seed: int) -> np.ndarray:
  """uint64[2, BANDS * ROWS]: odd multipliers and offsets of multiply-shift hashing (Dietzfelbinger et al., 1997)."""
  rng = np.random.Generator(np.random.Philox(seed % 2**64))
  draws = rng.integers(0, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
  draws[0] |= np.uint64(1)
  return draws


class NearDuplicates:
  """Collects signatures in a temporary file (512 bytes per document) and names the later one of each similar pair.

  Cost of a signature: about 1 MB of text per second and core. Memory while searching: about 40 bytes per document.
  """

  def __init__(self, directory: str | os.PathLike, seed: int):
    self._coefficients = hash_functions(seed)
    self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed by `close`)
    self._documents = 0

  def add(self, text: str) -> None:
    self._file.write(signature(text, self._coefficients).tobytes())
    self._documents += 1

  def later_copies(self) -> np.ndarray:
    """bool[documents in the order added]: True for a document similar to an earlier one that shares a band with it.

    Similar to a copy of it counts too, so that of a cluster its first document remains.
    """
    self._file.flush()
    copy = np.zeros(self._documents, bool)
    if self._documents == 0:
      return copy
    signatures = np.memmap(self._file, np.uint32, "r", shape=(self._documents, BANDS * ROWS))
    weights = self._coefficients[0, :ROWS]
    for band in range(BANDS):
      columns = slice(band * ROWS, (band + 1) * ROWS)
      keys = np.empty(self._documents, np.uint64)
      for at in range(0, len(keys), _CHUNK):
        keys[at : at + _CHUNK] = (signatures[at : at + _CHUNK, columns] * weights).sum(axis=1, dtype=np.uint64)
      order = np.argsort(keys, kind="stable")  # stable: of equal keys the earliest document comes first
      starts = np.r_[True, keys[order[1:]] != keys[order[:-1]]]
      first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
      for at in range(0, len(order), _CHUNK):
        one, other = first[at : at + _CHUNK], order[at : at + _CHUNK]
        one, other = one[one != other], other[one != other]
        similar = (signatures[one] == signatures[other]).mean(axis=1) >= THRESHOLD
        copy[other[similar]] = True
    return copy

  def close(self) -> None:
    self._file.close()
