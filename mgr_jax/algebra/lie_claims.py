"""All claims about rotations, their ordered products, non-commuting series and uniformization."""

from mgr_jax.algebra import lie_exp_claims, lie_prefix_claims, lie_series_claims, uniformization_claims

CLAIMS = lie_exp_claims.CLAIMS + lie_prefix_claims.CLAIMS + lie_series_claims.CLAIMS + uniformization_claims.CLAIMS
