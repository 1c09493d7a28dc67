"""Re-estimate BatchNormalization statistics after a cut: the layers before have changed what they see."""

from __future__ import annotations

import keras
import numpy as np

from keras_prune.internals import layers_of


def recalibrate_batchnorm(model: keras.Model, data, *, batch_size: int = 64, max_batches: int = 100) -> int:
    """Replace the running mean and variance of all BatchNormalization layers by averages over `data`, in place.

    Every batch has the same weight (a cumulative average), so that nothing of the old statistics is left, whatever
    the layers' momentum. Frozen layers (trainable=False) run in inference mode in Keras and keep their statistics.

    Args:
        model: the model; its weights and trainable flags stay as they are.
        data: unlabelled inputs: an array (or structure of arrays) of shape (samples, ...), or an iterable of batches;
            of (x, y) batches x is taken.
        batch_size: for arrays.
        max_batches: stop after as many batches.

    Returns:
        Number of layers that were re-estimated.

    Raises:
        ValueError: data is empty.
    """
    norms = [
        layer for layer in layers_of(model) if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if not norms:
        return 0
    momenta = [layer.momentum for layer in norms]
    seen = 0
    try:
        for batch in input_batches(data, batch_size):
            if seen >= max_batches:
                break
            for layer in norms:  # after batch t the average is (t-1)/t of the old and 1/t of the new
                layer.momentum = seen / (seen + 1)
            model(batch, training=True)
            seen += 1
    finally:
        for layer, momentum in zip(norms, momenta):
            layer.momentum = momentum
    if not seen:
        raise ValueError("data holds no batch; expected inputs of shape (samples, ...) or an iterable of batches.")
    return len(norms)


def input_batches(data, batch_size: int):
    """Batches of inputs from arrays, (x, y), or an iterable of batches with or without labels."""
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        data = data[0]  # (x, y)
    arrays = keras.tree.flatten(data) if isinstance(data, (np.ndarray, dict, list)) or hasattr(data, "shape") else []
    if arrays and all(hasattr(a, "shape") for a in arrays):
        for start in range(0, len(arrays[0]), batch_size):
            yield keras.tree.map_structure(lambda a, s=start: a[s : s + batch_size], data)
        return
    for batch in data:
        yield batch[0] if isinstance(batch, tuple) else batch
