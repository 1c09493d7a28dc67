"""The walk: which slices of which weights live and die together.

`Channels(model)` visits every call in the graph once, asks its rule for labels, and keeps them. Everything else
(rows to score, cost, zeroing, cutting) is a lookup in these labels.
"""

from __future__ import annotations

import math
from operator import attrgetter

import keras
import numpy as np

from keras_prune.groups import Group, Member, Tensor, Term, Weight
from keras_prune.internals import check_model, entering, graph_of, is_graph, nodes_of
from keras_prune.rules import FROZEN, Call, Fence, Ids, Labels, Ledger, find_rule


class Channels:
    """Labels on every axis of every weight of a model.

    Args:
        model: a built Functional or Sequential model, of any depth of nesting. It is not changed.
        assumed_length: what axes of the input without a fixed length (None) count as, for MACs and memory.

    Attributes:
        weights: labelled weights.
        groups: prunable groups, in the order of the network.
        fences: layers across which nothing is removed, each with the reason.
        uncounted: layers whose MACs nobody knows (no rule).
        has_unknown_lengths: whether some axis of an input besides the batch has no fixed length.
        assumed_length: what such an axis is counted as.

    Raises:
        TypeError: not a Keras model.
        ValueError: not built, or subclassed: there is no graph to walk.
    """

    def __init__(self, model: keras.Model, assumed_length: int = 224):
        check_model(model)
        self.model = model
        self.uncounted: list[str] = []
        self.assumed_length = assumed_length
        self.has_unknown_lengths = any(None in t.shape[1:] for t in graph_of(model).inputs)
        self._specs: dict[int, keras.KerasTensor] = {}  # id of a tensor -> the tensor with assumed lengths
        self._ledger = Ledger()
        self._raw_weights: dict[int, tuple] = {}
        self._raw_terms: list[tuple] = []
        self._raw_tensors: list[list] = []
        self._tensor_of: dict[int, list] = {}  # id of an ids array -> the tensor that carries it now
        self._config_edits: dict[int, dict] = {}  # id of an operation -> Labels.config
        self._argument_edits: dict[int, dict] = {}  # id of a node -> Labels.arguments
        self._raw_ids: dict[int, Ids] = {}  # id of a tensor -> its ids
        self._time = 0
        graph = graph_of(model)
        if self.has_unknown_lengths:
            self._assume(graph, [_with_length(t, assumed_length) for t in graph.inputs])
        inputs = [np.zeros((1,) * len(t.shape), int) for t in graph.inputs]
        outputs = self._walk(graph, inputs)
        for ids in outputs:
            self._ledger.tie(ids, FROZEN)
        self._settle_fences()
        self._resolve()

    # -- the walk ------------------------------------------------------------------------------------------------

    def _walk(self, graph, inputs: list[Ids]) -> list[Ids]:
        values = {id(t): ids for t, ids in zip(graph.inputs, inputs)}
        for tensor, ids in zip(graph.inputs, inputs):
            self._know(tensor, ids)
        for node in nodes_of(graph):
            operation = node.operation
            args, kwargs = node.arguments.fill_in(values)
            tensors = node.input_tensors
            ids = [values[id(t)] for t in tensors]
            if is_graph(operation):
                out = self._walk(graph_of(operation), [values[id(t)] for t in entering(node)])
            else:
                call = Call(operation, args, kwargs, tensors, ids, node.outputs, self._specs, self._ledger)
                out = self._visit(node, call)
            for tensor, o in zip(node.outputs, out):
                values[id(tensor)] = o
                self._know(tensor, o)
        return [values[id(t)] for t in graph.outputs]

    def _assume(self, graph, specs: list) -> list:
        """Work out all shapes for the assumed lengths of the inputs."""
        known = self._specs
        known.update((id(t), spec) for t, spec in zip(graph.inputs, specs))
        for node in nodes_of(graph):
            args, kwargs = node.arguments.fill_in(known)
            if is_graph(node.operation):
                out = self._assume(graph_of(node.operation), [known[id(t)] for t in entering(node)])
            else:
                out = keras.tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
            known.update((id(t), spec) for t, spec in zip(node.outputs, out))
        return [known[id(t)] for t in graph.outputs]

    def _know(self, tensor, ids) -> None:
        """Ids of a tensor; one that is reached twice (a nested model called twice) is tied with itself."""
        known = self._raw_ids.get(id(tensor))
        if known is not None and known.shape == ids.shape:
            self._ledger.tie(known, ids)
        elif known is not None:
            self._ledger.tie(known, FROZEN)
            self._ledger.tie(ids, FROZEN)
        else:
            self._raw_ids[id(tensor)] = ids

    def _visit(self, node, call: Call) -> list[Ids]:
        operation = call.operation
        rule = find_rule(operation)
        idle = not any(np.any(x) for x in call.inputs)
        changed = getattr(operation, "lora_enabled", False) or getattr(operation, "quantization_mode", None)
        if changed:
            labels = self._fenced(call, "holds LoRA or quantized weights")
        elif rule is None:
            labels = self._fenced(
                call,
                "a subclassed model has no graph to look into"
                if isinstance(operation, keras.Model)
                else "no rule for this type; add one with @keras_prune.rule",
            )
        elif idle and not _has_weights(operation) and type(operation).__module__.startswith("keras."):
            labels = Labels(call.frozen())
        else:
            labels = rule(operation, call, *call.inputs) or self._fenced(call, "its rule does not cover this case")
        out = labels.out if isinstance(labels.out, list) else [labels.out]
        for path, axes in labels.weights.items():
            self._label(call, path, axes, out, path in labels.reads)
        for edits, new in (
            (self._config_edits.setdefault(id(operation), {}), labels.config),
            (self._argument_edits.setdefault(id(node), {}), labels.arguments),
        ):
            for key, value in new.items():
                if isinstance(value, np.ndarray) and isinstance(edits.get(key), np.ndarray):
                    self._ledger.tie(edits[key], value)
                edits[key] = value
        self._count(labels, call, out)
        return out

    def _fenced(self, call: Call, reason: str) -> Labels:
        operation = call.operation
        for x in call.inputs:
            call.fence(x, reason)
        if _has_weights(operation):  # its own units cannot leave either: always worth a word
            fence = Fence(operation.name, type(operation).__name__, reason)
            self._ledger.fences.append((fence, np.zeros(0, int)))
            if operation.name not in self.uncounted:
                self.uncounted.append(operation.name)
        return Labels(call.frozen())

    def _label(self, call: Call, path: str, axes: tuple, out: list[Ids], reads_inside: bool) -> None:
        layer = call.operation
        variable = _weight_of(layer, path)
        if variable is None:  # a bias that is switched off
            return
        shape = tuple(variable.shape)
        if len(axes) != len(shape) or any(a is not None and len(a) != n for a, n in zip(axes, shape)):
            sizes = tuple("-" if a is None else len(a) for a in axes)
            raise ValueError(
                f"The rule for {type(layer).__name__} labels {layer.name}.{path} with ids of lengths {sizes}, but the "
                f"weight has shape {shape}. Mend the rule: one entry per axis, None or as many ids as the axis is long."
            )
        made, given = (
            np.unique(np.concatenate([np.zeros(0, int), *(i.ravel() for i in ids)])) for ids in (out, call.inputs)
        )
        makes = [a is not None and bool(np.isin(a[a > 0], made).any()) for a in axes]
        # Units between two weights of one layer (attention heads) are read by the weight that makes the output.
        reads = tuple(
            a is not None and not m and (reads_inside or any(makes) or bool(np.isin(a[a > 0], given).any()))
            for a, m in zip(axes, makes)
        )
        key = id(variable)
        if key in self._raw_weights:  # the second call of a shared layer
            for known, new in zip(self._raw_weights[key][3], axes):
                if known is not None:
                    self._ledger.tie(known, new)
        else:
            self._raw_weights[key] = (variable, layer, path, axes, reads)

    def _count(self, labels: Labels, call: Call, out: list[Ids]) -> None:
        self._time += 1
        for ids, tensor in zip(out, call.made):
            self._raw_tensors.append([ids, self._lengths(tensor), self._time, self._time])
        self._note_use(call)
        for tensor in self._raw_tensors[len(self._raw_tensors) - len(out) :]:
            self._tensor_of[id(tensor[0])] = tensor
        for path, axes in labels.weights.items():
            variable = _weight_of(call.operation, path)
            if "kernel" not in path or len(axes) < 2 or variable is None:
                continue
            positions = labels.positions
            if isinstance(positions, dict):
                positions = positions.get(path)
            if positions is None:
                positions = math.prod(self._lengths(call.made[0])) // max(1, out[0].size)
            self._raw_terms.append((axes, tuple(variable.shape), positions, variable))
        for ids, factor in labels.products:
            self._raw_terms.append((tuple(ids), tuple(len(i) for i in ids), factor, None))

    def _lengths(self, tensor) -> tuple[int, ...]:
        """The shape of a tensor without the batch, all lengths known or assumed."""
        shape = self._specs.get(id(tensor), tensor).shape
        return tuple(1 if d is None else d for d in shape[1:])

    def _note_use(self, call: Call) -> None:
        """Remember when each input was last needed: for the peak of activation memory."""
        for ids in call.inputs:
            if id(ids) in self._tensor_of:
                self._tensor_of[id(ids)][3] = self._time

    # -- after the walk ------------------------------------------------------------------------------------------

    def _settle_fences(self) -> None:
        """Report only fences that cost something: not a softmax over the model's own outputs, frozen anyway."""
        free = self._ledger.roots()
        self.fences: list[Fence] = list(
            dict.fromkeys(fence for fence, ids in self._ledger.fences if not ids.size or free[ids].any())
        )
        for _, ids in self._ledger.fences:
            self._ledger.tie(ids, FROZEN)

    def _resolve(self) -> None:
        root = self._ledger.roots()
        roots = np.unique(root)
        names = np.zeros(len(root), int)
        names[roots] = np.arange(len(roots))  # frozen (0) is the smallest and stays 0
        self._root = names[root]
        self.loud = np.zeros(len(roots), bool)
        self.loud[self._root[self._ledger.loud_ids()]] = True

        def settle(axes):
            return tuple(None if a is None or not self._root[a].any() else self._root[a] for a in axes)

        self.weights = [
            Weight(v, layer, path, settle(axes), reads) for v, layer, path, axes, reads in self._raw_weights.values()
        ]
        self.terms = [Term(settle(axes), sizes, factor, kernel) for axes, sizes, factor, kernel in self._raw_terms]
        self.tensors = [Tensor(self._root[ids], shape, made, used) for ids, shape, made, used in self._raw_tensors]
        self.unit_count = len(roots)
        self._find_groups()

    def _find_groups(self) -> None:
        """Units with the same multiset of (weight, axis) are one group; found by adding up random numbers."""
        rng = np.random.default_rng(0)
        signature = np.zeros(self.unit_count, np.uint64)
        appearances = []
        for weight in self.weights:
            for axis, ids in enumerate(weight.axes):
                if ids is None:
                    continue
                counts = np.bincount(ids, minlength=self.unit_count)
                signature += counts.astype(np.uint64) * rng.integers(1, 2**62, dtype=np.uint64)
                appearances.append((weight, axis, counts))
        for ids in self._ledger.pieces:
            signature[np.unique(self._root[ids])] += rng.integers(1, 2**62, dtype=np.uint64)
        signature[0] = 0
        order, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
        units_of = [[] for _ in order]
        for unit, place in enumerate(inverse):
            units_of[place].append(unit)
        drafts = sorted(
            (first[k], np.array(units)) for k, units in enumerate(units_of) if order[k] != 0 and len(units) > 1
        )
        members: list[list[Member]] = [[] for _ in drafts]
        group_of = np.full(self.unit_count, -1)
        for k, (_, units) in enumerate(drafts):
            group_of[units] = k
        for weight, axis, counts in appearances:
            for k in np.unique(group_of[counts > 0]):
                if k >= 0:
                    members[k].append(Member(weight, axis, int(counts[drafts[k][1][0]])))
        self.groups = [Group(k, units, tuple(m)) for k, ((_, units), m) in enumerate(zip(drafts, members))]

    # -- lookups -------------------------------------------------------------------------------------------------

    def resolve(self, ids: Ids) -> Ids:
        """The units that the ids of a rule stand for."""
        return self._root[ids]

    def ids_of(self, tensor) -> Ids:
        """Units of a tensor of the graph: an array of its rank whose dimensions are full or 1."""
        return self._root[self._raw_ids[id(tensor)]]

    def config_edits(self, operation) -> dict:
        """What its rule has to say about an operation's config: `Labels.config`."""
        return self._config_edits.get(id(operation), {})

    def argument_edits(self, node) -> dict:
        """What its rule has to say about the arguments of one call: `Labels.arguments`."""
        return self._argument_edits.get(id(node), {})

    def prunable(self) -> np.ndarray:
        """Shape (unit_count,), True for the units of all groups."""
        found = np.zeros(self.unit_count, bool)
        for group in self.groups:
            found[group.units] = True
        return found

    def alive(self, removed: Ids) -> np.ndarray:
        """Shape (unit_count,), True = stays.

        Raises:
            ValueError: `removed` holds something other than ids of this model's units.
        """
        ids = np.asarray(removed)
        whole = ids.size == 0 or (ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer))
        if not whole or (ids.size and not 0 < ids.min() <= ids.max() < self.unit_count):
            raise ValueError(
                f"removed={repr(removed)[:80]} was passed; expected unit ids, whole numbers from 1 to "
                f"{self.unit_count - 1} as in Channels.groups[k].units (0 is the frozen unit)."
            )
        alive = np.ones(self.unit_count, bool)
        alive[ids.astype(int)] = False
        return alive

    def rows(self, group: Group, values=None, members: list[Member] | None = None) -> np.ndarray:
        """All numbers that belong to each unit, shape (units, features), float32.

        Args:
            group: the group.
            values: `{id(variable): array}` to look into instead of the weights (a probe's shadow).
            members: which members; default: the group's producers.
        """
        return np.concatenate(self.blocks(group, values, members), axis=1)

    def blocks(self, group: Group, values=None, members=None) -> list[np.ndarray]:
        """The rows, one block (units, features) per member."""
        blocks = []
        for member in group.producers if members is None else members:
            variable, ids = member.weight.variable, member.weight.axes[member.axis]
            array = keras.ops.convert_to_numpy(variable) if values is None else values[id(variable)]
            array = np.asarray(array, np.float32)
            place = np.full(self.unit_count, -1)
            place[group.units] = np.arange(len(group))
            positions = np.flatnonzero(place[ids] >= 0)
            positions = positions[np.argsort(place[ids[positions]], kind="stable")]
            taken = np.moveaxis(array.take(positions, member.axis), member.axis, 0)
            blocks.append(taken.reshape(len(group), -1))
        return blocks or [np.zeros((len(group), 1), np.float32)]


def _with_length(tensor, length: int):
    shape = (tensor.shape[0], *(length if d is None else d for d in tensor.shape[1:]))
    return keras.KerasTensor(shape, dtype=tensor.dtype, sparse=tensor.sparse)


def _weight_of(layer, path: str):
    try:
        return attrgetter(path)(layer)
    except AttributeError:
        return None


def _has_weights(operation) -> bool:
    return bool(getattr(operation, "weights", None))
