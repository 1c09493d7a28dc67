"""What trainings in rounds share: the record of the rounds, on disk after every epoch, and a fresh optimizer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import keras
import numpy as np

from keras_prune.files import replacing
from keras_prune.internals import variables_of
from keras_prune.surgery import optimizer_like


def measured(model: keras.Model, validation_data) -> dict[str, float]:
    """Loss and metrics on (x, y), (x, y, weights) or a data set; nothing without data."""
    if validation_data is None:
        return {}
    x, y, weight = keras.utils.unpack_x_y_sample_weight(validation_data)
    found = model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
    model.reset_metrics()  # the epoch that begins counts from nothing
    return plain(found)


def plain(logs: dict) -> dict[str, float | list]:
    """Logged numbers, or several of them under one name, as JSON has them."""
    return {name: np.asarray(keras.ops.convert_to_numpy(v), float).tolist() for name, v in logs.items()}


def write_curve(path: str | Path | None, curve: list[dict]) -> None:
    """The whole file or none; without a path nothing."""
    if path is not None:
        with replacing(path) as file:
            file.write(json.dumps(curve, indent=1).encode())


def read_curve(path: str | Path | None, step: int) -> list[dict]:
    """The rounds before this epoch, of the run that was killed."""
    if path is None or not os.path.isfile(path):
        return []
    return [entry for entry in json.loads(Path(path).read_text()) if entry["epoch"] < step]


def restart(optimizer: keras.optimizers.Optimizer) -> None:
    """The state of a new optimizer of the same kind; the learning rate stays what it is."""
    new = optimizer_like(optimizer)
    new.build(variables_of(optimizer))
    states = [[v for v in o.variables if v.name != "learning_rate"] for o in (optimizer, new)]
    for mine, fresh in zip(*states):
        mine.assign(fresh)
