"""Layers that work on each channel's picture alone: pooling, resampling, dropout, augmentation."""

from __future__ import annotations

import keras
import numpy as np

from keras_prune.rules.conv import channel_axis
from keras_prune.rules.language import Labels, rule


@rule(
    "MaxPooling1D",
    "MaxPooling2D",
    "MaxPooling3D",
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "AdaptiveAveragePooling1D",
    "AdaptiveAveragePooling2D",
    "AdaptiveAveragePooling3D",
    "AdaptiveMaxPooling1D",
    "AdaptiveMaxPooling2D",
    "AdaptiveMaxPooling3D",
    "UpSampling1D",
    "UpSampling2D",
    "UpSampling3D",
    "Resizing",
    "CenterCrop",
    "RandomFlip",
    "RandomRotation",
    "RandomTranslation",
    "RandomZoom",
    "RandomContrast",
    "RandomBrightness",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "ops.MaxPool",
    "ops.AveragePool",
    "ops.Resize",
)
def per_channel(layer, call, x):
    axis = channel_axis(layer)
    return Labels(call.spread(call.along(x, axis), axis))


@rule(
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalAveragePooling3D",
    "GlobalMaxPooling1D",
    "GlobalMaxPooling2D",
    "GlobalMaxPooling3D",
)
def global_pooling(layer, call, x, *mask):
    axis = channel_axis(layer)
    return Labels(call.spread(call.along(x, axis), axis if layer.keepdims else -1))


@rule("Dropout", "GaussianDropout", "GaussianNoise", "AlphaDropout", "ActivityRegularization", "Identity", "Masking")
def passes(layer, call, x, *mask):
    noise = getattr(layer, "noise_shape", None)
    if noise is not None and any(n not in (None, 1) and x.shape[a] > 1 for a, n in enumerate(noise)):
        call.fence(x, "has a noise_shape with a fixed number of channels")
    return Labels(x)


@rule("Rescaling")
def rescaling(layer, call, x):
    if np.any(layer.offset):
        call.loud(x)
    vectors = [key for key in ("scale", "offset") if np.size(getattr(layer, key)) > 1]
    if not vectors:
        return Labels(x)
    if any(np.ndim(getattr(layer, key)) > 1 for key in vectors) or keras.config.image_data_format() != "channels_last":
        call.fence(x, "has a scale or offset of several axes")
    c = call.along(x, -1)
    return Labels(x, config={key: (c,) for key in vectors})
