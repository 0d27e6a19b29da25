"""Text to token ids and back, without losing a byte: a trained byte-level BPE, or the 256 bytes themselves."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mgr_jax.data import byte_level, files, manifest, scripts
from mgr_jax.problems import Problem, UserError

SPECIALS = (
  "<|bos|>",
  "<|user_start|>",
  "<|user_end|>",
  "<|assistant_start|>",
  "<|assistant_end|>",
  "<|tool_call_start|>",
  "<|tool_call_end|>",
  "<|tool_output_start|>",
  "<|tool_output_end|>",
)
FILE_NAME = "tokenizer.json"
MIN_VOCAB = 256 + len(SPECIALS)

# The text is cut before merges are learnt, so that no token crosses one of these borders. In order of preference:
_SPLIT = "|".join(
  (
    r"'(?i:ll|re|ve|[dmst])",  # English contractions
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word, with the one space, quote or bracket before it
    r"\p{N}{1,2}",  # numbers in groups of two, so that a vocabulary does not fill up with them
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line ends after it
    r"\s*[\r\n]+",  # blank lines and the indentation before them
    r"\s+(?!\S)",  # spaces, all but the last one before a word
    r"\s+",
  )
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A lossless tokenizer. Control strings such as `<|bos|>` inside a text are text; only `bos_id` is ever added.

  `kind` is `bpe` or `bytes`. `token_bytes` is int32[vocab_size], the bytes of UTF-8 text each token stands for (0 for
  specials): for every text, `token_bytes[encode(text)].sum() == len(text.encode())`, which turns nats per token into
  bits per byte. `sha256` is the hash of `json`, the canonical JSON that `save` writes, and is the tokenizer's identity.
  """

  kind: str
  vocab_size: int
  bos_id: int
  sha256: str
  token_bytes: np.ndarray = dataclasses.field(repr=False)
  json: str = dataclasses.field(repr=False)
  _pieces: tuple[bytes, ...] = dataclasses.field(repr=False)
  _rust: tokenizers.Tokenizer | None = dataclasses.field(repr=False)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """One int32 array per text, `bos_id` first. All documents go to the threaded Rust encoder in one call."""
    if self._rust is None:
      return [self.encode(text) for text in texts]
    encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([self.bos_id, *e.ids], np.int32) for e in encodings]

  def encode(self, text: str, bos: bool = True) -> np.ndarray:
    """int32[n] ids of one text, with `bos_id` first unless `bos` is False."""
    if self._rust is None:
      ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(SPECIALS)
    else:
      ids = np.array(self._rust.encode(text, add_special_tokens=False).ids, np.int32)
    return np.concatenate([np.array([self.bos_id], np.int32), ids]) if bos else ids

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    """The UTF-8 bytes the ids stand for; specials stand for none. A cut through a character leaves its first bytes."""
    return b"".join(self._pieces[i] for i in np.asarray(ids, np.int64).reshape(-1))

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text; incomplete characters at a cut become U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")


def bytes_tokenizer() -> Tokenizer:
  """The 9 specials followed by the 256 bytes: 265 ids, needs no file and no training."""
  pieces = (b"",) * len(SPECIALS) + tuple(bytes([b]) for b in range(256))
  return _build("bytes", pieces, 0, {"kind": "bytes", "specials": list(SPECIALS)}, None)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a byte-level BPE on `texts`: specials at ids 0..8, then the 256 bytes, then the merges, most frequent first.

  Pairs seen once are not merged, so a small corpus yields fewer than `vocab_size` tokens (see `shortfall`).
  Deterministic. Raises `UserError` when `vocab_size` cannot hold the specials and the 256 bytes, or when there is no
  text. (Sennrich et al., 2016, arXiv 1508.07909.)
  """
  if vocab_size < MIN_VOCAB:
    raise UserError(byte_level.too_small("the asked vocabulary", vocab_size, len(SPECIALS)))
  iterator = iter(texts)
  first = next(iterator, None)
  if first is None:
    raise UserError(
      Problem(
        "no documents to train a tokenizer on", f"add text with {byte_level.TRAIN_COMMAND}, or use --tokenizer=bytes"
      )
    )
  rust = tokenizers.Tokenizer(models.BPE())
  rust.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  rust.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    show_progress=False,
    special_tokens=list(SPECIALS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  rust.train_from_iterator(itertools.chain([first], iterator), trainer)
  return _from_json(rust.to_str(), "the trained tokenizer")


def shortfall(tok: Tokenizer, asked: int) -> Problem | None:
  """A warning when training returned more than 256 ids fewer than `asked`, else None."""
  if asked - tok.vocab_size <= 256:
    return None
  return Problem(
    f"asked for a vocabulary of {asked} ids, got {tok.vocab_size}: the corpus has no more pairs that occur twice",
    f"use --vocab_size={tok.vocab_size}, or train on more text",
  )


def save(tok: Tokenizer, path: str | os.PathLike) -> None:
  """Writes the canonical JSON to `path`, atomically. `load` returns an equal tokenizer with the same `sha256`."""
  files.write_text(path, tok.json)


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads a `tokenizer.json` of the `tokenizers` library (byte-level BPE), or a saved byte tokenizer.

  Raises `UserError` when the file is missing, is not such a file, rewrites text before it splits it, or lacks some of
  the 256 bytes: then it could not be lossless and bits per byte would be wrong.
  """
  path = Path(path).absolute()
  try:
    text = path.read_text("utf-8")
  except OSError as e:
    raise UserError(
      Problem(f"cannot read the tokenizer {path}: {e.strerror}", f"{byte_level.TRAIN_COMMAND}, or --tokenizer=bytes")
    ) from e
  except UnicodeDecodeError as e:
    raise UserError(byte_level.unusable(path, "it is not UTF-8 text")) from e
  return _from_json(text, path)


def resolve(flag: str, data_dir: str | os.PathLike) -> Tokenizer:
  """The tokenizer a `--tokenizer` value means for the corpus in `data_dir`.

  `auto`: `tokenizer.json` beside the data, checked against the manifest; `bytes`; `gpt2`: downloaded from the Hugging
  Face hub (the only value that uses the network); anything else is the path of a `tokenizer.json`. Raises `UserError`.
  """
  if flag == "bytes":
    return bytes_tokenizer()
  if flag == "gpt2":
    return load(_download_gpt2())
  if flag != "auto":
    path = Path(flag)
    return load(path / FILE_NAME if path.is_dir() else path)
  data_dir = Path(data_dir).absolute()
  recorded = manifest.read_manifest(data_dir)
  record = recorded.tokenizer if recorded else None
  if record is not None and record.kind == "bytes" and not (data_dir / record.file).exists():
    return bytes_tokenizer()
  path = data_dir / (record.file if record else FILE_NAME)
  if not path.exists():
    raise UserError(
      Problem(
        f"no tokenizer found: --tokenizer=auto looked for {path}" + (" (named by the manifest)" if record else ""),
        f"train one with {byte_level.TRAIN_COMMAND}, give a file with --tokenizer=PATH, or use --tokenizer=bytes",
      )
    )
  tok = load(path)
  if record is not None and (problem := mismatch(tok, record.sha256, record.vocab_size, f"the manifest of {data_dir}")):
    raise UserError(problem)
  return tok


def mismatch(tok: Tokenizer, sha256: str, vocab_size: int, where: str) -> Problem | None:
  """The problem that `tok` is not the tokenizer recorded in `where` (a manifest or a checkpoint), or None."""
  if tok.sha256 == sha256:
    return None
  return Problem(
    f"the tokenizer (sha256 {tok.sha256}, {tok.vocab_size} ids) is not the one recorded in {where}"
    f" (sha256 {sha256}, {vocab_size} ids)",
    "give the recorded tokenizer with --tokenizer=PATH; or prepare the data again and train a new model",
  )


def does_not_fit(tok: Tokenizer, model_vocab: int) -> Problem | None:
  """The problem that `tok` produces ids a model of `model_vocab` embeddings does not have, or None."""
  if tok.vocab_size <= model_vocab:
    return None
  return Problem(
    f"the tokenizer produces ids up to {tok.vocab_size - 1}, the model has ids up to {model_vocab - 1}"
    f" (vocabularies of {tok.vocab_size} and {model_vocab})",
    "use the tokenizer the model was trained with, or train a new model with this one",
  )


def quality_report(
  tok: Tokenizer, texts: Sequence[str], reference: Tokenizer | None = None, seq_len: int = 1024
) -> dict:
  """How well `tok` compresses `texts`, beside the byte tokenizer and an optional `reference` tokenizer.

  Returns `{documents, bytes, words, seq_len, tokenizer: M, byte_tokenizer: M, reference: M}` where each M holds
  `vocab_size`, `tokens` (without bos), `bytes_per_token`, `tokens_per_word` (words are separated by spaces),
  `share_over_seq_len` (documents whose ids, bos included, exceed `seq_len`) and `scripts`: per script of
  `scripts.SCRIPTS` that occurs, `bytes`, `tokens`, `bytes_per_token`. A token belongs to the script of its last byte,
  so that the space before a word does not decide.
  """
  texts = list(texts)
  words = sum(len(text.split()) for text in texts)
  subjects = {"tokenizer": tok, "byte_tokenizer": bytes_tokenizer()} | ({"reference": reference} if reference else {})
  report = {
    "documents": len(texts),
    "bytes": sum(len(text.encode("utf-8")) for text in texts),
    "words": words,
    "seq_len": seq_len,
  }
  labels = [scripts.byte_scripts(text) for text in texts]
  return report | {name: _measure(subject, texts, labels, words, seq_len) for name, subject in subjects.items()}


def _measure(tok: Tokenizer, texts: list[str], labels: list[np.ndarray], words: int, seq_len: int) -> dict:
  tokens = np.zeros(len(scripts.SCRIPTS), np.int64)
  bytes_ = np.zeros(len(scripts.SCRIPTS), np.int64)
  over = 0
  for ids, label in zip(tok.encode_batch(texts), labels, strict=True):
    over += len(ids) > seq_len
    widths = tok.token_bytes[ids[1:]]
    script = label[np.cumsum(widths) - 1]
    tokens += np.bincount(script, minlength=len(tokens))
    bytes_ += np.bincount(script, weights=widths, minlength=len(tokens)).astype(np.int64)
  return {
    "vocab_size": tok.vocab_size,
    "tokens": int(tokens.sum()),
    "bytes_per_token": float(bytes_.sum() / max(tokens.sum(), 1)),
    "tokens_per_word": float(tokens.sum() / max(words, 1)),
    "share_over_seq_len": over / max(len(texts), 1),
    "scripts": {
      name: {"bytes": int(b), "tokens": int(t), "bytes_per_token": float(b / t)}
      for name, t, b in zip(scripts.SCRIPTS, tokens, bytes_, strict=True)
      if t
    },
  }


def _from_json(text: str, source: str | Path) -> Tokenizer:
  with contextlib.suppress(ValueError, AttributeError):
    if json.loads(text).get("kind") == "bytes":
      return bytes_tokenizer()
  parsed = byte_level.parse(text, source)
  return _build("bpe", parsed.pieces, parsed.bos_id, parsed.content, parsed.rust)


def _build(
  kind: str, pieces: tuple[bytes, ...], bos_id: int, content: dict, rust: tokenizers.Tokenizer | None
) -> Tokenizer:
  canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
  token_bytes = np.array([len(p) for p in pieces], np.int32)
  token_bytes.setflags(write=False)
  digest = hashlib.sha256(canonical.encode("utf-8")).hexdigest()
  return Tokenizer(kind, len(pieces), bos_id, digest, token_bytes, canonical, pieces, rust)


def _download_gpt2() -> str:
  import huggingface_hub  # slow to import, and needed for this one value only

  try:
    return huggingface_hub.hf_hub_download("openai-community/gpt2", FILE_NAME)
  except Exception as e:  # whatever went wrong between here and the hub, the way out is the same
    error = f"--tokenizer=gpt2 could not be downloaded: {type(e).__name__}: " + str(e).split("\n")[0][:200]
    fix = "connect to the network; or copy a tokenizer.json here and use --tokenizer=PATH; or use --tokenizer=bytes"
    raise UserError(Problem(error, fix)) from e
