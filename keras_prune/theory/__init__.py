"""What can be proved about pruning, as formulas of numpy alone: sampled channels, perturbed weights."""

from keras_prune.theory.perturbation import (
    SLOPES,
    convolution_bound,
    convolution_norm,
    largest_fraction,
    pooling_norm,
    relative_error,
    spectral_norm,
)
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
    "SLOPES",
    "Draw",
    "bernstein_certificate",
    "bernstein_draws",
    "convolution_bound",
    "convolution_norm",
    "draw",
    "draws_for",
    "expected_distinct",
    "largest_fraction",
    "multipliers",
    "pooling_norm",
    "relative_error",
    "sample_size",
    "spectral_norm",
]
