"""Diagnostics of tropical attention: certified coverage, margins, and who wins. No gradient flows through them."""

import itertools

import jax
import jax.numpy as jnp

from mgr_jax.attention import tropical_margins
from mgr_jax.attention.tropical_heads import Heads, clock_of, scored, time_first
from mgr_jax.attention.tropical_options import Options
from mgr_jax.attention.tropical_scan import Plan, maxplus_attention

PROBED_ROWS = 2


def diagnostics(heads: Heads, y_BTHE, beta, params, ctx, opts: Options):
  """Coverage with `margins`; on a probe what else two rows tell. Float32.

  Always on a probe: tau and decay per key/value head, input_range (of q, k and v together), drift (mean centred output
  in eight parts of the sequence); with finite β also beta and exponent_range = β·input_range. The others are
  described in `tropical_margins`.
  """
  rows = slice(0, PROBED_ROWS)
  q, k, v, decay = jax.lax.stop_gradient(time_first(heads._replace(q=heads.q[rows], k=heads.k[rows], v=heads.v[rows])))
  clock = jax.tree.map(lambda x: x[:, rows], clock_of(ctx, heads.q.shape[0]))
  D, aux = heads.q.shape[-1], {}
  found = None
  if opts.factors:
    found = tropical_margins.winners_and_margins(q, k, v[..., :D], decay, clock, opts.rebase)
  if opts.margins:
    aux["coverage"] = tropical_margins.coverage(found.margin, D, None, beta)
  if ctx.probe:
    aux |= {"tau": jnp.exp(params["log_tau"]), "decay": decay}
    aux |= _probe(found, q, k, v, decay, clock, y_BTHE, beta, D, opts)
  return jax.lax.stop_gradient(jax.tree.map(lambda x: x.astype(jnp.float32), aux))


def _probe(found, q, k, v, decay, clock, y_BTHE, beta, D, opts):
  spread = lambda x: jnp.max(x) - jnp.min(x)
  aux = {"input_range": spread(q) + spread(k) + spread(v)}
  if beta is not None:
    aux |= {"beta": beta, "exponent_range": beta * aux["input_range"]}
  if opts.margins:
    aux |= tropical_margins.margin_statistics(found, clock, D, beta)
  if opts.factors:
    top = maxplus_attention(q, k, jnp.zeros_like(v[..., :1]), decay, clock, Plan(q.shape[0], opts.rebase))[..., 0]
    aux |= tropical_margins.route_statistics(found.key, top, v[..., :D], clock, D)
  if scored(opts):
    centred = y_BTHE[..., :-1] - y_BTHE[..., -1:]
    T = centred.shape[1]
    edges = [T * i // 8 for i in range(9)]
    parts = [centred[:, a : max(b, a + 1)] for a, b in itertools.pairwise(edges)]
    aux["drift"] = jnp.stack([jnp.mean(part) for part in parts])
  return aux
