"""JSON (one list, one value, or values in sequence) and JSON Lines: a record holds its text under a key or a path."""

import json
from collections.abc import Iterator
from typing import Any

from mgr_jax.data.readers import decoding, json_records
from mgr_jax.data.readers.common import BadRows, Document, ReadOptions, column_fix, pick, wanted
from mgr_jax.data.readers.inputs import InputFile
from mgr_jax.problems import Problem, UserError


def read(file: InputFile, options: ReadOptions, bad: BadRows) -> Iterator[Document]:
  """A `.json` file that is malformed is a `UserError`, since what follows the fault has no certain borders."""
  with decoding.open_text(file.path, file.encoding, options.on_bad_bytes) as stream:
    try:
      for line, record in json_records.records(stream):
        yield from _documents(file, line, record, options, bad)
    except json_records.Malformed as e:
      raise UserError(_malformed(file, e)) from e


def read_lines(file: InputFile, options: ReadOptions, bad: BadRows) -> Iterator[Document]:
  with decoding.open_text(file.path, file.encoding, options.on_bad_bytes) as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except (ValueError, RecursionError) as e:
        bad.add(file, number, f"malformed JSON ({e})", line)
        continue
      yield from _documents(file, number, record, options, bad)


def check(file: InputFile, options: ReadOptions) -> list[Problem]:
  """Looks at the first record. A malformed JSON line is left to `read_lines`, where it may be allowed for."""
  with decoding.open_text(file.path, file.encoding, options.on_bad_bytes) as stream:
    try:
      first = next(json_records.records(stream), None)
    except json_records.Malformed as e:
      return [_malformed(file, e)] if file.kind == ".json" else []
  if first is None:
    return []
  line, record = first
  problems = []
  try:
    _texts(record, options)
  except KeyError as e:
    problems.append(Problem(f"{file}, line {line}: {e.args[0]}", column_fix(dict(json_records.text_paths(record)))))
  try:
    json_records.at_path(record, options.group_key or "")
  except KeyError as e:
    problems.append(
      Problem(f"{file}, line {line}: {e.args[0]} to group by", "use --group_by=file or one of these keys")
    )
  return problems


def _documents(file: InputFile, line: int, record: Any, options: ReadOptions, bad: BadRows) -> Iterator[Document]:
  group = options.file_group(file)
  try:
    texts = _texts(record, options)
    if options.group_key is not None:
      group = f"{options.group_key}=" + " ".join(map(str, json_records.at_path(record, options.group_key)))
  except KeyError as e:
    bad.add(file, line, e.args[0], _excerpt(record))
    return
  for text in texts:
    if isinstance(text, str) or text is None:
      yield Document(text or "", group)
    else:
      bad.add(file, line, "no text but " + json_records.described(text), _excerpt(record))


def _texts(record: Any, options: ReadOptions) -> list[Any]:
  """The values that should be texts; raises `KeyError` with a message when they are absent."""
  if options.json_path:
    return json_records.at_path(record, options.json_path)
  if isinstance(record, str):
    return [record]
  name = pick(record, options.text_columns) if isinstance(record, dict) else None
  if name is None:
    raise KeyError(f"no key {wanted(options)} in {json_records.described(record)}")
  return [record[name]]


def _excerpt(record: Any) -> str:
  return json.dumps(record, ensure_ascii=False)[:80]


def _malformed(file: InputFile, e: json_records.Malformed) -> Problem:
  return Problem(
    f"{file}, line {e.line}: malformed JSON: {e.why}: {e.excerpt!r}",
    "correct the file; or put one record on each line of a .jsonl file, where --skip_bad_rows=N leaves out bad ones",
  )
