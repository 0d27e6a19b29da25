"""Elementary cellular automata: rows of bits in which every cell follows from three cells of the row above.

Rule number r: a cell whose upper neighbours are (left, centre, right) becomes bit 4·left + 2·centre + right of r
(Wolfram, 1983, Statistical mechanics of cellular automata).
"""

import math

import jax
import jax.numpy as jnp

BORDERS = ("periodic", "dead")
MIN_WIDTH, MAX_WIDTH = 8, 4096


def evolve(rule: int, first_row: jax.Array, rows: int, border: str = "periodic") -> jax.Array:
  """The first `rows` rows, uint8 [rows, width], `first_row` (bits) included.

  Args:
    rule: 0 to 255.
    border: `periodic` joins the ends of a row, `dead` puts a 0 beyond each.

  Raises:
    ValueError: no such rule or border. Cost: rows·width cells, row after row in one `lax.scan`.
  """
  if not 0 <= rule <= 255:
    raise ValueError(f"rule={rule} is outside 0 to 255")
  if border not in BORDERS:
    raise ValueError(f"border={border!r} is not one of {', '.join(BORDERS)}")

  def next_row(row, _):
    left, right = jnp.roll(row, 1), jnp.roll(row, -1)
    if border == "dead":
      left, right = left.at[0].set(0), right.at[-1].set(0)
    return (rule >> (4 * left + 2 * row + right)) & 1, row

  _, found = jax.lax.scan(next_row, jnp.asarray(first_row, jnp.int32), None, rows)
  return found.astype(jnp.uint8)


def random_rows(key: jax.Array, rule: int, n: int) -> jax.Array:
  """At least n cells below a random row, uint8 [rows, width], periodic; width = ceil(√n), within 8 and 4096."""
  width = min(max(math.ceil(math.sqrt(n)), MIN_WIDTH), MAX_WIDTH)
  return evolve(rule, jax.random.bernoulli(key, 0.5, (width,)), -(-n // width))


def pattern(key: jax.Array, rule: int, shape: tuple[int, ...]) -> jax.Array:
  """Cells of `random_rows` shifted and scaled to mean 0 and variance 1, row by row in an array of this shape, float32.

  Where all cells agree the result is 0: see `monotony`.
  """
  n = math.prod(shape)
  cells = random_rows(key, rule, n).reshape(-1)[:n].astype(jnp.float32)
  share = jnp.mean(cells)
  return ((cells - share) / jnp.sqrt(jnp.maximum(share * (1 - share), 1e-12))).reshape(shape)


def monotony(key: jax.Array, rule: int, n: int) -> jax.Array:
  """How little `random_rows` hold, float32 in [0, 1]: the largest share of cells that are 0, or 1, or equal to the
  cell one row, or two rows, above. About a half for a rule such as 30, near 1 for one that dies out or stands still."""
  cells = random_rows(key, rule, n)
  share = jnp.mean(cells.astype(jnp.float32))
  repeats = [jnp.mean((cells[lag:] == cells[:-lag]).astype(jnp.float32)) for lag in (1, 2) if len(cells) > lag]
  return jnp.max(jnp.stack([share, 1 - share, *repeats]))
