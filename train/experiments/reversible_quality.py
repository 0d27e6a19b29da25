"""Does the coupling form cost quality? Recall of key-value pairs by stacks of equal depth, width and parameters."""

from train.experiments import recall
from train.experiments.records import Arm, Experiment, Prediction, Task

VALUES, QUERIES = 8, 16
RUNGS = (16, 32)
LAYOUT = {"room": RUNGS[-1], "queries": QUERIES, "keys": RUNGS[-1], "values": VALUES}
TESTS = {f"N={n}": recall.recall(n, **LAYOUT) for n in RUNGS}

EXPERIMENT = Experiment(
  name="reversible_quality",
  question="does a reversible stack learn what a plain one of the same parameters learns?",
  model={"n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 32},
  tasks=(
    Task(
      name="recall of N pairs",
      vocab_size=recall.vocabulary(RUNGS[-1], VALUES),
      seq_len=RUNGS[-1] + QUERIES,
      train=recall.mixed_recall(RUNGS, **LAYOUT),
      tests=TESTS,
      chance=recall.same_chance(TESTS, 1 / VALUES),
    ),
  ),
  arms=(
    Arm("plain", "standard"),
    Arm("reversible", "reversible"),
    Arm("float streams", "reversible(state=float32)"),
    Arm("mixed channels", "reversible(mix=givens)"),
    Arm("symplectic", "reversible(mode=symplectic)"),
  ),
  predictions=(
    Prediction(
      "a reversible stack stays within 5 points of a plain one", "reversible", "plain", "N=32", at_least=-0.05
    ),
    Prediction(
      "integer streams stay within 5 points of float streams", "reversible", "float streams", "N=32", at_least=-0.05
    ),
    Prediction(
      "the causal symplectic stack stays within 5 points of a plain one", "symplectic", "plain", "N=32", at_least=-0.05
    ),
  ),
  steps=500,
  batch_size=32,
  test_rows=256,
  ladder=tuple(TESTS),
  limits="4 layers, where reversibility is of no use; memory and time are measured by train.bench speed",
)
