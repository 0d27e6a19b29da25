"""How exponentials of matrices that do not commute combine: Baker-Campbell-Hausdorff and the discrete Magnus series."""

import jax
import jax.numpy as jnp

from mgr_jax.algebra.lie import bracket

MAX_ORDER = 4


def bch(X: jax.Array, Y: jax.Array, order: int = MAX_ORDER) -> jax.Array:
  """log(e^X e^Y) up to commutators of `order` factors, [..., b, b]; the error is O(ε^(order+1)) for X, Y = O(ε).

    X + Y + ½[X, Y] + 1/12 ([X, [X, Y]] + [Y, [Y, X]]) - 1/24 [Y, [X, [X, Y]]]

  The series converges when ‖X‖ + ‖Y‖ < ln 2 (Blanes et al., 2009, arXiv 0810.5488).

  Raises:
    ValueError: order outside 1 to 4.

  >>> import numpy as np
  >>> X, Y = np.triu(np.ones((2, 3, 3), np.float32), 1) * [[[1]], [[2]]]
  >>> Y[0, 1] = 0
  >>> bch(X, Y, 1).tolist()
  [[0.0, 1.0, 3.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
  >>> bch(X, Y, 2).tolist()  # exact here: longer commutators of such matrices vanish
  [[0.0, 1.0, 4.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
  """
  _check(order)
  zero = jnp.zeros_like(Y)
  return sum(_combine(X, (Y, zero, zero, zero), order))


def magnus(A: jax.Array, order: int = MAX_ORDER) -> jax.Array:
  """log(e^(A_n) ··· e^(A_1)) up to commutators of `order` factors: [n, ..., b, b] -> [..., b, b], newest on the left.

  Order 1 is the sum, and order 2 adds ½ Σ_(s<t) [A_t, A_s]. Terms are kept apart by degree while factors are added one
  by one, so a degree is exact whatever n. Converges when Σ‖A‖ < π.

  Raises:
    ValueError: order outside 1 to 4.

  >>> import numpy as np
  >>> X, Y = np.triu(np.ones((2, 3, 3), np.float32), 1)
  >>> Y[0, 1] = 0
  >>> (magnus(np.stack([X, Y]), 2) - X - Y).tolist()  # ½ [Y, X]
  [[0.0, 0.0, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
  """
  _check(order)
  zero = jnp.zeros_like(A[0])
  terms, _ = jax.lax.scan(lambda terms, X: (_combine(X, terms, order), None), (A[0],) + (zero,) * 3, A[1:])
  return sum(terms)


def _check(order: int) -> None:
  if not 1 <= order <= MAX_ORDER:
    raise ValueError(f"order={order} is outside 1 to {MAX_ORDER}")


def _combine(X, terms, order: int):
  """Degrees 1 to 4 of log(e^X e^Y) for Y = Σ terms, where terms[k - 1] has degree k; above `order` they stay zero."""
  y1, y2, y3, y4 = terms
  xy = bracket(X, y1)
  out = [X + y1, y2 + xy / 2]
  if order > 2:
    xxy = bracket(X, xy)
    out.append(y3 + bracket(X, y2) / 2 + (xxy - bracket(y1, xy)) / 12)
  if order > 3:
    xy2 = bracket(X, y2)
    double = bracket(X, xy2) - bracket(y1, xy2) - bracket(y2, xy)
    out.append(y4 + bracket(X, y3) / 2 + double / 12 - bracket(y1, xxy) / 24)
  zero = jnp.zeros_like(X)
  return tuple((out[:order] + [zero] * MAX_ORDER)[:MAX_ORDER])
