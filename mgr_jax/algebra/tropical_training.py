"""A classifier of maxima alone, and perceptron steps short enough to be predicted exactly. Host arrays.

logit_c = max (q[x_t, r] + k[x_s, r] + v[x_s, d] + w[d, c]) over t, s <= t, r and d: max-plus attention over embeddings
of the words x, pooled over time by a maximum, with a max-plus head. Each logit is a sum of four entries, its route.
"""

from typing import NamedTuple

import numpy as np

TERMS = 4


class Routed(NamedTuple):
  """Logits [N, C], the winning (t, s, r, d) as an array [4, N, C], and by how much it leads the next route [N, C]."""

  logits: np.ndarray
  route: np.ndarray
  lead: np.ndarray


def classify(tables, words) -> Routed:
  """All logits of N sequences.

  Args:
    tables: q, k and v [words, D], w [D, C].
    words: [N, T], no word twice in a row, so that no two routes are the same sum.
  """
  q, k, v, w = tables
  T = words.shape[1]
  query, key, value = q[words][:, :, None, :, None], k[words][:, None, :, :, None], v[words][:, None, :, None]
  total = np.where(np.tri(T, dtype=bool)[:, :, None, None], query + key + value, -np.inf)[..., None] + w
  flat = total.reshape(len(words), -1, w.shape[1])
  second, first = np.moveaxis(np.partition(flat, -2, axis=1)[:, -2:], 1, 0)
  return Routed(first, np.stack(np.unravel_index(np.argmax(flat, 1), total.shape[1:5])), first - second)


def losses(logits, labels):
  """Best other logit minus the true one, [N]; negative where the sample is right."""
  true = np.arange(logits.shape[-1]) == labels[:, None]
  return np.max(np.where(true, -np.inf, logits), -1) - logits[true]


class Step(NamedTuple):
  """New tables, the size η of the step and how many entries moved."""

  tables: list[np.ndarray]
  size: float
  moved: int


def perceptron_step(tables, words, label: int, factor: float = 1.0) -> Step:
  """Raises the entries on the true class's route by η and lowers those on the best rival's, for one sequence [T].

  A sum of four entries moves by at most 4η, so no winner changes while η stays below an eighth of every logit's lead
  over its next route and of the rival's lead over the next rival. η is 0.99 of that, times `factor`. Up to factor 1
  the sample's loss falls by exactly η·moved. It falls by η at least for every factor: a logit is convex in the tables,
  and a rival's route holds no more raised entries than the true one, less the one of the head.

  >>> tables, words, labels = random_task(np.random.default_rng(0), 1)
  >>> step = perceptron_step(tables, words[0], labels[0])
  >>> loss = lambda tables: losses(classify(tables, words).logits, labels)[0]
  >>> bool(abs(loss(step.tables) - loss(tables) + step.size * step.moved) < 1e-12)
  True
  """
  found = classify(tables, words[None])
  others = np.where(np.arange(found.logits.shape[-1]) == label, -np.inf, found.logits[0])
  rival, (third, second) = int(np.argmax(others)), np.sort(others)[-2:]
  size = 0.99 * factor * min(np.min(found.lead), second - third) / (2 * TERMS)
  changes = [np.zeros_like(table) for table in tables]
  for c, sign in ((label, 1.0), (rival, -1.0)):
    t, s, r, d = found.route[:, 0, c]
    for change, at in zip(changes, ((words[t], r), (words[s], r), (words[s], d), (d, c)), strict=True):
      change[at] += sign
  moved = sum(int(np.sum(change != 0)) for change in changes)
  return Step([table + size * change for table, change in zip(tables, changes, strict=True)], size, moved)


def random_task(rng: np.random.Generator, samples: int, words: int = 8, length: int = 5, D: int = 4, classes: int = 3):
  """Tables, sequences without repetition and labels, all at random."""
  tables = [rng.normal(size=shape) for shape in ((words, D), (words, D), (words, D), (D, classes))]
  sequences = np.stack([rng.permutation(words)[:length] for _ in range(samples)])
  return tables, sequences, rng.integers(0, classes, samples)
