"""Braid attention: gated sums, stick-breaking sweeps and braid words in place of softmax attention.

`soft` and `discrete` are masked sums with sigmoid or step gates. Executing the word σ_1 ··· σ_k under the swap law
gives a discrete layer's sum, but no braid relation is needed to compute it. `monodromy` sweeps a strand past its keys;
in `word` the tokens are braid letters. Crossing laws and link invariants are in `algebra.braid`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgr_jax.algebra import braid_claims as algebra_claims
from mgr_jax.algebra.additive_gate import prefix_schedule
from mgr_jax.attention import braid_claims, braid_gated, braid_inputs, braid_monodromy, braid_word
from mgr_jax.attention.braid_options import Options
from mgr_jax.attention.mechanism import Mechanism, merge_heads, project_heads, projection_cost, qkv_specs
from mgr_jax.flops import Cost


class Mode(NamedTuple):
  """One way to combine values: `specs(cfg, opts)`, `mix(params, x, v, ctx, cfg, opts) -> (o_BTHD, aux)`, `init_state`,
  `step(params, x, v, state, ctx, cfg, opts) -> (o_BtHD, state)`, `cost`."""

  specs: Callable
  mix: Callable
  init_state: Callable
  step: Callable
  cost: Callable


def _monodromy_specs(cfg, opts):
  return braid_inputs.score_specs(cfg, opts) | {"v_null": braid_monodromy.null_value(cfg)}


_GATED = Mode(braid_inputs.score_specs, braid_gated.mix, braid_gated.init_state, braid_gated.step, braid_gated.cost)
MODES = {
  "soft": _GATED,
  "discrete": _GATED,
  "monodromy": Mode(
    _monodromy_specs, braid_monodromy.mix, braid_monodromy.init_state, braid_monodromy.step, braid_monodromy.cost
  ),
  "word": Mode(braid_word.specs, braid_word.mix, braid_word.init_state, braid_word.step, braid_word.cost),
}


def _has_queries(opts: Options) -> bool:
  return opts.scoring in ("additive", "bilinear")


def param_specs(cfg, opts: Options):
  """wv, wo, the tables of the mode, and wq, wk where logits depend on them."""
  projections = qkv_specs(cfg)
  if not _has_queries(opts):
    projections = {name: projections[name] for name in ("wv", "wo")}
  return projections | MODES[opts.mode].specs(cfg, opts)


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`."""
  v = project_heads(x_BTC, params["wv"])
  out, aux = MODES[opts.mode].mix(params, x_BTC, v, ctx, cfg, opts)
  return merge_heads(out.astype(x_BTC.dtype), params["wo"]), aux


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """The decode state of the mode."""
  return MODES[opts.mode].init_state(cfg, opts, batch, max_len)


def step(params, x_BtC, state, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`."""
  v = project_heads(x_BtC, params["wv"])
  out, state = MODES[opts.mode].step(params, x_BtC, v, state, ctx, cfg, opts)
  return merge_heads(out.astype(x_BtC.dtype), params["wo"]), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """Projections, 4·C·D·(H + K) FLOPs (half without wq and wk), and the mode's own cost."""
  return (1.0 if _has_queries(opts) else 0.5) * projection_cost(cfg) + MODES[opts.mode].cost(cfg, opts, T)


def schedule(params, x_TC: jax.Array, t: int, cfg, opts: Options) -> tuple[jax.Array, jax.Array]:
  """What token t of one document selects in mode `discrete` with additive scores, as a sorting and a prefix length.

  Returns:
    order int32 [H, t+1], the keys 0 .. t by descending score (equal for all query heads of a key/value head unless
    `recency`), and k int32 [H]: head h selects order[h, :k[h]]. `algebra.additive_gate.execute_schedule` turns them
    into the sum by executing σ_1 ··· σ_k.

  Raises:
    ValueError: the options do not describe additive discrete gates.
  """
  if opts.mode != "discrete" or opts.scoring != "additive":
    raise ValueError(f"schedule needs mode=discrete, score=additive; got mode={opts.mode}, score={opts.scoring}")
  x = x_TC[None, : t + 1]
  position = jnp.arange(t + 1)[None, :]
  a, b = braid_inputs.query_scores(params, x, opts), braid_inputs.key_scores(params, x, opts)
  a, b = braid_inputs.shifted(params, a, b, position, position, opts)
  b = jnp.repeat(b[0], cfg.n_head // b.shape[2], axis=1)
  order, k = jax.vmap(prefix_schedule, in_axes=1)(a[0, t:], b)
  return order, k[:, 0]


VARIANTS = (
  "braid",
  "braid(impl=chebyshev)",
  "braid(norm=mass,bound_M=2)",
  "braid(norm=none,recency=true)",
  "braid(score=bilinear,norm=sqrt_count)",
  "braid(mode=discrete)",
  "braid(mode=discrete,impl=sorted,tau=0.5,recency=true)",
  "braid(mode=discrete,bins=16,norm=none)",
  "braid(mode=discrete,score=bilinear,norm=mass)",
  "braid(mode=monodromy)",
  "braid(mode=monodromy,score=additive)",
  "braid(mode=monodromy,score=rapidity)",
  "braid(mode=word)",
  "braid(mode=word,word_law=perm,word_gate=hard,strands=5)",
  "braid(impl=reference)",
)

_RECORD = Mechanism(
  name="braid",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=init_state,
  step=step,
  cost=cost,
  refs=(
    "Artin, 1947, Theory of braids",
    "Burau, 1935, Über Zopfgruppen und gleichsinnig verdrillte Verkettungen",
    "Tan et al., 2024, arXiv 2410.17980 (stick-breaking attention; not its kernel)",
    "Katharopoulos et al., 2020, arXiv 2006.16236 (linear attention state)",
    "Merrill et al., 2024, arXiv 2404.08819 (what fixed depth cannot track)",
  ),
  variants=VARIANTS,
)

MECHANISM = dataclasses.replace(_RECORD, claims=algebra_claims.CLAIMS + braid_claims.mechanism_claims(_RECORD))
