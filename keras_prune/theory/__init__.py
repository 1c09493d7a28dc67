"""What can be proved about pruning, as formulas of numpy alone: sampled channels, perturbed weights."""

from keras_prune.theory.sampling import (
    bernstein_certificate,
    bernstein_draws,
    draws_for,
    expected_distinct,
    multipliers,
    sample_size,
)

__all__ = [
    "bernstein_certificate",
    "bernstein_draws",
    "draws_for",
    "expected_distinct",
    "multipliers",
    "sample_size",
]
