"""Fills the pages of docs/: prose is written by hand, tables and pictures come from the code and from measurements.

  python -m demos run-all --plots=plots --export_json=claims.json
  python -m demos.pages --results=claims.json

Between `<!-- options -->` and `<!-- /options -->` stands what `BLOCKS["options"]` returns, and so on for every block.
"""

import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
from collections.abc import Mapping, Sequence

from absl import flags

from demos import demo as demo_lib
from demos.demo import Demo
from mgr_jax import optim, schedules
from mgr_jax.claims import number_text
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from mgr_jax.problems import Problem, UserError
from train import cli
from train.flags import FIELDS

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
FLAGS = flags.FlagValues()
flags.DEFINE_string("results", "claims.json", "What run-all wrote with --export_json.", flag_values=FLAGS)
flags.DEFINE_string("docs", str(DOCS), "Folder of the pages.", flag_values=FLAGS)

# Demos of something that is no mechanism: where its settings stand.
_SETTINGS = {
  "muon": lambda: optim.optimizer_settings("muon"),
  "nonstandard": lambda: optim.optimizer_settings("hoss"),
  "ordinal": lambda: schedules.schedule_settings("ordinal"),
}
_LENGTHS = (256, 1024, 4096, 16384)
_WIDTH = 1000  # pixels of a picture; pages show it at about half of that


def options(demo: Demo, measured) -> str:
  """Option, default, meaning: of the mechanism's grammar, or of the flags of an optimizer or schedule."""
  if demo.options is not None:
    defaults = {f.name: f.default for f in dataclasses.fields(demo.options)}
    rows = [
      (", ".join(f"`{n}`" for n in names), ", ".join(f"`{_text(defaults[n])}`" for n in names), meaning)
      for names, meaning in _documented(demo.options)
    ]
  else:
    settings = _SETTINGS[demo.name]() if demo.name in _SETTINGS else {}
    rows = [(f"`--{n}`", f"`{_text(v)}`", FIELDS[n].metadata["help"]) for n, v in settings.items() if n in FIELDS]
  return _table(("option", "default", "meaning"), rows) if rows else "None."


def _documented(options: type) -> list[tuple[list[str], str]]:
  """The `Args:` of an options class: names and meaning. Raises `ValueError` where it misses or invents a field."""
  text = inspect.getdoc(options).partition("Args:\n")[2]
  entries = re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", text, re.M)
  rows = [(names.split(", "), re.sub(r"\s+", " ", meaning)) for names, meaning in entries]
  fields = [f.name for f in dataclasses.fields(options)]
  if sorted(n for names, _ in rows for n in names) != sorted(fields):
    raise ValueError(f"{options.__name__} documents {[n for names, _ in rows for n in names]}, but has {fields}")
  return rows


def cost(demo: Demo, measured) -> str:
  """Declared forward cost of the default model against `standard`, and what decoding one token reads."""

  def of(name: str, T: int):
    return gpt.cost(GPTConfig(vocab_size=4096, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, attention=name), T)

  rows = []
  for T in _LENGTHS:
    mine, usual = of(demo.name, T), of("standard", T)
    rows.append(
      (
        f"{T}",
        f"{mine.flops / 1e6:.2f}",
        f"{mine.flops / usual.flops:.2g}",
        f"{mine.bytes / 1024:.0f}",
        f"{mine.bytes / usual.bytes:.2g}",
      )
    )
  head = ("T", "MFLOPs per token", "over `standard`", "KiB read per decoded token", "over `standard`")
  return (
    "Forward pass of the default model (4 layers, 128 wide, MLP and head included), as declared by the mechanism at its"
    f" default options\nand tested against the traced program.\n\n{_table(head, rows)}"
  )


def claims(demo: Demo, measured: Mapping[str, float]) -> str:
  """Every claim with what was measured; each one has a negative control that was caught."""
  rows = [
    (f"`{c.name}`", c.statement, number_text(measured.get(c.name)), number_text(c.tolerance)) for c in demo.claims
  ]
  head = (
    f"`python -m demos check {demo.name}` measures these (seed 0 on a CPU here), and for each one a broken twin that\n"
    "must fail."
  )
  return f"{head}\n\n{_table(('claim', 'statement', 'measured', 'tolerance'), rows)}"


def plots(demo: Demo, measured) -> str:
  pictures = [
    f"![{demo.name}: {plot.__name__.replace('_', ' ')}]({image(demo, plot)})\n\n{inspect.getdoc(plot).splitlines()[0]}"
    for plot in demo.plots
  ]
  if not pictures:
    return "None."
  return "\n\n".join([*pictures, f"`python -m demos run {demo.name} --plots=plots` draws them."])


def image(demo: Demo, plot) -> str:
  return f"images/{demo.name}_{plot.__name__}.png"


def not_shown(demo: Demo, measured) -> str:
  return "\n".join(f"- {what}: {why}" for what, why in demo.not_shown) or "Nothing is left out on purpose."


def papers(demo: Demo, measured) -> str:
  return "\n".join(f"- {ref}" for ref in demo.refs) or "None."


BLOCKS = {f.__name__: f for f in (options, cost, claims, plots, not_shown, papers)}


def filled(page: str, demo: Demo, measured: Mapping[str, float]) -> str:
  """`page` with every marked block written anew; what is outside of blocks stays.

  Args:
    measured: residual by name of claim; a claim without one shows `-`.
  """

  def block(match: re.Match) -> str:
    name = match.group(1)
    return f"<!-- {name} -->\n{BLOCKS[name](demo, measured)}\n<!-- /{name} -->"

  return re.sub(rf"<!-- ({'|'.join(BLOCKS)}) -->\n.*?<!-- /\1 -->", block, page, flags=re.S)


def page_measurements(page: str) -> dict[str, float]:
  """The residuals that a page shows, by claim."""
  cells = re.findall(r"^\| `([\w.()=, *-]+)` \| .* \| (\S+) \| \S+ \|$", page, re.M)
  return {name: float(value) for name, value in cells if value != "-"}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
  return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _text(value) -> str:
  return str(value).lower() if isinstance(value, bool) else f"{value}"


def main(argv: list[str]) -> int:
  del argv
  source, folder = pathlib.Path(FLAGS.results), pathlib.Path(FLAGS.docs)
  fix = "python -m demos run-all --plots=plots --export_json=claims.json"
  if not source.is_file():
    raise UserError(Problem(f"no results in {source}", fix))
  if importlib.util.find_spec("PIL") is None:
    raise UserError(Problem("pictures need Pillow, which comes with matplotlib", "pip install -e '.[plot]'"))
  records = {record["name"]: record for record in json.loads(source.read_text())["demos"]}
  missing = sorted(set(demo_lib.names()) - set(records))
  if missing:
    raise UserError(Problem(f"{source} lacks {', '.join(missing)}", fix))
  (folder / "images").mkdir(exist_ok=True)
  for name, record in records.items():
    demo = demo_lib.get(name)
    measured = {c["claim"]: c["measured"] for c in record["claims"] if c["measured"] is not None}
    path = folder / f"{name}.md"
    path.write_text(filled(path.read_text(encoding="utf-8"), demo, measured), encoding="utf-8")
    for written in record["plots"]:
      if written.endswith(".png"):
        _copy_small(pathlib.Path(written), folder / "images")
    print(f"wrote {path}")
  return 0


def _copy_small(picture: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies a plot at `_WIDTH` pixels with 128 colours: a tenth of the bytes, no visible difference on a page."""
  from PIL import Image

  with Image.open(picture) as opened:
    height = round(opened.height * _WIDTH / opened.width)
    small = opened.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS)
  small.quantize(128).save(folder / picture.name, optimize=True)


if __name__ == "__main__":
  cli.run(main, FLAGS)
