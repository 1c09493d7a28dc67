"""PSP: layers that learn their own shape (Parameterized Structured Pruning).

A PSP layer is its Keras parent with a multiplier on each structure of its kernel: w -> w * nu(alpha), where alpha is
trained along with w and nu(alpha) is alpha, or 0 where |alpha| is below a threshold. The gradient passes the threshold
as if it were not there (straight-through), so a structure that was pruned can come back.
[Schindler, Roth, Pernkopf, Froening: Parameterized Structured Pruning for Deep Neural Networks, eq. 2-7]

    model = keras.Sequential([..., PSPConv2D(32, 3, structure="channel", threshold=0.1), ...])
    model.fit(...)
    small = keras_prune.strip(model)     # plain layers, what was learned away is gone

Models saved with these layers load where `keras_prune.layers` was imported; the stripped ones load anywhere.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import keras
import numpy as np
from keras import ops

from keras_prune.internals import never_cast
from keras_prune.rules import RULES, rule

STRUCTURES = {"column": "ti", "channel": "i", "shape": "t", "layer": "", "filter": "o"}
"""Name -> the axes of the kernel along which its alphas differ: t a tap, i an input channel, o an output channel.

A column is one tap of one input channel for all outputs (a column of the paper's K x CRS matrix). Filters are not in
the paper.
"""

GRADIENTS = ("chain", "paper_eq5")


def decay(rate: float = 1e-4) -> keras.regularizers.Regularizer:
    """Weight decay of alpha as in eq. 6 of the paper: its gradient is `rate * alpha`, and momentum takes part in it.

    An optimizer's own `weight_decay` acts outside of the momentum, which is another dynamic.
    """
    return keras.regularizers.L2(rate / 2)


DECAY = decay()


class PSPLayer:
    """What all PSP layers have besides their Keras parent; see `PSPConv2D` for the arguments.

    Attributes:
        structures: names of the structures.
        alphas: structure -> its variable, of the kernel's rank, 1 on the axes along which it does not differ.
        thresholds: structure -> its scalar variable, not trained; assign it to move the threshold.
    """

    _kernels: dict[str, str] = {"kernel": "io"}  # attribute -> its last two axes; all before them are taps

    def __init__(
        self,
        *args,
        structure: str | Sequence[str] = "channel",
        threshold=0.1,
        alpha_initializer="ones",
        alpha_regularizer=DECAY,
        gradient: str = "chain",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if getattr(self, "lora_rank", None):
            self.enable_lora()
        if self.quantization_mode:
            PSPLayer.quantize(self)
        self.structures = _checked_structures(structure)
        self.given_thresholds = _checked_thresholds(threshold, self.structures)
        self.alpha_initializer = keras.initializers.get(alpha_initializer)
        self.alpha_regularizer = keras.regularizers.get(alpha_regularizer)
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient={gradient!r} was passed; known: {', '.join(map(repr, GRADIENTS))}.")
        self.gradient = gradient
        self._is_restored = False

    # -- state ---------------------------------------------------------------------------------------------------

    def add_weight(self, *args, **kwargs):
        """Kernels are multiplied in the precision they are stored in, so they must not be cast before."""
        if str(kwargs.get("name", "")).endswith("kernel"):
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)

    def build(self, input_shape):
        super().build(input_shape)
        half = keras.backend.standardize_dtype(self.variable_dtype) in ("float16", "bfloat16")
        dtype = "float32" if half else self.variable_dtype
        for structure in self.structures:
            alpha = self.add_weight(
                name=f"{structure}_alpha",
                shape=self.alpha_shape(structure),
                dtype=dtype,
                initializer=_fresh(self.alpha_initializer),
                regularizer=self.alpha_regularizer,
                autocast=False,
            )
            threshold = self.given_thresholds[structure]
            if isinstance(threshold, str):
                threshold = getattr(self, f"{threshold}_threshold")
            elif isinstance(threshold, keras.Variable):
                never_cast(threshold)
            else:
                threshold = self.add_weight(
                    name=f"{structure}_threshold",
                    shape=(),
                    dtype=dtype,
                    initializer=keras.initializers.Constant(threshold),
                    trainable=False,
                    autocast=False,
                )
            setattr(self, f"{structure}_alpha", alpha)
            setattr(self, f"{structure}_threshold", threshold)
        self.built = True
        if not self._is_restored:
            self._warn_if_dead()

    @property
    def alphas(self) -> dict[str, keras.Variable]:
        return {structure: getattr(self, f"{structure}_alpha") for structure in self.structures}

    @property
    def thresholds(self) -> dict[str, keras.Variable]:
        return {structure: getattr(self, f"{structure}_threshold") for structure in self.structures}

    def kernel_of(self, structure: str) -> str:
        """The kernel that a structure multiplies: filters the last one, everything else the first."""
        names = list(self._kernels)
        return names[-1] if structure == "filter" else names[0]

    def raw_kernel(self, name: str) -> keras.Variable:
        """The trained variable behind `layer.<name>`, before it is multiplied."""
        return getattr(self, f"_{name}")

    def alpha_shape(self, structure: str) -> tuple[int, ...]:
        """Of the kernel's rank, 1 along the axes on which the structure does not differ.

        A 3x3 convolution of 16 channels: column (3, 3, 16, 1), channel (1, 1, 16, 1), shape (3, 3, 1, 1),
        layer (1, 1, 1, 1), filter (1, 1, 1, filters).
        """
        name = self.kernel_of(structure)
        shape, letters = self.raw_kernel(name).shape, self._kernels[name]
        letters = "t" * (len(shape) - 2) + letters
        differs = STRUCTURES[structure]
        if structure == "filter" and "o" not in letters:  # depthwise: an output is an input and a number
            differs = "im"
        return tuple(n if letter in differs else 1 for n, letter in zip(shape, letters))

    # -- the multiplication --------------------------------------------------------------------------------------

    def multiplier(self, structure: str):
        """nu: alpha, 0 where |alpha| is below the threshold; its gradient with respect to alpha is 1 everywhere."""
        alpha = ops.convert_to_tensor(self.alphas[structure])
        threshold = ops.cast(ops.convert_to_tensor(self.thresholds[structure]), alpha.dtype)
        pruned = ops.where(ops.abs(alpha) < threshold, alpha, ops.zeros_like(alpha))
        return alpha - ops.stop_gradient(pruned)

    def effective_kernel(self, name: str = "kernel"):
        """w * nu of all structures, in the precision in which the variables are stored."""
        structures = [s for s in self.structures if self.kernel_of(s) == name]
        value = ops.convert_to_tensor(self.raw_kernel(name))
        passed = None
        for structure in structures:
            nu = self.multiplier(structure)
            if self.gradient == "paper_eq5":
                still = ops.stop_gradient(nu)
                passed = nu - still if passed is None else passed + (nu - still)
                nu = still
            value = ops.cast(value, nu.dtype) * nu
        return value if passed is None else value + passed

    @property
    def kernel(self):
        if "_kernel" not in vars(self):
            raise AttributeError("You must build the layer before accessing `kernel`.")
        return ops.cast(self.effective_kernel("kernel"), self.compute_dtype)

    @kernel.setter
    def kernel(self, variable):
        self._kernel = variable

    def alive(self) -> dict[str, np.ndarray]:
        """Structure -> booleans of alpha's shape, True where |alpha| reaches the threshold."""
        return {
            structure: np.abs(keras.ops.convert_to_numpy(alpha))
            >= keras.ops.convert_to_numpy(self.thresholds[structure])
            for structure, alpha in self.alphas.items()
        }

    def _warn_if_dead(self) -> None:
        try:
            dead = [structure for structure, left in self.alive().items() if not left.any()]
        except Exception:  # built inside a traced function: the numbers do not exist yet
            return
        if dead:
            warnings.warn(
                f"{self.name}: every {' and every '.join(dead)} starts pruned (|alpha| < threshold), so the layer "
                "passes nothing on until training brings one back. Behind such a layer a network without another way "
                "around it learns nothing: use alpha_initializer='ones', or a smaller threshold.",
                stacklevel=3,
            )

    # -- Keras ---------------------------------------------------------------------------------------------------

    def get_config(self):
        structures = self.structures
        thresholds = _shared_by_name(self.thresholds if self.built else self.given_thresholds)
        thresholds = {
            s: float(ops.convert_to_numpy(t)) if isinstance(t, keras.Variable) else t for s, t in thresholds.items()
        }
        return {
            **super().get_config(),
            "structure": structures[0] if len(structures) == 1 else list(structures),
            "threshold": thresholds if len(set(thresholds.values())) > 1 else thresholds[structures[0]],
            "alpha_initializer": keras.initializers.serialize(self.alpha_initializer),
            "alpha_regularizer": keras.regularizers.serialize(self.alpha_regularizer),
            "gradient": self.gradient,
        }

    @classmethod
    def from_config(cls, config):
        layer = super().from_config(config)
        layer._is_restored = True  # its alphas are about to be loaded: how they start tells nothing
        return layer

    def plain_config(self) -> dict:
        """The config of the Keras parent, in a state of its own."""
        own = ("structure", "threshold", "alpha_initializer", "alpha_regularizer", "gradient")
        return {key: value for key, value in self.get_config().items() if key not in own}

    def save_own_variables(self, store):
        keras.layers.Layer.save_own_variables(self, store)  # the parents' would leave alpha out

    def load_own_variables(self, store):
        keras.layers.Layer.load_own_variables(self, store)

    def enable_lora(self, *args, **kwargs):
        raise NotImplementedError(f"{self.name}: LoRA goes onto plain layers; call keras_prune.strip(model) first.")

    def quantize(self, *args, **kwargs):
        raise NotImplementedError(f"{self.name}: only plain layers are quantized; call keras_prune.strip(model) first.")


def _fresh(initializer):
    """An initializer object draws the same numbers again and again; a copy without a seed draws others."""
    return initializer.clone() if isinstance(initializer, keras.initializers.Initializer) else initializer


def _checked_structures(structure) -> tuple[str, ...]:
    several = isinstance(structure, Iterable) and not isinstance(structure, str)
    names = tuple(structure) if several else (structure,)
    if not names or len(set(names)) != len(names) or any(name not in STRUCTURES for name in names):
        raise ValueError(
            f"structure={structure!r} was passed; expected one of {', '.join(STRUCTURES)}, or several different ones "
            "of them, whose factors multiply."
        )
    return names


def _shared_by_name(thresholds: Mapping) -> dict:
    """One variable for several structures stands at the first of them; the others name that one."""
    first: dict[int, str] = {}
    return {
        structure: threshold
        if not isinstance(threshold, keras.Variable) or first.setdefault(id(threshold), structure) == structure
        else first[id(threshold)]
        for structure, threshold in thresholds.items()
    }


def _checked_thresholds(threshold, structures) -> Mapping:
    given = dict(threshold) if isinstance(threshold, Mapping) else dict.fromkeys(structures, threshold)
    if set(given) != set(structures):
        raise ValueError(f"threshold={threshold!r} was passed for the structures {structures}; expected one of each.")
    for name, value in given.items():
        if isinstance(value, str) and value in structures[: structures.index(name)]:
            continue  # a config: the variable of that structure
        if isinstance(value, keras.Variable):
            if value.trainable or tuple(value.shape):
                raise ValueError(
                    f"threshold={value!r} was passed; expected a scalar keras.Variable(…, trainable=False)."
                )
        elif isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < float("inf"):
            raise ValueError(
                f"threshold={value!r} was passed; expected a number from 0 up (0 prunes nothing), a scalar "
                "keras.Variable(…, trainable=False), or {structure: one of these}."
            )
    # Not a dict: Keras would track the variables in it now, in another order than those of a loaded layer.
    return MappingProxyType(_shared_by_name({name: given[name] for name in structures}))


@keras.saving.register_keras_serializable(package="keras_prune")
class PSPDense(PSPLayer, keras.layers.Dense):
    """Dense that learns which inputs (`"channel"`, `"column"`) or units (`"filter"`) it needs.

    Its kernel (inputs, units) has no taps: column is channel here, shape is layer. Arguments: those of
    `keras.layers.Dense`, and those of `PSPConv2D`.
    """


@keras.saving.register_keras_serializable(package="keras_prune")
class PSPConv1D(PSPLayer, keras.layers.Conv1D):
    """Conv1D that learns its own shape. Arguments: those of `keras.layers.Conv1D`, and those of `PSPConv2D`."""


@keras.saving.register_keras_serializable(package="keras_prune")
class PSPConv2D(PSPLayer, keras.layers.Conv2D):
    """Conv2D that learns its own shape.

    Args:
        args, kwargs: as for `keras.layers.Conv2D`.
        structure: what can be pruned: `"column"` (one tap of one input channel), `"channel"` (an input channel),
            `"shape"` (a tap), `"layer"` (all of it; for layers that something leads around), `"filter"` (an output
            channel), or several of them, whose factors multiply.
        threshold: structures with |alpha| below it are pruned (the paper's epsilon: 0.1 for DenseNets, 0.2 for
            ResNets): a number from 0 up, a scalar `keras.Variable(..., trainable=False)`, which may be shared and moved
            by a callback, or `{structure: one of these}`. `layer.thresholds[structure]` is a variable in any case.
        alpha_initializer: `"ones"` starts as the plain layer would. The paper draws from a normal distribution with
            deviation 0.1, `keras.initializers.RandomNormal(stddev=0.1)`: two thirds of the structures (threshold 0.1)
            or 95 % (0.2) then start pruned and have to be brought back by their gradients; a warning says when
            all of a layer's do.
        alpha_regularizer: `decay(1e-4)`, the paper's weight decay; `keras.regularizers.L1(rate)` for its comparison.
        gradient: `"chain"`, the derivative of w * nu: dE/dalpha = sum of w * dE/dq over the structure; or
            `"paper_eq5"`, eq. 5 as printed, read with q for w: the sum of dE/dq.

    Raises:
        ValueError: an unknown structure or gradient, or a threshold that is none.

    Input and output shapes are those of the parent. dE/dw is nu * dE/dq: the weights of a pruned structure rest.
    """


@keras.saving.register_keras_serializable(package="keras_prune")
class PSPConv3D(PSPLayer, keras.layers.Conv3D):
    """Conv3D that learns its own shape. Arguments: those of `keras.layers.Conv3D`, and those of `PSPConv2D`."""


@keras.saving.register_keras_serializable(package="keras_prune")
class PSPConv2DTranspose(PSPLayer, keras.layers.Conv2DTranspose):
    """Conv2DTranspose that learns its own shape. Arguments: those of `keras.layers.Conv2DTranspose`, and those of
    `PSPConv2D`."""

    _kernels = {"kernel": "oi"}


@keras.saving.register_keras_serializable(package="keras_prune")
class PSPDepthwiseConv2D(PSPLayer, keras.layers.DepthwiseConv2D):
    """DepthwiseConv2D that learns its own shape: a `"channel"` is an input with its outputs, a `"filter"` one output.

    Arguments: those of `keras.layers.DepthwiseConv2D`, and those of `PSPConv2D`.
    """

    _kernels = {"kernel": "im"}


@keras.saving.register_keras_serializable(package="keras_prune")
class PSPSeparableConv2D(PSPLayer, keras.layers.SeparableConv2D):
    """SeparableConv2D that learns its own shape: filters of the pointwise kernel, all else of the depthwise one.

    Arguments: those of `keras.layers.SeparableConv2D`, and those of `PSPConv2D`.
    """

    _kernels = {"depthwise_kernel": "im", "pointwise_kernel": "io"}

    @property
    def depthwise_kernel(self):
        return ops.cast(self.effective_kernel("depthwise_kernel"), self.compute_dtype)

    @depthwise_kernel.setter
    def depthwise_kernel(self, variable):
        self._depthwise_kernel = variable

    @property
    def pointwise_kernel(self):
        return ops.cast(self.effective_kernel("pointwise_kernel"), self.compute_dtype)

    @pointwise_kernel.setter
    def pointwise_kernel(self, variable):
        self._pointwise_kernel = variable


PLAIN: dict[type, type] = {
    PSPDense: keras.layers.Dense,
    PSPConv1D: keras.layers.Conv1D,
    PSPConv2D: keras.layers.Conv2D,
    PSPConv3D: keras.layers.Conv3D,
    PSPConv2DTranspose: keras.layers.Conv2DTranspose,
    PSPDepthwiseConv2D: keras.layers.DepthwiseConv2D,
    PSPSeparableConv2D: keras.layers.SeparableConv2D,
}
"""PSP layer -> the layer it becomes when it is settled."""


@rule(*PLAIN)
def psp(layer, call, *inputs):
    """The parent's labels; an alpha carries those of its kernel on the axes along which it differs."""
    labels = RULES[PLAIN[type(layer)].__name__](layer, call, *inputs)
    for name in layer._kernels:
        labels.weights[f"_{name}"] = labels.weights.pop(name)
    for structure, alpha in layer.alphas.items():
        axes = labels.weights[f"_{layer.kernel_of(structure)}"]
        labels.weights[f"{structure}_alpha"] = tuple(i if n > 1 else None for i, n in zip(axes, alpha.shape))
    return labels
