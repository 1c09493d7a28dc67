"""Cut: the same network, rebuilt from stock layers with fewer units, with the surviving weights."""

from __future__ import annotations

import tempfile
import warnings

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.internals import graph_of, input_layer_of, inputs_of, is_graph, nodes_of, outputs_of, sublayers_of
from keras_prune.rules import Ids
from keras_prune.surgery.training import compile_like
from keras_prune.surgery.zeros import write_zeros, zero_masks


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
        if not alive[group.units].any():
            raise ValueError(f"removed holds all {len(group)} units of {group.name}; at least one has to stay.")
    work = _Cut(channels, alive)
    return work.model(), {key: new for key, (_, new) in work.new.items()}


def zeroed(channels: Channels, removed: Ids) -> keras.Model:
    """A copy of the model with zeros on the removed units: what the cut model has to equal."""
    copy, twins = copied(channels)
    for weight, mask in zero_masks(channels, removed):
        write_zeros(twins[id(weight.variable)], mask)
    return copy


def copied(channels: Channels) -> tuple[keras.Model, dict[int, keras.Variable]]:
    """A full copy of the model, and id(variable) -> its twin in the copy."""
    whole = _Cut(channels, channels.alive(()))
    return whole.model(), whole.variables


class _Cut:
    """One cut in progress: which units live, and which new operation stands for which old one."""

    def __init__(self, channels: Channels, alive: np.ndarray):
        self.channels = channels
        self.alive = alive
        self.new: dict[int, tuple] = {}  # id(old operation) -> (old, new)
        self.variables: dict[int, keras.Variable] = {}  # id(old variable) -> new variable
        self.labels = {id(w.variable): w for w in channels.weights}

    def model(self) -> keras.Model:
        small = self.graph(self.channels.model)
        for old, new in list(self.new.values()):
            self.copy_weights(old, new)
        self.copy_trainable(small)
        compile_like(self.channels.model, small, self.variables, self.sliced)
        return small

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

    # -- operations ----------------------------------------------------------------------------------------------

    def operation(self, old):
        """The new operation for an old one; a shared layer stays shared."""
        if id(old) not in self.new:
            self.new[id(old)] = (old, self.graph(old) if is_graph(old) else self.rebuilt(old))
        return self.new[id(old)][1]

    def rebuilt(self, old):
        try:
            config = _without_arrays(_unbuilt(old.get_config()))
            for path, edit in self.channels.config_edits(old).items():
                *outer, key = path.split(".")
                place = config
                for step in outer:
                    place = place[step]
                value = self.value(edit, place[key])
                place[key] = value.tolist() if isinstance(value, np.ndarray) else value
            if type(old) is keras.layers.Lambda:  # its function is here, no need to read it from code
                return keras.layers.Lambda(**{**config, "function": old.function})
            with keras.saving.custom_object_scope(_own_objects(old)):
                return type(old).from_config(config)
        except Exception as error:
            raise ValueError(
                f"Layer {old.name!r} ({type(old).__name__}) cannot be rebuilt from its config: {error}. Give it a "
                "get_config() that returns every argument of its __init__ (and a from_config() if it needs one)."
            ) from error

    def graph(self, old) -> keras.Model:
        """Rebuild a Functional or Sequential model, nested ones included."""
        if isinstance(old, keras.Sequential):
            return self.sequential(old)
        values = {id(t): self.input(t) for t in old.inputs}
        for node in nodes_of(old):
            args, kwargs = node.arguments.fill_in(values)
            args = list(args)
            for key, edit in self.channels.argument_edits(node).items():
                place = args if isinstance(key, int) else kwargs
                place[key] = self.value(edit, place[key])
            out = self.operation(node.operation)(*args, **kwargs)
            for tensor, new in zip(node.outputs, keras.tree.flatten(out)):
                values[id(tensor)] = new
        inputs, outputs = (
            keras.tree.map_structure(lambda t: values[id(t)], struct) for struct in (inputs_of(old), outputs_of(old))
        )
        return _same_class(old, inputs, outputs)

    def sequential(self, old) -> keras.Sequential:
        inputs = [self.input(t) for t in graph_of(old).inputs]
        layers = [self.operation(layer) for layer in old.layers]
        return type(old)([*inputs, *layers], name=old.name)

    def input(self, tensor):
        """A fresh keras.Input; that of a nested model has lost channels with the tensor it is called on."""
        shape = list(tensor.shape)
        ids = self.channels.ids_of(tensor)
        for axis in range(ids.ndim):
            if ids.shape[axis] > 1:
                shape[axis] = int(self.alive[ids.ravel()].sum())
        layer = input_layer_of(tensor)
        return keras.Input(
            batch_shape=tuple(shape),
            dtype=tensor.dtype,
            sparse=tensor.sparse,
            name=layer.name,
            optional=getattr(layer, "optional", False),
        )

    # -- weights -------------------------------------------------------------------------------------------------

    def sliced(self, variable, array=None) -> np.ndarray:
        """What is left of a variable, or of an array shaped like it."""
        array = keras.ops.convert_to_numpy(variable if array is None else array)
        weight = self.labels.get(id(variable))
        for axis, ids in enumerate(weight.axes if weight else ()):
            if ids is not None and not self.alive[ids].all():
                array = array.compress(self.alive[ids], axis)
        return array

    def copy_weights(self, old, new) -> None:
        if not isinstance(old, keras.layers.Layer) or is_graph(old):
            return
        for before, after in zip(sublayers_of(old), sublayers_of(new)):
            if before.built and not after.built:  # a layer given as activation is built when it first sees numbers
                after.build_from_config(before.get_build_config() or {})
        old_variables, new_variables = old.variables, new.variables
        if len(old_variables) != len(new_variables):
            raise ValueError(
                f"Layer {old.name!r} ({type(old).__name__}) has {len(old_variables)} variables, but rebuilt from its "
                f"config it has {len(new_variables)}. Its get_config() must return every argument of its __init__."
            )
        for before, after in zip(old_variables, new_variables):
            array = self.sliced(before)
            if tuple(array.shape) != tuple(after.shape):
                raise ValueError(
                    f"Weight {before.path} is {tuple(array.shape)} after the cut, but the rebuilt layer has "
                    f"{tuple(after.shape)}: the rule for {type(old).__name__} does not rewrite its config. Mend the "
                    "rule, or protect the layer."
                )
            after.assign(array)
            self.variables[id(before)] = after
        if hasattr(old, "save_assets"):  # a vocabulary
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)
        if hasattr(new, "finalize_state"):  # preprocessing layers derive constants from their weights
            new.finalize_state()

    def copy_trainable(self, small: keras.Model) -> None:
        """Outer flags first: setting one sets all flags below it."""
        if not self.channels.model.trainable:
            small.trainable = False
        for old, new in reversed(list(self.new.values())):
            if isinstance(old, keras.layers.Layer):
                _copy_flags(old, new)


def _own_objects(layer) -> dict:
    """The functions and classes a layer holds, by name: a user's own activation needs no registration to be copied."""
    found = {}
    for value in vars(layer).values():
        for item in (value, type(value)):
            if callable(item) and getattr(item, "__module__", "builtins") != "builtins" and hasattr(item, "__name__"):
                found[item.__name__] = found[keras.saving.get_registered_name(item)] = item
    return found


def _unbuilt(config):
    """A config without the build shapes of wrapped layers: they are those of the old network."""
    if isinstance(config, dict):
        return {k: _unbuilt(v) for k, v in config.items() if not (k == "build_config" and "class_name" in config)}
    return config


def _without_arrays(config: dict) -> dict:
    """A config whose initializers hold no arrays of the old width (pretrained embeddings): the weights are copied."""

    def is_array(entry):
        value = entry.get("config", {}).get("value") if isinstance(entry, dict) else None
        return isinstance(value, (dict, list)) or getattr(value, "ndim", 0) > 0

    return {k: "zeros" if k.endswith("_initializer") and is_array(v) else v for k, v in config.items()}


def _copy_flags(old, new) -> None:
    if new.trainable != old.trainable:
        new.trainable = old.trainable
    for before, after in zip(sublayers_of(old), sublayers_of(new)):
        _copy_flags(before, after)


def _same_class(old, inputs, outputs):
    """A model of the same class where its constructor allows it (a subclass with a train_step of its own)."""
    try:
        return type(old)(inputs=inputs, outputs=outputs, name=old.name)
    except TypeError:
        warnings.warn(
            f"{type(old).__name__} cannot be made from (inputs, outputs, name); the result is a plain keras.Model.",
            stacklevel=5,
        )
        return keras.Model(inputs, outputs, name=old.name)
