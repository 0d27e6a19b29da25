"""What the README shows runs, and the flags it names exist."""

import re
from pathlib import Path

import pytest

from train.main import FLAGS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs():
  (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
  names = {}
  exec(compile(code, "README.md", "exec"), names)
  assert names["logits"].shape == (1, 64, 256) and names["tokens"].shape == (1, 40)
  assert names["losses"][0] == pytest.approx(5.545, abs=1e-3), "ln 256 at initialisation"
  assert names["losses"][-1] < 3
  assert all(result.holds for result in names["results"])


def test_training_flags_in_the_readme_exist():
  lines = [line for line in README.splitlines() if "python -m train.main" in line]
  used = {name for line in lines for name in re.findall(r"--(\w+)", line)}
  assert "attention" in used
  assert used - {"helpfull", "flagfile"} <= set(FLAGS)
