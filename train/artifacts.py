"""The directory of a run, and what to record about the code and the machine it ran on."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from mgr_jax.data import files
from mgr_jax.problems import Problem, UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "grain", "tokenizers", "pyarrow", "numpy")
_ENVIRONMENT = ("JAX_", "XLA_", "MGR_", "TPU_", "CUDA_VISIBLE_DEVICES", "TF_GPU_", "NVIDIA_TF32_OVERRIDE")


class RunDirectory:
  """Paths and atomic writes of `<workdir>/<run_id>/`."""

  def __init__(self, workdir: str | os.PathLike, run_id: str):
    self.path = Path(workdir).expanduser() / run_id
    self.run_id = run_id
    self.checkpoints = self.path / "checkpoints"
    self.metrics = self.path / "metrics.jsonl"
    self.tensorboard = self.path / "tb"

  def holds_a_run(self) -> bool:
    return (self.path / "summary.json").exists() or self.checkpoints.exists()

  def create(self) -> None:
    """Raises `UserError` when the system does not let us."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      fix = "use --workdir=DIRECTORY that you may write to"
      raise UserError(Problem(f"cannot make {self.path}: {e.strerror or e}", fix)) from e

  def write(self, name: str, text: str) -> None:
    """Writes one file, atomically."""
    files.write_text(self.path / name, text)

  def read_summary(self) -> dict[str, Any]:
    """The content of `summary.json`; empty when there is none or it is damaged."""
    try:
      return json.loads((self.path / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
      return {}


def new_run_id(config_hash: str) -> str:
  """`YYYYMMDD-HHMMSS-<6 hex of the configuration's hash>`, in UTC."""
  return f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{config_hash[:6]}"


def utc_now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def git_state() -> dict[str, Any]:
  """Commit, branch and changes of the source tree this code runs from; all None when it is not under git.

  `diff_sha256` is the hash of the uncommitted changes to tracked files, None when there are none; `dirty` also counts
  new source files.
  """
  here = Path(__file__).resolve().parent

  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
      return None
    return done.stdout.decode("utf-8", "replace")

  top = git("rev-parse", "--show-toplevel")
  if top is None:
    return dict.fromkeys(("commit", "branch", "dirty", "diff_sha256"))
  sources = [str(Path(top.strip()) / name) for name in ("mgr_jax", "train", "pyproject.toml")]
  commit, branch = git("rev-parse", "--verify", "HEAD"), git("branch", "--show-current")
  diff = git("diff", "HEAD", "--", *sources) if commit else None
  return {
    "commit": commit and commit.strip(),
    "branch": branch and branch.strip(),
    "dirty": bool(git("status", "--porcelain", "--", *sources)),
    "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
  }


def tainted(git: dict[str, Any]) -> bool:
  """True when the code of a run cannot be found again: no git, no commit, or uncommitted changes."""
  return git["commit"] is None or bool(git["dirty"])


def device_state() -> dict[str, Any]:
  return {
    "backend": jax.default_backend(),
    "kind": jax.devices()[0].device_kind,
    "count": jax.device_count(),
    "process_count": jax.process_count(),
  }


def machine_state() -> dict[str, Any]:
  """Python, package versions, platform, devices, and the environment variables that can change speed or numbers."""
  packages = {}
  for name in _PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      packages[name] = None
  return {
    "python": platform.python_version(),
    "packages": packages,
    "platform": platform.platform(),
    "cpu_count": os.cpu_count(),
    "devices": device_state(),
    "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
  }
