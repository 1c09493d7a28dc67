"""The words in which a rule speaks: ids, labels, and the call it labels.

Every tensor and every weight axis carries integer *ids*: which unit each slice belongs to; 0 means frozen.
The ids of a tensor are an array of the tensor's rank whose every dimension is either full or 1; 1 means "the
same along this axis". An image tensor of shape (batch, 32, 32, 16) so has ids of shape (1, 1, 1, 16). Shape
operations of the network (reshape, transpose, concatenate, slice, ...) are run on the ids themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

Ids = np.ndarray
"""Integers; one per slice of an axis, 0 = frozen."""

FROZEN = 0


@dataclass(frozen=True)
class Labels:
    """What a rule says about one call of one layer.

    Args:
        out: ids of the output tensor; a list of them for several outputs.
        weights: attribute path of a weight (`"kernel"`, `"cell.bias"`) -> one entry per axis: 1-D ids, or None
            where the axis carries no units (taps of a kernel).
        config: key in the layer's `get_config()` (dots descend) -> 1-D ids whose surviving count is the new
            value, or a function `survivors -> value` where `survivors(ids)` counts.
        arguments: position or keyword of a call argument -> ids (an array constant, cut along) or a function as
            above (a new value).
        positions: how often each kernel entry is used per sample, for all kernels or by attribute path; default: the
            output positions per channel.
        reads: attribute paths of weights that read what the layer makes inside itself; by default those that make
            some of its output.
        products: further multiply-accumulates as (list of 1-D ids, factor): factor x the product of the
            surviving counts. For products of two activations, which have no kernel.
    """

    out: Ids | list[Ids]
    weights: dict[str, tuple[Ids | None, ...]] = field(default_factory=dict)
    config: dict[str, Ids | Callable] = field(default_factory=dict)
    arguments: dict[int | str, Any] = field(default_factory=dict)
    positions: int | dict[str, int] | None = None
    products: tuple[tuple[list[Ids], int], ...] = ()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fence:
    """A place nothing is removed across: which layer, of which type, and why."""

    layer: str
    type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer} ({self.type}): {self.reason}"


class Ledger:
    """Hands out ids and remembers which of them are one unit (a union-find, solved once at the end)."""

    def __init__(self):
        self.count = 1  # id 0 is the frozen unit
        self._left: list[Ids] = []
        self._right: list[Ids] = []
        self._loud: list[Ids] = []
        self.pieces: list[Ids] = []
        self.fences: list[tuple[Fence, Ids]] = []
        self._known: dict[tuple, Ids] = {}

    def fresh(self, n: int, key: tuple) -> Ids:
        """n new units; the same ones again for the same key (a layer that is called twice)."""
        if key not in self._known:
            self._known[key] = np.arange(self.count, self.count + n)
            self.count += n
        return self._known[key]

    def tie(self, a: Ids, b: Ids | int) -> None:
        a, b = np.broadcast_arrays(a, b)
        differ = a != b
        if differ.any():
            self._left.append(a[differ].ravel())
            self._right.append(b[differ].ravel())

    def loud(self, ids: Ids) -> None:
        self._loud.append(np.unique(ids))

    def roots(self) -> Ids:
        """Shape (count,): the smallest id of each id's unit. Frozen is 0, the smallest of all.

        Minimum labels spread along the ties, with pointer jumping: a logarithmic number of vectorised rounds.
        """
        root = np.arange(self.count)
        if not self._left:
            return root
        left, right = np.concatenate(self._left), np.concatenate(self._right)
        while True:
            a, b = root[left], root[right]
            low = np.minimum(a, b)
            if (a == b).all():
                return root
            # Hook both roots, not the leaves, so that whole trees merge in one round.
            np.minimum.at(root, a, low)
            np.minimum.at(root, b, low)
            while True:
                jumped = root[root]
                if (jumped == root).all():
                    break
                root = jumped

    def loud_ids(self) -> Ids:
        return np.concatenate(self._loud) if self._loud else np.zeros(0, int)


class Call:
    """One call of one operation in the graph, as a rule sees it.

    Attributes:
        args, kwargs: the call's arguments with ids in the place of tensors.
        inputs: the ids of the input tensors, in order; `shapes` their shapes.
        outputs: shapes of the output tensors.
    """

    def __init__(self, operation, args, kwargs, tensors, inputs, made, specs, ledger):
        self.operation = operation
        self.args, self.kwargs = args, kwargs
        self.inputs: list[Ids] = inputs
        self.shapes: list[tuple] = [t.shape for t in tensors]
        self.made = made
        self.outputs: list[tuple] = [t.shape for t in made]
        self._tensors, self._specs = tensors, specs
        self._ledger = ledger
        self._calls = 0

    def fresh(self, n: int) -> Ids:
        """n new units. A layer that is called again gets the ids of its first call."""
        self._calls += 1
        return self._ledger.fresh(n, (id(self.operation), self._calls))

    def tie(self, a: Ids, b: Ids | int) -> None:
        """The slices under `a` and `b` (broadcast together) live and die together."""
        self._ledger.tie(a, b)

    def fence(self, ids: Ids, reason: str) -> None:
        """Freeze ids. The reason is reported if they would otherwise be free."""
        if np.any(ids):
            fence = Fence(getattr(self.operation, "name", "?"), type(self.operation).__name__, reason)
            self._ledger.fences.append((fence, np.unique(ids)))

    def freeze(self, ids: Ids) -> None:
        """Freeze ids without a word: of a single channel nothing could be removed anyway."""
        self._ledger.tie(ids, FROZEN)

    def piece(self, ids: Ids) -> None:
        """A slice of a tensor: it competes for itself, so that it never becomes empty."""
        self._ledger.pieces.append(np.unique(ids))

    def inner(self, operation, axis: int) -> Call:
        """The call of a wrapped operation, which does not see one axis of the first input and of the outputs."""

        def without(tensor, lengths):
            shape = (*lengths[:axis], *lengths[axis + 1 :])
            return keras.KerasTensor(shape, dtype=tensor.dtype)

        x, outer = self.inputs[0].squeeze(axis), self._tensors[0]
        tensor = without(outer, outer.shape)
        made = [without(t, t.shape) for t in self.made]
        specs = {
            id(t): without(o, self._specs.get(id(o), o).shape) for t, o in zip([tensor, *made], [outer, *self.made])
        }
        return Call(operation, (x,), {}, [tensor], [x], made, specs, self._ledger)

    def loud(self, ids: Ids) -> None:
        """These units no longer carry zeros when their producers are zero (a sigmoid, an added constant)."""
        self._ledger.loud(ids)

    def shape_of(self, ids: Ids) -> tuple:
        for known, shape in zip(self.inputs, self.shapes):
            if known is ids:
                return shape
        raise ValueError("shape_of() expects one of the call's own inputs")

    def lengths(self, ids: Ids) -> tuple[int, ...]:
        """The shape of an input without the batch, for counting: unknown lengths are assumed ones."""
        for known, tensor in zip(self.inputs, self._tensors):
            if known is ids:
                return tuple(d or 1 for d in self._specs.get(id(tensor), tensor).shape[1:])
        raise ValueError("lengths() expects one of the call's own inputs")

    def along(self, x: Ids, axis: int) -> Ids:
        """The 1-D ids of input `x` on the one axis where channels are expected; variation elsewhere is fenced."""
        shape = self.shape_of(x)
        axis %= x.ndim
        size = shape[axis]
        if x.size == 1 and size == 1:
            return x.ravel()
        if x.shape[axis] == x.size and x.size > 1:
            return x.ravel()
        self.fence(x, f"expects channels on axis {axis} alone, but its input carries units on other axes")
        return np.zeros(size or 1, int)

    def spread(self, ids: Ids, axis: int, output: int = 0) -> Ids:
        """1-D ids -> ids of an output tensor with the channels on `axis`."""
        shape = [1] * len(self.outputs[output])
        shape[axis] = len(ids)
        return ids.reshape(shape)

    def frozen(self) -> Ids | list[Ids]:
        """Ids of outputs that carry no units."""
        out = [np.zeros((1,) * len(shape), int) for shape in self.outputs]
        return out[0] if len(out) == 1 else out

    def constants(self) -> list[tuple[int | str, np.ndarray]]:
        """(position or keyword, array) of the arguments that are numbers or arrays, not tensors of the graph."""
        found = []
        for key, value in [*enumerate(self.args), *self.kwargs.items()]:
            if any(value is x for x in self.inputs) or value is None or isinstance(value, (str, bool)):
                continue
            try:
                found.append((key, np.asarray(keras.ops.convert_to_numpy(value))))
            except Exception:  # whatever cannot become an array is no constant
                continue
        return found


Rule = Callable[..., Labels | None]
"""(layer, call, *ids) -> labels; None for a case that it does not rule: a fence."""
RULES: dict[Any, Rule] = {}


def rule(*types: type | str) -> Callable[[Rule], Rule]:
    """Register a labelling rule for layer types.

    Args:
        types: layer classes, or names: `"Dense"` for a Keras layer, `"ops.Relu"` for a Keras operation.
            Dispatch is on the exact class: a subclass may compute something else, so it needs its own entry.

    Example, a layer of one's own that scales every channel:

        >>> @keras_prune.rule(ChannelScale)
        ... def channel_scale(layer, call, x):
        ...     return Labels(x, {"scale": (call.along(x, -1),)})
    """
    for kind in types:
        if not isinstance(kind, (type, str)):
            raise TypeError(f"rule({kind!r}): expected layer classes or names such as 'Dense' or 'ops.Relu'.")

    def register(function: Rule) -> Rule:
        for kind in types:
            RULES[kind] = function
        return function

    return register


def find_rule(operation) -> Rule | None:
    """The rule of an operation, or None. Keras's own classes are found by name, all others by class."""
    cls = type(operation)
    if cls in RULES:
        return RULES[cls]
    if cls.__module__.startswith("keras.src.ops."):
        return RULES.get(f"ops.{cls.__name__}")
    if cls.__module__.startswith("keras.src."):
        return RULES.get(cls.__name__)
    return None


def broadcast(x: Ids, shape: Sequence[int | None]) -> Ids:
    """Ids with every known dimension full (the batch stays 1)."""
    return np.broadcast_to(x, [1] + [d or 1 for d in shape[1:]])


def collapse(ids: Ids) -> Ids:
    """Axes along which nothing changes become 1."""
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            first = ids.take([0], axis)
            if (ids == first).all():
                ids = first
    return ids


def varying(ids: Ids) -> list[int]:
    """The axes along which ids differ."""
    return [axis for axis in range(ids.ndim) if ids.shape[axis] > 1]
