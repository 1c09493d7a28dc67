"""Layers as matrices: what a kernel multiplies, one row per sampled output position, one column per kernel entry.

Every layer with a kernel computes `rows @ matrix` for each of its blocks (one block, or one per group of a grouped or
depthwise convolution). A view of a layer type is two functions: how a kernel-shaped array becomes matrices and back,
and how inputs become rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np


@dataclass(frozen=True)
class View:
    """A kernel as matrices.

    Attributes:
        matrices: kernel-shaped array -> (blocks, columns, outputs).
        kernel: the way back.
        rows: (input, positions) -> (blocks, rows, columns): what the kernel multiplies at those output positions.
        outputs: (output, positions) -> (blocks, rows, outputs).
        count: (input's shape) -> number of output positions in a batch.
        has_bias: whether the layer adds a bias of (blocks, outputs) numbers.
    """

    matrices: Callable[[np.ndarray], np.ndarray]
    kernel: Callable[[np.ndarray], np.ndarray]
    rows: Callable[[np.ndarray, np.ndarray], np.ndarray]
    outputs: Callable[[np.ndarray, np.ndarray], np.ndarray]
    count: Callable[[tuple[int, ...]], int]
    has_bias: bool


VIEWS: dict[str, Callable[..., View]] = {}


def view(*names: str):
    """Register a function (layer) -> View for Keras layer types by class name."""

    def register(function):
        for name in names:
            VIEWS[name] = function
        return function

    return register


def view_of(layer, name: str = "kernel") -> View | None:
    """The view of a layer's kernel; None where there is none for its type."""
    if type(layer).__name__ not in VIEWS or not type(layer).__module__.startswith("keras.") or "depthwise_" in name:
        return None
    return VIEWS[type(layer).__name__](layer)


def _has_bias(layer) -> bool:
    return getattr(layer, "bias", None) is not None


@view("Dense")
def dense(layer) -> View:
    return View(
        matrices=lambda k: k[None],
        kernel=lambda m: m[0],
        rows=lambda x, at: x.reshape(-1, x.shape[-1])[at][None],
        outputs=lambda y, at: y.reshape(-1, y.shape[-1])[at][None],
        count=lambda shape: math.prod(shape[:-1]),
        has_bias=_has_bias(layer),
    )


@view("Conv1D", "Conv2D", "Conv3D")
def conv(layer) -> View:
    groups, taps = layer.groups, math.prod(layer.kernel_size)

    def matrices(k):
        split = k.reshape(taps, k.shape[-2], groups, -1)
        return split.transpose(2, 0, 1, 3).reshape(groups, taps * k.shape[-2], -1)

    def kernel(m):
        split = m.reshape(groups, taps, -1, m.shape[-1]).transpose(1, 2, 0, 3)
        return split.reshape(*layer.kernel_size, split.shape[1], -1)

    def rows(x, at):
        found = _patches(layer, x, at)  # (rows, taps, channels)
        split = found.reshape(len(at), taps, groups, -1)
        return split.transpose(2, 0, 1, 3).reshape(groups, len(at), -1)

    return _convolution(layer, matrices, kernel, rows, _split_outputs(layer, groups))


@view("DepthwiseConv1D", "DepthwiseConv2D")
def depthwise(layer) -> View:
    """One block per input channel."""

    def matrices(k):
        return k.reshape(-1, *k.shape[-2:]).transpose(1, 0, 2)

    def kernel(m):
        return m.transpose(1, 0, 2).reshape(*layer.kernel_size, m.shape[0], -1)

    def rows(x, at):
        return _patches(layer, x, at).transpose(2, 0, 1)

    def outputs(y, at):
        flat = _flat(layer, y)[at]
        return flat.reshape(len(at), -1, layer.depth_multiplier).transpose(1, 0, 2)

    return _convolution(layer, matrices, kernel, rows, outputs)


@view("SeparableConv1D", "SeparableConv2D")
def separable(layer) -> View:
    """Its pointwise kernel: the rows are what the depthwise one makes of the input."""
    inner = depthwise(layer)

    def rows(x, at):
        blocks = inner.rows(x, at) @ inner.matrices(keras.ops.convert_to_numpy(layer.depthwise_kernel))
        return blocks.transpose(1, 0, 2).reshape(1, len(at), -1)

    def matrices(k):
        return k.reshape(1, *k.shape[-2:])

    def kernel(m):
        return m.reshape(*(1,) * layer.rank, *m.shape[1:])

    return _convolution(layer, matrices, kernel, rows, _split_outputs(layer, 1))


@view("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def transposed(layer) -> View:
    """An ordinary convolution over the input with zeros between its values, taps reversed."""
    taps = math.prod(layer.kernel_size)

    def matrices(k):  # (taps, out, in)
        return k.reshape(taps, *k.shape[-2:]).transpose(0, 2, 1).reshape(1, -1, k.shape[-2])

    def kernel(m):
        return m.reshape(taps, -1, m.shape[-1]).transpose(0, 2, 1).reshape(*layer.kernel_size, m.shape[-1], -1)

    def rows(x, at):
        return _patches(layer, x, at).reshape(1, len(at), -1)

    return _convolution(layer, matrices, kernel, rows, _split_outputs(layer, 1))


@view("EinsumDense")
def einsum_dense(layer) -> View | None:
    """Letters of the equation: shared ones (kept by both) are blocks, summed ones columns, the kernel's own outputs."""
    source, kernel, target = layer.equation.replace(" ", "").replace("->", ",").split(",")
    lead = source.find("...")
    source, target = source.replace("...", ""), target.replace("...", "")
    shared = [c for c in kernel if c in source and c in target]
    summed = [c for c in kernel if c in source and c not in target]
    own = [c for c in kernel if c not in source]
    free = [c for c in source if c not in kernel]
    if not summed or any(c not in target for c in own + free):
        return None
    if lead > 0 or (lead == 0 and not source.startswith("".join(free))):  # only batch axes may stand for the ellipsis
        return None
    shape = dict(zip(kernel, layer.kernel.shape))

    def sizes(letters):
        return [shape[c] for c in letters]

    def matrices(k):
        ordered = k.transpose([kernel.index(c) for c in [*shared, *summed, *own]])
        return ordered.reshape(math.prod(sizes(shared)), math.prod(sizes(summed)), -1)

    def back(m):
        order = [*shared, *summed, *own]
        return m.reshape(sizes(order)).transpose([order.index(c) for c in kernel])

    def split(array, letters, columns):
        skip = array.ndim - len(letters)  # batch and whatever the ellipsis stands for
        order = [*range(skip), *(skip + letters.index(c) for c in [*free, *shared, *columns])]
        blocks = array.transpose(order).reshape(-1, math.prod(sizes(shared)), math.prod(sizes(columns)))
        return blocks.transpose(1, 0, 2)

    bias_letters = target[-len(layer.bias.shape) :] if _has_bias(layer) else None
    return View(
        matrices=matrices,
        kernel=back,
        rows=lambda x, at: split(x, source, summed)[:, at],
        outputs=lambda y, at: split(y, target, own)[:, at],
        count=lambda s: math.prod(s) // math.prod(sizes(shared) + sizes(summed)),
        has_bias=bias_letters == "".join([*shared, *own])
        and math.prod(layer.bias.shape) == math.prod(sizes(bias_letters)),
    )


@view("TimeDistributed")
def time_distributed(layer) -> View | None:
    """Time is a second batch axis."""
    inner = view_of(layer.layer)

    def merged(x):
        return x.reshape(-1, *x.shape[2:])

    return inner and View(
        matrices=inner.matrices,
        kernel=inner.kernel,
        rows=lambda x, at: inner.rows(merged(x), at),
        outputs=lambda y, at: inner.outputs(merged(y), at),
        count=lambda s: inner.count((s[0] * s[1], *s[2:])),
        has_bias=inner.has_bias,
    )


# -- convolutions ------------------------------------------------------------------------------------------------


def _convolution(layer, matrices, kernel, rows, outputs) -> View:
    return View(matrices, kernel, rows, outputs, lambda shape: _positions(layer, shape), _has_bias(layer))


def _last(layer, x: np.ndarray) -> np.ndarray:
    """Channels on the last axis."""
    return np.moveaxis(x, 1, -1) if layer.data_format == "channels_first" else x


def _flat(layer, y: np.ndarray) -> np.ndarray:
    y = _last(layer, y)
    return y.reshape(-1, y.shape[-1])


def _split_outputs(layer, groups: int):
    def outputs(y, at):
        return _flat(layer, y)[at].reshape(len(at), groups, -1).transpose(1, 0, 2)

    return outputs


def _spatial(layer, shape) -> tuple[int, ...]:
    return tuple(shape[2:] if layer.data_format == "channels_first" else shape[1:-1])


def _positions(layer, shape) -> int:
    return shape[0] * math.prod(_geometry(layer, _spatial(layer, shape))[0])


def _geometry(layer, lengths) -> tuple[tuple[int, ...], list[tuple[int, int]], tuple[int, ...]]:
    """(output lengths, padding before and after each axis, steps of the window over the padded input)."""
    out, pads, steps = [], [], []
    is_transposed = "Transpose" in type(layer).__name__
    for axis, n in enumerate(lengths):
        stride = layer.strides[axis]
        reach = (layer.kernel_size[axis] - 1) * layer.dilation_rate[axis] + 1
        before, after = padding_of(layer, axis, n)
        if is_transposed:
            n, stride = (n - 1) * stride + 1, 1
        out.append((n + before + after - reach) // stride + 1)
        pads.append((before, after))
        steps.append(stride)
    return tuple(out), pads, tuple(steps)


def padding_of(layer, axis: int, length: int, taps: int | None = None, padding: str | None = None) -> tuple[int, int]:
    """Zeros (before, after) one spatial axis of a convolution's input; of a transposed one's, zeros between included.

    Args:
        layer: the convolution.
        axis: which of its spatial axes.
        length: of the input along it.
        taps, padding: instead of the layer's own.
    """
    taps = layer.kernel_size[axis] if taps is None else taps
    padding = layer.padding if padding is None else padding
    stride, reach = layer.strides[axis], (taps - 1) * layer.dilation_rate[axis] + 1
    if "Transpose" in type(layer).__name__:
        extra = layer.output_padding
        before, total = _transposed_padding(
            reach, stride, padding, extra if extra is None or isinstance(extra, int) else extra[axis]
        )
        return before, total - before
    if padding == "valid":
        return 0, 0
    if padding == "causal":
        return reach - 1, 0
    total = max((math.ceil(length / stride) - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2


def pads_nothing(layer) -> bool:
    """Whether a layer is a convolution that pads no zeros, whatever the lengths of its input."""
    if not hasattr(layer, "kernel_size") or type(layer).__name__ not in VIEWS:
        return False
    return all(
        padding_of(layer, axis, n) == (0, 0)
        for axis, (taps, stride) in enumerate(zip(layer.kernel_size, layer.strides))
        for n in range(taps, taps + 2 * stride)
    )


def _transposed_padding(reach: int, stride: int, padding: str, extra: int | None) -> tuple[int, int]:
    """(zeros before, zeros on both sides) around the input with zeros between its values.

    Keras's definition: 'valid' makes (n - 1) * stride + max(reach, stride) values, 'same' n * stride; with
    output_padding (n - 1) * stride + reach, or + reach % 2, and `output_padding` more.
    """
    if padding == "valid":
        extra = max(reach, stride) - reach if extra is None else extra
        return reach - 1, 2 * (reach - 1) + extra
    total = stride + reach - 2 if extra is None else reach + reach % 2 - 2 + extra
    return min(total // 2 + total % 2, reach - 1), total


def _patches(layer, x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(rows, taps, channels): what each output position of `at` sees of the input."""
    x = _last(layer, x)
    lengths = x.shape[1:-1]
    out, pads, steps = _geometry(layer, lengths)
    is_transposed = "Transpose" in type(layer).__name__
    if is_transposed:
        stuffed = np.zeros((len(x), *((n - 1) * s + 1 for n, s in zip(lengths, layer.strides)), x.shape[-1]), x.dtype)
        stuffed[(slice(None), *(slice(None, None, s) for s in layer.strides))] = x
        x = stuffed
    before = [max(b, 0) for b, _ in pads]
    x = np.pad(x, [(0, 0), *((b, max(a, 0)) for b, (_, a) in zip(before, pads)), (0, 0)])
    where = np.unravel_index(at, (len(x), *out))
    taps = np.indices(layer.kernel_size).reshape(len(layer.kernel_size), -1)
    if is_transposed:
        taps = np.array(layer.kernel_size)[:, None] - 1 - taps
    index = [where[0][:, None]]
    for axis in range(len(out)):
        index.append(where[axis + 1][:, None] * steps[axis] + taps[axis][None] * layer.dilation_rate[axis])
    return x[tuple(index)]
