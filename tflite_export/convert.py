"""Floor 2. Keras model + recipe + data -> the bytes of a .tflite file."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tflite_export import flatbuffer, quantizer
from tflite_export.inputs import Data, Input, check_model, collect, input_names, model_inputs, output_names
from tflite_export.recipes import Recipe, get
from tflite_export.runner import Runner, first_line
from tflite_export.silence import quiet


@dataclass(frozen=True)
class Converted:
    """What `converted` made.

    Attributes:
        content: the bytes of the file.
        dense: the bytes of the same file without sparsity encoding, where `content` has it.
        notes: what the user should know, one sentence each.
    """

    content: bytes
    dense: bytes | None
    notes: tuple[str, ...]


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
    keep_float: Iterable[str] = (),
    sparse: bool = False,
) -> bytes:
    """Converts a Keras model to the bytes of a .tflite file. Measures nothing: `export` does that as well.

    Args: as in `export`.

    Raises:
        ValueError: bad arguments, or an operator the file format or the recipe does not have.
        TypeError: not a Keras model.
        ImportError: the recipe, or keep_float, needs ai-edge-quantizer, which is not installed.
        RuntimeError: the converter failed for a reason unknown to this package.

    Example:
        >>> content = to_tflite(model, "float16")                  # doctest: +SKIP
    """
    options = dict(input_shape=input_shape, batch_size=batch_size, float_io=float_io, allow_flex=allow_flex)
    return converted(model, recipe, data, **options, samples=samples, keep_float=keep_float, sparse=sparse).content


def converted(
    model,
    recipe: str | Recipe,
    data: Data | None,
    *,
    input_shape,
    batch_size: int,
    float_io: bool,
    allow_flex: bool,
    samples: int,
    keep_float: Iterable[str],
    sparse: bool,
) -> Converted:
    """`to_tflite` with what there is to say about the file. The same arguments."""
    recipe, keep_float = get(recipe), checked_names(keep_float)
    check_model(model)
    check_batch_size(model, batch_size)
    by_edge = bool(keep_float) or recipe.quantizer == "ai-edge"
    if by_edge:
        quantizer.check_installed()
    elif recipe.quantizer == "ai-edge or tensorflow":
        by_edge = quantizer.installed() and not allow_flex
    _check_combination(recipe, keep_float, sparse, by_edge, allow_flex)
    model = in_float32(model)
    inputs = model_inputs(model, input_shape)
    arrays = calibration(recipe, data, inputs, samples)
    text = f"recipe={recipe.name} float_io={float_io} by tflite_export"
    if by_edge:
        file = float_file(model, inputs, batch_size, text, recipe)
        keep = file.places(keep_float)
        ranges = quantizer.calibrate(file.content, batches(arrays, batch_size)) if recipe.needs_data else None
        content = quantizer.quantize(file.content, recipe.activations, ranges, float_io=float_io, keep=keep)
        notes = ("Quantised by ai-edge-quantizer.",) + _kept_note(file, keep)
        kept = Counter(each.name for at, each in enumerate(quantizer.operators(file.content)) if at in keep)
        return Converted(content, None, notes + _floats_note(recipe, content, kept))
    names = input_names(model), output_names(model)
    function = _trace(model, inputs, batch_size, recipe)
    options = (function, recipe, arrays, batch_size, float_io, allow_flex)
    content = flatbuffer.sign(_run(*options), *names, text)
    if not sparse:
        return Converted(content, None, _floats_note(recipe, content, Counter()))
    return _smaller(content, flatbuffer.sign(_run(*options, sparse=True), *names, text), recipe)


def _smaller(dense: bytes, encoded: bytes, recipe: Recipe) -> Converted:
    """The file with sparsity-encoded weights if it is the smaller one and runs."""
    if len(encoded) >= len(dense):
        note = f"sparse=True: stored dense, since the sparsity encoding is not smaller ({len(encoded)} bytes)."
        return Converted(dense, None, (note,))
    runner = Runner(encoded)
    try:
        runner.set(runner.random_inputs())
    except ValueError as error:  # int8 weights in LiteRT 2.3: its built-in kernels would run them, XNNPACK does not
        raise ValueError(
            f"sparse=True was passed with recipe={recipe.name!r}, and {runner.runtime} does not run the encoded file "
            f"({first_line(error.__cause__ or error)}). Use recipe='float32' or 'float16', or sparse=False."
        ) from error
    return Converted(encoded, dense, ())


def float_file(model, inputs: list[Input], batch_size: int, text: str, recipe: Recipe) -> quantizer.FloatFile:
    """The model as a float32 file, and which operators of the file belong to which layer.

    Args:
        model: a Keras model that computes in float32.
        inputs: from `model_inputs`.
        batch_size: fixed in the file.
        text: the file's description.
        recipe: what the file will become; loops are refused where it has to be calibrated.
    """
    with _grouped_convolutions_by_name(model):
        function = _trace(model, inputs, batch_size, recipe)
    content = _run(function, get("float32"), None, batch_size, False, False)
    content = flatbuffer.sign(content, input_names(model), output_names(model), text)
    return quantizer.float_file(content, model, function.graph)


@contextlib.contextmanager
def _grouped_convolutions_by_name(model) -> Iterator[None]:
    """Keras computes a grouped convolution in a function of its own, whose operations lie in no layer's scope.

    Traced as if it were called eagerly, they land in the layer's scope. Not for all models: that switch also lays open
    a user's own tf.function, and its Python conditions with it.
    """
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    grouped = any(getattr(layer, "groups", None) not in (None, 1) for layer in model._flatten_layers())
    tf.config.run_functions_eagerly(before or grouped)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def checked_names(keep_float: Iterable[str]) -> tuple[str, ...]:
    """Names and patterns of layers as a tuple; one name may stand alone."""
    names = (keep_float,) if isinstance(keep_float, str) else tuple(keep_float)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"keep_float={keep_float!r} was passed; expected names of layers or patterns like 'block_*'.")
    return names


def batches(arrays: list[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    """All samples in batches of one size; the last is filled up with the first samples again."""
    count = len(arrays[0])
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size) % count
        yield [array[rows] for array in arrays]


def _check_combination(recipe: Recipe, keep_float, sparse: bool, by_edge: bool, allow_flex: bool) -> None:
    if keep_float and not recipe.activations:
        raise ValueError(
            f"keep_float={list(keep_float)} was passed with recipe={recipe.name!r}, which has no int8 weights; "
            "expected int8, int16x8, dynamic_int8, weight_only_int8 or a Recipe that says its activations=."
        )
    if by_edge and recipe.activations not in ("int8", "int16", "dynamic", "float32"):
        raise ValueError(
            f"The recipe {recipe.name!r} has activations={recipe.activations!r}; expected 'int8', 'int16', 'dynamic' "
            "or 'float32' for ai-edge-quantizer."
        )
    if by_edge and allow_flex:
        raise ValueError("allow_flex=True is for TensorFlow's converter; ai-edge-quantizer has to run the file.")
    if sparse and by_edge:
        raise ValueError(
            f"sparse=True was passed with recipe={recipe.name!r}; ai-edge-quantizer has no sparsity encoding. Use "
            "recipe='float32' or 'float16'."
        )


def _kept_note(file: quantizer.FloatFile, keep: tuple[int, ...]) -> tuple[str, ...]:
    layers = [path for path, places in file.layers.items() if set(places) <= set(keep)]
    return (f"Kept in float32: {', '.join(layers)}.",) if keep else ()


def _floats_note(recipe: Recipe, content: bytes, kept: Counter) -> tuple[str, ...]:
    """Says which operators of a file that should be integers compute in float32, those kept on purpose left out."""
    if not recipe.needs_data:
        return ()
    left = Counter(quantizer.float_operators(content)) - kept
    listed = ", ".join(f"{name} {count}" for name, count in left.items())
    return (f"Without an integer kernel, computed in float32: {listed}. NPUs do not take these.",) if left else ()


def _run(function, recipe: Recipe, arrays, batch_size: int, float_io: bool, allow_flex: bool, sparse=False) -> bytes:
    import tensorflow as tf

    with quiet():
        converter = _converter(function, recipe, arrays, batch_size, float_io, allow_flex)
        if sparse:
            converter.optimizations = [*converter.optimizations, tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        try:
            return bytes(converter.convert())
        except Exception as error:  # ConverterError, RuntimeError and ValueError, by the stage that fails
            raise _explained(error, recipe) from error


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


def _trace(model, inputs: list[Input], batch_size: int, recipe: Recipe):
    import keras
    import tensorflow as tf

    specs = [tf.TensorSpec((batch_size, *each.shape), each.dtype, name=f"input_{at}") for at, each in enumerate(inputs)]
    structure = getattr(model, "_inputs_struct", None)

    def call(*tensors):
        packed = tensors[0] if structure is None else keras.tree.pack_sequence_as(structure, list(tensors))
        # `identity` makes every output a tensor of its own, also one that the model returns twice.
        return [tf.identity(output) for output in keras.tree.flatten(model(packed, training=False))]

    with quiet():
        function = tf.function(call, autograph=False).get_concrete_function(*specs)
    _refuse_loops(model, function, recipe)
    return function


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
        converter.representative_dataset = lambda: batches(arrays, batch_size)
    if recipe.io_dtype != "float32" and not float_io:
        converter.inference_input_type = tf.dtypes.as_dtype(recipe.io_dtype)
        converter.inference_output_type = tf.dtypes.as_dtype(recipe.io_dtype)
    return converter


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
        return ValueError(f"recipe={recipe.name!r} has no kernel for the operator {missing[1]}{hint}. {_mend(recipe)}")
    if "min/max" in text or "Max and min" in text:
        return ValueError(
            f"recipe={recipe.name!r} cannot be calibrated for this model ({first_line(error)}). The converter does so "
            f"for models with integer inputs in int16x8. {_mend(recipe)}"
        )
    return RuntimeError(f"TensorFlow's converter failed on recipe={recipe.name!r}: {first_line(error)}")


def _mend(recipe: Recipe) -> str:
    other = "Use recipe='int8' or 'dynamic_int8'"
    if recipe.quantizer == "tensorflow":
        return f"{other}."
    return f"{other}, or install ai-edge-quantizer, which can: pip install 'keras_prune[quantizer]'."
