"""What an experiment is: tasks, arms, and predictions written down before the first run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Batch = dict[str, jax.Array]
# (key, rows, data) -> {"tokens", "targets": int32 [rows, T], "weights": float32 [rows, T]}, traced under jit.
Generator = Callable[[jax.Array, int, Any], Batch]

METRICS = ("accuracy", "loss")


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """One distribution to train on, and the distributions to test on.

  Args:
    name: shown in tables.
    vocab_size: of every batch; seq_len: of the longest one.
    train: draws training batches; only targets of positive weight count.
    tests: generator by name; names are unique within an experiment.
    chance: by test, the score of the best answer that ignores the context: accuracy, or loss in nats per token.
    data: loads what the generators read, once; passed to them as their last argument.
    arms: names of the arms that run; empty for all.
  """

  name: str
  vocab_size: int
  seq_len: int
  train: Generator
  tests: Mapping[str, Generator]
  chance: Callable[[Any], Mapping[str, float]]
  data: Callable[[], Any] = lambda: None
  arms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Arm:
  """One model of the comparison.

  Args:
    name: shown in tables.
    attention: the attention grammar.
    fields: further fields of `GPTConfig` that differ from the experiment's, as pairs.
    frozen: names of parameters (the last part of the path) that keep their initial values.
    widened: the MLP is widened until the model has the parameters of the largest widened arm.
  """

  name: str
  attention: str
  fields: tuple[tuple[str, Any], ...] = ()
  frozen: tuple[str, ...] = ()
  widened: bool = True


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A claim about the paired difference of two arms on one test.

  The difference is accuracy(arm) - accuracy(baseline), or for losses 1 - loss(arm) / loss(baseline), so that positive
  is better for `arm`. Predicted is difference >= `at_least`, or |difference| <= `within` when that is given.
  """

  statement: str
  arm: str
  baseline: str
  test: str
  at_least: float = 0.0
  within: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """Tasks x arms x seeds, and what is predicted.

  Args:
    name, question: one word, one sentence.
    model: fields of `GPTConfig` that all arms share, without vocabulary and context.
    arms: the first is the one that tables take differences from.
    predictions: what is judged.
    steps, batch_size: updates and rows per update of every run.
    test_rows: rows per test.
    metric: `accuracy` of the targets of positive weight, or `loss` in nats per such target.
    ladder: tests in order of difficulty; the report names the first that each arm does not pass at 90%.
    limits: what this size of the experiment cannot show.
  """

  name: str
  question: str
  model: Mapping[str, Any]
  tasks: tuple[Task, ...]
  arms: tuple[Arm, ...]
  predictions: tuple[Prediction, ...]
  steps: int
  batch_size: int
  test_rows: int = 512
  metric: str = "accuracy"
  ladder: tuple[str, ...] = ()
  limits: str = ""

  def __post_init__(self):
    names = [arm.name for arm in self.arms]
    tests = [test for task in self.tasks for test in task.tests]
    if self.metric not in METRICS:
      raise ValueError(f"metric={self.metric!r} is not one of {METRICS}")
    for what, found in (("arm", names), ("test", tests)):
      if len(set(found)) < len(found):
        raise ValueError(f"two {what}s of {self.name} have one name")
    for p in self.predictions:
      if {p.arm, p.baseline} - set(names) or p.test not in tests:
        raise ValueError(f"{self.name}: prediction {p.statement!r} names an arm or a test that does not exist")
    if set(self.ladder) - set(tests) or any(set(task.arms) - set(names) for task in self.tasks):
      raise ValueError(f"{self.name}: the ladder or a task names a test or an arm that does not exist")

  def arms_of(self, task: Task) -> tuple[Arm, ...]:
    """The arms that run on `task`."""
    return tuple(arm for arm in self.arms if not task.arms or arm.name in task.arms)
