"""Public corpora that are already parquet shards, fetched from the Hugging Face hub and verified."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from mgr_jax.data import files, manifest, parquet, tokenizer, vocabulary
from mgr_jax.data.vocabulary import Vocabulary, VocabularyOptions
from mgr_jax.problems import Problem, UserError, raise_if_any

_MAGIC = b"PAR1"


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set on the hub whose shards are numbered from 0 and already shuffled; `licence` is the attribution to show
  and keep."""

  repo: str
  shards: int
  licence: str
  pattern: str = "shard_{:05d}.parquet"


SOURCES = {
  "fineweb-edu": Source(
    repo="karpathy/fineweb-edu-100b-shuffle",
    shards=1823,
    licence=(
      "Contains information from FineWeb-Edu by Hugging Face (Penedo et al., 2024, arXiv 2406.17557), which is made"
      " available under the Open Data Commons Attribution License (ODC-By) v1.0,"
      " https://opendatacommons.org/licenses/by/1-0/. Use is also subject to the Common Crawl terms of use."
      " This copy: a shuffled sample of 100 billion tokens, karpathy/fineweb-edu-100b-shuffle."
    ),
  )
}


def check(name: str, shards: int) -> list[Problem]:
  """What is wrong with the request."""
  if name not in SOURCES:
    return [Problem(f"--download={name} is not known", f"use --download={' or --download='.join(SOURCES)}")]
  total = SOURCES[name].shards
  if not 2 <= shards <= total:
    error = (
      f"--shards={shards}: {name} has {total} shards, of which the last is for validation and at least one for training"
    )
    return [Problem(error, f"use --shards=2 (about 0.2 GB) to --shards={total}")]
  return []


def download(
  name: str,
  out: str | os.PathLike,
  shards: int,
  vocabulary_options: VocabularyOptions,
  endpoint: str | None = None,
  on_progress: Callable[[str, int], None] = lambda stage, done: None,
) -> tuple[manifest.Manifest, Vocabulary]:
  """Fetches `shards` shards of `name` into `out`, verifies each, prepares a tokenizer and writes the manifest last.

  The training shards are the first ones; the validation shard is always the very last of the source, so that runs on
  more or fewer shards are measured on the same documents. Within a run a lost connection goes on inside the shard, by
  range requests; a new run verifies the shards that are complete and fetches the others. Each shard must have the size
  and, where the hub names it, the sha256 that the hub announces, parquet's magic number at both ends, and a column of
  text. Raises `UserError`.
  """
  out = Path(out).expanduser().absolute()
  raise_if_any(check(name, shards) + _check_target(name, out) + vocabulary.check(vocabulary_options))
  source = SOURCES[name]
  names = [source.pattern.format(i) for i in (*range(shards - 1), source.shards - 1)]
  first = _metadata(source.repo, names[0], endpoint, revision=None)
  commit = first.commit_hash  # all shards come from one version, also when the source changes meanwhile
  announced = [first, *(_metadata(source.repo, n, endpoint, commit) for n in names[1:])]
  records = []
  for number, (file, expected) in enumerate(zip(names, announced, strict=True)):
    on_progress("shards", number)
    path = _fetch(source.repo, file, endpoint, commit, out)
    digest = _verify(path, expected.size, expected.etag)
    role = "val" if number == len(names) - 1 else "train"
    records.append(manifest.FileRecord(file, role, parquet.read_footer(path).rows, path.stat().st_size, digest))
  on_progress("tokenizer", 0)
  (out / manifest.FILE_NAME).unlink(missing_ok=True)  # one of fewer shards would not fit the new tokenizer
  paths = [out / file for file in names]
  vocab = vocabulary.provide(out, paths[:-1], paths[-1:], vocabulary_options)
  result = manifest.Manifest(
    tuple(records), tokenizer=vocab.record, source=f"{source.repo} at commit {commit}", licence=source.licence
  )
  manifest.write_manifest(out, result)
  return result, vocab


def _check_target(name: str, out: Path) -> list[Problem]:
  """A directory may hold shards of the same source, listed in a manifest or not yet, and nothing else."""
  if name not in SOURCES or not out.exists():
    return []
  if not out.is_dir():
    return [Problem(f"--out={out} is a file", "use the path of a directory that does not exist")]
  source = SOURCES[name]
  recorded = manifest.read_manifest(out)
  shards = {source.pattern.format(i) for i in range(source.shards)}
  foreign = sorted({p.name for p in out.iterdir()} - shards - {manifest.FILE_NAME, tokenizer.FILE_NAME, ".cache"})
  if foreign or (recorded is not None and not recorded.source.startswith(source.repo)):
    held = ", ".join(foreign[:3]) or f"a corpus from {recorded.source or 'elsewhere'}"
    return [Problem(f"--out={out} exists and holds {held}", "use another --out")]
  return []


def _metadata(repo: str, file: str, endpoint: str | None, revision: str | None):
  """Size, entity tag and commit of a file, as the hub announces them."""
  import huggingface_hub  # slow to import, and needed for downloads only

  url = huggingface_hub.hf_hub_url(repo, file, repo_type="dataset", revision=revision, endpoint=endpoint)
  try:
    return huggingface_hub.get_hf_file_metadata(url, endpoint=endpoint)
  except Exception as e:  # whatever fails between here and the hub, the ways out are the same
    raise UserError(_unreachable(repo, file, endpoint, e)) from e


def _fetch(repo: str, file: str, endpoint: str | None, commit: str, out: Path) -> Path:
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.hf_hub_download(
        repo, file, repo_type="dataset", revision=commit, endpoint=endpoint, local_dir=out
      )
    )
  except Exception as e:
    raise UserError(_unreachable(repo, file, endpoint, e)) from e


def _verify(path: Path, size: int | None, etag: str | None) -> str:
  """The sha256 of a file that is what it should be; any other file is deleted, so that the next start fetches it
  again."""
  digest = files.sha256_file(path)
  actual = path.stat().st_size
  with path.open("rb") as f:
    head = f.read(4)
    f.seek(max(0, actual - 4))
    ends = (head, f.read(4))
  wrong = None
  if size is not None and actual != size:
    wrong = f"it has {actual} bytes, not {size}"
  elif etag and re.fullmatch("[0-9a-f]{64}", etag) and digest != etag:
    wrong = f"its sha256 is {digest}, not {etag}"
  elif ends != (_MAGIC, _MAGIC):
    wrong = f"it is no parquet file (starts with {ends[0]!r}, ends with {ends[1]!r})"
  else:
    try:
      types = parquet.read_footer(path).types
      if "text" not in types or not parquet.is_text(types["text"]):
        wrong = f"it has no text column named 'text', but {', '.join(types)}"
    except (OSError, pa.ArrowException) as e:
      wrong = f"it is no readable parquet file: {e}"
  if wrong is not None:
    path.unlink()
    raise UserError(
      Problem(
        f"{path} was refused and deleted: {wrong}", "run the same command again, which fetches only what is missing"
      )
    )
  return digest


def _unreachable(repo: str, file: str, endpoint: str | None, e: Exception) -> Problem:
  first_line = next(iter(str(e).splitlines()), "")[:300]
  return Problem(
    f"{file} of {repo} could not be fetched{f' from {endpoint}' if endpoint else ''}: {type(e).__name__}: {first_line}",
    "check the network and run the same command again, which fetches only what is missing; or name a mirror with"
    " --hf_endpoint; or use --data=builtin, which needs no network",
  )
