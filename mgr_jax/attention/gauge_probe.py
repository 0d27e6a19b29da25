"""Diagnostics: how far tokens turn, how much their rotations fail to commute, how exact the products are."""

import jax
import jax.numpy as jnp

from mgr_jax.algebra import lie
from mgr_jax.attention.gauge_connection import capped
from mgr_jax.attention.gauge_fibres import fibre
from mgr_jax.attention.gauge_options import Options
from mgr_jax.attention.gauge_poisson import rate

WINDOW = 8


def diagnostics(params, r, F, cfg, opts: Options) -> dict[str, jax.Array]:
  """Readings of one layer.

  `angle_mean`, `angle_max`: principal angles of the learned part of a step. `cap_frac`: share of blocks whose raw
  generator is longer than theta_max. `drift`: largest |TᵀT - I|. `commutator`: mean |U'U - UU'| / √2b of consecutive
  learned steps, which a constant change of frames leaves alone. `abelian_gap`: mean |Π U - exp(Σ A)| / √2b over windows
  of 8 tokens, what order contributes there. `bch2_ratio`: |½ Σ_(s<t) [a_t, a_s]| / |Σ a| on the same windows, the
  first term of that. Norms are Frobenius norms. Poisson: the rate `m` of every head.
  """
  r, T = jax.lax.stop_gradient((r, fibre(opts.b).rotation(F)))
  b, rule = opts.b, fibre(opts.b)
  length = jnp.sqrt(jnp.sum(r * r, -2))
  a = jnp.swapaxes(rule.coordinates(capped(r, opts.theta_max)), -1, -2)
  A, edge = lie.skew(a, b), lie.exp_so(a, b, opts.theta_max)
  angles = jnp.linalg.svd(A, compute_uv=False)[..., : b // 2 * 2]
  norm = lambda M: jnp.sqrt(jnp.sum(M * M, (-2, -1)))
  aux = {
    "angle_mean": jnp.mean(angles),
    "angle_max": jnp.max(angles),
    "cap_frac": jnp.mean((length > opts.theta_max).astype(jnp.float32)),
    "drift": jnp.max(lie.drift(rule.matrix(T))),
  }
  if opts.mixer == "poisson":
    aux["m"] = rate(params, cfg.n_kv_head, opts).reshape(-1)
  if r.shape[1] > 1:
    aux["commutator"] = jnp.mean(norm(lie.bracket(edge[:, 1:], edge[:, :-1]))) / (2 * b) ** 0.5
  if r.shape[1] >= WINDOW:
    aux |= _windows(a, A, edge, opts)
  return aux


def _windows(a, A, edge, opts):
  """Readings over disjoint windows of `WINDOW` tokens."""
  n = A.shape[1] // WINDOW
  cut = lambda x: x[:, : n * WINDOW].reshape(x.shape[0], n, WINDOW, *x.shape[2:])
  a, A, edge = cut(a), cut(A), cut(edge)
  product, before, second = edge[:, :, 0], A[:, :, 0], 0.0
  for t in range(1, WINDOW):
    product = lie.matmul(edge[:, :, t], product)
    second += 0.5 * lie.bracket(A[:, :, t], before)
    before += A[:, :, t]
  commuting = lie.exp_so(jnp.sum(a, 2), opts.b, WINDOW * opts.theta_max)
  norm = lambda M: jnp.sqrt(jnp.sum(M * M, (-2, -1)))
  return {
    "abelian_gap": jnp.mean(norm(product - commuting)) / (2 * opts.b) ** 0.5,
    "bch2_ratio": jnp.sum(norm(second)) / jnp.maximum(jnp.sum(norm(before)), 1e-12),
  }
