"""Real images as arrays: a small set that ships inside, files of your own, or tensorflow_datasets."""

from __future__ import annotations

import importlib.resources
import io
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EMBEDDED = "fashion_mnist_subset"
VARIABLE = "KERAS_PRUNE_DATA"


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        x_train, x_test: uint8, shape (samples, height, width, channels).
        y_train, y_test: integers, shape (samples,).
        source: where they came from.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    source: str

    @property
    def classes(self) -> int:
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    def part(self, fraction: float) -> Images:
        """The first `fraction` of the training and test images."""
        n, m = (max(1, int(len(x) * fraction)) for x in (self.x_train, self.x_test))
        return Images(self.name, self.x_train[:n], self.y_train[:n], self.x_test[:m], self.y_test[:m], self.source)


def load(name: str = EMBEDDED, data_dir: str | None = None, say=print) -> Images:
    """Images by name.

    Args:
        name: "fashion_mnist_subset" (12,000 + 2,000 images, inside the package), or any set whose file
            `name.npz` (arrays x_train, y_train, x_test, y_test) lies in `data_dir`, or an image classification set
            of tensorflow_datasets ("cifar10", "fashion_mnist", ...).
        data_dir: folder to look in first; default: the environment variable KERAS_PRUNE_DATA.
        say: is told what is about to be downloaded.

    Raises:
        ValueError: nothing found, and what to do.
    """
    if name == EMBEDDED:
        with importlib.resources.files("keras_prune").joinpath("data", f"{EMBEDDED}.npz").open("rb") as file:
            return _images(name, dict(np.load(io.BytesIO(file.read()))), "inside the package")
    data_dir = data_dir or os.environ.get(VARIABLE)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"--data-dir {data_dir} is no folder.")
    for path in _candidates(data_dir, name):
        if path.is_file():
            return _images(name, _unpacked(path), str(path))
    return _from_tfds(name, data_dir, say)


def _candidates(data_dir: str | None, name: str) -> list[Path]:
    if data_dir is None:
        return []
    folders = [Path(data_dir), Path(data_dir) / name]
    return [folder / f"{name}{end}.npz" for folder in folders for end in ("", "_webp")]


def _unpacked(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz; images may also be packed as lossless strips, `x_train` in files `train_0`, `train_1`, ..."""
    with np.load(path) as file:
        content = {key: file[key] for key in file.files}
    if "x_train" in content:
        return content
    from PIL import Image

    for split in ("train", "test"):
        strips = sorted(key for key in content if key.startswith(f"{split}_"))
        decoded = [np.asarray(Image.open(io.BytesIO(content[key].tobytes())).convert("RGB")) for key in strips]
        if not decoded:
            raise ValueError(
                f"{path} holds neither x_{split} nor strips named {split}_0, ...; found: "
                f"{', '.join(sorted(content))[:200]}."
            )
        side = decoded[0].shape[1]
        content[f"x_{split}"] = np.concatenate([d.reshape(-1, side, side, 3) for d in decoded])
    return content


def _images(name: str, content: dict, source: str) -> Images:
    missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in content]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; expected x_train, y_train, x_test, y_test.")
    x_train, x_test = (x[..., None] if x.ndim == 3 else x for x in (content["x_train"], content["x_test"]))
    y_train, y_test = (content[k].reshape(-1).astype(np.int64) for k in ("y_train", "y_test"))
    if x_train.ndim != 4 or len(x_train) != len(y_train) or len(x_test) != len(y_test) or not len(x_test):
        raise ValueError(
            f"{source}: x_train {x_train.shape}, y_train {y_train.shape}, x_test {x_test.shape}, y_test "
            f"{y_test.shape}; expected images (samples, height, width, channels) and one label each."
        )
    return Images(name, x_train, y_train, x_test, y_test, source)


def _from_tfds(name: str, data_dir: str | None, say) -> Images:
    advice = (
        f"Put {name}.npz (x_train, y_train, x_test, y_test) or a prepared tensorflow_datasets folder somewhere and "
        "pass --data-dir, or use the set that ships inside: --dataset fashion_mnist_subset."
    )
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            f"Dataset {name!r} was not found in {data_dir or 'any --data-dir'}, and tensorflow_datasets is "
            f"not installed (pip install 'keras_prune[data]'). {advice}"
        ) from None
    if name not in tfds.list_builders():
        raise ValueError(f"Dataset {name!r} is not known to tensorflow_datasets. {advice}")
    arguments = dict(batch_size=-1, as_supervised=True, data_dir=data_dir)
    try:
        train, test = tfds.load(name, split=["train", "test"], download=False, **arguments)
    except AssertionError:  # tfds's way to say that nothing is prepared there
        size = str(tfds.builder(name, data_dir=data_dir).info.download_size).replace("Unknown size", "it")
        say(
            f"{name} is not in {data_dir or '~/tensorflow_datasets'}: downloading {size} with tensorflow_datasets. "
            "A local copy is used with --data-dir."
        )
        _require_network(name, advice)
        try:
            train, test = tfds.load(name, split=["train", "test"], download=True, **arguments)
        except Exception as error:
            raise ValueError(f"Downloading {name} failed: {error}. {advice}") from error
    (x_train, y_train), (x_test, y_test) = (tuple(np.asarray(a) for a in pair) for pair in (train, test))
    content = dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return _images(name, content, f"tensorflow_datasets {name}")


def _require_network(name: str, advice: str) -> None:
    """Five seconds for an answer: tensorflow_datasets itself would retry for minutes without a word."""
    try:
        socket.create_connection(("storage.googleapis.com", 443), timeout=5).close()
    except OSError as error:
        raise ValueError(f"{name} would have to be downloaded, but there is no network ({error}). {advice}") from error
