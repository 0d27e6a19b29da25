"""Generation against slow oracles: sampling filters in NumPy, greedy ids by re-running the whole prefix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.attention import attention_names
from mgr_jax.config import GPTConfig
from mgr_jax.conformance import noisy_params
from mgr_jax.model import generate as g
from mgr_jax.model import gpt
from mgr_jax.problems import UserError

CFG = GPTConfig(vocab_size=97, seq_len=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
RNG = np.random.default_rng(0)
PROMPT = RNG.integers(0, CFG.vocab_size, (3, 11))
LENGTHS = [11, 1, 6]


sample = jax.jit(g.sample)
filter_logits = jax.jit(g.filter_logits)
forward = jax.jit(lambda params, tokens, cfg: gpt.forward(params, tokens, cfg)[0], static_argnums=2)


@pytest.fixture(scope="module")
def params():
  return noisy_params(jax.random.key(0), CFG)


def oracle_filter(logits, temperature, top_k, top_p, min_p, order=("top_k", "top_p", "min_p")):
  """The kept tokens of one row, each rule by sorting; ties with the last kept token are kept."""
  z = np.asarray(logits, np.float64) / temperature
  keep = np.isfinite(z)
  for rule in order:
    probability = np.where(keep, np.exp(z - z[keep].max()), 0.0)
    probability /= probability.sum()
    ranked = np.sort(probability)[::-1]
    if rule == "top_k" and top_k:
      keep &= probability >= ranked[min(top_k, len(z)) - 1]
    if rule == "top_p" and top_p < 1:
      keep &= probability >= ranked[np.searchsorted(np.cumsum(ranked), top_p)]
    if rule == "min_p":
      keep &= probability >= min_p * ranked[0] * (1 - 1e-6)
  return keep


SETTINGS = [
  (1.0, 0, 1.0, 0.0),
  (0.7, 1, 1.0, 0.0),
  (0.7, 5, 1.0, 0.0),
  (1.3, 1000, 1.0, 0.0),
  (1.0, 0, 0.6, 0.0),
  (2.0, 0, 1e-6, 0.0),
  (0.5, 0, 1.0, 0.1),
  (1.1, 20, 0.8, 0.02),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_filter_keeps_what_the_oracle_keeps(setting):
  logits = np.concatenate([RNG.normal(0, 3, (8, 61)), RNG.integers(-2, 3, (4, 61))]).astype(np.float32)
  logits[2, 5:] = -np.inf
  filtered = np.asarray(filter_logits(logits, *setting))
  kept = np.isfinite(filtered)
  np.testing.assert_array_equal(kept, [oracle_filter(row, *setting) for row in logits])
  np.testing.assert_allclose(filtered[kept], (logits / setting[0])[kept], rtol=1e-6)


def test_filter_oracle_notices_a_wrong_order():
  logits = RNG.normal(0, 2, (20, 61)).astype(np.float32)
  wrong = [oracle_filter(row, 1.0, 6, 0.8, 0.0, ("top_p", "top_k")) for row in logits]
  assert (np.isfinite(np.asarray(filter_logits(logits, 1.0, 6, 0.8, 0.0))) != wrong).any()


def test_threshold_is_an_element_of_the_row():
  z = np.array([[3.0, -0.0, -1e30, 2.5, 2.5, -np.inf]], np.float32)
  ones = np.ones_like(z)
  found = [float(g.largest_threshold(z, ones, k)[0, 0]) for k in range(1, 8)]
  assert found == [3.0, 2.5, 2.5, 0.0, np.float32(-1e30), -np.inf, -np.inf]


def frequencies(logits, n=20_000, **settings):
  keys = jax.random.split(jax.random.key(3), n)
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
  ids = sample(keys, rows, jnp.zeros(rows.shape, bool), g.Sampling(**settings).traced())
  return np.bincount(ids, minlength=len(logits)) / n


def softmax(z, keep=True):
  p = np.where(keep, np.exp(z - np.max(z)), 0.0)
  return p / p.sum()


def test_samples_have_the_asked_distribution():
  logits = np.array([2.0, 1.0, 0.5, 0.4, -1.0, -2.0])
  settings = {"temperature": 0.7, "top_k": 4, "top_p": 0.9}
  expected = softmax(logits / 0.7, oracle_filter(logits, 0.7, 4, 0.9, 0.0))
  distance = lambda q: 0.5 * np.abs(frequencies(logits, **settings) - q).sum()
  assert distance(expected) < 0.015
  assert distance(softmax(logits)) > 0.05


def test_repetition_penalty_shrinks_seen_tokens_towards_improbable():
  logits = jnp.array([[2.0, 1.9, -1.0]])
  pick = lambda r, seen: int(
    g.sample(g.row_keys(jax.random.key(0), 1), logits, jnp.array([seen]), g.Sampling(0, repetition_penalty=r).traced())[
      0
    ]
  )
  assert pick(1.0, [True, False, False]) == 0
  assert pick(1.2, [True, False, False]) == 1
  assert pick(1.2, [True, True, True]) == 0
  assert pick(2.5, [True, True, False]) == 0
  assert pick(0.01, [False, False, True]) == 0


def greedy_oracle(params, cfg, prompts, n):
  """argmax of the full forward pass over the whole prefix of each row, one token at a time."""
  texts = [list(prompt) for prompt in prompts]
  for _ in range(n):
    padded = np.array([np.pad(text, (0, cfg.seq_len - len(text))) for text in texts])
    best = np.asarray(forward(params, padded, cfg).argmax(-1))
    for text, row in zip(texts, best, strict=True):
      text.append(int(row[len(text) - 1]))
  return [text[-n:] for text in texts]


@pytest.mark.parametrize("name", attention_names())
def test_greedy_ids_equal_the_full_forward_on_every_prefix(name):
  cfg = dataclasses.replace(CFG, attention=name)
  params = noisy_params(jax.random.key(0), cfg)
  ids = np.asarray(g.generate(params, PROMPT, cfg, jax.random.key(0), 16, lengths=LENGTHS, temperature=0))
  assert ids.shape == (3, 16)
  assert ids.tolist() == greedy_oracle(params, cfg, [p[:n] for p, n in zip(PROMPT, LENGTHS, strict=True)], 16)
  unmasked = np.asarray(g.generate(params, PROMPT, cfg, jax.random.key(0), 16, temperature=0))
  assert (unmasked[0] == ids[0]).all()
  assert (unmasked[1] != ids[1]).any()


@pytest.mark.parametrize("name", attention_names())
def test_prompts_longer_than_a_piece_beside_short_ones(name, monkeypatch):
  monkeypatch.setattr(g, "PREFILL_PIECE", 16)
  cfg = dataclasses.replace(CFG, attention=name)
  params = noisy_params(jax.random.key(0), cfg)
  prompt, lengths = RNG.integers(0, cfg.vocab_size, (3, cfg.seq_len)), np.array([cfg.seq_len, 3, 17])
  state = g.prefill(params, *g.pad_prompts(prompt, lengths), cfg, cfg.seq_len)
  logits = forward(params, prompt, cfg)
  np.testing.assert_allclose(state.logits_BV, logits[np.arange(3), lengths - 1], atol=2e-4)
  assert np.abs(state.logits_BV[1] - logits[1, 3]).max() > 0.1
  assert state.model.length_B.tolist() == lengths.tolist()


def test_a_row_does_not_depend_on_its_batch_mates(params):
  keys = g.row_keys(jax.random.key(5), 3)
  together = np.asarray(g.generate(params, PROMPT, CFG, jax.random.key(5), 16, lengths=LENGTHS, temperature=1.5))
  alone = lambda keys: np.asarray(g.generate(params, PROMPT[2:, :6], CFG, keys, 16, temperature=1.5))[0]
  assert (alone(keys[2:]) == together[2]).all()
  assert (alone(keys[:1]) != together[2]).any()


def test_streaming_in_pieces_gives_the_same_ids(params):
  whole = np.asarray(g.generate(params, PROMPT, CFG, jax.random.key(7), 12, lengths=LENGTHS))
  state = g.prefill(params, *g.pad_prompts(PROMPT, LENGTHS), CFG, 32)
  pieces, keys = [], g.row_keys(jax.random.key(7), 3)
  for limit in (5, 5, 2):
    ids, logprobs, state = g.extend(params, state, keys, CFG, 16, g.Sampling(), limit=limit)
    pieces.append(np.asarray(ids)[:, :limit])
  assert (np.concatenate(pieces, 1) == whole).all()
  assert state.position_B.tolist() == [n + 12 for n in LENGTHS]
  text = np.concatenate([PROMPT[0], whole[0]])
  padded = np.pad(text, (0, CFG.seq_len - len(text)))[None].repeat(3, 0)
  expected = jax.nn.log_softmax(forward(params, padded, CFG)[0])[10 + 10 : 10 + 12]
  np.testing.assert_allclose(logprobs[0, :2], [expected[i, whole[0, 10 + i]] for i in range(2)], atol=1e-4)


def test_stop_tokens_end_rows_one_by_one_and_then_the_loop(params):
  free = np.asarray(g.generate(params, PROMPT, CFG, jax.random.key(1), 12, lengths=LENGTHS))
  stops = [int(free[0, 2]), int(free[2, 4])]
  first = [next((i for i, t in enumerate(row) if t in stops), 12) for row in free]
  stopped = np.asarray(g.generate(params, PROMPT, CFG, jax.random.key(1), 12, lengths=LENGTHS, stop_tokens=stops))
  for row, free_row, end in zip(stopped, free, first, strict=True):
    assert (row[: end + 1] == free_row[: end + 1]).all()
    assert (row[end:] == row[min(end, 11)]).all()
  state = g.prefill(params, *g.pad_prompts(PROMPT[:1]), CFG, 32)
  _, _, state = g.extend(params, state, g.row_keys(jax.random.key(1), 1), CFG, 16, g.Sampling(), stops, limit=12)
  assert bool(state.done_B[0])
  assert int(state.model.length_B[0]) == 11 + first[0] + 1


def test_other_settings_and_lengths_need_no_other_program(params):
  run = lambda n, prompt, **settings: g.generate(params, prompt, CFG, jax.random.key(0), n, **settings)
  run(9, PROMPT)
  before = g.prefill._cache_size(), g._extend._cache_size()
  run(16, PROMPT, temperature=0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.3)
  run(12, PROMPT[:, :9], temperature=1, lengths=[4, 9, 1])
  assert (g.prefill._cache_size(), g._extend._cache_size()) == before
  run(16, PROMPT[:2])
  assert (g.prefill._cache_size(), g._extend._cache_size()) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize(
  ("kwargs", "named"),
  [
    ({"temperature": -1.0}, "--temperature=-1.0 is negative"),
    ({"temperature": float("nan")}, "--temperature=nan"),
    ({"top_k": -1}, "--top_k=-1"),
    ({"top_p": 0.0}, "--top_p=0.0 is not in (0, 1]"),
    ({"min_p": 2.0}, "--min_p=2.0"),
    ({"repetition_penalty": 0.0}, "--repetition_penalty=0.0"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": 60}, "take 71 tokens"),
    ({"prompt_BT": np.zeros((1, 0), int)}, "shape (1, 0)"),
    ({"prompt_BT": np.array([[3, 97]])}, "prompt token 97 is not in 0..96"),
    ({"lengths": [11, 0, 6]}, "lengths=[11, 0, 6]"),
  ],
)
def test_mistakes_are_named_before_anything_is_compiled(params, kwargs, named):
  arguments = {"prompt_BT": PROMPT, "max_tokens": 4} | kwargs
  with pytest.raises(UserError) as e:
    g.generate(params, cfg=CFG, key=jax.random.key(0), **arguments)
  assert named in str(e.value) and "fix: " in str(e.value)


def test_all_bad_settings_are_reported_together():
  with pytest.raises(UserError) as e:
    g.Sampling(temperature=-1, top_k=-1, top_p=2, min_p=-1, repetition_penalty=-1)
  assert len(e.value.problems) == 5
