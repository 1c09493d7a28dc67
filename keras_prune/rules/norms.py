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
    if groups == 1:
        call.fence(x, "its mean and variance mix all channels, so a cut would change every output")
        return Labels(x)
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
    if getattr(layer, "beta", None) is not None:
        call.loud(x)
    return Labels(x)


@rule("Normalization")
def normalization(layer, call, x):
    """(x - mean) / deviation, either adapted (weights) or given (config)."""
    call.loud(x)
    axes = sorted(a % x.ndim for a in layer.axis)
    ids = tuple(x.ravel() if x.shape[a] > 1 else None for a in axes)
    if all(i is None for i in ids):
        return Labels(x)
    if layer.input_mean is None:
        return Labels(x, {"adapt_mean": ids, "adapt_variance": ids})
    given = {"mean": layer.input_mean, "variance": layer.input_variance}
    if any(np.ndim(value) not in (0, len(axes)) for value in given.values()):
        call.fence(x, "its mean or variance has other axes than its input")
    return Labels(x, config={k: ids for k, value in given.items() if np.size(value) > 1})


@rule("LayerScale")
def layer_scale(layer, call, x):
    """keras.applications ConvNeXt: gamma * x."""
    c = call.along(x, -1)
    return Labels(x, {"gamma": (c,)}, {"projection_dim": c})


@rule("CustomScaleLayer")
def custom_scale(layer, call, x, residual):
    """keras.applications InceptionResNetV2: x + scale * residual."""
    call.tie(x, residual)
    return Labels(x)
