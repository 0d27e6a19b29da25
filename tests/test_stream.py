"""The stream of batches loses no token, resumes exactly, and does not depend on threads, batch size or devices."""

import itertools
import json
import random
import subprocess
import sys

import grain
import numpy as np
import pytest

from mgr_jax.data import corpus, parquet, stream, tokenizer
from mgr_jax.data.order import EpochOrder, random_words
from mgr_jax.data.pack import PackStream, window_batch
from mgr_jax.problems import UserError

TOK = tokenizer.bytes_tokenizer()
BOS = TOK.bos_id


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Two hundred numbered documents of 10 to 130 tokens, 160 of them for training in 16 units of several row groups."""
  directory = tmp_path_factory.mktemp("data")
  texts = [f"{i:04d} " + "abcdefgh"[i % 8] * (5 + i * 37 % 120) for i in range(200)]
  for shard in range(5):
    part = texts[shard * 40 : shard * 40 + 40]
    parquet.write_shard(directory / f"shard_{shard}.parquet", part, rows_per_group=12 if shard % 2 else 30)
  return corpus.load_corpus(directory)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
  monkeypatch.setattr(corpus.Corpus.units, "__defaults__", (12,))


def batches(data, n, *, seq_len=32, batch_size=3, seed=0, **options):
  options = {"shuffled_windows": 1} | options  # the order of the packed stream itself
  with stream.train_iterator(data, TOK, seq_len=seq_len, batch_size=batch_size, seed=seed, **options) as it:
    return [next(it) for _ in range(n)]


def rows(found):
  return {key: np.concatenate([batch[key] for batch in found]) for key in found[0]}


def global_stream(data, seed, n):
  """The first n tokens in the order of `EpochOrder`, packed by a plain loop."""
  order = EpochOrder(data.units("train"), seed)
  tokens = []
  for place in itertools.count():
    for text in order[place]:
      tokens += [BOS, *(9 + byte for byte in text.encode())]
    if len(tokens) >= n:
      return np.array(tokens[:n], np.int32)


def equal(a, b):
  return len(a) == len(b) and all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


# Packing


def test_no_transition_is_lost_or_repeated(data):
  found = rows(batches(data, 150))
  expected = global_stream(data, 0, 150 * 3 * 32 + 1)
  assert np.array_equal(found["tokens"].ravel(), expected[:-1])
  assert np.array_equal(found["targets"].ravel(), expected[1:])
  assert (found["weights"] == 1).all()
  # Windows that do not share a token would miss every transition between them.
  disjoint = expected[: len(expected) // 33 * 33].reshape(-1, 33)
  assert not np.array_equal(disjoint[:, 1:].ravel(), expected[1 : 1 + disjoint[:, 1:].size])


def test_layout_of_a_batch(data):
  found = rows(batches(data, 40))
  for key, dtype in {"tokens": "i4", "targets": "i4", "segment_ids": "i4", "positions": "i4", "weights": "f4"}.items():
    assert found[key].shape == (120, 32) and found[key].dtype == dtype
  for tokens, segments, positions in zip(found["tokens"], found["segment_ids"], found["positions"], strict=True):
    segment, position = 0, 0
    for t in range(32):
      new = t == 0 or tokens[t] == BOS
      segment, position = (segment + 1, 0) if new else (segment, position + 1)
      assert (segments[t], positions[t]) == (segment, position)
  assert found["segment_ids"].max() > 2


def test_absent_targets_have_no_weight_and_no_segment():
  windows = np.array([[BOS, 9, 10, BOS, 11]], np.int32)
  found = window_batch(windows, BOS, present=np.array([[True, True, True, False]]))
  assert found["weights"].tolist() == [[1, 1, 1, 0]]
  assert found["segment_ids"].tolist() == [[1, 1, 1, 0]]
  assert found["targets"].tolist() == [[9, 10, BOS, 11]]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1, 1), (0, 3, 0, 0, 70, 1), (65, 0, 64, 2), ()])
def test_packing_arrays_of_any_size(sizes, seq_len):
  ends = np.cumsum((0, *sizes))
  arrays = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]
  packed = PackStream(grain.MapDataset.source(arrays).to_iter_dataset(), seq_len)
  windows = list(packed)
  assert len(windows) == max(0, (ends[-1] - 1) // seq_len)
  for i, window in enumerate(windows):
    assert np.array_equal(window, np.arange(i * seq_len, (i + 1) * seq_len + 1))
  if windows:
    grain.experimental.assert_equal_output_after_checkpoint(packed)


# Order


def test_every_epoch_holds_every_document_once_in_another_order(data):
  units = data.units("train")
  order = EpochOrder(units, seed=3)
  epochs = [[t for place in range(e * len(units), (e + 1) * len(units)) for t in order[place]] for e in range(3)]
  whole = sorted(t for i in range(len(units)) for t in units[i])
  assert len(whole) == 160
  assert [sorted(epoch) for epoch in epochs] == [whole] * 3
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert epochs[0] != [t for i in range(len(units)) for t in units[i]]
  again, other = EpochOrder(data.units("train"), seed=3), EpochOrder(units, seed=4)
  assert [again[i] for i in range(len(units))] == [order[i] for i in range(len(units))]
  assert [other[i] for i in range(len(units))] != [order[i] for i in range(len(units))]


def test_a_row_group_is_read_once_per_epoch(data, monkeypatch):
  reads = []
  read_group = parquet._read_group
  monkeypatch.setattr(parquet, "_read_group", lambda *a: (reads.append(a[:2]), read_group(*a))[1])
  units = data.units("train", 4)
  order = EpochOrder(units, seed=0)
  for place in range(len(units)):
    order[place]
  assert len(reads) == len(set(reads)) < len(units)
  reads.clear()
  for unit in np.argsort(random_words(len(units), 0)):  # units shuffled without regard to their groups
    units[unit]
  assert len(reads) > len(set(reads))


def test_random_words_never_change():
  assert random_words(3, 0, 1, 2).tolist() == random_words(5, 0, 1, 2)[:3].tolist()
  assert random_words(2, 7).tolist() == RANDOM_WORDS
  words = random_words(20_000, 5)
  assert len(set(words.tolist())) == 20_000
  bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(0)
  assert abs(bits - 0.5).max() < 0.02
  assert len({random_words(1, *s)[0] for s in itertools.product(range(5), repeat=3)}) == 125


RANDOM_WORDS = [0xB8B4C2977EABCE45, 0xA65305FD338EC8FE]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_change_nothing(data, threads):
  runs = [batches(data, 60, threads=n, shuffled_windows=16) for n in (threads, 2)]
  assert equal(*runs)


def test_blocks_of_windows_are_shuffled_without_losing_one(data):
  plain = rows(batches(data, 64))
  mixed = rows(batches(data, 64, shuffled_windows=24))
  windows = lambda found, block: [tuple(row) for row in found["targets"][block * 24 : block * 24 + 24]]
  for block in range(64 * 3 // 24):
    assert sorted(windows(plain, block)) == sorted(windows(mixed, block))
    assert windows(plain, block) != windows(mixed, block)
  assert equal(batches(data, 64, shuffled_windows=24), batches(data, 64, shuffled_windows=24))
  first, other = (batches(data, 8, shuffled_windows=24, seed=0), batches(data, 8, shuffled_windows=24, seed=1))
  assert not equal(first, other)


def test_batch_size_changes_nothing(data):
  a, b = rows(batches(data, 40, batch_size=3)), rows(batches(data, 15, batch_size=8))
  assert all(np.array_equal(a[key], b[key]) for key in a)
  assert not np.array_equal(a["tokens"], rows(batches(data, 40, seed=1))["tokens"])


def documents_of(found):
  """The numbers of the documents that start in these batches."""
  text = "".join(chr(t - 9) if t > 8 else "\0" for t in rows(found)["tokens"].ravel())
  return [part[:4] for part in text.split("\0")[1:] if len(part) >= 4]


def test_processes_see_disjoint_documents(data):
  units = len(data.units("train"))
  assert units == 16
  own = []
  for p in range(2):
    order = EpochOrder(data.units("train"), 0, p, 2)
    own.append([text[:4] for place in range(units // 2) for text in order[place]])
    options = {"process_index": p, "process_count": 2, "shuffled_windows": 1}
    with stream.train_iterator(data, TOK, seq_len=32, batch_size=1, seed=0, **options) as it:
      found = [next(it) for _ in range(250)]
      assert 1 < it.epoch < 3
    assert documents_of(found)[: len(own[p])] == own[p]
  assert not set(own[0]) & set(own[1]) and len(own[0] + own[1]) == 160
  alone = EpochOrder(data.units("train"), 0)  # what each would read that believed to be alone
  assert {text[:4] for place in range(units // 2) for text in alone[place]} & set(own[1])


# Resuming


def test_resume_at_twenty_random_points(data):
  n = 130
  states, found = [], []
  options = {"seq_len": 32, "batch_size": 3, "seed": 5, "shuffled_windows": 16}
  with stream.train_iterator(data, TOK, **options) as it:
    states.append(it.get_state())
    for _ in range(n):
      found.append(next(it))
      states.append(it.get_state())
  assert max(len(json.dumps(state)) for state in states) < 400
  with stream.train_iterator(data, TOK, **options, threads=1) as it:
    for k in [0, *random.Random(0).sample(range(1, n - 3), 19)]:
      assert it.set_state(json.loads(json.dumps(states[k]))) == 0
      assert it.get_state() == states[k]
      assert equal([next(it) for _ in range(3)], found[k : k + 3]), k
      assert it.get_state() == states[k + 3]
    it.set_state(states[10])
    assert not equal([next(it)], [found[11]])  # the state of a prefetched batch instead of the last one given


def test_resume_with_another_batch_size_continues_the_stream(data):
  options = {"seq_len": 32, "seed": 0, "shuffled_windows": 1}
  with stream.train_iterator(data, TOK, batch_size=4, **options) as it:
    for _ in range(6):
      next(it)
    state = it.get_state()
  with stream.train_iterator(data, TOK, batch_size=2, **options) as it:
    it.set_state(state)
    assert np.array_equal(next(it)["tokens"].ravel(), global_stream(data, 0, 26 * 32)[24 * 32 :])


def test_other_streams_are_refused(data, tmp_path):
  for i in range(2):
    parquet.write_shard(tmp_path / f"{i}.parquet", ["other " * 30] * 40)
  other_data = corpus.load_corpus(tmp_path)
  other_tok = tokenizer.train_bpe(["abc"], 265)
  state = {}

  def resume(data, tok, seed, strict):
    with stream.train_iterator(data, tok, seq_len=16, batch_size=2, seed=seed) as it:
      fresh = next(it)
      if not state:
        state.update(it.get_state())
      skipped = it.set_state(state, strict)
      return fresh, next(it), skipped

  resume(data, TOK, 0, True)
  with pytest.raises(UserError) as e:
    resume(other_data, other_tok, 1, True)
  for part in (data.sha256, other_data.sha256, TOK.sha256, other_tok.sha256, "saved 0, now 1", "--resume_strict=false"):
    assert part in str(e.value)
  assert len(e.value.problems) == 3
  fresh, resumed, skipped = resume(other_data, TOK, 1, False)
  assert equal([fresh], [resumed]) and skipped == 0


@pytest.mark.parametrize("windows", [1, 7, 16])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_resume_with_another_number_of_processes(data, before, after, windows):
  options = {"seq_len": 16, "batch_size": 2, "seed": 0, "shuffled_windows": windows}
  states, steps = [], [23, 30, 26][:before]
  for p, n in enumerate(steps):
    with stream.train_iterator(data, TOK, **options, process_index=p, process_count=before) as it:
      for _ in range(n):
        next(it)
      states.append(it.get_state())
  order = EpochOrder(data.units("train"), 0)
  lengths = [sum(map(len, TOK.encode_batch(order[place]))) for place in range(40)]
  # Each process has read on to the end of its block, one token beyond it for the last target.
  read = [-(-2 * n // windows) * windows * 16 for n in steps]
  begun = [int(np.searchsorted(np.cumsum(lengths[p::before]), read[p], side="right")) + 1 for p in range(before)]
  start = max((k * before + p for p, k in enumerate(begun)))

  firsts = []
  for p in range(after):
    with stream.train_iterator(data, TOK, **options, process_index=p, process_count=after) as it:
      with pytest.raises(UserError) as e:
        it.set_state(states)
      for part in (f"saved {before}, now {after}", "--resume_strict=false"):
        assert part in str(e.value)
      skipped = it.set_state(states, strict=False)
      place = it.get_state()["unit"] * after + p
      assert place >= start > place - after  # nothing is read twice, and no unit is left out
      firsts.append(place)
      first = np.concatenate(TOK.encode_batch(order[place]))
      if windows == 1:
        assert np.array_equal(next(it)["tokens"][0], first[:16])
  assert sorted(firsts) == list(range(start, start + after))
  assert skipped == sum(sum(lengths[p:start:before]) - n * 2 * 16 - 1 for p, n in enumerate(steps))
  if before > 1:
    with stream.train_iterator(data, TOK, **options) as it, pytest.raises(UserError, match=f"{before} were saved"):
      it.set_state(states[:1], strict=False)


def test_own_state_is_found_among_all(data):
  states = []
  for p in range(2):
    with stream.train_iterator(data, TOK, seq_len=16, batch_size=2, seed=0, process_index=p, process_count=2) as it:
      next(it)
      states.append(it.get_state())
      expected = next(it)
  with stream.train_iterator(data, TOK, seq_len=16, batch_size=2, seed=0, process_index=1, process_count=2) as it:
    it.set_state(states)
    assert equal([next(it)], [expected])
    with pytest.raises(UserError, match="process 1"):
      it.set_state(states[0])


# Validation


def total(found):
  """A sum over targets that depends on what precedes each, as a loss does, and the number of targets."""
  per_target = (batch["weights"] * np.sin(batch["tokens"] * 31.0 + batch["targets"]) for batch in found)
  return sum(float(x.sum(dtype=np.float64)) for x in per_target), sum(float(b["weights"].sum()) for b in found)


@pytest.mark.parametrize("val_tokens", [1, 32, 777, 10**6])
def test_validation_does_not_depend_on_batch_size_or_processes(data, val_tokens):
  def run(batch_size, process_count=1, seq_len=32):
    parts = [
      list(
        stream.validation_batches(
          data,
          TOK,
          seq_len=seq_len,
          batch_size=batch_size,
          val_tokens=val_tokens,
          process_index=p,
          process_count=process_count,
        )
      )
      for p in range(process_count)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(batch["tokens"].shape == (batch_size, seq_len) for part in parts for batch in part)
    return total([batch for part in parts for batch in part])

  value, count = run(2)
  assert count == min(val_tokens, sum(map(len, TOK.encode_batch(list(parquet.iter_texts(data.val[0]))))) - 1)
  for other in (run(8), run(1, 2), run(4, 3), run(3, 1, 17)):
    assert other[1] == count
    assert other[0] == pytest.approx(value, rel=1e-5)


def test_validation_is_the_same_each_time_and_padding_matters(data):
  found = stream.validation_batches(data, TOK, seq_len=32, batch_size=8, val_tokens=777)
  first, second = list(found), list(found)
  assert equal(first, second) and len(found) == len(first)
  again = stream.validation_batches(data, TOK, seq_len=32, batch_size=8, val_tokens=777)
  assert equal(first, list(again))
  last = first[-1]
  assert (last["segment_ids"] == 0).sum() == (last["weights"] == 0).sum() > 0
  assert (last["tokens"] < TOK.vocab_size).all()
  unweighted = [batch | {"weights": np.ones_like(batch["weights"])} for batch in first]
  assert total(unweighted)[0] != pytest.approx(total(first)[0], rel=1e-5)
  tokens = np.concatenate(TOK.encode_batch(list(parquet.iter_texts(data.val[0]))))[:778]
  assert np.array_equal(found.tokens, tokens)


# Mistakes and estimates


def test_a_split_shorter_than_a_batch(tmp_path):
  for i in range(2):
    parquet.write_shard(tmp_path / f"{i}.parquet", ["a" * 99] * 5)
  data = corpus.load_corpus(tmp_path)  # 500 training tokens
  with pytest.raises(UserError) as e:
    stream.train_iterator(data, TOK, seq_len=100, batch_size=8, seed=0)
  for part in ("500 tokens", "8 x 100", "801", "--batch_size=4", "--seq_len=62"):
    assert part in str(e.value)
  for seq_len, batch_size in ((100, 4), (62, 8)):
    assert batches(data, 2, seq_len=seq_len, batch_size=batch_size)
  for seq_len, batch_size in ((100, 5), (63, 8)):
    with pytest.raises(UserError):
      batches(data, 2, seq_len=seq_len, batch_size=batch_size)
  with pytest.raises(UserError, match=r"use --seq_len=499 at this --batch_size or add"):
    batches(data, 1, seq_len=500, batch_size=1)
  with pytest.raises(ValueError, match="process_index=2"):
    batches(data, 1, process_index=2, process_count=2)


def test_estimates_and_repetition(data):
  exact = sum(len(ids) for f in data.train for ids in TOK.encode_batch(list(parquet.iter_texts(f))))
  assert stream.estimate_tokens(data, TOK) == pytest.approx(exact, rel=0.25)
  assert stream.repetition(data, TOK, 3 * exact) is None
  warning = stream.repetition(data, TOK, 10 * exact)
  assert str(10 * exact) in warning.error and " times" in warning.error
  split = corpus.load_corpus(data.directory, val_from_train=0.5)
  assert stream.estimate_tokens(split, TOK, "val") == pytest.approx(stream.estimate_tokens(split, TOK), rel=0.3)


def test_a_broken_file_stops_the_stream_with_a_message(tmp_path):
  for i in range(3):
    parquet.write_shard(tmp_path / f"{i}.parquet", [f"{i} {j} " + "x" * 50 for j in range(40)])
  data = corpus.load_corpus(tmp_path)
  raw = bytearray((tmp_path / "1.parquet").read_bytes())
  raw[10:60] = bytes(50)
  (tmp_path / "1.parquet").write_bytes(raw)
  with pytest.raises(UserError, match=r"1\.parquet: row group 0"):
    batches(data, 200)


def test_closing(data):
  it = stream.train_iterator(data, TOK, seq_len=32, batch_size=2, seed=0)
  next(it)
  it.close()
  it.close()
  with pytest.raises(ValueError, match="closed"):
    next(it)


def test_exit_without_closing_is_silent(data):
  script = f"""
from mgr_jax.data import corpus, stream, tokenizer
data = corpus.load_corpus({str(data.directory)!r})
it = stream.train_iterator(data, tokenizer.bytes_tokenizer(), seq_len=8, batch_size=2, seed=0)
print(next(it)["tokens"].shape)
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout, done.stderr) == (0, "(2, 8)\n", "")
