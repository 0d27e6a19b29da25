"""The notebooks of `colab/`: run by a kernel of this interpreter at small sizes, and committed without outputs."""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from mgr_jax.data import builtin

ROOT = Path(__file__).parents[1]
NAMES = ("01_quickstart", "02_frameworks", "03_your_own_data", "04_add_a_mechanism")
FRAMEWORKS = {
  *("tropical", "ultrametric", "simplicial", "quaternion", "octonion", "braid", "fractal", "surreal", "reversible"),
  *("gauge", "ordinal", "nonstandard", "muon"),
}
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
METADATA["language_info"] = {"name": "python"}


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_of(notebook) -> list[str]:
  return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def execute(tmp_path, monkeypatch):
  """`execute(notebook, wanted)` runs the cells in a temporary folder, as the tests' sizes have it.

  Returns the value of the expression `wanted` after the last cell, which goes through JSON, and the number of figures
  shown. Raises `CellExecutionError` where a cell does.
  """
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
  environment = os.environ | {
    "IPYTHONDIR": str(tmp_path / "ipython"),
    "MGR_BASE_DIR": str(tmp_path / "cache"),
    "MGR_SMOKE": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
  }
  environment.pop("MPLBACKEND", None)  # the kernel sets its own, which shows figures
  folder = tmp_path / "notebook"
  folder.mkdir()

  def run(notebook, wanted: str = "None"):
    notebook = copy.deepcopy(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n\nprint(json.dumps({wanted}))"))
    # Without folders of kernels, `python3` can only be the interpreter that runs the tests.
    kernels = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    NotebookClient(notebook, km=kernels, timeout=300).execute(env=environment, cwd=str(folder))
    printed = "".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout")
    shown = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    return json.loads(printed), len(shown)

  return run


def test_the_quickstart_trains_and_writes(execute, tmp_path):
  builtin.builtin_corpus(tmp_path / "cache", [topics[name] for name in sorted(topics)][:40], vocab_size=300)
  wanted = "[losses, sample, run.status, unigram, validated[-1]['val_bpb'], [r.name for r in results if r.holds]]"
  (losses, sample, status, unigram, bits, claims), figures = execute(read("01_quickstart"), wanted)
  assert status == "finished" and losses[-1] < losses[0] - 1
  assert 0 < unigram < 8 and 0 < bits < 8
  assert len(claims) == 3 and claims[0].startswith("tropical.")
  assert sample.startswith("def main(") and len(sample) > 20
  assert figures == 1


def test_every_framework_is_shown_and_its_claims_hold(execute):
  wanted = "[{k: [r.holds for r in v] for k, v in measured.items()}, sys.executable]"
  (measured, interpreter), figures = execute(read("02_frameworks"), wanted)
  assert interpreter == sys.executable
  assert measured.keys() == FRAMEWORKS and all(held and all(held) for held in measured.values())
  assert figures == 12


def test_a_run_on_own_text_survives_interruptions(execute):
  wanted = "[losses, printed, resumed, status(), sample, checkpoints(), steps, 'jax' in sys.modules]"
  (losses, printed, resumed, status, sample, saved, steps, holds), _ = execute(read("03_your_own_data"), wanted)
  assert not holds  # an accelerator that the kernel holds would not be free for the commands
  assert status == "finished" and saved[-1] == steps
  first, second = resumed
  assert 0 < first < second < steps
  assert any(int(step) > first for step in printed)  # steps that were taken twice, and compared by the notebook
  assert list(map(int, losses)) == list(range(1, steps + 1))
  assert losses[str(steps)] < losses["1"] - 0.5
  assert "The statement" in sample and len(sample) > 40


def test_a_mechanism_is_accepted_and_its_leaking_twin_rejected_by_name(execute):
  wanted = (
    "[{r.name: r.holds for r in accepted}, [r.name for r in rejected], {k: v.tolist() for k, v in losses.items()},"
    " list(mgr.attention_names())]"
  )
  (accepted, rejected, losses, names), figures = execute(read("04_add_a_mechanism"), wanted)
  assert set(accepted) == {"ema.constants", "ema.causal_values", "ema.prefix_consistency"} and all(accepted.values())
  assert "leaky.causal_values" in rejected
  assert len(losses) == 3 and all(loss[-1] < loss[0] - 1 for loss in losses.values())
  assert {"ema", "leaky"} <= set(names)
  assert figures == 1


def test_a_failing_cell_is_noticed(execute):
  with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
    execute(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]))


def remains(notebook) -> list[str]:
  """What a run leaves behind in a notebook, and metadata that depends on who saved it."""
  found = [] if notebook.metadata == METADATA else ["metadata of the notebook"]
  for cell in notebook.cells:
    found += [f"metadata of {cell.id}"] if cell.metadata else []
    if cell.cell_type == "code":
      found += [f"outputs of {cell.id}"] if cell.outputs else []
      found += [f"count of {cell.id}"] if cell.execution_count is not None else []
  return found


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_are_clean(name):
  notebook = read(name)
  nbformat.validate(notebook)
  assert remains(notebook) == []
  assert all(re.fullmatch(r"[a-z-]+", cell.id) for cell in notebook.cells)  # chosen, not random
  text = "\n".join(cell.source for cell in notebook.cells)
  assert not re.search(r"https?://|/home/|/root/|/tmp/", text)


def test_there_are_no_other_notebooks():
  assert sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb")) == list(NAMES)


def test_remains_of_a_run_are_noticed():
  notebook = read("01_quickstart")
  cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
  cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
  cell.execution_count = 1
  cell.metadata["scrolled"] = True
  assert remains(notebook) == ["metadata of install", "outputs of install", "count of install"]


def test_only_the_first_cell_installs_and_it_is_the_same_everywhere():
  codes = [code_of(read(name)) for name in NAMES]
  assert len({code[0] for code in codes}) == 1
  assert not re.search(r"\bpip\b|\bgit\b", "\n".join(cell for code in codes for cell in code[1:]))


@pytest.fixture
def installation(monkeypatch, tmp_path):
  """`installation(repository)` runs the first cell as if `mgr_jax` were missing; returns the commands it would run."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(shutil, "which", lambda name: None)
  monkeypatch.setattr(sys, "path", list(sys.path))
  commands = []
  monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: commands.append(command))

  def run(repository: str):
    code = code_of(read(NAMES[0]))[0]
    assert code.count('REPOSITORY = ""') == 1
    exec(code.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), {})
    return commands

  return run


def test_the_first_cell_clones_and_installs(installation):
  clone, install = installation("somewhere")
  assert clone[:2] == ["git", "clone"] and clone[-2] == "somewhere"
  assert install[:4] == [sys.executable, "-m", "pip", "install"] and f"{clone[-1]}[plot]" in install
  assert sys.path[0] == clone[-1]


def test_the_first_cell_asks_for_the_repository(installation):
  with pytest.raises(ValueError, match="REPOSITORY"):
    installation("")
