"""Zeros are the message: writing them, and reading them back."""

from __future__ import annotations

from collections.abc import Iterator

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


def dead_units(channels: Channels, strict: bool = False) -> Ids:
    """Units that are zero: ids, shape (dead units,).

    A unit is dead when all of its members are zero; also, unless `strict`, when only its producing side is, provided
    that it stays zero on its way through the network (no sigmoid, no added constant). Running statistics do not count.
    """
    busy, made_busy = (np.zeros(channels.unit_count, bool) for _ in range(2))
    seen, made = (np.zeros(channels.unit_count, bool) for _ in range(2))
    for weight in channels.weights:
        labelled = [a for a, ids in enumerate(weight.axes) if ids is not None]
        if weight.is_statistic or not labelled:
            continue
        nonzero = keras.ops.convert_to_numpy(weight.variable) != 0
        for axis in labelled:
            ids = weight.axes[axis]
            line = nonzero.any(axis=tuple(a for a in range(nonzero.ndim) if a != axis))
            seen[ids] = True
            busy[ids[line]] = True
            if not weight.reads[axis]:
                made[ids] = True
                made_busy[ids[line]] = True
    dead = seen & ~busy
    if not strict:
        dead |= made & ~made_busy & ~channels.loud
    dead[0] = False
    # A group never loses its last unit; its first one then stays, with its zeros.
    for group in channels.groups:
        if dead[group.units].all():
            dead[group.units[0]] = False
    prunable = np.zeros(channels.unit_count, bool)
    for group in channels.groups:
        prunable[group.units] = True
    return np.flatnonzero(dead & prunable)
