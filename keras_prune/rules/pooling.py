"""Layers that work on each channel's picture alone: pooling, resampling, dropout, augmentation; and recurrence."""

from __future__ import annotations

import numpy as np

from keras_prune.rules.activations import activate, elementwise
from keras_prune.rules.conv import channel_axis
from keras_prune.rules.language import Labels, rule


@rule("MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D", "AveragePooling3D",
      "AdaptiveAveragePooling1D", "AdaptiveAveragePooling2D", "AdaptiveAveragePooling3D", "AdaptiveMaxPooling1D",
      "AdaptiveMaxPooling2D", "AdaptiveMaxPooling3D", "UpSampling1D", "UpSampling2D", "UpSampling3D", "Resizing",
      "CenterCrop", "RandomCrop", "RandomFlip", "RandomRotation", "RandomTranslation", "RandomZoom", "RandomShear",
      "RandomContrast", "RandomBrightness", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D")
def per_channel(layer, call, x):
    axis = channel_axis(layer)
    return Labels(call.spread(call.along(x, axis), axis))


@rule("GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "GlobalMaxPooling1D",
      "GlobalMaxPooling2D", "GlobalMaxPooling3D")
def global_pooling(layer, call, x, *mask):
    axis = channel_axis(layer)
    return Labels(call.spread(call.along(x, axis), axis if layer.keepdims else -1))


@rule("Dropout", "GaussianDropout", "GaussianNoise", "AlphaDropout", "ActivityRegularization", "Identity", "Masking")
def passes(layer, call, x, *mask):
    return Labels(x)


@rule("Rescaling")
def rescaling(layer, call, x):
    if np.size(layer.scale) > 1 or np.size(layer.offset) > 1:
        call.fence(x, "has one scale or offset per channel")
    if np.any(layer.offset):
        call.loud(x)
    return Labels(x)


@rule("SimpleRNN", "GRU", "LSTM")
def recurrent(layer, call, x, *state):
    """A unit is a cell: its gates' columns, its recurrent row, its state."""
    out = call.fresh(layer.units)
    for ids in state:
        call.fence(ids, "is a mask or an initial state of a recurrent layer")
    activate(call, out, layer.activation)
    gate = getattr(layer, "recurrent_activation", None)
    if gate is not None and not elementwise(gate)[0]:  # what a gate makes of 0 is harmless: the state is 0
        call.fence(out, "its recurrent activation mixes units")
    gates = np.tile(out, layer.cell.kernel.shape[-1] // layer.units)
    bias = getattr(layer.cell, "bias", None)
    weights = {"cell.kernel": (call.along(x, -1), gates), "cell.recurrent_kernel": (out, gates)}
    if bias is not None:
        weights["cell.bias"] = (gates,) if len(bias.shape) == 1 else (None, gates)
    outputs = [call.spread(out, -1, i) for i in range(len(call.outputs))]
    return Labels(outputs[0] if len(outputs) == 1 else outputs, weights, {"units": out}, positions=call.lengths(x)[0])

