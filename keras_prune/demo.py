"""The main job, end to end: train on real images, prune while training, strip, fine-tune, export, compare.

This is a user's script that ships with the library: the one place where keras_prune and tflite_export meet.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from pathlib import Path

import keras
from keras import layers

from keras_prune import datasets, metrics
from keras_prune.channels import Channels
from keras_prune.pruners import GradualPruning
from keras_prune.reports import before_after, plot_widths
from keras_prune.surgery import strip


def small_resnet(shape: tuple[int, ...], classes: int, widths: tuple[int, ...] = (32, 64, 128)) -> keras.Model:
    """A residual CNN that takes raw images 0..255: a convolution, a pooling, one block per width, logits."""

    def conv(x, name, width, taps, strides=1):
        x = layers.Conv2D(width, taps, strides=strides, padding="same", use_bias=False, name=name)(x)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)

    inputs = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(inputs)
    x = layers.ReLU(name="stem_relu")(conv(x, "stem", widths[0], 3))
    x = layers.MaxPooling2D(name="stem_pool")(x)
    for number, width in enumerate(widths, 1):
        block, strides = f"block{number}", 1 if number == 1 else 2
        y = layers.ReLU(name=f"{block}_relu1")(conv(x, f"{block}_conv1", width, 3, strides))
        y = conv(y, f"{block}_conv2", width, 3)
        if number > 1:
            x = conv(x, f"{block}_shortcut", width, 1, strides)
        x = layers.ReLU(name=f"{block}_relu2")(layers.Add(name=f"{block}_add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="small_resnet")


class ProgressBar(keras.callbacks.Callback):
    """One rich progress bar for a whole fit, with the figures of the last epoch beside it."""

    def __init__(self, progress, title: str):
        super().__init__()
        self.progress, self.title, self.task = progress, title, None

    def on_train_begin(self, logs=None):
        first = getattr(self, "first_epoch", 0)
        total = (self.params["epochs"] - first) * self.params["steps"]
        self.task = self.progress.add_task(self.title, total=total)

    def on_train_batch_end(self, batch, logs=None):
        self.progress.advance(self.task)

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        text = f"accuracy {logs.get('accuracy', 0):.3f}"
        if "macs" in logs:
            text += f", {logs['macs'] / 1e6:.2f} M MACs"
        self.progress.update(self.task, description=f"{self.title}: {text}")


def run(
    output: str = "demo_output",
    *,
    dataset: str = datasets.EMBEDDED,
    data_dir: str | None = None,
    sparsity: float = 0.5,
    criterion: str = "l2",
    budget: str = "uniform",
    round_to: int = 8,
    epochs: int = 8,
    tune_epochs: int = 3,
    batch_size: int = 128,
    seed: int = 0,
    fraction: float = 1.0,
    say=print,
) -> dict:
    """Run the demo and write its files into `output`.

    Args:
        output: folder for the models, the .tflite files, demo.json and widths.png.
        dataset, data_dir: as for `datasets.load`.
        sparsity, criterion, budget, round_to: as for `FilterPruning`; the measure is MACs.
        epochs: epochs of the unpruned network, and of the pruned one: pruning and fine-tuning together.
        tune_epochs: how many of them come after the strip.
        batch_size, seed: of the training.
        fraction: of the images, for a quick look.
        say: prints a line.

    Returns:
        All figures, as written to demo.json.
    """
    if not 0 < tune_epochs < epochs:
        raise ValueError(f"tune_epochs={tune_epochs}, epochs={epochs}: expected 0 < tune_epochs < epochs.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    images = datasets.load(dataset, data_dir, say).part(fraction)
    say(f"{images.name}: {len(images.x_train):,} + {len(images.x_test):,} real images, {images.source}")
    dense, small, stripped = _train(
        images, sparsity, criterion, budget, round_to, epochs, tune_epochs, batch_size, seed, say
    )
    dense.save(folder / "dense.keras")
    small.save(folder / "small.keras")
    say(f"strip: {stripped}")
    plot_widths(dense, small, folder / "widths.png")
    figures = {
        "dataset": images.name,
        "source": images.source,
        "train_images": len(images.x_train),
        "test_images": len(images.x_test),
        "epochs": epochs,
        "asked_sparsity": sparsity,
        "strip": json.loads(stripped.to_json()),
        "versions": {"python": platform.python_version(), "keras": keras.__version__},
        "networks": {"dense": _network(dense, images), "small": _network(small, images)},
        "files": _export(dense, small, images, folder, say),
    }
    figures["seconds"] = time.perf_counter() - start
    say(str(table(figures)))
    (folder / "demo.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _train(images, sparsity, criterion, budget, round_to, epochs, tune_epochs, batch_size, seed, say):
    """(unpruned network, small network, strip report): both from the same start, both trained for `epochs`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    steps = math.ceil(len(images.x_train) / batch_size)

    def fresh():
        keras.utils.set_random_seed(seed)
        model = small_resnet(images.x_train.shape[1:], images.classes)
        rate = keras.optimizers.schedules.CosineDecay(0.0, epochs * steps, warmup_target=0.1, warmup_steps=steps)
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    x, y = images.x_train.astype("float32"), images.y_train
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:

        def fit(model, title, callbacks=(), first=0, last=epochs):
            bar = ProgressBar(progress, title)
            bar.first_epoch = first
            model.fit(
                x, y, batch_size=batch_size, initial_epoch=first, epochs=last, verbose=0, callbacks=[*callbacks, bar]
            )

        dense = fresh()
        fit(dense, "train unpruned")
        model = fresh()
        pruning = GradualPruning(
            sparsity, begin=1, stop=max(1, epochs // 2), criterion=criterion, budget=budget, round_to=round_to
        )
        fit(model, "train and prune", [pruning], last=epochs - tune_epochs)
        # The small model goes on with the same optimizer: its momenta are sliced along, its rate continues.
        small, report = strip(model, x[:8], report=True)
        fit(small, "fine-tune small", first=epochs - tune_epochs)
    return dense, small, report


def _network(model, images) -> dict:
    channels = Channels(model)
    loss, accuracy = model.evaluate(images.x_test.astype("float32"), images.y_test, batch_size=256, verbose=0)
    return {"accuracy": accuracy, "params": metrics.params(channels), "macs": metrics.macs(channels)}


def _export(dense, small, images, folder, say) -> dict:
    import tflite_export

    calibration = images.x_train[:200].astype("float32")
    files = {}
    for name, model in (("dense", dense), ("small", small)):
        for recipe in ("float32", "int8"):
            say(f"export {name}, {recipe}")
            path = folder / f"{name}_{recipe}.tflite"
            report = tflite_export.export(model, str(path), recipe, data=calibration, runs=0)
            files[f"{name}_{recipe}"] = {
                "report": json.loads(report.to_json()),
                "bytes": os.path.getsize(path),
                "accuracy": _accuracy(path, images),
            }
    for recipe in ("float32", "int8"):
        say(f"time both {recipe} files in turns")
        times = tflite_export.benchmark(str(folder / f"dense_{recipe}.tflite"), str(folder / f"small_{recipe}.tflite"))
        files[f"times_{recipe}"] = json.loads(times.to_json())
    return files


def table(figures: dict) -> str:
    """The figures before and after, as text."""
    dense, small = figures["networks"]["dense"], figures["networks"]["small"]
    files = figures["files"]
    rows = [
        ("accuracy, Keras", dense["accuracy"], small["accuracy"], "percent"),
        ("params", dense["params"], small["params"], "count"),
        ("MACs", dense["macs"], small["macs"], "count"),
    ]
    for recipe in ("float32", "int8"):
        before, after, times = (files[f"{key}_{recipe}"] for key in ("dense", "small", "times"))
        rows += [
            (f"accuracy, {recipe} .tflite", before["accuracy"], after["accuracy"], "percent"),
            (f"KiB, {recipe} .tflite", before["bytes"] / 1024, after["bytes"] / 1024, "size"),
            (f"ms, {recipe} .tflite", times["a"]["median"], times["b"]["median"], "time"),
        ]
    timer = files["times_float32"]["a"]
    return (
        before_after(rows) + f"\n\nms: median of {files['times_float32']['rounds']} rounds in turns, batch 1, "
        f"{timer['threads']} thread, {timer['runtime']}, {timer['cpu']}; Keras {figures['versions']['keras']}, "
        f"Python {figures['versions']['python']}"
    )


def _accuracy(path, images) -> float:
    from tflite_export import Runner

    [answers] = Runner(str(path), threads=2).run([images.x_test.astype("float32")])
    return float((answers.argmax(-1) == images.y_test).mean())
