"""Shape operations are run on the ids themselves; what they hold as numbers is rewritten from the survivors."""

from __future__ import annotations

import numpy as np

from keras_prune.rules.conv import channel_axis
from keras_prune.rules.language import Labels, broadcast, collapse, rule, varying


def _one_axis(call, ids):
    """Tie along all axes but the one that leaves most units, so that what survives stays a box."""
    ids = collapse(ids)
    axes = varying(ids)
    if len(axes) > 1:

        def lines(axis):
            return np.moveaxis(ids, axis, -1).reshape(-1, ids.shape[axis])

        main = max(axes, key=lambda a: (np.unique(lines(a), axis=1).shape[1], a))
        line = lines(main)
        call.tie(line, line[:1])
        ids = line[0].reshape([-1 if a == main else 1 for a in range(ids.ndim)])
    return ids


def _reshaped(call, x):
    """Ids after a reshape in memory order. Only the last axes, down to that of the channels, have to be looked at."""
    shape, new = call.shape_of(x), call.outputs[0]
    if not varying(x):
        call.freeze(x)
        return call.frozen()
    main = varying(x)[0]
    i, j = len(shape) - 1, len(new) - 1
    old_block, new_block = shape[i], new[j]
    while i > 0 and j > 0 and None not in (old_block, new_block) and (old_block != new_block or i > main):
        if old_block <= new_block:
            i -= 1
            old_block = None if shape[i] is None else old_block * shape[i]
        else:
            j -= 1
            new_block = None if new[j] is None else new_block * new[j]
    if i == 0 or j == 0 or old_block is None or old_block != new_block:
        call.fence(x, "reshapes its channels together with the batch or an axis of unknown length")
        return call.frozen()
    block = np.broadcast_to(x.reshape(x.shape[i:]), shape[i:])
    return _one_axis(call, block.reshape([1] * j + list(new[j:])))


def _new_shape(out, old, key, first_axis=0) -> dict:
    """Config entry: the new target shape, unless a -1 stands where it changes."""
    axes = [axis - first_axis for axis in varying(out)]
    if not axes or old[axes[0]] == -1:
        return {}
    return {key: lambda survivors: tuple(survivors(out) if a in axes else n for a, n in enumerate(old))}


@rule("Reshape")
def reshape(layer, call, x):
    out = _reshaped(call, x)
    return Labels(out, config=_new_shape(out, layer.target_shape, "target_shape", first_axis=1))


@rule("ops.Reshape")
def reshape_op(operation, call, x):
    out = _reshaped(call, x)
    return Labels(out, config=_new_shape(out, operation.newshape, "newshape"))


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


@rule("Permute")
def permute(layer, call, x):
    return Labels(x.transpose([0, *layer.dims]))


@rule("ops.Transpose")
def transpose(operation, call, x):
    return _batch_first(call, x, x.transpose(operation.axes))


@rule("ops.Swapaxes")
def swapaxes(operation, call, x):
    return _batch_first(call, x, x.swapaxes(operation.axis1, operation.axis2))


@rule("ops.Moveaxis")
def moveaxis(operation, call, x):
    return _batch_first(call, x, np.moveaxis(x, operation.source, operation.destination))


def _batch_first(call, x, out):
    if out.shape[0] > 1:
        call.fence(x, "moves its channels to the first axis")
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
    if not varying(x):
        call.freeze(x)
    # An axis that is cut down to 1 must not be squeezed too, so the axes are written out.
    return Labels(x.squeeze(tuple(axes)), config={"axis": lambda _: tuple(axes)} if operation.axis is None else {})


@rule(
    "ops.Mean",
    "ops.Sum",
    "ops.Max",
    "ops.Min",
    "ops.Amax",
    "ops.Amin",
    "ops.Any",
    "ops.All",
    "ops.Var",
    "ops.Std",
    "ops.Prod",
    "ops.Median",
)
def reduction(operation, call, x):
    """Over other axes it is a pooling; over the channels it mixes them."""
    axis = operation.axis
    axes = list(range(x.ndim)) if axis is None else [a % x.ndim for a in np.atleast_1d(axis)]
    if not varying(x):
        call.freeze(x)
        return Labels(call.frozen())
    if any(x.shape[a] > 1 for a in axes):
        call.fence(x, "reduces over its channels")
        return Labels(call.frozen())
    if type(operation).__name__ in ("Std", "Prod", "Any", "All"):
        call.fence(x, "is not smooth at 0")
    return Labels(x if operation.keepdims else x.squeeze(tuple(axes)))


@rule("ops.Average")
def average(operation, call, x, *weights):
    if (
        operation.axis is None
        or x.shape[operation.axis] > 1
        or not varying(x)
        or any(np.size(w) > 1 for _, w in call.constants())
        or any(np.any(w) for w in weights)
    ):
        for ids in call.inputs:
            call.fence(ids, "averages over its channels, or with weights")
        return Labels(call.frozen())
    return Labels(x.squeeze(operation.axis))


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
    return line[:before], line[len(line) - after :]


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
        return Labels([x] * len(call.outputs))
    sizes = [shape[axis] for shape in call.outputs]
    ends = np.cumsum(sizes)[:-1]
    pieces = np.split(x, ends, axis)
    for piece in pieces:
        call.piece(piece)

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
    parts = parts[:at] + fill + parts[at + 1 :] if at is not None else parts + fill
    numbers = [n for p in parts for n in ((p.start, p.stop, p.step) if isinstance(p, slice) else (p,))]
    if not all(n is None or isinstance(n, (int, np.integer)) for n in numbers):
        for ids in call.inputs:
            call.fence(ids, "is indexed by an array")
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
                call.freeze(x)
        else:
            line = x.ravel()
            if isinstance(part, slice):
                start, stop, step = part.indices(len(line))
                if step != 1:
                    call.fence(x, "is sliced with a step along its channels")
                    return Labels(call.frozen())
                call.piece(line[start:stop])
                new_parts.append(
                    lambda survivors, before=line[:start], inside=line[start:stop]: slice(
                        survivors(before), survivors(before) + survivors(inside)
                    )
                )
            else:
                part = int(part) % len(line)
                call.fence(line[part : part + 1], "is taken out by its number")
                new_parts.append(lambda survivors, before=line[:part]: survivors(before))
            ids_key.append(part)
            changed = True
        axis += 1
    out = x[tuple(ids_key)]
    if not changed:
        return Labels(out)
    position = 1 if len(call.args) > 1 else "key"
    return Labels(
        out, arguments={position: lambda survivors: tuple(p(survivors) if callable(p) else p for p in new_parts)}
    )


@rule("ops.Take")
def take(operation, call, x, *indices):
    """Channels chosen by a list of numbers; they are counted anew among the survivors."""
    axis = operation.axis
    given = call.args[1] if len(call.args) > 1 else call.kwargs["indices"]
    if axis is None or any(np.any(i) for i in indices) or (x.shape[axis] > 1 and indices):
        for ids in call.inputs:
            call.fence(ids, "is indexed by an array")
        return Labels(call.frozen())
    if x.shape[axis] == 1:
        places = len(call.outputs[0]) - x.ndim + 1
        return Labels(x.take(np.zeros((1,) * places, int), axis))
    channels = call.along(x, axis)
    places = np.asarray(given) % len(channels)
    if places.ndim != 1:
        call.fence(x, "is indexed by an array")
        return Labels(call.frozen())
    call.piece(channels[places])

    def chosen(survivors):
        return [survivors(channels[:p]) for p in places.tolist() if survivors(channels[p : p + 1])]

    position = 1 if len(call.args) > 1 else "indices"
    return Labels(call.spread(channels[places], axis), arguments={position: chosen})


@rule("ops.Unstack")
def unstack(operation, call, x):
    if x.shape[operation.axis] > 1:
        call.fence(x, "is taken apart channel by channel")
        return Labels(call.frozen())
    return Labels([x.squeeze(operation.axis)] * len(call.outputs))


@rule("ops.Repeat")
def repeat(operation, call, x):
    if operation.axis is None or not varying(x) or not isinstance(operation.repeats, int):
        call.fence(x, "repeats with a number for each channel, or over all axes")
        return Labels(call.frozen())
    return Labels(x.repeat(operation.repeats, operation.axis) if x.shape[operation.axis] > 1 else x)


@rule("ops.Tile")
def tile(operation, call, x):
    times = operation.repeats
    times = [1] * (x.ndim - len(times)) + list(times)
    x = x.reshape([1] * (len(times) - x.ndim) + list(x.shape))
    return Labels(np.tile(x, [n if a in varying(x) else 1 for a, n in enumerate(times)]))


@rule("ops.DepthToSpace")
def depth_to_space(operation, call, x):
    """Every output channel comes from block_size ** 2 input channels, which leave together."""
    axis, blocks = channel_axis(operation), operation.block_size**2
    by_block = call.along(x, axis).reshape(blocks, -1)
    call.tie(by_block, by_block[:1])
    return Labels(call.spread(by_block[0], axis))


@rule("ops.SpaceToDepth")
def space_to_depth(operation, call, x):
    axis = channel_axis(operation)
    return Labels(call.spread(np.tile(call.along(x, axis), operation.block_size**2), axis))
