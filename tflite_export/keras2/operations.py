"""Operations without a layer, both ways."""

from collections.abc import Callable

import numpy as np

from tflite_export.keras2.forge import Forge, Unbridged


def in_tf_keras(operation, args: tuple, kwargs: dict, forge: Forge):
    kind = type(operation).__name__
    rule = _OPERATIONS.get(kind)
    if rule is None or not type(operation).__module__.startswith("keras.src.ops"):
        raise Unbridged(
            f"The operation {operation.name!r} ({kind}) has no equal in the bridge to tf_keras. Use a layer for it, or "
            f"one of the operations {', '.join(sorted(_OPERATIONS))}."
        )
    return rule(operation, forge.make, *args, **kwargs)


def hard_activation(operation, x):
    """silu and sigmoid made of straight lines, which Keras 2 lacks or computes otherwise; None for all else."""
    import tensorflow as tf

    name = type(operation).__name__
    if name == "Activation":
        name = getattr(operation.activation, "__name__", "")
    if name.lower().replace("_", "") not in ("hardsilu", "hardsigmoid"):
        return None
    gate = tf.multiply(tf.nn.relu6(tf.add(x, 3.0)), 1 / 6)
    return gate if "igmoid" in name else tf.multiply(x, gate)


def _is_symbol(value) -> bool:
    return type(value).__name__ == "KerasTensor"


def _merge(layer: str, function: str) -> Callable:
    def rule(operation, make, a, b):
        if _is_symbol(a) and _is_symbol(b) and layer and len(a.shape) == len(b.shape):
            return make(layer, name=operation.name)([a, b])
        import tensorflow as tf

        return getattr(tf, function)(a, b)

    return rule


def _activation(name: str) -> Callable:
    return lambda operation, make, x: make("Activation", activation=name, name=operation.name)(x)


def _concatenate(operation, make, xs):
    return make("Concatenate", axis=operation.axis, name=operation.name)(list(xs))


def _reshape(operation, make, x):
    shape, rest = tuple(operation.newshape), tuple(x.shape[1:])
    # Only where the batch stays the batch is it what the layer does.
    if shape[0] in (-1, None, x.shape[0]) and -1 not in shape[1:] and None not in rest:
        if np.prod(shape[1:]) == np.prod(rest):
            return make("Reshape", target_shape=shape[1:], name=operation.name)(x)
    import tensorflow as tf

    return tf.reshape(x, [-1 if size is None else size for size in shape])


def _pad(operation, make, x, constant_values=None):
    pads = [tuple(pair) for pair in np.broadcast_to(operation.pad_width, (len(x.shape), 2)).tolist()]
    zeros = operation.mode == "constant" and not constant_values
    if zeros and len(pads) == 4 and pads[0] == pads[3] == (0, 0):
        return make("ZeroPadding2D", padding=tuple(pads[1:3]), name=operation.name)(x)
    if zeros and len(pads) == 4 and pads[0] == pads[1] == pads[2] == (0, 0):  # channels: the "width" of channels first
        settings = {"padding": ((0, 0), pads[3]), "data_format": "channels_first"}
        return make("ZeroPadding2D", **settings, name=operation.name)(x)
    import tensorflow as tf

    return tf.pad(x, pads, mode=operation.mode.upper(), constant_values=constant_values or 0)


def _getitem(operation, make, x, key):
    keys = tuple(key) if isinstance(key, (tuple, list)) else (key,)  # a saved model has a list

    if len(x.shape) == 4 and len(keys) <= 4 and all(isinstance(k, slice) for k in keys):
        full = [(k.start or 0, k.stop, k.step or 1) for k in keys] + [(0, None, 1)] * (4 - len(keys))
        if full[0] == full[3] == (0, None, 1) and all(s[:2] == (0, None) and s[2] > 0 for s in full[1:3]):
            # The largest of one number: every n-th pixel, as a layer.
            return make("MaxPooling2D", pool_size=1, strides=(full[1][2], full[2][2]), name=operation.name)(x)
    return x[keys]


def _mean(operation, make, x):
    axes = operation.axis if isinstance(operation.axis, (tuple, list)) else (operation.axis,)
    if len(x.shape) == 4 and sorted(axis % 4 for axis in axes if axis is not None) == [1, 2]:
        return make("GlobalAveragePooling2D", keepdims=operation.keepdims, name=operation.name)(x)
    import tensorflow as tf

    return tf.reduce_mean(x, operation.axis, keepdims=operation.keepdims)


def _through(function: str, *attributes: str) -> Callable:
    """An operation of TensorFlow with settings that the operation of Keras keeps as attributes."""

    def rule(operation, make, *args):
        import tensorflow as tf

        home, name = tf, function
        while "." in name:
            part, name = name.split(".", 1)
            home = getattr(home, part)
        return getattr(home, name)(*args, *(getattr(operation, attribute) for attribute in attributes))

    return rule


_OPERATIONS: dict[str, Callable] = {
    "Add": _merge("Add", "add"),
    "Subtract": _merge("Subtract", "subtract"),
    "Multiply": _merge("Multiply", "multiply"),
    "Maximum": _merge("Maximum", "maximum"),
    "Minimum": _merge("Minimum", "minimum"),
    "TrueDivide": _merge("", "divide"),
    "Divide": _merge("", "divide"),
    "Negative": _through("negative"),
    "Concatenate": _concatenate,
    "Reshape": _reshape,
    "Flatten": lambda operation, make, x: make("Flatten", name=operation.name)(x),
    "Pad": _pad,
    "GetItem": _getitem,
    "Mean": _mean,
    "Transpose": _through("transpose", "axes"),
    "Squeeze": _through("squeeze", "axis"),
    "ExpandDims": _through("expand_dims", "axis"),
    "Split": _through("split", "indices_or_sections", "axis"),
    "Relu": lambda operation, make, x: make("ReLU", name=operation.name)(x),
    "Relu6": lambda operation, make, x: make("ReLU", max_value=6.0, name=operation.name)(x),
    "Sigmoid": _activation("sigmoid"),
    "Tanh": _activation("tanh"),
    "Silu": _activation("swish"),
    "Softmax": lambda operation, make, x: make("Softmax", axis=operation.axis, name=operation.name)(x),
}


def in_keras3(layer, args: tuple, kwargs: dict):
    from keras import ops

    symbol = layer.get_config()["function"]
    kwargs = {key: value for key, value in kwargs.items() if key != "name"}
    table = {
        **{symbol: lambda x, y, function=function: function(x, y) for symbol, function in _pairs(ops).items()},
        "math.negative": lambda x: ops.negative(x),
        "math.sigmoid": lambda x: ops.sigmoid(x),
        "math.tanh": lambda x: ops.tanh(x),
        "nn.relu": lambda features: ops.relu(features),
        "nn.relu6": lambda features: ops.relu6(features),
        "nn.silu": lambda features: ops.silu(features),
        "concat": lambda values, axis: ops.concatenate(values, axis),
        "reshape": lambda tensor, shape: ops.reshape(tensor, shape),
        "pad": lambda tensor, paddings, mode="CONSTANT", constant_values=0: ops.pad(
            tensor, paddings, mode.lower(), **({"constant_values": constant_values} if mode == "CONSTANT" else {})
        ),
        "math.reduce_mean": lambda input_tensor, axis=None, keepdims=False: ops.mean(input_tensor, axis, keepdims),
        "compat.v1.transpose": lambda a, perm=None, conjugate=False: ops.transpose(a, perm),
        "expand_dims": lambda input, axis: ops.expand_dims(input, axis),
        "__operators__.getitem": lambda tensor, slice_spec: tensor[_slices(slice_spec)],
    }
    if symbol not in table:
        raise Unbridged(
            f"The operation {layer.name!r} (tf.{symbol}) has no equal in the bridge to Keras 3. Use a layer for it, or "
            f"one of the operations {', '.join(sorted(table))}."
        )
    try:
        return table[symbol](*args, **kwargs)
    except TypeError as error:
        raise Unbridged(f"The operation {layer.name!r} (tf.{symbol}) is called in an unknown way: {error}.") from error


def _pairs(ops) -> dict[str, Callable]:
    return {
        "__operators__.add": ops.add,
        "math.add": ops.add,
        "math.subtract": ops.subtract,
        "math.multiply": ops.multiply,
        "math.divide": ops.divide,
        "math.truediv": ops.divide,
        "math.maximum": ops.maximum,
        "math.minimum": ops.minimum,
    }


def _slices(specification):
    items = specification if isinstance(specification, (tuple, list)) else (specification,)
    return tuple(slice(i["start"], i["stop"], i["step"]) if isinstance(i, dict) else i for i in items)
