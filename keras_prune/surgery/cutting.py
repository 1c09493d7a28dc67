"""Cut: the same network, rebuilt from stock layers with fewer units, with the surviving weights."""

from __future__ import annotations

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.rules import Ids
from keras_prune.surgery.branches import can_vanish, is_absent
from keras_prune.surgery.rebuilding import Rebuild
from keras_prune.surgery.zeros import reader_factors, write_zeros, zero_masks


def cut(channels: Channels, removed: Ids) -> keras.Model:
    """Build the smaller model.

    Args:
        channels: labels of the model.
        removed: ids of the units that leave; `channels.groups[k].units` lists them.

    Returns:
        A new model of the same layers (names, dtypes, trainable flags, regularizers kept), compiled like the
        original with the optimizer's slots sliced along. The original is not changed.

    Raises:
        ValueError: a layer cannot be rebuilt from its config, or a removed id is unknown.
    """
    return cut_with_twins(channels, removed)[0]


def cut_with_twins(channels: Channels, removed: Ids) -> tuple[keras.Model, dict[int, keras.Operation]]:
    """The smaller model, and id(old operation) -> the new one that stands for it. Raises as `cut`."""
    alive = channels.alive(removed)
    for group in channels.groups:
        if not alive[group.units].any() and not can_vanish(channels, np.flatnonzero(~alive)):
            raise ValueError(f"removed holds all {len(group)} units of {group.name}; at least one has to stay.")
    work = Cut(channels, alive)
    return work.model(), {key: new for key, (_, new) in work.new.items()}


def zeroed(channels: Channels, removed: Ids) -> keras.Model:
    """A copy of the model with zeros on the removed units: what the cut model has to equal."""
    copy, twins = copied(channels)
    for weight, mask in zero_masks(channels, removed):
        write_zeros(twins[id(weight.variable)], mask)
    return copy


def reweighed(channels: Channels, multipliers: np.ndarray) -> keras.Model:
    """A copy of the model in which every kernel multiplies what it reads.

    Args:
        channels: labels of the model.
        multipliers: of every unit, shape (unit_count,).
    """
    copy, twins = copied(channels)
    for weight, factor in reader_factors(channels, multipliers):
        twin = twins[id(weight.variable)]
        twin.assign(keras.ops.convert_to_numpy(twin) * factor)
    return copy


def copied(channels: Channels) -> tuple[keras.Model, dict[int, keras.Variable]]:
    """A full copy of the model, and id(variable) -> its twin in the copy."""
    whole = Cut(channels, channels.alive(()))
    return whole.model(), whole.variables


class Cut(Rebuild):
    """One cut in progress: which units live."""

    def __init__(self, channels: Channels, alive: np.ndarray):
        super().__init__(channels.model)
        self.channels = channels
        self.alive = alive
        self.labels = {id(w.variable): w for w in channels.weights}

    def survivors(self, raw: Ids) -> int:
        """How many of these (unresolved) ids live: what rules' functions are given."""
        return int(self.alive[self.channels.resolve(raw)].sum())

    def value(self, edit, old):
        """A number or constant of the old network, as it is after the cut."""
        if callable(edit):
            return edit(self.survivors)
        if isinstance(edit, tuple):  # ids per axis of an array constant
            if isinstance(old, dict):  # an array in a config
                old = keras.saving.deserialize_keras_object(old)
            array = keras.ops.convert_to_numpy(old)
            for axis, raw in enumerate(edit):
                if raw is not None:
                    array = array.compress(self.alive[self.channels.resolve(raw)], axis)
            return array
        return self.survivors(edit)

    def made(self, old, config):
        for path, edit in self.channels.config_edits(old).items():
            *outer, key = path.split(".")
            place = config
            for step in outer:
                place = place[step]
            value = self.value(edit, place[key])
            place[key] = value.tolist() if isinstance(value, np.ndarray) else value
        return super().made(old, config)

    def takes(self, node):
        return [t for t in node.input_tensors if not is_absent(self.channels, t, ~self.alive)]

    def called(self, node, args, kwargs):
        if len(self.takes(node)) < len(node.input_tensors):  # a concatenation of which some parts are gone
            (tensors,) = args
            left = [t for t in tensors if t is not None]
            return left[0] if len(left) == 1 else super().called(node, [left], kwargs)
        for key, edit in self.channels.argument_edits(node).items():
            place = args if isinstance(key, int) else kwargs
            place[key] = self.value(edit, place[key])
        return super().called(node, args, kwargs)

    def input_shape(self, tensor):
        """That of a nested model has lost channels with the tensor it is called on."""
        shape, ids = list(tensor.shape), self.channels.ids_of(tensor)
        for axis in range(ids.ndim):
            if ids.shape[axis] > 1:
                shape[axis] = int(self.alive[ids.ravel()].sum())
        return tuple(shape)

    def sliced(self, variable, array=None):
        array = super().sliced(variable, array)
        weight = self.labels.get(id(variable))
        for axis, ids in enumerate(weight.axes if weight else ()):
            if ids is not None and not self.alive[ids].all():
                array = array.compress(self.alive[ids], axis)
        return array
