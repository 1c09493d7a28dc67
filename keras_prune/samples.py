"""Inputs for a model from what users have: folders of images, arrays, data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np

from keras_prune import datasets, pictures
from keras_prune.internals import graph_of, inputs_of, is_graph, nodes_of, outputs_of

_IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], "float32")
_CAFFE = np.array([103.939, 116.779, 123.68], "float32")  # blue, green, red
PREPROCESSING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "unit": lambda x: x / 255,
    "signed": lambda x: x / 127.5 - 1,
    "imagenet": lambda x: (x / 255 - _IMAGENET[0]) / _IMAGENET[1],
    "caffe": lambda x: x[..., ::-1] - _CAFFE,
}
_MEANINGS = (
    "none (as they are), unit (0..1), signed (-1..1), imagenet (mean and deviation, RGB), caffe (BGR minus mean)"
)

# What may stand between the input and its scaling.
_PASSING = {
    *("Resizing", "CenterCrop", "ZeroPadding2D", "Cropping2D", "Reshape", "Permute", "Identity", "Dropout"),
    *("RandomFlip", "RandomRotation", "RandomZoom", "RandomContrast", "RandomBrightness", "RandomCrop"),
    *("RandomTranslation", "GaussianNoise"),
    *("Cast", "GetItem", "Flip", "Stack", "Transpose", "ExpandDims", "Squeeze", "Concatenate"),
}  # fmt: skip
_ARITHMETIC = {"Multiply", "Divide", "TrueDivide", "Subtract", "Add"}


@dataclass(frozen=True)
class Samples:
    """What a model takes, chosen at random from a larger set.

    Attributes:
        x: shape (samples, ...), in the dtype of the model's input; for several inputs a list, or a dict if the model
            takes one.
        y: integer labels, shape (samples,), or None.
        source: where they came from.
        names: one per sample: the file, or the place in the array.
        notes: what was decided or left out.
    """

    x: np.ndarray | list | dict
    y: np.ndarray | None
    source: str
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def read(
    source,
    model: keras.Model,
    *,
    count: int = 512,
    preprocess: str | Callable | None = None,
    labels=None,
    seed: int = 0,
    data_dir: str | None = None,
    key: str | None = None,
    say: Callable[[str], None] = print,
) -> Samples:
    """Up to `count` inputs for `model`.

    Args:
        source: a folder of images (searched with its sub-folders), an .npz or .npy file, an array, (x, y), an iterable
            of samples or batches with or without labels such as a tf.data.Dataset, or "tfds:NAME".
        count: how many, chosen at random by `seed`; only chosen files are decoded. An iterable cannot be chosen
            from: its first `count` samples are taken.
        preprocess: "none", "unit", "signed", "imagenet", "caffe", or a function of float32 images (samples, height,
            width, channels) from 0 to 255; None: nothing is done where the model or the data show that it is right,
            else an error.
        labels: for a folder "folders" (each sub-folder is a class, in the order of their names) or a .csv file with
            lines `file,label`; for arrays a .npy file or an array of integers.
        data_dir: folder to look in for "tfds:NAME"; see `datasets.load`.
        key: name of the array in an .npz file.
        say: is told what is downloaded.

    Raises:
        ValueError: the source, its shapes or labels, or the preprocessing do not fit the model, and what to do.
        TypeError: a source of another kind.
    """
    if count < 1:
        raise ValueError(f"count={count} was passed; expected 1 or more samples.")
    if not (preprocess is None or callable(preprocess) or preprocess in PREPROCESSING):
        raise ValueError(f"preprocess={preprocess!r} is not known. Known: {_MEANINGS}. Or pass a function.")
    inputs = keras.tree.flatten(inputs_of(model))
    choice = _Choice(count, np.random.default_rng(seed))
    if len(inputs) > 1:
        return _several(source, model, inputs, choice, preprocess)
    found = _found(source, inputs[0], choice, labels, data_dir, key, say)
    if not len(found):
        raise ValueError(f"{found.source} holds no samples.")
    return _prepared(found, model, inputs[0], preprocess)


def has_own_preprocessing(model: keras.Model) -> bool:
    """Whether the model scales its input itself: by Rescaling, Normalization or arithmetic with constants."""
    return is_graph(model) and _scales(model)[0]


def _scales(model) -> tuple[bool, bool]:
    """(whether the model scales its input, whether its input reaches its output unscaled)."""
    near = {id(tensor) for tensor in keras.tree.flatten(inputs_of(model))}
    for node in nodes_of(graph_of(model)):
        if not any(id(tensor) in near for tensor in node.input_tensors):
            continue
        operation = node.operation
        if is_graph(operation):
            found, passes = _scales(operation)
        else:
            constant = type(operation).__name__ in _ARITHMETIC and len(node.input_tensors) == 1
            found = constant or isinstance(operation, (keras.layers.Rescaling, keras.layers.Normalization))
            passes = type(operation).__name__ in _PASSING
        if found:
            return True, False
        if passes:
            near.update(id(tensor) for tensor in node.output_tensors)
    return False, any(id(tensor) in near for tensor in keras.tree.flatten(outputs_of(model)))


@dataclass(frozen=True)
class _Choice:
    count: int
    rng: np.random.Generator

    def among(self, n: int) -> np.ndarray:
        """Different places below n, in random order: a reader of the first few sees all classes."""
        return self.rng.permutation(n)[: self.count]


def _found(source, tensor, choice: _Choice, labels, data_dir, key, say) -> Samples:
    """Chosen samples, not yet scaled."""
    if isinstance(source, (str, Path)):
        if str(source).startswith("tfds:"):
            if labels is not None:
                raise ValueError(f"{source} has its own labels, and labels={labels!r} were passed: labels twice.")
            images = datasets.load(str(source)[5:], data_dir, say)
            return _from_arrays(images.x_train, images.y_train, images.source, tensor, choice)
        path = Path(source)
        if path.is_dir():
            return _from_folder(path, tensor, choice, labels)
        if not path.is_file():
            raise ValueError(f"{path}: no such file or folder. A data set of tensorflow_datasets is written tfds:NAME.")
        if path.suffix == ".npy":
            return _from_arrays(_loaded(path), labels, str(path), tensor, choice)
        if path.suffix == ".npz":
            x, y = _of_archive(path, key)
            return _from_arrays(x, labels if labels is not None else y, str(path), tensor, choice)
        raise ValueError(f"{path}: expected a folder of images, an .npz or an .npy file, or tfds:NAME.")
    if isinstance(source, np.ndarray):
        return _from_arrays(source, labels, "an array", tensor, choice)
    if isinstance(source, tuple) and len(source) == 2 and all(hasattr(part, "shape") for part in source):
        if labels is not None:
            raise ValueError("(x, y) and labels were passed: labels twice. Pass x alone, or no labels.")
        x, y = (np.asarray(part) for part in source)
        return _from_arrays(x, y, "arrays", tensor, choice)
    if isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        if labels is not None:
            raise ValueError("labels were passed with an iterable; let it yield (x, y) instead.")
        return _from_iterable(source, tensor, choice)
    raise TypeError(
        f"Samples cannot be read from {type(source).__name__}; expected a folder, an .npz or .npy file, tfds:NAME, "
        "an array, (x, y) or an iterable of batches."
    )


def _loaded(path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} could not be read as an array of numbers: {error}") from error


def _archive(path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile and numpy raise many kinds
        raise ValueError(f"{path} could not be read as arrays of numbers: {error}") from error


def _of_archive(path: Path, key: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    content = _archive(path)
    if key is None:
        known = [name for name in ("x", "x_train") if name in content]
        key = known[0] if known else next(iter(content)) if len(content) == 1 else None
    if key not in content:
        raise ValueError(
            f"{path} holds {', '.join(content) or 'nothing'}; expected x, x_train or a single array"
            f"{'' if key is None else f', or {key!r} as asked'}. Name the array with key=... (--key)."
        )
    return content[key], content.get(f"y{key[1:]}" if key.startswith("x") else "y")


def _from_arrays(x, labels, source: str, tensor, choice: _Choice) -> Samples:
    """x, shape (samples, ...); labels: an array, a .npy file, or None."""
    y = _loaded(labels) if isinstance(labels, (str, Path)) else labels
    if x.ndim == 0:
        raise ValueError(f"{source} is a single number; expected an array of samples.")
    if y is not None and len(np.atleast_1d(y)) != len(x):
        raise ValueError(
            f"{source}: x of shape {x.shape} with {np.shape(y)} labels; expected one label for each sample."
        )
    chosen = choice.among(len(x))
    picked, notes = np.asarray(x[chosen]), ()
    y, note = (None, ()) if y is None else _integers(np.asarray(y)[chosen])
    shape = tuple(tensor.shape[1:])
    if len(shape) == 3 and picked.ndim == 3:
        picked = picked[..., None]
    if picked.dtype == np.uint8 and picked.ndim == 4 and len(shape) == 3 and not _fits(picked.shape[1:], shape):
        notes = (f"images were resized from {picked.shape[1:]} to {shape}",)
        picked = np.stack([pictures.fitted(pictures.as_picture(image), shape) for image in picked])
    return Samples(picked, y, source, tuple(str(i) for i in chosen), (*notes, *note))


def _integers(y: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Class numbers from numbers or one-hot rows; other targets are left out."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=1) == 1):
        return y.argmax(axis=1).astype(np.int64), ()
    if y.ndim == 1 and np.issubdtype(y.dtype, np.number) and np.all(y == np.round(y)):
        return y.astype(np.int64), ()
    return None, (f"targets of shape {y.shape} and type {y.dtype} are no class numbers and were left out",)


def _from_iterable(source, tensor, choice: _Choice) -> Samples:
    """The first samples of a data set; elements are x or (x, y), single samples or batches, told apart by rank."""
    xs, ys, rank, taken = [], [], len(tensor.shape), 0
    for element in source:
        x, y = (element[0], element[1]) if isinstance(element, (tuple, list)) and len(element) >= 2 else (element, None)
        x = np.asarray(x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x)
        if x.ndim not in (rank, rank - 1):
            raise ValueError(
                f"the data set yields {x.ndim}-dimensional arrays of shape {x.shape}; expected samples of shape "
                f"{tuple(tensor.shape[1:])} or batches of them."
            )
        single = x.ndim == rank - 1
        xs.append(x[None] if single else x)
        if y is not None:
            ys.append(np.asarray(y)[None] if single else np.asarray(y))
        taken += len(xs[-1])
        if taken >= choice.count:
            break
    if not xs:
        raise ValueError("the data set yields nothing; was it iterated to its end before?")
    if len({x.shape[1:] for x in xs}) > 1:
        raise ValueError(
            f"the data set yields samples of several shapes, such as {xs[0].shape[1:]}; resize them first."
        )
    if ys and sum(map(len, ys)) != taken:
        raise ValueError(f"the data set yields {taken} samples with {sum(map(len, ys))} labels; expected one for each.")
    x = np.concatenate(xs)[: choice.count]
    y, note = _integers(np.concatenate(ys)[: choice.count]) if ys else (None, ())
    names = tuple(str(i) for i in range(len(x)))
    return Samples(x, y, "a data set", names, (f"the first {len(x)} samples of the data set were taken", *note))


def _several(source, model, inputs: list, choice: _Choice, preprocess) -> Samples:
    """Several inputs come from an .npz file with one array for each, by name, and are taken as they are."""
    names = [tensor.name for tensor in inputs]
    advice = f"{model.name!r} has the inputs {', '.join(names)}; expected an .npz file with arrays of these names"
    if not isinstance(source, (str, Path)) or Path(source).suffix != ".npz" or not Path(source).is_file():
        raise ValueError(f"{advice}, got {str(source)[:80]}.")
    if preprocess not in (None, "none"):
        raise ValueError(
            f'preprocess={preprocess!r} was passed; several inputs are taken as they are: expected "none".'
        )
    content = _archive(source)
    missing = [name for name in names if name not in content]
    lengths = {len(np.atleast_1d(content[name])) for name in names if name in content}
    if missing or len(lengths) != 1 or lengths == {0}:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in content.items())
        raise ValueError(f"{advice} and one length, got {shapes or 'nothing'}.")
    chosen = choice.among(lengths.pop())
    x = [_checked(content[tensor.name][chosen], tensor, f"{source}, {tensor.name}") for tensor in inputs]
    y, notes = _integers(content["y"][chosen]) if len(content.get("y", ())) > chosen.max() else (None, ())
    x = keras.tree.pack_sequence_as(inputs_of(model), x)
    return Samples(x, y, str(source), tuple(str(i) for i in chosen), ("inputs are taken as they are", *notes))


def _from_folder(folder: Path, tensor, choice: _Choice, labels) -> Samples:
    shape = tuple(tensor.shape[1:])
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise ValueError(
            f"{folder} holds images, the model takes {shape}; expected (height, width, 1 or 3). Pass arrays instead."
        )
    files = pictures.files_in(folder)
    numbers, notes = (None, ()) if labels is None else pictures.labels_of(files, folder, labels)
    images, kept, broken = [], [], []
    chosen = choice.among(len(files))
    for i in chosen:
        try:
            images.append(pictures.fitted(pictures.opened(files[i]), shape))
            kept.append(i)
        except Exception as error:  # each format's decoder raises its own kinds
            broken.append(f"{files[i].relative_to(folder)} ({type(error).__name__}: {str(error)[:60]})")
    if 10 * len(broken) > len(chosen):
        raise ValueError(f"{len(broken)} of {len(chosen)} images in {folder} are unreadable, such as {broken[0]}.")
    if broken:
        notes = (*notes, f"{len(broken)} of {len(chosen)} images were unreadable: {', '.join(broken[:10])}")
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"the images in {folder} have several sizes and the model takes any, {shape}. Resize them, or build the "
            "model with a fixed input size."
        )
    y = None if numbers is None else numbers[kept]
    return Samples(np.stack(images), y, str(folder), tuple(str(files[i].relative_to(folder)) for i in kept), notes)


def _fits(shape: tuple, wanted: tuple) -> bool:
    return len(shape) == len(wanted) and all(w is None or n == w for n, w in zip(shape, wanted))


def _checked(x: np.ndarray, tensor, source: str) -> np.ndarray:
    """x in the dtype of the input it is for."""
    if not _fits(x.shape[1:], tuple(tensor.shape[1:])):
        raise ValueError(f"{source}: samples of shape {x.shape[1:]}, the model takes {tuple(tensor.shape[1:])}.")
    if not (np.issubdtype(x.dtype, np.number) or x.dtype == bool) or not np.all(np.isfinite(x)):
        raise ValueError(f"{source}: values of type {x.dtype}, or not finite ones; expected finite numbers.")
    kind = keras.backend.standardize_dtype(tensor.dtype)
    return x.astype("float32" if kind == "bfloat16" else kind)


def _prepared(found: Samples, model, tensor, preprocess) -> Samples:
    x, notes = found.x, found.notes
    _checked(x, tensor, found.source)
    own, scaled = has_own_preprocessing(model), _looks_scaled(x)
    if preprocess is None:
        preprocess, why = "none", _nothing_to_do(x, tensor, own, scaled)
        if why is None:
            raise ValueError(
                f"{found.source}: values from {x.min()} to {x.max()}, and {model.name!r} has no Rescaling or "
                f"Normalization layer at its input. How was it trained? Say preprocess=... (--preprocess), "
                f"one of: {_MEANINGS}."
            )
        notes = (*notes, f"preprocess none: {why}")
    elif preprocess != "none":
        if scaled and not callable(preprocess):
            raise ValueError(
                f"{found.source}: preprocess={preprocess!r} takes images from 0 to 255, but values lie between "
                f'{x.min():.3g} and {x.max():.3g}: they seem to be scaled already. Say preprocess="none".'
            )
        if own:
            notes = (*notes, "the model scales its input itself; the preprocessing comes on top of that")
    if preprocess in ("imagenet", "caffe") and x.shape[-1] != 3:
        raise ValueError(f"preprocess={preprocess!r} is for 3 channels, {found.source} has {x.shape[-1]}.")
    function = preprocess if callable(preprocess) else PREPROCESSING[preprocess]
    if preprocess != "none":
        if not keras.backend.is_float_dtype(tensor.dtype):
            raise ValueError(
                f'the model takes {tensor.dtype} values: preprocess="none" alone makes sense, not {preprocess}.'
            )
        x = np.asarray(function(np.asarray(x, "float32")))
        if len(x) != len(found):
            raise ValueError(f"preprocess returned shape {x.shape} for {len(found)} samples.")
    return replace(found, x=_checked(x, tensor, found.source), notes=notes)


def _looks_scaled(x: np.ndarray) -> bool:
    return bool(np.issubdtype(x.dtype, np.floating) and (x.min() < 0 or x.max() <= 1))


def _nothing_to_do(x: np.ndarray, tensor, own: bool, scaled: bool) -> str | None:
    """Why no preprocessing is right, or None where nothing shows it."""
    if own:
        return "the model scales its input itself"
    if scaled:
        return "the values are scaled already"
    if x.ndim != 4 and x.dtype != np.uint8:
        return "the samples are no images"
    return None
