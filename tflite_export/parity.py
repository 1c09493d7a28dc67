"""Floor 2. The same inputs through Keras and through the file, and how far the outputs are apart."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tflite_export.convert import in_float32
from tflite_export.inputs import Data, check_model, collect, generate, input_names, model_inputs, output_names
from tflite_export.records import Record, aligned
from tflite_export.runner import Port, Runner


class DifferentModel(ValueError):
    """A file and a Keras model that do not have the same inputs and outputs."""


@dataclass(frozen=True)
class OutputParity(Record):
    """How one output of the file differs from Keras's.

    Attributes:
        name: of the output.
        max_error, mean_error: largest and mean absolute difference, in the output's own units.
        peak: largest absolute number that Keras computed for this output.
        relative_error: max_error / peak; this is what a recipe's tolerance bounds. Of a quantised output, half a step
            is
            taken off max_error first: no file with that step can be nearer (a softmax over 1000 classes often stays
                below it).
        scale: the step of the file's integers, if this output is quantised.
        max_steps, mean_steps: the errors in units of `scale`.
        top1_agreement: fraction of samples with the same largest entry, for an output (samples, classes).
    """

    name: str
    max_error: float
    mean_error: float
    peak: float
    relative_error: float
    scale: float | None
    max_steps: float | None
    mean_steps: float | None
    top1_agreement: float | None

    def __str__(self) -> str:
        text = f"max error {self.max_error:.3g}, mean {self.mean_error:.3g}, relative {self.relative_error:.3g}"
        if self.scale is not None:
            text += f"; in output steps: max {self.max_steps:.2f}, mean {self.mean_steps:.2f}"
        if self.top1_agreement is not None:
            text += f"; top-1 agreement {100 * self.top1_agreement:.1f} %"
        return text


@dataclass(frozen=True)
class Parity(Record):
    """How a file's outputs differ from Keras's.

    Attributes:
        outputs: one OutputParity per output, in the model's order.
        samples: how many were compared.
        inputs: "given" (the caller's data) or "generated" (normal numbers; indices below the vocabulary).
        matched_by: how the model's inputs and outputs were found in the file: "name", "shape" or "order".
    """

    outputs: tuple[OutputParity, ...]
    samples: int
    inputs: str
    matched_by: str

    @property
    def relative_error(self) -> float:
        """The largest of all outputs."""
        return max(output.relative_error for output in self.outputs)

    def __str__(self) -> str:
        head = [("parity", f"{self.samples} {self.inputs} samples, outputs matched by {self.matched_by}")]
        return aligned(head + [(f"  {output.name}", str(output)) for output in self.outputs])


def compare(
    model,
    file: str | os.PathLike | bytes | Runner,
    data: Data | None = None,
    *,
    input_shape=None,
    samples: int = 64,
    threads: int = 1,
) -> Parity:
    """Runs the same inputs through a Keras model (training=False) and a .tflite file.

    A model that computes in float16 or bfloat16 is compared in float32, with the same weights: see `in_float32`.

    Args:
        model: a built Keras model.
        file: path, bytes or Runner of the .tflite file; whoever made it.
        data: samples, as in `export`; None generates them from a fixed seed.
        input_shape: for open sizes of the model; by default the file's own.
        samples: largest number of samples.
        threads: of the interpreter.

    Raises:
        DifferentModel (a ValueError): file and model do not have the same inputs and outputs.
        ValueError, TypeError: bad model, file or data.

    Example:
        >>> compare(model, "small.tflite").relative_error           # doctest: +SKIP
        3.1e-07
    """
    check_model(model)
    model = in_float32(model)
    runner = file if isinstance(file, Runner) else Runner(file, threads)
    names = input_names(model)
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    order_in, by_in = _matched("inputs", names, shapes, runner.inputs, runner.source)
    if input_shape is None:
        input_shape = {name: runner.inputs[at].shape[1:] for name, at in zip(names, order_in, strict=True)}
    inputs = model_inputs(model, input_shape)
    arrays = generate(inputs, samples) if data is None else collect(data, inputs, samples)
    expected = reference(model, arrays)
    shapes = [(None, *array.shape[1:]) for array in expected]
    order_out, by_out = _matched("outputs", output_names(model), shapes, runner.outputs, runner.source)
    placed = [arrays[order_in.index(at)] for at in range(len(order_in))]
    got = runner.run(placed)
    outputs = tuple(
        difference(name, values, got[at], runner.outputs[at])
        for name, values, at in zip(output_names(model), expected, order_out, strict=True)
    )
    matched_by = max(by_in, by_out, key=["name", "shape", "order"].index)
    return Parity(outputs, len(arrays[0]), "generated" if data is None else "given", matched_by)


def reference(model, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What Keras computes: one array (samples, ...) per output. `model.predict` would leave its traces in the model."""
    import keras

    structure = getattr(model, "_inputs_struct", None)
    fixed = model.inputs[0].shape[0]
    size, samples = fixed or 32, len(arrays[0])
    batches = []
    for start in range(0, samples, size):
        rows = np.arange(start, start + size) % samples if fixed else np.arange(start, min(start + size, samples))
        batch = [keras.ops.convert_to_tensor(array[rows]) for array in arrays]
        packed = batch[0] if structure is None else keras.tree.pack_sequence_as(structure, batch)
        outputs = keras.tree.flatten(model(packed, training=False))
        for name, output in zip(output_names(model), outputs, strict=True):
            if tuple(output.shape)[:1] != (len(rows),):
                raise ValueError(
                    f"The output {name!r} has the shape {tuple(output.shape)} for {len(rows)} samples; expected one "
                    "entry per sample. Keep the batch axis in front: reduce with keepdims=True, or over the other "
                    "axes only."
                )
        batches.append([output.numpy()[: samples - start] for output in outputs])
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def difference(name: str, expected: np.ndarray, got: np.ndarray, port: Port) -> OutputParity:
    """Compares one output, both arrays (samples, ...)."""
    top1 = None
    if expected.ndim == 2 and expected.shape[1] >= 2:
        top1 = float(np.mean(expected.argmax(-1) == got.argmax(-1)))
    expected, got = expected.astype("float64"), got.astype("float64")
    with np.errstate(invalid="ignore"):
        errors = np.abs(expected - got)
    # The same infinity on both sides is no difference; a NaN on one side is an infinite one.
    errors = np.where((expected == got) | (np.isnan(expected) & np.isnan(got)), 0.0, errors)
    errors = np.where(np.isnan(errors), np.inf, errors)
    largest, mean = float(errors.max(initial=0.0)), float(errors.mean())
    peak = float(np.abs(np.nan_to_num(expected)).max(initial=0.0))
    scale = port.scale
    beyond = max(0.0, largest - (scale or 0.0) / 2)
    relative = beyond / peak if peak else (0.0 if beyond == 0.0 else float("inf"))
    steps = (None, None) if scale is None else (largest / scale, mean / scale)
    return OutputParity(name, largest, mean, peak, relative, scale, *steps, top1)


def _matched(
    what: str, names: list[str], shapes: list[tuple], ports: Sequence[Port], source: str
) -> tuple[list[int], str]:
    """For each of the model's inputs (or outputs) its place in the file, and how it was found.

    The converter changes the order, and other exporters change names: Keras's own calls outputs "output_0", "output_1".
    """
    listed = ", ".join(map(str, ports))
    if len(names) != len(ports):
        raise DifferentModel(f"The model has the {what} {names}; {source} has: {listed}. They are not the same model.")
    fits = [[_fits(shape, port.shape) for port in ports] for shape in shapes]
    numbers = [re.fullmatch(r"output_(\d+)", port.name) for port in ports]
    found = [port.name for port in ports]
    if sorted(found) == sorted(names):
        order, by = [found.index(name) for name in names], "name"
    elif what == "outputs" and all(numbers) and len(set(found)) == len(found):
        order, by = sorted(range(len(ports)), key=lambda at: int(numbers[at][1])), "name"
    elif all(sum(row) == 1 for row in fits) and len({row.index(True) for row in fits}) == len(ports):
        order, by = [row.index(True) for row in fits], "shape"
    else:
        order, by = list(range(len(ports))), "order"
    wrong = [(names[at], shapes[at]) for at, place in enumerate(order) if not fits[at][place]]
    if wrong:
        raise DifferentModel(
            f"The model's {what} {wrong} do not fit {source}, which has: {listed}. They are not the same model."
        )
    return order, by


def _fits(shape: tuple, other: tuple) -> bool:
    return len(shape) == len(other) and all(
        a in (None, b) or b == -1 for a, b in zip(shape[1:], other[1:], strict=True)
    )
