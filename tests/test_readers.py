"""Files of every kind become documents; what cannot be read is explained with a way out."""

import collections
import csv
import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgr_jax.data import readers
from mgr_jax.data.readers import ReadOptions, decoding, json_records
from mgr_jax.problems import UserError

RUSSIAN = "Привет, мир! Это обычное письмо на русском языке.\nСпасибо за внимание."
FRENCH = "Le café est très agréable – à côté de l'hôtel, où l'été dure.\nVoilà une journée entière."
CHINESE = "我们今天去学校学习中文，因为他说这是一个很好的地方。你们可以来。"
JAPANESE = "これは日本語の文章です。今日は天気がいいですね。カタカナもあります。"
KOREAN = "안녕하세요. 오늘은 날씨가 좋습니다. 한국어 문장입니다."


def read(path, **options):
  """(texts, groups, dropped) of one path, checked first as the programs do."""
  options = ReadOptions(**options)
  files, _ = readers.find([str(path)])
  files, problems = readers.check(files, options)
  if problems:
    raise UserError(*problems)
  dropped = collections.Counter()
  documents = list(readers.documents(files, options, dropped))
  return [d.text for d in documents], [d.group for d in documents], dict(dropped)


def texts(path, **options):
  return read(path, **options)[0]


def fails(path, *parts, **options):
  """The message, which must contain all `parts` and a fix."""
  with pytest.raises(UserError) as e:
    read(path, **options)
  message = str(e.value)
  for part in (*parts, "fix: "):
    assert part in message, message
  return message


def write(path, content, encoding="utf-8"):
  data = content if isinstance(content, bytes) else content.encode(encoding)
  if path.suffix == ".gz":
    data = gzip.compress(data)
  path.write_bytes(data)
  return path


def table(rows, delimiter=","):
  out = io.StringIO()
  csv.writer(out, delimiter=delimiter).writerows(rows)
  return out.getvalue()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_kind_yields_the_same_documents(tmp_path, suffix):
  wanted = ["первый\nтекст, с запятой", 'second "quoted"; text', "third"]
  rows = [["id", "text"], *([i, t] for i, t in enumerate(wanted))]
  records = [{"id": i, "text": t} for i, t in enumerate(wanted)]
  contents = {
    ".csv": table(rows),
    ".tsv": table(rows, "\t"),
    ".json": json.dumps(records, indent=1),
    ".jsonl": "\n".join(map(json.dumps, records)) + "\n",
    ".txt": "\n----\n".join(wanted),
    ".md": "\n----\n".join(wanted),
  }
  for kind, content in contents.items():
    path = write(tmp_path / f"a{kind}{suffix}", content)
    found = texts(path, **({"split_on": "^----$"} if kind in (".txt", ".md") else {}))
    assert [t.strip() for t in found] == wanted, kind
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": wanted}), path)
  if suffix:
    path = write(tmp_path / "a.parquet.gz", path.read_bytes())
  assert texts(path) == wanted


def test_folders_are_searched_in_order_without_hidden_files_and_corpus_descriptions(tmp_path):
  for name in ("b.txt", "a.txt", "sub/c.md", ".hidden.txt", ".git/x.txt", "picture.png", "out/d.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  pq.write_table(pa.table({"text": ["shard"]}), corpus / "shard_00000.parquet")
  (corpus / "manifest.json").write_text("{}")
  files, others = readers.find([str(tmp_path), str(tmp_path / "a.txt")], exclude=tmp_path / "out")
  names = [f.path.relative_to(tmp_path).as_posix() for f in files]
  assert names == ["a.txt", "b.txt", "corpus/shard_00000.parquet", "sub/c.md"]
  assert others == {".png": 1}


def test_nothing_readable(tmp_path):
  (tmp_path / "paper.pdf").write_bytes(b"%PDF")
  with pytest.raises(UserError, match=r"no readable input in .*: found 1 \.pdf\n  fix: convert to text.* pdftotext"):
    readers.find([str(tmp_path)])
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match=r"no readable input .*: found no files\n  fix: give .*\.jsonl"):
    readers.find([str(tmp_path / "empty")])


def test_all_unusable_paths_are_named_together(tmp_path):
  for name in ("paper.pdf", "letter.docx", "tool.exe"):
    (tmp_path / name).write_bytes(b"x")
  inputs = [str(tmp_path / n) for n in ("paper.pdf", "letter.docx", "tool.exe", "absent.txt")]
  with pytest.raises(UserError) as e:
    readers.find(inputs)
  assert len(e.value.problems) == 4
  for part in ("convert to text first", "pdftotext", "pandoc", "'.exe' is not supported", "absent.txt does not exist"):
    assert part in str(e.value)


@pytest.mark.parametrize(
  ("split_on", "wanted"),
  [
    ("file", ["one\ntwo\n\n  \nthree ## four\n"]),
    ("line", ["one\n", "two\n", "three ## four\n"]),
    ("blankline", ["one\ntwo\n", "\nthree ## four\n"]),
    (r"\s*##\s*", ["one\ntwo\n\n  \nthree", "four\n"]),
    ("(?=three)", ["one\ntwo\n\n  \n", "three ## four\n"]),
  ],
)
def test_text_files_are_split(tmp_path, split_on, wanted):
  path = write(tmp_path / "a.txt", "one\ntwo\n\n  \nthree ## four\n")
  assert texts(path, split_on=split_on) == wanted


def test_bad_regular_expression(tmp_path):
  fails(write(tmp_path / "a.txt", "x"), "--split_on=( is not a regular expression", "blankline", split_on="(")


@pytest.mark.parametrize(
  ("encoding", "text"),
  [
    ("cp1251", RUSSIAN),
    ("koi8-r", RUSSIAN),
    ("cp866", RUSSIAN),
    ("cp1252", FRENCH),
    ("utf-16", RUSSIAN),
    ("gb18030", CHINESE),
    ("cp932", JAPANESE),
    ("euc-jp", JAPANESE),
    ("euc-kr", KOREAN),
  ],
)
def test_encoding_is_guessed_and_the_guess_reads_the_text(tmp_path, encoding, text):
  path = write(tmp_path / "a.txt", "plain ascii\n" * 3 + text, encoding)
  message = fails(path, f"{path}: byte 0x", "at offset", "is not valid utf-8", f"--encoding={encoding}")
  guess = message.split("--encoding=")[1].split()[0]
  assert texts(path, encodings=(guess,)) == ["plain ascii\n" * 3 + text]


def test_no_encoding_is_guessed_for_damaged_utf8(tmp_path):
  data = RUSSIAN.encode() + b"\xff" + RUSSIAN.encode()
  message = fails(write(tmp_path / "a.txt", data), f"byte 0xff at offset {len(RUSSIAN.encode())}", "--on_bad_bytes")
  assert "--encoding" not in message


def test_bad_byte_is_found_across_block_borders(tmp_path):
  path = tmp_path / "a.txt"
  head = b"a" * (decoding._BLOCK - 1) + "П".encode()
  path.write_bytes(head + b"\xff")
  assert decoding.first_bad_byte(path, "utf-8") == (len(head), 0xFF)
  path.write_bytes(head[:-1])  # a character cut off by the end of the file
  assert decoding.first_bad_byte(path, "utf-8") == (decoding._BLOCK - 1, 0xD0)
  path.write_bytes(head)
  assert decoding.first_bad_byte(path, "utf-8") is None


def test_each_file_takes_the_first_encoding_that_fits(tmp_path):
  write(tmp_path / "a.txt", RUSSIAN, "cp1251")
  write(tmp_path / "b.txt", RUSSIAN, "utf-8")
  write(tmp_path / "c.txt", RUSSIAN, "utf-8-sig")
  assert texts(tmp_path, encodings=("utf-8", "cp1251")) == [RUSSIAN] * 3
  assert texts(tmp_path, encodings=("cp1251",)) != [RUSSIAN] * 3  # one encoding for all would garble two of them


@pytest.mark.parametrize(
  ("policy", "wanted", "dropped"),
  [("replace", ["good\n", "b\ufffdd\n", "end"], {}), ("skip", ["good\n", "end"], {"bad bytes": 1})],
)
def test_bad_bytes_are_replaced_or_their_documents_skipped(tmp_path, policy, wanted, dropped):
  path = write(tmp_path / "a.txt", b"good\nb\xffd\nend")
  assert read(path, split_on="line", on_bad_bytes=policy) == (wanted, [""] * len(wanted), dropped)


def test_half_surrogate_pairs_count_as_bad_bytes(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
  fails(path, "half a surrogate pair", "--on_bad_bytes=replace")
  assert texts(path, on_bad_bytes="replace") == ["cut \ufffd", "whole 😀"]
  assert texts(path, on_bad_bytes="skip") == ["whole 😀"]


def test_parquet_strings_that_are_not_utf8(tmp_path):
  path = tmp_path / "a.parquet"
  raw = pa.array([b"good", b"b\xffd"], pa.binary())
  column = pa.Array.from_buffers(pa.string(), 2, raw.buffers())  # as a careless writer would
  pq.write_table(pa.table({"text": column}), path)
  fails(path, "byte 0xff at offset 1", "--on_bad_bytes")
  assert texts(path, on_bad_bytes="replace") == ["good", "b\ufffdd"]
  assert texts(path, on_bad_bytes="skip") == ["good"]


def test_parquet_pages_that_are_damaged(tmp_path):
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": [f"{i} some text" for i in range(1000)]}), path, use_dictionary=False)
  data = bytearray(path.read_bytes())
  data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
  path.write_bytes(data)
  fails(path, "is truncated or not parquet")


def test_unknown_encoding(tmp_path):
  fails(write(tmp_path / "a.txt", "x"), "--encoding=klingon", "cp1251", encodings=("klingon",))
  fails(write(tmp_path / "a.txt", "x"), "--encoding=base64", encodings=("base64",))


def test_damaged_gzip_and_damaged_parquet_do_not_hide_each_other(tmp_path):
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
  (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
  (tmp_path / "c.parquet").write_bytes(b"PAR1 cut")
  message = fails(tmp_path, "a.txt.gz: damaged gzip", "b.jsonl.gz: damaged gzip", "c.parquet (8 bytes) is truncated")
  assert message.count("error: ") == 3
  (tmp_path / "d").mkdir()
  cut = write(tmp_path / "d" / "a.txt.gz", b"")
  cut.write_bytes(gzip.compress(b"text " * 1000)[:-20])
  fails(cut, "damaged gzip", on_bad_bytes="replace")  # found while reading, as nothing is read before


def test_missing_columns_are_listed_per_file(tmp_path):
  write(tmp_path / "a.csv", table([["id", "body"], [1, "x"]]))
  write(tmp_path / "b.jsonl", json.dumps({"id": 1, "message": {"de": "kurz", "en": "a longer text"}}))
  pq.write_table(pa.table({"n": [1], "content": ["x"]}), tmp_path / "c.parquet")
  pq.write_table(pa.table({"text": [1, 2], "other": ["x", "y"]}), tmp_path / "d.parquet")
  message = fails(tmp_path, "a.csv: no column 'text'; its columns: 'id', 'body'", "--text_column=body")
  assert "b.jsonl, line 1: no key 'text' in an object with the keys 'id', 'message'" in message
  assert "--json_path=message.en" in message
  assert "c.parquet: no column 'text'; its columns: 'n', 'content'" in message and "--text_column=content" in message
  assert "d.parquet: column 'text' is int64, not text: 1, 2" in message and "--text_column=other" in message
  (tmp_path / "b.jsonl").unlink()
  (tmp_path / "d.parquet").unlink()
  assert texts(tmp_path, text_columns=("body", "content")) == ["x", "x"]


def test_malformed_rows_are_counted_and_shown(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "tw\n\n{"other": 1}\n{"text": 5}\n{"text": null}\n')
  message = fails(path, "3 malformed rows, --skip_bad_rows=0 allowed", "--skip_bad_rows=3")
  for part in (
    "line 2: malformed JSON",
    '\'{"text": "tw\'',
    "line 4: no key 'text'",
    "line 5: no text but the int '5'",
  ):
    assert part in message
  fails(path, "--skip_bad_rows=2 allowed", skip_bad_rows=2)
  assert read(path, skip_bad_rows=3) == (["one", ""], ["", ""], {"malformed row": 3})


def test_malformed_tables(tmp_path):
  path = write(tmp_path / "a.csv", 'id,text\n1,one\n2,two,too many\n3,"bad" quote\n4,four\n')
  message = fails(
    path, "2 malformed rows", "line 3: 3 fields, the header has 2: '2,two,too many'", "line 4: malformed csv"
  )
  assert "--skip_bad_rows=2" in message
  assert texts(path, skip_bad_rows=2) == ["one", "four"]
  fails(write(tmp_path / "b.csv", 'text\n"never closed\nrest\n'), "1 malformed row", "unexpected end of data")
  fails(write(tmp_path / "c.csv", "\ntext\none\n"), "its first line holds no column names")


def test_empty_files_hold_no_documents(tmp_path):
  for name in ("a.csv", "b.jsonl", "c.json"):
    write(tmp_path / name, "")
  write(tmp_path / "d.json", "[ ]")
  assert texts(tmp_path) == []


def test_column_names_may_hold_line_breaks(tmp_path):
  assert texts(write(tmp_path / "a.csv", table([["date\nof issue", "text"], ["1", "one"]]))) == ["one"]


def test_reading_stops_when_nearly_all_rows_are_malformed(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"text": "one"}\n' + "nonsense\n" * 5000)
  assert "1001 malformed rows" in fails(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_the_one_that_gives_the_column(tmp_path, delimiter):
  path = write(tmp_path / "a.csv", table([["id", "text"], [1, "a,b;c|d\te"]], delimiter))
  assert texts(path) == ["a,b;c|d\te"]


def test_malformed_json_names_line_and_text(tmp_path):
  path = write(tmp_path / "a.json", '[\n {"text": "one"},\n {"text": two}\n]')
  fails(path, f"{path}, line 3: malformed JSON", "two", "--skip_bad_rows=N")
  fails(write(tmp_path / "b.json", '[{"text": "one"}'), "the list is not closed")
  fails(write(tmp_path / "c.json", '[{"text": "one"}] tail'), "more text after the list")
  fails(write(tmp_path / "e.json", "[" * 100_000), "malformed JSON")


def test_json_paths(tmp_path):
  chats = [{"m": [{"body": "a"}, {"body": "b"}]}, {"m": []}, {"m": [{"body": "c"}]}]
  path = write(tmp_path / "a.json", json.dumps(chats))
  assert texts(path, json_path="m.*.body") == ["a", "b", "c"]
  fails(path, "line 1: no 'n' in an object with the keys 'm'", json_path="n")
  assert texts(write(tmp_path / "b.json", json.dumps({"x": {"y": "z"}})), json_path="x.*") == ["z"]
  assert texts(write(tmp_path / "c.json", json.dumps(["just", "texts"]))) == ["just", "texts"]


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_json_records_do_not_depend_on_block_size(monkeypatch, block):
  monkeypatch.setattr(json_records, "_BLOCK", block)
  values = [{"text": 'кот \\ " \n 😀', "n": [1, -2.5e3]}, 12345, "s", None, True, [], {}]
  listed = json.dumps(values, indent=1)
  assert [v for _, v in json_records.records(io.StringIO(listed))] == values
  in_sequence = "\n".join(map(json.dumps, values))
  assert list(json_records.records(io.StringIO(in_sequence))) == list(enumerate(values, 1))
  for cut in range(1, len(listed)):
    with pytest.raises(json_records.Malformed):
      list(json_records.records(io.StringIO(listed[:cut])))


def test_a_long_json_list_is_read_in_constant_memory(tmp_path):
  path = write(tmp_path / "a.json", json.dumps([{"text": "x" * 1000}] * 5000))
  files, _ = readers.find([str(path)])
  tracemalloc.start()
  assert sum(1 for _ in readers.documents(files, ReadOptions(), collections.Counter())) == 5000
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < path.stat().st_size / 5
  tracemalloc.start()
  json.loads(path.read_text())
  whole = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert whole > path.stat().st_size  # the measure sees a file that is held in memory


def test_groups(tmp_path):
  write(tmp_path / "a.csv", table([["author", "text"], ["ann", "1"], ["bob", "2"]]))
  write(tmp_path / "b.jsonl", '{"author": "ann", "text": "3"}\n')
  pq.write_table(pa.table({"text": ["4"], "author": ["bob"]}), tmp_path / "c.parquet")
  write(tmp_path / "d.txt", "5")
  own = str(tmp_path / "d.txt")
  assert read(tmp_path, group_by="author")[1] == ["author=ann", "author=bob", "author=ann", "author=bob", own]
  assert len(set(read(tmp_path, group_by="file")[1])) == 4
  fails(tmp_path / "a.csv", "no column 'thread' to group by; its columns: 'author', 'text'", group_by="thread")
  fails(tmp_path / "b.jsonl", "no 'thread'", "to group by", group_by="thread")
