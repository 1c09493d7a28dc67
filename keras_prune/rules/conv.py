"""Convolutions: plain, grouped, depthwise, separable, transposed."""

from __future__ import annotations

import math

import keras
import numpy as np

from keras_prune.rules.activations import activate
from keras_prune.rules.language import Labels, rule


def channel_axis(layer) -> int:
    data_format = getattr(layer, "data_format", None) or keras.config.image_data_format()
    return 1 if data_format == "channels_first" else -1


@rule("Conv1D", "Conv2D", "Conv3D")
def conv(layer, call, x):
    axis = channel_axis(layer)
    c = call.along(x, axis)
    taps = (None,) * (layer.rank)
    groups, per_group = layer.groups, len(c) // layer.groups
    config = {}
    if groups == 1:
        read, out = c, call.fresh(layer.filters)
    elif groups >= per_group and c.any():
        # Many small groups (depthwise and its kin): a unit is a whole group, its inputs and its outputs.
        by_group = c.reshape(groups, per_group)
        call.tie(by_group, by_group[:, :1])
        read, out = None, np.repeat(by_group[:, 0], layer.filters // groups)
        config["groups"] = lambda survivors: survivors(c) // per_group
    else:
        # Few large groups: a unit is the j-th channel of every group, on either side for itself.
        by_group = c.reshape(groups, per_group)
        call.tie(by_group, by_group[:1])
        read, out = by_group[0], np.tile(call.fresh(layer.filters // groups), groups)
    activate(call, out, layer.activation)
    return Labels(call.spread(out, axis), {"kernel": (*taps, read, out), "bias": (out,)}, {"filters": out, **config})


@rule("DepthwiseConv1D", "DepthwiseConv2D")
def depthwise(layer, call, x):
    axis = channel_axis(layer)
    c = call.along(x, axis)
    times, config = None, {}
    if c.any():
        out = np.repeat(c, layer.depth_multiplier)
    else:  # the input's channels cannot leave, but the j-th output of every one of them can
        times = call.fresh(layer.depth_multiplier)
        out, config = np.tile(times, len(c)), {"depth_multiplier": times}
    activate(call, out, layer.activation)
    weights = {"kernel": (*(None,) * layer.rank, c, times), "bias": (out,)}
    return Labels(call.spread(out, axis), weights, config)


@rule("SeparableConv1D", "SeparableConv2D")
def separable(layer, call, x):
    axis = channel_axis(layer)
    c = call.along(x, axis)
    out = call.fresh(layer.filters)
    activate(call, out, layer.activation)
    taps = (None,) * layer.rank
    weights = {
        "depthwise_kernel": (*taps, c, None),
        "pointwise_kernel": (*taps, np.repeat(c, layer.depth_multiplier), out),
        "bias": (out,),
    }
    return Labels(call.spread(out, axis), weights, {"filters": out})


@rule("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def transposed(layer, call, x):
    """The kernel's last two axes are swapped: (taps, out, in)."""
    axis = channel_axis(layer)
    c, out = call.along(x, axis), call.fresh(layer.filters)
    activate(call, out, layer.activation)
    positions = math.prod(call.lengths(x)) // len(c)
    return Labels(
        call.spread(out, axis),
        {"kernel": (*(None,) * layer.rank, out, c), "bias": (out,)},
        {"filters": out},
        positions=positions,
    )
