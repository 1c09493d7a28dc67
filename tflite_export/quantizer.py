"""Floor 1. Google's ai-edge-quantizer: the bytes of a float32 file -> the bytes of a quantised one."""

import fnmatch
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tflite_export import flatbuffer
from tflite_export.silence import quiet

SIGNATURE = "serving_default"
_INDEXED = ("INT32", "INT64", "BOOL", "UINT8")
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
_CASTS = ("QUANTIZE", "DEQUANTIZE", "DENSIFY")


@dataclass(frozen=True)
class Operator:
    """One operator of a file.

    Attributes:
        name: "CONV_2D", ...
        outputs: names of the tensors it writes. The converter joins the names of all TensorFlow operations that it
            fused into one operator by ";".
        constants: names of the weights and other constants it reads.
        types: of the activations and weights it reads and writes: "FLOAT32", "INT8", ...; indices and shapes left out.
    """

    name: str
    outputs: tuple[str, ...]
    constants: tuple[str, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class FloatFile:
    """A model as a float32 file that ai-edge-quantizer can take.

    Attributes:
        content: its bytes, with a signature.
        layers: path of a Keras layer ("conv", "inner/conv") -> places of its operators in `operators(content)`.
        paths: of all layers, also of those that left no operator.
    """

    content: bytes
    layers: dict[str, tuple[int, ...]]
    paths: tuple[str, ...]

    def places(self, keep_float: Iterable[str]) -> tuple[int, ...]:
        """The operators of the layers that names or patterns like "block_*" select. ValueError for unknown ones."""
        found = set()
        for pattern in keep_float:
            named = [path for path in self.paths if _selects(pattern, path)]
            if not named:
                raise ValueError(
                    f"keep_float={pattern!r} names no layer of the model. Its layers: {', '.join(self.paths)}."
                )
            if not any(path in self.layers for path in named):
                raise ValueError(
                    f"keep_float={pattern!r} selects only layers without an operator of their own in the file "
                    f"({', '.join(named)}). Layers with one: {', '.join(self.layers)}."
                )
            found.update(place for path in named for place in self.layers.get(path, ()))
        return tuple(sorted(found))


def calibrate(content: bytes, batches: Iterable[Sequence[np.ndarray]]) -> dict:
    """The smallest and the largest number of every tensor over all batches, as `quantize` takes them.

    ai-edge-quantizer's own default is a moving average over the batches, which cuts off what is rare: its files were
    farther from the float ones than the converter's. With the whole range they are as near.

    Args:
        content: a float32 file with a signature "serving_default".
        batches: per batch one array per input, in the file's order.
    """
    check_installed()
    from ai_edge_quantizer import calibrator
    from ai_edge_quantizer.quantizer import Quantizer
    from ai_edge_quantizer.utils import qsv_utils

    names = list(flatbuffer.signature(content)[0])
    samples = [dict(zip(names, batch, strict=True)) for batch in batches]
    with quiet():
        tool = Quantizer(content)
        tool.add_static_config(".*", "*", 8, 8)
        run = calibrator.Calibrator(memoryview(content), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
        run.calibrate({SIGNATURE: samples}, tool._recipe_manager)
        return run.get_model_qsvs()


def quantize(
    content: bytes,
    activations: str,
    ranges: dict | None = None,
    *,
    float_io: bool = False,
    keep: Sequence[int] = (),
    only: Sequence[int] | None = None,
) -> bytes:
    """The same network with int8 weights, a scale per output channel.

    Operators that ai-edge-quantizer has no integer kernel for stay in float32, between a DEQUANTIZE and a QUANTIZE.

    Args:
        content: a float32 file with a signature "serving_default".
        activations: "int8" or "int16" (calibrated), "dynamic" (int8, their range taken at each run) or "float32".
        ranges: from `calibrate`, for "int8" and "int16".
        float_io: keep float32 inputs and outputs.
        keep: places in `operators(content)` of what stays in float32.
        only: places of all that is quantised; None for everything but `keep`.
    """
    check_installed()
    from ai_edge_quantizer.quantizer import Quantizer

    listed = operators(content)
    with quiet():
        tool = Quantizer(content)
        chosen = ".*" if only is None else _exactly(listed, only)
        static = activations in ("int8", "int16")
        bits = 16 if activations == "int16" else 8
        if static:
            tool.add_static_config(chosen, "*", bits, 8)
        elif activations == "dynamic":
            tool.add_dynamic_config(chosen, "*", 8)
        else:
            tool.add_weight_only_config(chosen, "*", 8)
        if keep:
            tool.update_quantization_recipe(_exactly(listed, keep), "*", algorithm_key="no_quantize")
        for end in ("INPUT", "OUTPUT"):
            # The last word on the ends: the last operator and the output share one name.
            if float_io:
                tool.update_quantization_recipe("(?s).*", end, algorithm_key="no_quantize")
            elif static:
                tool.add_static_config("(?s).*", end, bits, 8)
        made = tool.quantize(ranges if static else None, enable_progress_bar=False, enable_progress_report=False)
    return inline(bytes(made.quantized_model))


def inline(content: bytes) -> bytes:
    """The same file with all its weights inside the flatbuffer, each at a multiple of 16 bytes.

    ai-edge-quantizer puts large constants behind the flatbuffer. LiteRT finds them there; LiteRT for Microcontrollers
    does not look, and computes nonsense without a word. Small ones it leaves inside, but at any multiple of 4 bytes.
    """
    model = flatbuffer.unpacked(content)
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
        buffer.offset = buffer.size = 0
    return flatbuffer.packed(model)


def operators(content: bytes) -> list[Operator]:
    """The operators of the first subgraph, in the file's order."""
    schema, model = flatbuffer.schema(), flatbuffer.root(content)
    codes = [schema.OperatorCodeT.InitFromObj(model.OperatorCodes(at)) for at in range(model.OperatorCodesLength())]
    known = flatbuffer.operator_names(codes)
    kinds = {code: name for name, code in vars(schema.TensorType).items() if isinstance(code, int)}
    graph, found = model.Subgraphs(0), []
    for at in range(graph.OperatorsLength()):
        each = graph.Operators(at)
        reads, writes = ([graph.Tensors(int(index)) for index in np.atleast_1d(indices) if index >= 0]
                         for indices in (each.InputsAsNumpy(), each.OutputsAsNumpy()))  # fmt: skip
        types = tuple(kinds[tensor.Type()] for tensor in reads + writes)
        names = tuple(tensor.Name().decode() for tensor in writes)
        constants = tuple(tensor.Name().decode() for tensor in reads if model.Buffers(tensor.Buffer()).DataLength())
        found.append(
            Operator(known[each.OpcodeIndex()], names, constants, tuple(kind for kind in types if kind not in _INDEXED))
        )
    return found


def float_operators(content: bytes) -> dict[str, int]:
    """What computes in float32, name -> count; conversions between floats and integers left out."""
    return dict(Counter(each.name for each in operators(content)
                        if "FLOAT32" in each.types and each.name not in _CASTS))  # fmt: skip


def float_file(content: bytes, model, graph) -> FloatFile:
    """Finds out which operators of a float32 file compute which Keras layer.

    Keras opens a name scope per layer twice, for building and for calling, and TensorFlow numbers the second: the
    operations of a layer "conv" in a model "inner" lie under "model_1/inner_1/conv_1/". A fused operator belongs to
    all layers in it, and an operator of a nested model to that model as well.

    Args:
        content: the file, with a signature.
        model: the Keras model.
        graph: the TensorFlow graph that the file was made from.
    """
    paths, same = tuple(dict.fromkeys(_layer_paths(model))), _same(graph)
    known, found = set(paths), {}
    for place, each in enumerate(operators(content)):
        names = {part for output in each.outputs for part in output.split(";")}
        layers = _layers_in({same.get(name, name) for name in names}, known)
        if each.name in _WEIGHTED and (not layers or any(same.get(name, name) != name for name in names)):
            # An output of the network has lost the names of what was fused into it; its weights still have theirs.
            layers |= _layers_in({part for constant in each.constants for part in constant.split(";")}, known)
        for path in layers:
            found.setdefault(path, []).append(place)
    return FloatFile(content, {path: tuple(places) for path, places in found.items()}, paths)


def _layers_in(names: set[str], known: set[str]) -> set[str]:
    """The layers, and the nested models around them, in whose scopes the names lie."""
    found = set()
    for name in names:
        path = ""
        for part in name.split("/")[1:-1]:
            path = f"{path}/{_unnumbered(part)}".lstrip("/")
            if path not in known:
                break
            found.add(path)
    return found


def _selects(pattern: str, path: str) -> bool:
    """Whether a name or pattern is that of the layer, by its name or its path in nested models."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in (path, path.rsplit("/", 1)[-1]))


def _layer_paths(model) -> Iterator[str]:
    import keras

    for layer in model._flatten_layers(include_self=False, recursive=False):
        if not isinstance(layer, keras.layers.InputLayer):
            yield layer.name
            yield from (f"{layer.name}/{path}" for path in _layer_paths(layer))


def _same(graph) -> dict[str, str]:
    """Name of an operation that only hands a tensor on -> name of the operation that computed it."""
    found = {}
    for each in graph.get_operations():
        source = each
        while source.type == "Identity":
            source = source.inputs[0].op
        found[each.name] = source.name
    return found


def _unnumbered(part: str) -> str:
    return re.sub(r"_\d+$", "", part)


def _exactly(listed: list[Operator], places: Sequence[int]) -> str:
    """A regular expression for the operators at `places`, as ai-edge-quantizer spells an operator's scope."""
    scopes = (";".join(name for name in listed[place].outputs if name) + ";" for place in places)
    return f"^(?:{'|'.join(map(re.escape, scopes))})$"


def installed() -> bool:
    """Whether ai-edge-quantizer can be imported."""
    return importlib.util.find_spec("ai_edge_quantizer") is not None


def check_installed() -> None:
    """Raises ImportError with the cure unless ai-edge-quantizer is installed."""
    if not installed():
        raise ImportError("This needs ai-edge-quantizer, which is not installed: pip install 'keras_prune[quantizer]'")
