"""Run data through the model once and leave shadows: arrays shaped like the weights.

Backend-neutral: the gradients are taken by Keras's own training step, with an optimizer that only writes them down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.internals import inputs_of
from keras_prune.recalibration import input_batches
from keras_prune.surgery import checked_inputs, copied


class _Recorder(keras.optimizers.Optimizer):
    """Keeps the last gradient of every variable and changes nothing."""

    def __init__(self):
        super().__init__(learning_rate=0.0, name="recorder")

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.gradients = self.add_optimizer_variables(variables, "gradient")

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.gradients[self._get_variable_index(variable)], gradient)

    def get_config(self):
        return {}


def batches(data, batch_size: int = 32) -> Iterator[tuple]:
    """(x, y) batches from a pair of arrays or from an iterable of such batches.

    Raises:
        ValueError: no labels, or nothing in it.
    """
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "shape"):
        x, y = data
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(
                f"data=(x, y) has {len(x)} samples and {len(y)} labels; expected the same number, above 0."
            )
        for start in range(0, len(x), batch_size):
            yield x[start : start + batch_size], y[start : start + batch_size]
        return
    if not isinstance(data, Iterable) or hasattr(data, "shape"):
        raise ValueError("This criterion needs labelled data: data=(x, y), or an iterable of (x, y) batches.")
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ValueError("This criterion needs labels, but data holds batches without: pass (x, y) batches.")
        yield tuple(batch)


def unlabelled(model: keras.Model, data, at_most: int = 4096):
    """Inputs alone, as arrays in the structure of the model's inputs, shape (samples, ...).

    Args:
        data: such arrays, (x, y), or an iterable of batches with or without labels.
        at_most: how many samples are taken.

    Raises:
        ValueError: there is nothing in it, or it does not fit the model.
    """
    if data is None:
        raise ValueError("This needs data: unlabelled inputs, shape (samples, ...), as the model takes them.")
    parts, seen = [], 0
    for batch in input_batches(data, at_most):  # of arrays the first is all
        flat = keras.tree.flatten(_in_order(model, batch))
        arrays = [None if a is None else keras.ops.convert_to_numpy(a) for a in flat]  # an optional input may be None
        parts.append(arrays)
        seen += next((len(a) for a in arrays if a is not None), 0)
        if seen >= at_most:
            break
    if not seen:
        raise ValueError("data holds no samples; expected inputs of shape (samples, ...).")
    tensors = keras.tree.flatten(inputs_of(model))
    joined = [
        None if column[0] is None else (np.concatenate(column) if len(column) > 1 else column[0])[:at_most]
        for column in zip(*parts)
    ]
    if len(joined) != len(tensors):
        raise ValueError(f"data holds {len(joined)} arrays, but the model has {len(tensors)} inputs.")
    return checked_inputs(model, keras.tree.pack_sequence_as(inputs_of(model), joined))


def _in_order(model: keras.Model, batch):
    """A batch by the names of the inputs, in their order, which is not the order of the names."""
    names = [t.name for t in keras.tree.flatten(inputs_of(model))]
    if isinstance(batch, dict) and not isinstance(inputs_of(model), dict) and set(batch) == set(names):
        return [batch[name] for name in names]
    return batch


def gradient_times_weight(channels: Channels, data, max_batches: int = 16) -> list[dict[int, np.ndarray]]:
    """One shadow per batch: `{id(variable): gradient of the loss x weight}`.

    Args:
        channels: labels of a compiled model; its loss is used, its weights and statistics stay as they are.
        data: (x, y) arrays or batches.
        max_batches: how many batches at most.

    Raises:
        ValueError: the model has no loss, or data is empty or unlabelled.
    """
    model = channels.model
    loss = getattr(model, "loss", None) if model.compiled else None
    if loss is None:
        raise ValueError(
            f"criterion 'taylor' needs a loss, but model {model.name!r} is not compiled: call "
            "model.compile(loss=...) first."
        )
    copy, twin = copied(channels)
    recorder = _Recorder()
    copy.compile(optimizer=recorder, loss=loss)
    trainable = {id(v) for v in copy.trainable_variables}
    shadows = []
    for number, batch in enumerate(batches(data)):
        if number >= max_batches:
            break
        copy.train_on_batch(*batch)
        shadows.append(
            {
                id(w.variable): keras.ops.convert_to_numpy(w.variable)
                * keras.ops.convert_to_numpy(recorder.gradients[recorder._get_variable_index(twin[id(w.variable)])])
                for w in channels.weights
                if id(twin[id(w.variable)]) in trainable
            }
        )
    if not shadows:
        raise ValueError("data holds no batch.")
    return shadows
