"""What a run says of itself: `summary.json`, `run.md`, and the lines before and after training."""

import dataclasses
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax

from mgr_jax.problems import Problem
from mgr_jax.schedules import EVENT_NAMES, EXHAUSTED
from mgr_jax.schedules.ordinal_machine import OrdinalConfig, suggested_patience
from train import artifacts
from train.artifacts import RunDirectory
from train.console import compact, table
from train.flags import Settings, command
from train.identity import MAY_DIFFER
from train.metrics import Record, dumps
from train.plan import Plan
from train.resume import Start

SCHEMA = "mgr_jax.run.v1"
Summary = dict[str, Any]


def config_hash(settings: Settings) -> str:
  """sha256 of the settings that decide the result: those that a resumed run must keep, the horizon and the data."""
  names = (set(vars(settings)) - MAY_DIFFER) | {"max_steps", "target_tokens", "data", "tokenizer"}
  return hashlib.sha256(json.dumps({n: getattr(settings, n) for n in sorted(names)}).encode()).hexdigest()


def new_summary(plan: Plan, directory: RunDirectory, start: Start) -> Summary:
  """The summary of a run that begins, or goes on from what its own earlier summary says.

  Results that follow from the records are filled in by `from_records`.
  """
  settings, corpus, tok, earlier = plan.settings, plan.corpus, plan.tokenizer, start.earlier
  git = artifacts.git_state()
  here = {"run_id": directory.run_id, "dry_run": False}
  longer = {"max_steps": 2 * plan.steps, "target_tokens": 0}
  return {
    "schema_version": SCHEMA,
    "status": "running",
    "error": None,
    "meta": {
      "run_id": directory.run_id,
      "program": "train.main",
      "started": earlier["meta"]["started"] if earlier else artifacts.utc_now(),
      "ended": None,
      "command": command(settings),
      "argv": sys.argv,
      "resume_command": command(settings, **here),
      "longer_command": command(settings, **here, **longer),
      "sample_command": f"python -m train.sample --ckpt={directory.path} --prompt=...",
      "git": git,
      **artifacts.machine_state(),
      "placement": {"devices": plan.placement.n_devices, "text": str(plan.placement), "processes": jax.process_count()},
      "lineage": list(start.lineage),
      "seed": settings.seed,
    },
    "config": {
      "flags": dataclasses.asdict(settings),
      "model": dataclasses.asdict(plan.cfg),
      "hash": config_hash(settings),
    },
    "model": {"parameters": sum(plan.parameters.values()), "parameters_by_role": plan.parameters},
    "data": {
      "directory": str(corpus.directory),
      "sha256": corpus.sha256,
      "files": {role: [f.name for f in getattr(corpus, role)] for role in ("train", "val", "test")},
      "tokenizer": {"flag": settings.tokenizer, "kind": tok.kind, "sha256": tok.sha256, "vocab": tok.vocab_size},
      "bytes_per_token": earlier["data"]["bytes_per_token"] if earlier else None,
      "epochs_seen": 0.0,
      "tokens_seen": 0,
      "warnings": [w.error for w in plan.warnings],
    },
    "budget": {
      "mode": "target_tokens" if settings.target_tokens else "max_steps",
      "target": settings.target_tokens or settings.max_steps,
      "planned_steps": plan.steps,
      "tokens_per_step": plan.tokens_per_step,
      "flops_per_token": {"analytic": plan.flops_per_token},
      "optimizer_flops_per_step": plan.optimizer_flops,
      "flops_per_step": plan.flops_per_token * plan.tokens_per_step + plan.optimizer_flops,
    },
    "results": {
      "loss_first": None,
      "loss_last": None,
      "loss_ema": None,
      "val": [],
      "unigram_bpb": earlier["results"]["unigram_bpb"] if earlier else None,
      "best": None,
      "steps_done": 0,
      "tokens_per_s": None,
      "step_ms": None,
      "compile_s": None,
      "data_wait_frac": None,
      "mfu": None,
      "peak_bytes": None,
      "skipped_steps": 0,
      "schedule_events": [],
      "aux": {},
    },
    "claims": earlier["claims"] if earlier else [],
    "tainted": artifacts.tainted(git),
  }


def from_records(records: Sequence[Record]) -> dict[str, Any]:
  """The results that follow from the records of `metrics.jsonl`.

  `loss_ema` weighs each log line nine times less than all later ones together; `aux` holds the last diagnostics.
  """
  losses = [float(r["loss"]) for r in records if "loss" in r]
  val = [{k: v for k, v in r.items() if k != "seconds"} for r in records if "val_bpb" in r]
  ema = None
  for loss in losses:
    ema = loss if ema is None or not math.isfinite(ema) else 0.9 * ema + 0.1 * loss
  return {
    "loss_first": losses[0] if losses else None,
    "loss_last": losses[-1] if losses else None,
    "loss_ema": ema,
    "val": val,
    "best": min(val, key=lambda v: float(v["val_bpb"]), default=None),
    "skipped_steps": sum(r.get("event") == "skip" for r in records),
    "schedule_events": [{"step": r["step"], "what": r["what"]} for r in records if r.get("event") == "schedule"],
    "aux": next((r["diagnostics"] for r in reversed(records) if r.get("event") == "probe"), {}),
  }


def write(directory: RunDirectory, summary: Summary, log_records: Sequence[Record]) -> None:
  """Writes `summary.json` and `run.md`, each atomically."""
  directory.write("summary.json", dumps(summary, indent=2) + "\n")
  directory.write("run.md", run_report(summary, log_records))


def header(plan: Plan, summary: Summary, directory: RunDirectory) -> str:
  """The lines before training."""
  cfg, meta, budget, data = plan.cfg, summary["meta"], summary["budget"], summary["data"]
  roles = ", ".join(f"{role} {n}" for role, n in plan.parameters.items())
  grouped = f" ({cfg.n_kv_head} key/value)" if cfg.n_kv_head != cfg.n_head else ""
  rows = (
    ("run", str(directory.path)),
    ("code", _code(meta["git"])),
    ("devices", f"{_devices(meta)}, {cfg.compute_dtype}"),
    (
      "model",
      f"{cfg.attention}, {cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.n_head} heads{grouped}, context {cfg.seq_len}",
    ),
    ("parameters", f"{summary['model']['parameters']} ({roles})"),
    (
      "budget",
      f"{plan.steps} steps of {plan.tokens_per_step} tokens,"
      f" {compact(budget['flops_per_token']['analytic'])} FLOPs/token, {compact(budget['flops_per_step'])} FLOPs/step",
    ),
    ("optimizer", f"{plan.settings.optimizer}, schedule {plan.settings.schedule}"),
    ("data", f"{data['directory']}, sha256 {data['sha256'][:12]}"),
    ("tokenizer", f"{plan.tokenizer.kind}, {plan.tokenizer.vocab_size} ids, sha256 {plan.tokenizer.sha256[:12]}"),
  )
  return "\n".join(f"{name:<11}{text}" for name, text in rows)


def final_table(summary: Summary) -> str:
  """The lines after training."""
  results = summary["results"]
  rows = [
    ("steps", f"{results['steps_done']} of {summary['budget']['planned_steps']}"),
    ("loss, first to last", f"{_number(results['loss_first'])} to {_number(results['loss_last'])}"),
  ]
  if results["val"]:
    first, last = results["val"][0], results["val"][-1]
    rows.append(("bits per byte", f"{_number(first['val_bpb'])} to {_number(last['val_bpb'])}"))
    rows.append(("unigram baseline", _number(results["unigram_bpb"])))
  if results["tokens_per_s"]:
    rows.append(("speed", f"{compact(results['tokens_per_s'])} tok/s, {results['step_ms']['p50']:.0f} ms per step"))
    if results["mfu"]:
      rows.append(("model FLOPs utilisation", f"{100 * results['mfu']:.1f}%"))
    rows.append(("waiting for data", f"{100 * results['data_wait_frac']:.1f}%"))
  if results["skipped_steps"]:
    rows.append(("skipped updates", str(results["skipped_steps"])))
  return table(("result", summary["status"]), rows)


def schedule_warnings(summary: Summary) -> list[Problem]:
  """What a finished run says of the patience of its ordinal schedule: it did nothing, or was over half way through."""
  settings, steps = summary["config"]["flags"], summary["budget"]["planned_steps"]
  if settings["schedule"] != "ordinal" or summary["status"] != "finished":
    return []
  events = summary["results"]["schedule_events"]
  cfg = OrdinalConfig(A0=settings["ord_restarts"], B0=settings["ord_levels"])
  fix = f"--ord_patience={suggested_patience(steps, cfg)} makes it last for {steps} steps without improvement"
  exhausted = [e["step"] for e in events if e["what"] == EVENT_NAMES[EXHAUSTED]]
  if not events:
    return [Problem(f"the ordinal schedule changed nothing: --ord_patience={settings['ord_patience']}", fix)]
  if exhausted and exhausted[0] < steps / 2:
    return [Problem(f"the ordinal schedule was exhausted at step {exhausted[0]} of {steps}", fix)]
  return []


def next_commands(summary: Summary) -> list[tuple[str, str]]:
  """What to do next, and the command that does it."""
  meta = summary["meta"]
  finished = summary["status"] == "finished"
  go_on = ("train longer", meta["longer_command"]) if finished else ("resume", meta["resume_command"])
  return [go_on, ("sample", meta["sample_command"])]


def _code(git: dict[str, Any]) -> str:
  if git["commit"] is None:
    return "not committed to git"
  return f"commit {git['commit'][:12]}" + (" with uncommitted changes" if git["dirty"] else "")


def _devices(meta: dict[str, Any]) -> str:
  there, used = meta["devices"], meta["placement"]
  how = [used["text"]] * bool(used["text"]) + [f"{used['processes']} processes"] * (used["processes"] > 1)
  of = f" of {there['count']}" if used["devices"] != there["count"] else ""
  return f"{used['devices']}{of} x {there['kind']}" + (f" ({', '.join(how)})" if how else "")


def sparkline(values: Sequence[float], width: int = 60) -> str:
  """`values` as one line of block characters, low to high, averaged down to at most `width`; gaps where not finite."""
  n = min(width, len(values))
  cuts = [len(values) * i // n for i in range(n + 1)] if n else []
  means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
  finite = [m for m in means if math.isfinite(m)]
  if not finite:
    return ""
  low, span = min(finite), max(finite) - min(finite)
  level = lambda m: "▁▂▃▄▅▆▇█"[round(7 * (m - low) / span) if span else 0]
  return "".join(level(m) if math.isfinite(m) else " " for m in means)


def _number(value, digits: int = 4) -> str:
  return f"{value:.{digits}f}" if isinstance(value, float) else "-" if value is None else str(value)


def run_report(summary: Summary, log_records: Sequence[Record]) -> str:
  """`run.md`: command, budget, curve, results, claims, how to resume and how to sample."""
  meta, results, budget = summary["meta"], summary["results"], summary["budget"]
  losses = [float(r["loss"]) for r in log_records]
  lines = [f"# {meta['run_id']}: {summary['status']}", ""]
  if summary["error"]:
    lines += [f"**{summary['error']}**", ""]
  lines += [
    f"    {meta['command']}",
    "",
    f"{meta['started']} to {meta['ended'] or 'now'}, {_code(meta['git'])}, {_devices(meta)}",
    "",
    "## Budget",
    "",
    f"{budget['planned_steps']} steps of {budget['tokens_per_step']} tokens,"
    f" {compact(budget['flops_per_token']['analytic'])} FLOPs per token, {compact(budget['flops_per_step'])} per step;"
    f" {summary['model']['parameters']} parameters",
    "",
    "## Results",
    "",
    f"loss {sparkline(losses)}" if losses else "No step has been logged yet.",
    "",
  ]
  names = (
    "steps_done",
    "loss_first",
    "loss_last",
    "unigram_bpb",
    "tokens_per_s",
    "compile_s",
    "data_wait_frac",
    "skipped_steps",
  )
  lines += _markdown(("quantity", "value"), [(n, _number(results[n])) for n in names])
  if results["val"]:
    rows = [(v["step"], v["tokens"], _number(v["val_bpb"]), _number(v["nats_per_token"])) for v in results["val"]]
    lines += ["", *_markdown(("step", "tokens", "bits per byte", "nats per token"), rows)]
  if results["schedule_events"]:
    shown = [(e["step"], e["what"]) for e in results["schedule_events"]]
    lines += ["", *_markdown(("step", "event of the schedule"), shown)]
  lines += ["", "## Claims", ""]
  if summary["claims"]:
    rows = [
      (c["name"], _number(c["residual"], 6), c["tolerance"], "yes" if c["pass"] else "NO") for c in summary["claims"]
    ]
    lines += _markdown(("claim", "residual", "tolerance", "holds"), rows)
  else:
    lines.append("None were measured (`--certify=off`).")
  lines += ["", "## Go on", ""]
  for what, text in next_commands(summary):
    lines += [f"{what}:", "", f"    {text}", ""]
  return "\n".join(lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
  cells = [header, ["---"] * len(header), *rows]
  return [f"| {' | '.join(map(str, row))} |" for row in cells]
