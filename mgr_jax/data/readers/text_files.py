"""Plain text and Markdown: a file is one document, or several with separators between them."""

import re
from collections.abc import Iterable, Iterator

from mgr_jax.data.readers import decoding
from mgr_jax.data.readers.common import BadRows, Document, ReadOptions
from mgr_jax.data.readers.inputs import InputFile


def read(file: InputFile, options: ReadOptions, bad: BadRows) -> Iterator[Document]:
  group = options.file_group(file)
  with decoding.open_text(file.path, file.encoding, options.on_bad_bytes) as lines:
    if options.split_on == "file":
      yield Document(lines.read(), group)
    elif options.split_on == "line":
      yield from (Document(line, group) for line in lines if line.strip())
    else:
      separator = re.compile(r"^\s*$" if options.split_on == "blankline" else options.split_on)
      yield from (Document(text, group) for text in split(lines, separator))


def split(lines: Iterable[str], separator: re.Pattern[str]) -> Iterator[str]:
  """The texts between matches of `separator`, which is looked for in each line by itself. Runs of separators count as
  one."""
  parts: list[str] = []
  for line in lines:
    at = 0
    for match in separator.finditer(line.rstrip("\n")):
      parts.append(line[at : match.start()])
      if (text := "".join(parts)).strip():
        yield text
      parts, at = [], match.end()
    parts.append(line[at:])
  if (text := "".join(parts)).strip():
    yield text
