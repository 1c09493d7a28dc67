"""Zero, cut, strip: write zeros, build the smaller model, cut what is zero."""

from keras_prune.surgery.cutting import cut, zeroed
from keras_prune.surgery.stripping import (
    StripReport,
    check_finite,
    checked_inputs,
    model_inputs,
    relative_difference,
    strip,
)
from keras_prune.surgery.zeros import dead_units, write_zeros, zero, zero_masks

__all__ = [
    "StripReport",
    "check_finite",
    "checked_inputs",
    "cut",
    "dead_units",
    "model_inputs",
    "relative_difference",
    "strip",
    "write_zeros",
    "zero",
    "zero_masks",
    "zeroed",
]
