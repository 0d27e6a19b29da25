"""Retrieval under load: N pairs into a table of 16 leaves per head, against caches of fixed and of growing size."""

from train.experiments import recall
from train.experiments.records import Arm, Experiment, Prediction, Task

VALUES, QUERIES = 4, 16
RUNGS = (4, 8, 16, 32)
LAYOUT = {"room": RUNGS[-1], "queries": QUERIES, "keys": RUNGS[-1], "values": VALUES}
TESTS = {f"N={n}": recall.recall(n, **LAYOUT) for n in RUNGS}
# A table of 16 leaves holds 16·(D + 1) numbers, a cache of 8 tokens 8·2D: the same within one part in 16.
TABLE, WINDOW = "mode=memory,depth=2", 8

EXPERIMENT = Experiment(
  name="fractal_retrieval",
  question="how does retrieval by tree addresses hold up as the number of stored pairs grows?",
  model={"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32},
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
    Arm("softmax", "standard"),
    Arm("softmax, 8 tokens", f"standard(window={WINDOW})"),
    Arm("addresses", "fractal"),
    Arm("table", f"fractal({TABLE})"),
    Arm("hard table", f"fractal({TABLE},address=hard,rule=overwrite)"),
  ),
  predictions=(
    Prediction(
      "at equal state the table beats softmax by 5 points when N = 32 exceeds the cache of 8",
      "table",
      "softmax, 8 tokens",
      "N=32",
      at_least=0.05,
    ),
    *(
      Prediction(
        f"softmax whose cache holds everything is at most 5 points behind the table at N={n}",
        "softmax",
        "table",
        f"N={n}",
        at_least=-0.05,
      )
      for n in (8, 32)
    ),
    Prediction("addresses stay within 5 points of softmax at N=32", "addresses", "softmax", "N=32", at_least=-0.05),
  ),
  steps=600,
  batch_size=32,
  test_rows=256,
  ladder=tuple(TESTS),
  limits=(
    "trees of 16 leaves, where 256 and 4096 are of interest, and N up to twice the leaves; the retention of hard "
    "addresses is reported, not compared with a law, since their loads after training are not measured"
  ),
)
