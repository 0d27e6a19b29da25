"""Simplicial attention: scores on triangles of tokens, and what chains of pairwise attention can do instead.

`trilinear` takes a softmax over pairs (i, j) of earlier tokens with a score linear in query, key and second key;
`linear2` gives pairs factorised weights and costs linear time. `two_hop` and `resolvent` mix powers of one softmax
attention matrix: no triangle enters them, they are the control. Whether a trained head uses three-way structure is
measured by the mutual information of its two tokens, zero exactly when pairs would do.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from mgr_jax.algebra import simplicial_claims as algebra_claims
from mgr_jax.attention import simplicial_chain as chain
from mgr_jax.attention import simplicial_pairs as pairs
from mgr_jax.attention import simplicial_sums as sums
from mgr_jax.attention.mechanism import Mechanism, merge_heads, projection_cost, qkv_specs
from mgr_jax.attention.simplicial_chain_claims import CLAIMS as CHAIN_CLAIMS
from mgr_jax.attention.simplicial_decode_claims import layer_claims
from mgr_jax.attention.simplicial_form_claims import CLAIMS as FORM_CLAIMS
from mgr_jax.attention.simplicial_linear_claims import CLAIMS as LINEAR_CLAIMS
from mgr_jax.attention.simplicial_options import Options
from mgr_jax.attention.simplicial_pair_claims import CLAIMS as PAIR_CLAIMS
from mgr_jax.flops import Cost


class Mode(NamedTuple):
  """One way to combine values: `specs(cfg, opts)` beyond q, k, v, o; `mix(params, x, ctx, cfg, opts) -> (o_BTHD, aux)`;
  `init_state`; `step(params, x, state, ctx, cfg, opts) -> (o_BtHD, state)`; `cost` without projections."""

  specs: Callable
  mix: Callable
  init_state: Callable
  step: Callable
  cost: Callable


MODES = {
  "trilinear": Mode(pairs.specs, pairs.mix, pairs.init_state, pairs.step, pairs.cost),
  "linear2": Mode(sums.specs, sums.mix, sums.init_state, sums.step, sums.cost),
  "two_hop": Mode(chain.hop_specs, chain.mix_hops, chain.init_hops, chain.step_hops, chain.hops_cost),
  "resolvent": Mode(
    chain.resolvent_specs, chain.mix_resolvent, chain.init_resolvent, chain.step_resolvent, chain.resolvent_cost
  ),
}


def param_specs(cfg, opts: Options):
  """wq, wk, wv, wo and the tables of the mode. Raises ValueError when head size or context do not suit."""
  opts.check_fits(cfg)
  return qkv_specs(cfg) | MODES[opts.mode].specs(cfg, opts)


def apply(params, x_BTC, ctx, cfg, opts: Options):
  """One layer over a whole sequence; see `Mechanism`."""
  out, aux = MODES[opts.mode].mix(params, x_BTC, ctx, cfg, opts)
  return merge_heads(out, params["wo"]), aux


def init_state(cfg, opts: Options, batch: int, max_len: int):
  """The decode state of the mode."""
  return MODES[opts.mode].init_state(cfg, opts, batch, max_len)


def step(params, x_BtC, state, ctx, cfg, opts: Options):
  """t >= 1 new tokens; see `Mechanism`."""
  out, state = MODES[opts.mode].step(params, x_BtC, state, ctx, cfg, opts)
  return merge_heads(out, params["wo"]), state


def cost(cfg, opts: Options, T: int) -> Cost:
  """Projections, 4·C·D·(H + K) FLOPs, and the mode's own cost."""
  return projection_cost(cfg) + MODES[opts.mode].cost(cfg, opts, T)


_RECORD = Mechanism(
  name="simplicial",
  options=Options,
  param_specs=param_specs,
  apply=apply,
  init_state=init_state,
  step=step,
  cost=cost,
  refs=(
    "Clift et al., 2019, arXiv 1909.00668 (2-simplicial attention; not its logical interpretation)",
    "Roy et al., 2025, arXiv 2507.02754 (windows, invariant forms; not its GPU kernel)",
    "Sanford et al., 2023, arXiv 2306.02896 (Match3, what pairwise attention cannot do)",
    "Kozachinskiy et al., 2025, arXiv 2501.19215 (the same without precision; not its faster scores)",
    "Katharopoulos et al., 2020, arXiv 2006.16236 (linear attention state)",
    "Press et al., 2022, arXiv 2108.12409 (decay slopes)",
  ),
  variants=(
    "simplicial",
    "simplicial(w1=9,w2=5,score=hadamard,value_mix=sum,sink=true,block=8,measure_mi=true)",
    "simplicial(w1=40,w2=3,charges=none,value_mix=product,pair=false,impl=blocked)",
    "simplicial(mode=two_hop,hops=3)",
    "simplicial(mode=resolvent)",
    "simplicial(mode=linear2)",
    "simplicial(mode=linear2,order=increasing,feature=exp,decay=alibi,value_mix=sum)",
    "simplicial(mode=linear2,order=increasing,value_mix=product,decay=alibi,impl=chunked)",
  ),
)

LAYER_CLAIMS = FORM_CLAIMS + CHAIN_CLAIMS + PAIR_CLAIMS + LINEAR_CLAIMS + layer_claims(_RECORD)

MECHANISM = dataclasses.replace(_RECORD, claims=algebra_claims.CLAIMS + LAYER_CLAIMS)
