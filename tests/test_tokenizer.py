"""Tokenizers lose nothing, keep control strings as text, and count bytes exactly."""

import json
import math

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mgr_jax.data import scripts, tokenizer
from mgr_jax.data.manifest import FileRecord, Manifest, TokenizerRecord, write_manifest
from mgr_jax.problems import UserError

TEXTS = [
  "It's 12345 o'clock;\n\n\n  def f(x):\n\t\treturn x  # don't  \r\n\r\n",
  "Съешь же ещё этих мягких французских булок, да выпей чаю. ",
  "敏捷的棕色狐狸跳过懒狗。いろはにほへと 다람쥐 헌 쳇바퀴에",
  "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का ",
  "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
  "".join(map(chr, range(0x20))) + "\x7f\x80\x85\xa0\xad\ufeff\u200b\u2028 🦊👩‍👩‍👧 e\u0301",
  " ".join(tokenizer.SPECIALS),
  " ",
]


@pytest.fixture(scope="module")
def bpe():
  return tokenizer.train_bpe(TEXTS * 3, 700)


@pytest.fixture(params=["bpe", "bytes", "reloaded"])
def tok(request, bpe, tmp_path):
  if request.param == "bytes":
    return tokenizer.bytes_tokenizer()
  if request.param == "bpe":
    return bpe
  tokenizer.save(bpe, tmp_path / "t.json")
  return tokenizer.load(tmp_path / "t.json")


def test_round_trip(tok):
  for text, ids in zip(TEXTS, tok.encode_batch(TEXTS), strict=True):
    assert ids.dtype == np.int32 and ids[0] == tok.bos_id and ids.max() < tok.vocab_size
    np.testing.assert_array_equal(ids, tok.encode(text))
    np.testing.assert_array_equal(ids[1:], tok.encode(text, bos=False))
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()


def test_control_strings_stay_text(tok):
  for ids in tok.encode_batch(TEXTS):
    assert ids[1:].min() >= len(tokenizer.SPECIALS)


def test_the_library_alone_would_turn_control_strings_into_ids(bpe, tmp_path):
  tokenizer.save(bpe, tmp_path / "t.json")
  rust = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
  assert min(rust.encode(TEXTS[6]).ids) == 0
  assert tokenizer.load(tmp_path / "t.json").encode(TEXTS[6], bos=False).min() >= len(tokenizer.SPECIALS)


def test_token_bytes_sum_to_the_length_of_the_text(tok):
  characters = np.array([len(tok.decode([i])) for i in range(tok.vocab_size)])
  for text in TEXTS:
    ids = tok.encode(text)
    assert tok.token_bytes[ids].sum() == len(text.encode())
    if tok.kind == "bpe" and text == TEXTS[1]:
      assert characters[ids].sum() != len(text.encode())  # counting characters would be wrong
  assert tok.token_bytes.dtype == np.int32 and tok.token_bytes.shape == (tok.vocab_size,)
  assert (tok.token_bytes[: len(tokenizer.SPECIALS)] == 0).all()
  assert (tok.token_bytes[len(tokenizer.SPECIALS) :] > 0).all()


def test_a_cut_character_does_not_raise(tok):
  ids = tokenizer.bytes_tokenizer().encode("я")
  assert tokenizer.bytes_tokenizer().decode(ids[:2]) == "\ufffd"
  assert isinstance(tok.decode(tok.encode(TEXTS[2])[:-1]), str)


def bits_per_byte(nats, ids, tok):
  return nats / math.log(2) / tok.token_bytes[ids].sum()


def test_bits_per_byte_needs_no_vocabulary(bpe):
  raw = tokenizer.bytes_tokenizer()
  text = TEXTS[1] * 5
  targets = raw.encode(text)[1:]
  assert raw.vocab_size == 265
  uniform = math.log(256) * np.count_nonzero(raw.token_bytes[targets])
  assert bits_per_byte(uniform, targets, raw) == pytest.approx(8.0, abs=1e-3)
  assert bits_per_byte(1234.5, targets, raw) == pytest.approx(bits_per_byte(1234.5, bpe.encode(text)[1:], bpe))
  assert 1234.5 / len(targets) != pytest.approx(1234.5 / len(bpe.encode(text)[1:]), rel=0.1)  # nats per token do not do


def test_layout_of_the_vocabulary(bpe):
  raw = tokenizer.bytes_tokenizer()
  assert {bpe.decode_bytes([i]) for i in range(9, 265)} == {bytes([b]) for b in range(256)}
  assert [raw.decode_bytes([9 + b]) for b in range(256)] == [bytes([b]) for b in range(256)]
  content = json.loads(bpe.json)
  assert [t["content"] for t in content["added_tokens"]] == list(tokenizer.SPECIALS)
  assert [t["id"] for t in content["added_tokens"]] == list(range(9))


def test_splits_before_merging():
  tok = tokenizer.train_bpe(["don't 12345 hello, world\n\n" * 50], 400)
  pieces = [tok.decode([i]) for i in tok.encode("don't 12345 hello, world\n\n", bos=False)]
  assert pieces == ["don", "'t", " ", "12", "34", "5", " hello", ",", " world", "\n\n"]


def test_training_is_deterministic_and_identity_is_the_content(bpe, tmp_path):
  again = tokenizer.train_bpe(iter(TEXTS * 3), 700)
  other = tokenizer.train_bpe(TEXTS * 3, 600)
  assert again.sha256 == bpe.sha256 != other.sha256
  (tmp_path / "pretty.json").write_text(json.dumps(json.loads(bpe.json), indent=1), "utf-8")
  assert tokenizer.load(tmp_path / "pretty.json").sha256 == bpe.sha256
  tokenizer.save(tokenizer.bytes_tokenizer(), tmp_path / "b.json")
  assert tokenizer.load(tmp_path / "b.json").sha256 == tokenizer.bytes_tokenizer().sha256


def test_stored_truncation_and_padding_are_not_applied(bpe, tmp_path):
  rust = tokenizers.Tokenizer.from_str(bpe.json)
  rust.enable_truncation(4)
  rust.enable_padding(length=9)
  rust.save(str(tmp_path / "t.json"))
  np.testing.assert_array_equal(tokenizer.load(tmp_path / "t.json").encode(TEXTS[0]), bpe.encode(TEXTS[0]))


def test_small_corpora_give_smaller_vocabularies():
  tok = tokenizer.train_bpe(["too little text"] * 2, 2000)
  assert tok.vocab_size < 400
  problem = tokenizer.shortfall(tok, 2000)
  assert "2000" in problem.error and str(tok.vocab_size) in problem.error and str(tok.vocab_size) in problem.fix
  assert tokenizer.shortfall(tok, tok.vocab_size + 256) is None


def test_vocabulary_below_the_bytes_is_refused():
  with pytest.raises(UserError, match=r"asked 200, needs at least 265\n  fix: use --vocab_size=512"):
    tokenizer.train_bpe(TEXTS, 200)
  with pytest.raises(UserError, match="no documents"):
    tokenizer.train_bpe([], 300)
  assert tokenizer.train_bpe(["a"], 265).vocab_size == 265


def byte_level(alphabet=None, special="<|endoftext|>", add_prefix_space=False, normalizer=None):
  """A tokenizer file as others write them: bytes first, the special last, no merges."""
  alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
  rust = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
  rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  rust.decoder = decoders.ByteLevel()
  if normalizer:
    rust.normalizer = normalizer
  if special:
    rust.add_special_tokens([special])
  return rust


def test_tokenizers_of_others(tmp_path):
  byte_level().save(str(tmp_path / "t.json"))
  tok = tokenizer.load(tmp_path / "t.json")
  assert (tok.vocab_size, tok.bos_id, tok.token_bytes[256]) == (257, 256, 0)
  text = "<|endoftext|> 漢字"
  assert tok.encode(text)[0] == 256 not in tok.encode(text)[1:]
  assert tok.decode(tok.encode(text)) == text


def word_level():
  return tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    ("{", "not a usable tokenizer"),
    ("[]", "not a usable tokenizer"),
    ("{}", "not a usable tokenizer"),
    (word_level().to_str(), "WordLevel"),
    (byte_level(normalizer=normalizers.NFKC()).to_str(), "normalizer NFKC"),
    (byte_level(add_prefix_space=True).to_str(), "add_prefix_space"),
    (byte_level(alphabet=pre_tokenizers.ByteLevel.alphabet()[:200]).to_str(), "256 bytes and 1 specials"),
    (byte_level(special=None).to_str(), "starts documents"),
  ],
)
def test_unusable_files(tmp_path, content, reason):
  (tmp_path / "t.json").write_text(content, "utf-8")
  with pytest.raises(UserError, match=reason) as e:
    tokenizer.load(tmp_path / "t.json")
  assert str(tmp_path / "t.json") in str(e.value) and "--tokenizer=bytes" in str(e.value)


def test_resolve(bpe, tmp_path):
  tokenizer.save(bpe, tmp_path / "tokenizer.json")
  (tmp_path / "empty").mkdir()
  for flag, directory in (("auto", tmp_path), (str(tmp_path / "tokenizer.json"), "/"), (str(tmp_path), "/")):
    assert tokenizer.resolve(flag, directory).sha256 == bpe.sha256
  assert tokenizer.resolve("bytes", "/nowhere").kind == "bytes"
  with pytest.raises(UserError) as e:
    tokenizer.resolve("auto", tmp_path / "empty")
  for part in (str(tmp_path / "empty" / "tokenizer.json"), "train.prepare", "--tokenizer=bytes"):
    assert part in str(e.value)
  with pytest.raises(UserError, match=r"absent.json: No such file(.|\n)*train.prepare"):
    tokenizer.resolve(str(tmp_path / "absent.json"), tmp_path)


def test_resolve_checks_the_manifest(bpe, tmp_path):
  def record(sha256, size):
    write_manifest(tmp_path, Manifest((), tokenizer=TokenizerRecord("tokenizer.json", sha256, size)))

  tokenizer.save(bpe, tmp_path / "tokenizer.json")
  record(bpe.sha256, bpe.vocab_size)
  assert tokenizer.resolve("auto", tmp_path).sha256 == bpe.sha256
  record("f" * 64, 999)
  with pytest.raises(UserError) as e:
    tokenizer.resolve("auto", tmp_path)
  for part in ("f" * 64, bpe.sha256, "999", str(bpe.vocab_size), "manifest"):
    assert part in str(e.value)
  raw = tokenizer.bytes_tokenizer()
  write_manifest(tmp_path, Manifest((), tokenizer=TokenizerRecord("none.json", raw.sha256, raw.vocab_size, "bytes")))
  assert tokenizer.resolve("auto", tmp_path).kind == "bytes"
  (tmp_path / "manifest.json").write_text("{}")
  with pytest.raises(UserError, match="schema"):
    tokenizer.resolve("auto", tmp_path)


def test_a_manifest_survives_its_file(tmp_path):
  manifest = Manifest(
    (FileRecord("a.parquet", "val", 3, 99, "0" * 64),), "body", TokenizerRecord("t", "1", 300), "ü", "PSF"
  )
  assert Manifest.from_json(manifest.to_json()) == manifest
  for broken in (manifest.to_json().replace('"val"', '"vla"'), manifest.to_json().replace("a.parquet", "../a"), "[1]"):
    with pytest.raises(ValueError):
      Manifest.from_json(broken)


def test_models_with_another_vocabulary_are_refused(bpe):
  raw = tokenizer.bytes_tokenizer()
  assert tokenizer.mismatch(bpe, bpe.sha256, bpe.vocab_size, "run/checkpoints") is None
  problem = tokenizer.mismatch(bpe, raw.sha256, 265, "run/checkpoints")
  for part in (bpe.sha256, raw.sha256, str(bpe.vocab_size), "265", "run/checkpoints"):
    assert part in problem.error
  assert tokenizer.does_not_fit(bpe, 768) is None
  problem = tokenizer.does_not_fit(bpe, 265)
  for part in (str(bpe.vocab_size - 1), "264", str(bpe.vocab_size), "265"):
    assert part in problem.error


def test_gpt2_is_downloaded_only_when_asked_for(monkeypatch, tmp_path):
  import huggingface_hub

  byte_level().save(str(tmp_path / "gpt2.json"))
  calls = []

  def download(repo, file):
    calls.append((repo, file))
    if len(calls) > 1:
      raise OSError("no network")
    return str(tmp_path / "gpt2.json")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  with pytest.raises(UserError):
    tokenizer.resolve("auto", tmp_path)
  tokenizer.resolve("bytes", tmp_path)
  assert calls == []
  assert tokenizer.resolve("gpt2", tmp_path).bos_id == 256
  with pytest.raises(UserError, match=r"OSError: no network\n  fix: connect"):
    tokenizer.resolve("gpt2", tmp_path)


def test_quality_report(bpe):
  report = tokenizer.quality_report(bpe, TEXTS, reference=bpe, seq_len=30)
  raw, own = report["byte_tokenizer"], report["tokenizer"]
  assert report["documents"] == len(TEXTS) and report["bytes"] == sum(len(t.encode()) for t in TEXTS)
  assert raw["bytes_per_token"] == 1.0 and raw["tokens"] == report["bytes"]
  assert own["bytes_per_token"] == report["bytes"] / sum(len(i) - 1 for i in bpe.encode_batch(TEXTS)) > 1
  assert own["tokens_per_word"] == own["tokens"] / sum(len(t.split()) for t in TEXTS)
  assert raw["share_over_seq_len"] == 7 / 8 > own["share_over_seq_len"]
  assert report["reference"] == own
  for measured in (raw, own):
    assert sum(s["bytes"] for s in measured["scripts"].values()) == report["bytes"]
    assert sum(s["tokens"] for s in measured["scripts"].values()) == measured["tokens"]
  cyrillic = own["scripts"]["cyrillic"]
  assert cyrillic["bytes_per_token"] > 1.5 * raw["scripts"]["cyrillic"]["bytes_per_token"]
  assert "reference" not in tokenizer.quality_report(bpe, TEXTS)


def test_scripts():
  expected = {
    "a": 0,
    "é": 0,
    "ß": 0,
    "Ж": 1,
    "ё": 1,
    "漢": 2,
    "か": 2,
    "한": 2,
    "𠀀": 2,
    "7": 3,
    "{": 4,
    "\n": 5,
    "\xa0": 5,
  }
  expected |= {"ع": 6, "€": 6, "\x00": 6, "🦊": 6}
  text = "".join(expected)
  assert scripts.character_scripts(text).tolist() == list(expected.values())
  assert scripts.byte_scripts(text).tolist() == [s for c, s in expected.items() for _ in c.encode()]
  assert scripts.script_histogram(text).tolist() == [3, 2, 4, 1, 1, 2, 4]
  assert scripts.character_scripts("").size == scripts.byte_scripts("").size == 0
