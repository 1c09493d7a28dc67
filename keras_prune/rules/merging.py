"""Operations on several tensors: sums and products tie their units, concatenation lines them up."""

from __future__ import annotations

import numpy as np

from keras_prune.rules.language import Labels, collapse, rule, varying


def _aligned(call, extend_in_the_middle: bool) -> tuple[list, list[list]]:
    """Ids and shapes of all inputs at one rank. Merge layers add missing axes after the batch, ops at the front."""
    rank = len(call.outputs[0])
    ids, shapes = [], []
    for x, shape in zip(call.inputs, call.shapes):
        missing, at = rank - len(shape), 1 if extend_in_the_middle else 0
        ids.append(np.expand_dims(x, tuple(range(at, at + missing))))
        shapes.append([*shape[:at], *[1] * missing, *shape[at:]])
    return ids, shapes


def _tied(call, extend_in_the_middle: bool):
    """Tie what is combined number by number; what is broadcast over a channel axis only loses its freedom."""
    ids, shapes = _aligned(call, extend_in_the_middle)
    result = np.broadcast_shapes(*[x.shape for x in ids])
    channel_axes = [a for a, n in enumerate(result) if n > 1]
    if len(channel_axes) > 1:
        for x in ids:
            call.fence(x, "combines tensors whose channels lie on different axes")
        return call.frozen()
    partners = []
    for x, shape in zip(ids, shapes):
        if any(shape[a] == 1 for a in channel_axes):
            call.freeze(x)  # a single channel that meets all channels of the other input
        else:
            partners.append(x)
    out = np.broadcast_to(partners[0], result) if channel_axes else partners[0]
    for x in partners[1:]:
        call.tie(out, x)
    return out


@rule("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")
def merge(layer, call, *inputs):
    return Labels(_tied(call, extend_in_the_middle=True))


@rule(
    "ops.Add",
    "ops.Subtract",
    "ops.Multiply",
    "ops.Maximum",
    "ops.Minimum",
    "ops.Where",
    "ops.Equal",
    "ops.NotEqual",
    "ops.Greater",
    "ops.GreaterEqual",
    "ops.Less",
    "ops.LessEqual",
    "ops.LogicalAnd",
    "ops.LogicalOr",
    "ops.LogicalXor",
)
def binary(operation, call, *inputs):
    """Tensors tie; an array constant is cut along with the units it meets."""
    out = _tied(call, extend_in_the_middle=False)
    if len(inputs) == 1 or type(operation).__name__ not in ("Add", "Subtract", "Multiply", "Maximum", "Minimum"):
        if type(operation).__name__ != "Multiply":
            call.loud(out)
    return Labels(out, arguments=cut_along(call, out))


@rule("ops.Divide", "ops.TrueDivide")
def divide(operation, call, *inputs):
    """By a constant, that is; a removed unit would be 0/0 in the zeroed model."""
    if call.args and not any(call.args[0] is x for x in call.inputs) or len(inputs) > 1:
        for x in inputs:
            call.fence(x, "divides by a tensor, which a removed channel would make 0")
        return Labels(call.frozen())
    return Labels(inputs[0], arguments=cut_along(call, inputs[0]))


@rule("ops.Power")
def power(operation, call, *inputs):
    exponents = [value for _, value in call.constants()]
    if len(inputs) > 1 or not (call.args and call.args[0] is inputs[0]) or not all((e >= 1).all() for e in exponents):
        for x in inputs:
            call.fence(x, "is a power that is not smooth at 0")
        return Labels(call.frozen())
    return Labels(inputs[0], arguments=cut_along(call, inputs[0]))


def cut_along(call, out) -> dict:
    """Array constants that have the channel axis at full length: their ids, axis by axis."""
    arguments = {}
    for key, value in call.constants():
        if value.ndim == 0 or not varying(out):
            continue
        axis = varying(out)[0] - out.ndim
        if value.ndim >= -axis and value.shape[axis] > 1:
            ids = [None] * value.ndim
            ids[axis] = out.ravel()
            arguments[key] = tuple(ids)
    return arguments


@rule("Concatenate")
def concatenate(layer, call, *inputs):
    return Labels(_concatenate(call, layer.axis))


@rule("ops.Concatenate")
def concatenate_op(operation, call, *inputs):
    return Labels(_concatenate(call, operation.axis))


def _concatenate(call, axis):
    axis %= call.inputs[0].ndim
    lengths = [shape[axis] for shape in call.shapes]
    joined = any(x.shape[axis] > 1 or (n == 1 and x.size == 1 and np.any(x)) for x, n in zip(call.inputs, lengths))
    if not joined:
        return _same_channels(call)
    if None in lengths:
        for x in call.inputs:
            call.fence(x, "joins channels along an axis of unknown length")
        return call.frozen()
    if sum(lengths) != call.outputs[0][axis]:
        for x in call.inputs:
            call.fence(x, "is joined with a constant")
        return call.frozen()
    return call.spread(np.concatenate([call.along(x, axis) for x in call.inputs]), axis)


def _same_channels(call):
    """Tensors put side by side along another axis: channel i of one is channel i of all."""
    out = max(call.inputs, key=np.size)
    for x in call.inputs:
        if x.shape == out.shape or not np.any(x):
            call.tie(out, x)
        else:
            call.fence(np.concatenate([out.ravel(), x.ravel()]), "joins tensors with channels on different axes")
    return out


@rule("ops.Stack")
def stack(operation, call, *inputs):
    return Labels(np.expand_dims(_same_channels(call), operation.axis))


@rule("ops.Matmul")
def matmul(operation, call, *inputs):
    """Batch axes (attention heads) pass; rows and columns of a product of two activations are mixed."""
    if len(inputs) != 2 or inputs[0].ndim != inputs[1].ndim or inputs[0].ndim < 3:
        for x in inputs:
            call.fence(x, "multiplies two activations")
        return Labels(call.frozen())
    a, b = inputs
    for x in inputs:
        if x.shape[-1] > 1 or x.shape[-2] > 1:
            call.fence(x, "multiplies two activations along their channels")
    a, b = (x if x.shape[-1] == x.shape[-2] == 1 else np.zeros((1,) * x.ndim, int) for x in inputs)
    out = a if a.size >= b.size else b
    call.tie(a, b)
    return Labels(collapse(np.broadcast_arrays(a, b)[0]) if out is a else out)
