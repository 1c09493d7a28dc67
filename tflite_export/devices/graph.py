"""Floor 3. The operators of a .tflite file with their tensors, for the rules of devices."""

from dataclasses import dataclass

import numpy as np

from tflite_export import flatbuffer


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: as the file calls it.
        shape: with the batch axis, as stored.
        open: whether the file leaves a size open.
        dtype: "INT8", "FLOAT32", ... as in the file's schema.
        quantised: whether it has a scale.
        zero_point: the stored number that means 0 (that of the first channel); 0 for floats.
        values: of a constant, where the dtype is known; None for an activation.
        constant: whether its numbers are in the file.
    """

    name: str
    shape: tuple[int, ...]
    open: bool
    dtype: str
    quantised: bool
    zero_point: int
    values: np.ndarray | None
    constant: bool


@dataclass(frozen=True)
class Step:
    """One operator of a file.

    Attributes:
        operator: its name, such as "CONV_2D"; a custom one is "CUSTOM:name".
        inputs, outputs: tensors; optional inputs that are left out are missing.
        options: the operator's table in the schema, or None.
        subgraph: number of the subgraph it is in.
    """

    operator: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    options: object
    subgraph: int

    def option(self, name: str, default=0):
        """An entry of the operator's options, under its name in the schema's Python classes."""
        return getattr(self.options, name, default)


def steps(content: bytes) -> list[Step]:
    """All operators of a verified file in the order in which they run."""
    model = flatbuffer.unpacked(content)
    names = flatbuffer.operator_names(model.operatorCodes)
    found = []
    for number, graph in enumerate(model.subgraphs):
        tensors = [_tensor(tensor, model.buffers[tensor.buffer]) for tensor in graph.tensors]
        for operator in graph.operators if graph.operators is not None else ():
            sides = [
                tuple(tensors[index] for index in (side if side is not None else ()) if index >= 0)
                for side in (operator.inputs, operator.outputs)
            ]
            found.append(Step(names[operator.opcodeIndex], *sides, operator.builtinOptions, number))
    return found


def external_buffers(content: bytes) -> int:
    """How many buffers lie behind the flatbuffer proper, where some readers do not look."""
    model = flatbuffer.root(content)
    return sum(model.Buffers(at).Offset() > 1 for at in range(model.BuffersLength()))


def _tensor(tensor, buffer) -> Tensor:
    kinds = {code: name for name, code in vars(flatbuffer.schema().TensorType).items() if isinstance(code, int)}
    shape = () if tensor.shape is None else tuple(int(size) for size in tensor.shape)
    signature = () if tensor.shapeSignature is None else tensor.shapeSignature
    scales = getattr(tensor.quantization, "scale", None)
    zeros = getattr(tensor.quantization, "zeroPoint", None)
    stored, values = buffer.data is not None and len(buffer.data) > 0, None
    if stored and tensor.type in flatbuffer.NUMPY_TYPES:
        flat = np.frombuffer(np.asarray(buffer.data, "uint8").tobytes(), flatbuffer.NUMPY_TYPES[tensor.type])
        values = flat.reshape(shape) if flat.size == np.prod(shape, dtype=int) else None
    return Tensor(
        name=(tensor.name or b"").decode(errors="replace"),
        shape=shape,
        open=any(size < 0 for size in signature),
        dtype=kinds.get(tensor.type, f"UNKNOWN:{tensor.type}"),
        quantised=scales is not None and len(scales) > 0,
        zero_point=int(zeros[0]) if zeros is not None and len(zeros) else 0,
        values=values,
        constant=stored or buffer.offset > 1,
    )
