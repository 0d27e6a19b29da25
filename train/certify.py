"""Claims measured on the configuration of a run before it trains."""

from typing import Any

import jax

from mgr_jax.attention import resolve
from mgr_jax.claims import Claim, run_claims
from mgr_jax.config import GPTConfig
from mgr_jax.conformance import conformance_claims, quick_claims
from mgr_jax.model import reversible_claims


def claims_for(cfg: GPTConfig, level: str) -> tuple[Claim, ...]:
  """`auto`: causality, decode parity, and that reversible stacks recover their input bit for bit where they promise it;
  `full`: all conformance claims and those of the mechanisms too; `off`: none."""
  if level == "off":
    return ()
  exact = (reversible_claims.reconstruction_claim(cfg),) if reversible_claims.reconstructs_exactly(cfg) else ()
  if level == "auto":
    return quick_claims(cfg) + exact
  layers = resolve(cfg)
  used = {layer.mechanism.name: layer.mechanism for layer in layers}
  own = tuple(claim for mechanism in used.values() for claim in mechanism.claims)
  if any(layer.wrap is not None for layer in layers):
    own += reversible_claims.CLAIMS
  return conformance_claims(cfg) + exact + own


def certify(cfg: GPTConfig, level: str, seed: int) -> list[dict[str, Any]]:
  """Runs the claims; one entry of `summary.json` each, `pass` only if the law holds and its broken twin was caught."""
  return [
    {
      "name": r.name,
      "statement": r.statement,
      "residual": r.residual,
      "tolerance": r.tolerance,
      "pass": r.holds,
      "control_caught": r.control_caught,
      "seconds": r.seconds,
      "message": r.message,
    }
    for r in run_claims(claims_for(cfg, level), jax.random.key(seed))
  ]
