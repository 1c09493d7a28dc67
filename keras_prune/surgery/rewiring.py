"""Ways to run a layer with fewer multiply-accumulates, and how long each takes.

Border taps that are gone make a smaller kernel. Where the padding argument cannot say the same thing, zeros are padded
(or rows cropped) explicitly. Inputs that others still need are left out by a gather in front of the kernel. What is
ragged beyond that, other taps gone for each channel, becomes a gather of columns and a 1x1 convolution.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np
from keras import layers, ops

from keras_prune.linear import padding_of
from keras_prune.surgery.zeros import any_along

CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D")
DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")
TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")

TIMED_MACS = 400_000_000
"""About what one timed call computes, with at most 32 samples: milliseconds, so that the call itself counts little."""


@dataclass(frozen=True)
class Rewiring:
    """One layer with a smaller kernel, and what stands in front of it.

    Attributes:
        layer: the old layer.
        kernel: attribute of the kernel that becomes smaller.
        taps: per spatial axis the (first, last + 1) tap that stays.
        padding: the padding argument of the new layer.
        pads: per spatial axis (before, after) zeros that are padded explicitly, negative where rows are cropped.
        inputs: the input channels that are read; None for all.
        columns: per tap that is left the channels it reads: a gather of columns; None for a dense kernel.
        macs: fraction of the layer's multiply-accumulates that is left.
    """

    layer: keras.layers.Layer
    kernel: str = "kernel"
    taps: tuple[tuple[int, int], ...] = ()
    padding: str | None = None
    pads: tuple[tuple[int, int], ...] = ()
    inputs: tuple[int, ...] | None = None
    columns: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] | None = None
    macs: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether nothing stands in front of the layer."""
        return not self.pads and self.inputs is None and self.columns is None

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.taps)

    def config(self, config: dict) -> dict:
        """The new layer's config from the old one's."""
        if not self.taps:
            return config
        if self.columns is not None:
            ones = [1] * len(self.taps)
            return {**config, "kernel_size": ones, "strides": ones, "dilation_rate": ones, "padding": "valid"}
        return {**config, "kernel_size": self.kernel_size, "padding": self.padding}

    def weights(self, array: np.ndarray) -> np.ndarray:
        """What is left of a kernel."""
        array = array[tuple(slice(start, stop) for start, stop in self.taps)]
        if self.columns is not None:
            rows = [array[tap][list(channels)] for tap, channels in self.columns]
            return np.concatenate(rows).reshape(*(1,) * len(self.taps), -1, array.shape[-1])
        if self.inputs is not None:
            array = array.take(self.inputs, len(self.taps))
        return array

    def before(self, x, made: dict, named: Callable[[str], str] = str):
        """What the new layer is called on.

        `made` keeps the layers in between for the next call, `named` makes names for them that nobody has.
        """
        rank, layer = len(self.taps), self.layer
        for kind, amounts in (("pad", _clipped(self.pads, 1)), ("crop", _clipped(self.pads, -1))):
            if any(map(any, amounts)):
                if kind not in made:
                    cls = getattr(layers, f"{'ZeroPadding' if kind == 'pad' else 'Cropping'}{rank}D")
                    given = amounts[0] if rank == 1 else amounts
                    more = {} if rank == 1 and kind == "crop" else {"data_format": layer.data_format}
                    made[kind] = cls(given, name=named(f"{layer.name}_{kind}"), dtype=layer.dtype_policy, **more)
                x = made[kind](x)
        if self.inputs is not None:
            x = channels_of(x, self.inputs)
        if self.columns is not None:
            lengths = x.shape[1:-1]
            out = [
                (n - (k - 1) * d - 1) // s + 1
                for n, k, d, s in zip(lengths, self.kernel_size, layer.dilation_rate, layer.strides)
            ]
            parts = []
            for tap, channels in self.columns:
                window = [
                    slice(t * d, t * d + (m - 1) * s + 1, s)
                    for t, d, m, s in zip(tap, layer.dilation_rate, out, layer.strides)
                ]
                parts.append(channels_of(x[(slice(None), *window)], channels))
            if len(parts) > 1:
                if "join" not in made:
                    name = named(f"{layer.name}_columns")
                    made["join"] = layers.Concatenate(name=name, dtype=layer.dtype_policy)
                return made["join"](parts)
            x = parts[0]
        return x


def _clipped(pads, sign: int) -> tuple[tuple[int, int], ...]:
    return tuple((max(sign * a, 0), max(sign * b, 0)) for a, b in pads)


def channels_of(x, channels: Sequence[int]):
    """Some channels of a tensor with channels last."""
    if len(channels) == x.shape[-1]:
        return x
    first, last = channels[0], channels[-1]
    if last - first + 1 == len(channels):
        return x[(*(slice(None),) * (len(x.shape) - 1), slice(first, last + 1))]
    return ops.take(x, list(channels), axis=-1)


def candidates(layer, tensors) -> list[Rewiring]:
    """Ways to run a layer with fewer multiply-accumulates: the first one with nothing in front of the layer."""
    if type(layer).__name__ == "Dense":
        plain = Rewiring(layer)
        nonzero = keras.ops.convert_to_numpy(layer.kernel) != 0
        return [plain, *_with_inputs(plain, nonzero)]
    kernel = "depthwise_kernel" if "Separable" in type(layer).__name__ else "kernel"
    nonzero = keras.ops.convert_to_numpy(getattr(layer, kernel)) != 0
    rank = layer.rank
    lengths = [_lengths(layer, tensor) for tensor in tensors]
    whole = tuple((0, k) for k in layer.kernel_size)
    start = Rewiring(layer, kernel, whole, layer.padding)
    border = tuple(_span(any_along(nonzero, axis), layer, axis, lengths) for axis in range(rank))
    options = []
    if border != whole:
        share = math.prod(b - a for a, b in border) / math.prod(layer.kernel_size)
        options = _shrunk(replace(start, taps=border, macs=share), lengths)
    plain = next((o for o in options if o.is_plain), start)
    options = [plain, *(o for o in options if not o.is_plain)]
    if type(layer).__name__ in CONVOLUTIONS and layer.groups == 1 and layer.data_format == "channels_last":
        base = min(options, key=lambda o: o.macs)
        nonzero = nonzero[tuple(slice(a, b) for a, b in base.taps)]
        options += _with_inputs(base, nonzero)
        options += _with_columns(start, keras.ops.convert_to_numpy(layer.kernel) != 0, lengths)
    return options


def _lengths(layer, tensor) -> tuple:
    return tuple(tensor.shape[2:] if layer.data_format == "channels_first" else tensor.shape[1:-1])


def _span(line: np.ndarray, layer, axis: int, lengths) -> tuple[int, int]:
    """(first, last + 1) tap with anything in it; of a kernel of zeros the tap that needs no padding."""
    if line.any():
        first, last = np.flatnonzero(line)[[0, -1]]
        return int(first), int(last) + 1
    n = lengths[0][axis]
    before = padding_of(layer, axis, n or 64)[0]
    tap = min(before // layer.dilation_rate[axis], len(line) - 1)
    return tap, tap + 1


def _shrunk(wanted: Rewiring, lengths) -> list[Rewiring]:
    """The smaller kernel with a padding argument that says the same, or with explicit padding; [] where none does."""
    layer = wanted.layer
    needed = [_needed(wanted, axis, [n[axis] for n in lengths]) for axis in range(len(wanted.taps))]
    transposed = type(layer).__name__ in TRANSPOSED
    modes = (
        ("valid", "same")
        if transposed or layer.rank > 1 or "Conv1D" != type(layer).__name__
        else ("valid", "same", "causal")
    )
    for mode in modes:
        if all(_mode_fits(wanted, axis, mode, pads) for axis, pads in enumerate(needed)):
            return [replace(wanted, padding=mode)]
    if transposed or any(len(set(pads.values())) != 1 for pads in needed):
        return []
    return [replace(wanted, padding="valid", pads=tuple(next(iter(pads.values())) for pads in needed))]


def _needed(wanted: Rewiring, axis: int, lengths) -> dict[int, tuple[int, int]]:
    """Length of the input -> (before, after) padding under which the smaller kernel does what the old one did."""
    layer, (start, stop) = wanted.layer, wanted.taps[axis]
    taps, dilation, stride = layer.kernel_size[axis], layer.dilation_rate[axis], layer.strides[axis]
    cut = (start * dilation, (taps - stop) * dilation)
    if type(layer).__name__ in TRANSPOSED:  # it runs over its taps the other way round
        cut = cut[::-1]
    reach = (taps - 1) * dilation + 1
    found = {}
    for given in lengths:
        for n in [given] if given is not None else range(reach, reach + 2 * stride + 2):
            before, after = padding_of(layer, axis, n)
            found[n] = (before - cut[0], after - cut[1])
    return found


def _mode_fits(wanted: Rewiring, axis: int, mode: str, needed: dict) -> bool:
    small = wanted.kernel_size[axis]
    return all(padding_of(wanted.layer, axis, n, small, mode) == pads for n, pads in needed.items())


def _with_inputs(base: Rewiring, nonzero: np.ndarray) -> list[Rewiring]:
    """A gather of the channels that the kernel reads."""
    axis = nonzero.ndim - 2
    read = np.flatnonzero(any_along(nonzero, axis))
    read = read if read.size else np.zeros(1, int)
    if len(read) == nonzero.shape[axis]:
        return []
    return [replace(base, inputs=tuple(read.tolist()), macs=base.macs * len(read) / nonzero.shape[axis])]


def _with_columns(start: Rewiring, nonzero: np.ndarray, lengths) -> list[Rewiring]:
    """A gather of the (tap, channel) columns that the kernel reads, for known lengths."""
    rank = len(start.taps)
    read = nonzero.any(axis=-1)
    share = read.sum() / read.size
    taps = [tuple(int(t) for t in tap) for tap in np.ndindex(read.shape[:rank]) if read[tap].any()]
    if len(taps) <= 1 or any(None in n for n in lengths) or math.prod(read.shape[:rank]) == 1:
        return []
    pads = [_needed(start, axis, [n[axis] for n in lengths]) for axis in range(rank)]
    if any(len(set(p.values())) != 1 for p in pads):
        return []
    pads = tuple(next(iter(p.values())) for p in pads)
    columns = tuple((tap, tuple(np.flatnonzero(read[tap]).tolist())) for tap in taps)
    return [replace(start, pads=pads, columns=columns, macs=float(share))]


def milliseconds(options: list[Rewiring], tensor, latency: Callable | None) -> list[float]:
    """Milliseconds of each option, by itself on an input of that size."""
    shape = tuple(n or 32 for n in tensor.shape[1:])
    models = []
    for option in options:
        inputs = keras.Input(shape, dtype=tensor.dtype)
        new = _new_layer(option)
        models.append(keras.Model(inputs, new(option.before(inputs, {}))))
    if latency is not None:
        return [float(latency(model)) for model in models]
    layer, kernel = options[0].layer, getattr(options[0].layer, options[0].kernel)
    inputs_each = math.prod(layer.kernel_size if type(layer).__name__ in DEPTHWISE else kernel.shape[:-1])
    macs = math.prod(n or 32 for n in models[0].output_shape[1:]) * inputs_each
    samples = min(32, max(1, TIMED_MACS // macs))
    batch = np.random.default_rng(0).normal(size=(samples, *shape)).astype("float32")
    found: list[list[float]] = [[] for _ in models]
    for round_number in range(12):
        for place, model in enumerate(models):
            begin = time.perf_counter()
            model.predict_on_batch(batch)
            if round_number >= 2:  # the first ones compile
                found[place].append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(times) for times in found]


def _new_layer(option: Rewiring):
    return type(option.layer).from_config(option.config(option.layer.get_config()))
