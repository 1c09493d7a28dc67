"""In the child process: the ranges of activations, measured before training starts.

tensorflow-model-optimization starts the range of each activation at -6 ... 6 and moves it by a thousandth per step
towards what it sees: large activations would stay clipped for thousands of steps. So the float network is run once on a
few batches, and each range starts at the mean of the batches' smallest and largest numbers; those of the inputs, as in
tfmot, at the smallest and largest of all.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np


def calibrate(model, batches: list[list[np.ndarray]]) -> None:
    """Sets the ranges of a quantised tf_keras model from a few batches; its weights stay as they are."""
    with _observed(), _last_values():
        for batch in batches:
            model(batch if len(batch) > 1 else batch[0], training=False)


def settle_weights(model, batch: list[np.ndarray]) -> None:
    """The ranges of the weights, which lag one step behind training, at the weights that training ended with."""
    with _last_values():
        model(batch if len(batch) > 1 else batch[0], training=False)


@contextlib.contextmanager
def _called(kind: type, function: Callable) -> Iterator[None]:
    """While this holds, a quantiser of this kind is `function(original, quantiser, inputs, training, weights)`."""
    original = kind.__call__
    kind.__call__ = lambda self, *args, **kwargs: function(original, self, *args, **kwargs)
    try:
        yield
    finally:
        kind.__call__ = original


@contextlib.contextmanager
def _observed() -> Iterator[None]:
    """While this holds, quantisers of activations let numbers through and write down their range."""
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.quantization.keras import quantizers

    seen: dict[int, int] = {}

    def ends(inputs):  # 0 has to be a number of the grid: padding and ReLU need it exactly
        return tf.minimum(tf.reduce_min(inputs), 0.0), tf.maximum(tf.reduce_max(inputs), 0.0)

    def mean(original, quantiser, inputs, training, weights, **unused):
        count = seen[id(weights["min_var"])] = seen.get(id(weights["min_var"]), 0) + 1
        for variable, value in zip((weights["min_var"], weights["max_var"]), ends(inputs)):
            variable.assign(value if count == 1 else variable + (value - variable) / count)
        return inputs

    def all_values(original, quantiser, inputs, training, weights, **unused):
        low, high = ends(inputs)
        weights["min_var"].assign(tf.minimum(weights["min_var"], low))
        weights["max_var"].assign(tf.maximum(weights["max_var"], high))
        return inputs

    with _called(quantizers.MovingAverageQuantizer, mean), _called(quantizers.AllValuesQuantizer, all_values):
        yield


@contextlib.contextmanager
def _last_values() -> Iterator[None]:
    """While this holds, quantisers of weights take the range of the present weights, as they do in training."""
    from tensorflow_model_optimization.python.core.quantization.keras import quantizers

    def present(original, quantiser, inputs, training, weights, **rest):
        return original(quantiser, inputs, True, weights, **rest)

    with _called(quantizers.LastValueQuantizer, present):
        yield
