"""Floor 3. `export`: convert, write, compare with Keras and time. `check`: what is in a file, and is it sound."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from tflite_export.convert import Converted, calibration, check_batch_size, checked_names, converted, in_float32
from tflite_export.devices import Device, Fit
from tflite_export.devices import get as get_device
from tflite_export.inputs import Data, check_model, model_inputs
from tflite_export.latency import Latency, benchmark, measure_latency
from tflite_export.parity import DifferentModel, Parity, compare
from tflite_export.recipes import RECIPES, Recipe, get
from tflite_export.records import Record, aligned, size_text, versions
from tflite_export.runner import Port, Runner, check_threads, first_line, read
from tflite_export.writing import replacing

PARITY_SAMPLES = 64


@dataclass(frozen=True)
class Report(Record):
    """What `export` wrote and measured. Prints itself; `to_json()` gives all fields.

    Attributes:
        path: of the file.
        bytes: its size.
        recipe: its recipe's name.
        tolerance: the recipe's; `parity.relative_error` should not exceed it.
        operators: name -> count, of the file itself.
        inputs, outputs: a Port each, in the file's order.
        parity: with Keras; in float32 if the model computes in less. None for a file with Flex operators, which the
            runtime of this package does not run.
        latency: on this machine; None if runs=0 and for a file with Flex operators.
        notes: what the user should know, one sentence each.
        versions: package -> version.
        device: how the file fits the device that was asked for; None if none was.
    """

    path: str
    bytes: int
    recipe: str
    tolerance: float
    operators: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parity: Parity | None
    latency: Latency | None
    notes: tuple[str, ...]
    versions: dict[str, str]
    device: Fit | None = None

    @property
    def within_tolerance(self) -> bool:
        """Whether parity was measured and is as near as the recipe promises."""
        return self.parity is not None and self.parity.relative_error <= self.tolerance

    def __str__(self) -> str:
        rows = [("file", self.path), ("recipe", self.recipe), ("size", size_text(self.bytes))]
        rows += _content_rows(self.operators, self.inputs, self.outputs)
        if self.parity:
            verdict = "within" if self.within_tolerance else "OUTSIDE"
            error = f"relative error {self.parity.relative_error:.3g}"
            rows.append(("tolerance", f"{error} is {verdict} the recipe's {self.tolerance:g}"))
        rows += [("note", note) for note in self.notes]
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())))
        return "\n".join([aligned(rows)] + [str(part) for part in (self.parity, self.latency, self.device) if part])


@dataclass(frozen=True)
class Check(Record):
    """What `check` found in a file. Prints itself; `to_json()` gives all fields.

    Attributes:
        path, bytes: of the file.
        problems: one sentence each; empty if the file is sound.
        recipe: from the file's description if this package wrote it, else "".
        operators: name -> count; empty if the file does not load.
        flex, custom: those that need TensorFlow's kernels, and those that need kernels of somebody else.
        inputs, outputs: a Port each, in the file's order.
        quantised: "inputs and outputs", "inputs", "outputs" or "none": which are integers with a scale.
        runtime: name and version of the interpreter that loaded the file; "" if none could.
        parity: with the Keras model, if one was passed.
        tolerance: what `parity.relative_error` was held against; None without a model.
        device: how the file fits the device that was asked for; None if none was.
    """

    path: str
    bytes: int
    problems: tuple[str, ...]
    recipe: str = ""
    operators: dict[str, int] | None = None
    flex: tuple[str, ...] = ()
    custom: tuple[str, ...] = ()
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    quantised: str = "none"
    runtime: str = ""
    parity: Parity | None = None
    tolerance: float | None = None
    device: Fit | None = None

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        rows = [("file", self.path), ("size", size_text(self.bytes))]
        if self.operators is not None:
            rows += [("recipe", self.recipe or "unknown (not written by tflite_export)")]
            rows += _content_rows(self.operators, self.inputs, self.outputs)
            rows += [("quantised", self.quantised), ("runtime", self.runtime)]
        lines = [aligned(rows)] + [str(part) for part in (self.parity, self.device) if part]
        lines += [f"problem: {problem}" for problem in self.problems] or ["ok"]
        return "\n".join(lines)


def export(
    model,
    path: str | os.PathLike,
    recipe: str | Recipe = "float32",
    data: Data | None = None,
    *,
    input_shape=None,
    batch_size: int = 1,
    float_io: bool = False,
    allow_flex: bool = False,
    samples: int = 200,
    keep_float: Iterable[str] = (),
    sparse: bool = False,
    threads: int = 1,
    runs: int = 50,
    device: str | Device | None = None,
) -> Report:
    """Writes a Keras model as a .tflite file and measures it.

    The model is not changed. The file takes its name only when it is whole and has been run: if anything fails, a file
    that stood there before still does.

    Args:
        model: a built Functional or Sequential Keras 3 model, on the TensorFlow backend.
        path: ends in ".tflite"; its folder exists.
        recipe: "float32", "float16", "dynamic_int8", "int8", "int16x8", "weight_only_int8", or a Recipe.
        data: typical samples, preprocessed as in training: they calibrate the recipes int8 and int16x8 (which need
            them) and are the inputs of the parity measurement. An array (samples, ...), a list of arrays in the order
            of `model.inputs`, a dict name -> array, a tf.data.Dataset, or an iterable of batches; labels in (x, y) are
            ignored.
        input_shape: of one sample, where the model leaves sizes open: a tuple; for several inputs a list, or a dict
            by name.
        batch_size: samples per invocation of the file; it is fixed in the file.
        float_io: keep float32 inputs and outputs with int8 and int16x8.
        allow_flex: let the file use TensorFlow operators that the format lacks; it then needs a runtime with Flex.
        samples: how many samples of `data` calibrate at most; the first 64 of them (or 64 generated ones) measure
            parity.
        keep_float: names of layers that stay in float32 in an otherwise quantised file, or patterns like "block_*"; a
            layer inside a nested model is called "inner/conv". `search_float` finds the layers that need it. Goes
            through ai-edge-quantizer (an extra).
        sparse: store the zeros of pruned weights in the format's sparsity encoding, where that makes the file smaller;
            for float32 and float16. The file is unpacked when it is loaded: it is smaller, not faster.
        threads: CPU threads for the latency.
        runs: timed invocations; 0 leaves the latency out.
        device: what the file is meant for: a name in `tflite_export.DEVICES`, such as "ethos-u55-128", or a Device.
            The report then says how the file fits it; a file that the device cannot run is an error.

    Raises:
        ValueError, TypeError: what was passed cannot be exported, or the device cannot run the file; the message says
            how to mend it. Nothing was written.
        FileNotFoundError, PermissionError, OSError: the path cannot be written. Nothing was converted.
        ImportError: the recipe, or keep_float, needs ai-edge-quantizer, or the device its compiler, which is not
            installed. Nothing was written.
        RuntimeError: the converter failed for a reason unknown to this package. Nothing was written.

    Example:
        >>> report = export(model, "small.tflite", recipe="int8", data=x_train[:200])      # doctest: +SKIP
        >>> report.bytes, report.parity.outputs[0].top1_agreement                          # doctest: +SKIP
        (183512, 0.98)
    """
    recipe = get(recipe)
    target = None if device is None else get_device(device)
    check_model(model)
    check_threads(threads)
    check_batch_size(model, batch_size)
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 0:
        raise ValueError(f"runs={runs!r} was passed; expected a whole number; 0 leaves the latency out.")
    with replacing(path) as file:
        plain = in_float32(model)
        arrays = calibration(recipe, data, model_inputs(plain, input_shape), samples)
        options = dict(input_shape=input_shape, batch_size=batch_size, float_io=float_io, allow_flex=allow_flex)
        made = converted(
            plain, recipe, arrays, **options, samples=samples, keep_float=checked_names(keep_float), sparse=sparse
        )
        fit = None if target is None else _fitting(target, made.content)
        runner = Runner(made.content, threads)
        parity = latency = None
        if not _flex(runner):
            parity = compare(plain, runner, arrays, input_shape=input_shape, samples=PARITY_SAMPLES)
            latency = measure_latency(runner, runs=runs) if runs else None
        notes = _notes(model, plain, runner, recipe, len(arrays[0]) if arrays else 0)
        notes += made.notes + _sparse_note(made, threads, runs)
        file.write(made.content)
    known = versions("keras", "tensorflow", "ai-edge-litert", "ai-edge-quantizer", "numpy")
    measured = {"parity": parity, "latency": latency, "notes": notes, "versions": known, "device": fit}
    named = {"path": os.fspath(path), "recipe": recipe.name, "tolerance": recipe.tolerance}
    return Report(**named, **_contents(runner), **measured)


def check(
    path: str | os.PathLike,
    model=None,
    data: Data | None = None,
    *,
    tolerance: float | None = None,
    allow_flex: bool = False,
    samples: int = PARITY_SAMPLES,
    threads: int = 1,
    device: str | Device | None = None,
) -> Check:
    """Looks into a .tflite file, whoever made it: does it run, what is in it, does it compute what Keras computes.

    A file that is damaged or does not fit is no exception but a result, with `ok` False and the reason in `problems`.

    Args:
        path: of the file.
        model: a Keras model to compare with; needs TensorFlow, which the rest of this function does not.
        data: samples for the comparison; generated if None.
        tolerance: largest `parity.relative_error` that counts as equal. By default that of the recipe the file names,
            and for files of other exporters that of "float32", or of "int8" if the file holds quantised numbers.
        allow_flex: do not count Flex operators as a problem.
        samples: largest number of samples compared.
        threads: CPU threads.
        device: what the file is meant for; what keeps it from running there is a problem.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
        ValueError, TypeError: bad arguments, model or data.
        ImportError: the device's compiler or runtime is not installed.

    Example:
        >>> check("small.tflite").problems                         # doctest: +SKIP
        ()
    """
    check_threads(threads)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} was passed; expected a number from 0: largest error / peak.")
    target = None if device is None else get_device(device)
    if model is not None:
        check_model(model)
    content = read(os.fspath(path))
    try:
        runner = Runner(os.fspath(path), threads)
    except ValueError as error:
        return Check(os.fspath(path), len(content), (str(error),))
    flex = _flex(runner)
    recipe, parity = _recipe_named(runner.description), None
    problems = _troubles(runner, flex, allow_flex, model is not None)
    if model is not None:
        integers = any("QUANTIZE" in name for name in runner.operators) or _quantised(runner) != "none"
        tolerance = get(recipe or ("int8" if integers else "float32")).tolerance if tolerance is None else tolerance
        try:
            parity = None if problems else compare(model, runner, data, samples=samples)
        except DifferentModel as error:
            problems.append(str(error))
        if parity and not parity.relative_error <= tolerance:
            problems.append(f"relative error {parity.relative_error:.3g} against Keras exceeds {tolerance:g}")
    fit = None if target is None else target.examine(content)
    problems += [f"{fit.device}: {problem}" for problem in fit.problems] if fit else []
    return Check(
        path=os.fspath(path),
        problems=tuple(problems),
        recipe=recipe,
        **_contents(runner),
        flex=flex,
        custom=tuple(name for name in runner.operators if name.startswith("CUSTOM:") and name not in flex),
        quantised=_quantised(runner),
        runtime=runner.runtime,
        parity=parity,
        tolerance=None if model is None else tolerance,
        device=fit,
    )


def _fitting(device: Device, content: bytes) -> Fit:
    fit = device.examine(content)
    if not fit.runs:
        raise ValueError(f"The file was not written: {fit.device} cannot run it. {' '.join(fit.problems)}")
    return fit


def _troubles(runner: Runner, flex: tuple[str, ...], allow_flex: bool, with_model: bool) -> list[str]:
    """What keeps the file from running here, one sentence each."""
    if not flex:
        try:
            runner.set(runner.random_inputs())
            runner.interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            return [first_line(error)]
        return []
    problems = [] if allow_flex else [f"runs only where TensorFlow's kernels are linked in: {', '.join(flex)}"]
    return problems + ["was not compared with the model: the runtime used here has no Flex"] * with_model


def _contents(runner: Runner) -> dict:
    fields = {"operators": runner.operators, "inputs": runner.inputs, "outputs": runner.outputs}
    return {"bytes": len(runner.content), **fields}


def _quantised(runner: Runner) -> str:
    sides = {"inputs": runner.inputs, "outputs": runner.outputs}
    return " and ".join(name for name, ports in sides.items() if any(port.scale for port in ports)) or "none"


def _content_rows(
    operators: dict[str, int], inputs: tuple[Port, ...], outputs: tuple[Port, ...]
) -> list[tuple[str, str]]:
    rows = [
        (
            "operators",
            f"{sum(operators.values())}: " + ", ".join(f"{name} {count}" for name, count in operators.items()),
        )
    ]
    rows += [("input", str(port)) for port in inputs]
    return rows + [("output", str(port)) for port in outputs]


def _flex(runner: Runner) -> tuple[str, ...]:
    return tuple(name for name in runner.operators if name.startswith("CUSTOM:Flex"))


def _recipe_named(description: str) -> str:
    words = dict(word.split("=", 1) for word in description.split() if "=" in word)
    name = words.get("recipe", "")
    return name if "tflite_export" in description and name in RECIPES else ""


def _notes(model, plain, runner: Runner, recipe: Recipe, samples: int) -> tuple[str, ...]:
    notes = []
    if plain is not model:
        notes.append(
            "The model computes in 16-bit floats; the file, and the Keras it is compared with, compute in float32."
        )
    if _flex(runner):
        notes.append(
            "The file runs only where TensorFlow's kernels (Flex) are linked in; it was not run, compared or timed."
        )
    if recipe.needs_data and samples < 100:
        notes.append(f"Calibrated on {samples} samples; about 100 to 500 are usual.")
    return tuple(notes)


def _sparse_note(made: Converted, threads: int, runs: int) -> tuple[str, ...]:
    """What the sparsity encoding brought, beside the same file without it."""
    if made.dense is None:
        return ()
    text = f"Zeros are stored in the sparsity encoding: {len(made.content)} bytes, {len(made.dense)} without it"
    if not runs:
        return (f"{text}. The runtime unpacks them when it loads the file: no less memory, no gain in speed.",)
    both = benchmark(made.dense, made.content, threads=threads, runs=runs)
    return (
        f"{text}. The runtime unpacks them when it loads the file: no less memory, and the time is {both.ratio:.2f} of "
        f"the dense file's {both.a.median:.3f} ms.",
    )
