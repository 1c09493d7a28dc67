"""Zero, cut, strip: write zeros, build the smaller model, cut what is zero."""

from keras_prune.surgery.cutting import cut
from keras_prune.surgery.stripping import StripReport, strip
from keras_prune.surgery.zeros import dead_units, zero, zero_masks

__all__ = ["StripReport", "cut", "dead_units", "strip", "zero", "zero_masks"]
