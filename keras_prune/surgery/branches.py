"""Branches that carry nothing any more: constant summands, and parts of a concatenation that nobody reads.

A branch of a residual block whose convolution is zero adds the same numbers to every input: it is taken out, and the
numbers are added by a Rescaling layer, or by nothing where they are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.internals import graph_of, is_graph, mask_of, nodes_of
from keras_prune.rules import Ids
from keras_prune.surgery.constants import ROUNDING, Constants, values_of
from keras_prune.surgery.rebuilding import Rebuild


def drop_constant_branches(constants: Constants, batch) -> tuple[keras.Model, list[str]]:
    """A model with the same outputs whose sums no longer compute what is the same for every input.

    Args:
        constants: those of a model.
        batch: two different samples, in the structure of the model's inputs.

    Returns:
        (model, notes); the model itself where there is no such branch.
    """
    model, program = constants.channels.model, constants.program
    sums = [
        step
        for step in program.steps
        if _is_sum(step.operation) and len({constants.whole[s] for _, s in step.takes}) == 2
    ]
    if not sums:
        return model, []
    values = values_of(program, batch, {slot for step in sums for _, slot in step.takes})
    dropped, notes = {}, []
    for step in sums:
        name = step.operation.name
        if sum(other.node is step.node for other in program.steps) > 1:
            notes.append(f"{name}: a constant branch stays, its model is called several times")
            continue
        kept = [tensor for tensor, slot in step.takes if not constants.whole[slot]]
        if _changes_mask(step.node, kept):
            notes.append(f"{name}: a branch that is the same for every input stays, as it has a say in the mask")
            continue
        shapes = {values[slot].shape[1:] for _, slot in step.takes if not constants.whole[slot]}
        offset = sum(values[slot] for _, slot in step.takes if constants.whole[slot])
        steady = _per_channel(offset)
        full = tuple(np.broadcast_shapes(*(values[slot].shape[1:] for _, slot in step.takes)))
        if steady is None or shapes != {full}:
            notes.append(f"{name}: a branch that is the same for every input stays, as it differs between positions")
            continue
        dropped[id(step.node)] = _Sum(tuple(kept), steady)
    if not dropped:
        return model, notes
    return _WithoutBranches(model, dropped).model(), [
        f"{len(dropped)} branches that were the same for every input taken out of their sums",
        *notes,
    ]


@dataclass(frozen=True)
class _Sum:
    """What is left of a sum: ids of the tensors, and what is added to them, per channel or one number."""

    kept: tuple[int, ...]
    offset: np.ndarray


def _is_sum(operation) -> bool:
    return type(operation).__name__ == "Add" and type(operation).__module__.startswith("keras.src.")


def _changes_mask(node, kept: list[int]) -> bool:
    """Whether a sum of some of the tensors goes along with another mask than the sum of all."""
    masks = [mask_of(t) for t in node.input_tensors if id(t) in kept]
    if mask_of(node.outputs[0]) is None:
        return any(mask is not None for mask in masks)
    return {id(mask_of(t)) for t in node.input_tensors} != set(map(id, masks))


def _per_channel(offset: np.ndarray) -> np.ndarray | None:
    """One number, or one per channel on the last axis, of a tensor that is the same for both samples; else None."""
    scale = max(np.abs(offset).max(initial=0), 1e-30)
    if np.ptp(offset, axis=0).max(initial=0) > ROUNDING * scale:
        return None
    if not offset.any():
        return np.zeros(())
    lines = offset.reshape(-1, offset.shape[-1])
    return lines[0] if np.ptp(lines, axis=0).max() <= ROUNDING * scale else None


class _WithoutBranches(Rebuild):
    def __init__(self, model, dropped: dict[int, _Sum]):
        super().__init__(model)
        self._dropped = dropped
        self._shown = {id(tensor) for tensor in graph_of(model).outputs}

    def changes(self, layer):
        return is_graph(layer) and any(id(node) in self._dropped for node in nodes_of(graph_of(layer)))

    def takes(self, node):
        kept = self._dropped.get(id(node))
        return [t for t in node.input_tensors if kept is None or id(t) in kept.kept]

    def called(self, node, args, kwargs):
        what = self._dropped.get(id(node))
        if what is None:
            return super().called(node, args, kwargs)
        old = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
        new = keras.tree.flatten((tuple(args), kwargs))
        tensors = [after for before, after in zip(old, new) if id(before) in what.kept]
        name, made = node.operation.name, node.outputs[0]
        policy = getattr(node.operation, "dtype_policy", None) or made.dtype
        # An output of the model keeps its name, which losses and metrics are given by.
        last, shown = bool(what.offset.any()), id(made) in self._shown
        x = tensors[0]
        if len(tensors) > 1:
            own = self.unused(f"{name}_sum") if last or not shown else name
            x = keras.layers.Add(dtype=policy, name=own)(tensors)
        own = name if shown else self.unused(f"{name}_offset")
        if last:
            return keras.layers.Rescaling(1.0, what.offset.tolist(), dtype=policy, name=own)(x)
        if x.dtype != made.dtype or (shown and len(tensors) == 1):
            return keras.layers.Identity(dtype=made.dtype, name=own)(x)
        return x


def can_vanish(channels: Channels, gone: Ids) -> bool:
    """Whether the network can do without all of these units, some of which are whole groups.

    That is so where the tensors that carry nothing else end in concatenations with something left.
    """
    units = np.zeros(channels.unit_count, bool)
    units[gone] = True
    carried = np.zeros(channels.unit_count, bool)
    for tensor in channels.tensors:
        carried[tensor.ids.ravel()] = True
    # What lives inside a layer, the heads of attention, is no branch that could be left out.
    if any(units[group.units].all() and not carried[group.units].any() for group in channels.groups):
        return False
    return _graph_can_do_without(channels, graph_of(channels.model), units)


def is_absent(channels: Channels, tensor, gone: np.ndarray) -> bool:
    """Whether a tensor carries only units that are gone, shape (unit_count,) booleans."""
    return bool(gone[channels.ids_of(tensor)].all())


def _graph_can_do_without(channels, graph, gone) -> bool:
    for node in nodes_of(graph):
        missing = [is_absent(channels, t, gone) for t in node.input_tensors]
        made = [is_absent(channels, t, gone) for t in node.outputs]
        if is_graph(node.operation):
            if any(missing) or any(made) or not _graph_can_do_without(channels, graph_of(node.operation), gone):
                return False
        elif any(missing) and not all(missing) and type(node.operation) is not keras.layers.Concatenate:
            return False
        elif missing and all(missing) and not all(made):
            return False
        elif any(made) and not all(made):
            return False
    return True
