"""Floor 1. The file again, or some operators of it, with fewer units."""

import copy

import numpy as np

from tflite_export import flatbuffer

Ids = np.ndarray


class Cutter:
    """Builds a file from some operators, all tensors at their new sizes."""

    def __init__(self, blueprint, alive: np.ndarray):
        self.blueprint, self.alive = blueprint, alive
        self.schema = flatbuffer.schema()
        self.tensors: list = []
        self.buffers = [self.schema.BufferT()]
        self.places: dict[int, int] = {}  # tensor of data -> its place in the new file

    def file(self, operators: list, is_whole: bool) -> bytes:
        old, schema = self.blueprint.model, self.schema
        graph = schema.SubGraphT(tensors=self.tensors, operators=[])
        if is_whole:
            for tensor in self.blueprint.graph.inputs:
                self._tensor_of_data(int(tensor), {})
        for operator in operators:
            self._add(operator, graph)
        made = {t for o in graph.operators for t in o.outputs}
        read = {t for o in graph.operators for t in o.inputs}
        if is_whole:
            graph.inputs = [self.places[int(t)] for t in self.blueprint.graph.inputs]
            graph.outputs = [self.places[int(t)] for t in self.blueprint.graph.outputs]
        else:
            constants = {k for k, t in enumerate(self.tensors) if t.buffer}
            graph.inputs = sorted(read - made - constants - {-1})
            graph.outputs = sorted(made - read)
        model = schema.ModelT(version=3, operatorCodes=old.operatorCodes, subgraphs=[graph], buffers=self.buffers)
        return flatbuffer.packed(model)

    def _count(self, ids: Ids) -> int:
        return int(self.alive[ids].sum())

    def _add(self, operator, graph) -> None:
        raw, blueprint = self.blueprint.graph.operators[operator.index], self.blueprint
        if operator.name in ("DEQUANTIZE", "DENSIFY") and blueprint.is_constant(operator.inputs[0]):
            return  # comes along with whoever reads it
        inputs = []
        for slot, tensor in enumerate(operator.inputs):
            if tensor < 0:
                inputs.append(-1)
            elif blueprint.is_constant(tensor):
                inputs.append(self._constant(operator, slot, tensor, graph))
            else:
                inputs.append(self._tensor_of_data(tensor, operator.axes[slot]))
        count = len(operator.inputs)
        outputs = [self._tensor_of_data(t, operator.axes[count + at]) for at, t in enumerate(operator.outputs)]
        graph.operators.append(self._like(raw, inputs, outputs))

    def _like(self, raw, inputs, outputs):
        options = raw.builtinOptions
        if isinstance(options, self.schema.ReshapeOptionsT):
            options = self.schema.ReshapeOptionsT(newShape=[int(n) for n in self.tensors[outputs[0]].shape])
        elif isinstance(options, self.schema.DepthwiseConv2DOptionsT):
            options = copy.copy(options)
            options.depthMultiplier = self.tensors[outputs[0]].shape[-1] // self.tensors[inputs[0]].shape[-1]
        return self.schema.OperatorT(
            opcodeIndex=raw.opcodeIndex,
            inputs=inputs,
            outputs=outputs,
            builtinOptionsType=raw.builtinOptionsType,
            builtinOptions=options,
            customOptions=raw.customOptions,
            builtinOptions2Type=raw.builtinOptions2Type,
            builtinOptions2=raw.builtinOptions2,
        )

    def _tensor_of_data(self, tensor: int, axes: dict[int, Ids]) -> int:
        if tensor not in self.places:
            self.places[tensor] = self._tensor(tensor, axes, 0)
        return self.places[tensor]

    def _tensor(self, tensor: int, axes: dict[int, Ids], buffer: int) -> int:
        old = self.blueprint.graph.tensors[tensor]
        shape = list(self.blueprint.shape(tensor))
        for axis, ids in axes.items():
            shape[axis] = self._count(ids)
        quantization = old.quantization
        if len(flatbuffer.scales(old)) > 1:
            ids = axes.get(quantization.quantizedDimension)
            if ids is not None:
                keep = self.alive[ids]
                quantization = self.schema.QuantizationParametersT(
                    scale=np.asarray(quantization.scale)[keep],
                    zeroPoint=np.asarray(quantization.zeroPoint)[keep],
                    quantizedDimension=quantization.quantizedDimension,
                )
        self.tensors.append(
            self.schema.TensorT(
                shape=shape, type=old.type, buffer=buffer, name=old.name, quantization=quantization, hasRank=True
            )
        )
        return len(self.tensors) - 1

    def _constant(self, operator, slot: int, tensor: int, graph) -> int:
        """A copy for this operator alone: two that share a constant may be cut differently."""
        axes, blueprint = operator.axes[slot], self.blueprint
        stored = blueprint.stored(tensor)
        place = self._tensor(stored, axes, self._buffer(operator, slot, stored, axes))
        if stored == tensor:
            return place
        maker = blueprint.operators[blueprint.makers[tensor]]
        unpacked = self._tensor(tensor, axes, 0)
        graph.operators.append(self._like(blueprint.graph.operators[maker.index], [place], [unpacked]))
        return unpacked

    def _buffer(self, operator, slot: int, tensor: int, axes: dict[int, Ids]) -> int:
        data = bytes(self.blueprint.data(tensor))
        dtype = flatbuffer.NUMPY_TYPES.get(self.blueprint.graph.tensors[tensor].type)
        values = self._sizes(operator, slot)
        if values is not None:
            data = values.astype(dtype).tobytes()
        elif axes and dtype is not None:
            array = np.frombuffer(data, dtype).reshape(self.blueprint.shape(tensor))
            for axis, ids in axes.items():
                array = array.compress(self.alive[ids], axis)
            data = array.tobytes()
        self.buffers.append(self.schema.BufferT(data=np.frombuffer(data, np.uint8)))
        return len(self.buffers) - 1

    def _sizes(self, operator, slot: int) -> np.ndarray | None:
        """New numbers for a constant that says sizes; None for one that is computed with, or says none of the width."""
        blueprint, name = self.blueprint, operator.name
        if operator.is_fixed or not self.blueprint.is_size(operator, slot):
            return None
        if name == "SPLIT_V" and slot == 1:
            return self._sizes_of_parts(operator)
        out_axes = operator.axes[len(operator.inputs)]
        shape = list(blueprint.shape(operator.outputs[0]))
        old = shape[-1] if shape else None
        for axis, ids in out_axes.items():
            shape[axis] = self._count(ids)
        if not out_axes:
            return None
        if name in ("RESHAPE", "TRANSPOSE_CONV"):
            return np.array(shape)
        values = blueprint.numbers(operator.inputs[slot])
        if name in ("PAD", "PADV2") and slot == 1 and values[-1].any():
            before, after = values[-1].astype(int)
            ids = out_axes[len(shape) - 1]
            values[-1] = self._count(ids[:before]), self._count(ids[len(ids) - after :])
            return values
        if (name, slot) in (("STRIDED_SLICE", 2), ("SLICE", 2)):
            if len(values) == len(blueprint.shape(operator.inputs[0])) and values[-1] == old:
                values[-1] = shape[-1]
                return values
        return None

    def _sizes_of_parts(self, operator) -> np.ndarray | None:
        tensors, count = self.blueprint.shape, len(operator.inputs)
        widths = [tensors(t)[-1] for t in operator.outputs]
        if widths == [tensors(operator.inputs[0])[-1]] * len(widths):  # along another axis
            return None
        last = len(tensors(operator.outputs[0])) - 1
        axes = [operator.axes[count + at].get(last) for at in range(len(widths))]
        return np.array([n if ids is None else self._count(ids) for n, ids in zip(widths, axes)])
