"""What a `tokenizer.json` must be to lose nothing: a BPE over the 256 bytes that encodes the text as it is."""

import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import models

from mgr_jax.problems import Problem, UserError

TRAIN_COMMAND = "python -m train.prepare --input=FILE_OR_FOLDER --out=DIR"

_START_NAMES = ("<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "<|endoftext|>")


class Parsed(NamedTuple):
  """A usable tokenizer: the JSON content, the encoder, the bytes of each id (none for specials), the id of bos."""

  content: dict
  rust: tokenizers.Tokenizer
  pieces: tuple[bytes, ...]
  bos_id: int


def parse(text: str, source: str | Path) -> Parsed:
  """Reads the JSON of the `tokenizers` library; `source` is named in the `UserError` when it cannot be used.

  The encoder is set so that control strings in a text stay text, and that nothing is truncated, padded or added.
  """
  try:
    content = json.loads(text)
    rust = tokenizers.Tokenizer.from_str(text)
  except Exception as e:  # the Rust side raises bare Exception
    raise UserError(unusable(source, str(e).split("\n")[0][:200])) from e
  splitter = json.dumps(content.get("pre_tokenizer"))
  if not isinstance(rust.model, models.BPE) or '"ByteLevel"' not in splitter:
    raise UserError(unusable(source, f"a {type(rust.model).__name__} model whose alphabet is not the 256 bytes"))
  if content.get("normalizer"):
    raise UserError(unusable(source, f"its normalizer {content['normalizer'].get('type')} changes the text"))
  if '"add_prefix_space": true' in splitter:
    raise UserError(unusable(source, "it adds a space before the text (add_prefix_space)"))
  rust.encode_special_tokens = True  # not kept in the file, so it has to be set after every load
  rust.no_truncation()
  rust.no_padding()
  added = {token["id"]: token for token in content.get("added_tokens", ())}
  specials = {token["content"]: i for i, token in added.items() if token["special"]}
  pieces = _pieces(rust.get_vocab(with_added_tokens=True), added, source)
  if len(set(pieces) & {bytes([b]) for b in range(256)}) < 256:
    raise UserError(too_small(f"the vocabulary of {source}", len(pieces), len(specials)))
  bos_id = next((specials[name] for name in _START_NAMES if name in specials), None)
  if bos_id is None:
    names = " ".join(_START_NAMES)
    raise UserError(unusable(source, f"none of its special tokens starts documents (looked for {names})"))
  return Parsed(content, rust, pieces, bos_id)


def unusable(source: str | Path, why: str) -> Problem:
  """A file that is no lossless tokenizer."""
  return Problem(
    f"{source} is not a usable tokenizer: {why}",
    f"give a byte-level BPE, train one with {TRAIN_COMMAND}, or use --tokenizer=bytes",
  )


def too_small(what: str, size: int, specials: int) -> Problem:
  """A vocabulary that has no room for every byte."""
  return Problem(
    f"{what} cannot hold the 256 bytes and {specials} specials: asked {size}, needs at least {256 + specials}",
    "use --vocab_size=512 or more, or --tokenizer=bytes",
  )


def _pieces(vocab: dict[str, int], added: dict[int, dict], source: str | Path) -> tuple[bytes, ...]:
  """The bytes of each id. A token of the model is written with one character per byte, an added token as it is."""
  byte_of = _byte_of_character()
  pieces = [b""] * (max(vocab.values(), default=-1) + 1)
  for token, i in vocab.items():
    if i not in added:
      if not byte_of.keys() >= set(token):
        raise UserError(unusable(source, f"its token {token!r} is not a string of byte characters"))
      pieces[i] = bytes(byte_of[c] for c in token)
    elif not added[i]["special"]:
      pieces[i] = token.encode("utf-8")
  return tuple(pieces)


def _byte_of_character() -> dict[str, int]:
  """The inverse of the byte-level alphabet: printable Latin-1 is itself, the other 68 bytes are U+0100 onwards."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
