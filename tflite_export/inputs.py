"""Floor 1. What a Keras model takes and gives, and how a user's data becomes one array per input."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Data = object
"""Samples: an array, a list or dict of arrays, a tf.data.Dataset, or an iterable of batches (see `collect`)."""


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        name: the key in the model's dict of inputs, or else the name of its `keras.Input`.
        shape: of one sample, without the batch axis.
        dtype: what Keras expects.
        below: integers generated for this input stay below it (an embedding's vocabulary); None for real numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    below: int | None = None

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}(samples, {', '.join(map(str, self.shape))})"


def check_model(model) -> None:
    """Raises TypeError or ValueError unless `model` is a built Keras model that this package can trace."""
    import keras

    if isinstance(model, str) or not isinstance(model, keras.Model):
        raise TypeError(
            f"{type(model).__name__} was passed as model; expected a keras.Model (Keras 3). A saved file is loaded "
            "with keras.saving.load_model(path)."
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Keras runs on the {keras.backend.backend()} backend here; the converter needs TensorFlow's. Save the "
            "model with model.save('model.keras') and export that file in a process started with "
            "KERAS_BACKEND=tensorflow."
        )
    if getattr(model, "inputs", None) is None:
        if isinstance(model, keras.Sequential):
            mend = "it has never seen an input: call model.build((None, ...)) or start it with keras.Input(shape)"
        else:
            mend = "it is subclassed: wrap it with inputs = keras.Input(shape); keras.Model(inputs, model(inputs))"
        raise ValueError(f"The model {model.name!r} has no known inputs: {mend}.")
    for layer in model._flatten_layers(include_self=False):
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"The layer {layer.name!r} is stateful=True: a .tflite file keeps no state between calls. Build the "
                "model with stateful=False, and pass the state as an input if it must live on."
            )
    for weight in model.weights:
        values = weight.value.numpy()
        if values.dtype.kind not in "iub" and not np.isfinite(values.astype("float32")).all():
            layer = weight.path.rsplit("/", 1)[0]
            raise ValueError(
                f"The layer {layer!r} has NaN or infinite numbers in its weight {weight.name!r}: the file would "
                "compute NaN. Train again with a lower learning rate, or load an earlier checkpoint."
            )


def model_inputs(model, input_shape=None) -> list[Input]:
    """The inputs of a model in the order of `model.inputs`.

    Args:
        model: a built Keras model.
        input_shape: the shape of one sample where the model leaves sizes open (None): a tuple for one input, for
            several a list of tuples in the order of `model.inputs` or a dict name -> tuple.

    Raises:
        ValueError: a size other than the batch stays open, or `input_shape` contradicts the model.
    """
    given = _shapes_by_name(input_shape, input_names(model))
    found = []
    for name, tensor in zip(input_names(model), model.inputs, strict=True):
        dtype = tensor.dtype
        if tensor.sparse or getattr(tensor, "ragged", False) or dtype in ("string", "complex64", "complex128"):
            kind = "sparse" if tensor.sparse else "ragged" if getattr(tensor, "ragged", False) else dtype
            raise ValueError(
                f"The input {name!r} is {kind}; expected dense numbers. Move that preprocessing out of the model."
            )
        shape = tuple(tensor.shape[1:])
        wanted = given.get(name, shape)
        if len(wanted) != len(shape) or any(size not in (None, new) for size, new in zip(shape, wanted, strict=True)):
            raise ValueError(
                f"input_shape={wanted} was passed for the input {name!r}, whose shape is {shape} (without the batch)."
            )
        if None in wanted:
            raise ValueError(
                f"The input {name!r} has the shape {shape} (without the batch), in which None leaves a size open; a "
                ".tflite file runs best at one fixed size. Pass it, for example "
                f"input_shape={tuple(size or 224 for size in shape)}."
            )
        found.append(Input(name, wanted, dtype, _below(model, tensor)))
    return found


def input_names(model) -> list[str]:
    """A unique name for each of `model.inputs`."""
    # Sequential has no `input` before it was called on a symbolic tensor; it has one input in any case.
    return _names(getattr(model, "_inputs_struct", None), model.inputs)


def output_names(model) -> list[str]:
    """A unique name for each of `model.outputs`: the key in a dict of outputs, or else the last layer's name."""
    return _names(getattr(model, "_outputs_struct", None), model.outputs)


def collect(data: Data, inputs: list[Input], limit: int) -> list[np.ndarray]:
    """The first `limit` samples of `data`.

    Args:
        data: for one input an array (samples, ...) or an iterable of batches; for several a list of arrays in the order
            of `model.inputs` or a dict name -> array; or a tf.data.Dataset, a PyDataset or a generator of batches of
            these,
            with or without labels: of a tuple (x, y), x is taken. Samples without a batch axis are understood as well.
        inputs: what the model takes.
        limit: largest number of samples taken, from 1.

    Returns:
        One array (samples, ...) per input, in the order of `inputs`, of the input's dtype.

    Raises:
        ValueError: no sample, a wrong shape, unknown names, NaN or infinite numbers.
        TypeError: data that holds no numbers.
    """
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"samples={limit!r} was passed; expected a whole number from 1.")
    batches, count = [], 0
    for element in _elements(data, inputs):
        batch = _batch(element, inputs)
        batches.append(batch)
        count += len(batch[0])
        if count >= limit:
            break
    if not count:
        raise ValueError(f"data is empty; expected samples of {_listed(inputs)}.")
    return [np.concatenate([batch[at] for batch in batches])[:limit] for at in range(len(inputs))]


def generate(inputs: list[Input], count: int, seed: int = 0) -> list[np.ndarray]:
    """`count` samples per input: normal numbers for floats, uniform integers in [0, below) for integers."""
    random = np.random.default_rng(seed)
    arrays = []
    for each in inputs:
        shape = (count, *each.shape)
        values = random.normal(size=shape) if each.below is None else random.integers(0, each.below, shape)
        arrays.append(np.asarray(values).astype(each.dtype))
    return arrays


def _names(structure, tensors) -> list[str]:
    names = list(structure) if isinstance(structure, dict) else []
    if names and len(names) == len(tensors):
        names = [next(key for key, value in structure.items() if value is tensor) for tensor in tensors]
    else:
        names = [tensor._keras_history.operation.name for tensor in tensors]
    unique: list[str] = []
    for name in names:
        candidate, again = name, 0
        while candidate in unique:
            again += 1
            candidate = f"{name}_{again}"
        unique.append(candidate)
    return unique


def _shapes_by_name(input_shape, names: list[str]) -> dict[str, tuple]:
    if input_shape is None:
        return {}
    if isinstance(input_shape, dict):
        unknown = sorted(set(input_shape) - set(names))
        if unknown:
            raise ValueError(f"input_shape names {unknown}, which the model does not have. Its inputs: {names}.")
        return {name: tuple(shape) for name, shape in input_shape.items()}
    shapes = list(input_shape) if input_shape and not isinstance(input_shape[0], int) else [input_shape]
    if len(shapes) != len(names):
        raise ValueError(
            f"input_shape={input_shape} holds {len(shapes)} shapes; the model has the {len(names)} inputs {names}."
        )
    return {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}


def _below(model, tensor) -> int | None:
    """Exclusive upper limit for integers generated for this input; None if it takes real numbers."""
    embeddings = [layer for layer in model._flatten_layers() if type(layer).__name__ == "Embedding"]
    # Keras's Embedding also takes floats that are whole numbers, and float32 is the default of keras.Input.
    direct = [layer.input_dim for layer in embeddings for node in layer._inbound_nodes
              if any(each is tensor for each in node.input_tensors)]  # fmt: skip
    if direct:
        return min(direct)
    if "float" in tensor.dtype:
        return None
    return min([layer.input_dim for layer in embeddings], default=256 if tensor.dtype == "uint8" else 2)


def _elements(data: Data, inputs: list[Input]) -> Iterable:
    """`data` as batches: a single array, dict, tuple or list of one array per input is one large batch."""
    if data is None or isinstance(data, (str, bytes, int, float)):
        raise TypeError(
            f"data={data!r} was passed; expected samples of {_listed(inputs)}: an array, a dict, a list or a dataset."
        )
    if isinstance(data, (dict, tuple, np.ndarray)) or (hasattr(data, "shape") and not hasattr(data, "element_spec")):
        return [data]
    if isinstance(data, list) and len(data) == len(inputs) and all(hasattr(item, "shape") for item in data):
        return [data]
    if (
        isinstance(data, list)
        and data
        and not hasattr(data[0], "shape")
        and not isinstance(data[0], (dict, tuple))
        and len(inputs) == 1
    ):
        return [np.asarray(data)]  # nested lists of numbers
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, list):
        return (data[at] for at in range(len(data)))  # keras.utils.PyDataset: has no end of its own
    if not hasattr(data, "__iter__"):
        raise TypeError(
            f"{type(data).__name__} was passed as data; expected an array, a dict, a list or an iterable of batches."
        )
    return data


def _batch(element, inputs: list[Input]) -> list[np.ndarray]:
    names = [each.name for each in inputs]
    # (x, y) and (x, y, weights) as in Keras, unless the tuple is just one array per input.
    if isinstance(element, tuple) and (
        len(inputs) == 1 or len(element) != len(inputs) or isinstance(element[0], (dict, list, tuple))
    ):
        element = element[0]
    if isinstance(element, dict):
        if not set(names) <= set(element):
            raise ValueError(f"data has the names {sorted(map(str, element))}; expected {names}.")
        element = [element[name] for name in names]
    elif not isinstance(element, (list, tuple)) or (len(inputs) == 1 and len(element) != 1):
        element = [element]
    if len(element) != len(inputs):
        raise ValueError(f"data holds {len(element)} arrays; the model takes {len(inputs)}: {_listed(inputs)}.")
    arrays = [_checked(values, each) for values, each in zip(element, inputs, strict=True)]
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(
            f"data holds {[len(array) for array in arrays]} samples for {names}; expected equally many for each."
        )
    return arrays


def _checked(values, each: Input) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.name == "bfloat16":
        array = array.astype("float32")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"data of dtype {array.dtype} was passed for the input {each}; expected numbers.")
    if array.shape == each.shape:
        array = array[None]
    if array.shape[1:] != each.shape or array.ndim != len(each.shape) + 1:
        raise ValueError(f"data of shape {array.shape} was passed for the input {each}.")
    if not np.isfinite(array).all():
        raise ValueError(f"data for the input {each} holds NaN or infinite numbers; remove or repair those samples.")
    if array.dtype.kind == "f" and "float" not in each.dtype and (array != np.round(array)).any():
        raise ValueError(
            f"data of dtype {array.dtype} with fractions was passed for the input {each}; expected whole numbers."
        )
    return array.astype(each.dtype)


def _listed(inputs: list[Input]) -> str:
    return ", ".join(map(str, inputs))
