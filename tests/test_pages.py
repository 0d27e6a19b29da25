"""Pages of docs/ and the code say the same of options, defaults, costs, claims, papers and pictures."""

import importlib
import json
import pathlib
import re

import pytest

from demos import demo as demo_lib
from demos import pages
from demos.demo import Demo
from mgr_jax.claims import claim
from train import cli

NAMES = demo_lib.names()


def text(name: str) -> str:
  return (pages.DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
class TestEveryPage:
  def test_blocks_are_what_the_code_says(self, name):
    page, demo = text(name), demo_lib.get(name)
    assert page.startswith(f"# {name}: ")
    wanted = set(pages.BLOCKS) - ({"cost"} if demo.options is None else set())
    assert {b for b in pages.BLOCKS if f"<!-- {b} -->" in page} == wanted
    assert pages.filled(page, demo, pages.page_measurements(page)) == page, "run python -m demos.pages again"

  def test_every_claim_was_measured_within_its_tolerance(self, name):
    measured = pages.page_measurements(text(name))
    for c in demo_lib.get(name).claims:
      # Rounded to three digits on the page.
      assert measured[c.name] <= c.tolerance * 1.005, c.name

  def test_sections_that_only_people_can_write(self, name):
    sections = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n?)*)", text(name), re.M))
    for title in ("What it is", "Use", "Where it loses"):
      assert len(sections[title].strip()) > 80, title

  def test_pictures_exist(self, name):
    shown = set(re.findall(r"\]\((images/.*?)\)", text(name)))
    demo = demo_lib.get(name)
    assert shown >= {pages.image(demo, plot) for plot in demo.plots}
    assert all((pages.DOCS / path).is_file() for path in shown)


def test_no_picture_is_left_over():
  drawn = {pages.image(demo, plot) for demo in map(demo_lib.get, NAMES) for plot in demo.plots}
  assert {f"images/{path.name}" for path in (pages.DOCS / "images").iterdir()} == drawn


def test_links_lead_somewhere():
  for page in (*pages.DOCS.glob("*.md"), pages.DOCS.parent / "README.md"):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    assert all((page.parent / link).exists() for link in links), page


def commands(text: str) -> list[str]:
  """The command lines in fenced blocks and in inline code, which may be wrapped."""
  fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines()]
  inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
  return [re.sub(r"\s+", " ", c) for c in (*fenced, *inline) if "python -m " in c]


def flag_problems(command: str) -> list[str]:
  module, rest = re.search(r"python -m ([\w.]+)(.*)", command).groups()
  if module in ("pytest", "tests.kill_resume"):
    return []
  program = importlib.import_module("demos.__main__" if module == "demos" else module)
  known = set(program.program(command.split())[1] if module == "train.bench" else program.FLAGS)
  known |= {"debug", "flagfile", "help", "helpfull"}
  return [f"{command}: --{flag}" for flag in re.findall(r" --(\w+)", rest) if flag not in known]


def test_commands_on_pages_have_flags_that_exist():
  found = [
    c for page in (*pages.DOCS.glob("*.md"), pages.DOCS.parent / "README.md") for c in commands(page.read_text())
  ]
  assert len(found) > 50
  assert [problem for c in found for problem in flag_problems(c)] == []
  (wrapped,) = commands("see (`python -m train.main\n  --steps=3`)")
  assert flag_problems(wrapped) == ["python -m train.main --steps=3: --steps"]


@pytest.mark.parametrize("name", NAMES)
def test_snippets_run(name):
  for code in re.findall(r"```python\n(.*?)```", text(name), re.S):
    exec(compile(code, f"{name}.md", "exec"), {})


def planted_page(tmp_path: pathlib.Path) -> tuple[str, Demo]:
  law = claim("planted.law", "|a| <= 1", lambda k, s: 0.0, 1e-6, lambda k, s: 1.0)
  demo = Demo("planted", "a law", claims=(law,), not_shown=(("the rest", "it is trivial"),), refs=("Me 2020",))
  return (
    "# planted: a law\n<!-- claims -->\n<!-- /claims -->\n<!-- not_shown -->\nold\n<!-- /not_shown -->\nend\n",
    demo,
  )


def test_a_page_is_filled_and_read_back(tmp_path):
  page, demo = planted_page(tmp_path)
  done = pages.filled(page, demo, {"planted.law": 1.5e-7})
  assert "| `planted.law` | \\|a\\| <= 1 | 1.5e-07 | 1.0e-06 |" in done
  assert "- the rest: it is trivial\n<!-- /not_shown -->\nend\n" in done and "old" not in done
  assert pages.page_measurements(done) == {"planted.law": 1.5e-7}
  assert pages.filled(done, demo, pages.page_measurements(done)) == done


def test_another_default_or_an_undocumented_option_is_noticed():
  demo, page = demo_lib.get("tropical"), text("tropical")
  stale = page.replace("| `maxplus` |", "| `dot` |")
  assert stale != page == pages.filled(stale, demo, pages.page_measurements(page))

  class Options(demo.options):
    pass

  Options.__doc__ = "Options.\n\nArgs:\n  score: of a pair.\n"
  with pytest.raises(ValueError, match="documents \\['score'\\], but has"):
    pages.options(Demo("x", "y", options=Options), {})


def test_the_program_writes_pages_and_pictures(tmp_path, monkeypatch, capsys):
  image = pytest.importorskip("PIL.Image")
  page, demo = planted_page(tmp_path)
  monkeypatch.setattr(demo_lib, "names", lambda: ("planted",))
  monkeypatch.setattr(demo_lib, "get", lambda name: demo)
  (tmp_path / "planted.md").write_text(page)
  image.new("RGB", (2000, 800), "white").save(tmp_path / "planted_a.png")
  record = {
    "name": "planted",
    "plots": [str(tmp_path / "planted_a.png")],
    "claims": [{"claim": "planted.law", "measured": 0.0}],
  }
  (tmp_path / "claims.json").write_text(json.dumps({"demos": [record]}))
  program = lambda *args: cli.execute(pages.main, ["pages", *args], pages.FLAGS)
  assert program(f"--results={tmp_path / 'claims.json'}", f"--docs={tmp_path}") == 0
  assert "| 0 | 1.0e-06 |" in (tmp_path / "planted.md").read_text()
  assert image.open(tmp_path / "images" / "planted_a.png").size == (1000, 400)
  assert program(f"--results={tmp_path / 'none.json'}", f"--docs={tmp_path}") == 2
  assert "fix: python -m demos run-all" in capsys.readouterr().err
