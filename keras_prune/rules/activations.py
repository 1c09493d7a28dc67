"""Activations: pass-through where they work on each number alone. That is tested on numbers, not assumed."""

from __future__ import annotations

import weakref

import keras
import numpy as np

from keras_prune.rules.language import Labels, rule, varying

_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def elementwise(function) -> tuple[bool, bool]:
    """(works on each number alone, maps 0 to 0), found out by calling it on a few numbers.

    Changing one channel must change no other, exchanging two channels must exchange the results, and f(0) must
    be finite. So a softmax is found out, and so is a user's own function that mixes channels.
    """
    if isinstance(function, keras.layers.Layer):  # the user's layer itself must not be built for six channels
        copy = type(function).from_config(function.get_config())
        answer = _tried(copy)
        return (False, False) if copy.weights or function.weights else answer
    try:
        if function not in _KNOWN:
            _KNOWN[function] = _tried(function)
        return _KNOWN[function]
    except TypeError:  # a callable that cannot be remembered
        return _tried(function)


def _tried(function) -> tuple[bool, bool]:
    def run(x):
        return keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(x)))

    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (3, 6)).astype("float32")
    moved = x.copy()
    moved[:, 2] += 1.5
    try:
        y, y_moved, y_swapped, zero = run(x), run(moved), run(x[:, ::-1]), run(np.zeros((1, 6), "float32"))
        others = [0, 1, 3, 4, 5]
        alone = (
            y.shape == x.shape
            and np.array_equal(y[:, others], y_moved[:, others])
            and np.allclose(y[:, ::-1], y_swapped, rtol=1e-5, atol=1e-6)
            and bool(np.isfinite(zero).all())
        )
        return alone, alone and not zero.any()
    except Exception:  # a function that cannot take six channels is no elementwise function
        return False, False


def activate(call, ids, function) -> None:
    """Note what an activation does to the units in `ids`: nothing, a constant for zero, or mixing them."""
    if function is None or not np.any(ids):
        return
    alone, silent = elementwise(function)
    if not alone:
        name = getattr(function, "__name__", type(function).__name__)
        call.fence(ids, f"the activation {name} mixes channels, has weights of its own, or is not finite at 0")
    elif not silent:
        call.loud(ids)


@rule("Activation")
def activation(layer, call, x):
    activate(call, x, layer.activation)
    return Labels(x)


@rule("ReLU", "LeakyReLU", "ELU")
def activation_layer(layer, call, x):
    if np.any(keras.ops.convert_to_numpy(layer.call(keras.ops.zeros((1, 1))))):
        call.loud(x)
    return Labels(x)


@rule("PReLU")
def prelu(layer, call, x):
    axes = [x.shape[a] > 1 and layer.alpha.shape[a - 1] > 1 for a in range(1, x.ndim)]
    ids = tuple(call.along(x, a) if labelled else None for a, labelled in enumerate(axes, 1))
    return Labels(x, {"alpha": ids})


@rule(
    "Softmax",
    "UnitNormalization",
    "ops.Softmax",
    "ops.LogSoftmax",
    "ops.Cumsum",
    "ops.Cumprod",
    "ops.Sort",
    "ops.Argsort",
    "ops.Flip",
    "ops.Roll",
    "ops.Normalize",
)
def mixes_along_axis(layer, call, x, *mask):
    """Passes the other axes, mixes its own."""
    axis = layer.axis
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis)
    if any(x.shape[a] > 1 for a in axes):
        call.fence(x, "mixes its channels")
    for ids in mask:
        call.freeze(ids)
        if ids.ndim != x.ndim or any(call.shape_of(ids)[a] != 1 for a in varying(x)):
            call.fence(x, "has a mask with channels of its own")
    call.loud(x)
    return Labels(x)


# Finite, and with a finite slope, at 0: the value a removed unit has in the zeroed model. So no sqrt, no log.
UNARY = """Relu Relu6 Sigmoid SparseSigmoid Softplus Softsign SoftShrink SparsePlus Silu Squareplus LogSigmoid LeakyRelu
HardSigmoid HardSilu Elu Selu Gelu Celu TanhShrink HardTanh HardShrink Threshold Absolute Abs Fabs Negative Square Exp
Exp2 Expm1 Log1p Sin Cos Tan Sinh Cosh Tanh Arctan Arcsinh Sign Floor Ceil Round Trunc Clip Cast SaturateCast Copy Array
StopGradient ConvertToTensor NanToNum Isnan Isfinite Isinf LogicalNot OnesLike ZerosLike Erf""".split()


@rule(*[f"ops.{name}" for name in UNARY])
def unary(operation, call, x):
    if np.any(x):
        zero = keras.ops.convert_to_numpy(operation.call(np.zeros((1,) * x.ndim, "float32")))
        if zero.any():
            call.loud(x)
    return Labels(x)
