"""Options of `octonion` and everything that can be wrong with them."""

import dataclasses

import jax.numpy as jnp

CHOICES = {
  "bracketing": ("early", "late", "mix"),
  "rope_mode": ("score_only", "standard"),
  "feature_dtype": ("compute", "fp32"),
  "impl": ("auto", "reference", "tiled"),
}
COMPONENTS, OPERATOR = 8, 29
INITIAL_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `octonion`.

  Args:
    bracketing: of query, inverse key and value: `early` (q k̄)v, `late` q(k̄ v), or `mix`, the second plus a learned
      share λ of their difference per key/value head, 0.05 at first.
    rope_mode: `score_only` rotates copies of query and key for the scores; `standard` rotates what is multiplied as
      well, which makes outputs depend on absolute positions: a negative control.
    feature_dtype: of the numbers that are summed over keys and of their sums: that of activations, or `fp32`.
    impl: `tiled` (what `auto` picks), or `reference`: the products of every query and key, summed in float32.
  """

  bracketing: str = "early"
  rope_mode: str = "score_only"
  feature_dtype: str = "compute"
  impl: str = "auto"

  def __post_init__(self):
    if self.rope_mode == "right_rotor":
      raise ValueError(
        "octonion option rope_mode=right_rotor does not exist: for p_t = exp(uθt) the product (q p_t)(p̄_s k̄) depends "
        "on t and s, not on t - s alone, because three octonions need not associate; use one of score_only, standard"
      )
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(f"octonion option {name}={getattr(self, name)} is not one of {', '.join(choices)}")

  @property
  def width(self) -> int:
    """Numbers per octonion that are summed over keys."""
    return COMPONENTS if self.bracketing == "late" else OPERATOR

  def dtype(self, cfg):
    """Of what is summed over keys."""
    return jnp.dtype("float32" if self.feature_dtype == "fp32" else cfg.compute_dtype)


def check_head_size(cfg) -> None:
  """Raises `ValueError` unless heads consist of whole octonions."""
  if cfg.head_dim % COMPONENTS:
    fits = -(-cfg.head_dim // COMPONENTS) * COMPONENTS
    raise ValueError(
      f"octonion needs a head size that is a multiple of 8, not {cfg.head_dim} (n_embd={cfg.n_embd} / "
      f"n_head={cfg.n_head}); use n_embd={fits * cfg.n_head}"
    )
