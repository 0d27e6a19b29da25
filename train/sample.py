"""Continues text with a trained model.

  python -m train.sample --ckpt=RUN --prompt="def main("
  echo "Once upon a time" | python -m train.sample --ckpt=RUN@1000 --num_samples=3 --stop="The End"

A prompt comes from --prompt, --prompt_file or a pipe; the last line end of the latter two is left out. Text goes to
stdout, figures to stderr. A sample ends at --max_tokens, before a --stop string, or where the model ends the document.
"""

import codecs
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from mgr_jax.config import GPTConfig
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.model import generate, gpt
from mgr_jax.model.generate import Sampling
from mgr_jax.problems import Problem, UserError, raise_if_any
from train import cli
from train.console import compact
from train.metrics import dumps

FLAGS = flags.FlagValues()
CHUNK = 16  # tokens between looks at the text
_SAMPLING = Sampling()


def _define(kind: str, name: str, default, help_text: str, *choices) -> None:
  getattr(flags, f"DEFINE_{kind}")(name, default, *choices, help_text, flag_values=FLAGS)


_define("string", "ckpt", "", "Run id in --workdir, or path of a run; @STEP picks a checkpoint. Required.")
_define("string", "workdir", "artifacts", "Directory that holds the runs.")
_define("multi_string", "prompt", [], "Text to continue; may be given several times.")
_define("string", "prompt_file", "", "File with one more text to continue.")
_define("integer", "max_tokens", 128, "Most tokens of a sample.")
_define("float", "temperature", _SAMPLING.temperature, "Divides the logits; 0 = always the most probable token.")
_define("integer", "top_k", _SAMPLING.top_k, "Keep this many most probable tokens; 0 = all.")
_define("float", "top_p", _SAMPLING.top_p, "Keep the fewest most probable tokens with this much probability.")
_define("float", "min_p", _SAMPLING.min_p, "Keep tokens with this share of the most probable one's probability.")
_define("float", "repetition_penalty", _SAMPLING.repetition_penalty, "Above 1 = what occurred becomes less likely.")
_define("integer", "num_samples", 1, "Samples per prompt.")
_define("integer", "seed", 0, "Seed; sample number n of a call depends on the seed, n and its prompt alone.")
_define("multi_string", "stop", [], "Text before which a sample ends; may be given several times.")
_define("enum", "stream", "auto", "Print text as it comes; auto = for one sample on a terminal.", ["auto", "on", "off"])
_define("boolean", "json", False, "Print one JSON object per sample.")
_define("boolean", "logprobs", False, "Add the model's log-probability of each token to the JSON.")
_OVERFLOW = "Prompt and sample exceed the context: error, or window = forget the beginning."
_define("enum", "on_overflow", "error", _OVERFLOW, ["error", "window"])


class Row:
  """One sample: its ids, and its text as far as later tokens cannot change it."""

  def __init__(self, prompt: str, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self.prompt = prompt
    self.prompt_ids = tokenizer.encode(prompt)
    self.ids: list[int] = []
    self.logprobs: list[float] = []
    self.text = ""
    self._read = 0
    self.ended: str | None = None  # by a "stop" string, the end of the "document", or "length"
    self._tokenizer = tokenizer
    self._stops = [stop.encode() for stop in stops]
    self._held = b""
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  @property
  def context(self) -> np.ndarray:
    return np.concatenate([self.prompt_ids, np.array(self.ids, np.int32)])

  def take(self, token: int, logprob: float) -> None:
    """Appends one token, unless the sample has ended."""
    if self.ended:
      return
    self.ids.append(token)
    self.logprobs.append(logprob)
    if token == self._tokenizer.bos_id:
      return self.end("document")
    self._held += self._tokenizer.decode_bytes([token])
    found = [self._held.find(stop) for stop in self._stops if stop in self._held]
    if found:
      self._held = self._held[: min(found)]
      return self.end("stop")
    beginnings = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
    self._release(len(self._held) - max(beginnings, default=0))

  def end(self, reason: str) -> None:
    """Ends the sample, unless it has ended; an incomplete character becomes U+FFFD."""
    if not self.ended:
      self.ended = reason
      self._release(len(self._held), final=True)

  def unread(self) -> str:
    """The text that came since the last call."""
    new, self._read = self.text[self._read :], len(self.text)
    return new

  def _release(self, n_bytes: int, final: bool = False) -> None:
    self.text += self._decoder.decode(self._held[:n_bytes], final)
    self._held = self._held[n_bytes:]


class Sampler:
  """Extends rows together, and counts tokens and seconds; compilation is counted on its own."""

  def __init__(self, params, cfg: GPTConfig, sampling: Sampling, seed: int, stop_token: int):
    self._params = params
    self._cfg = cfg
    self._sampling = sampling
    self._key = jax.random.key(seed)
    self._stop_token = stop_token
    self._chunk = max(1, min(CHUNK, cfg.seq_len // 2))
    self.prompt_tokens = self.tokens = self.steps = 0
    self.prompt_s = self.decode_s = self.compile_s = 0.0

  def run(self, rows: Sequence[Row], max_tokens: int, show: Callable[[], None] = lambda: None) -> None:
    """Extends each row by at most `max_tokens` tokens and ends it; calls `show` after every few.

    A row about to exceed the context goes on from its last `seq_len // 2` tokens, at the cost of one more prefill of
    all rows.
    """
    keys = generate.row_keys(self._key, len(rows))
    longest = max(len(row.prompt_ids) for row in rows)
    max_len = generate.bucket(min(longest + max_tokens, self._cfg.seq_len))
    begins, state, drawn = None, None, 0
    while drawn < max_tokens and not all(row.ended for row in rows):
      limit = min(self._chunk, max_tokens - drawn)
      needed = [self._begin(row, begin, limit) for row, begin in zip(rows, begins or [0] * len(rows), strict=True)]
      if needed != begins:
        begins = needed
        fresh = self._prefill([row.context[begin:] for row, begin in zip(rows, begins, strict=True)], max_len)
        # The randomness goes on where it was, and so does the memory of what occurred.
        state = state.replace(model=fresh.model, logits_BV=fresh.logits_BV) if state else self._warm(fresh, keys)
      start = time.perf_counter()
      ids, logprobs, state = self._extend(state, keys, limit)
      for row, row_ids, row_logprobs in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
        for token, logprob in zip(row_ids, row_logprobs, strict=True):
          row.take(token, logprob)
      self.decode_s += time.perf_counter() - start
      drawn += limit
      show()
      state = state.replace(done_B=np.array([row.ended is not None for row in rows]))
    for row in rows:
      row.end("length")
    show()
    self.steps += drawn
    self.tokens += sum(len(row.ids) for row in rows)

  def _begin(self, row: Row, begin: int, limit: int) -> int:
    """Where the window of a row has to begin so that `limit` more tokens fit."""
    length = len(row.prompt_ids) + len(row.ids)
    fits = row.ended or length - begin + limit <= self._cfg.seq_len
    return begin if fits else length - max(1, self._cfg.seq_len // 2)

  def _prefill(self, contexts: Sequence[np.ndarray], max_len: int) -> generate.GenerationState:
    lengths = [len(context) for context in contexts]
    padded = np.array([np.pad(context, (0, max(lengths) - len(context))) for context in contexts])
    arguments = generate.pad_prompts(padded, lengths)
    start = time.perf_counter()
    program = generate.prefill.lower(self._params, *arguments, cfg=self._cfg, max_len=max_len).compile()
    compiled = time.perf_counter()
    state = jax.block_until_ready(program(self._params, *arguments))
    self.compile_s += compiled - start
    self.prompt_s += time.perf_counter() - compiled
    self.prompt_tokens += sum(lengths)
    return state

  def _warm(self, state: generate.GenerationState, keys: jax.Array) -> generate.GenerationState:
    """Compiles the decoding loop by drawing nothing."""
    start = time.perf_counter()
    state = self._extend(state, keys, 0)[2]
    self.compile_s += time.perf_counter() - start
    return state

  def _extend(self, state: generate.GenerationState, keys: jax.Array, limit: int):
    stops = (self._stop_token,)
    ids, logprobs, state = generate.extend(
      self._params, state, keys, self._cfg, self._chunk, self._sampling, stops, limit=limit
    )
    return np.asarray(ids)[:, :limit], np.asarray(logprobs)[:, :limit], state

  def report(self) -> str:
    """One line of figures."""
    per_token, fixed = state_bytes(self._cfg)
    rate = lambda tokens, seconds: f"{tokens} tokens in {seconds:.3f} s ({compact(tokens / max(seconds, 1e-9))} tok/s)"
    state = f"{per_token:,} bytes per token of context" + (f" and {fixed:,} bytes" if fixed else "")
    return (
      f"prompt {rate(self.prompt_tokens, self.prompt_s)} | sample {rate(self.tokens, self.decode_s)},"
      f" {1e3 * self.decode_s / max(self.steps, 1):.2f} ms per step | compiled in {self.compile_s:.1f} s"
      f" | state of a row {state}"
    )


def state_bytes(cfg: GPTConfig) -> tuple[int, int]:
  """(bytes per token of context, bytes independent of it) of the decode state of one row."""

  def total(max_len: int) -> int:
    state = jax.eval_shape(lambda: gpt.init_state(cfg, 1, max_len).runs)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))

  short = generate.bucket(cfg.seq_len)
  per_token = (total(2 * short) - total(short)) // short
  return per_token, total(short) - short * per_token


def read_prompts() -> list[str]:
  """The texts of --prompt, then of --prompt_file; without both, what is piped in."""
  prompts = list(FLAGS.prompt)
  if FLAGS.prompt_file:
    try:
      prompts.append(Path(FLAGS.prompt_file).expanduser().read_text("utf-8").removesuffix("\n"))
    except (OSError, UnicodeDecodeError) as e:
      why = e.strerror if isinstance(e, OSError) else f"it is not UTF-8 ({e.reason} at byte {e.start})"
      fix = "give --prompt_file a UTF-8 text file, or use --prompt=TEXT"
      raise UserError(Problem(f"cannot read --prompt_file={FLAGS.prompt_file}: {why}", fix)) from e
  elif not prompts and not sys.stdin.isatty():
    prompts.append(sys.stdin.read().removesuffix("\n"))
  return prompts


def flag_problems(prompts: Sequence[str]) -> list[Problem]:
  """Every problem that can be seen without the model."""
  found = []
  if not FLAGS.ckpt:
    found.append(Problem("no --ckpt", "use --ckpt=RUN with the run id that train.main printed, or the path of a run"))
  if not prompts or not all(prompts):
    found.append(Problem("the prompt is empty", 'use --prompt="some text", --prompt_file=FILE, or a pipe'))
  for prompt in prompts:
    try:
      prompt.encode()
    except UnicodeEncodeError as e:  # a byte of the command line that is not UTF-8 arrives as a lone surrogate
      found.append(
        Problem(f"the prompt is not UTF-8: byte at character {e.start}", "give UTF-8 text, e.g. --prompt_file")
      )
  for name, least in (("max_tokens", 1), ("num_samples", 1), ("seed", 0)):
    if FLAGS[name].value < least:
      found.append(Problem(f"--{name}={FLAGS[name].value} is below {least}", f"use --{name}={FLAGS[name].default}"))
  if not all(FLAGS.stop):
    found.append(Problem("--stop is empty", 'leave it out, or use --stop="some text"'))
  try:
    chosen_sampling()
  except UserError as e:
    found += e.problems
  several = len(prompts) * FLAGS.num_samples > 1
  if FLAGS.stream == "on" and (several or FLAGS.json):
    why = "--json prints whole samples" if FLAGS.json else f"{len(prompts) * FLAGS.num_samples} samples were asked for"
    found.append(Problem(f"--stream=on shows one sample as it comes, but {why}", "use --stream=auto"))
  if FLAGS.logprobs and not FLAGS.json:
    found.append(Problem("--logprobs has no effect without --json", "add --json, or leave --logprobs out"))
  if FLAGS.temperature == 0:
    useless = [n for n in ("top_k", "top_p", "min_p", "num_samples") if FLAGS[n].value != FLAGS[n].default]
    if useless:
      names = ", ".join(f"--{n}" for n in useless)
      found.append(Problem(f"{names} without effect: --temperature=0 draws nothing", f"leave out {names}"))
  return found


def chosen_sampling() -> Sampling:
  return Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.min_p, FLAGS.repetition_penalty)


def overflow_problems(rows: Sequence[Row], max_tokens: int, cfg: GPTConfig) -> list[Problem]:
  """The problem that a row with `max_tokens` more tokens exceeds the context, if it does."""
  longest = max(len(row.prompt_ids) for row in rows)
  room = cfg.seq_len - longest
  if room >= max_tokens:
    return []
  fix = f"use --max_tokens={room}" if room > 0 else "use a shorter prompt"
  return [
    Problem(
      f"the prompt of {longest} tokens and --max_tokens={max_tokens} exceed the context of {cfg.seq_len} tokens",
      f"{fix}, or --on_overflow=window to forget the beginning",
    )
  ]


def as_record(row: Row) -> dict:
  """The JSON object of a sample."""
  record = {"prompt": row.prompt, "text": row.text, "tokens": row.ids, "ended": row.ended}
  return record | ({"logprobs": row.logprobs} if FLAGS.logprobs else {})


def main(argv: list[str]) -> None:
  del argv
  prompts = read_prompts()
  raise_if_any(flag_problems(prompts))
  from train import runs  # slow to import, and not needed to explain a wrong flag

  run = runs.load_run(FLAGS.ckpt, FLAGS.workdir)
  rows = [Row(prompt, run.tokenizer, FLAGS.stop) for prompt in prompts for _ in range(FLAGS.num_samples)]
  if FLAGS.on_overflow == "error":
    raise_if_any(overflow_problems(rows, FLAGS.max_tokens, run.cfg))
  one_text = len(rows) == 1 and not FLAGS.json
  stream = one_text and (FLAGS.stream == "on" or (FLAGS.stream == "auto" and sys.stdout.isatty()))
  write = lambda text: print(text, end="", flush=True)
  if stream:
    write(rows[0].prompt)
  sampler = Sampler(run.params, run.cfg, chosen_sampling(), FLAGS.seed, run.tokenizer.bos_id)
  sampler.run(rows, FLAGS.max_tokens, show=lambda: write(rows[0].unread()) if stream else None)
  if stream:
    write("\n")
  for n, row in enumerate(rows if not stream else ()):
    heading = f"--- sample {n + 1} of {len(rows)} ---\n" if len(rows) > 1 else ""
    write(dumps(as_record(row)) + "\n" if FLAGS.json else f"{heading}{row.prompt}{row.text}\n")
  print(f"{FLAGS.ckpt} step {run.step} | {sampler.report()}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main, FLAGS)
