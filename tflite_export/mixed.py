"""Floor 5. Which layers lose most when they are quantised, and the few that should stay in float32."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tflite_export import quantizer
from tflite_export.convert import batches, calibration, check_batch_size, float_file, in_float32
from tflite_export.inputs import Data, check_model, generate, model_inputs
from tflite_export.recipes import Recipe, get
from tflite_export.records import Record
from tflite_export.runner import Runner

STANDS_OUT = 0.5
"""Kept layers have to bring the error down to this, times what as many layers of a network of equal layers would."""


@dataclass(frozen=True)
class LayerError(Record):
    """What quantising one layer alone does to the network.

    Attributes:
        layer: its path: "conv", or "inner/conv" inside a nested model.
        error: RMS difference of the outputs to the float file's, divided by the RMS of the float file's outputs; the
            largest of all outputs.
        operators: what the layer is in the file: "CONV_2D", "MEAN", ...
        fused: other layers in the same operators (BatchNormalization, an activation).
    """

    layer: str
    error: float
    operators: tuple[str, ...]
    fused: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity(Record):
    """What `sensitive_layers` measured. Prints itself as a table.

    Attributes:
        layers: a LayerError each, the one that hurts most first.
        error: with all layers quantised, measured in the same way.
        recipe: name.
        samples: how many inputs the errors were measured on.
    """

    layers: tuple[LayerError, ...]
    error: float
    recipe: str
    samples: int

    def __str__(self) -> str:
        rows = [("layer quantised alone", "error", "share", "operators")]
        whole = sum(each.error**2 for each in self.layers) or 1.0
        for each in self.layers:
            share = f"{100 * each.error**2 / whole:.0f} %"
            rows.append((each.layer, f"{each.error:.3g}", share, ", ".join(each.operators)))
        widths = [max(len(row[at]) for row in rows) for at in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
        return "\n".join([*lines, f"all of them, {self.recipe}: error {self.error:.3g} on {self.samples} samples"])


@dataclass(frozen=True)
class FloatSearch(Record):
    """The layers that `search_float` keeps. Iterating over it gives their names, so `keep_float=` takes it as it is.

    Attributes:
        layers: paths of the layers to keep in float32, the worst first; empty if none stands out.
        errors: of the file with the 0, 1, 2, ... worst layers in float32, as far as was measured.
        reason: one sentence: why these.
        sensitivity: the ranking.
    """

    layers: tuple[str, ...]
    errors: tuple[float, ...]
    reason: str
    sensitivity: Sensitivity

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __str__(self) -> str:
        steps = [f"{count} kept in float32: error {error:.3g}" for count, error in enumerate(self.errors)]
        kept = ", ".join(self.layers) or "nothing"
        return "\n".join([str(self.sensitivity), *steps, f"keep_float: {kept}", self.reason])


def sensitive_layers(
    model,
    data: Data | None = None,
    recipe: str | Recipe = "int8",
    *,
    input_shape=None,
    batch_size: int = 1,
    samples: int = 200,
    measured: int = 32,
    progress: bool = True,
) -> Sensitivity:
    """Ranks the layers by what quantising them does to the network's outputs.

    One layer at a time is quantised, with everything else in float32. The other way round, one layer in float32 and
    the rest quantised, hides all bad layers but the last behind each other. The network is traced and calibrated
    once; per layer the file is quantised anew (some 10 ms for a small network) and run on `measured` samples.

    Args:
        model, data, recipe, input_shape, batch_size, samples: as in `export`. Recipes with int8 weights only.
        measured: largest number of samples that the errors are measured on: of `data`, or generated ones.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError, TypeError: as in `export`.
        ImportError: ai-edge-quantizer is not installed.

    Example:
        >>> print(sensitive_layers(model, x_train[:200]))          # doctest: +SKIP
    """
    return _Bench(model, data, recipe, input_shape, batch_size, samples, measured).ranking(progress)


def search_float(
    model,
    data: Data | None = None,
    recipe: str | Recipe = "int8",
    *,
    tolerance: float | None = None,
    at_most: int = 3,
    input_shape=None,
    batch_size: int = 1,
    samples: int = 200,
    measured: int = 32,
    progress: bool = True,
) -> FloatSearch:
    """Finds the few layers that should stay in float32.

    The worst layers of `sensitive_layers` are kept, one more at a time, and each such file is run. With `tolerance`
    the first file that meets it is taken. Without, layers are kept only if they stand out: the error has to fall to
    half of what it would with as many layers of a network whose layers all are equally bad.

    Args:
        tolerance: error (as in LayerError) that the file should have.
        at_most: largest number of layers kept.
        model, data, recipe, input_shape, batch_size, samples, measured, progress: as in `sensitive_layers`.

    Returns:
        A FloatSearch, which `export(..., keep_float=...)` takes. Empty if no layer stands out.

    Raises:
        ValueError, TypeError, ImportError: as in `sensitive_layers`.

    Example:
        >>> found = search_float(model, images)                    # doctest: +SKIP
        >>> export(model, "small.tflite", "int8", images, keep_float=found)     # doctest: +SKIP
    """
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance={tolerance!r} was passed; expected a positive number: RMS error / RMS output.")
    if not isinstance(at_most, int) or isinstance(at_most, bool) or at_most < 1:
        raise ValueError(f"at_most={at_most!r} was passed; expected a whole number of layers from 1.")
    bench = _Bench(model, data, recipe, input_shape, batch_size, samples, measured)
    ranking = bench.ranking(progress)
    names, errors = [each.layer for each in ranking.layers], [ranking.error]
    for count in range(1, min(at_most, len(names)) + 1):
        if tolerance is not None and errors[-1] <= tolerance:
            break
        errors.append(bench.error(keep=bench.places(names[:count])))
    kept, reason = _within(errors, tolerance) if tolerance is not None else _outstanding(errors, len(names))
    return FloatSearch(tuple(names[:kept]), tuple(errors), reason, ranking)


def _within(errors: list[float], tolerance: float) -> tuple[int, str]:
    if errors[-1] <= tolerance:
        kept = len(errors) - 1
        return kept, f"error {errors[kept]:.3g} is within the tolerance {tolerance:g}."
    kept = int(np.argmin(errors))
    return kept, f"The tolerance {tolerance:g} was not reached: the best is {errors[kept]:.3g}; raise at_most."


def _outstanding(errors: list[float], layers: int) -> tuple[int, str]:
    for count, error in enumerate(errors):
        if 0 < count < layers and error <= STANDS_OUT * errors[0] * np.sqrt(1 - count / layers):
            return count, f"The error falls from {errors[0]:.3g} to {error:.3g}."
    return 0, "No layer stands out: the error is spread over many, so keeping a few in float32 brings little."


class _Bench:
    """A network traced and calibrated once, of which many quantised versions are run on the same inputs."""

    def __init__(self, model, data, recipe, input_shape, batch_size: int, samples: int, measured: int):
        self.recipe = get(recipe)
        check_model(model)
        check_batch_size(model, batch_size)
        if not self.recipe.activations:
            raise ValueError(
                f"recipe={self.recipe.name!r} was passed; expected one with int8 weights: int8, int16x8, dynamic_int8, "
                "weight_only_int8."
            )
        quantizer.check_installed()
        model = in_float32(model)
        inputs = model_inputs(model, input_shape)
        arrays = calibration(self.recipe, data, inputs, samples)
        self.file = float_file(model, inputs, batch_size, "recipe=float32", self.recipe)
        needed = self.recipe.needs_data
        self.ranges = quantizer.calibrate(self.file.content, batches(arrays, batch_size)) if needed else None
        self.inputs = [array[:measured] for array in arrays or generate(inputs, measured)]
        self.expected = [values.astype("float64") for values in Runner(self.file.content).run(self.inputs)]

    def places(self, layers: list[str]) -> tuple[int, ...]:
        return self.file.places(layers)

    def error(self, **chosen) -> float:
        """The RMS error of the file in which `keep` stays in float32, or in which `only` is quantised."""
        # Inputs and outputs stay floats: rounding them is no layer's doing.
        content = quantizer.quantize(self.file.content, self.recipe.activations, self.ranges, float_io=True, **chosen)
        got = Runner(content).run(self.inputs)
        errors = [
            np.sqrt(np.mean((values - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-12)
            for values, wanted in zip(got, self.expected, strict=True)
        ]
        return float(max(errors))

    def ranking(self, progress: bool) -> Sensitivity:
        from rich.console import Console
        from rich.progress import track

        listed = quantizer.operators(self.file.content)
        named: dict[tuple[int, ...], list[str]] = {}
        for path in self.file.paths:  # in the model's order: a convolution comes before what is fused into it
            places = self.file.layers.get(path, ())
            # A nested model is the sum of its layers, which stand for themselves.
            if places and not any(other.startswith(f"{path}/") for other in self.file.layers):
                named.setdefault(places, []).append(path)
        console = Console(stderr=True)
        shown = track(
            named.items(), "quantising layer by layer", console=console, transient=True,
            disable=not progress or not console.is_terminal,
        )  # fmt: skip
        found = [
            LayerError(
                names[0], self.error(only=places), tuple(listed[place].name for place in places), tuple(names[1:])
            )
            for places, names in shown
        ]
        # Layers whose operators ai-edge-quantizer leaves alone have the error 0, and no place in the table.
        ranked = sorted((each for each in found if each.error > 0), key=lambda each: -each.error)
        return Sensitivity(tuple(ranked), self.error(), self.recipe.name, len(self.inputs[0]))
