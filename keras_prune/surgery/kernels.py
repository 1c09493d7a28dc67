"""Smaller kernels: taps that are zero for all channels, inputs that a kernel does not read, kernels of zeros.

A kernel of zeros is no layer any more: what it makes are numbers, and a Rescaling layer writes them. What else a kernel
can lose, and at what price, is said in `rewiring.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

from keras_prune.internals import graph_of, is_graph, mask_of, nodes_of, origin_of
from keras_prune.surgery.rebuilding import Rebuild
from keras_prune.surgery.rewiring import (
    CONVOLUTIONS,
    DEPTHWISE,
    TRANSPOSED,
    Rewiring,
    candidates,
    channels_of,
    milliseconds,
)

SHAPELESS = (layers.BatchNormalization, layers.ReLU, layers.LeakyReLU, layers.Activation, layers.Dropout)
"""Layers that keep the shape of what they are given."""

WORTH = 0.9
"""A rewiring is only looked at if it leaves less than this fraction of the multiply-accumulates."""

FASTER = 0.95
"""And it has to be measured below this fraction of the time, so that noise decides nothing."""


def smaller_kernels(model: keras.Model, rewire="faster", latency=None) -> tuple[keras.Model, list[str]]:
    """A model with the same outputs and smaller kernels.

    Args:
        model: any built model.
        rewire: what may be put in front of a kernel to make it smaller (explicit padding, gathers): "faster", where
            that is measured faster than the kernel with its zeros; True, wherever it saves multiply-accumulates; False,
            nothing.
        latency: (model) -> milliseconds, for "faster"; default: on this machine, in turns, batches of up to 32.

    Returns:
        (model, notes); the model itself where no kernel can become smaller.
    """
    chosen: dict[int, Rewiring] = {}
    silent: dict[int, keras.layers.Layer] = {}
    notes: list[str] = []
    kept_dense = []
    for layer, tensors, is_shown in _called_layers(model):
        if _is_silent(layer):
            if not is_shown:  # a head of zeros is still to be trained
                silent[id(layer)] = layer
            continue
        plain, *others = candidates(layer, tensors)
        best = _best(plain, [o for o in others if o.macs < WORTH * plain.macs], tensors[0], rewire, latency)
        if best is None:
            kept_dense.append(layer.name)
            best = plain
        if not best.is_plain or (best.taps and best.kernel_size != tuple(layer.kernel_size)):
            chosen[id(layer)] = best
    if kept_dense:
        notes.append(
            f"{len(kept_dense)} kernels keep zeros that a gather could skip, as that was not measured faster: "
            + _few(kept_dense)
        )
    if silent:
        names = [layer.name for layer in silent.values()]
        notes.append(f"{len(silent)} layers with kernels of zeros became numbers: {_few(names)}")
    if not chosen and not silent:
        return model, notes
    smaller = [r.layer.name for r in chosen.values() if r.is_plain]
    gathered = [r.layer.name for r in chosen.values() if not r.is_plain]
    if smaller:
        notes.append(f"{len(smaller)} kernels lost taps: {_few(smaller)}")
    if gathered:
        notes.append(f"{len(gathered)} kernels are smaller behind padding, cropping or a gather: {_few(gathered)}")
    return _Smaller(model, chosen, silent).model(), notes


def _best(plain: Rewiring, others: list[Rewiring], tensor, rewire, latency) -> Rewiring | None:
    """The rewiring that is asked for; None where others would save something, but not time."""
    if not others or not rewire:
        return plain
    if rewire != "faster":
        return min(others, key=lambda option: option.macs)
    base, *times = milliseconds([plain, *others], tensor, latency)
    quickest = int(np.argmin(times))
    return others[quickest] if times[quickest] < FASTER * base else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_silent(layer) -> bool:
    """Whether a layer makes the same numbers at every position of its output, whatever it is given."""
    kernels = [
        v
        for name in ("kernel", "depthwise_kernel", "pointwise_kernel")
        if (v := getattr(layer, name, None)) is not None
    ]
    return (
        type(layer).__name__ not in TRANSPOSED
        and getattr(layer, "data_format", "channels_last") == "channels_last"
        and not isinstance(layer.activation, keras.layers.Layer)
        and not all(np.any(keras.ops.convert_to_numpy(kernel)) for kernel in kernels)
    )


def _numbers(layer, x, made: dict, masked: bool):
    """What a silent layer makes: its bias, behind its activation. `x` only lends its shape."""
    size = layer.compute_output_shape(x.shape)[-1]
    while True:  # as far back as something had that shape: what is in between may not be needed any more
        operation, before = origin_of(x)
        if not isinstance(operation, SHAPELESS) or len(before) != 1 or before[0].shape != x.shape:
            break
        x = before[0]
    x = channels_of(x, range(size) if size <= x.shape[-1] else [0] * size)
    windows = []
    for axis in range(getattr(layer, "rank", 0)):
        outside = (layer.kernel_size[axis] - 1) * layer.dilation_rate[axis] if layer.padding == "valid" else 0
        windows.append(slice(None, -outside or None, layer.strides[axis] if layer.strides[axis] > 1 else None))
    # A convolution ends a mask, which Rescaling would hand on; a slice ends it, too.
    if any(window != slice(None) for window in windows) or (mask_of(x) is not None and not masked):
        x = x[(slice(None), *windows)]
    if "numbers" not in made:
        bias = keras.ops.zeros(size) if layer.bias is None else keras.ops.cast(layer.bias, "float32")
        value = layer.activation(bias[None])[0] if layer.activation is not None else bias
        offset = keras.ops.convert_to_numpy(value).tolist()
        made["numbers"] = layers.Rescaling(0.0, offset, dtype=layer.dtype_policy, name=layer.name)
    return made["numbers"](x)


def _called_layers(model) -> list[tuple]:
    """(layer, tensors it is called on, whether an output of the model is its own) of all layers with a kernel."""
    found: dict[int, list] = {}
    outputs = {id(tensor) for tensor in graph_of(model).outputs}

    def visit(graph):
        for node in nodes_of(graph):
            layer = node.operation
            if is_graph(layer):
                visit(graph_of(layer))
            elif _is_known(layer) and node.input_tensors:
                entry = found.setdefault(id(layer), [layer, [], False])
                entry[1].append(node.input_tensors[0])
                entry[2] |= id(node.outputs[0]) in outputs

    visit(graph_of(model))
    return list(map(tuple, found.values()))


def _is_known(layer) -> bool:
    name = type(layer).__name__
    known = name in (*CONVOLUTIONS, *DEPTHWISE, *TRANSPOSED, "Dense") and type(layer).__module__.startswith(
        "keras.src."
    )
    return known and not (getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None))


class _Smaller(Rebuild):
    def __init__(self, model, chosen: dict[int, Rewiring], silent: dict[int, keras.layers.Layer]):
        super().__init__(model)
        self._chosen, self._silent = chosen, silent
        self._kernels = {id(getattr(r.layer, r.kernel)): r for r in chosen.values()}
        self._made: dict[int, dict] = {}
        self.count_past("take", "get_item")

    def changes(self, layer):
        return id(layer) in self._silent or (id(layer) in self._chosen and not self._chosen[id(layer)].is_plain)

    def made(self, old, config):
        return super().made(old, self._chosen[id(old)].config(config) if id(old) in self._chosen else config)

    def called(self, node, args, kwargs):
        if not self.changes(node.operation) or is_graph(node.operation):
            return super().called(node, args, kwargs)
        x = args[0] if args else kwargs["inputs"]
        made = self._made.setdefault(id(node.operation), {})
        if id(node.operation) in self._silent:
            return _numbers(node.operation, x, made, masked=mask_of(node.outputs[0]) is not None)
        x = self._chosen[id(node.operation)].before(x, made, self.unused)
        args, kwargs = ([x, *args[1:]], kwargs) if args else (args, {**kwargs, "inputs": x})
        return super().called(node, args, kwargs)

    def sliced(self, variable, array=None):
        array = super().sliced(variable, array)
        option = self._kernels.get(id(variable))
        return array if option is None else option.weights(array)
