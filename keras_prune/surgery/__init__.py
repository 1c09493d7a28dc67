"""Zero, cut, strip: write zeros, build the smaller model, cut what is zero."""

from keras_prune.surgery.cutting import copied, cut, cut_with_twins, reweighed, zeroed
from keras_prune.surgery.kernels import smaller_kernels
from keras_prune.surgery.redrawing import drawn_anew
from keras_prune.surgery.settling import psp_layers, settle, structures_left
from keras_prune.surgery.stripping import (
    StripReport,
    allowed_difference,
    check_finite,
    checked_inputs,
    model_inputs,
    relative_difference,
    strip,
)
from keras_prune.surgery.training import fresh_metric, optimizer_like, slot_holder
from keras_prune.surgery.zeros import dead_units, reader_factors, write_zeros, zero, zero_masks

__all__ = [
    "StripReport",
    "allowed_difference",
    "check_finite",
    "checked_inputs",
    "copied",
    "cut",
    "cut_with_twins",
    "dead_units",
    "drawn_anew",
    "fresh_metric",
    "model_inputs",
    "optimizer_like",
    "psp_layers",
    "reader_factors",
    "relative_difference",
    "reweighed",
    "settle",
    "slot_holder",
    "smaller_kernels",
    "structures_left",
    "strip",
    "write_zeros",
    "zero",
    "zero_masks",
    "zeroed",
]
