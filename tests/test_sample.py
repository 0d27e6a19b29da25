"""train.sample: stop strings, streaming, overflow, determinism and every message, on a tiny saved run."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mgr_jax.config import GPTConfig
from mgr_jax.conformance import noisy_params
from mgr_jax.data import tokenizer as tokenizers
from mgr_jax.model.generate import Sampling, generate, row_keys
from train import checkpoint, cli, identity, sample

TOKENIZER = tokenizers.bytes_tokenizer()
CFG = GPTConfig(vocab_size=TOKENIZER.vocab_size, seq_len=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)


@struct.dataclass
class Saved:
  step: jax.Array
  params: dict


@pytest.fixture(scope="module")
def params():
  return noisy_params(jax.random.key(1), CFG)


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs")
  meta = identity.make_meta(CFG, {}, tokenizer_sha256=TOKENIZER.sha256, data_sha256="0" * 64, run_id="tiny")
  checkpoints = checkpoint.Checkpoints(directory / "tiny" / checkpoint.SUBDIRECTORY)
  checkpoints.save(5, Saved(jnp.int32(5), params), {}, meta)
  checkpoints.close()
  tokenizers.save(TOKENIZER, directory / "tiny" / tokenizers.FILE_NAME)
  return directory


@pytest.fixture
def run(workdir, capsys, monkeypatch):
  """Runs the program; returns (exit code, stdout, stderr)."""

  def run(*arguments, stdin="", ckpt="tiny"):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    argv = ["sample", f"--workdir={workdir}", *([f"--ckpt={ckpt}"] if ckpt else []), *arguments]
    code = cli.execute(sample.main, argv, sample.FLAGS)
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return run


def test_greedy_text_is_what_the_library_generates(run, params):
  code, out, err = run("--prompt=hello", "--temperature=0", "--max_tokens=16", "--json", "--logprobs")
  assert code == 0, err
  record = json.loads(out)
  prompt = TOKENIZER.encode("hello")[None]
  expected = generate(params, prompt, CFG, jax.random.key(0), 16, temperature=0)[0].tolist()
  assert record["tokens"] == expected[: len(record["tokens"])]
  assert record["ended"] == "length" and len(record["tokens"]) == 16
  assert record["text"] == TOKENIZER.decode(expected)
  assert len(record["logprobs"]) == 16 and max(record["logprobs"]) < 0
  assert "tiny step 5 | prompt 6 tokens" in err and "sample 16 tokens" in err
  assert "64 bytes per token of context" in err  # one head of 8 keys and 8 values in float32


def test_samples_are_numbered_rows_with_their_own_randomness(run, params):
  arguments = ("--prompt=ab", "--prompt=longer prompt", "--num_samples=2", "--seed=3", "--max_tokens=16", "--json")
  records = [json.loads(line) for line in run(*arguments)[1].splitlines()]
  assert [r["prompt"] for r in records] == ["ab", "ab", "longer prompt", "longer prompt"]
  assert len({tuple(r["tokens"]) for r in records}) == 4
  keys = row_keys(jax.random.key(3), 4)
  for n, record in enumerate(records):
    prompt = TOKENIZER.encode(record["prompt"])[None]
    alone = generate(params, prompt, CFG, keys[n : n + 1], 16)[0].tolist()
    assert alone[: len(record["tokens"])] == record["tokens"]
  assert [json.loads(line) for line in run(*arguments)[1].splitlines()] == records


def test_prompts_come_from_a_file_and_from_a_pipe(tmp_path, monkeypatch):
  def read(*arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n\n"))
    sample.FLAGS.unparse_flags()
    sample.FLAGS(["sample", *arguments])
    return sample.read_prompts()

  (tmp_path / "prompt.txt").write_text("from a file\n", "utf-8")
  file = f"--prompt_file={tmp_path / 'prompt.txt'}"
  assert read() == ["from a pipe\n"]
  assert read("--prompt=flag", file) == ["flag", "from a file"]


def test_streaming_prints_the_same_text(run):
  arguments = ("--prompt=hello", "--max_tokens=24", "--seed=2")
  streamed, plain = run(*arguments, "--stream=on")[1], run(*arguments, "--stream=off")[1]
  assert streamed == plain and plain.startswith("hello")


def drive(text: bytes, stops=()):
  """A row fed byte by byte, and what it showed after each."""
  row = sample.Row("", TOKENIZER, stops)
  shown = []
  for token in (byte + len(tokenizers.SPECIALS) for byte in text):
    row.take(token, -1.0)
    shown.append(row.unread())
  return row, shown


def test_incomplete_characters_are_held_back():
  row, shown = drive("aé€".encode())
  assert shown == ["a", "", "é", "", "", "€"]
  row, shown = drive("€".encode()[:2])
  assert shown == ["", ""]
  row.end("length")
  assert row.unread() == "�" == row.text


def test_a_stop_string_may_span_tokens_and_is_not_shown():
  row, shown = drive(b"one\n\ntwo", stops=["\n\n", "zzz"])
  assert row.text == "one" == "".join(shown)
  assert (row.ended, len(row.ids)) == ("stop", 5)
  row, _ = drive(b"aab", stops=["aaab", "ab"])
  assert (row.ended, row.text) == ("stop", "a")
  row, shown = drive(b"a\nb\n", stops=["\n\n"])
  assert shown == ["a", "", "\nb", ""] and row.ended is None
  row.end("length")
  assert row.text == "a\nb\n"


def test_the_end_of_the_document_ends_a_sample():
  row, _ = drive(b"ab")
  row.take(TOKENIZER.bos_id, -0.5)
  row.take(70, -0.5)
  assert (row.ended, row.text, row.ids[-1]) == ("document", "ab", TOKENIZER.bos_id)


def test_stop_strings_cut_what_is_generated(run):
  arguments = ("--prompt=hello", "--max_tokens=24", "--seed=2", "--json")
  whole = json.loads(run(*arguments)[1])["text"]
  stop = next(whole[n : n + 2] for n in range(3, 23) if whole[n : n + 2].isascii())
  record = json.loads(run(*arguments, f"--stop={stop}")[1])
  assert record["ended"] == "stop"
  assert record["text"] == whole[: whole.index(stop)]


def continued(params, prompts, max_tokens, seed=0):
  """Rows that never end before `max_tokens`: no token stands for the end of a document."""
  rows = [sample.Row(prompt, TOKENIZER) for prompt in prompts]
  for row in rows:
    row._tokenizer = dataclasses.replace(TOKENIZER, bos_id=-1)
  sampler = sample.Sampler(params, CFG, Sampling(temperature=1.5), seed, stop_token=-1)
  sampler.run(rows, max_tokens)
  return rows, sampler


def test_a_window_slides_each_row_when_it_is_full(params):
  long, short = "x" * 50, "y"
  rows, sampler = continued(params, [long, short], 100)
  assert [row.ended for row in rows] == ["length", "length"]
  assert [len(row.ids) for row in rows] == [100, 100]
  alone, _ = continued(params, [long], 100)
  assert alone[0].ids == rows[0].ids
  assert sampler.prompt_tokens > 100 and sampler.steps == 100


def test_randomness_goes_on_when_the_window_slides(params):
  """With flat logits a token depends on its key alone: restarting positions would repeat the text."""
  flat = {**params, "head": jnp.zeros_like(params["head"])}
  rows, _ = continued(flat, ["x" * 50], 100)
  ids = np.array(rows[0].ids)
  repeats = [shift for shift in range(1, 80) if (ids[shift:] == ids[:-shift]).mean() > 0.5]
  assert not repeats


def test_window_mode_is_the_same_as_none_while_nothing_overflows(run):
  arguments = ("--prompt=hello", "--max_tokens=24", "--seed=4")
  assert run(*arguments, "--on_overflow=window")[1] == run(*arguments)[1]


def test_window_mode_accepts_what_error_mode_refuses(run):
  arguments = ("--prompt=" + "z" * 70, "--max_tokens=10", "--json")
  code, _, err = run(*arguments)
  assert code == 2
  assert "the prompt of 71 tokens and --max_tokens=10 exceed the context of 64 tokens" in err
  assert "fix: use a shorter prompt, or --on_overflow=window" in err
  code, out, _ = run(*arguments, "--on_overflow=window")
  assert code == 0 and len(json.loads(out)["tokens"]) == 10


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--prompt="], "the prompt is empty"),
    ([], "the prompt is empty"),
    (["--prompt=a", "--temperature=-1"], "--temperature=-1.0 is negative"),
    (["--prompt=a", "--top_p=0"], "--top_p=0.0 is not in (0, 1]"),
    (["--prompt=a", "--max_tokens=0"], "--max_tokens=0 is below 1"),
    (["--prompt=a", "--max_tokens=63"], "--max_tokens=62"),
    (["--prompt=a", "--num_samples=0"], "--num_samples=0 is below 1"),
    (["--prompt=a", "--stop="], "--stop is empty"),
    (["--prompt=a", "--stream=on", "--json"], "--stream=on"),
    (["--prompt=a", "--logprobs"], "--logprobs has no effect"),
    (["--prompt=a", "--temperature=0", "--top_k=3"], "--top_k without effect"),
    (["--prompt=a", "--temprature=1"], "--temperature"),
    (["--prompt=a\udcff"], "not UTF-8: byte at character 1"),
    (["--prompt=a", "--prompt_file=missing.txt"], "cannot read --prompt_file=missing.txt"),
  ],
)
def test_mistakes_name_a_way_out(run, arguments, named):
  code, out, err = run(*arguments)
  assert (code, out) == (2, "")
  assert named in err and "error: " in err and "fix: " in err and "Traceback" not in err


def test_all_mistakes_are_reported_together(run):
  _, _, err = run("--temperature=-1", "--max_tokens=0", ckpt="")
  assert [text in err for text in ("no --ckpt", "the prompt is empty", "--temperature=-1.0", "--max_tokens=0")] == [
    True
  ] * 4


def test_unknown_runs_and_steps_name_what_there_is(run):
  code, _, err = run("--prompt=a", ckpt="tinny")
  assert code == 2 and "'tinny'" in err and "tiny" in err
  code, _, err = run("--prompt=a", ckpt="tiny@7")
  assert code == 2 and "no step 7" in err and "5" in err


def test_a_tokenizer_that_is_not_the_runs_own_is_refused(workdir, run, tmp_path):
  other = tokenizers.train_bpe(["some text, some more text"], 300)
  (workdir / "other").mkdir()
  (workdir / "other" / checkpoint.SUBDIRECTORY).symlink_to(workdir / "tiny" / checkpoint.SUBDIRECTORY)
  tokenizers.save(other, workdir / "other" / tokenizers.FILE_NAME)
  code, _, err = run("--prompt=a", ckpt="other")
  assert code == 2 and other.sha256 in err and TOKENIZER.sha256 in err
