"""Where a run writes: `metrics.jsonl`, `summary.json`, `run.md`, `samples.txt`, and the console."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from mgr_jax.data import tokenizer as tokenizer_lib
from mgr_jax.problems import Problem
from train import nonfinite
from train import summary as summaries
from train.artifacts import RunDirectory, utc_now
from train.console import Console
from train.flags import flagfile
from train.metrics import Meter, MetricsLog, Record
from train.plan import Plan, matrix_rate
from train.resume import Start
from train.samples import Sample, samples_text
from train.validate import Score

FIRST_LOSS_TOLERANCE = 1e-4
SHOWN = 3  # problems repeated at the end
RESIDUAL_LIMIT = 0.1  # estimated error of a HOSS step over that of a gradient step, above which to warn
WAIT_LIMIT = 0.1  # share of the step time spent waiting for data, above which to warn


class Journal:
  """The records of one run. Opening it drops the records after the step that a resumed run starts from.

  Later, a file that cannot be written does not stop the training: the problem is shown and kept in `failures`.
  """

  def __init__(self, plan: Plan, directory: RunDirectory, start: Start, progress: str):
    settings = plan.settings
    self._plan, self._directory = plan, directory
    self._lr = matrix_rate(settings)
    self._logged = start.step
    self.failures: list[Problem] = []
    self.meter = Meter(plan.tokens_per_step)
    self.summary = summaries.new_summary(plan, directory, start)
    directory.create()
    for left_over in nonfinite.FILES:
      (directory.path / left_over).unlink(missing_ok=True)
    tensorboard = directory.tensorboard if settings.tensorboard else None
    self._log = MetricsLog(directory.metrics, start.step if start.own else None, tensorboard)
    # With as many shards as now, the flagfile means the same for another number of processes.
    directory.write("config.cfg", flagfile(dataclasses.replace(settings, data_shards=plan.data_shards)))
    tokenizer_lib.save(plan.tokenizer, directory.path / tokenizer_lib.FILE_NAME)
    directory.write("samples.txt", samples_text(self._log.records))
    self._console = Console(progress, plan.steps, start.step)
    self.say(summaries.header(plan, self.summary, directory))

  def say(self, text: str = "") -> None:
    """Shows text above the progress bar."""
    self._console.line(text)

  def event(self, name: str, step: int, **details) -> None:
    """Records that something happened after `step` updates."""
    self._try(self._log.write, {"event": name, "step": step, **details})

  def _try(self, write: Callable[..., None], *arguments) -> None:
    try:
      write(*arguments)
    except OSError as e:
      fix = "free space on that disk; what could not be written will be, once there is some"
      self.fail(Problem(f"{self._directory.path} could not be written: {e.strerror or e}", fix))

  def fail(self, failure: Problem) -> None:
    """Shows a problem that training can live with, once; it makes the exit code 1 in the end."""
    if failure not in self.failures:
      self.failures.append(failure)
      self.say(f"{failure}\n  training goes on")

  def events(self, name: str, step: int | None = None) -> list[Record]:
    """The recorded events of one kind, of all steps or of one."""
    return [r for r in self._log.select("event") if r["event"] == name and step in (None, r["step"])]

  def validation(self, step: int) -> Record | None:
    """The validation record of a step."""
    return next((r for r in self._log.select("val_bpb") if r["step"] == step), None)

  def log_step(self, step: int, metrics: dict[str, Any], bytes_: int) -> None:
    """Writes and shows one log line: metrics of `step`, whose targets stand for `bytes_` bytes, and the lap's times.

    `bpb` counts all nats of the batch, `lr` is that of hidden matrices.
    """
    record = {
      "step": step,
      "loss": metrics["loss"],
      "bpb": float(metrics["nll_sum"]) / (math.log(2) * max(bytes_, 1)),
      "lr": self._lr * float(metrics["multiplier"]),
      "grad_norm": metrics["grad_norm"],
      "aux_loss": metrics["aux_loss"],
      **metrics["annealed"],
      **metrics["schedule"],
      **metrics["optimizer"],
      "tokens": step * self._plan.tokens_per_step,
      **self.meter.lap(step - self._logged),
    }
    self._logged = step
    share = self._plan.utilisation(record["step_ms"] / 1e3)
    record |= {} if share is None else {"mfu": share}
    self._try(self._log.write, record)
    val = self._log.select("val_bpb")
    eta = (self._plan.steps - step) * self.meter.totals()["step_ms"]["p50"] / 1e3
    self._console.progress(record, float(val[-1]["val_bpb"]) if val else None, eta)
    self._warn(record)

  def _warn(self, record: Record) -> None:
    expected = math.log(self._plan.cfg.vocab_size)
    if record["step"] == 1 and not abs(record["loss"] - expected) <= FIRST_LOSS_TOLERANCE:
      self.say(f"warning: the first loss is {record['loss']:.5f}; a zero head gives ln V = {expected:.5f}")
    residual = record.get("hoss/residual", 0.0)
    if residual > RESIDUAL_LIMIT and not self.events("unresolved"):
      self.event("unresolved", record["step"], residual=residual)
      what = f"warning: HOSS resolves its macro time badly (residual {float(residual):.2f} of the gradient)"
      self.say(f"{what}; a larger --hoss_rank or a smaller --matrix_lr is more exact")
    share = record["data_wait_ms"] / record["step_ms"]
    if share > WAIT_LIMIT and len(self.meter.laps) > 1 and not self.events("slow_data"):
      self.event("slow_data", record["step"], share=share)
      self.say(f"warning: {100 * share:.0f}% of the time goes into waiting for data; try more --data_threads")

  def log_validation(self, step: int, score: Score, seconds: float, unigram: Score | None) -> None:
    """Writes and shows a validation; `unigram` is the baseline, given with the first one."""
    tokens = step * self._plan.tokens_per_step
    record = {
      "step": step,
      "val_bpb": score.bits_per_byte,
      "nats_per_token": score.nats_per_token,
      "tokens": tokens,
      "flops": step * self.summary["budget"]["flops_per_step"],
      "seconds": seconds,
    }
    self._try(self._log.write, record)
    baseline = ""
    if unigram is not None:
      self.summary["results"]["unigram_bpb"] = unigram.bits_per_byte
      self.summary["data"]["bytes_per_token"] = score.bytes / score.tokens
      baseline = f" (unigram baseline {unigram.bits_per_byte:.4f})"
    self.say(f"step {step}: validation {score.bits_per_byte:.4f} bits per byte{baseline}")

  def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
    """Records samples and writes `samples.txt` anew."""
    for sample in samples:
      self.event("sample", step, prompt=sample.prompt, text=sample.text)
    self._try(self._directory.write, "samples.txt", samples_text(self._log.records))

  def write_summary(self, steps_done: int, epochs_seen: float) -> None:
    """Writes `summary.json` and `run.md` from what is known now."""
    self.summary["results"] |= summaries.from_records(self._log.records) | self.meter.totals()
    self.summary["results"]["steps_done"] = steps_done
    step_ms = self.summary["results"]["step_ms"]
    self.summary["results"]["mfu"] = self._plan.utilisation(step_ms["p50"] / 1e3) if step_ms else None
    tokens = steps_done * self._plan.tokens_per_step
    self.summary["data"] |= {"epochs_seen": epochs_seen, "tokens_seen": tokens}
    self._try(summaries.write, self._directory, self.summary, self._log.select("loss"))

  def finish(self, status: str, error: str | None) -> None:
    """Sets how the run ended; the summary is still to be written."""
    self.meter.pause()
    self._console.close()
    self.summary["status"] = status
    self.summary["error"] = self.failures[0].error if error is None and self.failures else error
    self.summary["meta"]["ended"] = utc_now()

  def say_goodbye(self, step: int) -> None:
    """The final table, a sample, where everything is, and what to do next."""
    self.say(f"\n{summaries.final_table(self.summary)}")
    for warning in summaries.schedule_warnings(self.summary):
      self.say(f"warning: {warning.error}\n    fix: {warning.fix}")
    for record in self.events("sample", step)[:1]:
      self.say(f"\nsample: {record['prompt']}{record['text']}")
    self.say(f"\nartifacts in {self._directory.path}")
    for what, text in summaries.next_commands(self.summary):
      self.say(f"{what + ':':<14}{text}")
    for failure in self.failures[:SHOWN]:
      self.say(str(failure))
    if len(self.failures) > SHOWN:
      self.say(f"and {len(self.failures) - SHOWN} more problems like these, see the events in metrics.jsonl")

  def close(self) -> None:
    self._log.close()
