"""Options of `quaternion` and everything that can be wrong with them."""

import dataclasses

CHOICES = {
  "rotor_action": ("left", "sandwich", "none"),
  "rope_mode": ("right_rotor", "score_only", "standard"),
  "rotor_strength": ("fixed", "learned"),
  "impl": ("auto", "tiled", "reference"),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `quaternion`.

  Args:
    rotor_action: how the relative rotor u = q̂ k̂* moves a value: `left` u v, `sandwich` u v ū, `none` not at all.
    rope_mode: `right_rotor` multiplies queries and keys by a position on the right, so that scores and rotors are
      relative; `score_only` rotates a copy for the scores; `standard` rotates both by half-split pairs, which ties
      rotors to absolute positions: a negative control.
    rotor_strength: `learned` raises rotors to a power in (0, 1) per key/value head, at first 0.05.
    impl: `tiled` (what `auto` picks) or `reference` (every relative rotor formed).
  """

  rotor_action: str = "left"
  rope_mode: str = "right_rotor"
  rotor_strength: str = "fixed"
  impl: str = "auto"

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(f"quaternion option {name}={getattr(self, name)} is not one of {', '.join(choices)}")
    if self.rotor_action == "none":
      if self.rotor_strength == "learned":
        raise ValueError(
          "quaternion option rotor_strength=learned has no effect with rotor_action=none; it needs left or sandwich"
        )
      if self.rope_mode == "standard":
        raise ValueError(
          "quaternion option rope_mode=standard is rope_mode=score_only when rotor_action=none; use score_only"
        )

  def check_head_size(self, head_dim: int) -> None:
    """Raises `ValueError` unless a head is a whole number of quaternions."""
    if head_dim % 4:
      raise ValueError(f"quaternion needs a head size that is a multiple of 4, not {head_dim}; change n_embd or n_head")
