"""Shape operations are run on the ids themselves; what they hold as numbers is rewritten from the survivors."""

from __future__ import annotations

import numpy as np

from keras_prune.rules.language import Labels, broadcast, collapse, rule, varying


def kept_shape(ids, shape, survivors) -> tuple:
    """The shape of a tensor when only `survivors` are left: one axis at most changes."""
    new = list(shape)
    for axis in varying(ids):
        new[axis] = survivors(ids.ravel())
    return tuple(new)


def _one_axis(call, ids):
    """Make ids a matter of one axis: tie along the others, so that what is left stays a box."""
    ids = collapse(ids)
    axes = varying(ids)
    if len(axes) > 1:
        main = max(axes, key=lambda a: ids.shape[a])
        line = np.moveaxis(ids, main, -1).reshape(-1, ids.shape[main])
        call.tie(line, line[:1])
        ids = line[0].reshape([-1 if a == main else 1 for a in range(ids.ndim)])
    return ids


def _reshaped(call, x):
    """Ids after a reshape in memory order."""
    shape, new = call.shape_of(x), call.outputs[0]
    if not np.any(x):
        return call.frozen()
    if varying(x) in ([], [x.ndim - 1]) and shape[-1] == new[-1] and shape[-1] not in (None, 1):
        return call.spread(call.along(x, x.ndim - 1), -1)  # the channels stay last, whatever happens before them
    if any(d is None for d in (*shape[1:], *new[1:])):
        call.fence(x, "reshapes channels together with an axis of unknown length")
        return call.frozen()
    return _one_axis(call, broadcast(x, shape).reshape([1, *new[1:]]))


def _target(call, out, key, with_batch):
    """Config entry: the new target shape. Written out only where it says more than -1."""
    new = call.outputs[0]

    def shape(survivors):
        kept = [-1 if d is None else d for d in kept_shape(out, new, survivors)]
        return tuple(kept) if with_batch else tuple(kept[1:])

    return {key: shape} if varying(out) else {}


@rule("Reshape")
def reshape(layer, call, x):
    out = _reshaped(call, x)
    return Labels(out, config=_target(call, out, "target_shape", with_batch=False))


@rule("ops.Reshape")
def reshape_op(operation, call, x):
    out = _reshaped(call, x)
    if call.outputs[0][0] is not None:
        call.fence(x, "reshapes the batch axis")
        return Labels(call.frozen())
    return Labels(out, config=_target(call, out, "newshape", with_batch=True))


@rule("Flatten")
def flatten(layer, call, x):
    shape = call.shape_of(x)
    if layer.data_format == "channels_first" and x.ndim > 2:
        order = [0, *range(2, x.ndim), 1]
        x_last, shape = x.transpose(order), tuple(shape[a] for a in order)
    else:
        x_last = x
    if not np.any(x) or any(d is None for d in shape[1:]):
        call.fence(x, "flattens an axis of unknown length")
        return Labels(call.frozen())
    return Labels(_one_axis(call, broadcast(x_last, shape).reshape(1, -1)))


@rule("ops.Ravel")
def ravel(operation, call, x):
    call.fence(x, "flattens the batch too")
    return Labels(call.frozen())


@rule("Permute")
def permute(layer, call, x):
    return Labels(x.transpose([0, *layer.dims]))


@rule("ops.Transpose")
def transpose(operation, call, x):
    axes = operation.axes if operation.axes is not None else range(x.ndim)[::-1]
    return _batch_stays(call, x, x.transpose(axes), axes)


@rule("ops.Swapaxes")
def swapaxes(operation, call, x):
    return _batch_stays(call, x, x.swapaxes(operation.axis1, operation.axis2), None)


@rule("ops.Moveaxis")
def moveaxis(operation, call, x):
    return _batch_stays(call, x, np.moveaxis(x, operation.source, operation.destination), None)


def _batch_stays(call, x, out, axes):
    if call.outputs[0][0] is not None:
        call.fence(x, "moves the batch axis")
        return Labels(call.frozen())
    return Labels(out)


@rule("RepeatVector")
def repeat_vector(layer, call, x):
    return Labels(x[:, None, :])


@rule("ops.ExpandDims")
def expand_dims(operation, call, x):
    return Labels(np.expand_dims(x, operation.axis))


@rule("ops.Squeeze")
def squeeze(operation, call, x):
    shape = call.shape_of(x)
    axes = operation.axis
    axes = [a for a, d in enumerate(shape) if d == 1] if axes is None else [a % x.ndim for a in np.atleast_1d(axes)]
    if x.size == 1:
        call.fence(x, "squeezes a single channel")
    return Labels(x.squeeze(tuple(axes)))


@rule("ops.BroadcastTo")
def broadcast_to(operation, call, x):
    if len(call.outputs[0]) != x.ndim or varying(x) and call.outputs[0][varying(x)[0]] != x.size:
        call.fence(x, "broadcasts its channels")
        return Labels(call.frozen())
    return Labels(x, config=_target(call, x, "shape", with_batch=True))


@rule("ops.Mean", "ops.Sum", "ops.Max", "ops.Min", "ops.Amax", "ops.Amin", "ops.Any", "ops.All", "ops.Var", "ops.Std",
      "ops.Prod", "ops.CountNonzero", "ops.Median")
def reduction(operation, call, x):
    """Over other axes it is a pooling; over the channels it mixes them."""
    axis = operation.axis
    axes = list(range(x.ndim)) if axis is None else [a % x.ndim for a in np.atleast_1d(axis)]
    if any(x.shape[a] > 1 for a in axes) or x.size == 1:
        call.fence(x, "reduces over its channels")
        return Labels(call.frozen())
    if type(operation).__name__ in ("Std", "Prod", "Any", "All", "CountNonzero"):
        call.fence(x, "is not smooth at 0")
    return Labels(x if operation.keepdims else x.squeeze(tuple(axes)))


def _padded(call, x, amounts):
    """Ids with constant channels added at either end of the channel axis: units that no weight makes."""
    for axis in varying(x):
        before, after = amounts[axis]
        if before or after:
            new = call.fresh(before + after)
            x = call.spread(np.concatenate([new[:before], x.ravel(), new[before:]]), axis)
    return x


def _new_amounts(amounts, out, axis):
    line, (before, after) = out.ravel(), amounts[axis]
    return line[:before], line[len(line) - after:]


@rule("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D")
def zero_padding(layer, call, x):
    amounts, spatial = _spatial(layer, layer.padding, x.ndim)
    out = _padded(call, x, amounts)
    return Labels(out, config=_amounts_config("padding", layer.padding, amounts, spatial, out))


def _spatial(layer, per_axis, rank):
    """((before, after) for every axis, the spatial axes). 1-D layers hold one flat pair."""
    pairs = [per_axis] if isinstance(per_axis[0], int) else per_axis
    first = 2 if getattr(layer, "data_format", "channels_last") == "channels_first" else 1
    spatial = list(range(first, first + len(pairs)))
    amounts = [(0, 0)] * rank
    for axis, pair in zip(spatial, pairs):
        amounts[axis] = tuple(pair)
    return amounts, spatial


def _amounts_config(key, per_axis, amounts, spatial, ids):
    """Config of padding and cropping layers: only where the padded axis is the channel axis does it change."""
    axes = [a for a in varying(ids) if a in spatial and any(amounts[a])]
    if not axes:
        return {}
    head, tail = _new_amounts(amounts, ids, axes[0])

    def value(survivors):
        pairs = [list(amounts[a]) for a in spatial]
        pairs[spatial.index(axes[0])] = [survivors(head), survivors(tail)]
        return pairs[0] if isinstance(per_axis[0], int) else pairs

    return {key: value}


@rule("Cropping1D", "Cropping2D", "Cropping3D")
def cropping(layer, call, x):
    amounts, spatial = _spatial(layer, layer.cropping, x.ndim)
    out = x
    for axis in varying(x):
        before, after = amounts[axis]
        out = x.take(range(before, x.size - after), axis)
    return Labels(out, config=_amounts_config("cropping", layer.cropping, amounts, spatial, x))


@rule("ops.Pad")
def pad(operation, call, x, *_):
    width = operation.pad_width
    amounts = [tuple(width[0])] * x.ndim if len(width) == 1 else [tuple(w) for w in width]
    axes = [a for a in varying(x) if any(amounts[a])]
    if axes and operation.mode != "constant":
        call.fence(x, f"pads its channels in mode {operation.mode!r}")
        return Labels(call.frozen())
    out = _padded(call, x, amounts)
    if any(np.any(value) for _, value in call.constants()):
        call.loud(out)
    if not axes:
        return Labels(out)
    head, tail = _new_amounts(amounts, out, axes[0])

    def pad_width(survivors):
        new = [list(w) for w in amounts]
        new[axes[0]] = [survivors(head), survivors(tail)]
        return new

    return Labels(out, config={"pad_width": pad_width})


@rule("ops.Split")
def split(operation, call, x):
    axis = operation.axis % x.ndim
    if x.shape[axis] == 1:
        if call.shape_of(x)[axis] == 1:
            call.fence(x, "splits a single channel")
        return Labels([x] * len(call.outputs))
    sizes = [shape[axis] for shape in call.outputs]
    ends = np.cumsum(sizes)[:-1]
    pieces = np.split(x, ends, axis)

    def indices(survivors):
        return [int(n) for n in np.cumsum([survivors(p.ravel()) for p in pieces])[:-1]]

    return Labels(pieces if len(pieces) > 1 else pieces[0], config={"indices_or_sections": indices})


@rule("ops.GetItem")
def get_item(operation, call, x, *_):
    """Slices and numbers, counted anew among the survivors."""
    key = call.args[1] if len(call.args) > 1 else call.kwargs["key"]
    parts = list(key) if isinstance(key, (tuple, list)) else [key]
    used = sum(p is not None and p is not Ellipsis for p in parts)
    fill = [slice(None)] * (x.ndim - used)
    at = next((i for i, p in enumerate(parts) if p is Ellipsis), None)
    parts = parts[:at] + fill + parts[at + 1:] if at is not None else parts + fill
    if not all(p is None or isinstance(p, (int, slice, np.integer)) for p in parts):
        call.fence(x, "is indexed by an array")
        return Labels(call.frozen())
    axis, ids_key, new_parts, changed = 0, [], [], False
    for part in parts:
        if part is None:
            ids_key.append(None)
            new_parts.append(None)
            continue
        if x.shape[axis] == 1:
            ids_key.append(0 if isinstance(part, (int, np.integer)) else slice(None))
            new_parts.append(part)
            if isinstance(part, (int, np.integer)) and x.size == 1:
                call.fence(x, "is indexed along a single channel")
        else:
            line = x.ravel()
            if isinstance(part, slice):
                start, stop, step = part.indices(len(line))
                if step != 1:
                    call.fence(x, "is sliced with a step along its channels")
                    return Labels(call.frozen())
                new_parts.append(lambda survivors, a=start, b=stop: slice(
                    survivors(line[:a]), survivors(line[:a]) + survivors(line[a:b])))
            else:
                part = int(part) % len(line)
                call.fence(line[part: part + 1], "is taken out by its number")
                new_parts.append(lambda survivors, i=part: survivors(line[:i]))
            ids_key.append(part)
            changed = True
        axis += 1
    out = x[tuple(ids_key)]
    if not changed:
        return Labels(out)
    position = 1 if len(call.args) > 1 else "key"
    return Labels(out, arguments={
        position: lambda survivors: tuple(p(survivors) if callable(p) else p for p in new_parts)})


@rule("ops.Repeat", "ops.Tile")
def repeats(operation, call, x):
    if varying(x) or x.size == 1:
        call.fence(x, "repeats its channels")
    return Labels(call.frozen())
