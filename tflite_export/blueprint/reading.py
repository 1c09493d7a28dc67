"""Floor 1. The operators of a .tflite file, and which units of the network each axis of their tensors carries."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tflite_export import flatbuffer
from tflite_export.blueprint.cutting import Cutter
from tflite_export.blueprint.matching import Weights, fits

Ids = np.ndarray

KERNELS = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1, "CONV_3D": 1, "GATHER": 0}
"""Operators that hold weights -> place of the kernel among their inputs."""
SAME_WIDTH = frozenset(
    "ABS ADD AVERAGE_POOL_2D CAST DEQUANTIZE DIV ELU EQUAL EXP EXPAND_DIMS FAKE_QUANT FLOOR GELU GREATER GREATER_EQUAL "
    "HARD_SWISH LEAKY_RELU LESS LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC MAXIMUM MAX_POOL_2D MEAN "
    "MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL PAD PADV2 POW PRELU QUANTIZE RELU RELU6 RELU_N1_TO_1 RESIZE_BILINEAR "
    "RESIZE_NEAREST_NEIGHBOR RSQRT SELECT SELECT_V2 SIN COS SLICE SOFTMAX SQRT SQUARE SQUARED_DIFFERENCE SQUEEZE "
    "STRIDED_SLICE SUB SUM TANH TILE TRANSPOSE REDUCE_MAX REDUCE_MIN".split()
)
"""Operators whose output carries on its last axis what their inputs carry there, if the axis keeps its length."""
REDUCES = frozenset("MEAN SUM REDUCE_MAX REDUCE_MIN".split())
SAYS_SIZES = frozenset(
    "EXPAND_DIMS GATHER MEAN MIRROR_PAD PAD PADV2 REDUCE_MAX REDUCE_MIN RESHAPE RESIZE_BILINEAR "
    "RESIZE_NEAREST_NEIGHBOR SLICE SPLIT_V STRIDED_SLICE SUM TILE TRANSPOSE".split()
)
"""Operators whose constants say sizes, axes or positions rather than being computed with."""
SCALE_BYTES = 12
"""Of each channel that has a scale of its own: four for it, eight for its zero point."""


@dataclass
class Operator:
    """One operator of the file.

    Attributes:
        index, name: its place in the file, and its type.
        inputs, outputs: tensors of the file; -1 is an input that was left out.
        axes: per tensor (inputs, then outputs) axis -> ids of the units on it.
        is_fixed: its sizes do not follow the widths, as far as is known here, although they ought to.
    """

    index: int
    name: str
    inputs: list[int]
    outputs: list[int]
    axes: list[dict[int, Ids]]
    is_fixed: bool = False
    reads: Ids = field(default_factory=lambda: np.zeros(0, int))  # units that come in
    makes: Ids = field(default_factory=lambda: np.zeros(0, int))  # units that go out


@dataclass(frozen=True)
class Part:
    """Bytes that follow the widths.

    Attributes:
        size: bytes with all units.
        axes: ids on those of its axes that can shrink.
        made, last_used: of a tensor of data: operators.
    """

    size: int
    axes: tuple[Ids, ...]
    made: int = 0
    last_used: int = 0

    def bytes(self, alive: np.ndarray) -> int:
        return round(self.size * math.prod(float(np.mean(alive[ids])) for ids in self.axes))


class Blueprint:
    """The operators of a .tflite file, and the file again at other widths.

    Args:
        content: the file, of one graph without control flow.
        channels: labels of the Keras model that it was made from: anything with `weights`, each with a `variable`
            and the ids on its `axes` (None or one per slice; 0 never leaves).

    Attributes:
        operators: in the order in which they run.
        unknown: kernels of the file that are no weight of the model, by name of their output.
        folded: operators with a bias that is none of the model's, by name of their output. The converter adds constants
            of layers around a fully connected one into its bias; of units that come in, too. With other widths such a
            file has the right sizes, but may compute other numbers than the converted model of those widths.

    Raises:
        ValueError: the file has control flow.
    """

    def __init__(self, content: bytes, channels):
        self.model = flatbuffer.unpacked(content)
        if len(self.model.subgraphs) != 1:
            raise ValueError(
                "The file has control flow (a loop or a branch), whose latency depends on the data: build recurrent "
                "layers with unroll=True."
            )
        self.graph = self.model.subgraphs[0]
        self.unknown: list[str] = []
        self.folded: list[str] = []
        self._carried: dict[int, Ids] = {}  # tensor -> ids on its last axis, as soon as they are known
        self._carried = {int(tensor): self._carries(int(tensor)) for tensor in self.graph.inputs}
        self._matched: dict[int, tuple[Ids, Ids]] = {}  # operator -> what its kernel makes and reads
        names = flatbuffer.operator_names(self.model.operatorCodes)
        self.makers: dict[int, int] = {}
        self.operators: list[Operator] = []
        weights = Weights(channels)
        for index, raw in enumerate(self.graph.operators):
            inputs, outputs = ([int(t) for t in tensors] for tensors in (raw.inputs, raw.outputs))
            operator = Operator(index, names[raw.opcodeIndex], inputs, outputs, [{} for _ in inputs + outputs])
            self.operators.append(operator)
            self.makers.update((tensor, index) for tensor in outputs)
            self._label(operator, weights)
        for operator in reversed(self.operators):
            self._label_back(operator)
        for operator in self.operators:
            self._settle(operator)

    # -- the walk ------------------------------------------------------------------------------------------------

    def shape(self, tensor: int) -> tuple[int, ...]:
        found = self.graph.tensors[tensor].shape
        return () if found is None else tuple(int(n) for n in found)

    def is_constant(self, tensor: int) -> bool:
        """Whether its numbers are in the file, or unpacked from numbers that are."""
        if tensor < 0:
            return True
        if self.data(tensor) is not None:
            return True
        maker = self.makers.get(tensor)
        if maker is None or self.operators[maker].name not in ("DEQUANTIZE", "DENSIFY"):
            return False
        return self.is_constant(self.operators[maker].inputs[0])

    def data(self, tensor: int):
        buffer = self.model.buffers[self.graph.tensors[tensor].buffer]
        return buffer.data if buffer.data is not None and len(buffer.data) else None

    def stored(self, tensor: int) -> int:
        """The tensor in the file that a constant is unpacked from."""
        while self.data(tensor) is None:
            tensor = self.operators[self.makers[tensor]].inputs[0]
        return tensor

    def numbers(self, tensor: int) -> np.ndarray | None:
        """A constant's real numbers; None for types that this reader does not unpack."""
        tensor = self.stored(tensor)
        dtype = flatbuffer.NUMPY_TYPES.get(self.graph.tensors[tensor].type)
        shape = self.shape(tensor)
        data = np.frombuffer(bytes(self.data(tensor)), dtype or np.uint8)
        if dtype is None or data.size != math.prod(shape):  # packed or sparse
            return None
        values = data.reshape(shape).astype(np.float32)
        scales, quantization = flatbuffer.scales(self.graph.tensors[tensor]), self.graph.tensors[tensor].quantization
        if len(scales):
            axes = [1] * len(shape)
            if len(scales) > 1:
                axes[quantization.quantizedDimension] = -1
            values = (values - np.reshape(quantization.zeroPoint, axes)) * np.reshape(scales, axes)
        return values

    def _carries(self, tensor: int) -> Ids:
        shape = self.shape(tensor)
        known = self._carried.get(tensor)
        return np.zeros(shape[-1] if shape else 1, int) if known is None else known

    def _label(self, operator: Operator, weights: "Weights") -> None:
        """What its outputs carry on their last axis."""
        name, inputs = operator.name, operator.inputs
        data = [t for t in inputs if not self.is_constant(t)]
        shape = self.shape(operator.outputs[0])
        if name in KERNELS and self.is_constant(inputs[KERNELS[name]]):
            found = self._label_kernel(operator, weights)
        elif name == "CONCATENATION":
            found = self._joined(operator, len(shape))
        elif name == "RESHAPE" and data and data[0] in self._carried:
            found = _reshaped(self._carries(data[0]), self.shape(data[0]), shape)
        elif name in ("PAD", "PADV2") and data and shape[-1] != self.shape(data[0])[-1]:
            before, after = self.numbers(inputs[1])[-1].astype(int)
            found = np.concatenate([np.zeros(before, int), self._carries(data[0]), np.zeros(after, int)])
        elif name in ("SPLIT", "SPLIT_V") and data and data[0] in self._carried:
            return self._label_parts(operator, data[0])
        elif name in SAME_WIDTH and not self._drops_last(operator):
            found = None
            for tensor in data:  # a summand's padded channels are those of the other summand
                if tensor in self._carried and self.shape(tensor)[-1:] == shape[-1:]:
                    ids = self._carries(tensor)
                    found = ids if found is None else np.where(found == 0, ids, found)
        elif name in REDUCES:
            found = np.zeros(shape[-1] if shape else 1, int)
        else:
            found = None
        operator.is_fixed = found is None and any(self._carries(t).any() for t in data)
        if found is not None:
            self._carried[operator.outputs[0]] = found

    def _label_kernel(self, operator: Operator, weights: "Weights") -> Ids | None:
        place = KERNELS[operator.name]
        kernel = operator.inputs[place]
        numbers = self.numbers(kernel)
        came = [self._carried.get(t) for t in operator.inputs if not self.is_constant(t)]
        match = None if numbers is None else weights.find(numbers, operator.name, came[0] if came else None)
        if match is None:
            self.unknown.append(self.graph.tensors[operator.outputs[0]].name.decode())
            return None
        made, read = self._matched[operator.index] = match
        bias = operator.inputs[2] if operator.name == "FULLY_CONNECTED" and len(operator.inputs) > 2 else -1
        if bias >= 0 and read.any() and not (self.is_constant(bias) and weights.has_bias(self.numbers(bias).ravel())):
            self.folded.append(self.graph.tensors[operator.outputs[0]].name.decode())
        axes = operator.axes[place]
        if operator.name in ("DEPTHWISE_CONV_2D", "GATHER"):
            axes[len(self.shape(kernel)) - 1] = made
        elif operator.name == "CONV_3D":
            axes[3], axes[4] = read, made
        else:
            axes[0], axes[len(self.shape(kernel)) - 1] = made, read
        return made

    def _label_parts(self, operator: Operator, source: int) -> None:
        ids, start = self._carries(source), 0
        sizes = [self.shape(t)[-1] for t in operator.outputs]
        if sum(sizes) != len(ids):  # along another axis
            sizes = None
        for at, tensor in enumerate(operator.outputs):
            self._carried[tensor] = ids if sizes is None else ids[start : start + sizes[at]]
            start += sizes[at] if sizes else 0

    def _joined(self, operator: Operator, rank: int) -> Ids:
        axis = self.graph.operators[operator.index].builtinOptions.axis
        if axis % rank != rank - 1:
            return self._carries(operator.inputs[0])
        return np.concatenate([self._carries(t) for t in operator.inputs])

    def _drops_last(self, operator: Operator) -> bool:
        """Whether its last axis is another one than that of its input, even where both are as long."""
        rank = len(self.shape(operator.inputs[0]))
        if operator.name in (*REDUCES, "TRANSPOSE", "STRIDED_SLICE") and not all(
            map(self.is_constant, operator.inputs[1:])
        ):
            return True
        if operator.name in REDUCES:
            return rank - 1 in self.numbers(operator.inputs[1]).ravel() % max(rank, 1)
        if operator.name == "TRANSPOSE":
            return self.numbers(operator.inputs[1])[-1] != rank - 1
        if operator.name == "STRIDED_SLICE":
            options = self.graph.operators[operator.index].builtinOptions
            is_moved = options.shrinkAxisMask >> (rank - 1) or options.ellipsisMask or options.newAxisMask
            return bool(is_moved) or self.numbers(operator.inputs[3])[-1] != 1
        return False

    def _label_back(self, operator: Operator) -> None:
        """Padded channels are those that they are added to, or that a kernel reads there."""
        made = self._carries(operator.outputs[0])
        if operator.index in self._matched and operator.name not in ("DEPTHWISE_CONV_2D", "GATHER"):
            made = self._matched[operator.index][1]
        elif operator.name not in SAME_WIDTH or self._drops_last(operator):
            return
        for tensor in operator.inputs:
            if not self.is_constant(tensor) and self.shape(tensor)[-1:] == (len(made),) and made.any():
                known = self._carries(tensor)
                if tensor not in self._carried or known.any():
                    self._carried[tensor] = np.where(known == 0, made, known)

    def _agrees(self, operator: Operator) -> bool:
        """Whether what its tensors carry, each known on its own, fits what it computes."""
        name, made = operator.name, self._carries(operator.outputs[0])
        data = [t for t in operator.inputs if not self.is_constant(t)]
        came = [self._carries(t) for t in data]
        if any(self._carries(t).any() for t in operator.outputs if t in self.graph.outputs):
            return False
        if not made.any() and not any(ids.any() for ids in came) and operator.index not in self._matched:
            return True
        if operator.index in self._matched:
            return name == "GATHER" or fits(name, came[0], *self._matched[operator.index])
        if name == "CONCATENATION":
            return all(len(ids) != len(made) or (ids == made).all() for ids in came) and (
                len(self._joined(operator, len(self.shape(operator.outputs[0])))) == len(made)
            )
        if name == "RESHAPE":
            return np.array_equal(_reshaped(came[0], self.shape(data[0]), self.shape(operator.outputs[0])), made)
        if name in ("PAD", "PADV2"):
            before = int(self.numbers(operator.inputs[1])[-1][0])
            return np.array_equal(made[before : before + len(came[0])], came[0])
        if name in ("SPLIT", "SPLIT_V"):
            parts = [self._carries(t) for t in operator.outputs]
            if all(np.array_equal(ids, came[0]) for ids in parts):
                return True
            is_even = all(np.array_equal(np.sort(ids), np.sort(made)) for ids in parts)
            return (is_even or name == "SPLIT_V") and np.array_equal(np.concatenate(parts), came[0])
        if name in REDUCES and self._drops_last(operator):
            return not made.any()
        if name not in SAME_WIDTH or self._drops_last(operator):
            return False
        return all(np.array_equal(ids, made) if len(ids) == len(made) else len(ids) == 1 for ids in came)

    def _settle(self, operator: Operator) -> None:
        """Ids on every axis of every tensor of an operator, once those of the data are known."""
        operator.is_fixed = operator.is_fixed or not self._agrees(operator)
        if operator.is_fixed:
            operator.axes = [{} for _ in operator.axes]
            return
        made = self._carries(operator.outputs[0])
        for slot, tensor in enumerate(operator.inputs + operator.outputs):
            shape = self.shape(tensor) if tensor >= 0 else ()
            if not shape or operator.axes[slot]:
                continue
            if not self.is_constant(tensor):
                ids = self._carries(tensor)
            elif shape[-1] == len(made) and not self.is_size(operator, slot):
                ids = made  # a bias, or what every channel is added to or multiplied by
            else:
                continue
            if ids.any():
                operator.axes[slot][len(shape) - 1] = ids
        came = [ids for slot, axes in enumerate(operator.axes[: len(operator.inputs)]) for ids in axes.values()]
        operator.makes = np.unique(np.concatenate([self._carries(t) for t in operator.outputs]))
        operator.makes = operator.makes[operator.makes > 0]
        read = np.unique(np.concatenate([*came, np.zeros(0, int)]))
        operator.reads = np.setdiff1d(read[read > 0], operator.makes)

    def is_size(self, operator: Operator, slot: int) -> bool:
        """Whether a constant says sizes, axes or positions rather than being computed with."""
        if operator.name == "TRANSPOSE_CONV":
            return slot == 0
        return slot > 0 and operator.name in SAYS_SIZES

    # -- what it costs at other widths ------------------------------------------------------------------------------

    def constants(self) -> Iterator["Part"]:
        """What is stored for every operator: each constant once, with the axes of the first that reads it."""
        seen: set[int] = set()
        for operator in self.operators:
            if all(self.is_constant(t) for t in operator.outputs):
                continue  # it unpacks a constant for whoever reads it
            for slot, tensor in enumerate(operator.inputs):
                if tensor >= 0 and self.is_constant(tensor) and self.stored(tensor) not in seen:
                    seen.add(stored := self.stored(tensor))
                    axes = [ids for ids in operator.axes[slot].values() if len(ids)]
                    yield Part(len(self.data(stored)), tuple(axes))
                    scales = flatbuffer.scales(self.graph.tensors[stored])
                    if len(scales) > 1:
                        ids = self._scaled(operator, slot, stored)
                        yield Part(SCALE_BYTES * len(scales), (ids,) if len(ids) else ())

    def activations(self) -> Iterator["Part"]:
        """Tensors that hold data while the file runs, with the first and last operator that needs them."""
        last = {int(t): len(self.operators) for t in self.graph.outputs}
        made = {int(t): 0 for t in self.graph.inputs}
        axes: dict[int, dict[int, Ids]] = {}
        for operator in self.operators:
            for slot, tensor in enumerate(operator.inputs + operator.outputs):
                if tensor < 0 or self.is_constant(tensor):
                    continue
                made.setdefault(tensor, operator.index)
                last[tensor] = max(last.get(tensor, 0), operator.index)
                axes.setdefault(tensor, operator.axes[slot])
        for tensor, first in made.items():
            dtype = flatbuffer.NUMPY_TYPES.get(self.graph.tensors[tensor].type, np.uint8)
            size = math.prod(self.shape(tensor)) * np.dtype(dtype).itemsize
            ids = tuple(ids for ids in axes.get(tensor, {}).values() if len(ids))
            yield Part(size, ids, first, last.get(tensor, first))

    def scales(self) -> Iterator[Ids]:
        """Ids of the channels of every convolution that has a scale for each."""
        for operator in self.operators:
            place = KERNELS.get(operator.name)
            if place is None or "CONV" not in operator.name:
                continue
            kernel = operator.inputs[place]
            if len(flatbuffer.scales(self.graph.tensors[kernel])) > 1:
                yield self._scaled(operator, place, kernel)

    def _scaled(self, operator: Operator, slot: int, tensor: int) -> Ids:
        """Ids on the axis of a constant along which each channel has a scale of its own."""
        return operator.axes[slot].get(self.graph.tensors[tensor].quantization.quantizedDimension, np.zeros(0, int))

    # -- the file at other widths ----------------------------------------------------------------------------------

    @property
    def fixed(self) -> list[Operator]:
        """Operators whose sizes ought to follow the widths, but are not known to."""
        return [operator for operator in self.operators if operator.is_fixed]

    def cut(self, alive: np.ndarray, only: Sequence[int] | None = None) -> bytes:
        """The file, or some operators of it, with the units that are alive: for timing, without a signature.

        Args:
            alive: shape (unit_count,), True = stays.
            only: indices of operators; what they read becomes the input of the file.

        Raises:
            ValueError: an operator is in the way whose sizes are not known to follow the widths.
        """
        chosen = [self.operators[k] for k in (range(len(self.operators)) if only is None else only)]
        stuck = [o.name for o in chosen if o.is_fixed and only is None]
        if stuck:
            raise ValueError(f"The sizes of {', '.join(sorted(set(stuck)))} are not known at other widths.")
        return Cutter(self, np.asarray(alive, bool)).file(chosen, only is None)


def _reshaped(ids: Ids, before: tuple, after: tuple) -> Ids | None:
    """What a reshape leaves on the last axis: the same, or all positions of each channel one after the other."""
    if not after or not before:
        return None
    if before[-1] == after[-1]:
        return ids
    if after[-1] % before[-1] == 0:
        return np.tile(ids, after[-1] // before[-1])
    return None if ids.any() else np.zeros(after[-1], int)
