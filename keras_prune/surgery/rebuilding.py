"""Rebuild: the same network again, operation by operation, with whatever a subclass wants to be different."""

from __future__ import annotations

import itertools
import re
import tempfile
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from keras_prune.internals import (
    graph_of,
    input_layer_of,
    inputs_of,
    is_graph,
    nodes_of,
    operations_of,
    outputs_of,
    sublayers_of,
)
from keras_prune.surgery.training import compile_like


class Rebuild:
    """One rebuilding in progress: which new operation and variable stand for which old one.

    As it stands it makes a copy. A subclass overrides `made` (another layer from another config), `called` (another
    wiring around a call), `sliced` (other numbers), `input_shape`, or `changes`.
    """

    def __init__(self, model: keras.Model):
        self.source = model
        self.new: dict[int, tuple] = {}  # id(old operation) -> (old, new)
        self.variables: dict[int, keras.Variable] = {}  # id(old variable) -> new variable
        self._names = {operation.name for operation in operations_of(model)}

    def unused(self, name: str) -> str:
        """That name, or with a number behind it where the model has something of that name: Keras wants them unique."""
        numbered = (f"{name}_{n}" for n in itertools.count(1))
        while name in self._names:
            name = next(numbered)
        self._names.add(name)
        return name

    def count_past(self, *prefixes: str) -> None:
        """Keras counts up the names of operations that nobody names; a loaded model's were counted elsewhere."""
        for prefix in prefixes:
            found = [re.fullmatch(rf"{prefix}(?:_(\d+))?", name) for name in self._names]
            last = max((int(match[1] or 0) for match in found if match), default=-1)
            while last >= 0 and keras.backend.get_uid(prefix) <= last:
                pass

    def model(self) -> keras.Model:
        """The new model with the old one's weights, flags and compilation; the optimizer's slots go along."""
        result = self.graph(self.source)
        for old, new in list(self.new.values()):
            self.copy_weights(old, new)
        self._copy_trainable(result)
        there = {id(v) for v in result.variables}
        self.variables = {key: new for key, new in self.variables.items() if id(new) in there}
        compile_like(self.source, result, self.variables, self.sliced)
        return result

    # -- what a subclass may change ------------------------------------------------------------------------------

    def made(self, old, config: dict, cls: type | None = None):
        """The new operation from a copy of the old one's config; `cls` if it is of another class."""
        if type(old) is keras.layers.Lambda:  # its function is here, no need to read it from code
            return keras.layers.Lambda(**{**config, "function": old.function})
        with keras.saving.custom_object_scope(_own_objects(old)):
            return (cls or type(old)).from_config(config)

    def called(self, node, args: list, kwargs: dict):
        """The outputs of one call on new tensors."""
        return self.operation(node.operation)(*args, **kwargs)

    def takes(self, node) -> list:
        """The input tensors that a call needs."""
        return node.input_tensors

    def sliced(self, variable, array=None) -> np.ndarray:
        """What is left of a variable, or of an array shaped like it."""
        return keras.ops.convert_to_numpy(variable if array is None else array)

    def input_shape(self, tensor) -> tuple:
        """The shape of the new input for an old one, with the batch."""
        return tuple(tensor.shape)

    def changes(self, layer) -> bool:
        """Whether calls of a layer become something else than one call: a Sequential model cannot say that."""
        return False

    # -- operations ----------------------------------------------------------------------------------------------

    def operation(self, old):
        """The new operation for an old one; a shared layer stays shared."""
        if id(old) not in self.new:
            self.new[id(old)] = (old, self.graph(old) if is_graph(old) else self._rebuilt(old))
        return self.new[id(old)][1]

    def _rebuilt(self, old):
        try:
            return self.made(old, _without_arrays(_unbuilt(old.get_config())))
        except Exception as error:
            raise ValueError(
                f"Layer {old.name!r} ({type(old).__name__}) cannot be rebuilt from its config: {error}. Give it a "
                "get_config() that returns every argument of its __init__ (and a from_config() if it needs one)."
            ) from error

    def graph(self, old) -> keras.Model:
        """Rebuild a Functional or Sequential model, nested ones included."""
        if isinstance(old, keras.Sequential) and not any(map(self.changes, old.layers)):
            inputs = [self.input(t) for t in graph_of(old).inputs]
            return type(old)([*inputs, *map(self.operation, old.layers)], name=old.name)
        graph = graph_of(old)
        values = {id(t): self.input(t) for t in graph.inputs}
        for node in self.nodes(graph):
            args, kwargs = node.arguments.fill_in(values)
            out = self.called(node, list(args), kwargs)
            for tensor, new in zip(node.outputs, keras.tree.flatten(out)):
                values[id(tensor)] = new
        inputs, outputs = (
            keras.tree.map_structure(lambda t: values[id(t)], struct) for struct in (inputs_of(old), outputs_of(old))
        )
        return _same_class(old, inputs, outputs)

    def nodes(self, graph) -> list:
        """The calls to rebuild, in order: those that the outputs need."""
        needed = {id(t) for t in graph.outputs}
        kept = []
        for node in reversed(list(nodes_of(graph))):
            if any(id(t) in needed for t in node.outputs):
                needed.update(id(t) for t in self.takes(node))
                kept.append(node)
        return kept[::-1]

    def input(self, tensor):
        layer = input_layer_of(tensor)
        return keras.Input(
            batch_shape=self.input_shape(tensor),
            dtype=tensor.dtype,
            sparse=tensor.sparse,
            name=layer.name,
            optional=getattr(layer, "optional", False),
        )

    # -- weights -------------------------------------------------------------------------------------------------

    def copy_weights(self, old, new) -> None:
        if not isinstance(old, keras.layers.Layer) or is_graph(old):
            return
        list(self.sublayers(old, new))  # builds them
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

    def sublayers(self, old, new) -> Iterator[tuple]:
        """(old, new) layers directly inside of two layers, the new ones built if the old ones are: a layer given as
        activation is built only when it first sees numbers."""
        for before, after in zip(sublayers_of(old), sublayers_of(new)):
            if before.built and not after.built:
                after.build_from_config(before.get_build_config() or {})
            yield before, after

    def _copy_trainable(self, result: keras.Model) -> None:
        """Outer flags first: setting one sets all flags below it."""
        if not self.source.trainable:
            result.trainable = False
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
    if type(old) is keras.Sequential:  # no longer a plain sequence of layers
        return keras.Model(inputs, outputs, name=old.name)
    try:
        return type(old)(inputs=inputs, outputs=outputs, name=old.name)
    except TypeError:
        warnings.warn(
            f"{type(old).__name__} cannot be made from (inputs, outputs, name); the result is a plain keras.Model.",
            stacklevel=5,
        )
        return keras.Model(inputs, outputs, name=old.name)
