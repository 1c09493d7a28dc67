"""A model as a straight line of calls: run it piece by piece, look into it, and keep what is still needed.

Nested models are laid open, so that every layer of every depth is one step of the line. Values are kept by number
("slots"); a slot is forgotten after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keras
import numpy as np

from keras_prune.internals import entering, graph_of, inputs_of, is_graph, nodes_of

Values = dict
"""Slot -> tensor of the backend."""


class Entrance(keras.layers.Layer):
    """What a nested model does first with a tensor that is not like its input; a mask goes along."""

    def __init__(self, like: keras.KerasTensor):
        super().__init__(autocast=False)
        self.like = like
        self.supports_masking = True

    def call(self, x, mask=None):
        return _fitted(x, self.like)


@dataclass(frozen=True)
class Step:
    """One call of one operation.

    Attributes:
        operation: the layer or operation.
        node: its node in the graph, which knows the arguments; None for an `Entrance`.
        takes: (id of the symbolic tensor, slot) of each input.
        gives: slots of its outputs.
    """

    operation: keras.Operation
    node: object
    takes: tuple[tuple[int, int], ...]
    gives: tuple[int, ...]

    def run(self, values: Values) -> None:
        if self.node is None:
            given = [values[slot] for _, slot in self.takes]
            args, kwargs = given[:1], {"mask": given[1]} if len(given) > 1 else {}
        else:
            args, kwargs = self.node.arguments.fill_in({tensor: values[slot] for tensor, slot in self.takes})
        if isinstance(self.operation, keras.layers.Layer):  # some train unless told otherwise: RandomFlip
            kwargs["training"] = False
        made = keras.tree.flatten(self.operation(*args, **kwargs))
        values.update(zip(self.gives, made))


class Program:
    """The calls of a model in the order in which they run.

    Two models of the same architecture have the same steps and slots, so that they can be run side by side.

    Args:
        model: a built Functional or Sequential model.

    Attributes:
        steps: the calls.
        inputs, outputs: slots.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.steps: list[Step] = []
        self._slots = 0
        graph = graph_of(model)
        self.inputs = [self._slot() for _ in graph.inputs]
        self.outputs = self._lay_open(graph, self.inputs)
        self.last_use = dict.fromkeys(self.outputs, len(self.steps))
        for number, step in reversed(list(enumerate(self.steps))):
            for _, slot in step.takes:
                self.last_use.setdefault(slot, number)

    def _slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _lay_open(self, graph, inputs: list[int]) -> list[int]:
        slots = {id(t): slot for t, slot in zip(graph.inputs, inputs)}
        for node in nodes_of(graph):
            if is_graph(node.operation):
                gives = self._lay_open(graph_of(node.operation), self._enter(node, slots))
            else:
                takes = tuple((id(t), slots[id(t)]) for t in node.input_tensors)
                gives = [self._slot() for _ in node.outputs]
                self.steps.append(Step(node.operation, node, takes, tuple(gives)))
            slots.update(zip(map(id, node.outputs), gives))
        return [slots[id(t)] for t in graph.outputs]

    def _enter(self, node, slots: dict[int, int]) -> list[int]:
        """Slots of what a nested model is given, in the order of its inputs."""
        given, mask = entering(node), node.arguments.kwargs.get("mask")
        masks = [None] * len(given) if mask is None else keras.tree.flatten(mask)
        found = []
        for tensor, mask, own in zip(given, masks, graph_of(node.operation).inputs):
            slot = slots[id(tensor)]
            if mask is not None or tensor.dtype != own.dtype or len(tensor.shape) != len(own.shape):
                takes = tuple((id(t), slots[id(t)]) for t in (tensor, mask) if t is not None)
                slot = self._slot()
                self.steps.append(Step(Entrance(own), None, takes, (slot,)))
            found.append(slot)
        return found

    def start(self, batch) -> Values:
        """The values before the first step, of a batch in the structure of the model's inputs."""
        tensors, arrays = graph_of(self.model).inputs, keras.tree.flatten(batch)
        return {slot: None if a is None else _fitted(a, t) for slot, t, a in zip(self.inputs, tensors, arrays)}

    def run(self, values: Values, start: int, stop: int) -> Values:
        """Values before step `stop` from those before step `start`: only what is needed from there on."""
        values = dict(values)
        for number in range(start, stop):
            self.steps[number].run(values)
            for slot in [s for s in values if self.last_use.get(s, -1) <= number]:
                del values[slot]
        return values

    def users(self, slot: int) -> list[int]:
        """Numbers of the steps that take a slot; the number of steps stands for the model's output."""
        found = [n for n, step in enumerate(self.steps) if any(s == slot for _, s in step.takes)]
        return found + [len(self.steps)] * self.outputs.count(slot)


def samples_in(data) -> int:
    """How many samples arrays hold, in any structure; an optional input may be None."""
    return next(len(a) for a in keras.tree.flatten(data) if a is not None)


def batches_of(model: keras.Model, data, batch_size: int) -> Iterator:
    """Batches in the structure of the model's inputs, from arrays in that structure."""
    arrays = keras.tree.flatten(data)
    for start in range(0, samples_in(data), batch_size):
        batch = [None if a is None else a[start : start + batch_size] for a in arrays]
        yield keras.tree.pack_sequence_as(inputs_of(model), batch)


@contextmanager
def listening(layer: keras.layers.Layer, hear: Callable):
    """While it is open, every call of the layer passes its first input and its output to `hear(x, y)`."""
    own, outer = layer.call, vars(layer).get("call")

    def call(*args, **kwargs):
        out = own(*args, **kwargs)
        hear(args[0] if args else next(iter(kwargs.values())), out)
        return out

    vars(layer)["call"] = call  # on the object, not through Keras, which would track it
    try:
        yield
    finally:
        if outer is None:
            del vars(layer)["call"]
        else:  # somebody else is listening, too
            vars(layer)["call"] = outer


def _fitted(x, like: keras.KerasTensor):
    """A tensor of the dtype and rank of a model's input, as the model itself would make it."""
    x, rank = keras.ops.convert_to_tensor(x, keras.backend.standardize_dtype(like.dtype)), len(like.shape)
    if len(x.shape) == rank - 1:
        return keras.ops.expand_dims(x, -1)
    return keras.ops.squeeze(x, -1) if len(x.shape) == rank + 1 else x


def size_of(values: Values) -> int:
    """Bytes of all tensors in it."""
    return sum(int(np.prod(v.shape)) * np.dtype(_numpy_dtype(v)).itemsize for v in values.values() if v is not None)


def _numpy_dtype(tensor) -> str:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return {"bfloat16": "float16"}.get(dtype, dtype)
