"""What a checkpoint says of the run that wrote it, and whether another run may continue it."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Mapping
from typing import Any

import jax

from mgr_jax.config import GPTConfig
from mgr_jax.problems import Problem

_SHOWN = 20

# Settings that decide how long, where and how visibly a run trains, but not what it computes. Data and tokenizer are
# compared by hash, so that they may move.
MAY_DIFFER = frozenset({
  "run_id", "workdir", "certify", "dry_run", "debug", "flagfile",
  "max_steps", "target_tokens", "target_flops", "max_seconds",
  "data", "tokenizer", "data_threads", "data_shards",
  "val_every", "val_tokens", "sample_every", "sample_prompt",
  "ckpt_every", "ckpt_keep", "resume", "resume_strict",
  "log_every", "probe_every", "progress", "tensorboard", "profile_steps", "on_nonfinite",
  "parallel", "mesh", "coordinator", "num_processes", "process_id", "compile_cache",
})  # fmt: skip


def make_meta(
  cfg: GPTConfig,
  flags: Mapping[str, Any],
  *,
  tokenizer_sha256: str,
  data_sha256: str,
  run_id: str,
  lineage: tuple[str, ...] = (),
  data_shards: int = 1,
) -> dict[str, Any]:
  """What a checkpoint says of its run: settings, model, hashes, versions, and its lineage, the oldest run first."""
  return {
    "flags": dict(flags),
    "model": dataclasses.asdict(cfg),
    "live_attention": cfg.attention,  # the grammar with annealed options at their present numbers
    "tokenizer_sha256": tokenizer_sha256,
    "data_sha256": data_sha256,
    "lineage": [*lineage, run_id],
    "packages": dict(_versions()),
    "backend": jax.default_backend(),
    "device_count": jax.device_count(),
    "process_count": jax.process_count(),
    "data_shards": data_shards,
  }


@functools.cache
def _versions() -> dict[str, str]:
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
  return {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}


def compare_meta(saved: Mapping[str, Any], current: Mapping[str, Any], strict: bool = True) -> list[Problem]:
  """Why a run described by `current` must not continue a checkpoint described by `saved`; both from `make_meta`.

  Compared are the settings not in `MAY_DIFFER`, the model, the tokenizer, the data and the number of data shards.
  With `strict=False` all of these may differ. Versions, backend and number of devices and processes always may.
  """
  if not strict:
    return []
  saved, current = json.loads(json.dumps([saved, current]))
  accept = "accept the change with --resume_strict=false"
  found = []
  # The model's fields are resolved flags: two ways to say the same are no difference. The tokenizer decides vocab_size.
  changed = _changed(saved["flags"], current["flags"], MAY_DIFFER | set(saved["model"]) | set(current["model"]))
  changed |= _changed(saved["model"], current["model"], {"vocab_size"})
  if changed:
    lines = "".join(f"\n    {name}: {old} -> {new}" for name, (old, new) in changed.items())
    repeat = " ".join(f"--{name}={_flag_value(old)}" for name, (old, _) in changed.items() if old != "absent")
    fix = f"use {repeat}, or {accept}" if repeat else accept
    found.append(Problem(f"the checkpoint was trained with other settings (saved -> current):{lines}", fix))
  for key, what, flag in (("tokenizer_sha256", "tokenizer", "--tokenizer"), ("data_sha256", "data", "--data")):
    if saved[key] != current[key]:
      error = f"the {what} is not the one of the checkpoint: sha256 {saved[key]} -> {current[key]}"
      found.append(Problem(error, f"give the same {what} with {flag}, or {accept}"))
  old, new = saved.get("data_shards", saved["process_count"]), current["data_shards"]
  if old != new:
    error = f"the checkpoint was trained from {old} data shards, now there are {new}"
    processes = current["process_count"]
    start = "use" if old % processes == 0 else f"start {math.gcd(old, processes)} of {processes} processes with"
    fix = f"{start} --data_shards={old}, or go on at the next unread data with --resume_strict=false"
    found.append(Problem(error, fix))
  return found


def tree_problems(saved: Mapping[str, str], current: Mapping[str, str], where: str) -> list[Problem]:
  """The problem that two trees, given as leaf name -> `dtype[shape]`, differ: at most one, with the first 20 leaves."""
  lines = [f"missing {name} {current[name]}" for name in current if name not in saved]
  lines += [f"unexpected {name} {saved[name]}" for name in saved if name not in current]
  both = [name for name in current if name in saved and saved[name] != current[name]]
  lines += [f"changed {name}: {saved[name]} -> {current[name]}" for name in both]
  if not lines:
    return []
  shown = "".join(f"\n    {line}" for line in lines[:_SHOWN])
  more = f"\n    and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
  error = f"checkpoint {where} does not fit this model and optimizer:{shown}{more}"
  return [Problem(error, "use the settings in the run's config.cfg, or start a new run with --resume=none")]


def _changed(saved: Mapping[str, Any], current: Mapping[str, Any], ignored) -> dict[str, tuple[Any, Any]]:
  """Name -> (saved, current) where they differ; `absent` stands for a name that only one of them has."""
  names = [*saved, *(n for n in current if n not in saved)]
  pairs = {n: (saved.get(n, "absent"), current.get(n, "absent")) for n in names if n not in ignored}
  return {n: (old, new) for n, (old, new) in pairs.items() if old != new}


def _flag_value(value) -> str:
  return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def listed(names: list[str]) -> str:
  """At most 20 names, and how many more there are."""
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more if names else "nothing"
