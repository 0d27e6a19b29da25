"""Sizes times directions: do factored weights generalise over orders of magnitude, do floating values find the largest?

Numbers are compared digit by digit, aligned at the right: one token holds both digits of a place, and the answer
depends on the first place from the left where they differ. The same rows with answers by coin are the placebo. In the
last task every token holds a magnitude and a payload, and the payload of the largest magnitude is asked for.
"""

import jax
import jax.numpy as jnp

from train.experiments import recall
from train.experiments.records import Arm, Experiment, Generator, Prediction, Task

PLACES, BLANK = 12, 10
TRAINED, LONGER = (2, 3, 4, 5, 6, 7, 8), (10, 11, 12)
ASK = (BLANK + 1) ** 2
ITEMS, MAGNITUDES, PAYLOADS = 24, 32, 4


def compare(lengths: tuple[int, ...], coin: bool = False) -> Generator:
  """Rows of 12 places and a question: is the first number the larger one? Half of the pairs have one length.

  Targets are 1 or 0, or by `coin`, at the last token; pairs of equal numbers have weight 0.
  """

  def generate(key, rows, data):
    del data
    draw_lengths, draw_same, draw_digits, draw_coin = jax.random.split(key, 4)
    size = jax.random.choice(draw_lengths, jnp.array(lengths), (rows, 2))
    same = jax.random.bernoulli(draw_same, 0.5, (rows,))
    size = size.at[:, 1].set(jnp.where(same, size[:, 0], size[:, 1]))
    digits = jax.random.randint(draw_digits, (rows, PLACES, 2), 0, 10)
    first = PLACES - size[:, None]
    place = jnp.arange(PLACES)[:, None]
    digits = jnp.where(place == first, jnp.maximum(digits, 1), digits)
    digits = jnp.where(place < first, BLANK, digits)
    difference = jnp.where(digits == BLANK, -1, digits)
    difference = difference[..., 0] - difference[..., 1]
    where = jnp.argmax(difference != 0, axis=1)
    leading = jnp.take_along_axis(difference, where[:, None], axis=1)[:, 0]
    answer = jax.random.bernoulli(draw_coin, 0.5, (rows,)) if coin else leading > 0
    tokens = digits[..., 0] * (BLANK + 1) + digits[..., 1]
    return _asked(tokens, answer, leading != 0, ASK)

  return generate


def largest(*choices: int) -> Generator:
  """Rows of 24 tokens, the last few of them items of a random magnitude and payload, then the question for the payload
  of the largest magnitude, which one item alone has. The number of items is drawn from `choices`, row by row."""

  def generate(key, rows, data):
    del data
    draw_size, draw_payload, draw_place, draw_top, draw_items = jax.random.split(key, 5)
    items = jax.random.choice(draw_items, jnp.array(choices), (rows,))
    top = jax.random.randint(draw_top, (rows, 1), 1, MAGNITUDES)
    size = jnp.floor(jax.random.uniform(draw_size, (rows, ITEMS)) * top).astype(jnp.int32)
    place = ITEMS - 1 - jnp.floor(jax.random.uniform(draw_place, (rows,)) * items).astype(jnp.int32)
    size = jnp.where(jnp.arange(ITEMS) == place[:, None], top, size)
    payload = jax.random.randint(draw_payload, (rows, ITEMS), 0, PAYLOADS)
    answer = jnp.take_along_axis(payload, place[:, None], axis=1)[:, 0]
    shown = jnp.arange(ITEMS) >= ITEMS - items[:, None]
    tokens = jnp.where(shown, size * PAYLOADS + payload, MAGNITUDES * PAYLOADS)
    return _asked(tokens, answer, jnp.ones((rows,), bool), MAGNITUDES * PAYLOADS + 1)

  return generate


def _asked(tokens, answer, counts, question: int):
  last = lambda x: jnp.zeros((*tokens.shape[:1], tokens.shape[1] + 1), x.dtype).at[:, -1].set(x)
  return {
    "tokens": jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=question).astype(jnp.int32),
    "targets": last(answer.astype(jnp.int32)),
    "weights": last(counts.astype(jnp.float32)),
  }


COMPARISONS = {"trained lengths": compare(TRAINED), "longer numbers": compare(LONGER)}
PLACEBO = {"placebo": compare(TRAINED, coin=True)}
LARGEST = {"largest of 12": largest(12), "largest of 24": largest(24)}

EXPERIMENT = Experiment(
  name="surreal_param",
  question="what do weights, and values, of a size times a direction change at equal parameters and start?",
  model={"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32},
  tasks=(
    Task(
      name="comparison of numbers",
      vocab_size=ASK + 1,
      seq_len=PLACES + 1,
      train=compare(TRAINED),
      tests=COMPARISONS,
      chance=recall.same_chance(COMPARISONS, 0.5),
    ),
    Task(
      name="comparison, answers by coin",
      vocab_size=ASK + 1,
      seq_len=PLACES + 1,
      train=compare(TRAINED, coin=True),
      tests=PLACEBO,
      chance=recall.same_chance(PLACEBO, 0.5),
      arms=("standard", "factored"),
    ),
    Task(
      name="payload of the largest",
      vocab_size=MAGNITUDES * PAYLOADS + 2,
      seq_len=ITEMS + 1,
      train=largest(12, 24),
      tests=LARGEST,
      chance=recall.same_chance(LARGEST, 1 / PAYLOADS),
    ),
  ),
  arms=(
    Arm("standard", "standard"),
    Arm("factored", "surreal"),
    Arm("factored, drifting", "surreal(renorm=false)"),
    Arm("factored q, k", "surreal(qk=full)"),
    Arm("floating", "surreal(values=float)"),
  ),
  predictions=(
    Prediction(
      "factored weights gain 5 points on numbers longer than any trained on",
      "factored",
      "standard",
      "longer numbers",
      at_least=0.05,
    ),
    Prediction(
      "keeping directions on their sphere changes at most 5 points",
      "factored",
      "factored, drifting",
      "longer numbers",
      within=0.05,
    ),
    Prediction(
      "where nothing can be learned the arms differ by at most 5 points",
      "factored",
      "standard",
      "placebo",
      within=0.05,
    ),
    Prediction(
      "floating values gain 10 points over softmax among 24 items",
      "floating",
      "standard",
      "largest of 24",
      at_least=0.1,
    ),
    Prediction(
      "and 10 points over the learned temperature alone", "floating", "factored", "largest of 24", at_least=0.1
    ),
  ),
  steps=600,
  batch_size=32,
  test_rows=512,
  limits=(
    "one optimizer (AdamW), one learning rate for all arms unless tuned; a weight norm without logarithm, and sizes "
    "driven by another optimizer, are not among the arms; how fast an arm learns is shown by its curve and not judged"
  ),
)
