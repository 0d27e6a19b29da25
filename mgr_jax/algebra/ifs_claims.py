"""All claims about iterated function systems, leaf addresses and the memory built on them, each with a broken twin."""

from mgr_jax.algebra import ifs_address_claims, ifs_map_claims, ifs_memory_claims

CLAIMS = ifs_map_claims.CLAIMS + ifs_address_claims.CLAIMS + ifs_memory_claims.CLAIMS
