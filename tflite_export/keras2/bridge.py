"""Both ways over the bridge.

Both packages describe layers in configs that the other one refuses. So the graph is walked call by call: each layer is
made anew from the class of the same name, with those of its settings that the other constructor knows, and gets its
weights; each operation (`x + y`, `ops.pad`) becomes a layer where one computes the same, and else the other package's
operation. What came out is then run beside the original, and refused if it computes anything else.
"""

import os
from collections.abc import Callable
from types import ModuleType

import numpy as np

from tflite_export.keras2 import operations
from tflite_export.keras2.forge import Forge, Unbridged, plain_name

TOLERANCE = 1e-3
"""Largest difference of outputs, divided by the largest output, at which two models count as the same."""


def to_tf_keras(model, *, replace: Callable | None = None):
    """The same network as a `tf_keras` model, weights included. Nested models are laid flat.

    Importing `tf_keras` changes nothing about `keras` or `tf.keras`; importing tensorflow_model_optimization does, see
    `tflite_export.qat`.

    Args:
        model: a built Functional or Sequential Keras 3 model.
        replace: function (layer or operation, positional arguments, forge) -> a tensor, or None to leave the step to
            this bridge; `forge.make(class name, **settings)` makes a layer of tf_keras, `forge.like(layer)` an equal.

    Returns:
        A `tf_keras.Model` that takes a list of tensors in the order of `model.inputs` (one tensor if there is one) and
        gives the outputs in the order of `model.outputs`.

    Raises:
        Unbridged (a ValueError): a layer or operation that tf_keras does not have, by name, or one that computes
            something else there.
        ModuleNotFoundError: tf_keras is not installed.

    Example:
        >>> old = to_tf_keras(keras.applications.MobileNetV2(weights=None))         # doctest: +SKIP
        >>> old.save("mobilenet.h5")                                                # doctest: +SKIP
    """
    tf_keras = _tf_keras()
    low = [layer for layer in model._flatten_layers() if layer.compute_dtype in ("float16", "bfloat16")]
    if low:
        raise Unbridged(
            f"The layer {low[0].name!r} computes in {low[0].compute_dtype}; the bridge takes float32 models."
        )
    forge = Forge(tf_keras, to_keras3=False)
    inputs = [
        tf_keras.Input(tuple(tensor.shape[1:]), batch_size=tensor.shape[0], dtype=tensor.dtype, name=forge.name(name))
        for tensor, name in zip(model.inputs, _input_names(model))
    ]
    outputs = _walk_keras3(model, inputs, forge, replace)
    made = tf_keras.Model(_alone(inputs), _alone(outputs), name=plain_name(model.name))
    forge.copy_weights()
    _prove(model, made, "tf_keras")
    return made


def rewritten(model, replace: Callable):
    """The same network in Keras 3 with some steps replaced, as in `to_tf_keras`; nested models are laid flat."""
    import keras

    forge = Forge(keras, to_keras3=False)
    inputs = [
        keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=forge.name(name))
        for tensor, name in zip(model.inputs, _input_names(model))
    ]
    try:
        outputs = _walk_keras3(model, inputs, forge, replace)
    except TypeError as error:  # an operation of TensorFlow on a tensor of Keras
        raise Unbridged(f"An operation of the model {model.name!r} has no layer: {str(error)[:200]}") from error
    made = keras.Model(_alone(inputs), _alone(outputs), name=plain_name(model.name))
    forge.copy_weights()
    _prove(model, made, "Keras 3")
    return made


def from_tf_keras(model):
    """A `tf_keras` model as the same network in Keras 3, weights included: a model pruned by tfmot can be stripped.

    Args:
        model: a Functional or Sequential tf_keras model, or the path of one saved by tf_keras (.h5, .keras, a folder).
            One that was pruned went through `tfmot.sparsity.keras.strip_pruning` before.

    Returns:
        A Functional Keras 3 model with the same inputs and outputs; nested models are laid flat.

    Raises:
        Unbridged (a ValueError): a layer or operation without an equal in Keras 3, by name.
        TypeError: something else was passed.
        ModuleNotFoundError: tf_keras is not installed.

    Example:
        >>> model = from_tf_keras(tfmot.sparsity.keras.strip_pruning(pruned))       # doctest: +SKIP
        >>> small = keras_prune.strip(model)                                        # doctest: +SKIP
    """
    import keras

    tf_keras = _tf_keras()
    if isinstance(model, (str, os.PathLike)):
        model = tf_keras.models.load_model(os.fspath(model), compile=False)
    if not isinstance(model, tf_keras.Model):
        raise TypeError(
            f"{type(model).__module__}.{type(model).__name__} was passed; expected a tf_keras model or the path of "
            "one. A Keras 3 model needs no bridge."
        )
    if not model.built or not hasattr(model, "inputs") or not model.inputs:
        raise Unbridged(f"The model {model.name!r} has no known inputs: build it, or make it Functional.")
    forge = Forge(keras, to_keras3=True)
    names = list(model.input_names)
    inputs = [
        keras.Input(tuple(tensor.shape[1:]), batch_size=tensor.shape[0], dtype=tensor.dtype.name, name=forge.name(name))
        for tensor, name in zip(model.inputs, names)
    ]
    outputs = _walk_tf_keras(model, inputs, forge)
    made = keras.Model(_alone(inputs), _alone(outputs), name=plain_name(model.name))
    forge.copy_weights()
    _prove(model, made, "Keras 3")
    return made


def _walk_keras3(model, tensors: list, forge: Forge, replace: Callable | None) -> list:
    import keras

    graph = getattr(model, "_functional", None) or model
    if not hasattr(graph, "_nodes_by_depth"):
        raise Unbridged(f"The model {model.name!r} is subclassed: wrap its call with keras.Model(inputs, outputs).")
    values = {id(symbol): tensor for symbol, tensor in zip(graph.inputs, tensors, strict=True)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            operation = node.operation
            args, kwargs = keras.tree.map_structure(
                lambda each: values[id(each)] if isinstance(each, keras.KerasTensor) else each,
                (node.arguments.args, node.arguments.kwargs),
            )
            if isinstance(operation, keras.Model):
                made = _walk_keras3(operation, keras.tree.flatten(args), forge, replace)
            else:
                made = None if replace is None else replace(operation, args, forge)
                if made is None and args:
                    made = operations.hard_activation(operation, args[0])
                if made is None and isinstance(operation, keras.layers.Layer):
                    kwargs = {key: value for key, value in kwargs.items() if value is not None and key != "training"}
                    made = forge.like(operation)(*args, **kwargs)
                elif made is None:
                    made = operations.in_tf_keras(operation, args, kwargs, forge)
            for symbol, tensor in zip(node.outputs, keras.tree.flatten(made), strict=True):
                values[id(symbol)] = tensor
    return [values[id(symbol)] for symbol in graph.outputs]


def _walk_tf_keras(model, tensors: list, forge: Forge) -> list:
    import tensorflow as tf

    tf_keras = _tf_keras()
    values = {id(symbol): tensor for symbol, tensor in zip(model.inputs, tensors, strict=True)}
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if node.is_input:
                continue
            layer = node.layer
            args, kwargs = tf.nest.map_structure(
                lambda each: values.get(id(each), each), (node.call_args, node.call_kwargs)
            )
            kwargs = {key: value for key, value in kwargs.items() if value is not None and key != "training"}
            if isinstance(layer, tf_keras.Model):
                made = _walk_tf_keras(layer, tf.nest.flatten(args), forge)
            elif type(layer).__name__ in ("TFOpLambda", "SlicingOpLambda"):
                made = operations.in_keras3(layer, args, kwargs)
            elif type(layer).__name__ == "PruneLowMagnitude":
                raise Unbridged(
                    f"The layer {layer.name!r} is still wrapped for pruning; call "
                    "tfmot.sparsity.keras.strip_pruning(model) first."
                )
            else:
                made = forge.like(layer)(*args, **kwargs)
            for symbol, tensor in zip(tf.nest.flatten(node.outputs), tf.nest.flatten(made)):
                values[id(symbol)] = tensor
    return [values[id(symbol)] for symbol in model.outputs]


def _prove(old, new, where: str) -> None:
    """Raises Unbridged unless both models compute the same of two generated samples."""
    random = np.random.default_rng(0)
    arrays = []
    for tensor in old.inputs:
        shape = [size or 2 if at == 0 else size or 32 for at, size in enumerate(tensor.shape)]
        kind = np.dtype(getattr(tensor.dtype, "name", tensor.dtype)).kind
        values = random.normal(size=shape) if kind == "f" else random.integers(0, 2, shape)
        arrays.append(np.asarray(values).astype(getattr(tensor.dtype, "name", tensor.dtype)))
    expected, got = (_outputs(each, arrays) for each in (old, new))
    peak = max([float(np.abs(value).max(initial=0)) for value in expected] + [1e-30])
    for name, a, b in zip(new.output_names, expected, got, strict=True):
        difference = float(np.abs(a - b).max(initial=0)) / peak if a.shape == b.shape else np.inf
        if not difference <= TOLERANCE:
            raise Unbridged(
                f"The output {name!r} came out otherwise in {where} (relative difference {difference:.2g}): a layer or "
                "activation of the same name computes something else there (hard_sigmoid does)."
            )


def _outputs(model, arrays: list[np.ndarray]) -> list[np.ndarray]:
    import keras
    import tensorflow as tf

    if isinstance(model, keras.Model):
        # Sequential keeps no structure of its inputs before it was called on a symbol.
        structure = getattr(model, "_inputs_struct", None)
        given = arrays[0] if structure is None else keras.tree.pack_sequence_as(structure, arrays)
        flat = keras.tree.flatten(model(given, training=False))
    else:
        structure = getattr(model, "_nested_inputs", None)
        given = arrays[0] if structure is None else tf.nest.pack_sequence_as(structure, arrays)
        flat = tf.nest.flatten(model(given, training=False))
    return [np.asarray(value, "float64") for value in flat]


def _alone(tensors: list):
    return tensors[0] if len(tensors) == 1 else tensors


def _input_names(model) -> list[str]:
    return [tensor._keras_history.operation.name for tensor in model.inputs]


def _tf_keras() -> ModuleType:
    try:
        import tf_keras
    except ImportError as error:
        raise ModuleNotFoundError(
            f"The bridge to Keras 2 needs tf-keras ({error}): pip install 'keras_prune[tfmot]'"
        ) from error
    return tf_keras
