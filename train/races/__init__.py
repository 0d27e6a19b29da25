"""Races between optimizers or schedules on problems small enough to repeat over seeds and learning rates."""
