"""Word problems: after every token of a word over a finite group, which element is the product so far?

A5 is not solvable: a circuit of fixed depth cannot decide its word problem for all lengths unless TC0 = NC1
(Barrington, 1989; Merrill et al., 2024, arXiv 2404.08819), and it is a group of rotations of space. Z60 is the abelian
control of the same size. Training words are short, tests are longer.
"""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from train.experiments.records import Arm, Experiment, Generator, Prediction, Task

ORDER, LETTERS = 60, 6
TRAIN, TESTS = 6, (6, 12, 24)
SCORED = 4  # the last positions of a test word count


def _even_permutations(points: int) -> np.ndarray:
  """Multiplication table of the alternating group; element 0 is the identity."""
  sign = lambda p: (-1) ** sum(p[i] > p[j] for i, j in itertools.combinations(range(points), 2))
  elements = [p for p in itertools.permutations(range(points)) if sign(p) == 1]
  index = {p: i for i, p in enumerate(elements)}
  return np.array([[index[tuple(p[i] for i in q)] for q in elements] for p in elements])


TABLES = {"A5": _even_permutations(5), "Z60": np.add.outer(np.arange(ORDER), np.arange(ORDER)) % ORDER}


def generated(table: np.ndarray, letters: np.ndarray) -> int:
  """Size of the subgroup that `letters` generate."""
  found = {0}
  while True:
    more = found | {int(table[g, x]) for g in letters for x in found}
    if len(more) == len(found):
      return len(found)
    found = more


def alphabet(table: np.ndarray) -> np.ndarray:
  """Elements that the letters stand for: the first draw without the identity that generates the group."""
  rng = np.random.default_rng(0)
  while True:
    letters = rng.choice(np.arange(1, len(table)), LETTERS, replace=False)
    if generated(table, letters) == len(table):
      return letters


def words(table: np.ndarray, length: int, scored: int) -> Generator:
  """BOS, then `length` uniform letters; the target at every letter is g_t ··· g_1, weight 1 on the last `scored`."""
  letters = alphabet(table)

  def generate(key, rows, data):
    del data
    product = jnp.asarray(table, jnp.int32)
    drawn = jax.random.randint(key, (rows, length), 0, LETTERS)
    multiply = lambda state, g: (product[g, state],) * 2
    _, states = jax.lax.scan(multiply, jnp.zeros((rows,), jnp.int32), jnp.asarray(letters, jnp.int32)[drawn].T)
    weights = jnp.broadcast_to(jnp.arange(length) >= length - scored, (rows, length))
    start = ((0, 0), (1, 0))
    return {
      "tokens": jnp.pad(1 + drawn, start).astype(jnp.int32),
      "targets": jnp.pad(states.T, start),
      "weights": jnp.pad(weights, start).astype(jnp.float32),
    }

  return generate


def constant_score(table: np.ndarray, length: int, scored: int) -> float:
  """Accuracy of the likeliest element at every position."""
  chances, best = np.eye(len(table))[0], []
  for _ in range(length):
    step = np.zeros(len(table))
    for g in alphabet(table):
      np.add.at(step, table[g], chances / LETTERS)
    chances = step
    best.append(chances.max())
  return float(np.mean(best[length - scored :]))


def _task(group: str) -> Task:
  table = TABLES[group]
  name = lambda n: f"{group} n={n}"

  def chance(data) -> Mapping[str, float]:
    del data
    return {name(n): constant_score(table, n, SCORED) for n in TESTS}

  return Task(
    name=group,
    vocab_size=ORDER,
    seq_len=TESTS[-1] + 1,
    train=words(table, TRAIN, TRAIN),
    tests={name(n): words(table, n, SCORED) for n in TESTS},
    chance=chance,
  )


EXPERIMENT = Experiment(
  name="gauge_word_problem",
  question="do transports that do not commute follow a word over a non-solvable group farther than those that do?",
  model={"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32},
  tasks=tuple(map(_task, TABLES)),
  arms=(
    Arm("softmax", "standard"),
    Arm("b=2", "gauge(b=2)"),
    Arm("b=4", "gauge"),
    Arm("b=4, plain values", "gauge(values=plain)"),
  ),
  predictions=(
    Prediction("on A5 b=4 beats b=2 by 20 points at twice the trained length", "b=4", "b=2", "A5 n=12", at_least=0.2),
    Prediction("and softmax by 20 points", "b=4", "softmax", "A5 n=12", at_least=0.2),
    Prediction("control: on Z60 b=4 and b=2 are within 5 points", "b=4", "b=2", "Z60 n=12", within=0.05),
    Prediction(
      "values must be transported: without, A5 loses 20 points", "b=4", "b=4, plain values", "A5 n=12", at_least=0.2
    ),
  ),
  steps=1200,
  batch_size=64,
  test_rows=512,
  limits=(
    "no solvable group that does not commute, six letters per group instead of all sixty elements, words of up to 6 "
    "letters in training, one layer, one learning rate; where no arm learns the trained length, optimisation was "
    "tested and not what can be expressed; no arm with more layers of softmax"
  ),
)
