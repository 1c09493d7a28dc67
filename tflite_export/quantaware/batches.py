"""Training data on its way to another process: plain files of numbers, written and read batch by batch."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from tflite_export.inputs import Data, Input, collect

CHUNK = 256  # rows of an array written at a time
MAX_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Stream:
    """One file of numbers: (samples, *shape) of `dtype`, in C order."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Samples on disk.

    Attributes:
        samples: how many.
        batch: samples in the first batch that was passed; 0 for arrays.
        inputs, labels: a Stream for each input and for each output with labels.
        weights: sample weights, or None.
    """

    samples: int
    batch: int
    inputs: tuple[Stream, ...]
    labels: tuple[Stream, ...] = ()
    weights: Stream | None = None

    def open(self, folder: str) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray | None]:
        """Inputs, labels and sample weights as arrays that stay on the disk until they are read."""

        def mapped(stream: Stream) -> np.ndarray:
            shape = (self.samples, *stream.shape)
            return np.memmap(os.path.join(folder, stream.file), stream.dtype, "r", shape=shape)

        weights = None if self.weights is None else mapped(self.weights)
        return [mapped(each) for each in self.inputs], [mapped(each) for each in self.labels], weights


def store(
    data: Data, folder: str, name: str, inputs: list[Input], outputs: list[str], *, max_bytes: int = MAX_BYTES
) -> Stored:
    """Writes `data` into files in `folder`. Memory holds one batch at a time.

    Args:
        data: (x, y) or (x, y, sample weights) of arrays, or an iterable (tf.data.Dataset, PyDataset, generator) of
            such batches.
        name: start of the files' names.
        inputs, outputs: what the model takes; the names of what it gives.
        max_bytes: on the disk.

    Raises:
        ValueError: no samples, no labels, wrong shapes, an endless dataset, or more than `max_bytes`.
    """
    files: dict[str, tuple] = {}
    samples = batch = written = 0
    try:
        for x, labels, weights in _batches(data, inputs, outputs):
            rows = len(x[0])
            batch = batch or (0 if isinstance(data, tuple) else rows)
            samples += rows
            parts = {f"{name}-x{at}": each for at, each in enumerate(x)}
            parts |= {f"{name}-y{at}": each for at, each in enumerate(labels)}
            parts |= {} if weights is None else {f"{name}-w": weights}
            written += sum(part.nbytes for part in parts.values())
            if written > max_bytes:
                raise ValueError(
                    f"The data take more than {max_bytes / 2**30:.3g} GiB on the disk after {samples} samples. Pass "
                    "fewer (dataset.take(batches)), or a larger max_bytes=."
                )
            if files and set(files) != set(parts):
                raise ValueError(f"Batches differ: {sorted(files)} at first, {sorted(parts)} after {samples} samples.")
            for key, part in parts.items():
                if key not in files:
                    files[key] = (open(os.path.join(folder, key), "wb"), part.dtype, part.shape[1:])
                file, dtype, shape = files[key]
                if part.shape[1:] != shape:
                    raise ValueError(f"Labels of the shape {part.shape[1:]} came after labels of the shape {shape}.")
                file.write(np.ascontiguousarray(part, dtype).data)
    finally:
        for file, _, _ in files.values():
            file.close()
    if not samples:
        raise ValueError("The data are empty; expected batches (x, y) with labels.")
    streams = {key: Stream(key, dtype.str, tuple(shape)) for key, (_, dtype, shape) in files.items()}

    def those(kind: str) -> tuple[Stream, ...]:
        return tuple(stream for key, stream in streams.items() if key.startswith(f"{name}-{kind}"))

    return Stored(samples, batch, those("x"), those("y"), streams.get(f"{name}-w"))


def to_json(stored: Stored | None) -> str:
    return json.dumps(None if stored is None else asdict(stored))


def from_json(text: str) -> Stored | None:
    """What `to_json` wrote."""
    fields = json.loads(text)
    if fields is None:
        return None

    def stream(item):
        return None if item is None else Stream(item["file"], item["dtype"], tuple(item["shape"]))

    many = {key: tuple(stream(item) for item in fields[key]) for key in ("inputs", "labels")}
    return Stored(fields["samples"], fields["batch"], **many, weights=stream(fields["weights"]))


def _batches(
    data: Data, inputs: list[Input], outputs: list[str]
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], np.ndarray | None]]:
    for element in _elements(data):
        if not isinstance(element, (tuple, list)) or len(element) not in (2, 3):
            raise ValueError(
                f"A batch is a {type(element).__name__}; expected (x, y) or (x, y, sample weights): "
                "training needs labels."
            )
        x, y, weights = (*element, None)[:3]
        single = _first_shape(x) == inputs[0].shape
        arrays = collect(x, inputs, 2**62)
        labels = [np.asarray(each)[None] if single else np.asarray(each) for each in _labels(y, outputs)]
        if weights is not None:
            weights = np.asarray(weights, "float32")[None] if single else np.asarray(weights, "float32")
        for part in [*labels, *([] if weights is None else [weights])]:
            if part.dtype.kind not in "fiub" or not len(part) == len(arrays[0]):
                raise ValueError(
                    f"Labels of the shape {part.shape} and dtype {part.dtype} came with {len(arrays[0])} samples; "
                    "expected one number, or one row of numbers, for each."
                )
        yield arrays, labels, weights


def _elements(data: Data) -> Iterable:
    if isinstance(data, tuple):  # whole arrays: in slices, so that no copy of all is made
        first = data[0]
        while isinstance(first, (dict, list, tuple)):
            first = next(iter(first.values() if isinstance(first, dict) else first))
        count = len(first)

        def rows(part, start: int):
            if isinstance(part, dict):
                return {key: rows(item, start) for key, item in part.items()}
            if isinstance(part, (list, tuple)) and hasattr(part[0], "shape"):
                return [rows(item, start) for item in part]
            return part[start : start + CHUNK]

        return (tuple(rows(part, start) for part in data) for start in range(0, count, CHUNK))
    if hasattr(data, "cardinality") and int(data.cardinality()) == -1:
        raise ValueError("The dataset is endless (.repeat()); pass dataset.take(batches), as many as an epoch has.")
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, list):
        return (data[at] for at in range(len(data)))
    if not hasattr(data, "__iter__"):
        raise TypeError(
            f"{type(data).__name__} was passed as data; expected (x, y), or a tf.data.Dataset or iterable of batches "
            "(x, y)."
        )
    return data


def _labels(y, outputs: list[str]) -> list:
    if isinstance(y, dict):
        if set(y) != set(outputs):
            raise ValueError(f"Labels have the names {sorted(y)}; the model's outputs are {outputs}.")
        return [y[name] for name in outputs]
    if isinstance(y, (list, tuple)) and len(outputs) > 1:
        if len(y) != len(outputs):
            raise ValueError(f"There are {len(y)} labels for the {len(outputs)} outputs {outputs}.")
        return list(y)
    return [y]


def _first_shape(x) -> tuple[int, ...]:
    if isinstance(x, dict):
        x = next(iter(x.values()))
    elif isinstance(x, (list, tuple)) and len(x) and hasattr(x[0], "shape"):
        x = x[0]
    return tuple(np.shape(x))


def rounds(samples: int, size: int, random: np.random.Generator) -> list[np.ndarray]:
    """The rows of each batch of one epoch, shuffled over all samples; the last batch may be smaller."""
    order = random.permutation(samples)
    return [np.sort(order[at * size : (at + 1) * size]) for at in range(math.ceil(samples / size))]
