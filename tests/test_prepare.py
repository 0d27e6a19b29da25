"""From files to a corpus by command: what comes out, in which order, and how every mistake is explained."""

import csv
import errno
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tracemalloc

import pyarrow.parquet as pq
import pytest
import tokenizers

from mgr_jax.data import cleaning, corpus, dedupe, manifest, parquet, shuffle, tokenizer
from train import cli, prepare

WORDS = {
  "en": re.findall(r"\w+", "the quick brown fox jumps over a lazy dog while people read books about sea and weather"),
  "ru": re.findall(r"\w+", "съешь же ещё этих мягких французских булок да выпей чаю потом иди домой спать до утра"),
}


def sentence(rng, words=30, language="en"):
  return " ".join(rng.choices(WORDS[language], k=words)) + "."


def documents(count, words=30, seed=0, language="en"):
  rng = random.Random(seed)
  return [f"{i} {sentence(rng, words, language)}" for i in range(count)]


def write_jsonl(path, texts, **columns):
  rows = [{"text": t, **{k: v[i] for k, v in columns.items()}} for i, t in enumerate(texts)]
  path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
  return path


def run(*args):
  return cli.execute(prepare.main, ["train.prepare", *map(str, args)], prepare.FLAGS)


@pytest.fixture
def make(tmp_path, capsys):
  """Runs the program on `texts` with small shards and the byte tokenizer; returns the output directory."""

  def make(texts, *args, name="out", expect=0, **columns):
    source = write_jsonl(tmp_path / f"{name}.jsonl", texts, **columns)
    small = ["--shards=3", "--val_frac=0.1", "--tokenizer=bytes"]
    given = {str(a).split("=")[0] for a in args}
    small = [a for a in small if a.split("=")[0] not in given]
    code = run(f"--input={source}", f"--out={tmp_path / name}", *small, *args)
    out, err = capsys.readouterr()
    assert code == expect, err
    make.out, make.err = out, err
    return tmp_path / name

  return make


@pytest.fixture
def fails(capsys):
  """Runs the program, expects exit code 2 and a message with all `parts`, a fix and no traceback."""

  def fails(args, *parts, code=2):
    assert run(*args) == code
    err = capsys.readouterr().err
    for part in ("error: ", "fix: ", *parts):
      assert part in err, err
    assert "Traceback" not in err
    return err

  return fails


def split_texts(directory):
  """(training texts, validation texts) by the roles of the manifest."""
  found = {"train": [], "val": []}
  for record in manifest.read_manifest(directory).files:
    found[record.role] += parquet.iter_texts(directory / record.file)
  return found["train"], found["val"]


def all_texts(directory):
  return [text for split in split_texts(directory) for text in split]


def test_journey_from_mixed_files_to_a_corpus(tmp_path, capsys):
  rng = random.Random(0)
  docs = tmp_path / "docs"
  docs.mkdir()
  for i in range(20):
    (docs / f"{i}.txt").write_text(sentence(rng, 60), "utf-8")
  (docs / "old.txt").write_bytes(sentence(rng, 60, "ru").encode("cp1251"))
  (docs / "scan.pdf").write_bytes(b"%PDF")
  with open(tmp_path / "mail.csv", "w", newline="", encoding="utf-8") as f:
    csv.writer(f).writerows([["from", "body"], *([i % 3, sentence(rng, 40, "ru")] for i in range(40))])
  args = [f"--input={docs}", f"--input={tmp_path / 'mail.csv'}", f"--out={tmp_path / 'corpus'}", "--shards=4"]
  args += ["--text_column=body", "--vocab_size=600", "--val_frac=0.05"]

  assert run(*args) == 2
  err = capsys.readouterr().err
  assert "old.txt: byte 0x" in err and "--encoding=cp1251" in err and "--encoding=utf-8,cp1251" in err
  assert not (tmp_path / "corpus").exists()

  assert run(*args, "--encoding=utf-8,cp1251") == 0
  out, err = capsys.readouterr()
  assert "read 61 documents from 22 files" in out
  assert "warning: files of other types were passed over: 1 .pdf" in err and "pdftotext" in err
  assert out.endswith(f"next: python -m train.main --data={tmp_path / 'corpus'}\n")
  loaded = corpus.load_corpus(tmp_path / "corpus")
  assert len(loaded.train) == 3 and [p.name for p in loaded.val] == ["shard_00003.parquet"]
  train, val = split_texts(tmp_path / "corpus")
  assert len(train) + len(val) == 61 and val
  tok = tokenizer.resolve("auto", tmp_path / "corpus")
  assert 265 < tok.vocab_size <= 600
  page = (tmp_path / "corpus" / "prepare.md").read_text("utf-8")
  for part in (
    "| read                |        61 |",
    "cyrillic",
    "latin",
    "shard_00003.parquet",
    "bytes per token",
    "## Next",
  ):
    assert part in page
  assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "docs", "mail.csv"]

  assert run(f"--inspect={tmp_path / 'corpus'}") == 0
  assert "shard_00003.parquet | val" in capsys.readouterr().out
  with (tmp_path / "corpus" / "shard_00001.parquet").open("ab") as f:
    f.write(b"x")
  assert run(f"--inspect={tmp_path / 'corpus'}") == 2
  assert "shard_00001.parquet" in capsys.readouterr().err


def test_order_depends_on_documents_and_seed_only(make):
  texts = documents(60)

  def hashes(directory):
    return [r.sha256 for r in manifest.read_manifest(directory).files]

  one = make(texts, name="one")
  two = make(texts[::-1], name="two")
  other = make(texts, "--seed=1", name="other")
  assert hashes(one) == hashes(two)
  assert hashes(one) != hashes(other)
  train, val = split_texts(one)
  assert sorted(train + val) == sorted(texts) == sorted(all_texts(other))
  order = [int(t.split()[0]) for t in train]
  # Of a random order about half of the neighbours ascend; of the order of the input all do.
  ascending = sum(a < b for a, b in itertools.pairwise(order)) / (len(order) - 1)
  assert 0.3 < ascending < 0.7
  assert abs(len(val) - 6) <= 6


def test_exact_copies(make):
  texts = documents(40)
  copies = [*texts, *texts[:7], texts[0] + "\n\n"]  # the last one becomes a copy when it is cleaned
  out = make(copies)
  assert sorted(all_texts(out)) == sorted(texts)
  assert "dropped 8: duplicate" in make.out and "read 48 documents" in make.out
  assert len(all_texts(make(copies, "--dedupe=none", name="kept"))) == 48


def test_near_copies(make):
  texts = documents(40, words=100)
  near = [t + " Edited." for t in texts[:10]]
  out = make([*texts, *near, texts[3]], "--dedupe=minhash")
  assert sorted(all_texts(out)) == sorted(texts)
  assert "dropped 10: near duplicate" in make.out and "dropped 1: duplicate" in make.out
  assert len(all_texts(make([*texts, *near], name="exact"))) == 50  # to exact matching they are all different


def test_minhash_estimates_the_jaccard_similarity():
  rng = random.Random(0)
  functions = dedupe.hash_functions(0)

  def shingles(words):
    return {tuple(words[i : i + dedupe.SHINGLE]) for i in range(len(words) - dedupe.SHINGLE + 1)}

  for changed in (0, 3, 15, 60):
    one = [f"w{rng.randrange(10_000)}" for _ in range(300)]
    two = list(one)
    for i in rng.sample(range(300), changed):
      two[i] = f"new{i}"
    exact = len(shingles(one) & shingles(two)) / len(shingles(one) | shingles(two))
    estimate = (dedupe.signature(" ".join(one), functions) == dedupe.signature(" ".join(two), functions)).mean()
    assert abs(estimate - exact) <= 4 * max(0.01, (exact * (1 - exact) / 128) ** 0.5), (changed, exact, estimate)


def test_the_splits_share_no_document_and_no_group(make):
  texts = documents(200)
  authors = [f"a{i % 20}" for i in range(200)]
  train, val = split_texts(make([*texts, *texts[:50]], "--dedupe=none", name="copies"))
  assert not set(train) & set(val) and len(train) + len(val) == 250

  def author(texts):
    return {authors[int(t.split()[0])] for t in texts}

  train, val = split_texts(make(texts, "--group_by=author", "--val_frac=0.2", name="grouped", author=authors))
  assert val and not author(train) & author(val)
  train, val = split_texts(make(texts, "--val_frac=0.2", name="mixed", author=authors))
  assert author(train) & author(val)  # without --group_by an author is in both


def test_few_documents_still_make_both_splits(make):
  for seed in range(5):
    train, val = split_texts(make(documents(3), "--shards=2", f"--seed={seed}", name=f"s{seed}"))
    assert len(train) == 2 and len(val) == 1
  directory = make(documents(3), "--val_frac=0", "--shards=3", name="noval")
  assert split_texts(directory)[1] == [] and make.out.endswith("--val_every=-1\n")
  assert run(f"--inspect={directory}") == 0


def test_shards_are_even_and_row_groups_as_asked(make):
  out = make(documents(100), "--shards=4", "--rows_per_group=7")
  rows = [r.rows for r in manifest.read_manifest(out).files]
  assert max(rows[:3]) - min(rows[:3]) <= 1 and sum(rows) == 100
  assert pq.read_metadata(out / "shard_00000.parquet").row_group(0).num_rows == 7


def test_cleaning_and_reasons(make):
  long, decomposed = "x" * 500, "cafe\u0301 " * 10
  page = "<html><script>var a;</script><p>One &amp; <b>two</b></p><p>three</p>" + sentence(random.Random(0)) + "</html>"
  texts = [*documents(10), "short", "", None, "   \n ", long, decomposed, page, "a\r\nb\rc " + "d" * 40]
  out = make(texts, "--max_chars=400", "--strip_html")
  found = all_texts(out)
  assert ("café " * 10).strip() in found
  assert any(t.startswith("One & two\n\nthree\n") for t in found) and not any("var a" in t for t in found)
  assert "a\nb\nc " + "d" * 40 in found
  for part in (
    "read 18 documents",
    "dropped 3: empty",
    "dropped 1: shorter than min_chars",
    "1: longer than max_chars",
  ):
    assert part in make.out
  kept = all_texts(make(texts, "--min_chars=1", "--unicode=none", name="raw"))
  assert "short" in kept and decomposed.strip() in kept and long in kept and any("<script>" in t for t in kept)


def test_indentation_of_the_first_line_survives():
  options = cleaning.CleanOptions()
  assert cleaning.clean("\n \n  if x:\n    y\n\n", options) == "  if x:\n    y"


def test_memory_does_not_grow_with_the_corpus(tmp_path, capsys):
  texts = [f"{i} " + "word " * 10_000 for i in range(200)]
  source = write_jsonl(tmp_path / "a.jsonl", texts)
  size = source.stat().st_size
  args = [f"--input={source}", f"--out={tmp_path / 'out'}", "--tokenizer=none", "--rows_per_group=2", "--shards=2"]
  tracemalloc.start()
  assert run(*args) == 0
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < size / 2.5, (peak, size)
  tracemalloc.start()
  assert source.read_text()
  assert tracemalloc.get_traced_memory()[1] > size / 2.5  # the measure sees a corpus that is held in memory
  tracemalloc.stop()


def test_tokenizers(make, tmp_path):
  texts = [*documents(60, language="ru"), *documents(60)]
  trained = make(texts, "--tokenizer=train", "--vocab_size=500", name="trained")
  loaded = tokenizer.load(trained / "tokenizer.json")
  assert manifest.read_manifest(trained).tokenizer.sha256 == loaded.sha256
  control = "say <|bos|> and <|user_start|> as text"
  assert loaded.decode(loaded.encode(control)) == control and (loaded.encode(control)[1:] >= 9).all()
  assert "bytes per token, cyrillic" in make.out

  path, reference = trained / "tokenizer.json", make(texts, "--tokenizer=train", "--vocab_size=300", name="small")
  given = make(texts, f"--tokenizer={path}", f"--reference_tokenizer={reference / 'tokenizer.json'}", name="given")
  assert tokenizer.load(given / "tokenizer.json").sha256 == loaded.sha256
  assert "reference |" in make.out

  assert manifest.read_manifest(make(texts, name="bytes")).tokenizer.kind == "bytes"
  none = make(texts, "--tokenizer=none", name="none")
  assert manifest.read_manifest(none).tokenizer is None and make.out.endswith(" --tokenizer=bytes\n")

  make(texts, "--tokenizer=train", "--vocab_size=4000", name="big")
  assert "warning: asked for a vocabulary of 4000 ids, got" in make.err
  make(texts, "--tokenizer=train", "--vocab_size=300", name="enough")
  assert "asked for a vocabulary" not in make.err


def test_a_tokenizer_that_loses_text_is_refused(make, monkeypatch):
  monkeypatch.setattr(
    tokenizer.Tokenizer, "decode", lambda self, ids: self.decode_bytes(ids).decode().replace("x", "y")
  )
  make(documents(30), expect=2)
  assert "the tokenizer loses text: 'x" in make.err and "comes back as 'y" in make.err and "fix: " in make.err


def test_tokenizer_problems_are_found_before_reading(tmp_path, fails):
  source = write_jsonl(tmp_path / "a.jsonl", documents(5))
  lossy = tokenizers.Tokenizer(tokenizers.models.BPE())
  lossy.normalizer = tokenizers.normalizers.Lowercase()
  lossy.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  lossy.save(str(tmp_path / "lossy.json"))
  args = [f"--input={source}", f"--out={tmp_path / 'out'}"]
  fails([*args, "--vocab_size=100"], "--vocab_size=100 is below the 265 ids", "256 bytes and 9 specials")
  fails([*args, "--tokenizer=absent.json"], "absent.json")
  fails([*args, f"--tokenizer={tmp_path / 'lossy.json'}"], "normalizer Lowercase")
  fails([*args, "--tokenizer=bytes", "--vocab_size=4096"], "--vocab_size=4096 has no effect with --tokenizer=bytes")
  fails([*args, "--tokenizer=none", f"--reference_tokenizer={tmp_path / 'lossy.json'}"], "has no effect", "Lowercase")
  assert not (tmp_path / "out").exists()


def test_wrong_values_are_reported_together(tmp_path, fails):
  write_jsonl(tmp_path / "a.jsonl", documents(5))
  args = [f"--input={tmp_path / 'a.jsonl'}", f"--input={tmp_path / 'b.docx'}", f"--out={tmp_path / 'out'}"]
  wrong = ["--val_frac=1.5", "--shards=0", "--min_chars=9", "--max_chars=8", "--skip_bad_rows=-1"]
  (tmp_path / "b.docx").write_bytes(b"x")
  err = fails([*args, *wrong], "--val_frac=1.5", "--shards=0", "--min_chars=9", "--skip_bad_rows=-1", "pandoc")
  assert err.count("error: ") == 5
  fails([args[0], args[2], "--shards=1"], "--shards=1 has no room", "--val_frac=0")
  fails([], "--input is missing", "--out is missing")


@pytest.mark.parametrize(
  ("args", "part"),
  [
    (["--text_column=body", "--json_path=a.b"], "--text_column has no effect: there are no .json .jsonl .csv"),
    (["--json_path=a.b"], "--json_path has no effect: there are no .json .jsonl files"),
    (["--hf_endpoint=http://x"], "--hf_endpoint has no effect without --download"),
  ],
)
def test_flags_without_effect(tmp_path, fails, args, part):
  (tmp_path / "a.txt").write_text("x" * 100)
  fails([f"--input={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}", *args], part)


def test_text_flags_without_text_files(tmp_path, fails):
  pq.write_table(parquet.pa.table({"text": ["x" * 50]}), tmp_path / "a.parquet")
  args = [f"--input={tmp_path / 'a.parquet'}", f"--out={tmp_path / 'out'}", "--split_on=line", "--encoding=cp1251"]
  fails(args, "--split_on has no effect", "--encoding has no effect")
  fails(["--inspect=x", "--shards=3", "--overwrite"], "--shards has no effect with --inspect=x", "--overwrite has no")
  fails(["--download=fineweb-edu", "--input=x"], "--input has no effect with --download=fineweb-edu")


def test_nothing_left(make):
  make(["a", "b", ""], expect=2)
  assert "no documents left: 2 shorter than min_chars, 1 empty" in make.err and "--min_chars=1" in make.err
  make(["x" * 500], "--max_chars=100", expect=2)
  assert "no documents left: 1 longer than max_chars" in make.err and "--split_on=blankline" in make.err


def test_fewer_documents_than_shards(make):
  make(documents(5), "--shards=20", expect=2)
  assert "5 documents, 1 of them to validate on, are fewer than --shards=20 needs" in make.err
  assert "--shards=5" in make.err
  assert len(manifest.read_manifest(make(documents(5), "--shards=5", name="fits")).files) == 5
  make(documents(1), "--shards=2", name="one", expect=2)
  assert "documents left to train and to validate on: 1" in make.err and "--val_frac=0 --shards=1" in make.err
  make(documents(9), "--group_by=author", name="group", author=["ann"] * 9, expect=2)
  assert "all 9 documents are one group by --group_by=author" in make.err and "--val_frac=0" in make.err


def test_an_existing_directory_is_safe(make, tmp_path, fails):
  out = make(documents(20))
  before = manifest.read_manifest(out)
  make(documents(30), expect=2)
  assert "exists and is not empty" in make.err and "--overwrite" in make.err
  assert manifest.read_manifest(out) == before
  make(documents(30), "--overwrite")
  assert sum(r.rows for r in manifest.read_manifest(out).files) == 30
  (out / "thesis.odt").write_text("years of work")
  make(documents(20), "--overwrite", expect=2)
  assert "--overwrite would delete what is no prepared corpus" in make.err and "thesis.odt" in make.err
  assert (out / "thesis.odt").exists()
  fails([f"--input={tmp_path / 'out.jsonl'}", f"--out={tmp_path / 'out.jsonl'}"], "out.jsonl is a file")
  (tmp_path / "empty").mkdir()
  assert make(documents(20), name="empty").exists()


def test_a_corpus_can_be_sharded_again_into_itself(make, tmp_path):
  out = make(documents(20))
  assert run(f"--input={out}", f"--out={out}", "--overwrite", "--shards=5", "--tokenizer=bytes") == 0
  train, val = split_texts(out)
  assert sorted(train + val) == sorted(documents(20)) and len(list(out.glob("*.parquet"))) == 5


def test_a_full_disk_leaves_everything_as_it_was(make, tmp_path, monkeypatch):
  out = make(documents(20))
  before = manifest.read_manifest(out)
  (tmp_path / "out.jsonl").unlink()
  real = parquet.write_shard

  def full(path, *args, **kwargs):
    if path.name == "shard_00001.parquet":
      raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return real(path, *args, **kwargs)

  monkeypatch.setattr(parquet, "write_shard", full)
  make(documents(30), "--overwrite", expect=2)
  assert "cannot be written: No space left on device" in make.err and "free space" in make.err
  make(documents(30), name="new", expect=2)
  assert manifest.read_manifest(out) == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ["new.jsonl", "out", "out.jsonl"]


def test_an_interruption_leaves_nothing(make, tmp_path, monkeypatch):
  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(manifest, "write_manifest", interrupt)
  make(documents(20), expect=130)
  assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


KILLED = """
import os, signal, sys
from mgr_jax.data import parquet
real = parquet.write_shard
def write_shard(path, *args, **kwargs):
  if path.name == "shard_00001.parquet":
    os.kill(os.getpid(), signal.SIGKILL)
  return real(path, *args, **kwargs)
parquet.write_shard = write_shard
from train import cli, prepare
sys.argv = ["train.prepare", *sys.argv[1:]]
cli.run(prepare.main, prepare.FLAGS)
"""


def test_a_killed_run_leaves_no_corpus_and_the_next_one_works(tmp_path):
  source = write_jsonl(tmp_path / "a.jsonl", documents(30))
  args = [f"--input={source}", f"--out={tmp_path / 'out'}", "--shards=3", "--tokenizer=bytes"]
  killed = subprocess.run([sys.executable, "-c", KILLED, *args], capture_output=True, text=True, timeout=120)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (tmp_path / "out").exists()
  done = subprocess.run([sys.executable, "-m", "train.prepare", *args], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  (left,) = tmp_path.glob(".out.partial-*")
  assert done.stderr == f"warning: a run that was killed, or is still at work, left {left}\n  fix: rm -r {left}\n"
  assert corpus.inspect(tmp_path / "out").problems == ()


def test_of_equal_texts_the_first_remains(tmp_path):
  """The group of the first copy decides the split, so a copy in another group cannot move it."""

  def side(*added):
    spool = shuffle.Spool(tmp_path, seed=0, distinct=True)
    for text, group in added:
      spool.add(text, group)
    spool.finish()
    half = 2**63
    assert spool.exact_copies == len(added) - len({text for text, _ in added})
    return [list(spool.texts(half, validation)) for validation in (False, True)]

  groups = [f"g{i}" for i in range(4)]
  alone = {g: side(("same", g)) for g in groups}
  assert len({str(s) for s in alone.values()}) == 2  # some groups fall on one side, some on the other
  assert all(side(("same", g), ("same", h)) == alone[g] for g in groups for h in groups)


def test_help_names_every_flag_with_its_default(capsys):
  for flag in ("--help", "--helpfull", "-h"):
    assert run(flag) == 0
    out = capsys.readouterr().out
    assert "Makes a corpus to train on" in out and "--vocab_size: Ids of a trained tokenizer. (default: 32768)" in out
    assert all(f"--{name}" in out for name in prepare.FLAGS)
