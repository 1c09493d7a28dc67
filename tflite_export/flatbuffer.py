"""Floor 0. Reads a .tflite flatbuffer and gives it a signature, without copying or moving its weights."""

import hashlib
import struct
from collections import Counter
from types import ModuleType

import numpy as np

IDENTIFIER = b"TFL3"
_SIGNATURES = 7  # field number of `signature_defs` in the schema's table `Model`
_DESCRIPTION = 3
ALIGNMENT = 16  # bytes; the schema's own rule for the data of a buffer
_FIELDS = 8  # the fields of `Model` that the converter may write: later ones belong to files with external buffers

NUMPY_TYPES = {
    0: np.float32,
    1: np.float16,
    2: np.int32,
    3: np.uint8,
    4: np.int64,
    6: np.bool_,
    7: np.int16,
    9: np.int8,
}
"""The schema's `TensorType` -> numpy, of types whose numbers lie in a buffer as they are."""


def schema() -> ModuleType:
    """The generated classes of the file format."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        from tensorflow.lite.python import schema_py_generated
    return schema_py_generated


def root(content: bytes):
    """The table `Model` of a file that the runtime has verified (this reader itself checks no offset)."""
    return schema().Model.GetRootAs(content, 0)


def unpacked(content: bytes):
    """The whole file as objects that can be changed: the schema's `ModelT`. The file has been verified before."""
    return schema().ModelT.InitFromObj(root(content))


def packed(model) -> bytes:
    """A `ModelT` as the bytes of a file, the data of each buffer at a multiple of 16 bytes."""
    import flatbuffers

    builder, buffers = flatbuffers.Builder(1024), model.buffers
    model.buffers = [buffer if buffer.data is None else _Aligned(buffer.data) for buffer in buffers]
    try:
        builder.Finish(model.Pack(builder), IDENTIFIER)
    finally:
        model.buffers = buffers
    return bytes(builder.Output())


class _Aligned:
    """A buffer that the schema's generated code packs like its own, which would forget the alignment."""

    def __init__(self, data):
        self.data = data

    def Pack(self, builder) -> int:  # noqa: N802 (the name that the generated code calls)
        data = b"" if self.data is None else np.asarray(self.data, np.uint8).tobytes()
        if data:
            builder.StartVector(1, len(data), ALIGNMENT)
            builder.head -= len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data
            vector = builder.EndVector()
        schema().BufferStart(builder)
        if data:
            schema().BufferAddData(builder, vector)
        return schema().BufferEnd(builder)


def scales(tensor) -> np.ndarray:
    """The scales of a tensor (of the schema's `TensorT`): none, one, or one for each channel."""
    found = None if tensor.quantization is None else tensor.quantization.scale
    return np.zeros(0, np.float32) if found is None else np.asarray(found)


def fingerprint(content: bytes) -> str:
    """The same for files that compute the same on the same sizes, whatever their weights and names are."""
    model = unpacked(content)
    names = operator_names(model.operatorCodes)
    text = []
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data, count = model.buffers[tensor.buffer].data, len(scales(tensor))
            text.append(f"{[int(n) for n in tensor.shape]} {tensor.type} {data is None or not len(data)} {count}")
        for operator in graph.operators:
            options = sorted((k, str(v)) for k, v in vars(operator.builtinOptions or _Nothing).items())
            ends = [[int(t) for t in tensors] for tensors in (operator.inputs, operator.outputs)]
            text.append(f"{names[operator.opcodeIndex]} {options} {ends}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:20]


class _Nothing:
    """The options of an operator that has none."""


def operator_names(codes) -> list[str]:
    """The name of each of a file's operator codes (of the schema's `OperatorCodeT`); a custom one is "CUSTOM:name"."""
    known = {code: name for name, code in vars(schema().BuiltinOperator).items() if isinstance(code, int)}
    # Codes up to 127 may stand in the older field alone.
    numbers = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in codes]
    return [
        f"CUSTOM:{code.customCode.decode()}" if code.customCode else known.get(number, f"UNKNOWN:{number}")
        for code, number in zip(codes, numbers, strict=True)
    ]


def operators(content: bytes) -> dict[str, int]:
    """The operators of all subgraphs, name -> count, most frequent first. A custom one is called "CUSTOM:name".

    These are the file's own operators: what a delegate such as XNNPACK fuses at run time is not seen here.
    """
    model, codes = root(content), schema().OperatorCodeT
    names = operator_names([codes.InitFromObj(model.OperatorCodes(k)) for k in range(model.OperatorCodesLength())])
    count = Counter()
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        count.update(names[graph.Operators(at).OpcodeIndex()] for at in range(graph.OperatorsLength()))
    return dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))


def description(content: bytes) -> str:
    """The file's one-line description: "recipe=int8 ..." in files of this package, "MLIR Converted." in others."""
    return (root(content).Description() or b"").decode(errors="replace")


def signature(content: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """Names of inputs and of outputs -> tensor index, from the file's first signature; both empty without one."""
    model = root(content)
    if not model.SignatureDefsLength():
        return {}, {}
    first = model.SignatureDefs(0)
    inputs = [first.Inputs(at) for at in range(first.InputsLength())]
    outputs = [first.Outputs(at) for at in range(first.OutputsLength())]
    return ({item.Name().decode(): item.TensorIndex() for item in inputs},
            {item.Name().decode(): item.TensorIndex() for item in outputs})  # fmt: skip


def missing_bytes(content: bytes) -> int:
    """How many bytes of weights kept outside the flatbuffer proper are cut off; 0 for a whole file."""
    model = root(content)
    buffers = (model.Buffers(at) for at in range(model.BuffersLength()))
    # An offset of 0 or 1 means: the data lies inside the flatbuffer, where the runtime's own verifier looks.
    ends = [buffer.Offset() + buffer.Size() for buffer in buffers if buffer.Offset() > 1]
    return max([end - len(content) for end in ends] + [0])


def sign(content: bytes, inputs: list[str], outputs: list[str], text: str) -> bytes:
    """The same file with a signature "serving_default" and the description `text`.

    A flatbuffer's offsets are relative and point forward only. So a new root table is put in front of the old file
    and points into it: no weight moves against another, and since the new part is a multiple of 64 bytes long, every
    alignment stays as the converter chose it. It costs one copy of the bytes, whatever the model's size.

    Args:
        content: a .tflite file, verified.
        inputs, outputs: a name for each input and output of the first subgraph, in the file's order, unique.
    """
    graph = root(content).Subgraphs(0)
    old_table, old_fields = _old_root(content)
    if any(number >= _FIELDS for number in old_fields):
        return content  # external buffers are addressed from the start of the file, which must then not move
    out = bytearray(struct.pack("<I4s", 0, IDENTIFIER))
    version = struct.unpack_from("<I", content, old_table + old_fields.get(0, 0))[0] if 0 in old_fields else 0
    kept = {number: 0 for number in old_fields if number}
    table, fields = _table(out, {0: version, **kept, _DESCRIPTION: 0, _SIGNATURES: 0})
    struct.pack_into("<I", out, 0, table)
    _point(out, fields[_DESCRIPTION], _string(out, text))
    start, entries = _vector(out, 1)
    _point(out, fields[_SIGNATURES], start)
    signature_at, slots = _table(out, {0: 0, 1: 0, 2: 0, 4: 0})
    _point(out, entries[0], signature_at)
    for slot, names, indices in ((0, inputs, graph.InputsAsNumpy()), (1, outputs, graph.OutputsAsNumpy())):
        start, entries = _vector(out, len(names))
        _point(out, slots[slot], start)
        for entry, name, tensor in zip(entries, names, np.atleast_1d(indices), strict=True):
            item, parts = _table(out, {0: 0, 1: int(tensor)})
            _point(out, entry, item)
            _point(out, parts[0], _string(out, name))
    _point(out, slots[2], _string(out, "serving_default"))
    _align(out, 64)
    for number, offset in old_fields.items():
        if number not in (0, _DESCRIPTION, _SIGNATURES):
            place = old_table + offset
            _point(out, fields[number], len(out) + place + struct.unpack_from("<I", content, place)[0])
    return bytes(out) + content


def _old_root(content: bytes) -> tuple[int, dict[int, int]]:
    """Position of the root table, and field number -> offset of that field inside the table."""
    table = struct.unpack_from("<I", content, 0)[0]
    layout = table - struct.unpack_from("<i", content, table)[0]
    count = (struct.unpack_from("<H", content, layout)[0] - 4) // 2
    offsets = struct.unpack_from(f"<{count}H", content, layout + 4)
    return table, {number: offset for number, offset in enumerate(offsets) if offset}


def _align(out: bytearray, size: int) -> None:
    out += bytes(-len(out) % size)


def _point(out: bytearray, place: int, target: int) -> None:
    """Makes the offset at `place` point to `target`."""
    struct.pack_into("<I", out, place, target - place)


def _table(out: bytearray, values: dict[int, int]) -> tuple[int, dict[int, int]]:
    """Appends a table of four-byte fields, number -> value. Returns its position and those of its fields."""
    _align(out, 4)
    layout, last = len(out), max(values)
    numbers = sorted(values)
    places = {number: 4 + 4 * at for at, number in enumerate(numbers)}
    offsets = [places.get(number, 0) for number in range(last + 1)]
    out += struct.pack(f"<{len(offsets) + 2}H", 4 + 2 * len(offsets), 4 + 4 * len(numbers), *offsets)
    _align(out, 4)
    table = len(out)
    out += struct.pack(f"<i{len(numbers)}I", table - layout, *(values[number] for number in numbers))
    return table, {number: table + place for number, place in places.items()}


def _vector(out: bytearray, count: int) -> tuple[int, list[int]]:
    """Appends a vector of `count` offsets. Returns its position and those of its entries."""
    _align(out, 4)
    start = len(out)
    out += struct.pack("<I", count) + bytes(4 * count)
    return start, [start + 4 + 4 * at for at in range(count)]


def _string(out: bytearray, text: str) -> int:
    _align(out, 4)
    start, data = len(out), text.encode()
    out += struct.pack("<I", len(data)) + data + b"\0"
    return start
