"""Models from and into files: .keras, and .h5 also as Keras 2 wrote it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import h5py
import keras

import keras_prune.layers  # noqa: F401 (registers the PSP layers, so that files with them can be read)
from keras_prune import keras2
from keras_prune.internals import layers_of


def load_model(path: str, unsafe: bool = False, say: Callable[[str], None] = print):
    """A model from a .keras or .h5 file; code inside the file is run only if `unsafe`.

    An .h5 file that Keras 2 wrote and Keras 3 refuses, or reads as another network, is mended on the way; its weights
    are assigned by the names in the file, and all of them have to fit.

    Args:
        say: is told what was mended or left out.

    Raises:
        ValueError: the file cannot be read, and what to do.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file.")
    if Path(path).suffix not in (".keras", ".h5", ".hdf5"):
        raise ValueError(f"{path}: expected a .keras or .h5 file.")
    try:
        stored = None if Path(path).suffix == ".keras" else _stored_config(path)
        mended, notes = keras2.mended(stored) if stored else (None, ())
        if notes:  # Keras would refuse the file, or read another network from it
            model = _built(mended, unsafe)
            _assign_weights(path, model, keras2.renamed(stored))
            say(f"{path} is a Keras 2 file and was mended ({'; '.join(notes)}); loaded without loss and optimizer")
            return model
        try:
            return keras.saving.load_model(path, safe_mode=not unsafe)
        except (TypeError, ValueError):  # a loss or metric of the user's own: the network itself may well load
            model = keras.saving.load_model(path, safe_mode=not unsafe, compile=False)
            say(f"{path} was loaded without its loss and optimizer (custom ones?)")
            return model
    except Exception as error:  # whatever a broken or foreign file raises
        raise _explained(path, error) from error


def _explained(path: str, error: Exception) -> ValueError:
    text = str(error)
    cause = text.rpartition("Exception encountered:")[2].strip()  # Keras says first what it did, last what was wrong
    first = cause.splitlines()[0][:300] if cause else type(error).__name__
    if isinstance(error, keras2.Unfit):
        return ValueError(f"{path}: {text}")
    if "safe_mode" in text or "unsafe" in text.lower() or "lambda" in text.lower():
        return ValueError(
            f"{path} holds code (a Lambda layer), which is not run: it could do anything. If you trust "
            "the file, add --unsafe."
        )
    custom = re.search(r"(?:could not locate (?:class|function)|unknown \w+:) '?(\w+)", text, re.IGNORECASE)
    if custom:
        return ValueError(
            f"{path} needs the custom object {custom[1]!r}, which this program does not have. Load it in a "
            "Python script with keras.saving.load_model(..., custom_objects=...) and call "
            "keras_prune.prune there."
        )
    if "deserializ" in text:
        return ValueError(
            f"{path} is not understood by this version of Keras: {first} Rebuild the network in Keras 3, "
            "load the weights with model.load_weights, and save it as .keras."
        )
    return ValueError(f"{path} could not be read, it is cut off or no Keras file: {type(error).__name__}: {first}")


def _stored_config(path: str) -> dict | None:
    """The network's description in an .h5 file of Keras 1 or 2; None where Keras 3 wrote it."""
    with h5py.File(path, "r") as file:
        config, version = (_text(file.attrs.get(key)) for key in ("model_config", "keras_version"))
        if config is None:
            raise keras2.Unfit(
                "the file holds weights only, or is no Keras model. Build the network in Python, load the weights with "
                "model.load_weights, and save it with model.save."
            )
    config = json.loads(config)
    if version is not None and int(version.split(".")[0]) >= 3:
        return None
    changed = keras2.changed_meaning(config)
    if changed:
        raise keras2.Unfit(
            f"layers {', '.join(changed[:5])} use the activation hard_sigmoid, which in Keras 2 was "
            "clip(0.2 x + 0.5, 0, 1) and is clip(x / 6 + 0.5, 0, 1) in Keras 3: the outputs would be others. "
            "Rebuild the network in Python with keras.ops.clip(0.2 * x + 0.5, 0, 1) in its place and load "
            "the weights with model.load_weights."
        )
    return config


def _text(value) -> str | None:
    return value.decode("utf8") if hasattr(value, "decode") else value


def _built(config: dict, unsafe: bool):
    """The network with fresh weights. Only whole graphs can be built, no subclass of the user's own."""
    if config["class_name"] not in keras2.MODELS:
        raise keras2.Unfit(f"expected a Sequential or Functional model, found the class {config['class_name']!r}.")
    kind = "Sequential" if config["class_name"] == "Sequential" else "Model"
    whole = {"module": "keras", "class_name": kind, "config": config["config"], "registered_name": None}
    return keras.saving.deserialize_keras_object(whole, safe_mode=not unsafe)


def _assign_weights(path: str, model, names: dict[str, str]) -> None:
    """Give every weight of `model` its value from an .h5 file.

    Args:
        names: {layer name in the file: layer name in `model`}.

    Raises:
        Unfit: a weight is missing, left over, or of another shape.
    """
    layers = {layer.name: layer for layer in model.layers}
    open_ = {id(v): v.path for v in model.weights}
    with h5py.File(path, "r") as file:
        group = file["model_weights"] if "model_weights" in file else file
        for name in _attribute(group, "layer_names"):
            values = {weight: group[name][weight] for weight in _attribute(group[name], "weight_names")}
            if not values:
                continue
            if names.get(name) not in layers:
                raise keras2.Unfit(f"the file holds weights of a layer {name!r}, which its network does not have.")
            for weight, value in values.items():
                # Keras refuses this too: a model file is no place to read other files of the machine from.
                if value.external or value.is_virtual or value.file.filename != file.filename:
                    raise keras2.Unfit(f"the weight {weight} lies in another file.")
            for variable in _assign_layer(name, layers[names[name]], values):
                open_.pop(id(variable), None)
    if open_:
        raise keras2.Unfit(f"the file holds no values for {', '.join(sorted(open_.values())[:5])}.")


def _assign_layer(name: str, layer, values: dict) -> list:
    """Assign the stored values of one layer, a nested model too, in the order in which Keras 2 listed them."""
    # Not `layer.weights`: the .h5 format has all trainable ones first.
    variables = layer.trainable_weights + layer.non_trainable_weights
    if len(variables) != len(values):
        raise keras2.Unfit(f"layer {name!r} has {len(variables)} weights, the file holds {len(values)} for it.")
    owners = [(sub.name, {id(v) for v in sub.weights}) for sub in layers_of(layer)]
    for variable, (stored_name, value) in zip(variables, values.items()):
        if tuple(value.shape) != tuple(variable.shape) or _contradicts(stored_name, variable, variables, owners):
            raise keras2.Unfit(
                f"layer {name!r} expects {variable.path} of shape {tuple(variable.shape)}, the file holds "
                f"{stored_name} of shape {tuple(value.shape)} in its place."
            )
        variable.assign(value[()])
    for sub in layers_of(layer):
        if hasattr(sub, "finalize_state"):  # Normalization computes with what it derives from its weights
            sub.finalize_state()
    return variables


def _contradicts(stored_name: str, variable, variables: list, owners: list) -> bool:
    """Whether the name in the file is that of another weight: equal shapes alone do not show a wrong order.

    Names that fit nothing say nothing: users rename layers after they are built.
    """
    scope, _, leaf = stored_name.split(":")[0].rpartition("/")
    if leaf != variable.name and leaf in {v.name for v in variables}:
        return True
    same = [id(variable) in weights for name, weights in owners if name == scope.replace("/", "_")]
    return bool(same) and not any(same)


def _attribute(group, name: str) -> list[str]:
    """A list of strings; long ones are stored in pieces name0, name1, ..."""
    pieces = [name] if name in group.attrs else []
    while not pieces[:1] == [name] and f"{name}{len(pieces)}" in group.attrs:
        pieces.append(f"{name}{len(pieces)}")
    return [_text(text) for piece in pieces for text in group.attrs[piece]]


def save_model(model, path: str) -> None:
    """Write a .keras file: to a temporary file beside it first, so that nothing half-written is left."""
    target = Path(path)
    if target.suffix != ".keras":
        raise ValueError(f"{path}: the output is a .keras file; give a name that ends so.")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.keras")
    try:
        model.save(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    partial = Path(f"{path}.part")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str) -> None:
    """Raise before the work, not after it."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{path}: the folder {folder} does not exist.")
    if not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise ValueError(f"{path} cannot be written.")
