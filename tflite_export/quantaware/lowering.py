"""In the child process: what tensorflow-model-optimization refuses, written in layers that it takes.

It trains BatchNormalization only right behind a convolution or Dense layer, and knows neither Rescaling nor arithmetic
with constants. All of these multiply each channel by one number and add another, which is a 1x1 depthwise convolution:
int8 files have a kernel for it.
"""

import numpy as np

TAKEN = ("linear", "relu", "softmax", "sigmoid", "tanh", "gelu")  # activations inside of other layers
_FOLDED = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense")
_NOISE = ("GaussianNoise", "GaussianDropout", "AlphaDropout", "ActivityRegularization")
MEND = "Quantise the network after training instead: tflite_export.export(model, path, 'int8', data)."


class Refused(ValueError):
    """A layer that cannot be trained on fake quantization; the message names it."""


class Lowering:
    """The function `replace` of `to_tf_keras`, for one flat Keras 3 model.

    Args:
        model: the flat model.
        train_batchnorm: leave BatchNormalization behind a convolution in place, to be trained with the statistics of
            each batch. Otherwise it is folded into the layer before it.
        inside: activations that may stay inside of other layers.
    """

    def __init__(self, model, train_batchnorm: bool = False, inside: tuple[str, ...] = TAKEN):
        self._train_batchnorm, self._inside = train_batchnorm, inside
        self._notes: dict[str, list[str]] = {}
        self._split: list = []  # the bridge knows layers by their id: they have to live as long as it works
        graph = getattr(model, "_functional", None) or model
        self._nodes: dict[int, list] = {}
        self._outputs = {id(tensor) for tensor in graph.outputs}
        self._readers: dict[int, list] = {}
        for node in (node for nodes in graph._nodes_by_depth.values() for node in nodes):
            self._nodes.setdefault(id(node.operation), []).append(node)
            for tensor in node.input_tensors:
                self._readers.setdefault(id(tensor), []).append(node)

    def __call__(self, operation, args: tuple, forge):
        kind = type(operation).__name__
        rule = getattr(self, f"_{kind.lower()}", None)
        if rule is not None:
            return rule(operation, args, forge)
        if kind.startswith("Random") or kind in _NOISE:
            self._note("Left out, since they do nothing once the network is trained", operation)
            return args[0]
        if kind in _FOLDED and self._batchnorm_after(operation) is not None:
            return self._folded(operation, args, forge)
        if kind in (*_FOLDED, "Conv2DTranspose"):
            return self._with_activation(operation, args, forge)
        return None

    # -- channel by channel: x * scale + offset ------------------------------------------------------------------

    def _batchnormalization(self, layer, args, forge):
        before = self._nodes[id(layer)][0].input_tensors[0]._keras_history.operation
        if self._batchnorm_after(before) is layer:
            return None if self._stays(before) else args[0]
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
        rank = len(args[0].shape)
        if axis % rank != rank - 1:
            raise Refused(
                f"The layer {layer.name!r} normalises axis {axis}; expected the last one, the channels. {MEND}"
            )
        scale, offset = _scale_and_offset(layer)
        self._note("Trained as a scale and an offset per channel, since they follow no convolution", layer)
        return _affine(layer.name, args[0], scale, offset, forge, trainable=layer.trainable)

    def _rescaling(self, layer, args, forge):
        self._note("Written as a scale and an offset per channel", layer)
        return _affine(layer.name, args[0], np.asarray(layer.scale), np.asarray(layer.offset), forge, trainable=False)

    def _normalization(self, layer, args, forge):
        spread = np.maximum(np.sqrt(_array(layer.variance)), 1e-7)
        scale, offset = 1.0 / spread, -_array(layer.mean) / spread
        if layer.invert:
            scale, offset = spread, _array(layer.mean)
        self._note("Written as a scale and an offset per channel", layer)
        return _affine(layer.name, args[0], scale.ravel(), offset.ravel(), forge, trainable=False)

    def _add(self, operation, args, forge):
        return self._arithmetic(operation, args, forge, lambda constant, first: (1.0, constant))

    def _subtract(self, operation, args, forge):
        return self._arithmetic(
            operation, args, forge, lambda constant, first: (-1.0, constant) if first else (1.0, -constant)
        )

    def _multiply(self, operation, args, forge):
        return self._arithmetic(operation, args, forge, lambda constant, first: (constant, 0.0))

    def _truedivide(self, operation, args, forge):
        def numbers(constant, first):
            if first:
                raise Refused(f"The operation {operation.name!r} divides by a tensor, which int8 does not. {MEND}")
            return 1.0 / constant, 0.0

        return self._arithmetic(operation, args, forge, numbers)

    _divide = _truedivide

    def _arithmetic(self, operation, args, forge, numbers):
        """An operation of one tensor and a constant that is one number, or one per channel."""
        if len(args) != 2:
            return None
        constants = [not _is_symbol(each) for each in args]
        if not any(constants):
            return None
        first = constants[0]
        constant, x = np.asarray(args[0] if first else args[1], "float32"), args[1] if first else args[0]
        if constant.size != 1 and (constant.shape[-1:] != (constant.size,) or constant.size != x.shape[-1]):
            raise Refused(
                f"The operation {operation.name!r} has a constant of the shape {constant.shape}; expected one number "
                f"or one per channel. {MEND}"
            )
        scale, offset = numbers(constant.ravel(), first)
        return _affine(operation.name, x, np.asarray(scale), np.asarray(offset), forge, trainable=False)

    # -- activations ---------------------------------------------------------------------------------------------

    def _activation(self, layer, args, forge):
        return self._activated(layer.activation.__name__, layer.name, args[0], forge)

    def _relu(self, operation, args, forge):
        return forge.make("ReLU", name=operation.name, **_relu_settings(operation))(args[0])

    def _silu(self, operation, args, forge):
        return self._activated("silu", operation.name, args[0], forge)

    def _hardsilu(self, operation, args, forge):
        return self._activated("hard_silu", operation.name, args[0], forge)

    def _hardsigmoid(self, operation, args, forge):
        return self._activated("hard_sigmoid", operation.name, args[0], forge)

    def _activated(self, activation: str, name: str, x, forge):
        if activation in TAKEN:
            return forge.make("Activation", activation=activation, name=name)(x)
        if activation == "relu6":
            return forge.make("ReLU", max_value=6.0, name=name)(x)
        if activation in ("silu", "swish"):
            return forge.make("Multiply", name=name)(
                [x, forge.make("Activation", activation="sigmoid", name=f"{name}_gate")(x)]
            )
        if activation in ("hard_silu", "hard_swish", "hard_sigmoid"):
            above = _affine(f"{name}_above", x, np.asarray(1.0), np.asarray(3.0), forge, trainable=False)
            gate = forge.make("ReLU", max_value=6.0, name=f"{name}_clipped")(above)
            gate = _affine(f"{name}_gate", gate, np.asarray(1 / 6), np.asarray(0.0), forge, trainable=False)
            return gate if activation == "hard_sigmoid" else forge.make("Multiply", name=name)([x, gate])
        raise Refused(f"The layer {name!r} has the activation {activation!r}; int8 training knows {', '.join(TAKEN)}, "
                      f"relu6, silu, hard_silu and hard_sigmoid. {MEND}")  # fmt: skip

    def _with_activation(self, layer, args, forge):
        """A layer whose activation has to stand alone; None if it may stay inside."""
        activation = layer.activation.__name__
        if activation in self._inside:
            return None
        plain = self._altered(layer, layer.get_weights(), activation="linear")
        return self._activated(activation, f"{layer.name}_{activation}", forge.like(plain)(args[0]), forge)

    def _altered(self, layer, weights: list[np.ndarray], **settings):
        """The same Keras 3 layer with other settings and weights."""
        made = type(layer).from_config(layer.get_config() | settings)
        made.build(self._nodes[id(layer)][0].input_tensors[0].shape)
        made.set_weights(weights)
        made.trainable = layer.trainable
        self._split.append(made)
        return made

    # -- BatchNormalization behind a layer with a kernel ----------------------------------------------------------

    def _batchnorm_after(self, layer):
        """The BatchNormalization that alone reads what this layer computes; None if there is no such."""
        nodes = self._nodes.get(id(layer), [])
        if len(nodes) != 1 or type(layer).__name__ not in _FOLDED or layer.activation.__name__ != "linear":
            return None
        [tensor] = nodes[0].outputs
        readers = self._readers.get(id(tensor), [])
        if id(tensor) in self._outputs or len(readers) != 1:
            return None
        after = readers[0].operation
        if type(after).__name__ != "BatchNormalization" or len(self._nodes[id(after)]) != 1:
            return None
        axis = after.axis if isinstance(after.axis, int) else after.axis[0]
        return after if axis % len(tensor.shape) == len(tensor.shape) - 1 else None

    def _stays(self, layer) -> bool:
        # Behind Dense the converter would leave it in floats.
        return self._train_batchnorm and type(layer).__name__ != "Dense"

    def _folded(self, layer, args, forge):
        if self._stays(layer):
            return None
        scale, offset = _scale_and_offset(self._batchnorm_after(layer))
        weights = layer.get_weights()
        bias = weights.pop() if layer.use_bias else 0.0
        kernel = weights.pop()
        depthwise = type(layer).__name__ == "DepthwiseConv2D"  # (height, width, channels, multiplier)
        weights += [kernel * (scale.reshape(kernel.shape[2:]) if depthwise else scale), bias * scale + offset]
        return forge.like(self._altered(layer, weights, use_bias=True))(args[0])

    # -- the rest ------------------------------------------------------------------------------------------------

    def _note(self, text: str, layer) -> None:
        self._notes.setdefault(text, []).append(layer.name)

    def sentences(self) -> list[str]:
        """The notes, with the names of the layers."""
        found = []
        for text, names in self._notes.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{text}: {', '.join(names[:3])}{more}.")
        return found


def _relu_settings(operation) -> dict:
    names = ("max_value", "negative_slope", "threshold")
    return {name: getattr(operation, name) for name in names if hasattr(operation, name)}


def _affine(name: str, x, scale: np.ndarray, offset: np.ndarray, forge, *, trainable: bool):
    """x * scale + offset, one number of each per channel (the last axis), as a 1x1 depthwise convolution."""
    channels, shape = int(x.shape[-1]), tuple(x.shape[1:])
    layer = forge.make("DepthwiseConv2D", kernel_size=1, name=name)
    if len(shape) == 3:
        result = layer(x)
    elif None not in shape:
        image = (int(np.prod(shape[:-1], dtype=int)), 1, channels)
        result = forge.make("Reshape", target_shape=image, name=f"{name}_image")(x)
        result = forge.make("Reshape", target_shape=shape, name=f"{name}_back")(layer(result))
    else:
        raise Refused(f"The layer {name!r} has the shape {shape} with an open size; expected fixed sizes. {MEND}")
    kernel = np.broadcast_to(np.asarray(scale, "float32").ravel(), (channels,)).reshape(1, 1, channels, 1)
    layer.set_weights([kernel, np.broadcast_to(np.asarray(offset, "float32").ravel(), (channels,))])
    layer.trainable = trainable
    return result


def _scale_and_offset(layer) -> tuple[np.ndarray, np.ndarray]:
    """A BatchNormalization as it computes after training: x * scale + offset."""
    scale = 1.0 / np.sqrt(_array(layer.moving_variance) + layer.epsilon)
    scale = scale * (_array(layer.gamma) if layer.scale else 1.0)
    return scale, (_array(layer.beta) if layer.center else 0.0) - _array(layer.moving_mean) * scale


def _array(value) -> np.ndarray:
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value, "float32")


def _is_symbol(value) -> bool:
    return type(value).__name__ == "KerasTensor"
