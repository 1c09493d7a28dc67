"""Operations and norms: the most by which each multiplies the norm of a change of its input, its Lipschitz constant.

||.|| is the L2 norm of one sample, over all axes but the batch. A constant holds for all inputs and all changes, in
inference; where none is known, or none exists (products of two tensors, attention, jumps), it is inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from keras_prune.linear import view_of
from keras_prune.program import Step
from keras_prune.theory.perturbation import SLOPES, convolution_bound, pooling_norm, spectral_norm


def times(a: float, b: float) -> float:
    """The product; nothing times anything is nothing: what is multiplied by 0 does not pass, however large."""
    return 0.0 if a == 0 or b == 0 else a * b


def as_numbers(value) -> np.ndarray:
    """A tensor, variable or number in float64."""
    return np.asarray(keras.ops.convert_to_numpy(value)).astype(np.float64)


def outputs_of_call(step: Step, values: dict[int, np.ndarray]) -> list[np.ndarray]:
    """What a call makes of arrays by slot."""
    values = {slot: keras.ops.convert_to_tensor(v) for slot, v in values.items()}
    step.run(values)
    return [as_numbers(values[slot]) for slot in step.gives]


_SETTINGS = """strides padding dilation_rate groups data_format epsilon axis pool_size output_size size negative_slope
alpha max_value threshold scale offset equation interpolation block_size""".split()


def is_same_call(a: Step, b: Step) -> bool:
    """Whether two calls, of two networks, compute the same but for the values of weights."""
    sides = [
        (
            type(step.operation),
            [tuple(w.shape) for w in getattr(step.operation, "weights", ())],
            [slot for _, slot in step.takes] + list(step.gives),
            getattr(getattr(step.operation, "activation", None), "__name__", None),
            *(
                value
                for value in (getattr(step.operation, key, None) for key in _SETTINGS)
                if isinstance(value, (int, float, str, tuple, list))
            ),
        )
        for step in (a, b)
    ]
    given = [keras.tree.flatten(() if step.node is None else _arguments(step)) for step in (a, b)]
    return sides[0] == sides[1] and len(given[0]) == len(given[1]) and all(map(_alike, *given))


def _arguments(step: Step) -> list:
    """What a call is given; the key of a slice written out, as `x[..., :5]` and `x[:, :, 0:5]` may be the same."""
    given = [*step.node.arguments.args, *step.node.arguments.kwargs.values()]
    if type(step.operation).__name__ != "GetItem" or len(given) != 2:
        return given
    tensor, key = given
    key = list(key) if isinstance(key, (tuple, list)) else [key]
    missing = [slice(None)] * (len(tensor.shape) - sum(part is not None and part is not Ellipsis for part in key))
    at = next((place for place, part in enumerate(key) if part is Ellipsis), len(key))
    key[at : at + 1] = missing
    lengths = iter(tensor.shape)
    return [tensor, *(part if part is None else _written_out(part, next(lengths)) for part in key)]


def _written_out(part, length: int | None):
    """A part of a key that says the same for the same numbers."""
    if not isinstance(part, slice) or not all(v is None or isinstance(v, int) for v in (part.start, part.stop)):
        return part
    return part.indices(length) if length is not None else (part.start or 0, part.stop, part.step or 1)


def _alike(a, b) -> bool:
    """Whether two arguments of a call are the same constant, or both none."""
    if isinstance(a, keras.KerasTensor) or isinstance(b, keras.KerasTensor):
        return isinstance(a, keras.KerasTensor) and isinstance(b, keras.KerasTensor)
    if hasattr(a, "shape") or hasattr(b, "shape"):
        return np.array_equal(as_numbers(a), as_numbers(b))
    return type(a) is type(b) and (a == b or not isinstance(a, (int, float, str)))


def is_normalization(operation) -> bool:
    return type(operation).__name__ == "BatchNormalization" and _is_keras(operation)


def moves(operation) -> bool:
    """Whether an operation only puts numbers elsewhere, leaves some out or repeats them: maybe across samples."""
    return type(operation).__name__ in _COPIES and _is_keras(operation)


def _is_keras(operation) -> bool:
    return type(operation).__module__.startswith("keras.")


# -- layers that multiply and add --------------------------------------------------------------------------------


@dataclass
class Kernel:
    """One call of a layer that multiplies by a matrix, adds a bias and applies an activation.

    Attributes:
        variables: its kernels.
        compose: arrays of their shapes -> what its input is multiplied by, outputs on the last axis; linear in each.
        norm: of that.
        axis: the axis of the layer's output, counted from the last, on which the outputs lie; 0 if on several.
        bias, slope: of the layer.
        scale: of the BatchNormalization right behind, if that is folded in, shape (outputs,).
    """

    variables: tuple
    compose: Callable[..., np.ndarray]
    norm: Callable[[np.ndarray], float]
    axis: int = 0
    bias: keras.Variable | None = None
    slope: float = 1.0
    is_linear: bool = True
    scale: np.ndarray | None = None

    def effective(self, *arrays) -> np.ndarray:
        made = self.compose(*(arrays or map(as_numbers, self.variables)))
        return made if self.scale is None else made * self.scale

    def lipschitz(self) -> float:
        made = self.effective()
        return times(self.slope, self.norm(made)) if made.any() else 0.0

    def change(self, place: int, delta: np.ndarray) -> float:
        """Norm of what a change of one of its variables does."""
        arrays = [as_numbers(v) for v in self.variables]
        delta = np.asarray(delta, np.float64)
        if delta.shape != arrays[place].shape:
            raise ValueError(
                f"A change of shape {delta.shape} was passed for the kernel {self.variables[place].path!r}; expected "
                f"its shape, {arrays[place].shape}."
            )
        arrays[place] = delta
        made = self.effective(*arrays)
        return self.norm(made) if made.any() else 0.0


def kernel_of(layer, shape: tuple[int, ...]) -> Kernel | None:
    """How a layer multiplies its input, of this shape without the batch; None if it does not, or unknown how."""
    kind = type(layer).__name__
    if not _is_keras(layer) or getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return None
    if kind == "TimeDistributed":
        return kernel_of(layer.layer, shape[1:])
    if kind == "BatchNormalization":
        return Kernel((), lambda: _scale(layer), lambda s: float(np.abs(s).max()))
    if kind == "Dense":
        found = Kernel((layer.kernel,), lambda k: k, lambda k: float(spectral_norm(k)), -1)
    elif kind == "EinsumDense":
        view, (source, target) = view_of(layer), layer.equation.replace(" ", "").split(",", 1)
        target = target.split("->")[1]
        if view is None or not (source.startswith("...") or source[0] == target[0]):
            return None  # the batch is an axis like any other to it
        found = Kernel((layer.kernel,), view.matrices, lambda m: float(spectral_norm(m).max()))
    elif hasattr(layer, "kernel_size") and "Conv" in kind:
        found = _convolution(layer, kind, shape)
    else:
        return None
    found.bias, found.slope = layer.bias, _slope(layer.activation)
    found.is_linear = getattr(layer.activation, "__name__", "linear" if layer.activation is None else "") == "linear"
    return found


def _convolution(layer, kind: str, shape) -> Kernel:
    first = layer.data_format == "channels_first"
    lengths, axis = (shape[1:], -len(shape)) if first else (shape[:-1], -1)
    options = {"strides": layer.strides, "dilation": layer.dilation_rate}
    if "Transpose" in kind:  # the adjoint of a convolution of what it makes: as many zeros between, then all overlaps
        lengths = [(n - 1) * s + 1 for n, s in zip(lengths, layer.strides)]
        return Kernel(
            (layer.kernel,),
            lambda k: k.swapaxes(-1, -2),
            lambda k: convolution_bound(k.swapaxes(-1, -2), lengths, **options),
            axis,
        )
    if "Depthwise" in kind or "Separable" in kind:
        inputs, taps = shape[0] if first else shape[-1], layer.kernel_size
        if "Depthwise" in kind:
            return Kernel(
                (layer.kernel,),
                lambda k: k.reshape(*taps, 1, -1),
                lambda k: convolution_bound(k, lengths, groups=inputs, **options),
                axis,
            )

        def whole(depthwise, pointwise):  # the ordinary convolution that the two make together
            return np.einsum(
                "tim,imo->tio",
                depthwise.reshape(-1, *depthwise.shape[-2:]),
                pointwise.reshape(*depthwise.shape[-2:], -1),
            ).reshape(*taps, inputs, -1)

        variables = (layer.depthwise_kernel, layer.pointwise_kernel)
        return Kernel(variables, whole, lambda k: convolution_bound(k, lengths, **options), axis)
    return Kernel(
        (layer.kernel,), lambda k: k, lambda k: convolution_bound(k, lengths, groups=layer.groups, **options), axis
    )


def _scale(norm) -> np.ndarray:
    """What a BatchNormalization multiplies by in inference."""
    deviation = np.sqrt(as_numbers(norm.moving_variance) + norm.epsilon)
    return (1.0 if norm.gamma is None else as_numbers(norm.gamma)) / deviation


# -- everything else ---------------------------------------------------------------------------------------------

_SAME = """Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianNoise GaussianDropout AlphaDropout
Identity ActivityRegularization RandomFlip RandomRotation RandomTranslation RandomZoom RandomContrast RandomBrightness
Entrance""".split()
_COPIES = """Flatten Reshape Permute RepeatVector Cropping1D Cropping2D Cropping3D ZeroPadding1D ZeroPadding2D
ZeroPadding3D UpSampling1D UpSampling2D UpSampling3D Concatenate Stack Split Unstack Transpose Swapaxes Moveaxis
ExpandDims Squeeze GetItem Take Pad Repeat Tile Roll Flip DepthToSpace SpaceToDepth""".split()
_SUMS = ("Add", "Subtract", "Maximum", "Minimum", "Average")
_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Amax", "Amin")


def lipschitz_constants(step: Step, shapes: dict, batch: int) -> dict[int, float]:
    """Slot of each input -> the most by which the norm of a change of it is multiplied; inf where unknown."""
    operation, slots = step.operation, [slot for _, slot in step.takes]
    found = dict.fromkeys(slots, math.inf)
    given, made = [shapes.get(slot, ()) for slot in slots], shapes.get(step.gives[0], ())
    while type(operation).__name__ == "TimeDistributed" and _is_keras(operation):
        operation, given, made = operation.layer, [g[1:] for g in given], made[1:]
    kind, is_layer = type(operation).__name__, isinstance(operation, keras.layers.Layer)
    if not (_is_keras(operation) or kind == "Entrance") or not slots:
        return found
    if kind in _COPIES and (len(slots) == 1 or kind in ("Concatenate", "Stack")):
        return _copies(step, shapes, batch) if getattr(operation, "interpolation", "nearest") == "nearest" else found
    if kind in _SUMS and (is_layer or all(len(g) == len(made) for g in given)):  # missing axes stand behind the batch
        for slot, g in zip(slots, given):
            each = math.sqrt(math.prod(made) / math.prod(g)) / (len(slots) if kind == "Average" else 1)
            found[slot] = each + (found[slot] if found[slot] < math.inf else 0)
    elif kind in ("Multiply", "Divide", "TrueDivide") and len(slots) == 1 and len(given[0]) == len(made):
        first = step.node.arguments.args[:1]
        if kind == "Multiply" or (first and id(first[0]) == step.takes[0][0]):  # by a constant
            [factors] = outputs_of_call(step, {slots[0]: np.ones((batch, *given[0]), np.float32)})
            found[slots[0]] = float(np.abs(factors).max()) * math.sqrt(math.prod(made) / math.prod(given[0]))
    elif kind == "CustomScaleLayer" and len(set(slots)) == 2:  # of keras.applications: x + scale * residual
        found = {slots[0]: 1.0, slots[1]: abs(float(operation.scale))}
    elif len(slots) == 1 or kind in _SAME:  # further inputs are masks
        found[slots[0]] = _of_one(operation, kind, given[0], made)
    return found


def _of_one(operation, kind: str, given: tuple[int, ...], made: tuple[int, ...]) -> float:
    """Of an operation on one tensor, from its shape to another, both without the batch."""
    ratio = math.prod(given) / max(1, math.prod(made))
    if kind in _SAME:
        return 1.0
    if kind.startswith("GlobalAveragePooling"):
        return 1 / math.sqrt(ratio)
    if kind.startswith("GlobalMaxPooling"):
        return 1.0
    if "Pool" in kind and hasattr(operation, "data_format"):
        lengths, out = (s[1:] if operation.data_format == "channels_first" else s[:-1] for s in (given, made))
        windows = [_windows(operation, *axis) for axis in zip(range(len(out)), lengths, out)]
        return pooling_norm(windows, "max" if "Max" in kind else "average")
    if kind in _REDUCTIONS:
        axes = [0] if operation.axis is None else np.atleast_1d(operation.axis) % (len(given) + 1)
        factor = {"Mean": 1 / math.sqrt(ratio), "Sum": math.sqrt(ratio)}.get(kind, 1.0)
        return math.inf if 0 in axes else factor
    if kind == "Rescaling":
        return float(np.abs(operation.scale).max()) if given == made else math.inf
    if kind == "LayerScale":  # of keras.applications
        return float(np.abs(as_numbers(operation.gamma)).max())
    if kind == "Normalization":
        deviation = np.maximum(np.sqrt(as_numbers(operation.variance)), keras.config.epsilon())
        return float((deviation if operation.invert else 1 / deviation).max())
    if kind == "Cast":
        return 1.0 if "float" in operation.dtype else math.inf
    return _slope(operation)


def _slope(function) -> float:
    """The largest slope of an activation: a function, layer or operation."""
    if type(function).__name__ == "Activation":
        return _slope(function.activation)
    name = getattr(function, "__name__", type(function).__name__).lower().replace("_", "")
    where = getattr(function, "__module__", None) or type(function).__module__
    jumps = name == "relu" and getattr(function, "threshold", 0)
    if function is None or (name == "softmax" and 0 in np.atleast_1d(getattr(function, "axis", -1))):
        return 1.0 if function is None else math.inf  # along the batch
    if name not in SLOPES or not where.startswith("keras.") or jumps:
        return math.inf
    parameters = [getattr(function, key, 0.0) for key in ("negative_slope", "alpha")]
    return max(SLOPES[name], *(float(np.abs(as_numbers(p)).max()) for p in parameters))


def _windows(pooling, axis: int, length: int, out: int) -> list[tuple[int, int]]:
    """What each result of pooling is taken of, along one axis."""
    if not hasattr(pooling, "pool_size"):  # adaptive
        return [(i * length // out, -(-(i + 1) * length // out)) for i in range(out)]
    size, stride = (
        value if isinstance(value, int) else value[axis]
        for value in (pooling.pool_size, pooling.strides or pooling.pool_size)
    )
    before = max((out - 1) * stride + size - length, 0) // 2 if pooling.padding == "same" else 0
    starts = [i * stride - before for i in range(out)]
    return [(max(start, 0), min(start + size, length)) for start in starts]


def _copies(step: Step, shapes: dict, batch: int) -> dict[int, float]:
    """Of an operation that only puts numbers elsewhere, leaves some out or repeats them: root of how often one comes.

    It is run on the numbers' places, byte by byte, as these are exact in every float type. What mixes samples is inf.
    """
    found, slots = {}, list(dict.fromkeys(slot for _, slot in step.takes))
    zeros = {slot: np.zeros((batch, *shapes[slot]), np.float32) for slot in slots}
    rest = outputs_of_call(step, zeros)  # padding with something else than zeros
    for slot in slots:
        places = np.arange(1, zeros[slot].size + 1).reshape(zeros[slot].shape)
        totals = [0.0] * len(rest)
        for byte in range(4):
            made = outputs_of_call(step, {**zeros, slot: (places >> 8 * byte & 255).astype(np.float32)})
            totals = [t + (m - r) * 256.0**byte for t, m, r in zip(totals, made, rest)]
        found[slot] = 0.0
        for total in totals:
            ids = np.rint(total).astype(np.int64)
            sample = np.arange(len(ids)).reshape(-1, *(1,) * (ids.ndim - 1)) if ids.ndim else 0
            stays = (ids == 0) | ((ids - 1) // (places.size // batch) == sample)
            if len(ids.shape) == 0 or len(ids) != batch or not stays.all() or np.abs(ids - total).max(initial=0) > 0.01:
                found[slot] = math.inf
            else:
                often = np.bincount(ids.ravel(), minlength=2)[1:].max()
                found[slot] = max(found[slot], math.sqrt(often))
    return found
