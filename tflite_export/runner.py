"""Floor 1. Bytes of a .tflite file and numpy arrays in, numpy arrays out."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from tflite_export import flatbuffer
from tflite_export.silence import quiet


@dataclass(frozen=True)
class Port:
    """One input or output of a file.

    Attributes:
        name: from the file's signature, or else the tensor's own name without the converter's decorations.
        shape: with the batch axis; -1 where the file leaves a size open.
        dtype: "float32", "int8", ...
        scale, zero_point: real = scale * (stored - zero_point); both None if the numbers are stored as they are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None

    def __str__(self) -> str:
        quantised = "" if self.scale is None else f", scale {self.scale:.6g}, zero point {self.zero_point}"
        return f"{self.name} {self.dtype}[{' x '.join(map(str, self.shape))}]{quantised}"

    def store(self, values: np.ndarray) -> np.ndarray:
        """Real numbers -> what the file stores (rounded and clipped if it is quantised)."""
        if self.scale is None:
            return values.astype(self.dtype)
        limits = np.iinfo(self.dtype)
        levels = np.round(np.asarray(values, "float64") / self.scale) + self.zero_point
        return np.clip(levels, limits.min, limits.max).astype(self.dtype)

    def real(self, stored: np.ndarray) -> np.ndarray:
        """What the file stores -> real numbers (float32 if it is quantised)."""
        if self.scale is None:
            return stored
        return ((stored.astype("float64") - self.zero_point) * self.scale).astype("float32")


class Runner:
    """A .tflite file, loaded and ready to run.

    Args:
        model: path of the file, or its bytes.
        threads: CPU threads the interpreter may use.

    Attributes:
        inputs, outputs: tuples of Port in the file's own order (the converter may have changed the model's order).
        operators: name -> count; "CUSTOM:Flex..." are TensorFlow operators that only run where Flex is linked in.
        runtime: name and version of the interpreter.
        threads, batch_size: as passed; samples per invocation.
        interpreter: the interpreter itself.

    Raises:
        ValueError: not a whole .tflite file. (One with operators that this runtime lacks can be looked into; `set`
            and `run` raise ValueError for it.)
        FileNotFoundError: no file at that path.

    Example:
        >>> runner = Runner("small.tflite")                        # doctest: +SKIP
        >>> [probabilities] = runner.run([images])                 # doctest: +SKIP
    """

    def __init__(self, model: str | os.PathLike | bytes, threads: int = 1):
        check_threads(threads)
        self.threads = threads
        self.content = read(model)
        self.source = "the bytes passed" if isinstance(model, bytes) else os.fspath(model)
        self.interpreter, self.runtime = _interpreter(self.content, self.source, threads)
        self.operators = flatbuffer.operators(self.content)
        self.description = flatbuffer.description(self.content)
        names_in, names_out = flatbuffer.signature(self.content)
        self._in, self._out = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        self.inputs = _ports(self._in, names_in)
        self.outputs = _ports(self._out, names_out)
        self._shapes: list[tuple[int, ...]] = []
        self.batch_size = max(int(self._in[0]["shape"][0]), 1) if self._in and len(self._in[0]["shape"]) else 1

    @property
    def delegate(self) -> str:
        """What takes operators over from the built-in kernels, known once a batch was set."""
        taken = sum(item["op_name"] == "DELEGATE" for item in self.interpreter._get_ops_details())
        return f"XNNPACK, {taken} part{'s' * (taken != 1)}" if taken else "none"

    def set(self, batch: Sequence[np.ndarray]) -> None:
        """Puts one batch (batch_size, ...) of real numbers per input in place; `interpreter.invoke()` then runs it."""
        shapes = [array.shape for array in batch]
        if shapes != self._shapes:
            for detail, shape in zip(self._in, shapes, strict=True):
                self.interpreter.resize_tensor_input(detail["index"], shape)
            self._allocate(shapes)
        for detail, port, array in zip(self._in, self.inputs, batch, strict=True):
            self.interpreter.set_tensor(detail["index"], port.store(array))

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs any number of samples, batch by batch.

        Args:
            arrays: one array (samples, ...) of real numbers per input, in the order of `inputs`.

        Returns:
            One array (samples, ...) of real numbers per output, in the order of `outputs`: float32 where the file's
            output is quantised.
        """
        arrays = self._checked(arrays)
        samples, size = len(arrays[0]), self.batch_size
        results: list[list[np.ndarray]] = [[] for _ in self.outputs]
        for start in range(0, samples, size):
            # The last batch is filled up with the first samples again, and their outputs dropped.
            rows = np.arange(start, start + size) % samples
            self.set([array[rows] for array in arrays])
            self.interpreter.invoke()
            for result, detail, port in zip(results, self._out, self.outputs, strict=True):
                values = np.atleast_1d(port.real(self.interpreter.get_tensor(detail["index"])))
                result.append(values[: min(size, samples - start)])
        return [np.concatenate(result) for result in results]

    def random_inputs(self, seed: int = 0) -> list[np.ndarray]:
        """One batch per input: normal numbers for floats and quantised inputs, zeros for indices and booleans.

        Raises ValueError if the file leaves a size other than the batch open.
        """
        random = np.random.default_rng(seed)
        batch = []
        for port in self.inputs:
            if -1 in port.shape[1:]:
                raise ValueError(
                    f"{self.source} leaves a size of its input {port} open (-1); export it with one fixed size."
                )
            shape = [max(size, 1) for size in port.shape]
            if port.scale is not None:
                limits = np.iinfo(port.dtype)
                batch.append(port.real(random.integers(limits.min, limits.max, shape, endpoint=True)))
            elif np.issubdtype(np.dtype(port.dtype), np.floating):
                batch.append(random.normal(size=shape).astype(port.dtype))
            else:
                batch.append(np.zeros(shape, port.dtype))
        return batch

    def _allocate(self, shapes: list[tuple[int, ...]]) -> None:
        try:
            with quiet():
                self.interpreter.allocate_tensors()
        except RuntimeError as error:
            raise ValueError(f"{self.runtime} cannot run {self.source}: {first_line(error)}") from error
        self._shapes = shapes

    def _checked(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        arrays = [np.asarray(array) for array in arrays]
        expected = ", ".join(str(port) for port in self.inputs)
        if len(arrays) != len(self.inputs):
            raise ValueError(
                f"{len(arrays)} arrays were passed; {self.source} has {len(self.inputs)} inputs: {expected}."
            )
        if not arrays or len({len(array) if array.ndim else -1 for array in arrays}) != 1 or not arrays[0].size:
            shapes = [array.shape for array in arrays]
            raise ValueError(
                f"Arrays of shapes {shapes} were passed; expected the same number of samples, at least one, in each."
            )
        for port, array in zip(self.inputs, arrays, strict=True):
            wanted = port.shape[1:]
            fits = len(wanted) == array.ndim - 1 and all(
                size in (-1, got) for size, got in zip(wanted, array.shape[1:], strict=True)
            )
            if not fits:
                raise ValueError(
                    f"An array of shape {array.shape} was passed for the input {port}; expected (samples, "
                    f"{', '.join(map(str, wanted))})."
                )
        return arrays


def read(model: str | os.PathLike | bytes) -> bytes:
    """The bytes of a file; bytes are returned as they are. Raises FileNotFoundError, IsADirectoryError, TypeError."""
    if isinstance(model, bytes):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"{type(model).__name__} was passed; expected the path of a .tflite file, or its bytes.")
    with open(model, "rb") as file:
        return file.read()


def check_threads(threads: int) -> None:
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(f"threads={threads!r} was passed; expected a whole number from 1.")


def _interpreter(content: bytes, source: str, threads: int):
    """The interpreter and the runtime's name and version."""
    if content[4:8] != flatbuffer.IDENTIFIER:
        raise ValueError(
            f"{source} is not a .tflite file: the mark TFL3 is missing at byte 4 ({len(content)} bytes read)."
        )
    with quiet():
        try:
            from ai_edge_litert.interpreter import Interpreter

            runtime = f"ai-edge-litert {metadata.version('ai-edge-litert')}"
            found = True
        except ImportError:
            found = False
    if not found:
        warnings.warn(
            "ai-edge-litert is not installed: TensorFlow's own interpreter, which is deprecated, is used instead. "
            "To change that: pip install ai-edge-litert",
            stacklevel=3,
        )
        Interpreter, runtime = _tensorflow_interpreter()
    try:
        interpreter = _loaded(Interpreter, content, threads)
        # Now the runtime's verifier has seen the file, so that reading it is safe.
        cut_off = flatbuffer.missing_bytes(content)
        if cut_off > 0:
            raise ValueError(f"{source} is cut off: {cut_off} bytes of weights are missing at its end.")
    except RuntimeError as error:
        raise ValueError(f"{runtime} cannot run {source}: {first_line(error)}") from error
    except ValueError as error:
        if "Flatbuffer" not in str(error):
            raise
        raise ValueError(
            f"{source} is damaged or cut off: it starts like a .tflite file, but the flatbuffer inside its "
            f"{len(content)} bytes is not whole. Copy or export it again."
        ) from error
    return interpreter, runtime


def _loaded(interpreter_class, content: bytes, threads: int):
    with quiet():
        return interpreter_class(model_content=content, num_threads=threads)


def _tensorflow_interpreter():
    with quiet():
        import tensorflow

        return tensorflow.lite.Interpreter, f"tensorflow {tensorflow.__version__}"


def first_line(error: Exception) -> str:
    """The first line of an error, at most 300 characters: the runtime and the converter write pages."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]


def _ports(details: list[dict], names: dict[str, int]) -> tuple[Port, ...]:
    left = {index: [name for name, at in names.items() if at == index] for index in names.values()}
    ports = []
    for detail in details:
        named = left.get(detail["index"])
        # Without a signature: "serving_default_image:0" is what the converter makes of "image".
        name = named.pop(0) if named else re.sub(r"^serving_default_|:0$", "", detail["name"])
        scale, zero_point = detail["quantization"]
        quantised = scale != 0.0 and np.issubdtype(detail["dtype"], np.integer)
        shape = tuple(int(size) for size in detail["shape_signature"]) or tuple(int(size) for size in detail["shape"])
        dtype = np.dtype(detail["dtype"]).name
        ports.append(
            Port(name, shape, dtype, float(scale) if quantised else None, int(zero_point) if quantised else None)
        )
    return tuple(ports)
