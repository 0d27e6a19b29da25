"""The examples in the library's docstrings run, and those a newcomer meets first exist."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mgr_jax

MODULES = ["mgr_jax", *sorted(m.name for m in pkgutil.walk_packages(mgr_jax.__path__, "mgr_jax."))]


def examples(name: str) -> list[doctest.DocTest]:
  return [t for t in doctest.DocTestFinder().find(importlib.import_module(name), name) if t.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name)])
def test_examples(name):
  runner = doctest.DocTestRunner()
  for example in examples(name):
    runner.run(example)
  assert runner.failures == 0


@pytest.mark.parametrize("name", ["mgr_jax", "mgr_jax.fitting", "mgr_jax.conformance", "mgr_jax.claims"])
def test_the_notebook_api_has_examples(name):
  assert examples(name)


def test_the_library_has_no_flags_and_imports_no_program():
  outside = re.compile(r"^\s*(from|import) (absl|train|demos)\b", re.M)
  sources = list(Path(mgr_jax.__file__).parent.rglob("*.py"))
  assert len(sources) > 100
  assert [str(path) for path in sources if outside.search(path.read_text(encoding="utf-8"))] == []
  assert outside.search("import jax\nfrom absl import flags\n")


def test_a_wrong_example_fails():
  """The negative control."""
  parsed = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
  assert doctest.DocTestRunner(verbose=False).run(parsed, out=lambda text: None).failed == 1
