"""Trained networks with their images, how they are trained on, and where results go: shared by the benchmarks.

The ResNets are akamaster's (`cifar10_resnet/*.keras` in the data folder); LeNets (MNIST), VGG-16 and DenseNet-40
(CIFAR-10) are trained here, one for each seed, and kept in a folder.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import keras
import numpy as np

from keras_prune import Channels, datasets, metrics, sensitivity

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from networks import densenet  # noqa: E402

MEAN, STD = (np.array(v, "float32") for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
DECAY = 1e-4
"""Of the kernels, through the momentum, in all trainings."""
DELTAS = {"lenet300": 1e-12, "lenet5": 1e-9}
"""Accepted probability of failure of "pfp", as in the paper's experiments; 1e-16 for the other networks."""


# -- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, or trained on.

    Attributes:
        rate: learning rate at the start.
        drops: after which epochs it falls to a tenth; None: it falls to 0 along a cosine.
        warm_up: so many epochs it rises from 0.
        images: to train on; None: all.
        augmented: shift by up to 4 pixels and mirror.
    """

    rate: float
    epochs: int
    batch: int
    drops: tuple[int, ...] | None = None
    warm_up: int = 0
    images: int | None = None
    augmented: bool = False


class Batches(keras.utils.PyDataset):
    """Shuffled by the seed, shifted by up to 4 pixels and mirrored; the last incomplete batch of an epoch is left out.

    `change` is what is done to the images last; without `augmented` they are neither shifted nor mirrored.
    """

    def __init__(self, x, y, size: int, seed: int, change=lambda x: x, augmented: bool = True):
        super().__init__()
        self.x, self.y, self.size, self.change, self.augmented = x, y, size, change, augmented
        self.random = np.random.default_rng(seed)
        self.order = self.random.permutation(len(x))

    def __len__(self):
        return len(self.x) // self.size

    def __getitem__(self, index):
        some = self.order[self.size * index : self.size * index + self.size]
        x = shifted(self.x[some], self.random) if self.augmented else self.x[some]
        return self.change(x), self.y[some]

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.x))


def shifted(x: np.ndarray, random: np.random.Generator, by: int = 4) -> np.ndarray:
    """Every image of a batch by its own distance, half of them mirrored."""
    count, height, width = x.shape[:3]
    padded = np.pad(x, ((0, 0), (by, by), (by, by), (0, 0)))
    rows, columns = (random.integers(0, 2 * by + 1, (count, 1)) + np.arange(n) for n in (height, width))
    mirrored = random.random(count) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of a recipe, step by step."""

    def __init__(self, recipe: Recipe, steps: int):
        schedules, rate = keras.optimizers.schedules, recipe.rate
        self.warm, self.peak = recipe.warm_up * steps, rate
        if recipe.drops is None:
            self.after = schedules.CosineDecay(rate, recipe.epochs * steps)
        else:
            values = [rate * 0.1**k for k in range(len(recipe.drops) + 1)]
            self.after = schedules.PiecewiseConstantDecay([d * steps for d in recipe.drops], values)

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rising = self.peak * (step + 1) / max(self.warm, 1)
        return keras.ops.where(step < self.warm, rising, self.after(step))


def fit(model, x, y, change, recipe: Recipe, seed: int, callbacks=()) -> float:
    """Train a model that makes logits, in place; seconds. `change` makes of a batch of images what it takes."""
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            variable.regularizer = keras.regularizers.L2(DECAY / 2)
    batches = Batches(x, y, recipe.batch, seed, change, recipe.augmented)
    optimizer = keras.optimizers.SGD(Rate(recipe, len(batches)), momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    start = time.perf_counter()
    model.fit(batches, epochs=recipe.epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    seconds = time.perf_counter() - start
    model.compile("sgd", loss)  # the rate of a recipe does not go into a file
    return seconds


def accuracy(model, images: datasets.Images, change) -> float:
    hits = 0
    for start in range(0, len(images.x_test), 2500):
        logits = model.predict(change(images.x_test[start : start + 2500]), batch_size=250, verbose=0)
        hits += int((logits.argmax(-1) == images.y_test[start : start + 2500]).sum())
    return hits / len(images.x_test)


# -- networks and images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A trained network with its images; `change` makes a batch of images what the network takes."""

    network: str
    model: keras.Model
    channels: Channels
    images: datasets.Images
    change: object
    samples: int

    @property
    def family(self) -> str:
        return self.network.rstrip("0123456789")

    def drawn(self, seed: int, count: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Training images and labels, the first so many of the seed's order."""
        chosen = np.random.default_rng(seed).permutation(len(self.images.x_train))[:count]
        return self.images.x_train[chosen], self.images.y_train[chosen]


def imagenet(x):
    return (x.astype("float32") / 255 - MEAN) / STD


def standardised(x):
    return (x.astype("float32") / 255 - 0.1307) / 0.3081


def lenet300() -> keras.Model:
    """LeNet-300-100: 266,610 parameters."""
    hidden = [
        keras.layers.Dense(n, activation="relu", kernel_initializer="he_normal", name=f"fc{n}") for n in (300, 100)
    ]
    return _lenet("lenet300", [keras.layers.Flatten(), *hidden])


def lenet5() -> keras.Model:
    """Caffe's LeNet-5 with a ReLU behind each convolution: 431,080 parameters."""
    layers, common = keras.layers, {"activation": "relu", "kernel_initializer": "he_normal"}
    body = [
        layers.Conv2D(20, 5, name="conv1", **common),
        layers.MaxPooling2D(2),
        layers.Conv2D(50, 5, name="conv2", **common),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(500, name="fc1", **common),
    ]
    return _lenet("lenet5", body)


def _lenet(name: str, body: list) -> keras.Model:
    return keras.Sequential([keras.Input((28, 28, 1)), *body, keras.layers.Dense(10, name="logits")], name=name)


def vgg16() -> keras.Model:
    """VGG-16 as it is used on CIFAR-10: thirteen convolutions, each with BatchNormalization, one Dense layer."""
    layers = keras.layers
    x = inputs = keras.Input((32, 32, 3))
    for stage, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for number in range(count):
            name = f"conv{stage + 1}_{number + 1}"
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=name)(x)
            x = layers.ReLU()(layers.BatchNormalization(name=f"{name}_norm")(x))
        x = layers.MaxPooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(layers.Flatten()(x)), name="vgg16")


TRAINED = {"lenet300": lenet300, "lenet5": lenet5, "vgg16": vgg16, "densenet40": densenet}


def recipe_for(network: str, epochs: int) -> Recipe:
    """By which a network is trained from nothing."""
    if network.startswith("lenet"):
        return Recipe(0.01, epochs, 64, drops=(round(epochs * 5 / 8), round(epochs * 7 / 8)))
    return Recipe(0.1, epochs, 64, drops=(epochs // 2, epochs * 3 // 4), augmented=True)


def copied(model) -> keras.Model:
    """The same network and weights, not compiled."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def has_norms(model) -> bool:
    return any(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)


@cache
def images_in(folder: str, name: str) -> datasets.Images:
    return datasets.load(name, folder)


@cache
def case(network: str, folder: str, work: str, epochs: int, seed: int, count: int | None = None) -> Case:
    """The network; one of `TRAINED` is trained for so many epochs with this seed if it is not in `work` yet.

    Args:
        count: train it on so many images only.
    """
    is_lenet = network.startswith("lenet")
    images, change = images_in(folder, "mnist" if is_lenet else "cifar10"), standardised if is_lenet else imagenet
    if network in TRAINED:
        path = Path(work) / f"{network}_{epochs}_{seed}.keras"
        if not path.is_file():
            keras.utils.set_random_seed(seed)
            model, start = TRAINED[network](), time.perf_counter()
            fit(model, images.x_train[:count], images.y_train[:count], change, recipe_for(network, epochs), seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            model.save(path)
            print(f"trained {path} in {time.perf_counter() - start:.0f} s", flush=True)
    else:
        path = Path(folder) / "cifar10_resnet" / f"{network}.keras"
    model = keras.saving.load_model(path, compile=False)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))  # "taylor" asks for its loss
    channels = Channels(model)
    return Case(network, model, channels, images, change, sensitivity.sample_size(channels, DELTAS.get(network, 1e-16)))


def sizes(small, whole) -> dict:
    """What is left of the whole network: MACs and parameters, as shares."""
    a, b = Channels(small), Channels(whole)
    return {f.__name__: f(a, ()) / f(b, ()) for f in (metrics.macs, metrics.params)}


# -- results ---------------------------------------------------------------------------------------------------------


def machine() -> dict:
    try:
        processor = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":")[1].split("\n")[0].strip()
    except (OSError, IndexError):
        processor = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    backend = keras.backend.backend()
    versions = {name: sys.modules[name].__version__ for name in ("keras", backend, "numpy") if name in sys.modules}
    return {
        "cpu": processor,
        "cores": cores,
        "backend": backend,
        "versions": {**versions, "python": platform.python_version()},
    }


def on(found: dict) -> str:
    """A machine in words."""
    cores = "1 core" if found["cores"] == 1 else f"{found['cores']} cores"
    return f"{found['cpu']}, {cores}, Keras {found['versions']['keras']}, {found['backend']}"


def load(path: str | Path) -> dict:
    empty = {"dense": [], "rows": [], "speed": [], "search": [], "machine": machine()}
    return {**empty, **json.loads(Path(path).read_text())} if Path(path).is_file() else empty


def put(path: str | Path, kind: str, row: dict, keys) -> None:
    """A row into the file as it is now, in place of one of the same keys. The file is replaced in one go."""
    path, results = Path(path), load(path)
    results[kind] = [r for r in results[kind] if any(r[k] != row[k] for k in keys)] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results | {"machine": machine()}, indent=1) + "\n")
    os.replace(temporary, path)


def found(results: dict, kind: str, wanted: dict) -> dict:
    """The row of these keys as it was measured, or the keys alone."""
    return next((r for r in results[kind] if all(r[k] == v for k, v in wanted.items())), wanted)


def write(path: str | Path, markers: tuple[str, str], text: str) -> None:
    """Between two markers of a page."""
    before, rest = Path(path).read_text().split(markers[0], 1)
    Path(path).write_text(f"{before}{markers[0]}\n{text}\n{markers[1]}{rest.split(markers[1], 1)[1]}")
