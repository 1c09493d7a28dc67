"""`qat`: check, write the data to files, start the child process, measure what came back."""

import importlib.util
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from tflite_export import flatbuffer
from tflite_export.convert import in_float32
from tflite_export.inputs import Data, check_model, input_names, model_inputs, output_names
from tflite_export.latency import measure_latency
from tflite_export.parity import OutputParity, difference, reference
from tflite_export.quantaware import batches
from tflite_export.quantaware.goals import Task, described_optimizer
from tflite_export.quantaware.process import run
from tflite_export.quantaware.report import QatReport
from tflite_export.quantizer import float_operators
from tflite_export.records import versions
from tflite_export.runner import Runner, check_threads
from tflite_export.writing import replacing

PARITY_SAMPLES = 64


def qat(
    model,
    data: Data,
    path: str | os.PathLike,
    *,
    epochs: int = 1,
    learning_rate: float | None = None,
    optimizer="adam",
    loss=None,
    validation: Data | None = None,
    batch_size: int | None = None,
    calibration_batches: int = 16,
    train_batchnorm: bool = False,
    through: str = "tfmot",
    float_io: bool = False,
    seed: int = 0,
    threads: int = 1,
    runs: int = 0,
    max_bytes: int = batches.MAX_BYTES,
    verbose: bool = True,
) -> QatReport:
    """Trains a Keras 3 model on fake quantization and writes it as an int8 .tflite file.

    Rounding to int8 is part of the training, so the weights learn to live with it. Strip first, then quantise. The
    work is done by tensorflow-model-optimization (extra `[tfmot]`), which needs Keras 2 and sets a switch for its
    whole process: it runs in a process of its own. The model that was passed is not changed. The file takes its name
    only when it is whole and has been run.

    Args:
        model: a built Functional or Sequential Keras 3 model, trained.
        data: what it is trained on: (x, y) of arrays, or a tf.data.Dataset, PyDataset or iterable of batches (x, y) or
            (x, y, sample weights). It is written to temporary files once, one batch in memory at a time, and shuffled
            anew over all samples in each epoch: random augmentation inside a dataset is drawn once
            (`dataset.repeat(3)` with a third of the epochs draws it three times).
        path: ends in ".tflite"; its folder exists.
        epochs: 0 only measures the ranges of activations.
        learning_rate: by default 1e-5, or that of the optimizer that was passed.
        optimizer: name, or a keras.optimizers.Optimizer (its settings cross over, its state does not).
        loss: name, or a keras.losses.Loss, or a list with one for each output. By default that of the compiled model;
            without one, cross-entropy if the labels are classes.
        validation: labelled data for the three accuracies, as `data`.
        batch_size: in training; by default that of the dataset's first batch, for arrays 32.
        calibration_batches: batches that the ranges of activations are measured on before training starts.
        train_batchnorm: train BatchNormalization behind convolutions with the statistics of each batch: for long
            training on all of the data. By default it is folded into the convolution before training, so that the
            statistics stay those of the original training.
        through: "tfmot", or "keras": the same in Keras 3 alone, by its own fake quantization; needs no extra package.
        float_io: float32 inputs and outputs instead of int8.
        seed: of the order of samples.
        threads, runs: of the latency measurement; runs=0 leaves it out.
        max_bytes: on the disk, for the data.
        verbose: show the child's progress, a line every two seconds.

    Returns:
        A QatReport.

    Raises:
        ValueError: a layer that cannot be trained on fake quantization, by name, or bad arguments; nothing was written.
        TypeError: not a Keras model, or a loss or optimizer that cannot cross into another process.
        ModuleNotFoundError: tensorflow-model-optimization or tf-keras is missing.
        RuntimeError: the child process failed for a reason unknown to this package; nothing was written.

    Example:
        >>> report = qat(small, dataset, "small.tflite", validation=(x_test, y_test))     # doctest: +SKIP
        >>> report.float_before, report.int8_file                                         # doctest: +SKIP
        (0.87, 0.87)
    """
    if through not in ("tfmot", "keras"):
        raise ValueError(f"through={through!r} was passed; known: 'keras', 'tfmot'.")
    if through == "tfmot":
        _check_installed()
    check_model(model)
    check_threads(threads)
    plain = in_float32(model)
    _check_layers(plain)
    for name, value, least in (
        ("epochs", epochs, 0),
        ("calibration_batches", calibration_batches, 1),
        ("runs", runs, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} was passed; expected a whole number from {least}.")
    start, seconds = time.perf_counter(), {}
    with replacing(path) as file, tempfile.TemporaryDirectory(prefix="qat-") as folder:
        inputs = model_inputs(plain)
        stored = batches.store(data, folder, "train", inputs, output_names(plain), max_bytes=max_bytes)
        checked = None
        if validation is not None:
            checked = batches.store(validation, folder, "valid", inputs, output_names(plain), max_bytes=max_bytes)
        sample = replace(checked or stored, samples=min(PARITY_SAMPLES, (checked or stored).samples))
        task = Task(plain, loss, *_opened(stored, folder, PARITY_SAMPLES))
        job = {
            "seed": seed,
            "epochs": epochs,
            "batch_size": _batch_size(batch_size, stored),
            "calibration_batches": calibration_batches,
            "float_io": float_io,
            "train_batchnorm": train_batchnorm,
            "through": through,
            "classes": task.measure == "accuracy",
            "loss": task.described(),
            "optimizer": described_optimizer(optimizer, learning_rate),
            "train": batches.to_json(stored),
            "sample": batches.to_json(sample),
            "validation": batches.to_json(checked),
        }
        plain.save(os.path.join(folder, "model.keras"), include_optimizer=False)
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        seconds["store"] = time.perf_counter() - start
        result = run(folder, verbose)
        start = time.perf_counter()
        content = _signed(Path(folder, "model.tflite").read_bytes(), plain, float_io)
        runner = Runner(content, threads)
        parity = _parity(runner, sample, folder, plain)
        scores = _scores(task, plain, runner, checked, folder)
        latency = measure_latency(runner, runs=runs) if runs else None
        file.write(content)
        seconds |= result["seconds"] | {"measure": time.perf_counter() - start}
    return QatReport(
        path=os.fspath(path),
        bytes=len(content),
        measure=task.measure,
        **scores,
        validation_samples=checked.samples if checked else 0,
        parity=parity,
        operators=runner.operators,
        epochs=tuple(result["history"]),
        samples=stored.samples,
        loss=task.text,
        latency=latency,
        seconds=seconds,
        notes=tuple(result["notes"]),
        versions=versions("keras", "tensorflow", "ai-edge-litert", "numpy") | result["versions"],
    )


# -- before -----------------------------------------------------------------------------------------------------------


def _check_installed() -> None:
    """Looks for the packages without importing them: importing tfmot here would change this whole process."""
    missing = [name for name in ("tensorflow_model_optimization", "tf_keras") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"qat needs {' and '.join(missing)}: pip install 'keras_prune[tfmot]'")


def _check_layers(model) -> None:
    for tensor in model.inputs:
        if "float" not in tensor.dtype:
            raise ValueError(
                f"An input of the model is {tensor.dtype}; training on fake quantization takes float32 inputs. Build "
                "the model with keras.Input(..., dtype='float32'): the int8 file takes integers all the same."
            )
    for layer in model._flatten_layers(include_self=False):
        if type(layer).__module__.split(".")[0] != "keras":
            raise ValueError(
                f"The layer {layer.name!r} ({type(layer).__module__}.{type(layer).__name__}) is not one of Keras's "
                "own; tf_keras, which trains on fake quantization, has no equal. Quantise the network after training "
                "instead: tflite_export.export(model, path, 'int8', data)."
            )


def _batch_size(asked: int | None, stored: batches.Stored) -> int:
    if asked is None:
        return min(stored.batch if stored.batch > 1 else 32, stored.samples)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise ValueError(f"batch_size={asked!r} was passed; expected a whole number from 1.")
    return asked


def _opened(stored: batches.Stored, folder: str, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    x, y, _ = stored.open(folder)
    return [np.asarray(each[:count]) for each in x], [np.asarray(each[:count]) for each in y]


# -- after ------------------------------------------------------------------------------------------------------------


def _signed(content: bytes, model, float_io: bool) -> bytes:
    floats = float_operators(content)
    if floats:
        listed = ", ".join(f"{name} {count}" for name, count in dict(floats).items())
        raise ValueError(
            f"Operators of the trained file still compute in float32: {listed}. Such a file is not int8, and was not "
            "written. Quantise the network after training instead: tflite_export.export(model, path, 'int8', data)."
        )
    text = f"recipe=int8 float_io={float_io} by tflite_export qat"
    return flatbuffer.sign(content, input_names(model), output_names(model), text)


def _saved(folder: str, name: str, count: int) -> list[np.ndarray]:
    return [np.load(os.path.join(folder, f"{name}-output{at}.npy")) for at in range(count)]


def _parity(runner: Runner, sample: batches.Stored, folder: str, model) -> tuple[OutputParity, ...]:
    x, _, _ = sample.open(folder)
    expected = _saved(folder, "sample", len(runner.outputs))
    got = runner.run([np.asarray(each) for each in x])
    names = output_names(model)
    return tuple(difference(*each) for each in zip(names, expected, got, runner.outputs, strict=True))


def _scores(task: Task, model, runner: Runner, checked: batches.Stored | None, folder: str) -> dict:
    if checked is None:
        return {"float_before": None, "fake_quantised": None, "int8_file": None}
    x, y, _ = checked.open(folder)
    outputs = {
        "float_before": reference(model, x),
        "fake_quantised": _saved(folder, "validation", len(runner.outputs)),
        "int8_file": runner.run(x),
    }
    return {name: task.score(values, y) for name, values in outputs.items()}
