"""In the child process: fake quantization in Keras 3 itself, without tensorflow-model-optimization.

The public function `keras.quantizers.fake_quant_with_min_max_vars` is, on TensorFlow, the operation which the .tflite
converter reads as "int8 with this range". Keras has no layer around it: here one rounds what a layer computes, and
another one what it multiplies with.
"""

import keras
from keras import ops

from tflite_export.quantaware.lowering import MEND, Refused

INSIDE = ("linear", "relu")  # activations that the file computes within the layer
_DECAY = 0.999
_KERNELS = ("Conv2D", "DepthwiseConv2D", "Dense")
_MERGES = ("Add", "Subtract", "Multiply", "Maximum", "Minimum", "Average", "Concatenate")
_ROUNDED = (*_KERNELS, *_MERGES, "BatchNormalization", "ReLU", "LeakyReLU", "AveragePooling2D",
            "GlobalAveragePooling2D", "UpSampling2D")  # fmt: skip
# They hand numbers on as they are, or have a fixed range in the file.
_KEPT = ("InputLayer", "Flatten", "Reshape", "Permute", "ZeroPadding2D", "Cropping2D", "MaxPooling2D",
         "GlobalMaxPooling2D", "Dropout", "SpatialDropout2D", "Softmax")  # fmt: skip
_FIXED_RANGE = ("softmax", "sigmoid", "tanh", "linear")


class Rounded(keras.layers.Layer):
    """Rounds activations to 256 levels in a range that follows what was seen in training."""

    def build(self, shape):
        self.low = self.add_weight(shape=(), initializer="zeros", trainable=False, name="low")
        self.high = self.add_weight(shape=(), initializer="zeros", trainable=False, name="high")
        self.batches, self.observes = 0, False

    def call(self, x, training=False):
        if self.observes or training:
            # 0 has to be a number of the grid: padding and ReLU need it exactly.
            low, high = ops.minimum(ops.min(x), 0.0), ops.maximum(ops.max(x), 0.0)
            self.batches += self.observes
            part = 1 / self.batches if self.observes else 1 - _DECAY
            self.low.assign(self.low + part * (low - self.low))
            self.high.assign(self.high + part * (high - self.high))
        return x if self.observes else keras.quantizers.fake_quant_with_min_max_vars(x, self.low, self.high)

    def compute_output_shape(self, shape):
        return shape


class RoundedKernel(keras.layers.Layer):
    """A layer whose kernel is rounded to int8: with one scale per channel, Dense with one for all."""

    def __init__(self, layer, **settings):
        super().__init__(**settings)
        self.layer = layer
        self.kind = type(layer).__name__

    def build(self, shape):
        if not self.layer.built:
            self.layer.build(shape)
        shape = self._by_channel().shape
        channels = () if self.kind == "Dense" else (shape[-1],)
        self.peak = self.add_weight(shape=channels, initializer="ones", trainable=False, name="peak")

    def _by_channel(self):
        kernel = ops.convert_to_tensor(self.layer.kernel)
        if self.kind != "DepthwiseConv2D":
            return kernel
        # Fake quantization takes the last axis, and the file's kernel is (1, height, width, channels x multiplier).
        return ops.reshape(kernel, (*kernel.shape[:2], 1, kernel.shape[2] * kernel.shape[3]))

    def settle(self):
        """Sets the range to the kernel's present one."""
        kernel = ops.abs(self._by_channel())
        axes = None if self.kind == "Dense" else tuple(range(len(kernel.shape) - 1))
        self.peak.assign(ops.maximum(ops.max(kernel, axis=axes), 1e-8))

    def call(self, x, training=False):
        if training:
            self.settle()
        peak = ops.convert_to_tensor(self.peak)
        settings = {"narrow_range": True, "axis": None if self.kind == "Dense" else -1}
        rounded = keras.quantizers.fake_quant_with_min_max_vars(self._by_channel(), -peak, peak, **settings)
        variable = next(each for each in self.layer.trainable_variables + self.layer.variables if each.name == "kernel")
        with keras.StatelessScope(state_mapping=[(variable, ops.reshape(rounded, variable.shape))]):
            return self.layer.call(x)

    def compute_output_shape(self, shape):
        return self.layer.compute_output_shape(shape)


def quantised(model):
    """A flat Keras 3 model, lowered, with fake quantization wherever an int8 file rounds.

    Raises:
        Refused: a layer that this does not train, by name.
    """
    readers: dict[int, list] = {}
    for node in (node for nodes in model._nodes_by_depth.values() for node in nodes):
        for tensor in node.input_tensors:
            readers.setdefault(id(tensor), []).append(node.operation)
    originals = {layer.name: layer for layer in model.layers}

    def cloned(layer):
        kind = type(layer).__name__
        if kind not in (*_ROUNDED, *_KEPT, "Activation"):
            raise Refused(
                f"The layer {layer.name!r} ({kind}) cannot be trained on fake quantization in Keras 3. {MEND}"
            )
        made = type(layer).from_config(layer.get_config())
        return RoundedKernel(made, name=layer.name, trainable=layer.trainable) if kind in _KERNELS else made

    def called(layer, *args, **kwargs):
        result, original = layer(*args, **kwargs), originals[layer.name]
        return Rounded(name=f"{layer.name}_rounded")(result) if _is_rounded(original, readers) else result

    inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in model.inputs]
    clone = keras.models.clone_model(model, clone_function=cloned, call_function=called)
    outputs = clone([Rounded()(each) for each in inputs] if len(inputs) > 1 else Rounded()(inputs[0]))
    for layer in clone.layers:
        inner = layer.layer if isinstance(layer, RoundedKernel) else layer
        if layer.name in originals and originals[layer.name].weights:
            inner.set_weights(originals[layer.name].get_weights())
    return keras.Model(inputs, outputs)


def _is_rounded(layer, readers: dict[int, list]) -> bool:
    kind, after = type(layer).__name__, readers.get(id(layer.output), [])
    if kind in _KEPT or kind == "Activation" and layer.activation.__name__ in _FIXED_RANGE:
        return False
    if len(after) == 1 and getattr(layer, "activation", None) in (None, keras.activations.linear):
        # The file computes them in one step.
        follower = type(after[0]).__name__
        if follower == "BatchNormalization" and kind in _KERNELS:
            return False
        relu = follower == "ReLU" or follower == "Activation" and after[0].activation is keras.activations.relu
        return not (relu and kind in (*_KERNELS, "BatchNormalization", "Add"))
    return True


def calibrate(model, batches: list) -> None:
    """Sets the ranges of a model made by `quantised`; its weights stay as they are."""
    layers = list(model._flatten_layers())
    rounded = [layer for layer in layers if isinstance(layer, Rounded)]
    settle_weights(model)
    for layer in rounded:
        layer.observes = True
    for batch in batches:
        model(batch if len(batch) > 1 else batch[0], training=False)
    for layer in rounded:
        layer.observes = False


def settle_weights(model, batch=None) -> None:
    """The ranges of the kernels, which lag one step behind training, at the kernels that training ended with."""
    for layer in model._flatten_layers():
        if isinstance(layer, RoundedKernel):
            layer.settle()
