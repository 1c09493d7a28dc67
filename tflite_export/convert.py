"""Floor 2. Keras model + recipe + data -> the bytes of a .tflite file."""

import re
from collections.abc import Iterator

import numpy as np

from tflite_export import flatbuffer
from tflite_export.inputs import Data, Input, check_model, collect, input_names, model_inputs, output_names
from tflite_export.recipes import Recipe, get
from tflite_export.runner import first_line
from tflite_export.silence import quiet


def to_tflite(
    model,
    recipe: str | Recipe = "float32",
    data: Data | None = None,
    *,
    input_shape=None,
    batch_size: int = 1,
    float_io: bool = False,
    allow_flex: bool = False,
    samples: int = 200,
) -> bytes:
    """Converts a Keras model to the bytes of a .tflite file. Measures nothing: `export` does that as well.

    Args: as in `export`.

    Raises:
        ValueError: bad arguments, or an operator the file format or the recipe does not have.
        TypeError: not a Keras model.
        RuntimeError: the converter failed for a reason unknown to this package.

    Example:
        >>> content = to_tflite(model, "float16")                  # doctest: +SKIP
    """
    recipe = get(recipe)
    check_model(model)
    check_batch_size(model, batch_size)
    model = in_float32(model)
    inputs = model_inputs(model, input_shape)
    arrays = calibration(recipe, data, inputs, samples)
    with quiet():
        function = _trace(model, inputs, batch_size)
        _refuse_loops(model, function, recipe)
        converter = _converter(function, recipe, arrays, batch_size, float_io, allow_flex)
        try:
            content = bytes(converter.convert())
        except Exception as error:  # ConverterError, RuntimeError and ValueError, by the stage that fails
            raise _explained(error, recipe) from error
    text = f"recipe={recipe.name} float_io={float_io} by tflite_export"
    return flatbuffer.sign(content, input_names(model), output_names(model), text)


def check_batch_size(model, batch_size: int) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} was passed; expected a whole number from 1.")
    fixed = {tensor.shape[0] for tensor in model.inputs} - {None}
    if fixed and fixed != {batch_size}:
        raise ValueError(
            f"batch_size={batch_size} was passed, but the model was built for batches of {min(fixed)}; pass "
            f"batch_size={min(fixed)} or build it with keras.Input(shape=...)."
        )


def calibration(recipe: Recipe, data: Data | None, inputs: list[Input], samples: int) -> list[np.ndarray] | None:
    """The samples that were passed, checked, as one array per input; None without data, where the recipe needs none."""
    indices = [each for each in inputs if each.below is not None and "float" in each.dtype]
    if recipe.needs_data and indices:
        raise ValueError(
            f"The input {indices[0]} feeds an Embedding; recipe={recipe.name!r} would round its indices like any real "
            "numbers. Build the model with keras.Input(..., dtype='int32'), or use recipe='dynamic_int8'."
        )
    if data is not None:
        return collect(data, inputs, samples)
    if recipe.needs_data:
        raise ValueError(
            f"recipe={recipe.name!r} calibrates activations, so it needs data: about 100 to 500 typical samples of "
            f"{', '.join(map(str, inputs))}, preprocessed as in training. Without data use recipe='dynamic_int8'."
        )
    return None


def in_float32(model):
    """The model itself; if a layer computes in float16 or bfloat16, a copy with the same weights that does not.

    The kernels of .tflite files compute in float32 or in integers. A mixed-precision model keeps its weights in
    float32, so the copy computes what the model means, more exactly than the model does.
    """
    import keras

    low = [layer for layer in model._flatten_layers() if layer.compute_dtype in ("float16", "bfloat16")]
    if not low:
        return model

    def copied(layer):
        return layer.__class__.from_config(_float32_config(layer.get_config()))

    try:
        copy = keras.models.clone_model(model, clone_function=copied, recursive=True)
        copy.set_weights([_not_16_bit(weight) for weight in model.weights])
    except Exception as error:
        raise ValueError(
            f"The layer {low[0].name!r} computes in {low[0].compute_dtype}, which .tflite files do not, and the model "
            f"could not be rebuilt in float32 ({first_line(error)}). Build it with the dtype policy 'float32' and "
            "load its weights."
        ) from error
    return copy


def _not_16_bit(weight) -> np.ndarray:
    values = weight.value.numpy()
    return values.astype("float32") if values.dtype.name in ("float16", "bfloat16") else values


def _float32_config(value):
    """A layer's config with every float16 or bfloat16 dtype or policy replaced, also those of layers inside it."""
    if isinstance(value, dict):
        return {key: _float32_config(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_float32_config(item) for item in value)
    return "float32" if value in ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16") else value


def _trace(model, inputs: list[Input], batch_size: int):
    import keras
    import tensorflow as tf

    specs = [tf.TensorSpec((batch_size, *each.shape), each.dtype, name=f"input_{at}") for at, each in enumerate(inputs)]
    structure = getattr(model, "_inputs_struct", None)

    def call(*tensors):
        packed = tensors[0] if structure is None else keras.tree.pack_sequence_as(structure, list(tensors))
        # `identity` makes every output a tensor of its own, also one that the model returns twice.
        return [tf.identity(output) for output in keras.tree.flatten(model(packed, training=False))]

    return tf.function(call, autograph=False).get_concrete_function(*specs)


def _refuse_loops(model, function, recipe: Recipe) -> None:
    import keras

    loops = [node.name for node in function.graph.get_operations() if node.type in ("While", "StatelessWhile")]
    if recipe.needs_data and loops:
        # TensorFlow 2.21's calibrator ends the whole process with a segmentation fault here.
        recurrent = [layer.name for layer in model._flatten_layers() if isinstance(layer, keras.layers.RNN)]
        raise ValueError(
            f"recipe={recipe.name!r} cannot calibrate a loop, here in {', '.join(recurrent) or loops[0]!r}: build "
            "recurrent layers with unroll=True (the weights fit), or use recipe='dynamic_int8'."
        )


def _converter(function, recipe: Recipe, arrays, batch_size: int, float_io: bool, allow_flex: bool):
    import tensorflow as tf

    # No second argument: with a Keras 3 model as `trackable_obj` the file has no weights and computes NaN.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    operators = [getattr(tf.lite.OpsSet, recipe.op_set)]
    if allow_flex:
        operators.append(tf.lite.OpsSet.SELECT_TF_OPS)
    converter.target_spec.supported_ops = operators
    if recipe.optimize:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if recipe.weight_type:
        converter.target_spec.supported_types = [tf.dtypes.as_dtype(recipe.weight_type)]
    if recipe.needs_data:
        converter.representative_dataset = lambda: _batches(arrays, batch_size)
    if recipe.io_dtype != "float32" and not float_io:
        converter.inference_input_type = tf.dtypes.as_dtype(recipe.io_dtype)
        converter.inference_output_type = tf.dtypes.as_dtype(recipe.io_dtype)
    return converter


def _batches(arrays: list[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    count = len(arrays[0])
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size) % count
        yield [array[rows] for array in arrays]


def _explained(error: Exception, recipe: Recipe) -> Exception:
    """The converter's error, often pages of MLIR, as one sentence."""
    text = str(error)
    flex = re.search(r"(?:TF Select|Flex) ops: *([^\n]+)", text)
    if flex:
        return ValueError(
            f"The file format has no operator for TensorFlow's {flex[1].strip()}. Build the model without it, or pass "
            "allow_flex=True: such a file runs only where TensorFlow's own kernels (Flex) are linked in."
        )
    custom = re.search(r"Custom ops: *([^\n]+)", text)
    if custom:
        return ValueError(
            f"The file format has no operator for {custom[1].strip()}, nor has Flex. Build the model without it."
        )
    missing = re.search(r"not yet supported for op: '?([A-Z_0-9]+)", text)
    if missing:
        hint = " (Keras's LayerNormalization uses it)" if missing[1] == "NEG" else ""
        return ValueError(
            f"recipe={recipe.name!r} has no kernel for the operator {missing[1]}{hint}. Use recipe='int8'."
        )
    if "min/max" in text or "Max and min" in text:
        return ValueError(
            f"recipe={recipe.name!r} cannot be calibrated for this model ({first_line(error)}). The converter does so "
            "for models with integer inputs in int16x8: use recipe='int8' or 'dynamic_int8'."
        )
    return RuntimeError(f"TensorFlow's converter failed on recipe={recipe.name!r}: {first_line(error)}")
