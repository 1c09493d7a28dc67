"""What can be proved about pruning, as formulas of numpy alone: sampled channels, perturbed weights."""

from keras_prune.theory.sampling import (
    MODES,
    Draw,
    bernstein_certificate,
    bernstein_draws,
    draw,
    draws_for,
    expected_distinct,
    multipliers,
    sample_size,
)

__all__ = [
    "MODES",
    "Draw",
    "bernstein_certificate",
    "bernstein_draws",
    "draw",
    "draws_for",
    "expected_distinct",
    "multipliers",
    "sample_size",
]
