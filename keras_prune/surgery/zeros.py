"""Zeros are the message: writing them, and reading them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import keras
import numpy as np

from keras_prune.channels import Channels, Weight
from keras_prune.rules import Ids


def zero_masks(channels: Channels, removed: Ids, producers_only: bool = False) -> Iterator[tuple[Weight, np.ndarray]]:
    """(weight, 0/1 mask of the weight's shape) for every weight on which a removed unit appears.

    With all members masked the network computes what it would compute without the units, whatever the
    activations. With `producers_only` the readers keep their weights, so that gradients can revive a unit.
    """
    alive = channels.alive(removed)
    for weight in channels.weights:
        mask = None
        for axis, ids in enumerate(weight.axes):
            if ids is None or (producers_only and weight.reads[axis]):
                continue
            keep = alive[ids]
            if not keep.all():
                line = keep.reshape([-1 if a == axis else 1 for a in range(len(weight.axes))])
                mask = line if mask is None else mask & line
        if mask is not None:
            yield weight, np.broadcast_to(mask, tuple(weight.variable.shape))


def zero(channels: Channels, removed: Ids, producers_only: bool = False) -> None:
    """Write zeros on all members of the removed units, in place, into `channels.model`.

    Args:
        channels: labels of the model.
        removed: unit ids.
        producers_only: leave the readers alone (soft pruning).
    """
    for weight, mask in zero_masks(channels, removed, producers_only):
        write_zeros(weight.variable, mask)


def write_zeros(variable: keras.Variable, mask: np.ndarray) -> None:
    """Zeros where the 0/1 mask is 0, also in the place of a NaN."""
    value = keras.ops.convert_to_numpy(variable)
    variable.assign(np.where(mask, value, 0).astype(value.dtype))


def reader_factors(channels: Channels, multipliers: np.ndarray) -> Iterator[tuple[Weight, np.ndarray]]:
    """(weight, array that its variable is multiplied by, broadcast over its other axes) of the kernels that read units
    whose multiplier is not 1. Of a recurrent kernel, which makes and reads the same units, only what is removed counts.

    Args:
        channels: labels of the model.
        multipliers: of every unit, shape (unit_count,).
    """
    for weight in channels.weights:
        if not weight.is_kernel or weight.name.endswith("depthwise_kernel"):
            continue  # of a separable convolution the pointwise kernel reads the same units
        for axis in weight.takes:
            factors = multipliers[weight.axes[axis]]
            factors = factors if weight.reads[axis] else (factors != 0).astype(float)
            if (factors != 1).any():
                shape = [-1 if a == axis else 1 for a in range(len(weight.axes))]
                yield weight, factors.reshape(shape).astype("float32")


def dead_units(
    channels: Channels, strict: bool = False, may_vanish: Callable[[Ids], bool] = lambda units: False
) -> Ids:
    """Units that are zero, or that nothing reads: ids, shape (dead units,).

    A unit is dead when all of its members are zero; also, unless `strict`, when only its producing side is, provided
    that it stays zero on its way through the network (no sigmoid, no added constant); or when only its readers are.
    What a dead unit reads or feeds does not count for others. Running statistics do not count.

    Args:
        channels: labels of the model.
        strict: only units all of whose members are zero.
        may_vanish: (units, of which some are whole groups) -> whether the network can do without all of them. By
            default a group never loses its last unit; its first one then stays, with its zeros.
    """
    prunable = channels.prunable()
    entries = list(_nonzeros(channels))
    dead = np.zeros(channels.unit_count, bool)
    needed: set[int] = set()  # groups that cannot vanish after all, once others have
    while True:
        found = _dead(channels, entries, dead, strict) & prunable
        whole = [group for group in channels.groups if found[group.units].all()]
        found[[group.units[0] for group in whole]] = False
        # One by one: each part of a concatenation can leave, but not all. Those that have left already come first.
        for group in [] if strict else sorted(whole, key=lambda group: not dead[group.units].all()):
            first = group.units[0]
            found[first] = group.index not in needed
            if found[first] and not may_vanish(np.flatnonzero(found)):
                found[first] = False
                if dead[first]:
                    needed.add(group.index)
        if strict or (found == dead).all():
            return np.flatnonzero(found)
        dead = found


def _nonzeros(channels: Channels) -> Iterator[tuple[Weight, np.ndarray, np.ndarray]]:
    """(weight, where it is not zero, where that counts for what it reads) of all weights that carry a message."""
    for weight in channels.weights:
        if weight.is_statistic or not weight.labelled:
            continue
        nonzero = read = keras.ops.convert_to_numpy(weight.variable) != 0
        # Of a separable convolution an input is read if both of its kernels have something there.
        if weight.name == "depthwise_kernel":
            read = np.zeros_like(nonzero)
        elif weight.name == "pointwise_kernel":
            depthwise = keras.ops.convert_to_numpy(weight.layer.depthwise_kernel)
            read = nonzero & depthwise.any(axis=tuple(range(depthwise.ndim - 2))).reshape(-1, 1)
        yield weight, nonzero, read


def _dead(channels: Channels, entries, gone: np.ndarray, strict: bool) -> np.ndarray:
    """Dead units, shape (unit_count,), when the slices of the units that are `gone` do not count."""
    seen, busy, made, made_busy, read, read_busy = (np.zeros(channels.unit_count, bool) for _ in range(6))
    for weight, nonzero, as_read in entries:
        labelled, takes = weight.labelled, weight.takes
        for axis in labelled:
            ids = weight.axes[axis]
            others = [a for a in labelled if a != axis]
            line = _any_alive(nonzero, weight, axis, others, gone)
            seen[ids] = True
            busy[ids[line]] = True
            if not weight.reads[axis]:
                made[ids] = True
                made_busy[ids[line]] = True
            if axis in takes:
                read[ids] = True
                read_busy[ids[line if as_read is nonzero else _any_alive(as_read, weight, axis, others, gone)]] = True
    dead = seen & ~busy
    if not strict:
        dead |= made & ~made_busy & ~channels.loud
        dead |= read & ~read_busy
    dead[0] = False
    return dead


def _any_alive(nonzero: np.ndarray, weight: Weight, axis: int, others: list[int], gone: np.ndarray) -> np.ndarray:
    """Along one axis: whether a slice holds anything but zeros and what belongs to units that are gone."""
    for other in others:
        leaves = gone[weight.axes[other]]
        if leaves.any():
            nonzero = nonzero & ~leaves.reshape([-1 if a == other else 1 for a in range(nonzero.ndim)])
    return any_along(nonzero, axis)


def any_along(array: np.ndarray, axis: int) -> np.ndarray:
    """Shape (length of the axis,): whether a slice holds anything."""
    return array.any(axis=tuple(a for a in range(array.ndim) if a != axis))
