"""How many associations can one max-plus score tell apart? Recall of n pairs by two layers of one head of size 16."""

from train.experiments import recall
from train.experiments.records import Arm, Experiment, Prediction, Task

HEADS, D, VALUES, QUERIES = 1, 16, 4, 32
RUNGS = (2, 4, 8, 16, 32, 64)  # up to 4·H·D, where one score per head should have failed
LAYOUT = {"room": RUNGS[-1], "queries": QUERIES, "keys": RUNGS[-1], "values": VALUES}
TESTS = {f"n={n}": recall.recall(n, **LAYOUT) for n in RUNGS}

ARMS = (
  Arm("softmax", "standard"),
  Arm("maxplus", "tropical"),
  Arm("maxplus, 4 groups", f"tropical(score_groups={D // 4})"),
  Arm("hilbert", "tropical(score=hilbert)"),
  Arm("finite beta", "tropical(beta=4)"),
)


def _near(arm: str, test: str) -> Prediction:
  return Prediction(f"{arm} stays within 5 points of softmax at {test}", arm, "softmax", test, at_least=-0.05)


EXPERIMENT = Experiment(
  name="tropical_capacity",
  question="does a single max-plus score run out of capacity where grouped and Hilbert scores do not?",
  model={"n_layer": 2, "n_head": HEADS, "n_kv_head": HEADS, "n_embd": HEADS * D},
  tasks=(
    Task(
      name="recall of n pairs",
      vocab_size=recall.vocabulary(RUNGS[-1], VALUES),
      seq_len=RUNGS[-1] + QUERIES,
      train=recall.mixed_recall(RUNGS, **LAYOUT),
      tests=TESTS,
      chance=recall.same_chance(TESTS, 1 / VALUES),
    ),
  ),
  arms=ARMS,
  predictions=(
    Prediction(
      f"one score per head fails by n = 4·H·D = {4 * HEADS * D}: softmax is ahead by 10 points or more",
      "softmax",
      "maxplus",
      f"n={4 * HEADS * D}",
      at_least=0.10,
    ),
    *(_near(arm, f"n={n}") for arm in ("maxplus, 4 groups", "hilbert") for n in (16, 64)),
  ),
  steps=800,
  batch_size=32,
  test_rows=256,
  ladder=tuple(TESTS),
  limits=(
    "one head of one size, so growth of the capacity with D is not measured; every model trains on all n at once, not "
    "on one n; n = 8·H·D is not reached; a mechanism that learns slowly looks like one without capacity"
  ),
)
