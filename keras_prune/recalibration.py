"""Re-estimate BatchNormalization statistics after a cut: the layers before have changed what they see."""

from __future__ import annotations

import keras

from keras_prune.internals import layers_of
from keras_prune.program import samples_in


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
    if isinstance(data, tuple) and len(data) == 2 and is_all(*data):
        data = list(data[0]) if isinstance(data[0], tuple) else data[0]
    are_batches = isinstance(data, list) and any(isinstance(part, tuple) for part in data)
    if (isinstance(data, (dict, list)) or hasattr(data, "shape")) and are_arrays(data) and not are_batches:
        for start in range(0, samples_in(data), batch_size):
            yield keras.tree.map_structure(lambda a, s=start: None if a is None else a[s : s + batch_size], data)
        return
    for batch in data:
        yield batch[0] if isinstance(batch, tuple) else batch


def is_all(x, y) -> bool:
    """Whether x and y are all inputs and all labels, and not two batches of both: two tuples are taken for batches."""
    return are_arrays(x) and not (isinstance(x, tuple) and isinstance(y, tuple))


def are_arrays(data) -> bool:
    """Whether data is an array, or lists or dictionaries of arrays; an optional input may be None."""
    arrays = [a for a in keras.tree.flatten(data) if a is not None]
    return bool(arrays) and all(hasattr(a, "shape") for a in arrays)
