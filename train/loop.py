"""One training run, from settings to artifacts. A notebook calls `run(Settings(max_steps=50, attention="braid"))`."""

import contextlib
import dataclasses
import gc
import tempfile
import time
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.config import GPTConfig
from mgr_jax.data.shards import ShardedBatches
from mgr_jax.data.stream import train_iterator, validation_batches
from mgr_jax.model import annealing, gpt
from mgr_jax.params import fold_in_name
from mgr_jax.problems import Problem
from mgr_jax.schedules import EVENT_NAMES, NO_EVENT
from mgr_jax.step import init_train_state
from train import distributed, dry_run, nonfinite, validate
from train.artifacts import RunDirectory, new_run_id
from train.certify import certify
from train.checkpoint import Checkpoints
from train.flags import Settings, command, profiled_steps
from train.journal import Journal
from train.nonfinite import NonFinite
from train.parallel import peak_bytes
from train.plan import Plan, initial_specs, make_optimizer, make_plan, make_schedule, make_step
from train.probe import probe
from train.resume import Start, describe, find_start
from train.samples import draw_samples
from train.signals import StopSignals
from train.summary import config_hash

MAX_PENDING = 100  # steps whose batches and metrics wait for the next log line
EXIT_CODES = {"finished": 0, "stopped_time": 0, "failed": 1, "interrupted": 130}


class Result(NamedTuple):
  """How a run ended: `status` is a key of `EXIT_CODES` or `dry_run`; `summary` is the content of `summary.json`."""

  status: str
  exit_code: int
  directory: Path | None
  summary: dict[str, Any]


def run(settings: Settings) -> Result:
  """Trains, or goes on training, as the settings say.

  Prints progress; writes `<workdir>/<run_id>/`. Raises `UserError`, before anything is compiled or written, with all
  that is wrong with settings, data, tokenizer and checkpoint.
  """
  began = time.perf_counter()
  say = print if distributed.leads() else lambda *text, **_: None
  plan = distributed.together(lambda: make_plan(settings, say=say), _common_settings)
  for warning in plan.warnings:
    say(f"warning: {warning.error}\n    fix: {warning.fix}")
  if settings.dry_run:
    say(dry_run.report(plan), flush=True)
    return Result("dry_run", 0, None, {})
  run_id = settings.run_id or distributed.leaders(new_run_id(config_hash(settings)))
  directory = RunDirectory(settings.workdir, run_id)
  distributed.all_see(directory.path.parent)
  checkpoints = Checkpoints(directory.checkpoints, settings.ckpt_keep)
  start = find_start(plan, directory, checkpoints)
  distributed.meet()  # nobody writes before all have seen what is there
  if start.step > plan.steps or (start.step == plan.steps and start.earlier.get("status") == "finished"):
    say(f"run {directory.path} has done {start.step} of {plan.steps} steps: nothing to do")
    say(f"  train longer: {command(settings, run_id=directory.run_id, max_steps=2 * start.step, target_tokens=0)}")
    return Result("finished", 0, directory.path, start.earlier)
  try:
    with open_batches(plan) as batches:
      return Trainer(plan, directory, checkpoints, start, batches, began).run()
  finally:
    gc.unfreeze()


def _common_settings(plan: Plan) -> dict[str, Any]:
  """What every process of a run must have alike; where files lie is the business of each host."""
  own = ("process_id", "data", "tokenizer", "workdir", "compile_cache", "data_threads")
  same = {f"--{name}": value for name, value in dataclasses.asdict(plan.settings).items() if name not in own}
  return same | {"--data": plan.corpus.sha256, "--tokenizer": plan.tokenizer.sha256}


def open_batches(plan: Plan) -> ShardedBatches:
  """The training batches of this process."""
  settings, shards = plan.settings, plan.data_shards
  per_process = shards // jax.process_count()
  first = jax.process_index() * per_process
  return ShardedBatches(
    [
      train_iterator(
        plan.corpus,
        plan.tokenizer,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size // shards,
        seed=settings.seed,
        threads=settings.data_threads,
        process_index=shard,
        process_count=shards,
      )
      for shard in range(first, first + per_process)
    ]
  )


class Trainer:
  """The moving parts of one run. `step` counts the updates that have been dispatched."""

  def __init__(
    self,
    plan: Plan,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    start: Start,
    batches: ShardedBatches,
    began: float,
  ):
    settings, cfg = plan.settings, plan.cfg
    self.plan, self.settings, self.directory, self.checkpoints = plan, settings, directory, checkpoints
    self.start, self.batches, self.began = start, batches, began
    self.step = start.step
    self.profiled, self.tracing = profiled_steps(settings), False
    self.pending: list[tuple[int, dict[str, np.ndarray], Any]] = []
    self.val = None
    if settings.val_every != -1:
      self.val = validation_batches(
        plan.corpus,
        plan.tokenizer,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size // jax.process_count(),
        val_tokens=settings.val_tokens,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )
    optimizer = make_optimizer(settings, gpt.specs(cfg), cfg, plan.placement)
    schedule = make_schedule(settings, plan.steps)
    self.step_of = lambda cfg: make_step(settings, cfg, optimizer, schedule, plan.steps, placement=plan.placement)
    self.snap_step = annealing.snap_step(cfg, plan.steps)
    specs = initial_specs(settings, cfg)
    self._set_state(lambda: init_train_state(cfg, optimizer, schedule, settings.seed, specs))

  def _set_state(self, init) -> None:
    """Initial or restored state, and the place in the data that belongs to it."""
    start, self.left_out, placement, specs = self.start, 0, self.plan.placement, gpt.specs(self.plan.cfg)
    if start.source is None:
      self.state = placement.init(init, specs)
    else:
      self.state, data_state, _ = start.source.restore(placement.abstract(init, specs), start.step)
      states = [data_state] if isinstance(data_state, dict) else data_state
      self.left_out = self.batches.set_state(states, strict=self.settings.resume_strict)
    self.limit = self.settings.skip_limit or 1
    self.streak = int(self.state.nonfinite_streak)
    if self.streak >= self.limit:  # a state saved under a more patient setting would refuse every update
      self.state, self.streak = self.state.replace(nonfinite_streak=0 * self.state.nonfinite_streak), 0

  def run(self) -> Result:
    """Everything after the checks."""
    anew = self.start.source is None and self.directory.holds_a_run()
    with contextlib.ExitStack() as stack:
      directory, progress = self.directory, self.settings.progress
      if not distributed.leads():
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        directory, progress = RunDirectory(folder, self.directory.run_id), "silent"
      return self._run(Journal(self.plan, directory, self.start, progress), anew)

  def _run(self, journal: Journal, anew: bool) -> Result:
    self.journal = journal
    if anew:
      self.journal.say("the directory holds a run without a finished checkpoint: it starts anew")
    if self.start.source is not None:
      source = str(self.start.source.directory)
      self.journal.event("resume", self.step, source=source, tokens_left_out=self.left_out)
      lost = f", {self.left_out} tokens left out" if self.left_out else ""
      self.journal.say(f"resumes at step {self.step} of {source}{lost}")
    try:
      status, problem = self._train()
    except BaseException as e:
      self._close("interrupted" if isinstance(e, KeyboardInterrupt) else "failed", f"{type(e).__name__}: {e}")
      raise
    self._close(status, problem and problem.error)
    self.journal.say_goodbye(self.step)
    if problem:
      self.journal.say(str(problem))
    exit_code = EXIT_CODES[status] or int(bool(self.journal.failures))
    return Result(status, exit_code, self.directory.path, self.journal.summary)

  def _close(self, status: str, error: str | None) -> None:
    """Waits for the last checkpoint and writes the final summary."""
    if self.tracing:
      self._end_profile()
    self.checkpoints.close()
    self._note_failed_checkpoints()
    self.journal.finish(status, error)
    self._write_summary()
    self.journal.close()

  def _write_summary(self) -> None:
    self.journal.write_summary(self.step - len(self.pending), self.batches.epoch)

  def _train(self) -> tuple[str, Problem | None]:
    """Certifies, compiles, and takes the steps. Returns the status and what went wrong."""
    self._write_summary()
    if not self.start.own and not self._certify():
      return "failed", Problem("a claim does not hold", "do not trust this configuration; --certify=off trains anyway")
    self.compile()
    if self.step == 0:
      self._validate()
    try:
      with StopSignals() as stop:
        status = self.take_steps(stop)
        finished = status == "finished"
        self._boundary(validate_now=finished, sample_now=finished, save_now=True)
    except NonFinite as e:
      self.journal.say(nonfinite.report(e, self.state.params, self.plan.cfg, self.directory.path))
      return "failed", Problem(str(e), "try a smaller --lr_scale, or drop such updates with --on_nonfinite=skip:5")
    return status, None

  def _certify(self) -> bool:
    """Measures the claims; False when one does not hold."""
    began = time.perf_counter()
    claims = self.journal.summary["claims"] = certify(self.plan.cfg, self.settings.certify, self.settings.seed)
    failed = [c for c in claims if not c["pass"]]
    if claims:
      seconds = time.perf_counter() - began
      self.journal.say(f"claims     {len(claims) - len(failed)} of {len(claims)} hold ({seconds:.1f} s)")
    for c in failed:
      self.journal.say(f"claim failed: {c['name']}: {c['statement']}\n  {c['message']}")
    return not failed

  @property
  def cfg(self) -> GPTConfig:
    """The configuration that the next step trains."""
    return self.plan.cfg if self.step < self.snap_step else annealing.snapped(self.plan.cfg)

  def compile(self) -> None:
    began = time.perf_counter()
    shape = jax.ShapeDtypeStruct((self.settings.batch_size, self.settings.seq_len), jnp.int32)
    step, inputs = self.step_of(self.cfg), dict.fromkeys(self.plan.inputs, shape)
    self.compiled = self.plan.placement.compile(step, self.state, inputs, gpt.specs(self.plan.cfg))
    seconds, peak = time.perf_counter() - began, peak_bytes(self.compiled)
    self.journal.summary["results"] |= {"compile_s": seconds, "peak_bytes": peak}
    self.journal.say(f"compiled   in {seconds:.1f} s, {peak / 2**20:.0f} MiB\n")

  def take_steps(self, stop: StopSignals, until: int | None = None) -> str:
    """Steps until the horizon or `until`, a signal or the time limit; returns the status that this gives the run."""
    s, until = self.settings, self.plan.steps if until is None else until
    self.journal.meter.resume()
    while self.step < until:
      self._advance()
      if self.step == self.start.step + 1:
        gc.collect()
        gc.freeze()  # what exists now lives as long as the run: the collector need not look at it again
      if self.step == self.plan.steps:
        break
      due = lambda every: every > 0 and self.step % every == 0
      self._boundary(due(s.val_every), due(s.sample_every), due(s.ckpt_every))
      status = self._asked_to_stop(stop)  # after what is due here, which a resumed run would not catch up on
      if status:
        return status
    return "finished"

  def _asked_to_stop(self, stop: StopSignals) -> str:
    """The status of a run that a signal or the clock ends here; several processes ask each other at log lines only."""
    if jax.process_count() > 1 and not self._is_logged(self.step):
      return ""
    over = bool(self.settings.max_seconds) and time.perf_counter() - self.began >= self.settings.max_seconds
    signal = distributed.largest(stop.received or 0)
    if signal:
      self.journal.say(f"{Signals(signal).name}: saving step {self.step}; once more to stop without saving")
      return "interrupted"
    if distributed.largest(over):
      self.journal.say(f"--max_seconds={self.settings.max_seconds:g} are over: saving step {self.step}")
      return "stopped_time"
    return ""

  def _advance(self) -> None:
    """Dispatches one step; then fetches the metrics of the step before it, if that one is logged."""
    asked = time.perf_counter()
    batch = next(self.batches)
    self.journal.meter.wait(time.perf_counter() - asked)
    batch = {name: batch[name] for name in self.plan.inputs}
    if self.step == self.snap_step and self.step > self.start.step:
      self._snap()
    if self.profiled and self.step + 1 == self.profiled.start:
      jax.profiler.start_trace(str(self.directory.path / "profile"))
      self.tracing = True
    self.state, metrics = self.compiled(self.state, self.plan.placement.put(batch))
    self.step += 1
    self.pending.append((self.step, batch, metrics))
    if self.tracing and self.step + 1 == self.profiled.stop:
      self._end_profile()
    if self._is_logged(self.step - 1) or len(self.pending) > MAX_PENDING:
      self._fetch(self.step - 1)
    if self.settings.probe_every and self.step % self.settings.probe_every == 0:
      self._probe(batch)

  def _end_profile(self) -> None:
    jax.block_until_ready(self.state)
    jax.profiler.stop_trace()
    self.tracing = False
    self.journal.event("profile", self.step, directory=str(self.directory.path / "profile"))

  def _snap(self) -> None:
    """Goes over to the snapped options, which are another program."""
    self.journal.meter.pause()
    self.journal.event("snap", self.step, attention=self.cfg.attention)
    self.compile()
    self.journal.meter.resume()

  def _probe(self, batch) -> None:
    """Records diagnostics of the parameters after the last step; this time does not count as training."""
    self._fetch(self.step)
    self.journal.meter.pause()
    found = jax.device_get(probe(self.state.params, batch, self.cfg, self.state.annealed))
    self.journal.event("probe", self.step, diagnostics=found)
    self.journal.meter.resume()

  def _is_logged(self, step: int) -> bool:
    return step in (1, self.plan.steps) or step % self.settings.log_every == 0

  def _fetch(self, last: int) -> None:
    """Reads the metrics of the pending steps up to `last` in one transfer; writes log lines and events.

    Raises `NonFinite` when training has broken down: the updates after that step were dropped, so the parameters are
    still those that broke.
    """
    due = [p for p in self.pending if p[0] <= last]
    if not due:
      return
    self.pending = self.pending[len(due) :]
    flags = lambda m: {name: m[name] for name in ("nonfinite", "event")}
    fetched = jax.device_get([m if self._is_logged(step) else flags(m) for step, _, m in due])
    for (step, batch, _), metrics in zip(due, fetched, strict=True):
      if "loss" in metrics:
        of_batch = self.plan.tokenizer.token_bytes[batch["targets"]].sum(dtype=np.float64)
        self.journal.log_step(step, metrics, int(distributed.total(of_batch)))
      if metrics["event"] != NO_EVENT:
        self.journal.event("schedule", step, what=EVENT_NAMES[metrics["event"]])
      self.streak = self.streak + 1 if metrics["nonfinite"] else 0
      if self.streak >= self.limit:
        self.journal.event("nonfinite", step)
        raise NonFinite(step, batch)
      if self.streak:
        self.journal.event("skip", step, in_a_row=self.streak)

  def _boundary(self, validate_now: bool = False, sample_now: bool = False, save_now: bool = False) -> None:
    """Validates, samples and saves between two steps; this time does not count as training.

    The checkpoint comes last: once it exists, everything about its steps is in `metrics.jsonl`.
    """
    if not (validate_now or sample_now or save_now):
      return
    self._fetch(self.step)
    self.journal.meter.pause()
    if validate_now:
      self._validate()
    if sample_now:
      self._sample()
    if save_now:
      self._save()
    self._write_summary()
    self.journal.meter.resume()

  def _validate(self) -> None:
    """Validates, unless validation is off or this step was validated before it was saved and restored."""
    if self.val is None or distributed.leaders(self.journal.validation(self.step) is not None):
      return
    plan, began, unigram = self.plan, time.perf_counter(), None
    with plan.placement.by_rows():
      score = validate.score(
        self.state.params, self.val, plan.tokenizer, self.cfg, self.state.annealed, plan.placement.spread
      )
    seconds = time.perf_counter() - began
    if self.journal.summary["results"]["unigram_bpb"] is None:
      counts = validate.unigram_counts(plan.corpus, plan.tokenizer, self.settings.seed)
      unigram = validate.unigram_score(counts, self.val, plan.tokenizer)
    self.journal.log_validation(self.step, score, seconds, unigram)

  def _sample(self) -> None:
    if self.settings.sample_every == -1 or distributed.leaders(bool(self.journal.events("sample", self.step))):
      return
    key = jax.random.fold_in(fold_in_name(jax.random.key(self.settings.seed), "sample"), self.step)
    prompts = self.settings.sample_prompt
    params = self.plan.placement.whole(self.state.params)
    samples = draw_samples(params, prompts, self.plan.tokenizer, self._live_cfg(), key)
    self.journal.log_samples(self.step, samples)

  def _live_cfg(self) -> GPTConfig:
    """The configuration with annealed options at their present numbers."""
    return annealing.frozen(self.cfg, jax.device_get(self.state.annealed)) if self.state.annealed else self.cfg

  def _save(self) -> None:
    record = distributed.leaders(self.journal.validation(self.step))
    metrics = {"val_bpb": float(record["val_bpb"])} if record else None
    meta = describe(self.plan, self.directory.run_id, self.start.lineage)
    meta["live_attention"] = self._live_cfg().attention
    data_state = [state for states in distributed.gather_json(self.batches.get_state()) for state in states]
    self.checkpoints.save(self.step, self.state, data_state, meta, metrics)
    self._note_failed_checkpoints()
    if not self.journal.events("checkpoint", self.step):  # a run that stops where one was due asks for it twice
      self.journal.event("checkpoint", self.step)

  def _note_failed_checkpoints(self) -> None:
    while self.checkpoints.failures:
      failure = self.checkpoints.failures.pop(0)
      self.journal.event("checkpoint_failed", self.step, error=failure.error)
      self.journal.fail(failure)
