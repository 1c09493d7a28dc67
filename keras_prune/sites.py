"""Kernels at work: which layer holds them, what they multiply, where in the program, and what comes after them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import keras
import numpy as np

from keras_prune.channels import Channels, Group, Weight
from keras_prune.linear import View, view_of
from keras_prune.program import Program
from keras_prune.rules import Ids


@dataclass(frozen=True)
class Site:
    """One kernel of a model.

    Attributes:
        weight: its labels.
        path: from the layer in the graph to the layer that holds it ("" for itself, "_query_dense" in attention).
        layer: the layer whose input and output are the rows' source: the one that holds the kernel, or the
            TimeDistributed around it.
        view: the kernel as matrices.
        steps: numbers of the calls in the program.
    """

    weight: Weight
    path: str
    layer: keras.layers.Layer
    view: View
    steps: tuple[int, ...]

    @property
    def kernel(self) -> keras.Variable:
        return self.weight.variable

    @property
    def bias(self) -> keras.Variable | None:
        owner = attrgetter(self.path)(self.weight.layer) if self.path else self.weight.layer
        return owner.bias if self.view.has_bias else None

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, columns, outputs) of the kernel as matrices."""
        return self.view.matrices(np.broadcast_to(False, tuple(self.kernel.shape))).shape

    def matrix(self) -> np.ndarray:
        """The kernel, shape (blocks, columns, outputs)."""
        return self.view.matrices(keras.ops.convert_to_numpy(self.kernel))

    def write(self, matrix: np.ndarray) -> None:
        self.kernel.assign(self.view.kernel(matrix).astype(keras.backend.standardize_dtype(self.kernel.dtype)))

    def ids(self, axis: int) -> Ids:
        """The ids on one axis of the kernel as matrices, shape (blocks, columns, outputs)."""
        shape = tuple(self.kernel.shape)
        line = self.weight.axes[axis].reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return self.view.matrices(np.broadcast_to(line, shape))

    def reads(self, group: Group) -> list[int]:
        """Axes of the kernel on which it reads units of the group."""
        return [m.axis for m in group.members if m.reads and m.weight is self.weight]

    def columns(self, group: Group) -> list[np.ndarray] | None:
        """Per block the columns of each unit, (units, width); None where it reads none, or not all alike."""
        axes = self.reads(group)
        if len(axes) != 1:
            return None
        found = []
        for ids in self.ids(axes[0])[:, :, 0]:
            places = [np.flatnonzero(ids == unit) for unit in group.units]
            if len({len(p) for p in places}) != 1 or not len(places[0]):
                return None
            found.append(np.stack(places))
        return found

    def kept(self, alive: np.ndarray) -> np.ndarray:
        """What stays of the matrices, True, shape (blocks, columns, outputs)."""
        keep = np.ones(self.kernel.shape, bool)
        for axis, ids in enumerate(self.weight.axes):
            if ids is not None:
                keep &= alive[ids].reshape([-1 if a == axis else 1 for a in range(keep.ndim)])
        return self.view.matrices(keep)


def sites_of(channels: Channels, program: Program) -> list[Site]:
    """All kernels that have a view, in the order in which they are first used."""
    calls: dict[int, list[int]] = {}
    for number, step in enumerate(program.steps):
        calls.setdefault(id(step.operation), []).append(number)
    found = [
        site
        for weight in channels.weights
        if weight.is_kernel and id(weight.layer) in calls
        for site in [site_of(weight, tuple(calls[id(weight.layer)]))]
        if site is not None
    ]
    return sorted(found, key=lambda site: site.steps[0])


def site_of(weight: Weight, steps: tuple[int, ...]) -> Site | None:
    """The site of a labelled kernel; None where its layer's type has no view."""
    path, _, name = weight.name.rpartition(".")
    layer = attrgetter(path)(weight.layer) if path else weight.layer
    if isinstance(weight.layer, keras.layers.TimeDistributed):
        layer = weight.layer
    view = view_of(layer, name)
    return view and Site(weight, path, layer, view, steps)


def unmeasured(channels: Channels, group: Group, sites: list[Site]) -> str:
    """Why the removal of the group's units cannot be measured at what reads them; "" if it can."""
    known = {id(site.weight): site for site in sites}
    readers = [m for m in group.members if m.reads and m.weight.is_kernel and "depthwise_kernel" not in m.weight.name]
    if not readers:
        return "nothing with a kernel that mixes channels reads it"
    for member in readers:
        layer = member.weight.layer
        site = known.get(id(member.weight))
        if site is None or site.columns(group) is None:
            return f"read by {layer.name} ({type(layer).__name__}), which cannot be refitted"
    return ""


def applications(channels: Channels) -> dict[int, int]:
    """How often a kernel is applied to one sample, in all its calls together, by id of the variable: the positions
    of a convolution's output (of a transposed one's input), 1 of a Dense layer on a vector."""
    found: dict[int, int] = {}
    for term in channels.terms:
        if term.kernel is not None:
            found[id(term.kernel)] = found.get(id(term.kernel), 0) + term.factor
    return found


def neurons(channels: Channels, sites: list[Site]) -> tuple[int, int]:
    """(numbers that all kernels make of one sample, those of the kernel that makes most)."""
    times = applications(channels)
    made = [times[id(site.kernel)] * site.shape[0] * site.shape[2] for site in sites]
    return sum(made), max(made, default=0)


@dataclass(frozen=True)
class Tail:
    """What a kernel's output goes through before it is mixed again.

    Attributes:
        norm: a BatchNormalization right behind, or None.
        summands: slots of what is added to it then.
        clip: the range outside of which the next activation no longer tells values apart: (0, inf) for ReLU.
    """

    norm: keras.layers.BatchNormalization | None = None
    summands: tuple[int, ...] = ()
    clip: tuple[float, float] = (-np.inf, np.inf)


_SILENT = ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise", "Identity")
_CLIPS = {"relu": (0.0, np.inf), "relu6": (0.0, 6.0)}


def intercept_of(bias, norm) -> tuple[keras.Variable, int] | None:
    """(the variable that takes a shift of a kernel's output, the sign): its bias, or the mean behind it; or None."""
    if bias is not None:
        return bias, 1
    return None if norm is None else (norm.moving_mean, -1)


def tail_of(program: Program, site: Site) -> Tail:
    """Follow the only user of a site's output through BatchNormalization and a sum up to a ReLU."""
    norm, summands = None, ()
    if len(site.steps) > 1 or len(program.steps[site.steps[0]].gives) > 1 or site.path:
        return Tail()
    operation = program.steps[site.steps[0]].operation
    own = getattr(operation, "activation", None) or getattr(operation, "layer", operation)
    name = getattr(own, "__name__", "linear")
    if name != "linear":
        return Tail(clip=_CLIPS.get(name, (-np.inf, np.inf)))
    for step, slot in _path(program, program.steps[site.steps[0]].gives[0]):
        operation, kind = step.operation, type(step.operation).__name__
        if isinstance(operation, keras.layers.BatchNormalization) and norm is None and not summands:
            if not _is_its_own(program, operation, site, step.node.input_tensors[0]):
                return Tail()
            norm = operation
        elif kind == "Add" and len(step.takes) > 1 and not summands and _alike(step.node.input_tensors):
            summands = tuple(s for _, s in step.takes if s != slot)
        elif kind not in _SILENT:
            return Tail(norm, summands, _clip(operation))
    return Tail(norm, summands)


def _path(program: Program, slot: int) -> Iterator[tuple]:
    """(step, slot it takes) along a line without branches."""
    while True:
        users = program.users(slot)
        if len(users) != 1 or users[0] == len(program.steps):
            return
        step = program.steps[users[0]]
        yield step, slot
        slot = step.gives[0]


def _is_its_own(program: Program, norm, site: Site, tensor) -> bool:
    """Whether a normalisation is called only here, and has one mean for each output of the kernel."""
    if sum(step.operation is norm for step in program.steps) > 1:
        return False
    shape = [1, *(2 if d is None else d for d in tensor.shape[1:])]
    blocks, _, outputs = site.shape
    axis = norm.axis % len(shape)
    if shape[axis] != blocks * outputs:
        return False
    places = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    first = site.view.outputs(np.broadcast_to(places, shape), np.zeros(1, int))
    return np.array_equal(first[:, 0], np.arange(blocks * outputs).reshape(blocks, outputs))


def _alike(tensors) -> bool:
    return len({tuple(t.shape) for t in tensors}) == 1


def _clip(operation) -> tuple[float, float]:
    free = (-np.inf, np.inf)
    kind = type(operation).__name__
    if kind == "ReLU" and isinstance(operation, keras.layers.Layer):
        plain = not operation.negative_slope and not operation.threshold
        return (0.0, np.inf if operation.max_value is None else float(operation.max_value)) if plain else free
    if kind == "Activation":
        return _CLIPS.get(getattr(operation.activation, "__name__", ""), free)
    return _CLIPS.get(kind.lower(), free)  # operations: Relu, Relu6
