"""In the child process: what tensorflow-model-optimization rounds, and how.

Its own scheme gives all channels of a depthwise kernel one scale, where the int8 file could have one for each: the
accuracy of depthwise networks suffers. This one rounds each channel by itself, as post-training quantization does.
"""

import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras import quantizers
from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import (
    default_8bit_quantize_configs,
    default_8bit_quantize_registry,
    default_8bit_quantize_scheme,
)

from tflite_export.quantaware.lowering import MEND, Refused

# Layers without weights that tfmot does not list: their outputs are rounded like those of Add.
_OUTPUT_ONLY = ("Multiply", "Subtract", "Maximum", "Minimum", "Average")


class DepthwiseQuantizer(quantizers.LastValueQuantizer):
    """One scale per channel of a depthwise kernel (height, width, channels, multiplier)."""

    def __init__(self):
        super().__init__(num_bits=8, per_axis=True, symmetric=True, narrow_range=True)

    def build(self, tensor_shape, name, layer):
        def ends(suffix: str, value: float):
            start = tf_keras.initializers.Constant(value)
            shape = (int(tensor_shape[2]) * int(tensor_shape[3]),)
            return layer.add_weight(f"{name}_{suffix}", shape=shape, initializer=start, trainable=False)

        return {"min_var": ends("min", -6.0), "max_var": ends("max", 6.0)}

    def __call__(self, inputs, training, weights, **kwargs):
        import tensorflow as tf

        height, width, channels, multiplier = inputs.shape
        # Fake quantization takes the last axis, and the file's kernel is (1, height, width, channels x multiplier).
        flat = tf.reshape(inputs, (height, width, 1, channels * multiplier))
        return tf.reshape(super().__call__(flat, training, weights, **kwargs), inputs.shape)

    def get_config(self):
        return {}


class DepthwiseConfig(default_8bit_quantize_registry.Default8BitQuantizeConfig):
    """tfmot's treatment of a layer with a kernel and an activation, with `DepthwiseQuantizer` for the kernel."""

    def __init__(self, weight_attrs=("depthwise_kernel",), activation_attrs=("activation",), quantize_output=False):
        super().__init__(list(weight_attrs), list(activation_attrs), quantize_output)
        self.weight_quantizer = DepthwiseQuantizer()


class Scheme(default_8bit_quantize_scheme.Default8BitQuantizeScheme):
    """tfmot's scheme for 8 bits, with one scale per channel for depthwise kernels."""

    def get_quantize_registry(self):
        registry = super().get_quantize_registry()
        registry._layer_quantize_map[tf_keras.layers.DepthwiseConv2D] = DepthwiseConfig()
        return registry


def quantised(model):
    """A tf_keras model with fake quantization wherever an int8 file rounds.

    Raises:
        Refused: a layer that tensorflow-model-optimization does not train, by name.
    """
    registry = Scheme().get_quantize_registry()
    annotate = tfmot.quantization.keras.quantize_annotate_layer

    def annotated(layer):
        kind = type(layer).__name__
        if registry.supports(layer) or kind in ("BatchNormalization", "SeparableConv2D"):
            return annotate(layer)
        if kind in _OUTPUT_ONLY:
            return annotate(layer, default_8bit_quantize_configs.Default8BitOutputQuantizeConfig())
        raise Refused(
            f"tensorflow-model-optimization cannot train the layer {layer.name!r} ({kind}) on fake quantization. {MEND}"
        )

    own = {"DepthwiseConfig": DepthwiseConfig, "DepthwiseQuantizer": DepthwiseQuantizer}
    with tfmot.quantization.keras.quantize_scope(own):
        clone = tf_keras.models.clone_model(model, clone_function=annotated)
        clone.set_weights(model.get_weights())
        try:
            return tfmot.quantization.keras.quantize_apply(clone, Scheme())
        except (ValueError, RuntimeError) as error:
            raise Refused(f"tensorflow-model-optimization refuses the network: {str(error)[:300]} {MEND}") from error
