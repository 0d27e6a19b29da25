"""Softmax attention: tiles, windows and gradients against the dense form in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgr_jax.attention.standard import dense_attention, tiled_attention
from mgr_jax.attention.tiles import MAX_SPANS, TILE, join_tiles, spans, split_tiles


def qkv(key, T, dtype=jnp.float64):
  shapes = [(1, 2, 2, T, 4), (1, 2, T, 4), (1, 2, T, 4)]
  return [jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)]


@pytest.mark.parametrize("T", [1, TILE + 1, 3 * TILE - 7])
@pytest.mark.parametrize(("window", "bounded", "packed"), [(0, True, False), (0, False, True), (70, True, True)])
def test_tiles_equal_the_dense_form_in_float64(key, T, window, bounded, packed):
  with jax.enable_x64(True):
    q, k, v = qkv(key, T)
    segments = jnp.arange(T)[None, :] // 50 if packed else None
    cotangent = jax.random.normal(key, q.shape, jnp.float64)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_pullback(f, q, k, v):
      out, pull = jax.vjp(lambda *qkv: f(*qkv)[0], q, k, v)
      return out, pull(cotangent)

    fast = value_and_pullback(lambda *a: tiled_attention(*a, segments, window, bounded), q, k, v)
    slow = value_and_pullback(lambda *a: dense_attention(*a, segments, window), q, k, v)
    np.testing.assert_allclose(fast[0], slow[0], atol=1e-6)
    for a, b in zip(fast[1], slow[1], strict=True):
      np.testing.assert_allclose(a, b, atol=5e-6)
    if T > TILE:
      shorter, _ = dense_attention(q, k, v, segments, window=3)
      assert np.max(np.abs(fast[0] - shorter)) > 1e-2, "another window is another function"


def test_unbounded_scores_do_not_overflow(key):
  q, k, v = (100 * x for x in qkv(key, 70, dtype=jnp.float32))
  assert np.all(np.isfinite(tiled_attention(q, k, v, None, 0, False)[0]))
  assert not np.all(np.isfinite(tiled_attention(q, k, v, None, 0, True)[0])), "the bound is what makes it safe"


@pytest.mark.parametrize("T", [TILE, 4 * TILE, 40 * TILE])
@pytest.mark.parametrize("window", [0, 1, 100])
def test_spans_cover_every_query_once_and_every_visible_key(T, window):
  found = spans(T, window)
  assert len(found) <= MAX_SPANS
  assert [s.q_start for s in found[1:]] == [s.stop for s in found[:-1]]
  assert (found[0].q_start, found[-1].stop) == (0, T)
  for s in found:
    first_visible = max(0, s.q_start - window + 1) if window else 0
    assert s.k_start <= first_visible
  area = sum((s.stop - s.q_start) * (s.stop - s.k_start) for s in found)
  assert area <= T * T * (0.5 + 0.5 / min(MAX_SPANS, T // TILE))


def test_split_and_join_are_inverse(key):
  x = jax.random.normal(key, (2, 3 * TILE, 5))
  parts = [join_tiles(split_tiles(x, s, 1), 1) for s in spans(3 * TILE)]
  np.testing.assert_array_equal(jnp.concatenate(parts, 1), x)
