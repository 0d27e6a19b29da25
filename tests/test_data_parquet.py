"""Shards: written whole or not at all, every text type accepted, random access equal to reading in sequence."""

import concurrent.futures
import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgr_jax.data import parquet
from mgr_jax.problems import UserError

TEXTS = [f"document {i}: " + "абв\n漢字 \x00" * (i % 7) for i in range(50)]


@pytest.fixture
def shards(tmp_path):
  """Five files of ten documents in row groups of four, four and two."""
  for i in range(5):
    parquet.write_shard(tmp_path / f"shard_{i}.parquet", TEXTS[10 * i : 10 * i + 10], rows_per_group=4)
  return sorted(tmp_path.iterdir())


def test_shard_round_trip_and_what_is_reported(tmp_path):
  file = tmp_path / "a.parquet"
  info = parquet.write_shard(file, iter(TEXTS), rows_per_group=16, column="body")
  assert list(parquet.iter_texts(file, "body")) == TEXTS
  assert info == ("a.parquet", 50, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
  assert parquet.read_footer(file).group_rows == (16, 16, 16, 2)
  assert list(tmp_path.iterdir()) == [file]


def test_a_shard_without_documents_is_a_valid_file(tmp_path):
  assert parquet.write_shard(tmp_path / "a.parquet", []).rows == 0
  assert list(parquet.iter_texts(tmp_path / "a.parquet")) == []
  assert len(parquet.ParquetUnits([tmp_path / "a.parquet"])) == 0


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
  file = tmp_path / "a.parquet"
  parquet.write_shard(file, ["old"])

  def texts():
    yield from TEXTS
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    parquet.write_shard(file, texts(), rows_per_group=4)
  assert list(parquet.iter_texts(file)) == ["old"]
  assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
  "type_",
  [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
  ids=["string", "large_string", "string_view", "dictionary"],
)
def test_text_types_and_dropped_rows(tmp_path, type_):
  column = pa.array(["a", None, "", "b", "a", None], pa.string()).cast(type_)
  pq.write_table(pa.table({"n": range(6), "text": column}), tmp_path / "a.parquet")
  assert parquet.is_text(parquet.read_footer(tmp_path / "a.parquet").types["text"])
  assert list(parquet.iter_texts(tmp_path / "a.parquet")) == ["a", "b", "a"]
  units = parquet.ParquetUnits([tmp_path / "a.parquet"], rows_per_unit=4)
  assert [units[0], units[1], units[0]] == [["a", "b"], ["a"], ["a", "b"]]
  assert units.dropped == 3


@pytest.mark.parametrize("type_", [pa.int64(), pa.binary(), pa.list_(pa.string())], ids=str)
def test_other_types_are_not_text(type_):
  assert not parquet.is_text(type_)


def test_units_hold_every_document_once_in_order(shards):
  units = parquet.ParquetUnits(shards, rows_per_unit=3)
  assert [text for i in range(len(units)) for text in units[i]] == TEXTS
  assert len(units) == 5 * (2 + 2 + 1)  # no unit spans two row groups
  assert units.rows.tolist() == [3, 1, 3, 1, 2] * 5
  assert units.group_of.tolist() == [g for f in range(0, 15, 3) for g in (f, f, f + 1, f + 1, f + 2)]


def test_units_keep_only_what_is_asked_for(shards):
  units = parquet.ParquetUnits(shards, keep=lambda text: text.startswith("document 1"))
  assert [t for i in range(len(units)) for t in units[i]] == [t for t in TEXTS if t.startswith("document 1")]
  assert units.dropped == 0


def test_threads_read_the_same(shards):
  units = parquet.ParquetUnits(shards, rows_per_unit=2)
  wanted = [i * 7 % len(units) for i in range(200)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(units.__getitem__, wanted))
  assert found == [parquet.ParquetUnits(shards, rows_per_unit=2)[i] for i in wanted]


def test_two_decoded_groups_are_kept(shards, monkeypatch):
  reads = []
  read_group = parquet._read_group
  monkeypatch.setattr(parquet, "_read_group", lambda *a: (reads.append(a[:2]), read_group(*a))[1])
  units = parquet.ParquetUnits(shards, rows_per_unit=1)
  for i in (0, 4, 1, 5, 2, 6, 3, 7):  # two groups in turn
    units[i]
  assert len(reads) == 2
  reads.clear()
  for i in (8, 0, 4, 8, 0, 4):  # three in turn do not fit
    units[i]
  assert len(reads) == 6


def test_a_changed_file_is_read_again(tmp_path):
  file = tmp_path / "a.parquet"
  parquet.write_shard(file, ["a"])
  assert parquet.read_footer(file).rows == 1
  parquet.write_shard(file, ["a", "b"])
  assert parquet.read_footer(file).rows == 2


def test_footer_hash_follows_the_content(tmp_path):
  for name, texts in (("a", TEXTS), ("b", TEXTS), ("c", TEXTS[1:])):
    parquet.write_shard(tmp_path / name, texts)
  a, b, c = (parquet.footer_sha256(tmp_path / name) for name in "abc")
  assert a == b != c


def test_a_corrupt_page_names_file_and_row_group(shards):
  file = shards[2]
  data = bytearray(file.read_bytes())
  data[10:120] = bytes(110)
  file.write_bytes(data)
  units = parquet.ParquetUnits(shards, rows_per_unit=1024)
  assert units[0] == TEXTS[:4]
  with pytest.raises(UserError, match=r"shard_2.parquet: row group 0 .*\n  fix: .*corrupt"):
    units[6]


def test_bytes_that_are_not_utf8_are_reported(tmp_path):
  array = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
  pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
  with pytest.raises(UserError, match=r"UTF-?8"):
    list(parquet.iter_texts(tmp_path / "a.parquet"))
