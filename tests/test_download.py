"""Shards fetched from a hub on this machine: verified, resumed, refused when they are not what was announced."""

import hashlib
import http.server
import random
import re
import threading

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgr_jax.data import corpus, download, files, manifest, tokenizer
from mgr_jax.data.vocabulary import VocabularyOptions
from mgr_jax.problems import UserError
from train import cli, prepare

COMMIT = "c" * 40
REPO = download.SOURCES["fineweb-edu"].repo
BYTES = VocabularyOptions(tokenizer="bytes")


def shard(seed, column="text", rows=200):
  rng = random.Random(seed)
  texts = [f"{seed} {i} " + "".join(rng.choices("abcdefgh ", k=300)) for i in range(rows)]
  sink = pa.BufferOutputStream()
  pq.write_table(pa.table({column: texts}), sink)
  return sink.getvalue().to_pybytes()


class Hub(http.server.ThreadingHTTPServer):
  """What a client of the hub needs: HEAD with size, hash and commit, GET with ranges; faults on request."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.files = {f"shard_{i:05d}.parquet": shard(i) for i in (0, 1, 2, 1822)}
    self.announced = {}  # file -> headers that replace the true ones
    self.break_after = {}  # file -> bytes after which the connection is lost, once
    self.requests = []  # (method, file, Range header)

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}"

  def gets(self, file=None):
    return [r[1:] for r in self.requests if r[0] == "GET" and file in (None, r[1])]


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self._answer(body=False)

  def do_GET(self):
    self._answer(body=True)

  def _answer(self, body):
    file = self.path.split("/")[-1]
    self.server.requests.append((self.command, file, self.headers.get("Range")))
    data = self.server.files.get(file)
    if not self.path.startswith(f"/datasets/{REPO}/resolve/") or data is None:
      self.send_response(404)
      self.send_header("X-Error-Code", "EntryNotFound")
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-").group(1))
    self.send_response(206 if start else 200)
    headers = {
      "Content-Length": str(len(data) - start),
      "X-Repo-Commit": COMMIT,
      "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
      "Accept-Ranges": "bytes",
    }
    if start:
      headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    for name, value in (headers | self.server.announced.get(file, {})).items():
      self.send_header(name, value)
    self.end_headers()
    if body:
      end = self.server.break_after.pop(file, len(data))
      self.wfile.write(data[start:end])
      if end < len(data):
        self.close_connection = True


@pytest.fixture
def hub(monkeypatch, tmp_path):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
  server = Hub()
  thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  yield server
  server.shutdown()
  server.server_close()


def fetch(hub, out, shards=3, options=BYTES):
  return download.download("fineweb-edu", out, shards, options, endpoint=hub.url)


def test_download_by_command_makes_a_corpus(hub, tmp_path, capsys):
  out = tmp_path / "fineweb"
  args = ["--download=fineweb-edu", "--shards=3", f"--out={out}", f"--hf_endpoint={hub.url}", "--vocab_size=400"]
  assert cli.execute(prepare.main, ["train.prepare", *args], prepare.FLAGS) == 0
  printed = capsys.readouterr().out
  assert "Open Data Commons Attribution License (ODC-By)" in " ".join(printed.split()) and "FineWeb-Edu" in printed
  assert printed.endswith(f"next: python -m train.main --data={out}\n")
  recorded = manifest.read_manifest(out)
  assert "ODC-By" in recorded.licence and recorded.source == f"{REPO} at commit {COMMIT}"
  for record, role in zip(recorded.files, ["train", "train", "val"], strict=True):
    data = hub.files[record.file]
    assert (out / record.file).read_bytes() == data
    assert record == manifest.FileRecord(record.file, role, 200, len(data), hashlib.sha256(data).hexdigest())
  assert [r.file for r in recorded.files] == ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
  assert tokenizer.resolve("auto", out).vocab_size == 400
  assert corpus.inspect(out, tokenizer="auto").problems == ()


def test_a_lost_connection_goes_on_where_it_broke(hub, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is received is kept in such steps
  hub.break_after["shard_00000.parquet"] = 10_000
  fetch(hub, tmp_path / "out", shards=2)
  assert hub.gets("shard_00000.parquet") == [("shard_00000.parquet", None), ("shard_00000.parquet", "bytes=8192-")]
  assert hub.gets("shard_01822.parquet") == [("shard_01822.parquet", None)]
  assert (tmp_path / "out" / "shard_00000.parquet").read_bytes() == hub.files["shard_00000.parquet"]


def test_a_second_start_fetches_only_what_is_missing(hub, tmp_path):
  out = tmp_path / "out"
  missing = hub.files.pop("shard_00002.parquet")
  with pytest.raises(UserError, match=r"shard_00002.parquet of .* could not be fetched"):
    fetch(hub, out, shards=4)
  assert not (out / "manifest.json").exists()
  fetch(hub, out, shards=3)
  before = len(hub.gets())
  assert before == 3
  hub.files["shard_00002.parquet"] = missing
  result, _ = fetch(hub, out, shards=4)
  assert hub.gets()[before:] == [("shard_00002.parquet", None)]
  assert [f.role for f in result.files] == ["train"] * 3 + ["val"]  # the same validation shard as before
  assert corpus.inspect(out, tokenizer="auto").problems == ()


def test_a_shard_damaged_since_is_refused_then_fetched_again(hub, tmp_path):
  out = tmp_path / "out"
  fetch(hub, out, shards=2)
  path = out / "shard_00000.parquet"
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match="refused and deleted: its sha256 is"):
    fetch(hub, out, shards=2)
  assert not path.exists()
  fetch(hub, out, shards=2)
  assert path.read_bytes() == hub.files[path.name]


@pytest.mark.parametrize(
  ("content", "announced", "part"),
  [
    (shard(0), {"ETag": f'"{"a" * 64}"'}, "its sha256 is .*, not aaaa"),
    (b"<html>quota exceeded</html>" * 9, {}, "it is no parquet file .starts with b'<htm'"),
    (shard(0)[:-500], {}, "it is no parquet file"),
    (b"PAR1" + b"\0" * 500 + b"PAR1", {}, "it is no readable parquet file"),
    (shard(0, column="body"), {}, "it has no text column named 'text', but body"),
  ],
)
def test_what_is_not_the_announced_shard_is_refused(hub, tmp_path, content, announced, part):
  hub.files["shard_00000.parquet"] = content
  hub.announced["shard_00000.parquet"] = announced
  with pytest.raises(UserError, match=part) as e:
    fetch(hub, tmp_path / "out", shards=2)
  assert "fix: run the same command again" in str(e.value)
  assert list((tmp_path / "out").glob("*.parquet")) == [] and not (tmp_path / "out" / "manifest.json").exists()


def test_a_shard_of_the_wrong_size_is_refused(hub, tmp_path):
  out = tmp_path / "out"
  fetch(hub, out, shards=2)
  size = len(hub.files["shard_00000.parquet"])
  with pytest.raises(UserError, match=f"it has {size} bytes, not {size + 1}"):
    download._verify(out / "shard_00000.parquet", size + 1, None)


def test_no_network(tmp_path, capsys):
  out = tmp_path / "out"
  args = ["--download=fineweb-edu", "--shards=2", f"--out={out}", "--hf_endpoint=http://127.0.0.1:9"]
  assert cli.execute(prepare.main, ["train.prepare", *args], prepare.FLAGS) == 2
  err = capsys.readouterr().err
  assert "error: shard_00000.parquet of" in err and "could not be fetched from http://127.0.0.1:9" in err
  assert "fix: check the network" in err and "--data=builtin" in err and "Traceback" not in err
  assert not out.exists()


def test_requests_that_cannot_work(hub, tmp_path):
  with pytest.raises(UserError, match="--download=fineweb is not known\n  fix: use --download=fineweb-edu"):
    download.download("fineweb", tmp_path / "out", 2, BYTES)
  for shards in (1, 1824):
    with pytest.raises(UserError, match=f"--shards={shards}: fineweb-edu has 1823 shards"):
      fetch(hub, tmp_path / "out", shards=shards)
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "thesis.odt").write_text("x")
  with pytest.raises(UserError, match=r"other exists and holds thesis.odt"):
    fetch(hub, tmp_path / "other")
  mine = manifest.Manifest((manifest.FileRecord("shard_00000.parquet", "train", 1, 1, ""),), source="train.prepare: x")
  (tmp_path / "mine").mkdir()
  manifest.write_manifest(tmp_path / "mine", mine)
  with pytest.raises(UserError, match=r"mine exists and holds a corpus from train.prepare"):
    fetch(hub, tmp_path / "mine")
  with pytest.raises(UserError, match="--vocab_size=10 is below the 265 ids"):
    fetch(hub, tmp_path / "out", options=VocabularyOptions(vocab_size=10))
  assert hub.requests == []


def test_the_library_alone_does_not_notice_a_wrong_hash(hub, tmp_path):
  """Why shards are verified here: the client compares sizes, not contents."""
  hub.announced["shard_00000.parquet"] = {"ETag": f'"{"a" * 64}"'}
  huggingface_hub.hf_hub_download(
    REPO, "shard_00000.parquet", repo_type="dataset", endpoint=hub.url, local_dir=tmp_path
  )
  assert files.sha256_file(tmp_path / "shard_00000.parquet") != "a" * 64
