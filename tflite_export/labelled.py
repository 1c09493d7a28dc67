"""Floor 3. How often a model or a file is right on labelled data, and what each stage of making it small cost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tflite_export.inputs import Data, Input, check_model, collect, input_names, model_inputs, output_names
from tflite_export.records import Record
from tflite_export.runner import Runner

_BATCH = 128
_ALL = 1 << 62  # `collect` takes a limit; here there is none


@dataclass(frozen=True)
class Stage(Record):
    """One row of `Stages`.

    Attributes:
        name: as passed.
        accuracy: fraction of the samples that are right.
        change: accuracy less that of the first stage.
        bytes: of the file; of a Keras model those of its weights.
        params: numbers in the Keras model's weights; None for a file.
        zeros: fraction of these that are 0; None for a file.
    """

    name: str
    accuracy: float
    change: float
    bytes: int
    params: int | None
    zeros: float | None


@dataclass(frozen=True)
class Stages(Record):
    """What `stages` measured. Prints itself as a table.

    Attributes:
        stages: a Stage each, in the order passed.
        samples: how many were classified.
        error: standard error of an accuracy on so many samples (binomial, of the first stage). Differences below
            twice this may be chance.
    """

    stages: tuple[Stage, ...]
    samples: int
    error: float

    def __str__(self) -> str:
        head = ("stage", "accuracy", "change", "KiB", "params", "zeros")
        rows = [head]
        for each in self.stages:
            params = ("-", "-") if each.params is None else (f"{each.params}", f"{100 * each.zeros:.0f} %")
            change = f"{100 * each.change:+.2f}" if each is not self.stages[0] else ""
            rows.append((each.name, f"{100 * each.accuracy:.2f} %", change, f"{each.bytes / 1024:.1f}", *params))
        widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])] + [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, f"{self.samples} samples, standard error {100 * self.error:.2f} points"])


def accuracy(model, x: Data, y, *, output: str | None = None, threads: int = 1) -> float:
    """The fraction of samples whose largest output is at the label.

    Args:
        model: a Keras model, or the path or bytes of a .tflite file. A file's quantised inputs and outputs are
            converted on the way.
        x: the samples, preprocessed as in training: an array, a dict of arrays by the input's name, or whatever else
            `export` takes as data.
        y: class indices (samples,) or (samples, 1), or one-hot rows (samples, classes).
        output: name of the output with the classes, of a model that has several.
        threads: of the interpreter, for a file.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: labels that do not fit the samples or the classes; bad samples or file.
        TypeError: neither a Keras model nor a file.

    Example:
        >>> accuracy("small.tflite", x_test, y_test)               # doctest: +SKIP
        0.872
    """
    scores = _file_scores if isinstance(model, (str, os.PathLike, bytes)) else _keras_scores
    values, source = scores(model, x, output, threads)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(
            f"An output of shape {values.shape} came from {source}; expected (samples, classes) with 2 classes or more."
        )
    return float(np.mean(values.argmax(-1) == _labels(y, *values.shape)))


def stages(models: Mapping[str, object], x: Data, y, *, output: str | None = None, threads: int = 1) -> Stages:
    """The accuracy of every stage on the way from a large network to a small file, on the same samples.

    Args:
        models: name -> Keras model, or path or bytes of a .tflite file, in the order of the work.
        x, y, output, threads: as in `accuracy`.

    Raises:
        ValueError, TypeError: as in `accuracy`, with the stage's name in front.

    Example:
        >>> print(stages({"float": model, "pruned": small, "int8": "small.tflite"}, x_test, y_test))  # doctest: +SKIP
    """
    if not isinstance(models, Mapping) or not models:
        raise TypeError(f"{type(models).__name__} was passed; expected a dict: name of the stage -> model or file.")
    rows = []
    for name, model in models.items():
        try:
            right = accuracy(model, x, y, output=output, threads=threads)
        except (ValueError, TypeError) as error:
            raise type(error)(f"Stage {name!r}: {error}") from error
        rows.append(Stage(name, right, right - (rows[0].accuracy if rows else right), *_size(model)))
    count, first = int(np.asarray(y).shape[0]), rows[0].accuracy
    return Stages(tuple(rows), count, float(np.sqrt(first * (1 - first) / count)))


def _size(model) -> tuple[int, int | None, float | None]:
    if isinstance(model, bytes):
        return len(model), None, None
    if isinstance(model, (str, os.PathLike)):
        return os.path.getsize(model), None, None
    weights = [weight.value.numpy() for weight in model.weights if "seed" not in weight.path]
    count = sum(values.size for values in weights)
    zeros = sum(values.size - np.count_nonzero(values) for values in weights)
    return sum(values.nbytes for values in weights), count, zeros / max(count, 1)


def _file_scores(model, x: Data, output: str | None, threads: int) -> tuple[np.ndarray, str]:
    runner = Runner(model, threads)
    arrays = _arrays(x, [port.name for port in runner.inputs], runner)
    at = _output_at([port.name for port in runner.outputs], output, runner.source)
    return runner.run(arrays)[at], runner.source


def _arrays(x: Data, names: list[str], runner: Runner) -> list[np.ndarray]:
    """The samples as one array per input of a file."""
    inputs = [Input(port.name, port.shape[1:], "float32" if port.scale else port.dtype) for port in runner.inputs]
    if len(inputs) > 1 and not isinstance(x, dict):
        raise ValueError(f"{runner.source} has the inputs {names}; pass x as a dict with an array for each name.")
    return collect(x, inputs, _ALL)


def _keras_scores(model, x: Data, output: str | None, threads: int) -> tuple[np.ndarray, str]:
    import keras

    check_model(model)
    at = _output_at(output_names(model), output, f"the model {model.name!r}")
    arrays = collect(x, model_inputs(model, _shapes(model, x)), _ALL)
    structure, samples = getattr(model, "_inputs_struct", None), len(arrays[0])
    size, found = model.inputs[0].shape[0] or _BATCH, []
    for start in range(0, samples, size):
        # A model of a fixed batch size gets its last batch filled up.
        rows = np.arange(start, start + size) % samples if model.inputs[0].shape[0] else slice(start, start + size)
        batch = [keras.ops.convert_to_tensor(array[rows]) for array in arrays]
        packed = batch[0] if structure is None else keras.tree.pack_sequence_as(structure, batch)
        values = keras.tree.flatten(model(packed, training=False))[at]
        found.append(keras.ops.convert_to_numpy(values)[: samples - start])
    return np.concatenate(found), f"the model {model.name!r}"


def _shapes(model, x: Data) -> dict | None:
    """Sizes that the model leaves open, from the samples."""
    if all(None not in tensor.shape[1:] for tensor in model.inputs):
        return None
    arrays = x if isinstance(x, dict) else {input_names(model)[0]: x}
    return {name: tuple(np.shape(values)[1:]) for name, values in arrays.items() if hasattr(values, "shape")}


def _output_at(names: list[str], output: str | None, source: str) -> int:
    if output in names:
        return names.index(output)
    if output is None and len(names) == 1:
        return 0
    raise ValueError(f"output={output!r} was passed; {source} has the outputs {names}: say output= with one of these.")


def _labels(y, samples: int, classes: int) -> np.ndarray:
    labels = np.asarray(y)
    shape = labels.shape
    if shape == (samples, classes):
        if not ((labels == 1).sum(-1) == 1).all() or not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                "Labels of one row per sample were passed that are not one-hot; expected a single 1 in each."
            )
        return labels.argmax(-1)
    if shape not in ((samples,), (samples, 1)):
        raise ValueError(
            f"Labels of shape {shape} were passed for {samples} samples and {classes} classes; expected class indices "
            f"({samples},) or one-hot rows ({samples}, {classes})."
        )
    labels = labels.reshape(samples)
    if labels.dtype.kind not in "iuf" or (labels != np.round(labels.astype("float64"))).any():
        raise ValueError(f"Labels of dtype {labels.dtype} were passed; expected whole numbers.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"Labels from {labels.min()} to {labels.max()} were passed; there are {classes} classes: expected 0 to "
            f"{classes - 1}."
        )
    return labels.astype("int64")
