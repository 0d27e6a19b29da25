"""What frames are made of besides generators."""

from typing import Any, NamedTuple

import jax


class Setting(NamedTuple):
  """Static: bound on the coordinates of a block, scan name, whether products are made orthogonal again."""

  theta_max: float
  scan: str
  reorthogonal: bool


class Chain(NamedTuple):
  """All without gradient, and each maybe `None`.

  Attributes:
    base: constant rotation [D/b blocks] that multiplies every edge from the left.
    start: frame [B, K] before the first token.
    valid_BT: which tokens are real; the others do not transport.
    segment_ids_BT: document numbers; frames restart with every document.
  """

  base: Any = None
  start: Any = None
  valid_BT: jax.Array | None = None
  segment_ids_BT: jax.Array | None = None
