"""Normalisations: those that work on each channel alone are cut along, the others are fences."""

from __future__ import annotations

import numpy as np

from keras_prune.rules.language import Labels, rule


@rule("BatchNormalization")
def batch_normalization(layer, call, x, *mask):
    c = call.along(x, layer.axis)
    if not layer.scale:
        call.loud(c)  # without gamma a zero comes out as -mean/deviation
    return Labels(x, {name: (c,) for name in ("gamma", "beta", "moving_mean", "moving_variance")})


@rule("GroupNormalization")
def group_normalization(layer, call, x):
    """Exact when a unit is a whole group of the norm: its statistics then never see another unit."""
    c = call.along(x, layer.axis)
    groups = layer.groups if layer.groups != -1 else len(c)
    per_group = len(c) // groups
    by_group = c.reshape(groups, per_group)
    call.tie(by_group, by_group[:, :1])
    config = {} if layer.groups == -1 else {"groups": lambda survivors: survivors(c) // per_group}
    return Labels(x, {"gamma": (c,), "beta": (c,)}, config)


@rule("LayerNormalization", "RMSNormalization")
def layer_normalization(layer, call, x, *mask):
    axes = np.atleast_1d(layer.axis)
    if any(x.shape[a] > 1 for a in axes):
        call.fence(x, "its mean and variance mix all channels, so a cut would change every output")
    return Labels(x)


@rule("Normalization")
def normalization(layer, call, x):
    if np.any(x):
        call.fence(x, "holds one adapted mean and variance per channel")
    return Labels(call.frozen())


@rule("LayerScale")
def layer_scale(layer, call, x):
    """keras.applications ConvNeXt: gamma * x."""
    return Labels(x, {"gamma": (call.along(x, -1),)})


@rule("CustomScaleLayer")
def custom_scale(layer, call, x, residual):
    """keras.applications InceptionResNetV2: x + scale * residual."""
    call.tie(x, residual)
    return Labels(x)
