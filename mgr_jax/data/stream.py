"""Documents as batches of token windows: packed without losing a token, in an order that resumes exactly."""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from mgr_jax.data import parquet
from mgr_jax.data.corpus import Corpus
from mgr_jax.data.order import EpochOrder
from mgr_jax.data.pack import Batch, PackStream, window_batch
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.problems import Problem, UserError, raise_if_any

SHUFFLED_WINDOWS = 512
_QUEUED_BATCHES = 2
_SAMPLE_CHARS = 65_536


class TrainIterator:
  """Endless training batches of one process; see `train_iterator`.

  `get_state()` belongs to the last batch that `next` gave, whatever was prefetched beyond it, and is JSON-able, O(1) in
  size.
  """

  def __init__(
    self,
    iterator: grain.DatasetIterator,
    identity: dict,
    units_per_epoch: int,
    tokenise: Callable[[int], np.ndarray],  # the tokens at a place of the global stream of units
    block_tokens: tuple[int, int],  # windows per shuffled block, and transitions per window
  ):
    self._open = [iterator]
    self._identity = identity
    self._units_per_epoch = units_per_epoch
    self._tokenise = tokenise
    self._block_tokens = block_tokens
    # The finalizer also runs at interpreter exit, while the modules that closing needs still exist.
    self._finalizer = weakref.finalize(self, _close, self._open)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  @property
  def _iterator(self) -> grain.DatasetIterator:
    if not self._open:
      raise ValueError("the training iterator is closed")
    return self._open[0]

  def get_state(self) -> dict:
    """The place in the stream after the last batch given, with what the stream depends on.

    A block of windows is shuffled as a whole: `unit` and `offset` say where block number `block` begins, and `used` how
    many of its windows have been given.
    """
    place = self._iterator.get_state()
    begin = place["parent_window_start_state"]
    return {
      "unit": begin["parent"]["next_index"],
      "offset": begin["offset"],
      "block": place["window_index"],
      "used": place["pos_in_window"],
      **self._identity,
    }

  @property
  def epoch(self) -> float:
    """Passes over the training data so far, in units of the whole corpus."""
    state = self.get_state()
    return (state["unit"] * state["process_count"] + state["process_index"]) / self._units_per_epoch

  def set_state(self, states: dict | Sequence[dict], strict: bool = True) -> int:
    """Continues after the batch that `states` belongs to: this process's state, or the list of all processes' states.

    Raises `UserError` when data, tokenizer, seed, window length or number of processes differ. With `strict=False`,
    other data, another tokenizer, seed or window length start from the beginning of their own stream; another number of
    processes continues at the first unit that none of the saved processes had begun, for which the states of all of
    them are needed. Returns how many tokens that leaves out, summed over the saved processes (0 when exact).
    """
    states = [states] if isinstance(states, dict) else sorted(states, key=lambda s: s["process_index"])
    saved, now = states[0], self._identity
    differing = [key for key in _DIFFERS if saved[key] != now[key]]
    if strict:
      raise_if_any(_differs(key, saved[key], now[key]) for key in differing)
    elif differing and differing != ["process_count"]:
      self._go_to(0, 0)
      return 0
    if not differing:
      state = next((s for s in states if s["process_index"] == now["process_index"]), None)
      if state is None:
        error = f"no data state of process {now['process_index']} was given"
        raise UserError(Problem(error, "give the states of all processes"))
      self._go_to(state["unit"], state["offset"], state["block"], state["used"])
      return 0
    if len(states) != saved["process_count"]:
      error = f"data states of {len(states)} processes given, {saved['process_count']} were saved"
      raise UserError(Problem(error, "give the states of all processes"))
    start, skipped = self._first_untouched(states)
    self._go_to(-(-(start - now["process_index"]) // now["process_count"]), 0)
    return skipped

  def close(self) -> None:
    """Stops the background threads. Idempotent."""
    self._finalizer()

  def __enter__(self) -> "TrainIterator":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def _go_to(self, unit: int, offset: int, block: int = 0, used: int = 0) -> None:
    begin = {"parent": {"next_index": unit}, "offset": offset}
    self._iterator.set_state({"parent_window_start_state": begin, "window_index": block, "pos_in_window": used})

  def _first_untouched(self, states: Sequence[dict]) -> tuple[int, int]:
    """The place in the global stream from which on no saved process has read, and the unused tokens before it."""
    count, skipped, ends = len(states), 0, []
    for p, state in enumerate(states):
      unit, offset, left = self._block_end(state, p, count)
      skipped += left
      if offset:
        skipped += len(self._tokenise(unit * count + p)) - offset - 1
      ends.append((unit + (offset > 0)) * count + p)
    start = max(ends)
    skipped += sum(len(self._tokenise(place)) for end in ends for place in range(end, start, count))
    return start, skipped

  def _block_end(self, state: dict, p: int, count: int) -> tuple[int, int, int]:
    """Unit and offset at the end of the block that process `p` of `count` was in, and the block's unused tokens."""
    unit, offset = state["unit"], state["offset"]
    if not state["used"]:
      return unit, offset, 0
    windows, seq_len = self._block_tokens
    offset += windows * seq_len
    while offset >= (length := len(self._tokenise(unit * count + p))):
      unit, offset = unit + 1, offset - length
    return unit, offset, (windows - state["used"]) * seq_len


_DIFFERS = {
  "data": (
    "the data",
    "give the data of the checkpoint with --data, or start on other data by --resume_strict=false",
  ),
  "tokenizer": ("the tokenizer", "give the tokenizer of the checkpoint with --tokenizer, or train a new model"),
  "seq_len": ("--seq_len", "use the --seq_len of the checkpoint, or start the data again with --resume_strict=false"),
  "seed": ("--seed", "use the seed of the checkpoint, or start another order with --resume_strict=false"),
  "process_count": (
    "the number of data shards",
    "keep it with --data_shards, or skip to the next unit of documents with --resume_strict=false",
  ),
}


def _differs(key: str, saved: str | int, now: str | int) -> Problem:
  what, fix = _DIFFERS[key]
  return Problem(f"{what} differs from the checkpoint: saved {saved}, now {now}", fix)


def _close(open_: list[grain.DatasetIterator]) -> None:
  while open_:
    open_.pop().close()


def train_iterator(
  corpus: Corpus,
  tokenizer: Tokenizer,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  threads: int = 4,
  process_index: int = 0,
  process_count: int = 1,
  shuffled_windows: int = SHUFFLED_WINDOWS,
) -> TrainIterator:
  """Shuffled, packed batches of the training split, for ever; `batch_size` rows of this process.

  Each block of `shuffled_windows` packed windows is shuffled once more: consecutive windows often come from one long
  document, and a batch of them is a far noisier sample of the corpus than its size says.

  A batch holds `tokens`, `targets` (the next tokens), `segment_ids` (documents of a row, from 1) and `positions` (from
  0 in each document's part of the row), all int32[B, T], and `weights` float32[B, T], 1 where the target counts. Row
  after row, the stream is the same for every batch size and number of threads: it depends on the seed, the data, the
  tokenizer and the number of processes. Tokenisation runs in `threads` threads (0: in the caller's), batching in one
  more. Close the iterator after use. Raises `UserError` when the split cannot fill one batch.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index={process_index} is not in [0, {process_count})")
  units = corpus.units("train")
  _check_length(units, tokenizer, seq_len, batch_size, process_count)
  order = EpochOrder(units, seed, process_index, process_count)
  read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  dataset = grain.MapDataset.source(order).map(functools.partial(_tokenise, tokenizer)).to_iter_dataset(read)
  dataset = grain.experimental.WindowShuffleIterDataset(
    PackStream(dataset, seq_len), window_size=shuffled_windows, seed=seed
  )
  dataset = dataset.batch(batch_size, drop_remainder=True)
  dataset = dataset.map(functools.partial(window_batch, bos_id=tokenizer.bos_id))
  dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=_QUEUED_BATCHES)
  identity = {
    "process_index": process_index,
    "process_count": process_count,
    "seed": seed,
    "seq_len": seq_len,
    "data": corpus.sha256,
    "tokenizer": tokenizer.sha256,
  }
  whole = EpochOrder(units, seed)
  return TrainIterator(
    iter(dataset), identity, len(units), lambda place: _tokenise(tokenizer, whole[place]), (shuffled_windows, seq_len)
  )


class ValidationBatches:
  """The same batches each time it is iterated over; see `validation_batches`.

  `tokens` is int32[n + 1]: the n targets, and the first token.
  """

  def __init__(
    self, tokens: np.ndarray, bos_id: int, seq_len: int, batch_size: int, process_index: int, process_count: int
  ):
    self.tokens = tokens
    self._bos_id = bos_id
    self._seq_len = seq_len
    self._batch_size = batch_size
    self._process = (process_index, process_count)

  def __len__(self) -> int:
    windows = -(-(len(self.tokens) - 1) // self._seq_len)
    return -(-windows // (self._batch_size * self._process[1]))

  def __iter__(self) -> Iterator[Batch]:
    (index, count), T, B = self._process, self._seq_len, self._batch_size
    for k in range(len(self)):
      first = (k * count + index) * B
      places = (first + np.arange(B))[:, None] * T + np.arange(T + 1)
      windows = self.tokens[np.minimum(places, len(self.tokens) - 1)]
      yield window_batch(windows, self._bos_id, present=places[:, 1:] < len(self.tokens))


def validation_batches(
  corpus: Corpus,
  tokenizer: Tokenizer,
  *,
  seq_len: int,
  batch_size: int,
  val_tokens: int,
  process_index: int = 0,
  process_count: int = 1,
) -> ValidationBatches:
  """Batches, laid out as in `train_iterator`, that cover the first `val_tokens` transitions of the split exactly once.

  The order is that of the files, never shuffled. Places after the last transition have weight 0, segment 0 and a valid
  token, so that all batches have one shape and a weighted sum does not depend on `batch_size` or the number of
  processes. `batch_size` counts the rows of this process; all processes get equally many batches. Tokenises once, here.
  Raises `UserError` when the split is empty.
  """
  units = corpus.units("val")
  parts, have = [], 0
  for unit in range(len(units)):
    if have > val_tokens:
      break
    parts.append(_tokenise(tokenizer, units[unit]))
    have += len(parts[-1])
  if have < 2:
    error = f"the validation split of {corpus.directory} has {have} tokens, at least 2 are needed"
    raise UserError(
      Problem(error, "add documents, use --val_from_train=0.01, or train without validation with --val_every=-1")
    )
  return ValidationBatches(
    np.concatenate(parts)[: val_tokens + 1], tokenizer.bos_id, seq_len, batch_size, process_index, process_count
  )


def estimate_tokens(corpus: Corpus, tokenizer: Tokenizer, split: str = "train") -> int:
  """About how many tokens a split has: bytes before compression, from the footers, times tokens per byte of a sample.

  The sample is the first documents of four row groups spread over the split, 64 kB of each.
  """
  units = corpus.units(split)
  sample: list[str] = []
  for unit in np.unique(np.linspace(0, len(units) - 1, min(4, len(units))).astype(int)):
    texts = units[unit]
    ends = np.cumsum([len(text) for text in texts])
    sample += texts[: 1 + int(np.searchsorted(ends, _SAMPLE_CHARS))]
  footers = [parquet.read_footer(file) for file in getattr(corpus, split)]
  length_bytes = 4 * sum(footer.rows for footer in footers)
  total = sum(footer.column_bytes[corpus.text_column] for footer in footers) - length_bytes
  if corpus.val_from_train and split != "test":
    total *= corpus.val_from_train if split == "val" else 1 - corpus.val_from_train
  return round(total * len(_tokenise(tokenizer, sample)) / max(sum(len(text.encode()) for text in sample), 1))


def repetition(corpus: Corpus, tokenizer: Tokenizer, run_tokens: int, limit: float = 4.0) -> Problem | None:
  """A warning when a run of `run_tokens` passes over the training split more than `limit` times.

  Up to about four, old data is worth nearly as much as new data (Muennighoff et al., 2023, arXiv 2305.16264).
  """
  available = estimate_tokens(corpus, tokenizer)
  epochs = run_tokens / max(available, 1)
  if epochs <= limit:
    return None
  error = f"the run would pass over the data {epochs:.1f} times: {run_tokens} tokens from about {available}"
  return Problem(error, f"add data, or train on at most {int(limit * available)} tokens")


def _tokenise(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.int32), *tokenizer.encode_batch(texts)])


def _check_length(
  units: parquet.ParquetUnits, tokenizer: Tokenizer, seq_len: int, batch_size: int, process_count: int
) -> None:
  rows = batch_size * process_count
  needed = rows * seq_len + 1
  have = 0
  for unit in range(len(units)):
    have += len(_tokenise(tokenizer, units[unit]))
    if have >= needed:
      return
  works = []
  if have > seq_len * process_count:
    works.append(f"--batch_size={(have - 1) // (seq_len * process_count) * process_count} at this --seq_len")
  if have > rows:
    works.append(f"--seq_len={(have - 1) // rows} at this --batch_size")
  raise UserError(
    Problem(
      f"the training split has {have} tokens, one batch of {rows} x {seq_len} needs {needed}",
      " or ".join([*(f"use {w}" for w in works), "add documents"]),
    )
  )
