"""Words of three units: the product of ±e_a, ±e_b, ±e_c in the brackets that the first token asks for.

The 16 octonion units are a loop in which the brackets decide the sign; the eight quaternion units are a group, in which
they do not, and serve as the control. Some pairs of a word and its brackets are kept for the test.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.octonions import sign_table
from train.experiments.recall import same_chance
from train.experiments.records import Arm, Experiment, Generator, Prediction, Task

TRAINED = 0.7


def loop_table(doublings: int) -> np.ndarray:
  """The multiplication table of the units ±e_a, int [n, n]; element 2a is e_a, 2a + 1 is -e_a."""
  signs = sign_table(doublings)
  a, sign = np.divmod(np.arange(2 * len(signs)), 2)
  negative = (sign[:, None] + sign + (signs[a[:, None], a] < 0)) % 2
  return 2 * (a[:, None] ^ a) + negative


def answers(doublings: int) -> np.ndarray:
  """Of brackets to the left and to the right, int [2, n, n, n]."""
  table = loop_table(doublings)
  x, y, z = np.ix_(*[np.arange(len(table))] * 3)
  return np.stack([table[table[x, y], z], table[x, table[y, z]]])


def words(doublings: int, trained: bool) -> Generator:
  """Rows (brackets, x, y, z) with the product as target of the last; weight 1 on one side of a fixed split."""
  solution = answers(doublings)
  n = solution.shape[1]
  chosen = (np.random.default_rng(0).random(solution.shape) < TRAINED) == trained

  def generate(key, rows, data):
    del data
    side, *word = (
      jax.random.randint(k, (rows,), 0, high) for k, high in zip(jax.random.split(key, 4), (2, n, n, n), strict=True)
    )
    at_last = lambda x: jnp.zeros((rows, 4), x.dtype).at[:, 3].set(x)
    return {
      "tokens": jnp.stack([n + side, *word], 1).astype(jnp.int32),
      "targets": at_last(jnp.asarray(solution, jnp.int32)[side, *word]),
      "weights": at_last(jnp.asarray(chosen, jnp.float32)[side, *word]),
    }

  return generate


def _task(name: str, doublings: int, arms: tuple[str, ...] = ()) -> Task:
  units = 2 ** (doublings + 1)
  tests = {f"{name}, seen": words(doublings, True), f"{name}, new": words(doublings, False)}
  return Task(
    name,
    vocab_size=units + 2,
    seq_len=4,
    train=words(doublings, True),
    tests=tests,
    chance=same_chance(tests, 1 / units),
    arms=arms,
  )


LOOP, GROUP = "octonion units", "quaternion units"
RIVALS = ("softmax", "quaternion")

EXPERIMENT = Experiment(
  name="octonion_words",
  question="do octonion products in attention help to multiply octonions, and only those?",
  model={"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32},
  tasks=(_task(LOOP, 3), _task(GROUP, 2, (*RIVALS, "early"))),
  arms=(
    Arm("softmax", "standard"),
    Arm("quaternion", "quaternion(rope_mode=score_only)"),
    Arm("late", "octonion(bracketing=late)"),
    Arm("early", "octonion"),
    Arm("mix", "octonion(bracketing=mix)"),
  ),
  predictions=(
    *(
      Prediction(
        f"(q k̄)v beats {rival} by 5 points on new words of {LOOP}", "early", rival, f"{LOOP}, new", at_least=0.05
      )
      for rival in RIVALS
    ),
    Prediction("the brackets do not matter: within 5 points", "early", "late", f"{LOOP}, new", within=0.05),
    Prediction(f"control: on {GROUP} within 5 points", "early", "quaternion", f"{GROUP}, new", within=0.05),
  ),
  steps=1500,
  batch_size=128,
  test_rows=2048,
  limits=(
    "words of three units, two layers of width 32; no longer words; wider values are not told apart from the algebra, "
    "for which a fixed random map in place of the octonion one would be needed; parameters are equal, FLOPs are "
    "reported, not equal; one learning rate"
  ),
)
