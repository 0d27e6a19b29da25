"""Claims about writing to leaves: which tokens a leaf holds, what a write leaves alone, overwriting in blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra.ifs_map_claims import generator
from mgr_jax.attention.fractal_latest import find_latest
from mgr_jax.attention.fractal_options import Options
from mgr_jax.attention.fractal_routing import address, table_features
from mgr_jax.attention.fractal_samples import DEPTH, M, random_paths, random_sides
from mgr_jax.attention.fractal_table import Sides, read, table_overwrite, token_by_token
from mgr_jax.attention.fractal_tiles import tiled_sum
from mgr_jax.claims import Check, claim, relative_difference, worst_of


@jax.jit
def _hard_sums(q, k, v):
  options = Options(m=2, depth=3, address="hard", position="none")
  return tiled_sum(Sides(address(q, options), address(k, options), v), None, None, options)


def _leaves(p, depth):
  return np.argmax(p.reshape(*p.shape[:-1], depth, -1), -1) @ (2 ** np.arange(depth - 1, -1, -1))


def _hard_address(ignore_last: bool) -> Check:
  """Errors of sums, counts and latest tokens of the same leaf against brute force, on small whole numbers."""

  def measure(key, scale):
    del scale
    rng = generator(key)
    q, k = (random_paths(rng, 1, 1, *r, 100, m=2).astype(np.float32) for r in ((2,), ()))
    v = rng.integers(-5, 6, (1, 1, 100, 2)).astype(np.float32)
    leaf_q, leaf_k = _leaves(q, 3)[0, 0], _leaves(k, 3)[0, 0]
    if ignore_last:
      leaf_q, leaf_k = leaf_q // 2, leaf_k // 2
    same = (leaf_q[:, :, None] == leaf_k) & np.tri(100, dtype=bool)
    latest = np.max(np.where(same, np.arange(100), -1), -1)
    out, mass = _hard_sums(q, k, v)
    found = jax.jit(find_latest)(_leaves(q, 3)[0, 0].astype(np.int32), _leaves(k, 3)[0, 0].astype(np.int32))
    errors = np.abs(out[0, 0] - same @ v[0, 0]), np.abs(mass[0, 0] - same.sum(-1)), np.abs(found.latest - latest)
    return worst_of(np.max(e) for e in errors)

  return measure


@functools.partial(jax.jit, static_argnums=1)
def _one_write(k, hard, v, gate, table):
  options = Options(m=M, depth=DEPTH, mode="memory", rule="overwrite", address="hard" if hard else "soft")
  k = address(k, options)
  sides = Sides(k[:, :, None], k, v, gate_BKT=gate)
  phi = table_features(k, options)[0, 0, 0]
  _, new = token_by_token(sides, table, options, lambda table, q: read(table, table_features(q, options)[..., None, :]))
  return phi, jnp.max(jnp.abs(new - table)[0, 0, 0], -1)


def _interference(roll: int) -> Check:
  """Change of a leaf by one write beyond what it may be: 0 at other leaves (hard), 2gφ of values in [-1, 1] (soft)."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    for case in range(2 * scale):
      hard = case % 2 == 0
      k, gate = random_paths(rng, 1, 1, 1).astype(np.float32), rng.uniform(size=(1, 1, 1)).astype(np.float32)
      v, table = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((1, 1, 1, 2), (1, 1, 1, M**DEPTH, 3)))
      phi, change = _one_write(k, hard, v, gate, table)
      allowed = 2 * np.roll(phi, roll) * (1.0 if hard else float(gate[0, 0, 0]))
      worst = worst_of(worst, float(np.max(change - allowed * (1 + 1e-6))))
    return worst

  return measure


@functools.partial(jax.jit, static_argnums=1)
def _overwrites(sides, options, additive):
  blocks, _ = table_overwrite(sides, None, options)
  soft_read = lambda table, q: read(table, table_features(q, options, sides.alpha_K)[:, :, :, None])[:, :, :, 0]
  rule = Options(m=M, depth=DEPTH, mode="memory")
  serial, _ = token_by_token(sides, None, options, soft_read)
  added, _ = token_by_token(sides, None, rule, soft_read)
  return blocks, jnp.where(additive, added, serial)


def _erasure(additive: bool) -> Check:
  """Relative difference of overwriting in blocks from one token at a time, and by how much a mass exceeds one."""

  def measure(key, scale):
    del scale
    options = Options(m=M, depth=DEPTH, mode="memory", rule="overwrite")
    with jax.enable_x64(True):
      blocks, serial = _overwrites(random_sides(generator(key), options, slopes=False), options, additive)
      return worst_of(relative_difference(blocks, serial), float(jnp.max(serial[..., -1])) - 1)

  return measure


CLAIMS = (
  claim(
    "fractal.hard_address",
    "one-hot digits: a sum runs over exactly the earlier tokens of the same leaf; sorting finds the latest of them",
    _hard_address(False),
    0.0,
    _hard_address(True),
  ),
  claim(
    "fractal.interference",
    "a write changes no other leaf (hard), and leaf w by at most gφ_w times the distance of values (soft)",
    _interference(0),
    0.0,
    _interference(1),
  ),
  claim(
    "fractal.overwrite_blocks",
    "overwriting in blocks of 16 tokens equals one token at a time, and the mass of a read never exceeds one",
    _erasure(False),
    1e-12,
    _erasure(True),
    refs=("Yang et al., 2023, arXiv 2312.06635",),
  ),
)
