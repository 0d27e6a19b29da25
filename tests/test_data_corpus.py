"""A corpus directory: roles, identity, every mistake reported with its way out, and the built-in corpus."""

import concurrent.futures
import dataclasses
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgr_jax.data import builtin, corpus, manifest, parquet, stream, tokenizer
from mgr_jax.problems import UserError


def texts(n, start=0):
  return [f"document {i} " + "word " * (i % 9) for i in range(start, start + n)]


@pytest.fixture
def plain(tmp_path):
  """Three shards of ten documents, no manifest."""
  directory = tmp_path / "data"
  directory.mkdir()
  for i in range(3):
    parquet.write_shard(directory / f"shard_{i:05d}.parquet", texts(10, 10 * i), rows_per_group=4)
  return directory


@pytest.fixture
def prepared(plain):
  """The same with a manifest that names a training, a test and a validation shard, and a tokenizer."""
  tok = tokenizer.train_bpe(texts(20), 300)
  tokenizer.save(tok, plain / "tokenizer.json")
  records = []
  for file, role in zip(sorted(plain.glob("*.parquet")), ("train", "test", "val"), strict=True):
    rows = parquet.read_footer(file).rows
    digest = corpus.files.sha256_file(file)
    records.append(manifest.FileRecord(file.name, role, rows, file.stat().st_size, digest))
  record = manifest.TokenizerRecord("tokenizer.json", tok.sha256, tok.vocab_size)
  corpus.write_manifest(plain, corpus.Manifest(tuple(records), tokenizer=record))
  return plain


def documents(found, split):
  units = found.units(split)
  return [text for i in range(len(units)) for text in units[i]]


def problem(directory, *parts, **options):
  """The problems of `load_corpus`, which must contain each of `parts` and be found by `inspect` too."""
  with pytest.raises(UserError) as e:
    corpus.load_corpus(directory, **options)
  for part in parts:
    assert part in str(e.value), f"{part!r} is not in: {e.value}"
  assert set(e.value.problems) <= set(corpus.inspect(directory, **options).problems)
  return str(e.value)


# Roles and identity


def test_the_last_shard_is_validation_without_a_manifest(plain):
  (plain / "._shard_00009.parquet").write_bytes(b"left by another system")
  found = corpus.load_corpus(plain)
  assert [f.name for f in found.train] == ["shard_00000.parquet", "shard_00001.parquet"]
  assert [f.name for f in found.val] == ["shard_00002.parquet"]
  assert documents(found, "train") + documents(found, "val") == texts(30)
  assert found.warnings == ()


def test_a_manifest_names_the_roles(prepared):
  found = corpus.load_corpus(prepared)
  assert [documents(found, split) for split in ("train", "test", "val")] == [texts(10), texts(10, 10), texts(10, 20)]
  assert found.manifest == manifest.read_manifest(prepared)


def test_the_manifest_gives_the_text_column(tmp_path):
  parquet.write_shard(tmp_path / "a.parquet", texts(5), column="body")
  size, digest = (tmp_path / "a.parquet").stat().st_size, corpus.files.sha256_file(tmp_path / "a.parquet")
  record = manifest.FileRecord("a.parquet", "train", 5, size, digest)
  corpus.write_manifest(tmp_path, corpus.Manifest((record,), text_column="body"))
  assert documents(corpus.load_corpus(tmp_path, need_val=False), "train") == texts(5)


def test_validation_from_training_documents(plain):
  found = corpus.load_corpus(plain, val_from_train=0.3)
  train, val = documents(found, "train"), documents(found, "val")
  assert sorted(train + val) == sorted(texts(30)) and not set(train) & set(val)
  assert all(corpus.held_out(text, 0.3) for text in val) and 3 <= len(val) <= 15
  again = corpus.load_corpus(plain, val_from_train=0.3)
  assert documents(again, "val") == val and again.sha256 == found.sha256
  assert set(val) <= set(documents(corpus.load_corpus(plain, val_from_train=0.5), "val"))


def test_held_out_share():
  assert 0.08 < sum(corpus.held_out(f"text {i}", 0.1) for i in range(3000)) / 3000 < 0.12
  assert not any(corpus.held_out(f"text {i}", 0.0) for i in range(100))


def test_identity_is_the_data_and_not_its_place(plain, tmp_path):
  first = corpus.load_corpus(plain).sha256
  shutil.copytree(plain, tmp_path / "copy")
  assert corpus.load_corpus(tmp_path / "copy").sha256 == first
  assert corpus.load_corpus(plain, val_from_train=0.2).sha256 != first
  parquet.write_shard(plain / "shard_00001.parquet", [t.replace("1", "2") for t in texts(10, 10)], rows_per_group=4)
  assert corpus.load_corpus(plain).sha256 != first


@pytest.mark.parametrize("limit", ["HASH_LIMIT", "SCAN_LIMIT"])
def test_large_corpora_are_read_cheaply_and_changes_are_noticed(prepared, monkeypatch, limit):
  whole = corpus.load_corpus(prepared).sha256
  monkeypatch.setattr(corpus, limit, 0)
  read = []
  monkeypatch.setattr(
    corpus.files, "sha256_file", lambda f, real=corpus.files.sha256_file: (read.append(f), real(f))[1]
  )
  assert corpus.load_corpus(prepared).sha256 == whole  # the manifest's hashes stand for the files
  assert len(read) == (0 if limit == "HASH_LIMIT" else 3)
  parquet.write_shard(prepared / "shard_00000.parquet", texts(11), rows_per_group=4)
  problem(prepared, "shard_00000.parquet", "11 rows", "data changed since preparation")


def test_identity_of_large_corpora_without_a_manifest(plain, monkeypatch):
  monkeypatch.setattr(corpus, "HASH_LIMIT", 0)
  monkeypatch.setattr(corpus, "SCAN_LIMIT", 0)
  first = corpus.load_corpus(plain).sha256
  assert corpus.load_corpus(plain).sha256 == first
  parquet.write_shard(plain / "shard_00001.parquet", texts(10, 11), rows_per_group=4)
  assert corpus.load_corpus(plain).sha256 != first


# Mistakes


def test_missing_directory(tmp_path):
  (tmp_path / "corpora").mkdir()
  problem(tmp_path / "corpsu", str(tmp_path / "corpsu"), "corpora", "python -m train.prepare --input=")
  (tmp_path / "file").write_text("x")
  problem(tmp_path / "file", "is a file", "train.prepare")


def test_directory_without_shards(tmp_path):
  for name in ("a.txt", "b.csv"):
    (tmp_path / name).write_text("x")
  problem(tmp_path, str(tmp_path), "a.txt, b.csv", f"python -m train.prepare --input={tmp_path}")


def test_broken_files_are_all_reported_and_the_others_checked(plain):
  (plain / "shard_00000.parquet").write_bytes(b"")
  good = (plain / "shard_00001.parquet").read_bytes()
  (plain / "shard_00001.parquet").write_bytes(good[:-20])
  pq.write_table(pa.table({"text": [1, 2]}), plain / "shard_00002.parquet")
  message = problem(plain, "shard_00000.parquet (0 bytes) is truncated or not parquet", "download or prepare it again")
  assert f"shard_00001.parquet ({len(good) - 20} bytes) is truncated" in message
  assert "holds int64" in message


def test_corrupt_pages_are_found(plain):
  data = bytearray((plain / "shard_00001.parquet").read_bytes())
  data[10:120] = bytes(110)
  (plain / "shard_00001.parquet").write_bytes(data)
  (plain / "shard_00000.parquet").write_bytes(b"PAR1")
  message = problem(plain, "shard_00001.parquet: row group 0", "truncated or corrupt")
  assert "shard_00000.parquet (4 bytes)" in message


def test_text_column_missing(tmp_path):
  table = pa.table({"id": ["a"] * 20, "n": range(20), "article": [t * 5 for t in texts(20)]})
  for i in range(3):
    pq.write_table(table, tmp_path / f"{i}.parquet")
  message = problem(tmp_path, "no column 'text'", "id, n, article", "--text_column=article")
  assert message.count("error:") == 1  # one message for all three files
  problem(tmp_path, "--text_column=article", text_column="artcle")
  assert len(documents(corpus.load_corpus(tmp_path, text_column="article"), "val")) == 20


def test_no_column_of_text_at_all(tmp_path):
  pq.write_table(pa.table({"a.b": [1], "c": [[1]]}), tmp_path / "a.parquet")
  problem(tmp_path, "a.b, c", "no column holds text", need_val=False)


def test_column_not_string(tmp_path):
  for i in range(2):
    pq.write_table(pa.table({"text": [10, 20, 30, 40], "body": texts(4)}), tmp_path / f"{i}.parquet")
  assert "40" not in problem(tmp_path, "holds int64", "10, 20, 30", "--text_column=body", "convert")


def test_one_shard_only(tmp_path):
  parquet.write_shard(tmp_path / "a.parquet", texts(30))
  problem(tmp_path, "one shard only, a.parquet", "train.prepare", "--val_from_train=0.01", "--val_every=-1")
  assert corpus.load_corpus(tmp_path, need_val=False).val == ()
  assert documents(corpus.load_corpus(tmp_path, val_from_train=0.2), "val")


def test_splits_without_usable_documents(plain):
  pq.write_table(pa.table({"text": pa.array(["", None, ""])}), plain / "shard_00002.parquet")
  problem(plain, "the val split has 0 usable documents", "shard_00002.parquet 0 of 3 rows", "train.prepare")
  assert corpus.load_corpus(plain, need_val=False)
  for i in range(2):  # a row group of no rows
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), plain / f"shard_{i:05d}.parquet")
  message = problem(plain, "the train split has 0 usable documents")
  assert "shard_00000.parquet 0 of 0 rows, shard_00001.parquet 0 of 0 rows" in message
  assert "the val split" in message


def test_splits_without_usable_documents_in_a_large_corpus(plain, monkeypatch):
  pq.write_table(pa.table({"text": pa.array(["", None, ""])}), plain / "shard_00002.parquet")
  monkeypatch.setattr(corpus, "SCAN_LIMIT", 0)
  problem(plain, "the val split has 0 usable documents", "shard_00002.parquet 0 of 3 rows")


def test_validation_fraction_that_holds_out_nothing(tmp_path):
  parquet.write_shard(tmp_path / "a.parquet", texts(5))
  problem(tmp_path, "the val split has 0 usable documents", "--val_from_train", val_from_train=1e-9)
  problem(tmp_path, "--val_from_train=1.5 is not in [0, 1)", val_from_train=1.5)


def test_validation_fraction_beside_validation_files(prepared):
  problem(prepared, "--val_from_train=0.1 has no use", "leave --val_from_train out", val_from_train=0.1)


def test_duplicates_and_leaks_are_warnings(plain):
  parquet.write_shard(plain / "shard_00001.parquet", [*texts(9, 10), texts(1)[0]])
  parquet.write_shard(plain / "shard_00002.parquet", texts(10, 8))
  for warnings in (corpus.load_corpus(plain).warnings, corpus.inspect(plain).warnings):
    duplicates, leak = map(str, warnings)
    assert "1 of 20 training documents are exact copies" in duplicates and "--dedupe=exact" in duplicates
    assert "10 of 10 val documents are also training documents" in leak and "--dedupe=exact" in leak


def wrong_hash(directory):
  """Makes the manifest disagree with the content of the first file, and with nothing else."""
  written = manifest.read_manifest(directory)
  first = dataclasses.replace(written.files[0], sha256="0" * 64)
  corpus.write_manifest(directory, dataclasses.replace(written, files=(first, *written.files[1:])))


def test_data_that_changed_since_preparation(prepared):
  (prepared / "shard_00001.parquet").unlink()
  parquet.write_shard(prepared / "shard_00002.parquet", texts(9, 20))
  wrong_hash(prepared)
  message = problem(prepared, "prepare the data again", "delete manifest.json")
  assert "shard_00000.parquet: data changed since preparation: its sha256 is" in message
  assert "shard_00001.parquet: data changed since preparation: it is missing" in message
  assert "shard_00002.parquet: data changed since preparation: it has" in message


def test_inspect_hashes_every_file_of_a_large_corpus(prepared, monkeypatch):
  monkeypatch.setattr(corpus, "HASH_LIMIT", 0)
  wrong_hash(prepared)
  assert corpus.load_corpus(prepared)
  (found,) = corpus.inspect(prepared).problems
  assert "shard_00000.parquet" in found.error and "sha256" in found.error


def test_broken_manifest(prepared):
  (prepared / "manifest.json").write_text('{"schema": "mgr_jax.corpus.v1", "files": [{"name": "a"}]}')
  problem(prepared, "manifest.json cannot be used", "prepare the data again")


def test_files_the_manifest_does_not_know_are_a_warning(prepared):
  parquet.write_shard(prepared / "shard_00009.parquet", texts(3, 90))
  (warning,) = corpus.load_corpus(prepared).warnings
  assert "shard_00009.parquet" in warning.error and "not in its manifest" in warning.error


def test_inspect_counts_and_checks_the_tokenizer(prepared):
  result = corpus.inspect(prepared, tokenizer="auto")
  assert result.problems == result.warnings == () and result.corpus == corpus.load_corpus(prepared)
  assert [(c.file, c.role, c.rows, c.usable) for c in result.counts] == [
    ("shard_00000.parquet", "train", 10, 10),
    ("shard_00001.parquet", "test", 10, 10),
    ("shard_00002.parquet", "val", 10, 10),
  ]
  tokenizer.save(tokenizer.train_bpe(["other text"], 270), prepared / "tokenizer.json")
  (found,) = corpus.inspect(prepared, tokenizer="auto").problems
  record = result.corpus.manifest.tokenizer
  assert "265 ids" in found.error and f"{record.vocab_size} ids" in found.error and record.sha256 in found.error
  assert corpus.inspect(prepared, tokenizer="bytes").problems == ()
  (prepared / "tokenizer.json").unlink()
  (found,) = corpus.inspect(prepared, tokenizer="auto").problems
  assert "no tokenizer found" in found.error and "--tokenizer=bytes" in found.fix


# The built-in corpus

DOCUMENTS = [f"def f{i}(x):\n" + f"  return x + {i}\n" * (4 + i % 5) for i in range(120)] + ["short"]


def content(directory):
  return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_builtin_twice_is_identical(tmp_path):
  first = builtin.builtin_corpus(tmp_path / "a", DOCUMENTS, vocab_size=300)
  second = builtin.builtin_corpus(tmp_path / "b", DOCUMENTS, vocab_size=300)
  assert content(first) == content(second) and first.name == second.name
  found = corpus.load_corpus(first)
  assert sorted(documents(found, "train") + documents(found, "val")) == sorted(DOCUMENTS[:-1])
  assert documents(found, "train") != DOCUMENTS[: len(documents(found, "train"))]  # shuffled
  assert len(found.train) == 8 and found.warnings == ()
  assert tokenizer.resolve("auto", first).sha256 == tokenizer.train_bpe(documents(found, "train"), 300).sha256
  assert builtin.builtin_corpus(tmp_path / "a", None) == first  # the finished one is used


def test_torn_builds_are_ignored(tmp_path, monkeypatch):
  directory = builtin.builtin_corpus(tmp_path, DOCUMENTS, vocab_size=300)
  whole = content(directory)
  for name in ("manifest.json", "shard_00003.parquet", "tokenizer.json"):
    (directory / name).unlink()
    assert content(builtin.builtin_corpus(tmp_path, DOCUMENTS, vocab_size=300)) == whole
  shutil.rmtree(directory)
  with monkeypatch.context() as m:

    def killed(*_):
      raise KeyboardInterrupt

    m.setattr(builtin.tokenizer, "train_bpe", killed)
    with pytest.raises(KeyboardInterrupt):
      builtin.builtin_corpus(tmp_path, DOCUMENTS)
  assert list(tmp_path.iterdir()) == []
  assert content(builtin.builtin_corpus(tmp_path, DOCUMENTS, vocab_size=300)) == whole


def test_builds_at_the_same_time_agree(tmp_path):
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    jobs = [pool.submit(builtin.builtin_corpus, tmp_path, DOCUMENTS, 300) for _ in range(4)]
  (directory,) = {job.result() for job in jobs}
  assert list(tmp_path.iterdir()) == [directory]
  assert corpus.load_corpus(directory)


def test_builtin_mistakes(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match=r"cannot build(.|\n)*MGR_BASE_DIR"):
    builtin.builtin_corpus(tmp_path / "file", DOCUMENTS)
  monkeypatch.setattr(builtin.sysconfig, "get_path", lambda _: str(tmp_path / "python311.zip"))
  with pytest.raises(UserError, match=r"python311.zip(.|\n)*train.prepare"):
    builtin.builtin_corpus(tmp_path)


def test_cache_dir(monkeypatch, tmp_path):
  monkeypatch.setenv("MGR_BASE_DIR", str(tmp_path))
  assert builtin.cache_dir() == tmp_path
  monkeypatch.delenv("MGR_BASE_DIR")
  assert builtin.cache_dir().parts[-2:] == (".cache", "mgr_jax")


def test_builtin_of_this_python(tmp_path):
  directory = builtin.builtin_corpus(tmp_path)
  found = corpus.load_corpus(directory)
  tok = tokenizer.resolve("auto", directory)
  assert found.warnings == () and tok.vocab_size == 4096
  characters = sum(map(len, documents(found, "train") + documents(found, "val")))
  assert characters > 4e6
  assert sum(map(len, documents(found, "val"))) > 0.02 * characters
  assert len(found.units("train")) >= 16
  sample = documents(found, "val")[0]
  assert len(sample.encode()) / len(tok.encode(sample)) > 2.5
  assert stream.estimate_tokens(found, tok) > 1e6
